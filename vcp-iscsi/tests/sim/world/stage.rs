//! The course of a run: load with faults, quiet in which all is answered, and the proof of what the disk holds.

use super::{ANSWERED_WITHIN, S, Stage, World};
use crate::guest::Op;
use crate::peer::Target;
use crate::trace::trace;

impl World {
    /// Goes on to the next stage if it is time; whether all is done.
    pub(super) fn advance_stage(&mut self) -> Result<bool, String> {
        match self.stage {
            Stage::Load => {
                let over = self.issued >= self.scenario.ops
                    && (self.guest.in_flight() == 0 || self.now > self.stage_since + 60 * S);
                if over || self.now > 3600 * S {
                    self.quiet();
                } else if self.issued >= self.scenario.ops && self.stage_since == 0 {
                    self.stage_since = self.now.max(1);
                }
                Ok(false)
            }
            Stage::Quiet => {
                // Where requests fail while the target is away, it has to be back.
                if self.guest.in_flight() == 0 && self.is_up() {
                    self.guest.check_idle();
                    self.guest.may_fail = false;
                    self.stage = Stage::Proof { next: 0 };
                    self.stage_since = self.now;
                    self.guest.submit(Op::Flush);
                    return Ok(false);
                }
                self.in_time()?;
                Ok(false)
            }
            Stage::Proof { next } => {
                if self.guest.in_flight() > 0 {
                    self.in_time()?;
                    return Ok(false);
                }
                self.stage_since = self.now;
                if next == 0 {
                    // What was flushed survives this.
                    self.power_loss();
                    self.power_up();
                }
                if next >= self.scenario.unit.blocks {
                    self.guest.check_idle();
                    return match self.guest.violation.take() {
                        Some(what) => Err(what),
                        None => Ok(true),
                    };
                }
                let blocks = 16.min(self.scenario.unit.blocks - next);
                self.guest.submit(Op::Read { lba: next, blocks });
                self.stage = Stage::Proof { next: next + blocks };
                Ok(false)
            }
        }
    }

    pub(super) fn is_up(&self) -> bool {
        vcp_iscsi::engine::Engine::status(self.device.engine())["state"] == "up"
    }

    pub(super) fn in_time(&self) -> Result<(), String> {
        if self.now < self.stage_since + ANSWERED_WITHIN {
            return Ok(());
        }
        Err(format!(
            "no answer within {} s after the faults stopped: {:?}; engine: {}",
            ANSWERED_WITHIN / S,
            self.guest.oldest(),
            vcp_iscsi::engine::Engine::status(self.device.engine())
        ))
    }

    /// The faults stop, and what they left is put right.
    pub(super) fn quiet(&mut self) {
        trace!(self.trace, self.now, "no more faults");
        self.stage = Stage::Quiet;
        self.stage_since = self.now;
        self.faults.active = false;
        self.power_up();
        self.refuse_until = 0;
        self.dead.clear();
        for (group, (_, state)) in self.scenario.unit.groups.clone().into_iter().enumerate() {
            self.target.set_state(group, state);
        }
        self.target.stall(self.now);
        self.target(Target::open_windows);
    }
}
