//! Rings in bursts, for devices whose requests never stay in flight: a network device copies a frame and is done with it.
//!
//! [`BurstRing`] is a virtqueue of either format of which many chains are taken at once ([`Batch`]), looked at where they
//! lie ([`Frame`]), and given back in the order in which they came. Between two passes of the data thread nothing is in
//! flight, so that a stop, a hand-over and a crash need no log: a split ring goes on from its used index, a packed one from
//! what its slots say (`recover`).
//!
//! Against [`VirtQueue`](super::VirtQueue)'s rings it saves what a request of 64 bytes cannot pay for: addresses are
//! translated once per ring (not once per access), no mapping is reference-counted per chain, used elements of a burst
//! are one where the driver agreed to that (`VIRTIO_F_IN_ORDER`), and the memory of a burst is prefetched.
//!
//! Rules: every address is checked against the mapped regions before a pointer to it exists; pointers live no longer than
//! the mapping, which each ring and each batch keeps; descriptors are read once; payload is only ever copied, and may
//! change under the copy.
#![allow(unsafe_code)] // Pointers into mappings shared with the guest have no safe form.

mod batch;
mod frame;
mod memory;
mod packed;
mod recover;
mod ring;
mod split;
#[cfg(test)]
mod tests;

pub use batch::{Batch, MAX_BURST};
pub use frame::Frame;
pub use ring::{BurstRing, BurstSetup, Out, Put, Space};

/// Which way the chains of a ring of bursts go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The driver fills, the device reads (a transmit queue).
    FromDriver,
    /// The driver gives room, the device fills (a receive queue).
    ToDriver,
}
