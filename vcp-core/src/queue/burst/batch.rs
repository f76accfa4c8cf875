//! [`Batch`]: chains taken from a ring together.

use std::sync::Arc;

use super::frame::{Frame, Seg};
use super::memory::Memory;
use crate::mem::GuestMap;
use crate::queue::{MAX_CHAIN_BYTES, MAX_CHAIN_DESCRIPTORS, RingError};

/// Most chains in a batch.
pub const MAX_BURST: usize = 64;

/// Pieces there is storage for: a batch ends early when the longest chain would not fit any more.
const PIECES: usize = 4 * MAX_CHAIN_DESCRIPTORS;

/// One chain.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChainAt {
    /// First piece.
    pub(super) first: u32,
    /// Pieces.
    pub(super) pieces: u32,
    pub(super) len_bytes: u32,
    /// Split: index of the first descriptor. Packed: buffer ID.
    pub(super) id: u16,
    /// Packed: slots in the ring.
    pub(super) slots: u16,
}

/// Chains taken from a ring together, in their order. Its storage is taken once; it keeps the mapping alive that its
/// frames lie in.
#[derive(Debug)]
pub struct Batch {
    chains: Vec<ChainAt>,
    segs: Vec<Seg>,
    map: Option<Arc<GuestMap>>,
}

// SAFETY: the pieces lead into the mapping that `map` keeps, not to anything bound to a thread.
unsafe impl Send for Batch {}

impl Default for Batch {
    fn default() -> Self {
        Self { chains: Vec::with_capacity(MAX_BURST), segs: Vec::with_capacity(PIECES), map: None }
    }
}

impl Batch {
    /// Number of chains.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.chains.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// The bytes of chain `index`; none if there is no such chain.
    #[inline]
    #[must_use]
    pub fn frame(&self, index: usize) -> Frame<'_> {
        let Some(chain) = self.chains.get(index) else { return Frame::of(&[]) };
        let first = chain.first as usize;
        // The pieces live as long as `self`, which keeps the mapping.
        let segs = self.segs.get(first..first + chain.pieces as usize).unwrap_or(&[]);
        Frame::of_segs(segs, chain.len_bytes as usize)
    }

    /// Forgets all but the first `len` chains.
    pub fn truncate(&mut self, len: usize) {
        self.chains.truncate(len);
    }

    /// Forgets all chains. The mapping stays until another one takes its place.
    pub fn clear(&mut self) {
        self.chains.clear();
        self.segs.clear();
    }

    /// Bytes that it has storage for.
    #[must_use]
    pub fn memory_bound_bytes() -> u64 {
        (MAX_BURST * size_of::<ChainAt>() + PIECES * size_of::<Seg>()) as u64
    }

    pub(super) fn begin(&mut self, memory: &Memory) {
        self.clear();
        match &self.map {
            Some(map) if Arc::ptr_eq(map, memory.map()) => {}
            _ => self.map = Some(Arc::clone(memory.map())),
        }
    }

    /// Lets go of the mapping.
    pub fn release(&mut self) {
        self.clear();
        self.map = None;
    }

    /// Whether another chain of any length fits.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        self.chains.len() < MAX_BURST && self.segs.len() + MAX_CHAIN_DESCRIPTORS <= PIECES
    }

    #[inline]
    pub(super) fn chain(&self, index: usize) -> Option<&ChainAt> {
        self.chains.get(index)
    }

    #[inline]
    pub(super) fn segs(&self, chain: &ChainAt) -> &[Seg] {
        let first = chain.first as usize;
        self.segs.get(first..first + chain.pieces as usize).unwrap_or(&[])
    }
}

/// A chain that is being read.
#[derive(Debug)]
pub(super) struct Reading<'a> {
    batch: &'a mut Batch,
    memory: &'a Memory,
    /// Whether its descriptors are to be device-writable.
    writable: bool,
    first: usize,
    len_bytes: usize,
    descriptors: usize,
}

impl<'a> Reading<'a> {
    #[inline]
    pub(super) fn new(batch: &'a mut Batch, memory: &'a Memory, writable: bool) -> Self {
        let first = batch.segs.len();
        Self { batch, memory, writable, first, len_bytes: 0, descriptors: 0 }
    }

    /// Appends a descriptor.
    #[inline]
    pub(super) fn push(&mut self, addr: u64, len_bytes: u32, writable: bool) -> Result<(), RingError> {
        if writable != self.writable {
            return Err(RingError::Framing(if writable {
                "a writable descriptor in a transmit queue"
            } else {
                "a readable descriptor in a receive queue"
            }));
        }
        self.descriptors += 1;
        if self.descriptors > MAX_CHAIN_DESCRIPTORS {
            return Err(RingError::ChainTooLong(MAX_CHAIN_DESCRIPTORS));
        }
        self.len_bytes += len_bytes as usize;
        if self.len_bytes > MAX_CHAIN_BYTES {
            return Err(RingError::ChainTooLarge);
        }
        if len_bytes == 0 {
            return Ok(());
        }
        self.memory.pieces(addr, len_bytes, &mut self.batch.segs)
    }

    /// The chain is whole.
    #[inline]
    pub(super) fn finish(self, id: u16, slots: u16) {
        let Self { batch, first, len_bytes, .. } = self;
        let pieces = (batch.segs.len() - first) as u32;
        let (first, len_bytes) = (first as u32, len_bytes as u32);
        batch.chains.push(ChainAt { first, pieces, len_bytes, id, slots });
    }
}
