//! Counters and latency of the data path, readable while it runs.
//!
//! Each counter has one writer, the data thread, which uses plain loads and stores (no read-modify-write, no lock);
//! readers on other threads see each counter whole and at most a moment old.
//!
//! The counters themselves can be serialised and made from what was serialised: they go on counting in a process that
//! takes over from this one ([`crate::handover`]). A counter that the other version does not have starts at 0.

pub mod page;
mod samples;

pub use samples::{Amount, Family, Kind, LatencySnapshot, Sample, Samples, Unit, seconds};

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

/// A counter with a single writer.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owning thread may call it; concurrent callers would lose counts.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Sets a gauge. Only the owning thread may call it.
    #[inline]
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value now.
    #[inline]
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Buckets of a [`Latency`]: powers of two of nanoseconds, the last one open.
const BUCKETS: usize = 40;

/// Latencies in buckets of powers of two.
#[derive(Debug, Serialize, Deserialize)]
#[serde(into = "Vec<u64>", from = "Vec<u64>")]
pub struct Latency {
    buckets: [Counter; BUCKETS],
    sum_ns: Counter,
}

impl Default for Latency {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| Counter::default()), sum_ns: Counter::default() }
    }
}

impl Clone for Latency {
    fn clone(&self) -> Self {
        let copy = |counter: &Counter| Counter(counter.get().into());
        Self { buckets: std::array::from_fn(|at| copy(&self.buckets[at])), sum_ns: copy(&self.sum_ns) }
    }
}

impl From<Latency> for Vec<u64> {
    fn from(latency: Latency) -> Self {
        // The sum behind the buckets.
        latency.buckets.iter().chain([&latency.sum_ns]).map(Counter::get).collect()
    }
}

impl From<Vec<u64>> for Latency {
    /// Buckets that are not there are empty.
    fn from(counts: Vec<u64>) -> Self {
        let at = |at: usize| Counter(counts.get(at).copied().unwrap_or_default().into());
        Self { buckets: std::array::from_fn(at), sum_ns: at(BUCKETS) }
    }
}

impl Latency {
    /// Records one latency. Only the owning thread may call it.
    #[inline]
    pub fn record_ns(&self, ns: u64) {
        let bucket = (u64::BITS - ns.leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)].add(1);
        self.sum_ns.add(ns);
    }

    /// Records the time from `since` to `now`; none if the clock stood still or `now` is earlier.
    #[inline]
    pub fn record(&self, since: Instant, now: Instant) {
        let took = now.saturating_duration_since(since);
        self.record_ns(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// A copy. Its count is that of its buckets, whatever the owner records meanwhile.
    #[must_use]
    pub fn snapshot(&self) -> LatencySnapshot {
        let bound = |bucket| if bucket == BUCKETS - 1 { u64::MAX } else { 1u64 << bucket };
        let buckets: Vec<(u64, u64)> =
            self.buckets.iter().enumerate().map(|(bucket, count)| (bound(bucket), count.get())).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        LatencySnapshot { buckets, sum_ns: self.sum_ns.get(), count }
    }

    /// Number of latencies recorded, and upper bounds in nanoseconds of the given quantiles (0.0 to 1.0).
    #[must_use]
    pub fn quantiles_ns<const N: usize>(&self, quantiles: [f64; N]) -> (u64, [u64; N]) {
        let counts: Vec<u64> = self.buckets.iter().map(Counter::get).collect();
        let total: u64 = counts.iter().sum();
        let at = |quantile: f64| {
            let rank = (quantile * total as f64).ceil().max(1.0) as u64;
            let mut seen = 0;
            for (bucket, count) in counts.iter().enumerate() {
                seen += count;
                if seen >= rank {
                    return 1u64 << bucket;
                }
            }
            0
        };
        (total, quantiles.map(at))
    }
}

/// What one kind of request did.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct OpMetrics {
    /// Requests that ended well.
    pub ok: Counter,
    /// Requests that ended with an error status.
    pub failed: Counter,
    /// Payload bytes of those that ended well.
    pub bytes: Counter,
    /// From taken to given back.
    pub latency: Latency,
    /// From when it was first seen in the ring to taken: what the device, its limits or a batch that was full made it
    /// wait. (When the guest put it there is not told; one that was taken at once has waited for 0 ns.)
    pub ring_wait: Latency,
}

