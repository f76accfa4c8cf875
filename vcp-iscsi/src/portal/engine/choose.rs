//! Which path a command takes: of those with the best access state, by the policy; and how a silent path is noticed while
//! another one is not.

use std::time::{Duration, Instant};

use super::{IscsiEngine, Phase};
use crate::engine::Op;
use crate::portal::options::PathPolicy;

/// Commands in a row to one path in round-robin: a batch goes out in few system calls, and what follows each other on the
/// medium stays together.
const RUN: u32 = 8;
/// With another path to go on with, a path is pinged when it keeps commands waiting for this long, or four round trips.
const CLOSE_INTERVAL: Duration = Duration::from_millis(100);
/// It is given up when such a ping is not answered within this time, or eight round trips, while another path answers.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(300);
/// TCP_USER_TIMEOUT with another path to go on with; well above a change-over in a network.
const USER_TIMEOUT_MANY: Duration = Duration::from_secs(2);
/// TCP_USER_TIMEOUT of the only path.
const USER_TIMEOUT_ONE: Duration = Duration::from_secs(15);

#[derive(Debug, thiserror::Error)]
#[error("the target did not answer a ping within {waited_ms} ms, while another path did")]
struct Silent {
    waited_ms: u128,
}

impl IscsiEngine {
    /// Something changed that [`rank`](Self::rank) looks at.
    pub(super) fn paths_changed(&mut self) {
        self.ranked = false;
    }

    /// Finds the paths to use.
    pub(super) fn rank(&mut self, now: Instant) {
        self.ranked = true;
        let best = self.paths.iter().filter_map(super::Path::class).min();
        self.active.clear();
        if let Some(best) = best {
            let chosen = self.paths.iter().enumerate().filter(|(_, path)| path.class() == Some(best));
            self.active.extend(chosen.map(|(index, _)| index));
            if self.class.is_some_and(|class| best < class) {
                self.stats.failbacks += 1;
                tracing::info!(url = %self.options.url, paths = ?self.active, "better paths are back");
            }
            self.class = Some(best);
            self.away_since = None;
        } else if self.away_since.is_none() {
            self.away_since = Some(now);
        }
        if self.paths.len() > 1 {
            self.adjust_watch();
        }
    }

    /// A path that another one can stand in for is watched more closely.
    fn adjust_watch(&mut self) {
        for index in 0..self.paths.len() {
            let stand_in = self.paths.iter().enumerate().any(|(i, p)| i != index && p.class().is_some());
            let path = &mut self.paths[index];
            let Some(wire) = &mut path.wire else { continue };
            let rtt = wire.session.round_trip().unwrap_or_default();
            let interval = CLOSE_INTERVAL.max(rtt * 4).min(path.options.timeouts.nop_interval);
            wire.session.watch_closely(stand_in.then_some(interval));
            let limit = if stand_in { USER_TIMEOUT_MANY } else { USER_TIMEOUT_ONE };
            if path.user_timeout != Some(limit) {
                path.user_timeout = Some(limit);
                if let Err(error) = path.options.network.set_user_timeout(wire.stream(), limit) {
                    tracing::debug!(%error, "cannot set the user timeout of a connection");
                }
            }
        }
    }

    /// How long a ping on this path may go without an answer.
    fn patience(&self, index: usize) -> Duration {
        let path = &self.paths[index];
        let rtt = path.wire.as_ref().and_then(|wire| wire.session.round_trip()).unwrap_or_default();
        CLOSE_TIMEOUT.max(rtt * 8).min(path.options.timeouts.nop_timeout)
    }

    /// Since when a ping on this path is without an answer.
    fn pinging_since(&self, index: usize) -> Option<Instant> {
        self.paths[index].wire.as_ref()?.session.pinging_since()
    }

