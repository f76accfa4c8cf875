//! The end of the engine: logout in order, bounded in time.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{IscsiEngine, Phase};
use crate::engine::Engine;

impl IscsiEngine {
    /// Begins to end: commands underway have half of `limit` to be answered, then the sessions are logged out. Go on with
    /// [`Engine::poll`] until [`is_closed`](Self::is_closed); whoever loses patience drops the engine.
    pub fn start_close(&mut self, now: Instant, limit: Duration) {
        self.closing = true;
        for path in &mut self.paths {
            match &mut path.wire {
                Some(wire) => wire.session.logout(now, limit / 2),
                None => path.phase = Phase::Closed,
            }
        }
    }

    /// Whether all sessions were logged out, or there is none to log out.
    pub fn is_closed(&self) -> bool {
        self.paths.iter().all(|path| matches!(path.phase, Phase::Closed))
    }

    /// See [`Engine::close`]: blocks for `limit` at most; commands not answered by then are dropped. The one place of the
    /// engine that waits and looks at the clock, for there is no data thread any more.
    pub(super) fn shut_down(&mut self, limit: Duration) {
        let start = Instant::now();
        let end = start + limit;
        let mut done = Vec::new();
        self.start_close(start, limit);
        while !self.is_closed() {
            let now = Instant::now();
            if now >= end {
                break;
            }
            let moved = self.poll(now, &mut done);
            done.clear();
            if moved {
                continue;
            }
            self.readiness(true);
            let wait = self.wait();
            let until = wait.deadline.map_or(end, |at| at.min(end)).max(now + Duration::from_millis(1));
            let left = until.saturating_duration_since(now);
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let mut flags = PollFlags::IN;
            if wait.writable {
                flags |= PollFlags::OUT;
            }
            let waited = match wait.fd {
                Some(fd) => poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&left)),
                None => poll(&mut [], Some(&left)),
            };
            if !matches!(waited, Ok(_) | Err(rustix::io::Errno::INTR)) {
                break;
            }
        }
        for path in &mut self.paths {
            path.wire = None;
            path.phase = Phase::Closed;
        }
    }
}
