//! How long to look before sleeping. Pure: time comes in as an argument.
//!
//! A sleep costs the waker a system call (and an interrupt to a processor that halted) and the sleeper its wake-up. If the
//! next message comes soon enough after the thread stopped looking, looking a little longer would have been cheaper; if it
//! comes much later, looking was wasted. So the budget doubles in the first case and is halved, then given up, in the second.
//! Looking for no longer than [`Limits::most`] at a time bounds the waste: within a factor of two of the best choice if
//! that is what a sleep costs.

use std::time::Duration;

/// Bounds of a learned budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// First budget after none.
    pub first: Duration,
    /// Longest budget.
    pub most: Duration,
    /// A sleep as long as this means that there is nothing to do: no looking at all until messages come faster.
    pub rare: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            first: Duration::from_micros(4),
            most: Duration::from_micros(100),
            rare: Duration::from_millis(1),
        }
    }
}

/// The rule.
#[derive(Clone, Copy, Debug)]
pub enum Spin {
    /// Learns.
    Adaptive {
        /// Bounds.
        limits: Limits,
        /// The budget now.
        budget: Duration,
    },
    /// Always so long; zero sleeps at once.
    Fixed(Duration),
    /// Never sleeps. The peer then never kicks.
    Always,
}

impl Default for Spin {
    fn default() -> Self {
        Self::Adaptive { limits: Limits::default(), budget: Duration::ZERO }
    }
}

impl Spin {
    /// Whether to look on after having looked for `idle`.
    #[inline]
    #[must_use]
    pub fn looks_on(&self, idle: Duration) -> bool {
        idle < self.budget()
    }

    /// The budget now.
    #[inline]
    #[must_use]
    pub fn budget(&self) -> Duration {
        match self {
            Self::Adaptive { budget, .. } | Self::Fixed(budget) => *budget,
            Self::Always => Duration::MAX,
        }
    }

    /// Learns from a sleep: `idle` is the time from the last message to the one that ended it.
    pub fn slept(&mut self, idle: Duration) {
        let Self::Adaptive { limits, budget } = self else { return };
        if idle >= limits.rare {
            *budget = Duration::ZERO;
        } else if idle > limits.most {
            *budget = if *budget > limits.first { *budget / 2 } else { Duration::ZERO };
        } else if idle > *budget {
            *budget = (*budget * 2).clamp(limits.first, limits.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn soon_grows_late_shrinks_rare_ends_it() {
        let mut spin = Spin::default();
        assert!(!spin.looks_on(Duration::ZERO));
        for _ in 0..5 {
            spin.slept(52 * US);
        }
        assert_eq!(spin.budget(), 64 * US);
        spin.slept(60 * US);
        assert_eq!(spin.budget(), 64 * US, "it would have been seen");
        spin.slept(90 * US);
        assert_eq!(spin.budget(), 100 * US);
        spin.slept(300 * US);
        assert_eq!(spin.budget(), 50 * US);
        spin.slept(1000 * US);
        assert!(!spin.looks_on(Duration::ZERO));
    }

    #[test]
    fn fixed_rules_do_not_learn() {
        let mut spin = Spin::Fixed(3 * US);
        spin.slept(US);
        assert!(spin.looks_on(2 * US) && !spin.looks_on(3 * US));
        assert!(Spin::Always.looks_on(Duration::from_secs(1 << 40)));
    }
}