/// Counters of one device. Every device model has the same ones, so that tools need not know the device.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceMetrics {
    /// Device reads (guest-bound data).
    pub read: OpMetrics,
    /// Device writes.
    pub write: OpMetrics,
    /// Flushes.
    pub flush: OpMetrics,
    /// Everything else (discard, write zeroes, identify).
    pub other: OpMetrics,
    /// Requests in flight now.
    pub inflight: Counter,
    /// Times a queue was stopped because its driver broke a rule.
    pub broken_queues: Counter,
    /// Notifications sent to the driver.
    pub notifications: Counter,
    /// Completions dropped because their ring was gone.
    pub stale_completions: Counter,
    /// Requests that an earlier process had in flight and this one took again.
    pub resubmitted: Counter,
    /// Connections accepted.
    pub connections: Counter,
    /// Front ends refused because another one was connected.
    pub refused_connections: Counter,
    /// Writes to configuration fields that cannot be written.
    pub refused_config_writes: Counter,
}

/// A readable copy of an [`OpMetrics`].
#[derive(Debug, Serialize)]
pub struct OpSnapshot {
    /// See [`OpMetrics`].
    pub ok: u64,
    /// See [`OpMetrics`].
    pub failed: u64,
    /// See [`OpMetrics`].
    pub bytes: u64,
    /// Median latency in nanoseconds (upper bound of its power-of-two bucket).
    pub p50_ns: u64,
    /// 99th percentile, as `p50_ns`.
    pub p99_ns: u64,
    /// Latencies: entry `i` counts those from 2^(i-1) up to below 2^i nanoseconds, the last one also all above. For who
    /// wants to know what happened between two readings.
    pub latency_buckets: Vec<u64>,
    /// Median wait in the ring, as `p50_ns`.
    pub ring_wait_p50_ns: u64,
    /// 99th percentile of it.
    pub ring_wait_p99_ns: u64,
}

/// A readable copy of a [`DeviceMetrics`].
#[derive(Debug, Serialize)]
#[allow(missing_docs)] // The fields are those of `DeviceMetrics`.
pub struct DeviceSnapshot {
    pub read: OpSnapshot,
    pub write: OpSnapshot,
    pub flush: OpSnapshot,
    pub other: OpSnapshot,
    pub inflight: u64,
    pub broken_queues: u64,
    pub notifications: u64,
    pub stale_completions: u64,
    pub resubmitted: u64,
    pub connections: u64,
    pub refused_connections: u64,
    pub refused_config_writes: u64,
}

impl OpMetrics {
    fn snapshot(&self) -> OpSnapshot {
        let (_, [p50_ns, p99_ns]) = self.latency.quantiles_ns([0.5, 0.99]);
        let (_, [ring_wait_p50_ns, ring_wait_p99_ns]) = self.ring_wait.quantiles_ns([0.5, 0.99]);
        OpSnapshot {
            ok: self.ok.get(),
            failed: self.failed.get(),
            bytes: self.bytes.get(),
            p50_ns,
            p99_ns,
            latency_buckets: self.latency.buckets.iter().map(Counter::get).collect(),
            ring_wait_p50_ns,
            ring_wait_p99_ns,
        }
    }

    fn collect(&self, samples: &mut Samples, op: &str) {
        samples.add(&families::REQUESTS, &[("op", op), ("result", "ok")], self.ok.get());
        samples.add(&families::REQUESTS, &[("op", op), ("result", "failed")], self.failed.get());
        samples.add(&families::REQUEST_BYTES, &[("op", op)], self.bytes.get());
        samples.add_latency(&families::DURATION, &[("op", op)], &self.latency);
        samples.add_latency(&families::STAGE, &[("op", op), ("stage", "ring")], &self.ring_wait);
    }
}

impl DeviceMetrics {
    /// All of them, with their names outside.
    pub fn collect(&self, samples: &mut Samples) {
        for (op, metrics) in
            [("read", &self.read), ("write", &self.write), ("flush", &self.flush), ("other", &self.other)]
        {
            metrics.collect(samples, op);
        }
        for (family, counter) in [
            (&families::IN_FLIGHT, &self.inflight),
            (&families::BROKEN_QUEUES, &self.broken_queues),
            (&families::NOTIFICATIONS, &self.notifications),
            (&families::STALE, &self.stale_completions),
            (&families::RESUBMITTED, &self.resubmitted),
            (&families::CONNECTIONS, &self.connections),
            (&families::REFUSED_CONNECTIONS, &self.refused_connections),
            (&families::REFUSED_CONFIG, &self.refused_config_writes),
        ] {
            samples.add(family, &[], counter.get());
        }
    }

