//! [`SendBatch`]: bytes on their way out, with all that they lie in. Unlike a [`Gather`](crate::sock::Gather), which borrows for
//! one call, it owns what it points to, for the ring may still work on it when the caller is elsewhere.

use std::sync::Arc;

use crate::mem::{GuestBuf, GuestMap};
use crate::sock::{IOV_MAX, Taken};

#[derive(Clone, Copy, Debug)]
enum Piece {
    /// Of the arena.
    Private { at: usize, len_bytes: usize },
    /// Guest memory of one of `maps`.
    Guest { ptr: *mut u8, len_bytes: usize },
}

/// Pieces to be sent in order by one operation. The batch owns the private bytes and keeps guest memory mapped.
#[derive(Debug)]
pub struct SendBatch {
    arena: Vec<u8>,
    pieces: Vec<Piece>,
    maps: Vec<Arc<GuestMap>>,
    iov: Vec<libc::iovec>,
    message: libc::msghdr,
    len_bytes: usize,
}

impl Default for SendBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl SendBatch {
    /// An empty batch with storage for the most pieces that one operation takes.
    #[must_use]
    pub fn new() -> Self {
        // SAFETY: all-zero is a valid `msghdr`: no name, no vector, no control data.
        let message = unsafe { std::mem::zeroed() };
        Self {
            arena: Vec::new(),
            pieces: Vec::with_capacity(IOV_MAX),
            maps: Vec::with_capacity(4),
            iov: Vec::with_capacity(IOV_MAX),
            message,
            len_bytes: 0,
        }
    }

    /// Starts over, with the private bytes that [`push_private`](Self::push_private) names.
    pub fn begin(&mut self, arena: Vec<u8>) {
        self.clear();
        self.arena = arena;
    }

    /// The private bytes back.
    pub fn take_arena(&mut self) -> Vec<u8> {
        self.clear();
        std::mem::take(&mut self.arena)
    }

    fn clear(&mut self) {
        self.pieces.clear();
        self.maps.clear();
        self.iov.clear();
        self.len_bytes = 0;
    }

    /// Bytes in the batch.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Whether nothing was pushed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// Appends bytes of the arena; returns how many were taken: all, or 0 when there are too many pieces.
    ///
    /// # Panics
    /// If they are not in the arena.
    pub fn push_private(&mut self, at: usize, len_bytes: usize) -> usize {
        assert!(at.checked_add(len_bytes).is_some_and(|end| end <= self.arena.len()), "not in the arena");
        self.push(Piece::Private { at, len_bytes }, len_bytes)
    }

    /// Appends a copy of `bytes`; returns how many were taken: all, or 0 when there are too many pieces.
    pub fn push_copy(&mut self, bytes: &[u8]) -> usize {
        let at = self.arena.len();
        let taken = self.push(Piece::Private { at, len_bytes: bytes.len() }, bytes.len());
        self.arena.extend_from_slice(&bytes[..taken]);
        taken
    }

    /// Appends `len_bytes` bytes of `data` from `offset`; returns how many were taken, fewer when there are too many pieces.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn push_guest(&mut self, data: &GuestBuf, offset: usize, len_bytes: usize) -> usize {
        if let Some(map) = data.map()
            && !self.maps.last().is_some_and(|last| Arc::ptr_eq(last, map))
        {
            self.maps.push(Arc::clone(map));
        }
        let mut taken = Taken::default();
        data.for_each(offset, len_bytes, |ptr, len_bytes, _| {
            taken.part(len_bytes, || self.push(Piece::Guest { ptr, len_bytes }, len_bytes));
        });
        taken.bytes
    }

    fn push(&mut self, piece: Piece, len_bytes: usize) -> usize {
        if len_bytes == 0 || self.pieces.len() >= IOV_MAX {
            return 0;
        }
        self.pieces.push(piece);
        self.len_bytes += len_bytes;
        len_bytes
    }

    /// The message for the kernel. It and what it points to stay where they are as long as the batch, in its box, is not
    /// changed.
    pub(super) fn header(&mut self) -> *const libc::msghdr {
        self.iov.clear();
        let arena = self.arena.as_mut_ptr();
        self.iov.extend(self.pieces.iter().map(|piece| match *piece {
            Piece::Private { at, len_bytes } => {
                libc::iovec { iov_base: arena.wrapping_add(at).cast(), iov_len: len_bytes }
            }
            Piece::Guest { ptr, len_bytes } => libc::iovec { iov_base: ptr.cast(), iov_len: len_bytes },
        }));
        self.message.msg_iov = self.iov.as_mut_ptr();
        self.message.msg_iovlen = self.iov.len() as _;
        &raw const self.message
    }
}

// SAFETY: the pointers go to memory that the batch owns or keeps mapped, none of it bound to a thread.
unsafe impl Send for SendBatch {}
// SAFETY: a shared batch gives no access to what they point to.
unsafe impl Sync for SendBatch {}
