//! Getting a session back, and making sure that the unit behind it is still the same.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iscsi::initiator::{Outcome as TaskOutcome, SessionError, Violation};
use iscsi::pdu::framing::FrameError;
use iscsi::scsi::Status;

use super::{IscsiEngine, MAX_FAILURES, Phase, Place, add_wire, chain, own_job};
use crate::engine::Outcome;
use crate::portal::PortalError;
use crate::portal::link::Dial;
use crate::portal::login::Purpose;
use crate::portal::probe::{Found, Next, Probe, ProbeError, Reply};
use crate::portal::wire::WireError;

/// Longest pause between attempts where the portal answers, but sessions or logins break off.
const ANSWERED_MAX: Duration = Duration::from_millis(500);

impl IscsiEngine {
    /// The engine's own command ended.
    pub(super) fn own_ended(&mut self, outcome: TaskOutcome, now: Instant) {
        let Phase::Probing { probe, later } = &mut self.phase else { return };
        let mut data = Vec::new();
        let (status, sense) = match outcome {
            TaskOutcome::Status { status, sense, transferred_bytes } => {
                if let Some(job) = self.jobs.get(self.own_slot) {
                    data.resize(transferred_bytes as usize, 0);
                    job.data.copy_to(0, &mut data);
                }
                (status, sense)
            }
            // Tried again; the probe bounds how often.
            _ => (Status::BUSY, None),
        };
        self.jobs.take(self.own_slot);
        match probe.answer(Reply { status, sense, data: &data }) {
            Ok(Next::Send) => *later = Some(now),
            Ok(Next::Later(pause)) => *later = Some(now + pause),
            Ok(Next::Done) => self.probed(now),
            Err(source) => {
                let error = self.probe_error(source);
                self.lost(&error, 0, None, now);
            }
        }
    }

    pub(super) fn probe_error(&self, source: ProbeError) -> PortalError {
        PortalError::Probe {
            target: self.options.url.target.clone().unwrap_or_default(),
            lun: self.lun_address.to_string(),
            source,
        }
    }

    /// The unit was looked at again.
    pub(super) fn probed(&mut self, now: Instant) {
        let Phase::Probing { probe, .. } = std::mem::replace(&mut self.phase, Phase::Up) else { return };
        let found = match probe.finish() {
            Ok(found) => found,
            Err(source) => {
                let error = self.probe_error(source);
                return self.lost(&error, 0, None, now);
            }
        };
        if !found.is_same_unit(&self.found) {
            let describe = |f: &Found| {
                format!(
                    "serial {:?}, {} bytes per block",
                    f.serial.as_ref().or(f.designator.as_ref()),
                    f.capacity.block_bytes
                )
            };
            let error = PortalError::OtherUnit {
                target: self.options.url.target.clone().unwrap_or_default(),
                lun: self.lun_address.to_string(),
                before: describe(&self.found),
                now: describe(&found),
            };
            return self.lost(&error, 0, None, now);
        }
        self.away_since = None;
        let lun = found.lun(self.options.read_only);
        if lun != self.lun {
            tracing::info!(url = %self.options.url, blocks_before = self.lun.blocks, blocks = lun.blocks, "unit changed");
            if lun.blocks < self.lun.blocks {
                tracing::warn!(url = %self.options.url, "the unit shrank; requests behind its end fail");
            }
            self.lun = lun;
            self.changed = true;
        }
        self.found = found;
    }

    /// Sends the probe's next command, if it is time.
    pub(super) fn drive_probe(&mut self, now: Instant) {
        let Phase::Probing { probe, later } = &mut self.phase else { return };
        if later.is_none_or(|at| at > now) || self.jobs.get(self.own_slot).is_some() {
            return;
        }
        *later = None;
        let command = probe.next();
        self.jobs.put(self.own_slot, own_job(command));
        if let Some(wire) = &mut self.wire {
            wire.session.submit(self.own_slot, command, now);
        }
    }

    pub(super) fn start_probe(&mut self, now: Instant) {
        self.rescan = false;
        self.phase = Phase::Probing { probe: Box::new(Probe::new(self.lun_address)), later: Some(now) };
        self.jobs.take(self.own_slot);
    }

    /// Ends what is not with the target: for a guest that no longer waits for it.
    pub(super) fn drop_waiting(&mut self) {
        self.fail_waiting();
        self.abandoned = self.free.len() < usize::from(self.own_slot);
    }

    fn fail_waiting(&mut self) {
        while let Some(slot) = self.waiting.pop_front() {
            self.finish(slot, Outcome::IoError);
        }
        while let Some((_, slot)) = self.backoff.pop() {
            self.finish(slot, Outcome::IoError);
        }
    }

