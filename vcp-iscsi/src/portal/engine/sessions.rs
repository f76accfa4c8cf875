//! Losing a path's session and getting it back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iscsi::initiator::{SessionError, Violation};
use iscsi::pdu::framing::FrameError;

use super::path::Place;
use super::{IscsiEngine, MAX_FAILURES, Phase, chain};
use crate::engine::Outcome;
use crate::portal::PortalError;
use crate::portal::link::Dial;
use crate::portal::login::Purpose;
use crate::portal::wire::WireError;

/// Longest pause between attempts where the portal answers, but sessions or logins break off.
const ANSWERED_MAX: Duration = Duration::from_millis(500);

impl IscsiEngine {
    /// A path's session is lost, or an attempt to get one failed: what it owes us is taken back.
    pub(super) fn lost(
        &mut self,
        index: usize,
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
        let answered = self.paths[index].wire.is_some() || broke_off;
        if !self.closing {
            self.anomaly(index, "session-lost", &chain(error), now);
        }
        self.take_back(index, blamed, error, now);
        if let Some(doubt) = &mut self.paths[index].doubt
            && doubt.place.is_none()
        {
            // It will not come to its first login soon.
            doubt.reset_at = doubt.reset_at.min(now);
        }
        self.paths[index].look = None;
        self.paths[index].sizing = false;
        self.paths[index].access = None;
        self.paths[index].check_at = None;
        self.paths[index].user_timeout = None;
        self.paths_changed();
        if self.closing {
            self.paths[index].phase = Phase::Closed;
        } else {
            let limits = self.paths[index].options.timeouts;
            // Long pauses spare a network and a target that are away or say no; one that answers is worth another try
            // soon.
            let longest = if answered { limits.backoff_max.min(ANSWERED_MAX) } else { limits.backoff_max };
            let pause = match self.paths[index].attempts {
                0 => Duration::ZERO,
                n => longest.min(limits.backoff_min * (1 << (n - 1).min(16))),
            };
            let time2wait = Duration::from_secs(u64::from(time2wait_s.min(30)));
            let pause = self.jittered(pause).min(longest).max(time2wait);
            let path = &mut self.paths[index];
            path.attempts += 1;
            let error = chain(error);
            tracing::warn!(
                url = %path.options.url,
                error,
                attempt = path.attempts,
                pause_ms = pause.as_millis() as u64,
                "no session; trying again"
            );
            path.problem = Some(error);
            path.phase = Phase::Waiting { until: now + pause };
        }
        self.rank(now);
        if self.abandoned {
            self.drop_waiting();
        }
    }

