//! What a machine tells of itself. Serialised as it is by the API; names and units are part of that interface.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::kvm::exits::Exits;
use crate::kvm::stats::KvmExits;

/// A machine.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct Status {
    /// Whether its vCPUs run.
    pub state: RunState,
    /// Process id of the monitor.
    pub pid: u32,
    /// Time since the guest was started, milliseconds.
    pub uptime_ms: u64,
    /// Guest memory, bytes.
    pub memory_bytes: u64,
    /// What of it the guest's balloon holds, bytes; `None` if it has no balloon.
    pub balloon_bytes: Option<u64>,
    /// The guest's kernel said that it has panicked.
    pub panicked: bool,
    /// By number.
    pub vcpus: Vec<VcpuStatus>,
    /// In the order in which they were added.
    pub devices: Vec<DeviceStatus>,
}

/// Whether vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// They do.
    Running,
    /// They are stopped.
    Paused,
}

/// One vCPU.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct VcpuStatus {
    /// Its number.
    pub id: usize,
    /// Id of its thread on the host; 0 if it has not begun to run.
    pub thread_id: i32,
    /// Host CPUs that it may run on; `None`: wherever the process may.
    pub cpus: Option<Vec<usize>>,
    /// Exits to the monitor so far, by kind.
    pub exits: Exits,
    /// All exits so far as KVM counts them, if it tells.
    #[serde(default)]
    pub kvm: Option<KvmExits>,
}

/// One device.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct DeviceStatus {
    /// Its name, e.g. `disk0`.
    pub name: String,
    /// What it is.
    pub kind: DeviceKind,
    /// Where the guest sees it: `mmio 0xd0000000` or `pci 00:01.0`.
    pub address: String,
    /// The driver has started it.
    pub active: bool,
    /// Its backend outside the monitor, if it has one.
    pub backend: Option<BackendStatus>,
}

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// virtio-blk.
    Disk,
    /// virtio-net.
    Net,
    /// virtio-rng.
    Rng,
    /// virtio-balloon.
    Balloon,
}

/// A device's backend.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct BackendStatus {
    /// Whether it is connected.
    pub connected: bool,
    /// `away`, `starting`, `attaching`, `serving`, `upgrading`, `dying` or `over`.
    #[serde(default)]
    pub state: String,
    /// Process id, where the monitor has started it.
    pub pid: Option<u32>,
    /// Id of its data thread on the host.
    #[serde(default)]
    pub thread_id: Option<i32>,
    /// Hardware thread of the data thread, if it has one of its own.
    #[serde(default)]
    pub cpu: Option<usize>,
    /// How often another one has taken its place.
    pub restarts: u64,
    /// Leads to the control socket of the process, where the monitor has started it: an `O_PATH` descriptor of its file.
    #[serde(skip)]
    pub control: Option<Arc<OwnedFd>>,
    /// How often one was killed because its data thread stood still with work to do.
    #[serde(default)]
    pub stalls: u64,
    /// How often one has handed over to another.
    #[serde(default)]
    pub upgrades: u64,
    /// While it is away: time until the next attempt, milliseconds.
    #[serde(default)]
    pub next_start_ms: Option<u64>,
    /// How the last one went, in words.
    #[serde(default)]
    pub last_death: Option<String>,
    /// How long the guest was without a backend the last time, microseconds.
    #[serde(default)]
    pub last_away_us: Option<u64>,
    /// How long requests were not taken at the last upgrade, microseconds.
    #[serde(default)]
    pub upgrade_pause_us: Option<u64>,
    /// What its data thread did, where the monitor has started it.
    #[serde(default)]
    pub load: Option<LoadSplit>,
    /// Namespaces of its own.
    #[serde(default)]
    pub namespaces: Vec<String>,
    /// What it can reach: `portals` of its declaration or `any` over TCP, by another process; or what the `host` can.
    #[serde(default)]
    pub network: Option<String>,
    /// Its control group, if it is in one.
    #[serde(default)]
    pub control_group: Option<ControlGroup>,
    /// What of its confinement could not be had, with the reasons.
    #[serde(default)]
    pub not_confined: Vec<String>,
}

/// The control group of a VCP's processes: bounds, and what is used.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct ControlGroup {
    /// Its directory on the host.
    pub path: String,
    /// Most processor time, percent of one hardware thread; `None`: no bound.
    pub cpu_max_percent: Option<u32>,
    /// Share of a thread that it shares, relative to others'.
    pub cpu_weight: u32,
    /// Most memory, bytes, the guest's included.
    pub memory_max_bytes: u64,
    /// Most processes and threads.
    pub pids_max: u32,
    /// Memory charged to it, bytes.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Processor time so far, microseconds.
    pub cpu_us: u64,
    /// Time for which it was stopped by `cpu.max`, microseconds.
    pub throttled_us: u64,
    /// Processes killed because of `memory.max`.
    pub oom_kills: u64,
    /// Threads and processes refused because of `pids.max`.
    pub refused_pids: u64,
}

/// What a data thread did with its time since its process began, as it says itself.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, ToSchema)]
pub struct LoadSplit {
    /// Passes in which something moved, nanoseconds.
    pub busy_ns: u64,
    /// Looking for work that was not there, nanoseconds.
    pub look_ns: u64,
    /// Asleep, nanoseconds.
    pub sleep_ns: u64,
    /// Requests given back.
    pub requests: u64,
    /// Requests in flight.
    pub inflight: u64,
}
