//! Hand-over of a running `vcp-net` to a new one: what of it is this program's and not `vcp_core::handover`'s.
//!
//! Rings, front ends, descriptors of uplinks, stations and counters travel as the state of ports and switches; nothing is
//! in flight between two passes, so there is nothing to wait for. `upgrade`, the user's command that starts it, is that of
//! every VCP ([`vcp_core::handover::upgrade`]).

pub mod take_over;

use serde::{Deserialize, Serialize};
use vcp_core::process::confine::Mode as ConfineMode;

use crate::port::PortSpec;

/// What a process that takes over can build before anything stops.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// `--cpu`.
    pub cpu: Option<usize>,
    /// `--second-cpu`.
    #[serde(default)]
    pub second_cpu: Option<usize>,
    /// `--poll-us`.
    pub poll_us: String,
    /// What is logged.
    pub log: Option<String>,
    /// `--confine`.
    pub confine: ConfineMode,
    /// Where captures go.
    pub capture_dir: Option<std::path::PathBuf>,
    /// Files that are removed at the end.
    pub sockets: Vec<std::path::PathBuf>,
    /// Whether front ends are connected to.
    pub dials: bool,
    /// The ports, in order, as they were at the start.
    pub ports: Vec<PortSpec>,
    /// Number of switches.
    pub switches: usize,
    /// Whether there is a user-mode stack, which reads the resolver's configuration and listens.
    #[serde(default)]
    pub listens: bool,
    /// Sockets of its flows at most.
    #[serde(default)]
    pub flows: u64,
}

/// How this program calls itself to the other side.
#[must_use]
pub fn program() -> String {
    format!("vcp-net {}", env!("CARGO_PKG_VERSION"))
}
