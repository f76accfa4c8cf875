//! A guest for tests: what a monitor tells of it after `steps` times two seconds of the same work.

use std::time::Instant;

use super::Look;
use crate::api::types::{GuestStatus, Load, Operations, VcpFigures};

/// A look at the guest.
pub(super) fn look(at: Instant, steps: u64) -> Look {
    let second = 1_000_000_000;
    // 90 in bucket 15 and 10 in bucket 17 of each hundred.
    let mut latency_buckets = vec![0; 40];
    (latency_buckets[15], latency_buckets[17]) = (1800 * steps, 200 * steps);
    let read =
        Operations { ok: 2000 * steps, bytes: 2000 * 4096 * steps, latency_buckets, ..Operations::default() };
    let load = Load { busy_ns: steps * second / 2, look_ns: steps * second / 2, sleep_ns: steps * second };
    let machine = serde_json::json!({
        "state": "running", "pid": 4711, "uptime_ms": 10_000 + 2000 * steps, "memory_bytes": 1u64 << 30, "panicked": false,
        "vcpus": [{"id": 0, "thread_id": 4712, "cpus": [0, 1], "exits":
            {"io_in": 0, "io_out": 100 * steps, "mmio_read": 0, "mmio_write": 0, "interrupted": 0, "other": 0},
            "kvm": {"exits": 1000 * steps, "halt_exits": 20 * steps}}],
        "devices": [
            {"name": "disk0", "kind": "disk", "address": "mmio 0xd0000000", "active": true,
                "backend": {"connected": true, "pid": 4713, "cpu": 3, "restarts": 2}},
            {"name": "rng", "kind": "rng", "address": "mmio 0xd0001000", "active": true, "backend": null},
        ],
    });
    let machine = serde_json::from_value(machine).expect("a status");
    let vcp = VcpFigures {
        device: "disk0".into(),
        answers: true,
        load,
        inflight: 7,
        read,
        ..VcpFigures::default()
    };
    let status = GuestStatus { name: "vm1".into(), version: "0".into(), machine, vcps: vec![vcp] };
    Look { at, status }
}
