//! How long to look before sleeping. Pure: time comes in as an argument.
//!
//! A sleep costs the waker a system call (and an interrupt to a processor that halted) and the sleeper its wake-up. If the
//! next message comes soon enough after the thread stopped looking, looking a little longer would have been cheaper; if it
//! comes much later, looking was wasted. So one sleep that was too short to be worth it sets the budget to half as much again
//! as it took, and one that was too long to be looked through takes little of it: a single long silence (the peer was not
//! scheduled, say) is no news about the gaps between messages. Only [`Limits::patience`] of them in a row, with nothing found
//! by looking in between, end the looking. So an idle channel wastes at most `patience` times [`Limits::most`], once.

use std::time::Duration;

/// Bounds of a learned budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Shortest budget but none.
    pub first: Duration,
    /// Longest budget: a message that comes later than this is not looked for.
    pub most: Duration,
    /// So many sleeps in a row that were longer than `most` end the looking until messages come faster.
    pub patience: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { first: Duration::from_micros(4), most: Duration::from_micros(100), patience: 4 }
    }
}

/// What was learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Learned {
    budget: Duration,
    /// Longest time that was looked with success since the last long sleep, or before it and since.
    seen: Duration,
    /// Long sleeps in a row.
    long: u32,
}

/// The rule.
#[derive(Clone, Copy, Debug)]
pub enum Spin {
    /// Learns.
    Adaptive {
        /// Bounds.
        limits: Limits,
        /// What it learned.
        learned: Learned,
    },
    /// Always so long; zero sleeps at once.
    Fixed(Duration),
    /// Never sleeps. The peer then never kicks.
    Always,
}

impl Default for Spin {
    fn default() -> Self {
        Self::adaptive(Limits::default())
    }
}

impl Spin {
    /// Learns within other bounds than the usual ones.
    #[must_use]
    pub fn adaptive(limits: Limits) -> Self {
        Self::Adaptive { limits, learned: Learned::default() }
    }

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
            Self::Adaptive { learned, .. } => learned.budget,
            Self::Fixed(budget) => *budget,
            Self::Always => Duration::MAX,
        }
    }

    /// Learns from looking for `idle` that found something.
    #[inline]
    pub fn found(&mut self, idle: Duration) {
        if let Self::Adaptive { learned, .. } = self {
            learned.long = 0;
            learned.seen = learned.seen.max(idle);
        }
    }

    /// Learns from a sleep: `idle` is the time from the last message to the one that ended it, waking up included.
    pub fn slept(&mut self, idle: Duration) {
        let Self::Adaptive { limits, learned } = self else { return };
        if idle > limits.most {
            learned.long = learned.long.saturating_add(1);
            // What looking cost in vain: a little less next time, as far as the gaps that it found allow.
            let floor = Self::enough(limits, learned.seen);
            learned.budget = (learned.budget - learned.budget / 8).max(learned.budget.min(floor));
            learned.seen /= 2;
            if learned.long >= limits.patience {
                *learned = Learned { long: learned.long, ..Learned::default() };
            }
        } else {
            learned.long = 0;
            learned.budget = learned.budget.max(Self::enough(limits, idle));
        }
    }

    /// Half as much again as a gap: gaps vary, and a budget that just covers the usual one misses every other.
    fn enough(limits: &Limits, gap: Duration) -> Duration {
        (gap + gap / 2).clamp(limits.first, limits.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn one_short_sleep_is_enough_to_look_through_the_next_gap() {
        let mut spin = Spin::default();
        assert!(!spin.looks_on(Duration::ZERO));
        spin.slept(40 * US);
        assert_eq!(spin.budget(), 60 * US);
        spin.slept(20 * US);
        assert_eq!(spin.budget(), 60 * US, "shorter gaps are looked through already");
        spin.slept(90 * US);
        assert_eq!(spin.budget(), 100 * US, "never more than the most");
        let mut spin = Spin::default();
        spin.slept(US);
        assert_eq!(spin.budget(), 4 * US, "never less than the least");
    }

    #[test]
    fn a_long_silence_is_no_news_and_a_row_of_them_is() {
        let mut spin = Spin::default();
        spin.slept(40 * US);
        for _ in 0..10 {
            (0..50).for_each(|_| spin.found(30 * US));
            spin.slept(20_000 * US);
            assert!(spin.budget() >= 45 * US, "the peer was not scheduled now and then");
        }
        for _ in 0..50 {
            (0..50).for_each(|_| spin.found(5 * US));
            spin.slept(20_000 * US);
        }
        assert!(spin.budget() < 10 * US, "what is found is found soon: {:?}", spin.budget());
        spin.found(5 * US);
        for _ in 0..4 {
            assert!(spin.looks_on(Duration::ZERO));
            spin.slept(300 * US);
        }
        assert!(!spin.looks_on(Duration::ZERO), "messages are rare");
        spin.slept(300 * US);
        assert!(!spin.looks_on(Duration::ZERO), "and stay so");
        spin.slept(40 * US);
        assert_eq!(spin.budget(), 60 * US, "until they come faster");
    }

    #[test]
    fn fixed_rules_do_not_learn() {
        let mut spin = Spin::Fixed(3 * US);
        spin.slept(US);
        spin.found(US);
        assert!(spin.looks_on(2 * US) && !spin.looks_on(3 * US));
        assert!(Spin::Always.looks_on(Duration::from_secs(1 << 40)));
    }
}