    /// A copy of all counters.
    #[must_use]
    pub fn snapshot(&self) -> DeviceSnapshot {
        DeviceSnapshot {
            read: self.read.snapshot(),
            write: self.write.snapshot(),
            flush: self.flush.snapshot(),
            other: self.other.snapshot(),
            inflight: self.inflight.get(),
            broken_queues: self.broken_queues.get(),
            notifications: self.notifications.get(),
            stale_completions: self.stale_completions.get(),
            resubmitted: self.resubmitted.get(),
            connections: self.connections.get(),
            refused_connections: self.refused_connections.get(),
            refused_config_writes: self.refused_config_writes.get(),
        }
    }
}

/// Counters of the data thread.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LoopMetrics {
    /// Passes over all devices: moves as long as the thread makes progress or waits by right.
    pub passes: Counter,
    /// Passes in which something moved.
    pub busy_passes: Counter,
    /// Times the thread went to sleep.
    pub sleeps: Counter,
    /// System calls of its io_uring instance, if it has one.
    pub ring_enters: Counter,
    /// 1 while it sleeps: a pass counter that stands still is then no sign of trouble.
    pub sleeping: Counter,
    /// Time in passes in which something moved, in nanoseconds.
    pub busy_ns: Counter,
    /// Time of looking for work that was not there, in nanoseconds.
    pub look_ns: Counter,
    /// Time asleep, in nanoseconds.
    pub sleep_ns: Counter,
    /// Spin budget learned now, in nanoseconds.
    pub spin_ns: Counter,
    /// Times this loop was taken over from another process.
    pub take_overs: Counter,
    /// How long requests were not taken at the last one, in nanoseconds: from the old process's last look at a ring to
    /// the new one's first.
    pub take_over_stopped_ns: Counter,
    /// The same from the last completion of the old process (or its last look, if nothing was in flight then) to the
    /// first of the new one, in nanoseconds. 0 until there is one.
    pub take_over_gap_ns: Counter,
}

/// A readable copy of a [`LoopMetrics`].
#[derive(Debug, Serialize)]
#[allow(missing_docs)] // The fields are those of `LoopMetrics`.
pub struct LoopSnapshot {
    pub passes: u64,
    pub busy_passes: u64,
    pub sleeps: u64,
    pub sleeping: bool,
    pub ring_enters: u64,
    pub busy_ns: u64,
    pub look_ns: u64,
    pub sleep_ns: u64,
    pub spin_ns: u64,
    pub take_overs: u64,
    pub take_over_stopped_ns: u64,
    pub take_over_gap_ns: u64,
}

impl LoopMetrics {
    /// All of them, with their names outside.
    pub fn collect(&self, samples: &mut Samples) {
        for (family, counter) in [
            (&families::PASSES, &self.passes),
            (&families::BUSY_PASSES, &self.busy_passes),
            (&families::SLEEPS, &self.sleeps),
            (&families::SLEEPING, &self.sleeping),
            (&families::RING_ENTERS, &self.ring_enters),
            (&families::SPIN, &self.spin_ns),
        ] {
            samples.add(family, &[], counter.get());
        }
        for (part, counter) in [("busy", &self.busy_ns), ("look", &self.look_ns), ("sleep", &self.sleep_ns)] {
            samples.add(&families::LOOP_TIME, &[("part", part)], counter.get());
        }
    }

    /// A copy of all counters.
    #[must_use]
    pub fn snapshot(&self) -> LoopSnapshot {
        LoopSnapshot {
            passes: self.passes.get(),
            busy_passes: self.busy_passes.get(),
            sleeps: self.sleeps.get(),
            sleeping: self.sleeping.get() != 0,
            ring_enters: self.ring_enters.get(),
            busy_ns: self.busy_ns.get(),
            look_ns: self.look_ns.get(),
            sleep_ns: self.sleep_ns.get(),
            spin_ns: self.spin_ns.get(),
            take_overs: self.take_overs.get(),
            take_over_stopped_ns: self.take_over_stopped_ns.get(),
            take_over_gap_ns: self.take_over_gap_ns.get(),
        }
    }
}

/// Names outside of what every VCP has.
pub mod families {
    use super::{Family, Unit};

