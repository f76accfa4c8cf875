//! How long an idle data thread keeps looking before it sleeps.

use std::str::FromStr;
use std::time::Duration;

/// `--poll-us`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PollMode {
    /// Learn from how long sleeps last (the default).
    #[default]
    Adaptive,
    /// Look this long; zero: sleep at once.
    Fixed(Duration),
    /// Never sleep.
    Always,
}

impl FromStr for PollMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "always" => Ok(Self::Always),
            "adaptive" => Ok(Self::Adaptive),
            number => number.parse().map(|us| Self::Fixed(Duration::from_micros(us))).map_err(|_| {
                format!("`{number}` is neither a number of microseconds nor `always` or `adaptive`")
            }),
        }
    }
}

/// Longest learned budget. A sleep and wake-up cost about 5 us on current hardware and up to 50 us from a deep idle
/// state; to look for longer than the latter never pays.
const MAX: Duration = Duration::from_micros(50);
/// First budget after it had been given up.
const FIRST: Duration = Duration::from_micros(4);
/// With this many requests in flight the adaptive rule does not look but sleeps. What arrives meanwhile is then taken as
/// one batch by one call; looking takes each piece by itself and gets in the way of whoever brings it. Measured with
/// `cargo xtask bench blk`, see `docs/decisions/when-to-look.md`.
const BATCHES_FROM: u32 = 2;

/// Decides between looking on and sleeping.
///
/// The adaptive rule is the one QEMU's event loop uses: if the next event came soon after the thread stopped looking,
/// looking a little longer would have caught it, so the budget doubles; if it came much later, looking was wasted, so
/// the budget is given up. It holds for a device that is used one request at a time; deeper queues are better served by
/// sleeping.
#[derive(Debug)]
pub struct Spin {
    mode: PollMode,
    budget: Duration,
}

impl Spin {
    /// In the given mode, with nothing learned.
    #[must_use]
    pub fn new(mode: PollMode) -> Self {
        let budget = match mode {
            PollMode::Adaptive => Duration::ZERO,
            PollMode::Fixed(budget) => budget,
            PollMode::Always => Duration::MAX,
        };
        Self { mode, budget }
    }

    /// Whether to keep looking after being idle for `idle` with `inflight` requests under way.
    #[inline]
    #[must_use]
    pub fn keeps_looking(&self, idle: Duration, inflight: u32) -> bool {
        idle < self.budget && !self.batches(inflight)
    }

    /// Learns from a sleep that began with `inflight` requests under way: `idle` from the last thing that moved to the
    /// wake-up.
    pub fn slept(&mut self, idle: Duration, inflight: u32) {
        if self.mode != PollMode::Adaptive || self.batches(inflight) {
            return;
        }
        if idle > MAX {
            self.budget = Duration::ZERO;
        } else if idle > self.budget {
            self.budget = (self.budget * 2).clamp(FIRST, MAX);
        }
    }

    fn batches(&self, inflight: u32) -> bool {
        self.mode == PollMode::Adaptive && inflight >= BATCHES_FROM
    }

    /// The budget now.
    #[must_use]
    pub fn budget(&self) -> Duration {
        self.budget
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn frequent_events_grow_the_budget_and_rare_ones_end_it() {
        let mut spin = Spin::new(PollMode::Adaptive);
        assert!(!spin.keeps_looking(Duration::ZERO, 1));
        for _ in 0..4 {
            spin.slept(30 * US, 1);
        }
        assert!(spin.keeps_looking(31 * US, 1));
        spin.slept(1000 * US, 1);
        assert!(!spin.keeps_looking(US, 1));
    }

    #[test]
    fn deep_queues_sleep_and_teach_nothing() {
        let mut spin = Spin::new(PollMode::Adaptive);
        spin.slept(30 * US, 1);
        assert!(spin.keeps_looking(US, 1) && !spin.keeps_looking(US, 2));
        spin.slept(1000 * US, 32);
        assert!(spin.keeps_looking(US, 0));
        assert!(Spin::new(PollMode::Fixed(20 * US)).keeps_looking(US, 32));
    }

    #[test]
    fn fixed_budgets_do_not_learn() {
        let mut spin = Spin::new(PollMode::Fixed(20 * US));
        spin.slept(1000 * US, 1);
        assert!(spin.keeps_looking(19 * US, 1) && !spin.keeps_looking(20 * US, 1));
        assert!(!Spin::new(PollMode::Fixed(Duration::ZERO)).keeps_looking(Duration::ZERO, 1));
        assert!(Spin::new(PollMode::Always).keeps_looking(Duration::from_secs(1 << 40), 1));
    }

    #[test]
    fn modes_are_read_as_written() {
        assert_eq!("always".parse(), Ok(PollMode::Always));
        assert_eq!("0".parse(), Ok(PollMode::Fixed(Duration::ZERO)));
        assert_eq!("50".parse(), Ok(PollMode::Fixed(50 * US)));
        assert!("soon".parse::<PollMode>().is_err());
    }
}
