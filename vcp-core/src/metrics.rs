//! Counters and latency of the data path, readable while it runs.
//!
//! Each counter has one writer, the data thread, which uses plain loads and stores (no read-modify-write, no lock);
//! readers on other threads see each counter whole and at most a moment old.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// A counter with a single writer.
#[derive(Debug, Default)]
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
#[derive(Debug)]
pub struct Latency {
    buckets: [Counter; BUCKETS],
}

impl Default for Latency {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| Counter::default()) }
    }
}

impl Latency {
    /// Records one latency. Only the owning thread may call it.
    #[inline]
    pub fn record_ns(&self, ns: u64) {
        let bucket = (u64::BITS - ns.leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)].add(1);
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
#[derive(Debug, Default)]
pub struct OpMetrics {
    /// Requests that ended well.
    pub ok: Counter,
    /// Requests that ended with an error status.
    pub failed: Counter,
    /// Payload bytes of those that ended well.
    pub bytes: Counter,
    /// From taken to given back.
    pub latency: Latency,
}

/// Counters of one device. Every device model has the same ones, so that tools need not know the device.
#[derive(Debug, Default)]
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
    pub connections: u64,
    pub refused_connections: u64,
    pub refused_config_writes: u64,
}

impl OpMetrics {
    fn snapshot(&self) -> OpSnapshot {
        let (_, [p50_ns, p99_ns]) = self.latency.quantiles_ns([0.5, 0.99]);
        OpSnapshot { ok: self.ok.get(), failed: self.failed.get(), bytes: self.bytes.get(), p50_ns, p99_ns }
    }
}

impl DeviceMetrics {
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
            connections: self.connections.get(),
            refused_connections: self.refused_connections.get(),
            refused_config_writes: self.refused_config_writes.get(),
        }
    }
}

/// Counters of the data thread.
#[derive(Debug, Default)]
pub struct LoopMetrics {
    /// Passes over all devices: moves as long as the thread makes progress or waits by right.
    pub passes: Counter,
    /// Passes in which something moved.
    pub busy_passes: Counter,
    /// Times the thread went to sleep.
    pub sleeps: Counter,
    /// 1 while it sleeps: a pass counter that stands still is then no sign of trouble.
    pub sleeping: Counter,
    /// Spin budget learned now, in nanoseconds.
    pub spin_ns: Counter,
}

/// A readable copy of a [`LoopMetrics`].
#[derive(Debug, Serialize)]
#[allow(missing_docs)] // The fields are those of `LoopMetrics`.
pub struct LoopSnapshot {
    pub passes: u64,
    pub busy_passes: u64,
    pub sleeps: u64,
    pub sleeping: bool,
    pub spin_ns: u64,
}

impl LoopMetrics {
    /// A copy of all counters.
    #[must_use]
    pub fn snapshot(&self) -> LoopSnapshot {
        LoopSnapshot {
            passes: self.passes.get(),
            busy_passes: self.busy_passes.get(),
            sleeps: self.sleeps.get(),
            sleeping: self.sleeping.get() != 0,
            spin_ns: self.spin_ns.get(),
        }
    }
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
}
