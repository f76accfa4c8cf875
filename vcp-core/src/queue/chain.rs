//! [`Chain`]: one request's descriptors, checked and mapped.

use vm_memory::GuestAddress;

use super::RingError;
use crate::mem::{GuestBuf, GuestMap};
use std::sync::Arc;

/// Most descriptors in a chain, indirect ones included. Linux and Windows drivers use at most 1024 + 2; the bound is
/// what keeps the work for one chain and the storage for its pieces bounded.
pub const MAX_CHAIN_DESCRIPTORS: usize = 1026;

/// Most bytes in a chain, both directions together: 64 MiB, far above what any driver sends in one request and low
/// enough that a queue full of them cannot exhaust the engine.
pub const MAX_CHAIN_BYTES: usize = 64 << 20;

/// Which chain of which queue, and which life of that queue it belongs to: a completion for an earlier life (another
/// connection, before a reset) is recognised and dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChainId {
    /// Index of the queue in its device.
    pub queue: u16,
    /// Index of the chain's first descriptor.
    pub head: u16,
    /// Life of the queue.
    pub epoch: u32,
}

/// A descriptor chain as two buffers: what the device may read and what it may write. Recycled between requests, so
/// that taking a chain does not allocate.
#[derive(Debug, Default)]
pub struct Chain {
    /// Whose it is; what [`Rings::complete`](crate::device::Rings::complete) wants back.
    pub id: ChainId,
    /// Device-readable bytes.
    pub readable: GuestBuf,
    /// Device-writable bytes.
    pub writable: GuestBuf,
    descriptors: usize,
    writing: bool,
}

impl Chain {
    /// An empty chain with storage for `pieces` pieces in each direction.
    #[must_use]
    pub fn with_capacity(pieces: usize) -> Self {
        Self {
            readable: GuestBuf::with_capacity(pieces),
            writable: GuestBuf::with_capacity(pieces),
            ..Self::default()
        }
    }

    /// Starts a new chain.
    pub(crate) fn begin(&mut self, head: u16) {
        self.id = ChainId { queue: 0, head, epoch: 0 };
        self.readable.clear();
        self.writable.clear();
        self.descriptors = 0;
        self.writing = false;
    }

    /// Appends a descriptor.
    pub(crate) fn push(
        &mut self,
        map: &Arc<GuestMap>,
        addr: u64,
        len_bytes: u32,
        writable: bool,
    ) -> Result<(), RingError> {
        self.descriptors += 1;
        if self.descriptors > MAX_CHAIN_DESCRIPTORS {
            return Err(RingError::ChainTooLong(MAX_CHAIN_DESCRIPTORS));
        }
        let so_far = self.readable.len_bytes() + self.writable.len_bytes();
        if so_far + len_bytes as usize > MAX_CHAIN_BYTES {
            return Err(RingError::ChainTooLarge);
        }
        if writable {
            self.writing = true;
            self.writable.push(map, GuestAddress(addr), len_bytes as usize)?;
        } else {
            if self.writing {
                return Err(RingError::ReadableAfterWritable);
            }
            self.readable.push(map, GuestAddress(addr), len_bytes as usize)?;
        }
        Ok(())
    }
}
