//! Bodies of the API's requests and answers. Units are in the names; what is not known is `null`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::machine::command::{PinTarget, RateLimits};
use crate::machine::status::Status;

/// What is known about a guest.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct GuestStatus {
    /// What it is called.
    pub name: String,
    /// Version of the monitor.
    pub version: String,
    /// The machine: state, vCPUs, devices.
    pub machine: Status,
    /// The VCPs that the monitor has started, as they tell of themselves, in the order of their devices.
    pub vcps: Vec<VcpFigures>,
}

/// What a VCP tells of itself.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct VcpFigures {
    /// The device that it serves, e.g. `disk0`.
    pub device: String,
    /// Whether it answered in time. What it did not tell is 0 or empty.
    pub answers: bool,
    /// Where the time of its data thread went.
    pub load: Load,
    /// Times its data thread went to sleep.
    pub sleeps: u64,
    /// Requests in flight.
    pub inflight: u64,
    /// Queues stopped because their driver broke a rule.
    pub broken_queues: u64,
    /// Notifications sent to the driver.
    pub notifications: u64,
    /// Requests that an earlier process had in flight and this one took again.
    pub resubmitted: u64,
    /// Reads of a disk; packets to the guest.
    pub read: Operations,
    /// Writes of a disk; packets from the guest.
    pub write: Operations,
    /// Flushes.
    pub flush: Operations,
    /// Everything else.
    pub other: Operations,
}

/// Where the time of a data thread went since it began, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct Load {
    /// Passes in which something moved.
    pub busy_ns: u64,
    /// Looking for work that was not there.
    pub look_ns: u64,
    /// Asleep.
    pub sleep_ns: u64,
}

/// What one kind of request did.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct Operations {
    /// Requests that ended well.
    pub ok: u64,
    /// Requests that ended with an error status.
    pub failed: u64,
    /// Payload of those that ended well, bytes.
    pub bytes: u64,
    /// Latencies: entry `i` counts those from 2^(i-1) up to below 2^i nanoseconds, the last one also all above.
    pub latency_buckets: Vec<u64>,
}

/// Why a request was not carried out.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct Problem {
    /// One line for people: what failed, on what, what to try.
    pub error: String,
}

/// A device was added.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct Added {
    /// The name by which it can be removed.
    pub name: String,
}

/// How much memory the guest may use.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemorySize {
    /// Bytes; at most what the guest was started with.
    pub bytes: u64,
}

/// Where a thread is to run.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// Whose thread.
    pub target: PinTarget,
    /// Host CPUs that it may run on from now on; at least one.
    pub cpus: Vec<usize>,
}

/// How a VCP is replaced by a new process.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestartVcp {
    /// It hands everything over between two batches; else it is killed, and its successor repeats what was in flight.
    #[serde(default)]
    pub upgrade: bool,
}

/// Rate limits of a device; what is left out stays as it is, 0 takes a limit away.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Requests per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Bytes per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<u64>,
}

impl From<Limits> for RateLimits {
    fn from(limits: Limits) -> Self {
        Self { iops: limits.iops, bytes_per_s: limits.bytes_per_s }
    }
}

/// What is logged.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LogLevel {
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `vmm=debug,warn`.
    pub level: String,
    /// The VCP of this device; the monitor itself if it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
}

/// Where a snapshot is written.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// An absolute path on the monitor's host.
    #[schema(value_type = String)]
    pub path: PathBuf,
}