    /// Gives up paths that are silent while another one is not. If all are, it is the target or the network behind all
    /// of them, and the usual time limits hold.
    pub(super) fn watch(&mut self, now: Instant) {
        self.watched = Some(now);
        for index in 0..self.paths.len() {
            let Some(since) = self.pinging_since(index) else { continue };
            let patience = self.patience(index);
            if now < since + patience {
                continue;
            }
            let others = self.paths.iter().enumerate().filter(|(i, p)| *i != index && p.class().is_some());
            let mut others = others.filter_map(|(_, path)| path.wire.as_ref());
            if others.any(|wire| wire.session.last_received() > since) {
                self.paths[index].stats.silences += 1;
                let silent = Silent { waited_ms: now.saturating_duration_since(since).as_millis() };
                self.lost(index, &silent, 0, None, now);
                continue;
            }
            for (_, path) in self.paths.iter_mut().enumerate().filter(|(i, _)| *i != index) {
                if path.class().is_some()
                    && let Some(wire) = &mut path.wire
                {
                    wire.session.ping_now(now);
                }
            }
        }
    }

    /// When [`watch`](Self::watch) may have something to say. What was looked at before waits for another path's answer,
    /// which is an event of its own.
    pub(super) fn watch_at(&self) -> Option<Instant> {
        if self.paths.len() < 2 {
            return None;
        }
        let due = |index| Some(self.pinging_since(index)? + self.patience(index));
        (0..self.paths.len()).filter_map(due).filter(|at| self.watched.is_none_or(|seen| *at > seen)).min()
    }

    fn has_room(&self, index: usize) -> bool {
        let path = &self.paths[index];
        path.wire.as_ref().is_some_and(|wire| wire.session.outstanding() < path.window)
    }

    /// The path for the next command, if one has room.
    fn choose(&mut self) -> Option<usize> {
        match self.active[..] {
            [] => None,
            [only] => self.has_room(only).then_some(only),
            _ => self.choose_of_many(),
        }
    }

    fn choose_of_many(&mut self) -> Option<usize> {
        let count = self.active.len();
        // The position in turn first.
        let order = (0..count).map(|step| (self.turn + step) % count);
        match self.options.path_policy {
            PathPolicy::RoundRobin => {
                let mut order = order;
                let at = order.find(|&at| self.has_room(self.active[at]))?;
                if at != self.turn % count {
                    self.run = 0;
                }
                self.turn = at;
                self.run += 1;
                if self.run >= RUN {
                    self.run = 0;
                    self.turn = (at + 1) % count;
                }
                Some(self.active[at])
            }
            PathPolicy::LeastQueue => {
                let at = order
                    .filter(|&at| self.has_room(self.active[at]))
                    .min_by_key(|&at| self.paths[self.active[at]].outstanding())?;
                self.turn = (at + 1) % count;
                Some(self.active[at])
            }
        }
    }

    /// Moves commands to the sessions, as many as they should have at once.
    pub(super) fn feed(&mut self, now: Instant) {
        if self.waiting.is_empty() || self.reset.is_some() {
            return;
        }
        if !self.ranked {
            self.rank(now);
        }
        for _ in 0..self.waiting.len() {
            let Some(index) = self.choose() else { return };
            let Some(slot) = self.waiting.pop_front() else { return };
            let Some(job) = self.jobs.get_mut(slot) else { continue };
            if job.unsent > 0 && usize::from(job.path) != index {
                // Something of it is still to be sent on the path that it took before; it goes behind that.
                self.waiting.push_back(slot);
                continue;
            }
            if self.barrier && job.op.writes() {
                // What an earlier write could overwrite is not written yet.
                self.waiting.push_front(slot);
                return;
            }
            let path = &mut self.paths[index];
            let Some(wire) = &mut path.wire else { return };
            job.path = index as u8;
            job.command.lun = path.lun;
            path.stats.commands += 1;
            wire.session.submit(slot, job.command, now);
        }
    }

    /// Whether any path is up and could take commands, were it not for its access state.
    pub(super) fn is_up_without_access(&self) -> bool {
        self.paths.iter().any(|path| matches!(path.phase, Phase::Up) && path.doubt.is_none())
    }
}

impl Op {
    /// Whether carrying it out late could destroy newer data.
    pub(super) fn writes(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Discard | Self::WriteZeroes { .. })
    }
}
