//! What a session waits for: the command window, and R2Ts. Statistics only; nothing is decided by them.

use std::time::Instant;

/// Totals of a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowStats {
    /// Times that commands were ready to go but MaxCmdSN did not allow them (RFC 7143 4.2.2.1).
    pub window_stalls: u64,
    /// How long, in nanoseconds; a stall that is not over is not in it.
    pub window_stall_ns: u64,
    /// R2Ts received.
    pub r2ts: u64,
    /// Time from the last data that could be sent without asking to the R2T that asked for more, in nanoseconds.
    pub r2t_wait_ns: u64,
}

impl FlowStats {
    /// Adds those of another session.
    pub fn add(&mut self, other: Self) {
        self.window_stalls += other.window_stalls;
        self.window_stall_ns += other.window_stall_ns;
        self.r2ts += other.r2ts;
        self.r2t_wait_ns += other.r2t_wait_ns;
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) stats: FlowStats,
    stalled_since: Option<Instant>,
    /// For each slot: since when its write waits for an R2T.
    waiting: Vec<Option<Instant>>,
}

impl Flow {
    pub(super) fn new(slots: usize) -> Self {
        Self { stats: FlowStats::default(), stalled_since: None, waiting: vec![None; slots] }
    }

    /// The window is closed, and a command waits for it.
    pub(super) fn stalled(&mut self, now: Instant) {
        if self.stalled_since.is_none() {
            self.stalled_since = Some(now);
            self.stats.window_stalls += 1;
        }
    }

    /// A command goes out: the window is open.
    pub(super) fn goes(&mut self, now: Instant) {
        if let Some(since) = self.stalled_since.take() {
            self.stats.window_stall_ns += ns(since, now);
        }
    }

    /// All of a write's data that was asked for was sent, and some is left.
    pub(super) fn waits(&mut self, slot: u16, now: Instant) {
        if let Some(waiting) = self.waiting.get_mut(usize::from(slot)) {
            *waiting = Some(now);
        }
    }

    /// A write begins anew in this slot, or is told that nothing is to be waited for.
    pub(super) fn begins(&mut self, slot: u16) {
        if let Some(waiting) = self.waiting.get_mut(usize::from(slot)) {
            *waiting = None;
        }
    }

    /// An R2T came.
    pub(super) fn r2t(&mut self, slot: u16, now: Instant) {
        self.stats.r2ts += 1;
        if let Some(since) = self.waiting.get_mut(usize::from(slot)).and_then(Option::take) {
            self.stats.r2t_wait_ns += ns(since, now);
        }
    }
}

fn ns(since: Instant, now: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(since).as_nanos()).unwrap_or(u64::MAX)
}
