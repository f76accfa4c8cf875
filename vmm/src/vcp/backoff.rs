//! How long to wait before a backend is started or sought again: not at all after one that was well for a while, then
//! longer each time, so that a crash loop costs little and is not mistaken for work.

use std::time::{Duration, Instant};

/// How long a backend must have served to count as well.
pub const WELL: Duration = Duration::from_secs(1);
/// The first pause.
pub const FIRST: Duration = Duration::from_millis(50);
/// The longest pause.
pub const LONGEST: Duration = Duration::from_secs(3);

/// The pauses of one device. Clockless: times are passed in.
#[derive(Debug, Default)]
pub struct Backoff {
    pause: Option<Duration>,
    up: Option<Instant>,
}

impl Backoff {
    /// The backend serves since `now`.
    pub fn up(&mut self, now: Instant) {
        self.up = Some(now);
    }

    /// The pause before the next attempt, the last one having failed or the backend having died at `now`.
    pub fn next(&mut self, now: Instant) -> Duration {
        let was_well = self.up.take().is_some_and(|up| now.saturating_duration_since(up) >= WELL);
        if was_well {
            self.pause = None;
        }
        let pause = self.pause.unwrap_or(Duration::ZERO);
        self.pause = Some(if pause.is_zero() { FIRST } else { (pause * 2).min(LONGEST) });
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_once_then_longer_then_at_once_again() {
        let (mut backoff, start) = (Backoff::default(), Instant::now());
        let mut millis = || backoff.next(start).as_millis();
        let pauses: Vec<_> = (0..9).map(|_| millis()).collect();
        assert_eq!(pauses, [0, 50, 100, 200, 400, 800, 1600, 3000, 3000]);
        // Up for too short a time changes nothing; up for long enough starts anew.
        backoff.up(start);
        assert_eq!(backoff.next(start + WELL / 2), LONGEST);
        backoff.up(start);
        assert_eq!(backoff.next(start + WELL), Duration::ZERO);
        assert_eq!(backoff.next(start + WELL), FIRST);
    }
}
