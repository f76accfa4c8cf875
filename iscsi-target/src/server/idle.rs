//! How long the data thread looks for work before it sleeps.

use std::time::{Duration, Instant};

/// The `--poll-us` option.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PollMode {
    /// Looks only when work has lately come sooner than a sleep and a wake-up take.
    #[default]
    Adaptive,
    /// Looks for this long; zero: never.
    For(Duration),
    /// Never sleeps.
    Always,
}

impl std::str::FromStr for PollMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "always" => Ok(Self::Always),
            "auto" => Ok(Self::Adaptive),
            _ => text
                .parse()
                .map(|us| Self::For(Duration::from_micros(us)))
                .map_err(|_| "expected microseconds, `always` or `auto`".into()),
        }
    }
}

/// Going to sleep and being woken costs about this much of a hardware thread.
const SLEEP_COST: Duration = Duration::from_micros(5);

/// Learns from how long the thread had nothing to do.
#[derive(Debug)]
pub(super) struct Idle {
    mode: PollMode,
    /// Moving average of the gaps between work, capped.
    gap: Duration,
}

impl Idle {
    pub(super) fn new(mode: PollMode) -> Self {
        Self { mode, gap: 4 * SLEEP_COST }
    }

    /// How long to look now; `None`: for ever.
    pub(super) fn budget(&self) -> Option<Duration> {
        match self.mode {
            PollMode::Always => None,
            PollMode::For(budget) => Some(budget),
            PollMode::Adaptive if self.gap < SLEEP_COST => Some(2 * SLEEP_COST),
            PollMode::Adaptive => Some(Duration::ZERO),
        }
    }

    /// Work came after having had nothing to do since `since`.
    pub(super) fn worked(&mut self, since: Instant, now: Instant) {
        let gap = now.saturating_duration_since(since).min(16 * SLEEP_COST);
        self.gap = (self.gap * 7 + gap) / 8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_only_when_it_pays() {
        let mut idle = Idle::new(PollMode::Adaptive);
        let start = Instant::now();
        assert_eq!(idle.budget(), Some(Duration::ZERO));
        for _ in 0..40 {
            idle.worked(start, start + Duration::from_micros(1));
        }
        assert!(idle.budget() > Some(Duration::ZERO));
        for _ in 0..40 {
            idle.worked(start, start + Duration::from_millis(1));
        }
        assert_eq!(idle.budget(), Some(Duration::ZERO));
    }

    #[test]
    fn modes_as_people_write_them() {
        assert_eq!("0".parse(), Ok(PollMode::For(Duration::ZERO)));
        assert_eq!("50".parse(), Ok(PollMode::For(Duration::from_micros(50))));
        assert_eq!("always".parse(), Ok(PollMode::Always));
        assert!("-1".parse::<PollMode>().is_err());
    }
}
