//! Watching a session closely: for a caller who has another one to go on with, and would rather know within a fraction of a
//! second than at the end of the time limits.

use std::time::{Duration, Instant};

use super::Session;
use super::session::SLOT_PING;

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
        if self.ping.is_none() && self.logout.is_none() {
            let itt = self.control_tag(SLOT_PING);
            self.ping = Some((itt, now, false));
            self.last_ping = now;
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
