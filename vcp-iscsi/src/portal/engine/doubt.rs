//! Writes in doubt: a session was lost while they were with the target, which may still carry them out. None of them is
//! repeated before it is certain that its first copy cannot act any more (`docs/decisions/multipath.md`). In this order:
//!
//! 1. The path gets a session back at the same place: the login ended the old one (RFC 7143 6.3.5).
//! 2. Another path leads to the same portal group of the same target: a login through its portal *in the name of the lost
//!    session* ends that as well, with all that its connection holds.
//! 3. Otherwise the unit is reset through another path (LOGICAL UNIT RESET ends the unit's tasks of all sessions, SAM-5
//!    7.7): after a pause in which what the target had received becomes a task, and with no command of ours underway.
//!
//! Reads, and new writes, do not wait for that: a write that was not answered may have any effect until it is, and is only
//! answered when it has been repeated. If its request was ended otherwise (the guest was reset, or was told of a
//! failure), nothing is written before the doubt is settled.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::path::{Doubt, Place};
use super::{IscsiEngine, Phase, chain};
use crate::portal::link::Dial;
use crate::portal::login::Purpose;

/// How long a reset waits for commands underway on other paths.
const QUIET_WITHIN: Duration = Duration::from_millis(300);
/// First pause after a reset that failed, doubled each time.
const RESET_AGAIN_MIN: Duration = Duration::from_millis(100);
/// Longest such pause.
const RESET_AGAIN_MAX: Duration = Duration::from_secs(10);
/// Time limit for connecting in the name of a lost session: to a portal that answers.
const FENCE_CONNECT: Duration = Duration::from_millis(500);
/// Time limit for logging in in its name; a target may take its time to end the old session.
const FENCE_LOGIN: Duration = Duration::from_secs(3);

/// A reset of the unit. No command is sent while there is one.
#[derive(Debug)]
pub(super) struct Reset {
    /// Sent by now, whatever is underway.
    until: Instant,
    /// Where it was sent.
    pub(super) via: Option<usize>,
    /// When it was sent: what was in doubt (and due) by then is settled by it.
    sent: Instant,
}

#[derive(Debug, thiserror::Error)]
#[error("the unit was reset through another path")]
struct ResetElsewhere;

/// Whether the unit can be reset through a path now.
fn can_reset(path: &super::Path) -> bool {
    matches!(path.phase, Phase::Up)
        && path.look.is_none()
        && path.wire.as_ref().is_some_and(|wire| wire.session.can_reset_unit())
}

impl IscsiEngine {
    /// What was in doubt on a path is dead: its writes can be repeated.
    pub(super) fn settled(&mut self, index: usize, how: &'static str) {
        let Some(doubt) = self.paths[index].doubt.take() else { return };
        if !doubt.held.is_empty() {
            tracing::info!(path = %self.paths[index].options.url, writes = doubt.held.len(), how, "writes in doubt are repeated");
        }
        for &slot in doubt.held.iter().rev() {
            self.waiting.push_front(slot);
        }
        self.doubts_changed();
    }

    /// After something was put into doubt, or taken out.
    pub(super) fn doubts_changed(&mut self) {
        self.in_doubt = self.paths.iter().any(|path| path.doubt.is_some());
        self.barrier = self.paths.iter().any(|path| path.doubt.as_ref().is_some_and(|d| d.orphans));
        self.paths_changed();
    }

    /// Adds writes to the doubt of a path whose session just ended.
    pub(super) fn put_in_doubt(&mut self, index: usize, writes: &[u16], now: Instant) {
        let path = &mut self.paths[index];
        let place = Place::from(&path.negotiated);
        match &mut path.doubt {
            // A path in doubt gets no commands, so there is nothing to add.
            Some(doubt) => doubt.held.extend_from_slice(writes),
            None => {
                path.doubt = Some(Doubt {
                    place: Some(place),
                    held: writes.to_vec(),
                    orphans: false,
                    reset_at: now + super::path::DRAIN,
                    login_at: now + super::path::OWN_WAY,
                    dial: None,
                    no_login: false,
                });
            }
        }
        self.doubts_changed();
    }

