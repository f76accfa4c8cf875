//! From requests to commands, and from outcomes of commands to what the device model hears: repetition, refusal,
//! failure, success.

use std::time::{Duration, Instant};

use iscsi::initiator::{Command, Direction, Outcome as TaskOutcome, Violation};
use iscsi::scsi::alua::AccessState;
use iscsi::scsi::sense::{Action, asc};
use iscsi::scsi::{self, Cdb, SenseKey, Status, unmap};

use super::{IscsiEngine, MAX_FAILURES, RETRY_MAX, RETRY_MIN, SETTLED};
use crate::engine::{Completion, Op, Outcome, Request};
use crate::portal::job::{Payload, unmap_payload};
use crate::portal::probe::reason;

/// After a reset of the unit by somebody else, what is not answered within this time is asked for.
const CLEARED_PATIENCE: Duration = Duration::from_secs(2);

impl IscsiEngine {
    /// The command for a request; `Err` if it can be answered without one.
    pub(super) fn build(&self, request: &Request) -> Result<(Command, Payload), Outcome> {
        let blocks = request.blocks;
        let in_range = request.lba.checked_add(u64::from(blocks)).is_some_and(|end| end <= self.lun.blocks);
        let data_bytes = u64::from(blocks) * u64::from(self.lun.block_bytes);
        let limits = &self.options.timeouts;
        let command = |cdb, direction, len_bytes, timeout| Command {
            lun: self.lun_address,
            cdb,
            direction,
            len_bytes,
            // Of a parameter list, targets report all sorts of residuals (tgt: all of UNMAP's); of blocks, none may miss.
            exact: matches!(request.op, Op::Read | Op::Write { .. }),
            timeout,
        };
        if request.op != Op::Flush {
            if !in_range || (self.lun.read_only && request.op != Op::Read) {
                return Err(Outcome::IoError);
            }
            if blocks == 0 {
                // A WRITE SAME or UNMAP of no blocks would mean something else.
                return Err(Outcome::Ok);
            }
        }
        match request.op {
            Op::Read | Op::Write { .. } => {
                let len_bytes = u32::try_from(data_bytes).map_err(|_| Outcome::IoError)?;
                if request.data.len_bytes() as u64 != data_bytes {
                    return Err(Outcome::IoError);
                }
                let (cdb, direction) = match request.op {
                    Op::Write { fua } => {
                        (Cdb::write(request.lba, blocks, fua && self.lun.fua), Direction::Write)
                    }
                    _ => (Cdb::read(request.lba, blocks), Direction::Read),
                };
                Ok((command(cdb, direction, len_bytes, limits.command), Payload::Guest))
            }
            Op::Flush => Ok((
                command(Cdb::synchronize_cache_10(), Direction::None, 0, limits.command * 2),
                Payload::Guest,
            )),
            Op::Discard => {
                if self.lun.max_discard_blocks == 0 {
                    return Err(Outcome::Unsupported);
                }
                let len_bytes = unmap::ONE_DESCRIPTOR_BYTES as u32;
                let cdb = Cdb::unmap(len_bytes as u16);
                Ok((
                    command(cdb, Direction::Write, len_bytes, limits.command * 2),
                    unmap_payload(request.lba, blocks),
                ))
            }
            Op::WriteZeroes { unmap } => {
                if self.lun.max_write_zeroes_blocks == 0 {
                    return Err(Outcome::Unsupported);
                }
                let unmap = unmap && self.lun.write_zeroes_may_unmap;
                let cdb = Cdb::write_same_16(request.lba, blocks, unmap);
                let command = command(cdb, Direction::Write, self.lun.block_bytes, limits.command * 2);
                Ok((command, Payload::Zeroes))
            }
        }
    }

    /// Ends a request; its memory is given back as soon as the wire no longer needs it.
    pub(super) fn finish(&mut self, slot: u16, outcome: Outcome) {
        let Some(job) = self.jobs.get_mut(slot) else { return };
        if job.unsent > 0 {
            job.ended = Some(outcome);
            self.pinned.push(slot);
            return;
        }
        let Some(job) = self.jobs.take(slot) else { return };
        let Some(tag) = job.tag else { return };
        self.observe_end(slot);
        self.free.push(slot);
        match outcome {
            Outcome::Ok => self.stats.completed += 1,
            _ => self.stats.failed += 1,
        }
        self.ready.push(Completion { tag, outcome, data: job.data });
    }

    pub(super) fn release_pinned(&mut self) {
        let mut at = 0;
        while let Some(&slot) = self.pinned.get(at) {
            match self.jobs.get(slot) {
                Some(job) if job.unsent > 0 => at += 1,
                job => {
                    let outcome = job.and_then(|j| j.ended);
                    self.pinned.swap_remove(at);
                    if let Some(outcome) = outcome {
                        self.finish(slot, outcome);
                    }
                }
            }
        }
    }