    /// Requests of the driver.
    pub static REQUESTS: Family =
        Family::counter("vcp_requests", Unit::None, "Requests that ended, by kind and result");
    /// Payload.
    pub static REQUEST_BYTES: Family =
        Family::counter("vcp_request", Unit::Bytes, "Payload of requests that ended well");
    /// Whole duration.
    pub static DURATION: Family =
        Family::latency("vcp_request_duration", "From taken from the ring to given back");
    /// Parts of it, and the wait before it.
    pub static STAGE: Family = Family::latency(
        "vcp_request_stage",
        "Parts of a request's time: ring (seen there until taken), window (taken until sent), target (sent until answered)",
    );
    /// Requests in flight.
    pub static IN_FLIGHT: Family =
        Family::gauge("vcp_requests_in_flight", Unit::None, "Requests taken and not given back");
    /// Ring errors.
    pub static BROKEN_QUEUES: Family =
        Family::counter("vcp_broken_queues", Unit::None, "Queues stopped because their driver broke a rule");
    /// Notifications.
    pub static NOTIFICATIONS: Family =
        Family::counter("vcp_notifications", Unit::None, "Notifications sent to the driver");
    /// Stale completions.
    pub static STALE: Family = Family::counter(
        "vcp_stale_completions",
        Unit::None,
        "Completions dropped because their ring was gone",
    );
    /// Resubmissions.
    pub static RESUBMITTED: Family = Family::counter(
        "vcp_resubmitted",
        Unit::None,
        "Requests in flight of an earlier process, taken again",
    );
    /// Front ends.
    pub static CONNECTIONS: Family =
        Family::counter("vcp_front_end_connections", Unit::None, "Front ends that connected");
    /// Front ends refused.
    pub static REFUSED_CONNECTIONS: Family = Family::counter(
        "vcp_front_end_connections_refused",
        Unit::None,
        "Front ends refused because another one was connected",
    );
    /// Configuration writes refused.
    pub static REFUSED_CONFIG: Family = Family::counter(
        "vcp_config_writes_refused",
        Unit::None,
        "Writes to configuration fields that cannot be written",
    );
    /// Passes.
    pub static PASSES: Family =
        Family::counter("vcp_loop_passes", Unit::None, "Passes of the data thread over its devices");
    /// Busy passes.
    pub static BUSY_PASSES: Family =
        Family::counter("vcp_loop_busy_passes", Unit::None, "Passes in which something moved");
    /// Sleeps.
    pub static SLEEPS: Family =
        Family::counter("vcp_loop_sleeps", Unit::None, "Times the data thread went to sleep");
    /// Calls of the ring.
    pub static RING_ENTERS: Family = Family::counter(
        "vcp_loop_ring_enters",
        Unit::None,
        "System calls of the data thread's io_uring instance; 0 without one",
    );
    /// Asleep.
    pub static SLEEPING: Family =
        Family::gauge("vcp_loop_sleeping", Unit::None, "1 while the data thread sleeps");
    /// Load split.
    pub static LOOP_TIME: Family = Family::counter(
        "vcp_loop_time",
        Unit::Seconds,
        "What the data thread did with its time: busy (something moved), look (for work that was not there), sleep",
    );
    /// Spin budget.
    pub static SPIN: Family = Family::gauge(
        "vcp_loop_spin_budget",
        Unit::Seconds,
        "How long an idle data thread looks before it sleeps",
    );
    /// Whether a device answered.
    pub static ANSWERS: Family = Family::gauge(
        "vcp_device_answers",
        Unit::None,
        "1 if the data thread answered for the device in time; else its own numbers are missing here",
    );
    /// Version.
    pub static BUILD: Family =
        Family::gauge("vcp_build", Unit::None, "Always 1; the label says which version runs");
    /// CPU time.
    pub static CPU: Family =
        Family::counter("process_cpu", Unit::Seconds, "CPU time of all threads of the process");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_upper_bounds_of_their_bucket() {
        let latency = Latency::default();
        for ns in [100, 100, 100, 5000] {
            latency.record_ns(ns);
        }
        assert_eq!(latency.quantiles_ns([0.5, 0.99]), (4, [128, 8192]));
        assert_eq!(Latency::default().quantiles_ns([0.5]), (0, [0]));
    }

    #[test]
    fn counters_go_on_where_they_were() {
        let old = DeviceMetrics::default();
        old.read.ok.add(3);
        old.read.latency.record_ns(100);
        let text = serde_json::to_string(&old).unwrap();
        let new: DeviceMetrics = serde_json::from_str(&text).unwrap();
        new.read.ok.add(1);
        assert_eq!((new.read.ok.get(), new.read.latency.quantiles_ns([0.5])), (4, (1, [128])));
        // Of a version that counts less.
        let fewer: DeviceMetrics = serde_json::from_str(r#"{"read":{"ok":5}}"#).unwrap();
        assert_eq!((fewer.read.ok.get(), fewer.write.ok.get()), (5, 0));
    }
}
