//! How long to wait before a backend is started or sought again: not at all after one that was well for a while, nor for
//! the first few that were not, then longer each time, so that a crash loop costs little and is not mistaken for work.

use std::time::{Duration, Instant};

/// How long a backend must have served to count as well.
pub const WELL: Duration = Duration::from_secs(1);
/// Deaths in a row that are answered at once: an operator who kills a process twice, or a fault that strikes in bursts,
/// is no crash loop yet, and each pause would be the guest's.
pub const FREE: u32 = 3;
/// The first pause.
pub const FIRST: Duration = Duration::from_millis(50);
/// The longest pause.
pub const LONGEST: Duration = Duration::from_secs(3);

/// The pauses of one device. Clockless: times are passed in.
#[derive(Debug, Default)]
pub struct Backoff {
    /// Deaths in a row of backends that served, but not for long.
    deaths: u32,
    /// Attempts in a row that got no backend.
    misses: u32,
    up: Option<Instant>,
}

impl Backoff {
    /// The backend serves since `now`.
    pub fn up(&mut self, now: Instant) {
        self.up = Some(now);
    }

    /// The pause before the next attempt, the last one having failed or the backend having died at `now`.
    pub fn next(&mut self, now: Instant) -> Duration {
        match self.up.take() {
            Some(up) => {
                let well = now.saturating_duration_since(up) >= WELL;
                self.deaths = if well { 1 } else { self.deaths.saturating_add(1) };
                self.misses = 0;
            }
            None => self.misses = self.misses.saturating_add(1),
        }
        match self.deaths.saturating_sub(FREE).saturating_add(self.misses) {
            0 => Duration::ZERO,
            n => FIRST.saturating_mul(1 << (n - 1).min(16)).min(LONGEST),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(backoff: &mut Backoff, now: Instant) -> u128 {
        backoff.next(now).as_millis()
    }

    #[test]
    fn one_that_stays_away_is_sought_less_and_less_often() {
        let (mut backoff, start) = (Backoff::default(), Instant::now());
        backoff.up(start);
        let pauses: Vec<_> = (0..9).map(|_| millis(&mut backoff, start + WELL)).collect();
        assert_eq!(pauses, [0, 50, 100, 200, 400, 800, 1600, 3000, 3000]);
        // Back, for long enough to start anew.
        backoff.up(start);
        assert_eq!(millis(&mut backoff, start + WELL), 0);
    }

    #[test]
    fn a_crash_loop_is_slowed_down_and_a_burst_is_not() {
        let (mut backoff, start) = (Backoff::default(), Instant::now());
        let mut short_life = |life| {
            backoff.up(start);
            millis(&mut backoff, start + life)
        };
        let pauses: Vec<_> = (0..9).map(|_| short_life(WELL / 2)).collect();
        assert_eq!(pauses, [0, 0, 0, 50, 100, 200, 400, 800, 1600]);
        assert_eq!(short_life(WELL), 0);
        assert_eq!(short_life(WELL / 2), 0);
    }
}
