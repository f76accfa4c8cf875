//! What makes a process a virtual channel processor (VCP): guest memory and virtqueue access, the vhost-user server,
//! the poll loop that owns one hardware thread, the control socket and metrics.
//!
//! A device model (virtio semantics) sits on top of this crate and implements [`device::RingDevice`]; nothing in here
//! knows what a disk or a network is. `unsafe` is confined to [`mem`], [`sock`], [`uring`] and [`queue::burst`], the
//! places that touch memory another party or the kernel can write, and to the signal mask in [`process`].

// The driver models of the integration tests serve the unit tests, too.
#[cfg(test)]
extern crate self as vcp_core;

pub mod ask;
pub mod control;
pub mod device;
pub mod epoll;
pub mod fabric;
pub mod handover;
pub mod http;
pub mod mailbox;
pub mod mem;
pub mod metrics;
pub mod msgq;
pub mod pcapng;
pub mod poll;
pub mod process;
pub mod pulse;
pub mod queue;
pub mod sock;
pub mod uring;
pub mod vu;
