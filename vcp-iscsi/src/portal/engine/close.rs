//! The end of the engine: logout in order, bounded in time.

use std::time::{Duration, Instant};

use super::{IscsiEngine, Phase};
use crate::engine::Engine;
use crate::portal::socket;

impl IscsiEngine {
    /// Begins to end: commands underway have half of `limit` to be answered, then the session is logged out. Go on with
    /// [`Engine::poll`] until [`is_closed`](Self::is_closed); whoever loses patience drops the engine.
    pub fn start_close(&mut self, now: Instant, limit: Duration) {
        self.closing = true;
        match &mut self.wire {
            Some(wire) => wire.session.logout(now, limit / 2),
            None => self.phase = Phase::Closed,
        }
    }

    /// Whether the session was logged out, or there is none to log out.
    pub fn is_closed(&self) -> bool {
        matches!(self.phase, Phase::Closed)
    }

    /// See [`Engine::close`]: blocks for `limit` at most; commands not answered by then are dropped. The one place of the
    /// engine that waits and looks at the clock, for there is no data thread any more.
    pub(super) fn shut_down(&mut self, limit: Duration) {
        let start = Instant::now();
        let deadline = start + limit;
        let mut done = Vec::new();
        self.start_close(start, limit);
        while !self.is_closed() {
            let now = Instant::now();
            if now >= deadline {
                break;
            }
            self.poll(now, &mut done);
            done.clear();
            let Some(wire) = &self.wire else { break };
            let until = wire.session.deadline().map_or(deadline, |at| at.min(deadline));
            let until = until.max(now + Duration::from_millis(1));
            if socket::wait_until(wire.stream(), wire.wants_write(), until).is_err() {
                break;
            }
        }
        self.wire = None;
        self.phase = Phase::Closed;
    }
}
