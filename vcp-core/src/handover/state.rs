//! What is handed over: a data thread, its devices, their rings and front ends, as text and descriptors.
//!
//! Everything in here is checked by the side that takes it as if a front end had said it: the parts are brought in
//! through the same doors as the messages of vhost-user.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::FdIndex;
use crate::mem::RegionSpec;

/// Why nothing can be handed over.
#[derive(Debug, thiserror::Error)]
pub enum NotNow {
    /// Something is under way; it passes.
    #[error("{0}")]
    Busy(String),
    /// This cannot be handed over at all.
    #[error("{0}")]
    Never(String),
    /// Descriptors cannot be duplicated.
    #[error("cannot duplicate descriptors")]
    Io(#[from] std::io::Error),
}

impl NotNow {
    /// Whether trying again may help.
    #[must_use]
    pub fn passes(&self) -> bool {
        matches!(self, Self::Busy(_))
    }
}

/// A state that cannot be gone on from.
#[derive(Debug, thiserror::Error)]
pub enum BadState {
    /// Not what this version expects.
    #[error("{0}")]
    Text(String),
    /// Of the application's part.
    #[error("the state of {what} is not understood")]
    Json {
        /// Of what.
        what: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Descriptors are missing or left.
    #[error(transparent)]
    Fd(#[from] super::FdError),
    /// A ring cannot go on.
    #[error(transparent)]
    Port(#[from] crate::vu::port::PortError),
    /// The in-flight log cannot be used.
    #[error("in-flight log")]
    Log(#[from] crate::queue::log::LogError),
    /// The guest's memory cannot be mapped.
    #[error(transparent)]
    Memory(#[from] crate::mem::MemError),
    /// The system refused.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// All of it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerState {
    /// When the old process looked at a ring for the last time ([`monotonic_ns`](super::monotonic_ns)).
    pub stopped_ns: u64,
    /// When it completed a request for the last time, or stopped.
    pub completed_ns: u64,
    /// Counters of the data thread.
    pub metrics: Value,
    /// The control socket.
    pub control: Option<SocketState>,
    /// The page of metrics.
    pub page: Option<PageState>,
    /// The devices, in the order of the offer.
    pub devices: Vec<DeviceState>,
    /// What else the data thread drives, in the order of the offer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sides: Vec<Value>,
    /// What joins them, if anything does.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub fabric: Value,
    /// The connection by which the process that the user started is told apart from one that ended; see
    /// [`anchor`](super::anchor).
    pub lifeline: Option<FdIndex>,
    /// Standard error of the old process, for one that takes its place: the log goes on where it was.
    pub log: Option<FdIndex>,
}

/// Where the page of metrics is served.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum PageState {
    /// Over TCP.
    Tcp(FdIndex),
    /// Over a socket file.
    Unix(SocketState),
}

/// A listening socket file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SocketState {
    /// Where it is.
    pub path: PathBuf,
    /// Its device and inode, by which it is known to be ours still.
    pub identity: (u64, u64),
    /// The socket.
    pub fd: FdIndex,
    /// The front end listens, and this side connects to it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dials: bool,
}

/// One device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// Name in logs and metrics.
    pub name: String,
    /// Where front ends connect.
    pub socket: SocketState,
    /// The front end that is connected.
    pub front_end: Option<FrontEndState>,
    /// The device on the data thread.
    pub port: PortState,
}

/// A connected front end, between two messages. What it has sent and nobody has read yet is in the socket.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrontEndState {
    /// The connection.
    pub fd: FdIndex,
    /// Protocol features that it took.
    pub protocol: u64,
    /// The driver's status, as it told it last.
    #[serde(default)]
    pub status: u8,
    /// Its memory table.
    pub memory: Vec<RegionState>,
}

/// One region of a memory table.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionState {
    /// Where it is.
    pub spec: RegionSpec,
    /// The file behind it.
    pub fd: FdIndex,
}

/// A device on the data thread.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortState {
    /// Feature bits as the front end acknowledged them, with `VHOST_USER_F_PROTOCOL_FEATURES`.
    pub features: u64,
    /// The back-end channel.
    pub channel: Option<FdIndex>,
    /// The configuration changed and the front end does not know yet.
    pub changed: bool,
    /// The in-flight log.
    pub log: Option<LogState>,
    /// The queues.
    pub vrings: Vec<VringState>,
    /// The device model's own part.
    pub device: Value,
}

/// An in-flight log, as `SET_INFLIGHT_FD` describes it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogState {
    /// Bytes of the area.
    pub len_bytes: u64,
    /// Where it is in the file.
    pub offset: u64,
    /// Queues it has room for.
    pub queues: u16,
    /// Entries for each.
    pub queue_size: u16,
    /// The file.
    pub fd: FdIndex,
}

/// One virtqueue with nothing in flight.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VringState {
    /// Entries.
    pub size: u32,
    /// Guest physical addresses of descriptors, available and used ring, if they were set.
    pub addresses: Option<(u64, u64, u64)>,
    /// Where it goes on, as `GET_VRING_BASE` would say.
    pub base: u32,
    /// Whether it runs (`SET_VRING_KICK` came).
    pub running: bool,
    /// `SET_VRING_ENABLE`.
    pub enabled: bool,
    /// Kick descriptor.
    pub kick: Option<FdIndex>,
    /// It has to be polled.
    pub polled: bool,
    /// Call descriptor.
    pub call: Option<FdIndex>,
    /// Error descriptor.
    pub err: Option<FdIndex>,
}
