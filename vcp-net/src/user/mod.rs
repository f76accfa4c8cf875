//! The user-mode stack: an uplink that needs no rights on the host. Guests find a small network with a gateway that gives
//! them addresses, names and a way out through sockets of this process.
//!
//! The engines have no I/O and no clock of their own: [`tcp`] one side of a connection, [`dhcp4`], [`dhcp6`], [`ndp`],
//! [`icmp`], [`dns`] answers to messages, [`packet`] headers and checksums, [`leases`] who has which address. [`stack`] has
//! the sockets, and joins all to the switch.

pub mod config;
pub mod counters;
pub mod dhcp4;
pub mod dhcp6;
pub mod dns;
pub mod icmp;
pub mod leases;
pub mod ndp;
pub mod packet;
pub mod resolv;
mod slab;
pub mod stack;
mod sys;
pub mod tcp;

pub use config::UserConfig;
pub use resolv::RESOLV_CONF;
pub use stack::UserStack;
