//! What each operation of the line takes, by the clock: one burst in 128 is timed, so that knowing it costs next to
//! nothing. A division of two counters gives nanoseconds per frame, live and without a special build.

use std::time::Instant;

/// A burst in so many is timed.
const ONE_IN: u32 = 128;

/// The operations in their order; `rewrite` is a part of `enqueue`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// [`Parse`](super::parse::Parse).
    Parse,
    /// [`Police`](super::police::Police).
    Police,
    /// [`Learn`](super::learn::Learn).
    Learn,
    /// [`Snoop`](super::snoop::Snoop).
    Snoop,
    /// [`Lookup`](super::lookup::Lookup).
    Lookup,
    /// [`Enqueue`](super::enqueue::Enqueue), which copies, and the choice of queues.
    Enqueue,
}

impl Stage {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Parse, Self::Police, Self::Learn, Self::Snoop, Self::Lookup, Self::Enqueue];

    /// As metrics call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Parse => "parse",
            Self::Police => "police",
            Self::Learn => "learn",
            Self::Snoop => "snoop",
            Self::Lookup => "lookup",
            Self::Enqueue => "enqueue",
        }
    }
}

/// A burst that is timed.
#[derive(Debug)]
pub struct Lap(Option<Instant>);

impl Lap {
    /// Whether it is one of those.
    #[must_use]
    pub fn is_timed(&self) -> bool {
        self.0.is_some()
    }
}

/// See the module.
#[derive(Debug)]
pub struct Costs {
    until_next: u32,
    /// What looking at the clock takes, which is not the operations' doing.
    look_ns: u64,
    ns: [u64; Stage::ALL.len()],
    frames: u64,
}

impl Default for Costs {
    fn default() -> Self {
        let look = |_| {
            let begin = Instant::now();
            Instant::now().duration_since(begin).as_nanos() as u64
        };
        let look_ns = (0..32).map(look).min().unwrap_or(0);
        Self { until_next: 0, look_ns, ns: [0; Stage::ALL.len()], frames: 0 }
    }
}

impl Costs {
    /// A burst of `frames` begins.
    #[inline]
    pub fn begin(&mut self, frames: usize) -> Lap {
        if let Some(left) = self.until_next.checked_sub(1) {
            self.until_next = left;
            return Lap(None);
        }
        self.until_next = ONE_IN - 1;
        self.frames += frames as u64;
        Lap(Some(Instant::now()))
    }

    /// A burst comes that others have begun with (and counted), if `timed` to be timed.
    #[inline]
    #[must_use]
    pub fn go_on(&self, timed: bool) -> Lap {
        Lap(timed.then(Instant::now))
    }

    /// An operation is done with it.
    #[inline]
    pub fn lap(&mut self, lap: &mut Lap, stage: Stage) {
        if let Lap(Some(at)) = lap {
            let now = Instant::now();
            let took = now.duration_since(*at).as_nanos() as u64;
            self.ns[stage as usize] += took.saturating_sub(self.look_ns);
            *at = now;
        }
    }

    /// Frames in bursts that were timed.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// What an operation took with those, nanoseconds.
    #[must_use]
    pub fn ns(&self, stage: Stage) -> u64 {
        self.ns[stage as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_burst_in_so_many_is_timed_and_its_frames_counted() {
        let mut costs = Costs { look_ns: 0, ..Costs::default() };
        for n in 0..3 * ONE_IN {
            let mut lap = costs.begin(32);
            assert_eq!(lap.0.is_some(), n % ONE_IN == 0, "{n}");
            let begin = Instant::now();
            while lap.0.is_some() && begin.elapsed().as_nanos() < 1_000 {}
            costs.lap(&mut lap, Stage::Lookup);
            costs.lap(&mut lap, Stage::Enqueue);
        }
        assert_eq!(costs.frames(), 3 * 32);
        assert!(costs.ns(Stage::Lookup) >= 3_000, "{costs:?}");
        assert_eq!(costs.ns(Stage::Parse), 0);
    }
}
