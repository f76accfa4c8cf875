//! The port: iSCSI sessions on real sockets, and the [`Engine`](crate::engine::Engine) over them.
//!
//! - [`options`]: what a session is opened with, and the command line arguments for it.
//! - [`net`]: the seam to the network, and [`socket`]: name resolution and non-blocking TCP behind it.
//! - [`login`]: the login phase over a socket.
//! - [`wire`]: the full-feature session over a socket; guest memory moves here.
//! - [`probe`]: the SCSI commands that find out what a logical unit is.
//! - [`client`]: all of it, blocking, for what runs before there is a data thread and for the short commands.
//! - [`link`]: gets a session back after it was lost, without blocking.
//! - [`mod@engine`] has [`IscsiEngine`].
//!
//! The protocol is the `iscsi` crate's; nothing here looks into a PDU. The device model above sees neither.

pub mod client;
pub mod engine;
mod error;
mod job;
pub mod link;
pub mod login;
pub mod net;
mod observe;
pub mod options;
pub mod probe;
pub mod socket;
pub mod wire;

pub use client::Client;
pub use engine::{IscsiEngine, MAX_PATHS, PathStats, Stats};
pub use error::PortalError;
pub use net::{Network, Stream};
pub use options::{Options, SessionArgs};
