//! Connections for a process that has no network: `vcp-iscsi dial`, and what asks it.
//!
//! A `vcp-iscsi serve` that its monitor has put into an empty network namespace cannot resolve a name or make a socket. It
//! asks a small process beside it, which stays in the host's network, is confined to that, and was told at its start which
//! portals it may connect to. Sockets come back while they are still connecting, so that this process never waits for a
//! target, and whoever asked keeps its own time limits.
//!
//! - [`message`]: what the two say to each other.
//! - [`client`]: the [`Network`](crate::portal::net::Network) of a process that asks.
//! - [`server`]: the process that connects.
//!
//! Each request brings a socket of its own for its answer. Many threads can ask over one channel, nobody's answer is
//! mistaken for another's, and an answer that does not come holds up nobody but who waits for it.

pub mod client;
pub mod message;
pub mod server;

pub use client::Dialer;
