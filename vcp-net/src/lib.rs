//! The network stack as a virtual channel processor: an Ethernet switch among guests, each of which is a vhost-user-net
//! port, with an uplink to the host's networks.
//!
//! [`port`] is the device model (virtio semantics), [`frame`] what frames consist of, [`switch`] the line of operations
//! that takes them from port to port, [`uplink`] where else they go. [`serve`] joins them to the poll loop of `vcp-core`.
//! [`capture`] is for looking at frames. [`user`] is the uplink of those who have no rights on the host. `unsafe` is confined to the system calls of `uplink` and
//! `user`.

pub mod capture;
pub mod cli;
mod confine;
pub mod frame;
pub mod handover;
pub mod port;
pub mod serve;
pub mod switch;
pub mod uplink;
pub mod user;
