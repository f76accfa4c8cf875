//! Notices a data loop that stands still: its pass counter does not move from one look to the next although its rings
//! hold work. Pure: what was seen is passed in.
//!
//! It counts looks, not time. A host that was suspended, or too busy to let the supervisor run, has not seen the loop
//! stand still; it has not looked.

use std::time::Duration;

/// Time between two looks.
pub const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a loop may stand still if the user has not said otherwise. A healthy one moves at least four times a second
/// while there is work (`vcp_core::poll::MAX_SLEEP`); the rest is for a host with far more to do than processors.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Watches one loop.
#[derive(Debug)]
pub struct Watchdog {
    /// Looks after which it is enough.
    limit: u32,
    passes: Option<u64>,
    still: u32,
}

impl Watchdog {
    /// With this much patience, at least two looks.
    pub fn new(patience: Duration) -> Self {
        let looks = patience.as_millis().div_ceil(LOOK_EVERY.as_millis());
        Self { limit: u32::try_from(looks).unwrap_or(u32::MAX).max(2), passes: None, still: 0 }
    }

    /// Another process, or a time in which nobody looked.
    pub fn reset(&mut self) {
        self.passes = None;
        self.still = 0;
    }

    /// One look: the loop's pass counter, and whether a ring or the device holds work. `Some` once the loop has stood still
    /// for too long, with how long.
    pub fn look(&mut self, passes: u64, holds_work: bool) -> Option<Duration> {
        let moved = self.passes.replace(passes) != Some(passes);
        if moved || !holds_work {
            self.still = 0;
            return None;
        }
        self.still += 1;
        (self.still >= self.limit).then(|| LOOK_EVERY * self.still)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_stands_still_with_work_is_noticed_after_the_patience_and_not_before() {
        let mut dog = Watchdog::new(Duration::from_secs(2));
        assert_eq!(dog.look(7, true), None, "the first look compares with nothing");
        let looks: Vec<_> = (0..4).map(|_| dog.look(7, true)).collect();
        assert_eq!(looks, [None, None, None, Some(Duration::from_secs(2))]);
    }

    #[test]
    fn one_that_moves_or_has_nothing_to_do_is_left_alone() {
        let mut dog = Watchdog::new(Duration::from_secs(1));
        for pass in 0..100 {
            assert_eq!(dog.look(pass, true), None);
        }
        for _ in 0..100 {
            assert_eq!(dog.look(100, false), None);
        }
        // Idle for long, then work: it has its time from then on.
        assert_eq!(dog.look(100, true), None);
        assert!(dog.look(100, true).is_some());
        // Another process starts with a clean sheet.
        dog.reset();
        assert_eq!((dog.look(100, true), dog.look(100, true)), (None, None));
    }

    #[test]
    fn one_look_is_never_enough() {
        assert_eq!(Watchdog::new(Duration::ZERO).limit, 2);
        assert_eq!(Watchdog::new(Duration::MAX).limit, u32::MAX);
    }
}
