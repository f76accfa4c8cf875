//! [`Stats`]: what a channel counts. Plain numbers in the channel; read them between batches.

use std::time::Duration;

use crate::error::{RULE_NAMES, Violation};

/// Steps of the histograms: powers of two of nanoseconds, up to nine minutes.
pub const LATENCY_STEPS: usize = 40;

/// Durations, counted by powers of two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Durations {
    /// Entry `n` counts those below `2^n` ns and not below half of that; the last one counts longer ones, too.
    pub steps: [u64; LATENCY_STEPS],
    /// Sum of all, in nanoseconds.
    pub sum_ns: u64,
}

impl Default for Durations {
    fn default() -> Self {
        Self { steps: [0; LATENCY_STEPS], sum_ns: 0 }
    }
}

impl Durations {
    /// Number of all.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.steps.iter().sum()
    }

    pub(super) fn note(&mut self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let step = (64 - ns.leading_zeros()) as usize;
        self.steps[step.min(LATENCY_STEPS - 1)] += 1;
        self.sum_ns = self.sum_ns.saturating_add(ns);
    }
}

/// Names of the plain counters, as they are shown and in the order of line S.
pub const COUNTERS: [&str; 16] = [
    "tx_messages",
    "rx_messages",
    "tx_batches",
    "full",
    "window_full",
    "kicks",
    "kicks_suppressed",
    "sleeps",
    "spurious_wakes",
    "spin_ns",
    "in_flight_high",
    "replays",
    "replays_merged",
    "stale_completions",
    "resizes",
    "epoch",
];

/// Counters of a channel over all its epochs.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Messages sent, without those for the queue itself.
    pub tx_messages: u64,
    /// Messages received.
    pub rx_messages: u64,
    /// Batches committed: decisions whether to kick.
    pub tx_batches: u64,
    /// Messages not taken because the ring had no room.
    pub full: u64,
    /// Requests not taken because the window was used up.
    pub window_full: u64,
    /// Times the peer was kicked.
    pub kicks: u64,
    /// Batches after which the peer did not have to be kicked.
    pub kicks_suppressed: u64,
    /// Times this side slept.
    pub sleeps: u64,
    /// Sleeps that ended with nothing to do.
    pub spurious_wakes: u64,
    /// Time spent looking before it slept or found something, in nanoseconds.
    pub spin_ns: u64,
    /// Most requests in flight at a time.
    pub in_flight_high: u32,
    /// Messages sent again in a later epoch.
    pub replays: u64,
    /// Messages of the peer that were marked as sent again and were still held: dropped.
    pub replays_merged: u64,
    /// Completions for requests that nobody waits for any more.
    pub stale_completions: u64,
    /// Changes of the used part of a ring.
    pub resizes: u64,
    /// Violations by rule, from rule 1.
    pub violations: [u64; Violation::RULES],
    /// From sending a request to its completion. Empty unless [switched on](super::Channel::measure_latency).
    pub latency: Durations,
    /// From receiving a request of the peer to completing it. Likewise.
    pub service: Durations,
    /// Epoch of the channel.
    pub epoch: u64,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            tx_messages: 0,
            rx_messages: 0,
            tx_batches: 0,
            full: 0,
            window_full: 0,
            kicks: 0,
            kicks_suppressed: 0,
            sleeps: 0,
            spurious_wakes: 0,
            spin_ns: 0,
            in_flight_high: 0,
            replays: 0,
            replays_merged: 0,
            stale_completions: 0,
            resizes: 0,
            violations: [0; Violation::RULES],
            latency: Durations::default(),
            service: Durations::default(),
            epoch: 0,
        }
    }
}

impl Stats {
    pub(super) fn violation(&mut self, violation: &Violation) {
        self.violations[violation.rule() - 1] += 1;
    }

    /// Values of the plain counters, in the order of [`COUNTERS`].
    #[must_use]
    pub fn plain(&self) -> [u64; COUNTERS.len()] {
        [
            self.tx_messages,
            self.rx_messages,
            self.tx_batches,
            self.full,
            self.window_full,
            self.kicks,
            self.kicks_suppressed,
            self.sleeps,
            self.spurious_wakes,
            self.spin_ns,
            self.in_flight_high.into(),
            self.replays,
            self.replays_merged,
            self.stale_completions,
            self.resizes,
            self.epoch,
        ]
    }

    /// Names and values of everything but the histograms.
    pub fn counters(&self) -> impl Iterator<Item = (String, u64)> + '_ {
        let plain = COUNTERS.iter().zip(self.plain()).map(|(name, value)| ((*name).to_owned(), value));
        let rules = RULE_NAMES.iter().zip(self.violations);
        plain.chain(rules.map(|(name, count)| (format!("violations_{name}"), count)))
    }
}
