//! Watching a session closely: for a caller who has another one to go on with, and would rather know within a fraction of a
//! second than at the end of the time limits.

use std::time::{Duration, Instant};

use super::Session;
use super::session::SLOT_PING;
use super::task::State;

impl Session {
    /// While commands are underway and nothing was received for `interval`, a ping is sent, whatever
    /// [`Config::nop_interval`](super::Config::nop_interval) says; `None` ends that. What to make of a ping without an
    /// answer is the caller's to judge by [`pinging_since`](Self::pinging_since); the session itself only ends after
    /// [`Config::nop_timeout`](super::Config::nop_timeout), as always.
    pub fn watch_closely(&mut self, interval: Option<Duration>) {
        self.busy_interval = interval;
    }

    /// When the next ping is due, if none is underway.
    pub(super) fn next_ping(&self) -> Instant {
        let regular = self.last_ping + self.config.nop_interval;
        match self.busy_interval {
            Some(interval) if self.outstanding() > 0 => {
                regular.min(self.last_received.max(self.busy_since).max(self.last_ping) + interval)
            }
            _ => regular,
        }
    }

    /// Sends a ping with the next PDUs, unless one is underway.
    pub fn ping_now(&mut self, now: Instant) {
        // Until the logout is sent, the connection has to show that it lives.
        if self.ping.is_none() && !self.logout.is_some_and(|logout| logout.is_sent()) {
            let itt = self.control_tag(SLOT_PING);
            self.ping = Some((itt, now, false));
            self.last_ping = now;
        }
    }

    /// Whatever is underway may have been ended by somebody's reset without a word to us (SAM-5 5.3.1, TAS of 0): what is
    /// not answered within `limit` is asked for by ABORT TASK, which finds that out.
    pub fn hasten(&mut self, now: Instant, limit: Duration) {
        let deadline = now + limit;
        let mut any = false;
        for task in self.tasks.iter_mut().filter(|task| task.state == State::Active) {
            task.deadline = task.deadline.min(deadline);
            any = true;
        }
        if any && self.tmf.is_none() {
            self.scan_at = Some(self.scan_at.map_or(deadline, |at| at.min(deadline)));
        }
    }

    /// Since when a ping is without an answer and nothing else was received either.
    pub fn pinging_since(&self) -> Option<Instant> {
        self.ping.map(|(_, at, _)| self.last_received.max(at))
    }

    /// When something was received last (or the session began).
    pub fn last_received(&self) -> Instant {
        self.last_received
    }
}