    /// Takes the slots of writes that are held back, to end their requests; what they may do is in doubt all the more.
    pub(super) fn take_held(&mut self) -> Vec<u16> {
        let mut held = Vec::new();
        for doubt in self.paths.iter_mut().filter_map(|path| path.doubt.as_mut()) {
            doubt.orphans |= !doubt.held.is_empty();
            held.append(&mut doubt.held);
        }
        if !held.is_empty() {
            self.doubts_changed();
        }
        held
    }

    /// Drives what settles doubts. Returns whether anything moved.
    pub(super) fn settle(&mut self, now: Instant) -> bool {
        if self.closing {
            return false;
        }
        let mut moved = false;
        for index in 0..self.paths.len() {
            moved |= self.settle_by_login(index, now);
        }
        self.drive_reset(now);
        moved
    }

    /// A path by whose portal the lost session of this one can be ended with a login.
    fn same_place(&self, index: usize) -> Option<usize> {
        let path = &self.paths[index];
        let doubt = path.doubt.as_ref().filter(|doubt| !doubt.no_login)?;
        // A portal is known to be of the same group only by the group's tag.
        let place @ Place::Group(_) = doubt.place.as_ref()? else { return None };
        self.paths.iter().position(|other| {
            matches!(other.phase, Phase::Up)
                && other.options.url.target == path.options.url.target
                && Place::from(&other.negotiated) == *place
        })
    }

    fn settle_by_login(&mut self, index: usize, now: Instant) -> bool {
        if self.paths[index].wire.is_some() {
            return false;
        }
        let via = self.same_place(index);
        let path = &mut self.paths[index];
        let options = &path.options;
        let Some(doubt) = &mut path.doubt else { return false };
        let Some(dial) = &mut doubt.dial else {
            let Some(via) = via.filter(|_| doubt.login_at <= now) else { return false };
            let mut fence = options.as_ref().clone();
            // The same name at another portal.
            fence.fixed_isid = Some(options.isid());
            fence.timeouts.connect = fence.timeouts.connect.min(FENCE_CONNECT);
            fence.timeouts.login = fence.timeouts.login.min(FENCE_LOGIN);
            fence.url.portal = self.paths[via].options.url.portal.clone();
            let path = &mut self.paths[index];
            let Some(doubt) = &mut path.doubt else { return false };
            match Dial::start(Arc::new(fence), Purpose::Normal, now) {
                Ok(dial) => doubt.dial = Some(Box::new(dial)),
                Err(_) => doubt.no_login = true,
            }
            return true;
        };
        match dial.poll(now) {
            Ok(None) => false,
            Ok(Some(logged_in)) => {
                doubt.dial = None;
                let here = Place::from(&logged_in.negotiated());
                let ends = doubt.place.as_ref() == Some(&here);
                doubt.no_login = !ends;
                // It has done its work; the path itself comes back at its own portal.
                let mut wire = logged_in.into_wire(&path.options, now);
                wire.session.logout(now, Duration::ZERO);
                let _ = wire.send(&mut self.jobs, now);
                if ends {
                    self.stats.fences += 1;
                    self.settled(index, "the lost session was ended by a login through another portal");
                }
                true
            }
            Err(error) => {
                tracing::info!(path = %path.options.url, error = chain(&error), "the lost session cannot be ended by a login");
                doubt.dial = None;
                doubt.no_login = true;
                true
            }
        }
    }

    /// When the unit has to be reset because nothing else settles a doubt.
    fn reset_due(&self) -> Option<Instant> {
        let due = |(index, path): (usize, &super::Path)| {
            let doubt = path.doubt.as_ref()?;
            (doubt.dial.is_none() && (path.wire.is_some() || self.same_place(index).is_none()))
                .then_some(doubt.reset_at)
        };
        let due = self.paths.iter().enumerate().filter_map(due).min()?;
        Some(due.max(self.reset_not_before.unwrap_or(due)))
    }