    /// The session is lost: what it owes us waits for the next one.
    pub(super) fn lost(
        &mut self,
        error: &(dyn std::error::Error + 'static),
        time2wait_s: u16,
        blamed: Option<u16>,
        now: Instant,
    ) {
        // A login that broke off; a refusal is an answer of another kind.
        let broke_off = matches!(
            error.downcast_ref(),
            Some(PortalError::Login { broken: true, .. } | PortalError::LoginTimeout { .. })
        );
        let answered = self.wire.is_some() || broke_off;
        if let Some(wire) = self.wire.take() {
            self.stats.sessions_lost += 1;
            self.counters.add(wire.session.counters());
            add_wire(&mut self.stats.wire, wire.stats);
            // The connection is closed here; nothing of it is sent any more.
            self.scratch.clear();
            wire.session.unanswered(&mut self.scratch);
            if self.scratch.iter().any(|&slot| slot != self.own_slot) {
                self.in_doubt = Some(Place::from(&self.negotiated));
            }
            drop(wire);
            self.jobs.take(self.own_slot);
            for (_, job) in self.jobs.iter_mut() {
                job.unsent = 0;
            }
            self.release_pinned();
            let own_slot = self.own_slot;
            self.stats.repeated += self.scratch.len() as u64;
            for &slot in self.scratch.iter().rev().filter(|&&slot| slot != own_slot) {
                self.waiting.push_front(slot);
            }
            if let Some(slot) = blamed
                && let Some(job) = self.jobs.get_mut(slot)
            {
                job.failures += 1;
                if job.failures > MAX_FAILURES {
                    self.waiting.retain(|&s| s != slot);
                    self.fail(slot, &chain(error), now);
                }
            }
        }
        self.away_since.get_or_insert(now);
        if self.abandoned {
            self.drop_waiting();
        }
        if self.closing {
            self.phase = Phase::Closed;
            return;
        }
        let limits = &self.options.timeouts;
        // Long pauses spare a network and a target that are away or say no; one that answers is worth another try soon.
        let longest = if answered { limits.backoff_max.min(ANSWERED_MAX) } else { limits.backoff_max };
        let pause = match self.attempts {
            0 => Duration::ZERO,
            n => longest.min(limits.backoff_min * (1 << (n - 1).min(16))),
        };
        self.attempts += 1;
        let time2wait = Duration::from_secs(u64::from(time2wait_s.min(30)));
        let pause = self.jittered(pause).min(longest).max(time2wait);
        tracing::warn!(
            url = %self.options.url,
            error = chain(error),
            attempt = self.attempts,
            pause_ms = pause.as_millis() as u64,
            "no session; trying again"
        );
        self.phase = Phase::Waiting { until: now + pause };
    }

    pub(super) fn wire_lost(&mut self, error: &WireError, now: Instant) {
        let (time2wait_s, blamed) = match error {
            WireError::Session(SessionError::Dropped { time2wait_s }) => (*time2wait_s, None),
            WireError::Session(error) => (0, error.slot()),
            WireError::Frame(FrameError::HeaderDigest { .. }) => {
                self.counters.count(Violation::HeaderDigest);
                (0, None)
            }
            WireError::Frame(_) => {
                self.counters.count(Violation::SegmentTooLong);
                (0, None)
            }
            // Behind a Logout Response this is the FIN that was waited for (11.14).
            WireError::Io(_) | WireError::Closed => {
                (self.wire.as_ref().and_then(|w| w.session.logged_out()).unwrap_or(0), None)
            }
        };
        self.lost(error, time2wait_s, blamed, now);
    }

    /// Makes sure that what the session before left underway is dead: by the login itself if it came to the same portal
    /// group, else by a reset of the unit, before which nothing else is sent.
    fn settle_doubt(&mut self, now: Instant) {
        let here = Place::from(&self.negotiated);
        if self.in_doubt.as_ref().is_none_or(|before| *before == here) {
            self.in_doubt = None;
            return;
        }
        tracing::warn!(url = %self.options.url, before = ?self.in_doubt, now = ?here, "another portal group answers: the unit is reset");
        if let (Some(wire), Phase::Probing { later, .. }) = (&mut self.wire, &mut self.phase) {
            *later = None;
            wire.session.reset_unit(self.lun_address, now);
            self.stats.task_management += 1;
        }
    }

    /// The reset was carried out: the unit can be looked at.
    pub(super) fn unit_reset(&mut self, now: Instant) {
        self.in_doubt = None;
        if let Phase::Probing { later, .. } = &mut self.phase {
            *later = Some(now);
        }
    }

    /// Fails what waits for a target that was away for longer than the user wants to wait, and what comes until it is
    /// back. The new session ends the commands of the old one before it takes any, as always.
    pub(super) fn give_up(&mut self, now: Instant) {
        let Some(at) = self.give_up_at().filter(|&at| at <= now) else { return };
        if self.waiting.is_empty() && self.backoff.is_empty() {
            return;
        }
        if self.log.allow(now) {
            let away_s = self.options.timeouts.give_up.unwrap_or_default().as_secs() + (now - at).as_secs();
            tracing::error!(url = %self.options.url, away_s, requests = self.waiting.len(), "target is away: requests fail");
        }
        self.fail_waiting();
    }

    /// When requests begin to fail, unless the target is back by then.
    pub(super) fn give_up_at(&self) -> Option<Instant> {
        Some(self.away_since? + self.options.timeouts.give_up?)
    }

    /// Gets the session back.
    pub(super) fn reconnect(&mut self, now: Instant) -> bool {
        match &mut self.phase {
            Phase::Waiting { until } if *until <= now => {
                match Dial::start(Arc::clone(&self.options), Purpose::Normal, now) {
                    Ok(dial) => self.phase = Phase::Dialing(Box::new(dial)),
                    Err(error) => {
                        self.lost(&error, 0, None, now);
                        return true;
                    }
                }
            }
            Phase::Dialing(_) => {}
            _ => return false,
        }
        let Phase::Dialing(dial) = &mut self.phase else { return false };
        match dial.poll(now) {
            Ok(None) => false,
            Ok(Some(logged_in)) => {
                self.stats.sessions_regained += 1;
                self.up_since = now;
                self.negotiated = logged_in.negotiated();
                self.wire = Some(logged_in.into_wire(&self.options, now));
                self.start_probe(now);
                self.settle_doubt(now);
                tracing::info!(url = %self.options.url, repeat = self.waiting.len(), "session regained");
                true
            }
            Err(error) => {
                self.lost(&error, 0, None, now);
                true
            }
        }
    }
}
