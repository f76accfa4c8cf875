//! What the engine writes to the log: errors on one line, and not too many of them.

use std::time::{Duration, Instant};

/// At most one line of the same kind in the log in this time.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// An error and what caused it, on one line.
pub(in crate::portal) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// Keeps a broken target from filling the log.
#[derive(Debug, Default)]
pub(super) struct LogLimit {
    last: Option<Instant>,
}

impl LogLimit {
    pub(super) fn allow(&mut self, now: Instant) -> bool {
        let allowed = self.last.is_none_or(|at| now.saturating_duration_since(at) >= LOG_EVERY);
        if allowed {
            self.last = Some(now);
        }
        allowed
    }
}
