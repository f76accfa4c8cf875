//! Numbers of the channels of a front, for the control socket and the page of metrics.
//!
//! A channel's label is its number, which its client chose at random; there are as many labels as clients at a time.

use std::sync::atomic::{AtomicU64, Ordering};

use msgq::error::RULE_NAMES;
use msgq::{COUNTERS, Channel, Durations, LATENCY_STEPS};

use super::listen::ListenerStats;
use crate::metrics::{Family, LatencySnapshot, Samples, Unit};

static CLIENTS: Family =
    Family::counter("vcp_msgq_clients", Unit::None, "Connections of msgq clients, by what came of them");
static IN_FLIGHT: Family = Family::gauge(
    "vcp_msgq_in_flight",
    Unit::None,
    "Requests of the client that were taken and not completed",
);
static MEMORY: Family =
    Family::gauge("vcp_msgq_memory", Unit::Bytes, "Memory that this side has taken for the channel");
static EVENTS: Family = Family::counter(
    "vcp_msgq_events",
    Unit::None,
    "What a channel counted: messages, batches, kicks sent and saved, sleeps, stalls, repetitions",
);
static SPIN: Family = Family::counter(
    "vcp_msgq_spin",
    Unit::Seconds,
    "Time that the channel looked for messages before sleeping",
);
static EPOCH: Family = Family::gauge("vcp_msgq_epoch", Unit::None, "How often the channel was set up");
static HIGH: Family =
    Family::gauge("vcp_msgq_in_flight_high", Unit::None, "Most requests of this side in flight at a time");
static VIOLATIONS: Family =
    Family::counter("vcp_msgq_violations", Unit::None, "Times that the client broke a rule, by rule");
static LATENCY: Family = Family::latency(
    "vcp_msgq_latency",
    "From sending a request of this side to its completion, by the channel",
);
static SERVICE: Family = Family::latency(
    "vcp_msgq_service",
    "From receiving a request of the client to publishing its completion, by the channel",
);

/// A channel's histogram as the page has it.
pub(super) fn snapshot(durations: &Durations) -> LatencySnapshot {
    let bound = |step: usize| if step + 1 < LATENCY_STEPS { 1 << step } else { u64::MAX };
    let buckets = durations.steps.iter().enumerate().map(|(step, count)| (bound(step), *count)).collect();
    LatencySnapshot { buckets, sum_ns: durations.sum_ns, count: durations.count() }
}

/// Adds the numbers of these channels, and of their listener.
pub(super) fn collect<'c>(
    samples: &mut Samples,
    channels: impl Iterator<Item = &'c Channel>,
    stats: &ListenerStats,
) {
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    samples.add(&CLIENTS, &[("result", "accepted")], count(&stats.accepted));
    samples.add(&CLIENTS, &[("result", "refused")], count(&stats.refused));
    samples.add(&CLIENTS, &[("result", "failed")], count(&stats.failed));
    for channel in channels {
        let number = format!("{:032x}", channel.agreed().channel);
        samples.within("channel", &number, |samples| {
            samples.add(&IN_FLIGHT, &[], channel.held().into());
            samples.add(&MEMORY, &[], channel.memory_bytes() as u64);
            let stats = channel.stats();
            for (name, value) in COUNTERS.into_iter().zip(stats.plain()) {
                match name {
                    "spin_ns" => samples.add(&SPIN, &[], value),
                    "epoch" => samples.add(&EPOCH, &[], value),
                    "in_flight_high" => samples.add(&HIGH, &[], value),
                    event => samples.add(&EVENTS, &[("event", event)], value),
                }
            }
            for (rule, count) in RULE_NAMES.into_iter().zip(stats.violations) {
                samples.add(&VIOLATIONS, &[("rule", rule)], count);
            }
            samples.add_snapshot(&LATENCY, &[], snapshot(&stats.latency));
            samples.add_snapshot(&SERVICE, &[], snapshot(&stats.service));
        });
    }
}