    /// A number from 0.5 to 1.5 times the duration.
    pub(super) fn jittered(&mut self, duration: Duration) -> Duration {
        // xorshift64
        self.jitter ^= self.jitter << 13;
        self.jitter ^= self.jitter >> 7;
        self.jitter ^= self.jitter << 17;
        duration.mul_f64(0.5 + (self.jitter >> 40) as f64 / (1u64 << 24) as f64)
    }

    /// The request failed in a way that repetition may cure.
    pub(super) fn retry_failed(&mut self, slot: u16, why: &str, now: Instant) {
        let Some(job) = self.jobs.get_mut(slot) else { return };
        job.failures += 1;
        let (failures, name) = (job.failures, job.command.cdb.name());
        if failures > MAX_FAILURES {
            if self.log.allow(now) {
                tracing::error!(url = %self.options.url, command = name, why, "request failed for good");
            }
            self.finish(slot, Outcome::IoError);
            return;
        }
        if self.log.allow(now) {
            tracing::warn!(url = %self.options.url, command = name, why, failures, "command is repeated");
        }
        self.stats.retries += 1;
        self.observer.retried();
        let pause = self.jittered(RETRY_MIN * (1 << (failures - 1).min(8)));
        self.backoff.push((now + pause, slot));
    }

    /// The target turned the command away for the moment.
    pub(super) fn retry_refused(&mut self, slot: u16, at_once: bool, why: &str, now: Instant) {
        let busy_limit = self.options.timeouts.busy;
        let Some(job) = self.jobs.get_mut(slot) else { return };
        let since = *job.refused_since.get_or_insert(now);
        job.refusals += 1;
        let (refusals, name) = (job.refusals, job.command.cdb.name());
        if now.saturating_duration_since(since) > busy_limit {
            if self.log.allow(now) {
                tracing::error!(url = %self.options.url, command = name, why, "target does not become ready");
            }
            self.finish(slot, Outcome::IoError);
            return;
        }
        self.stats.retries += 1;
        self.observer.retried();
        // A target has one unit attention for each event; one that never ends is slowed down like any refusal.
        if at_once && refusals <= 8 {
            self.waiting.push_front(slot);
            return;
        }
        let pause = RETRY_MAX.min(RETRY_MIN * (1 << refusals.min(8)));
        let pause = self.jittered(pause);
        self.backoff.push((now + pause, slot));
    }

    pub(super) fn fail(&mut self, slot: u16, why: &str, now: Instant) {
        if self.log.allow(now)
            && let Some(job) = self.jobs.get(slot)
        {
            tracing::error!(url = %self.options.url, command = job.command.cdb.name(), why, "request failed");
        }
        self.finish(slot, Outcome::IoError);
    }