    fn drive_reset(&mut self, now: Instant) {
        if self.reset.is_none() {
            let someone = self.paths.iter().any(can_reset);
            if !someone || self.reset_due().is_none_or(|at| at > now) {
                return;
            }
            self.reset = Some(Reset { until: now + QUIET_WITHIN, via: None, sent: now });
        }
        let quiet = self.paths.iter().all(|path| path.outstanding() == 0);
        let Some(reset) = &mut self.reset else { return };
        if reset.via.is_some() || (!quiet && now < reset.until) {
            return;
        }
        // One that commands can take, else any.
        let candidates = || self.paths.iter().enumerate().filter(|(_, path)| can_reset(path));
        let via = candidates().min_by_key(|(_, path)| (path.class().is_none(), path.outstanding()));
        let Some(via) = via.map(|(index, _)| index) else {
            self.reset = None;
            return;
        };
        (reset.via, reset.sent) = (Some(via), now);
        self.stats.task_management += 1;
        tracing::warn!(via = %self.paths[via].options.url, "writes are in doubt on another path: the unit is reset");
        let lun = self.paths[via].lun;
        if let Some(wire) = &mut self.paths[via].wire {
            wire.session.reset_unit(lun, now);
        }
    }

    /// The reset was carried out.
    pub(super) fn unit_reset(&mut self, via: usize, now: Instant) {
        let Some(reset) = self.reset.take_if(|reset| reset.via == Some(via)) else { return };
        self.reset_not_before = None;
        self.reset_failures = 0;
        self.stats.unit_resets += 1;
        for index in 0..self.paths.len() {
            let covered = |doubt: &Doubt| doubt.dial.is_none() && doubt.reset_at <= reset.sent;
            if self.paths[index].doubt.as_ref().is_some_and(covered) {
                self.settled(index, "the unit was reset");
            }
            // The reset ended these without a word to their session. They are dead, so that there is no doubt.
            if index != via && self.paths[index].outstanding() > 0 {
                self.lost(index, &ResetElsewhere, 0, None, now);
                self.settled(index, "the unit was reset");
            }
        }
    }

    /// The target refuses to reset the unit. Where it is not even known that anything is in doubt, that has to do.
    pub(super) fn reset_refused(&mut self) {
        for index in 0..self.paths.len() {
            if self.paths[index]
                .doubt
                .as_ref()
                .is_some_and(|doubt| doubt.place.is_none() && doubt.held.is_empty())
            {
                tracing::warn!(
                    path = %self.paths[index].options.url,
                    "cannot make sure that a former process left no write underway on this path"
                );
                self.settled(index, "the target cannot reset the unit");
            }
        }
    }

    /// The path is gone by which the reset was sent.
    pub(super) fn reset_failed(&mut self, via: usize, now: Instant) {
        if self.reset.take_if(|reset| reset.via == Some(via)).is_some() {
            let pause = RESET_AGAIN_MAX.min(RESET_AGAIN_MIN * (1 << self.reset_failures.min(8)));
            self.reset_failures += 1;
            self.reset_not_before = Some(now + pause);
        }
    }

    /// When [`settle`](Self::settle) has something to do.
    pub(super) fn settle_at(&self) -> Option<Instant> {
        let dials = (0..self.paths.len()).filter_map(|index| {
            let path = &self.paths[index];
            let doubt = path.doubt.as_ref()?;
            match &doubt.dial {
                Some(dial) => Some(dial.deadline()),
                None if path.wire.is_none() && self.same_place(index).is_some() => Some(doubt.login_at),
                None => None,
            }
        });
        let reset = match &self.reset {
            Some(reset) if reset.via.is_none() => Some(reset.until),
            Some(_) => None,
            // Without a session there is nobody to send it; one that is in use otherwise ends that with an event.
            None if self.paths.iter().any(can_reset) => self.reset_due(),
            None => None,
        };
        dials.chain(reset).min()
    }
}