    /// Takes the commands of a session that ended: those that can be repeated at once wait for another path (or the
    /// next session), writes that the target may still carry out are held back.
    fn take_back(
        &mut self,
        index: usize,
        blamed: Option<u16>,
        error: &(dyn std::error::Error + 'static),
        now: Instant,
    ) {
        let Some(wire) = self.paths[index].wire.take() else { return };
        self.stats.sessions_lost += 1;
        self.paths[index].stats.sessions_lost += 1;
        self.paths[index].retire(&wire);
        let mut slots = std::mem::take(&mut self.scratch);
        slots.clear();
        wire.session.unanswered(&mut slots);
        let never_sent = wire.session.queued();
        // The connection is closed here; nothing of it is sent any more, not even by the kernel.
        if wire.session.logged_out().is_none() {
            wire.stream().abort_at_end();
        }
        drop(wire);
        self.jobs.take(self.paths[index].own_slot);
        for (_, job) in self.jobs.iter_mut().filter(|(_, job)| usize::from(job.path) == index) {
            job.unsent = 0;
        }
        self.release_pinned();
        let sent = slots.len().saturating_sub(never_sent);
        let mut writes = Vec::new();
        let depth = self.depth();
        for (at, &slot) in slots.iter().enumerate().filter(|&(_, &slot)| slot < depth) {
            if at < sent && self.jobs.get(slot).is_some_and(|job| job.op.writes()) {
                writes.push(slot);
            }
        }
        let mut moved = 0;
        for &slot in slots.iter().rev().filter(|&slot| *slot < depth && !writes.contains(slot)) {
            self.waiting.push_front(slot);
            moved += 1;
        }
        moved += writes.len() as u64;
        slots.clear();
        self.scratch = slots;
        self.stats.repeated += moved;
        if moved > 0 && self.paths.iter().any(|path| path.class().is_some()) {
            self.stats.failovers += 1;
            self.paths[index].stats.failovers += 1;
        }
        if !writes.is_empty() {
            self.put_in_doubt(index, &writes, now);
        }
        if let Some(slot) = blamed
            && let Some(job) = self.jobs.get_mut(slot)
        {
            job.failures += 1;
            if job.failures > MAX_FAILURES {
                self.waiting.retain(|&s| s != slot);
                if let Some(doubt) = &mut self.paths[index].doubt
                    && doubt.held.contains(&slot)
                {
                    doubt.held.retain(|&s| s != slot);
                    doubt.orphans = true;
                    self.doubts_changed();
                }
                self.fail(slot, &chain(error), now);
            }
        }
        // With the last session lost, or this one's being reset by it.
        self.reset_failed(index, now);
    }

    pub(super) fn wire_lost(&mut self, index: usize, error: &WireError, now: Instant) {
        let path = &mut self.paths[index];
        let (time2wait_s, blamed) = match error {
            WireError::Session(SessionError::Dropped { time2wait_s }) => (*time2wait_s, None),
            WireError::Session(error) => (0, error.slot()),
            WireError::Frame(FrameError::HeaderDigest { .. }) => {
                path.counters.count(Violation::HeaderDigest);
                (0, None)
            }
            WireError::Frame(_) => {
                path.counters.count(Violation::SegmentTooLong);
                (0, None)
            }
            // Behind a Logout Response this is the FIN that was waited for (11.14).
            WireError::Io(_) | WireError::Closed => {
                (path.wire.as_ref().and_then(|w| w.session.logged_out()).unwrap_or(0), None)
            }
        };
        self.lost(index, error, time2wait_s, blamed, now);
        if matches!(error, WireError::Session(SessionError::ResetFailed { .. })) {
            self.reset_refused();
        }
    }

    /// Gets sessions back.
    pub(super) fn reconnect(&mut self, now: Instant) -> bool {
        let mut moved = false;
        for index in 0..self.paths.len() {
            if !matches!(self.paths[index].phase, Phase::Up | Phase::Probing | Phase::Closed) {
                moved |= self.reconnect_path(index, now);
            }
        }
        moved
    }

    fn reconnect_path(&mut self, index: usize, now: Instant) -> bool {
        let path = &mut self.paths[index];
        match &mut path.phase {
            Phase::Waiting { until } if *until <= now => {
                match Dial::start(Arc::clone(&path.options), Purpose::Normal, now) {
                    Ok(dial) => path.phase = Phase::Dialing(Box::new(dial)),
                    Err(error) => {
                        self.lost(index, &error, 0, None, now);
                        return true;
                    }
                }
            }
            Phase::Dialing(_) => {}
            _ => return false,
        }
        let Phase::Dialing(dial) = &mut path.phase else { return false };
        match dial.poll(now) {
            Ok(None) => false,
            Ok(Some(logged_in)) => {
                self.stats.sessions_regained += 1;
                path.stats.sessions_gained += 1;
                path.up_since = now;
                path.negotiated = logged_in.negotiated();
                path.wire = Some(logged_in.into_wire(&path.options, now));
                path.window = usize::from(path.options.queue_depth);
                let here = Place::from(&path.negotiated);
                if let Some(doubt) = &mut path.doubt {
                    doubt.dial = None;
                    if doubt.place.as_ref().is_none_or(|before| *before == here) {
                        self.settled(index, "the login ended the lost session");
                    } else {
                        tracing::warn!(path = %path.options.url, before = ?doubt.place, now = ?here, "another portal group answers");
                    }
                }
                self.start_look(index, now);
                tracing::info!(url = %self.paths[index].options.url, repeat = self.waiting.len(), "session regained");
                true
            }
            Err(error) => {
                self.lost(index, &error, 0, None, now);
                true
            }
        }
    }

    /// Ends what is not with the target: for a guest that no longer waits for it.
    pub(super) fn drop_waiting(&mut self) {
        self.fail_waiting();
        self.abandoned = self.free.len() < usize::from(self.depth());
    }

    fn fail_waiting(&mut self) {
        for slot in self.take_held() {
            self.finish(slot, Outcome::IoError);
        }
        while let Some(slot) = self.waiting.pop_front() {
            self.finish(slot, Outcome::IoError);
        }
        while let Some((_, slot)) = self.backoff.pop() {
            self.finish(slot, Outcome::IoError);
        }
    }

    /// Whether requests wait for a path.
    pub(super) fn someone_waits(&self) -> bool {
        let held = |path: &super::Path| path.doubt.as_ref().is_some_and(|doubt| !doubt.held.is_empty());
        !self.waiting.is_empty() || !self.backoff.is_empty() || self.paths.iter().any(held)
    }

    /// Fails what waits for a target that was away for longer than the user wants to wait, and what comes until it is
    /// back. The new session ends the commands of the old one before it takes any, as always.
    pub(super) fn give_up(&mut self, now: Instant) {
        let Some(at) = self.give_up_at().filter(|&at| at <= now) else { return };
        if !self.someone_waits() {
            return;
        }
        if self.log.allow(now) {
            let away_s = self.away_since.map_or(0, |since| now.saturating_duration_since(since).as_secs());
            let late_ms = (now - at).as_millis() as u64;
            tracing::error!(url = %self.options.url, away_s, late_ms, requests = self.waiting.len(), "target is away: requests fail");
        }
        self.fail_waiting();
    }

    /// When requests begin to fail, unless the target is back by then. One that answers, but gives no access, counts as
    /// busy.
    pub(super) fn give_up_at(&self) -> Option<Instant> {
        let limits = &self.options.timeouts;
        let busy = self.is_up_without_access().then_some(limits.busy);
        let limit = match (limits.give_up, busy) {
            (Some(one), Some(other)) => one.min(other),
            (one, other) => one.or(other)?,
        };
        Some(self.away_since? + limit)
    }
}