    /// A command of a request ended.
    pub(super) fn ended(&mut self, index: usize, slot: u16, outcome: TaskOutcome, now: Instant) {
        self.observer.outcome(&outcome);
        let (status, sense, transferred_bytes) = match outcome {
            TaskOutcome::Status { status, sense, transferred_bytes } => (status, sense, transferred_bytes),
            TaskOutcome::TargetFailure { response } => {
                return self.retry_failed(
                    slot,
                    &format!("the target failed with response {response:#04x}"),
                    now,
                );
            }
            TaskOutcome::Damaged(violation) => return self.retry_failed(slot, &violation.to_string(), now),
            TaskOutcome::Aborted => return self.retry_failed(slot, "it took too long and was aborted", now),
        };
        match status {
            // Claimed for data that is still here: it cannot be stored, and what refers to it must not change.
            Status::GOOD if self.jobs.get(slot).is_some_and(|j| j.unsent > 0) => {
                self.paths[index].counters.count(Violation::Unfetched);
                return self.retry_failed(slot, &Violation::Unfetched.to_string(), now);
            }
            Status::GOOD => return self.good(index, slot, now),
            Status::BUSY | Status::TASK_SET_FULL => {
                self.stats.busy += 1;
                if status == Status::TASK_SET_FULL {
                    // Half of what was too much; a success for each command of the window adds one again.
                    let path = &mut self.paths[index];
                    path.window = (path.outstanding() / 2).max(1);
                    path.window_credit = 0;
                }
                return self.retry_refused(slot, false, &status.to_string(), now);
            }
            Status::CHECK_CONDITION => {}
            _ if status.is_transient() => return self.retry_refused(slot, false, &status.to_string(), now),
            _ => return self.fail(slot, &status.to_string(), now),
        }
        let why = reason(status, sense);
        let Some(sense) = sense else {
            return self.retry_failed(slot, "CHECK CONDITION without sense data", now);
        };
        if sense.deferred {
            // About an earlier command, which was answered already; this one was not carried out (SPC-4 4.5.7).
            tracing::error!(url = %self.options.url, %sense, "deferred error of an earlier command");
            return self.retry_refused(slot, true, &why, now);
        }
        if sense.key == SenseKey::UnitAttention {
            self.stats.unit_attentions += 1;
            if self.log.allow(now) {
                tracing::info!(url = %self.options.url, %sense, "unit attention");
            }
            match sense.code {
                asc::ALUA_STATE_CHANGED => self.access_changed(now),
                // Somebody reset the unit or cleared its tasks. Others of ours may have been among them.
                asc::COMMANDS_CLEARED | 0x2900..=0x2904 => {
                    if let Some(wire) = &mut self.paths[index].wire {
                        wire.session.hasten(now, CLEARED_PATIENCE);
                    }
                }
                _ => {}
            }
        }
        if sense.key == SenseKey::NotReady
            && let Some(state) = AccessState::from_sense(sense.code)
        {
            // Not the unit's fault but the path's: the next one that is open takes it, or this one when it opens.
            self.access_lost(index, state, now);
            self.stats.retries += 1;
            self.observer.retried();
            self.waiting.push_front(slot);
            return;
        }
        match sense.action() {
            Action::Retry if sense.key == SenseKey::AbortedCommand => self.retry_failed(slot, &why, now),
            Action::Retry => self.retry_refused(slot, sense.key == SenseKey::UnitAttention, &why, now),
            Action::Rescan => {
                self.paths[index].rescan = true;
                self.retry_refused(slot, true, &why, now);
            }
            Action::Log => {
                let complete = self.jobs.get(slot).is_some_and(|j| j.command.len_bytes == transferred_bytes);
                if complete {
                    if self.log.allow(now) {
                        tracing::warn!(url = %self.options.url, %sense, "done with a remark");
                    }
                    self.good(index, slot, now);
                } else {
                    self.retry_failed(slot, &why, now);
                }
            }
            Action::Unsupported => self.unsupported(slot, &why, now),
            Action::NoSpace => self.fail(slot, "the thinly provisioned LUN is out of space", now),
            Action::Fail => self.fail(slot, &why, now),
        }
    }

    /// The unit does not know the command.
    pub(super) fn unsupported(&mut self, slot: u16, why: &str, now: Instant) {
        let Some(job) = self.jobs.get_mut(slot) else { return };
        let is_sync = matches!(
            job.command.cdb.opcode(),
            scsi::opcode::SYNCHRONIZE_CACHE_10 | scsi::opcode::SYNCHRONIZE_CACHE_16
        );
        if job.command.cdb.opcode() == scsi::opcode::SYNCHRONIZE_CACHE_10 {
            job.command.cdb = Cdb::synchronize_cache_16();
            self.waiting.push_front(slot);
        } else if is_sync && !self.lun.write_cache {
            // Without a volatile cache there is nothing to write back.
            self.finish(slot, Outcome::Ok);
        } else if matches!(job.op, Op::Discard | Op::WriteZeroes { .. }) {
            self.finish(slot, Outcome::Unsupported);
        } else {
            self.fail(slot, why, now);
        }
    }

    pub(super) fn good(&mut self, index: usize, slot: u16, now: Instant) {
        let depth = usize::from(self.depth());
        let path = &mut self.paths[index];
        path.window_credit += 1;
        if path.window_credit >= path.window {
            path.window_credit = 0;
            path.window = (path.window + 1).min(depth);
        }
        // A session that gets something done is worth having again soon; one that lasts, at once.
        let settled = now.saturating_duration_since(path.up_since) >= SETTLED;
        path.attempts = path.attempts.min(if settled { 0 } else { 1 });
        let losses = self.stats.sessions_lost;
        if let Some(job) = self.jobs.get_mut(slot)
            && let Some(write) = job.written.take()
            && job.losses != losses
        {
            // The target may have lost power with the session, and with it what was written but not yet stable.
            (job.command, job.payload, job.losses) = (write, Payload::Guest, losses);
            job.op = Op::Write { fua: true };
            self.waiting.push_front(slot);
            return;
        }
        if let Some(job) = self.jobs.get_mut(slot)
            && job.op == (Op::Write { fua: true })
            && !self.lun.fua
            && self.lun.write_cache
        {
            // The unit has a volatile cache and no FUA: the write is stable after a SYNCHRONIZE CACHE behind it.
            job.op = Op::Flush;
            job.written = Some(job.command);
            job.payload = Payload::Zeroes;
            job.command.cdb = Cdb::synchronize_cache_10();
            job.command.direction = Direction::None;
            job.command.len_bytes = 0;
            self.waiting.push_front(slot);
            return;
        }
        self.finish(slot, Outcome::Ok);
    }
}
