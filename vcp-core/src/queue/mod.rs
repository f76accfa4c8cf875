//! Virtqueues: taking descriptor chains from the driver, giving used elements back, and the notification protocol.
//!
//! [`VirtQueue`] is what the rest of the crate sees; [`SplitQueue`] is the split ring (VIRTIO 1.2, 2.7) on the
//! `virtio-queue` crate, [`PackedQueue`] the packed one (2.8). Everything the driver can write is read once, checked, then
//! used; what breaks a rule is a [`RingError`], after which the caller stops that queue only. [`log`] is the in-flight log,
//! which both kinds of ring write where the front end wants it. [`burst`] runs rings of either format in bursts, for devices
//! that have nothing in flight.

pub mod burst;
mod chain;
mod crash;
pub(crate) mod flight;
mod ledger;
pub mod log;
pub mod notify;
mod packed;
mod ring;
mod split;
#[cfg(test)]
pub(crate) mod tests;

pub use chain::{Chain, ChainId, MAX_CHAIN_BYTES, MAX_CHAIN_DESCRIPTORS};
pub use packed::{PackedQueue, PackedStart};
pub(crate) use ring::{Ring, StartAt};
pub use split::{SplitQueue, SplitStart, take_split, take_split_again};

use std::sync::Arc;

use crate::mem::{BufError, GuestMap};

/// How a driver broke the rules of its virtqueue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The ring itself (descriptor table, available or used ring) is not guest memory.
    #[error("ring memory at {0:#x} is not accessible")]
    RingMemory(u64),
    /// The available index is further ahead than the ring is long.
    #[error("available index jumped ahead by {ahead} in a ring of {size}")]
    AvailIndex {
        /// Distance from the next entry expected.
        ahead: u16,
        /// Ring size.
        size: u16,
    },
    /// A descriptor index outside the table.
    #[error("descriptor index {index} in a table of {size}")]
    DescriptorIndex {
        /// The index.
        index: u16,
        /// Entries in the table.
        size: u32,
    },
    /// A loop, or a chain longer than its table.
    #[error("descriptor chain longer than {0} entries")]
    ChainTooLong(usize),
    /// More bytes than [`MAX_CHAIN_BYTES`].
    #[error("descriptor chain of more than {MAX_CHAIN_BYTES} bytes")]
    ChainTooLarge,
    /// A device-readable descriptor after a device-writable one (2.7.4.2).
    #[error("readable descriptor after a writable one")]
    ReadableAfterWritable,
    /// INDIRECT inside an indirect table, together with NEXT, or not negotiated (2.7.5.3.1).
    #[error("indirect descriptor where none may be")]
    Indirect,
    /// An indirect table whose length is zero, no multiple of 16, or too large.
    #[error("indirect table of {0} bytes")]
    IndirectLength(u32),
    /// A descriptor that points outside guest memory.
    #[error("descriptor outside guest memory")]
    Buffer(#[from] BufError),
    /// A head that is in flight was made available again.
    #[error("descriptor {0} is in flight and was made available again")]
    InFlight(u16),
    /// `SET_VRING_BASE` with a position outside the ring, or with requests in flight that nobody knows.
    #[error("the ring cannot start at base {0:#x}")]
    Base(u32),
    /// The in-flight log cannot be used.
    #[error("in-flight log")]
    Log(#[source] log::LogError),
    /// The device model found the request's framing broken (no room for a header or a status).
    #[error("request framing: {0}")]
    Framing(&'static str),
}

/// Where a virtqueue lies, as guest physical addresses. The names are the split ring's; in a packed ring `avail` is the
/// driver's event suppression structure and `used` the device's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// Number of entries.
    pub size: u16,
    /// Descriptor table or ring.
    pub desc: u64,
    /// Driver area.
    pub avail: u64,
    /// Device area.
    pub used: u64,
}

/// One virtqueue from the device's side. Guest memory is passed to each call so that the front end can change it
/// between two of them.
pub trait VirtQueue {
    /// Takes the next available chain into `chain`; false if there is none.
    ///
    /// # Errors
    /// [`RingError`]: the driver broke a rule; the position in the ring is then undefined.
    fn take(&mut self, map: &Arc<GuestMap>, chain: &mut Chain) -> Result<bool, RingError>;

    /// Takes a chain again that was taken before and not given back, by its head.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    fn take_again(&mut self, map: &Arc<GuestMap>, head: u16, chain: &mut Chain) -> Result<(), RingError>;

    /// Writes a used element. The driver sees it with the next [`publish`](Self::publish).
    ///
    /// # Errors
    /// [`RingError::RingMemory`].
    fn put_used(&mut self, map: &GuestMap, head: u16, len_bytes: u32) -> Result<(), RingError>;

    /// Makes all used elements since the last call visible; true if the driver wants to be notified.
    ///
    /// # Errors
    /// [`RingError::RingMemory`].
    fn publish(&mut self, map: &GuestMap) -> Result<bool, RingError>;

    /// Asks the driver to notify of new chains, then looks once more; true if there is something to take already.
    ///
    /// # Errors
    /// [`RingError::RingMemory`].
    fn arm(&mut self, map: &GuestMap) -> Result<bool, RingError>;

    /// Tells the driver that notifications are not needed for now.
    ///
    /// # Errors
    /// [`RingError::RingMemory`].
    fn disarm(&mut self, map: &GuestMap) -> Result<(), RingError>;

    /// See [`Rings::available`](crate::device::Rings::available).
    fn available(&self, _map: &GuestMap) -> u16 {
        0
    }

    /// The ring state that `GET_VRING_BASE` reports: of a split ring the next available index, of a packed one both
    /// positions with their wrap counters (the next descriptor in the lower half, the next used element in the upper).
    fn base(&self) -> u32;
}
