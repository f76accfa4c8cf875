//! [`Gather`]: a message on its way out.
#![allow(unsafe_code)] // I/O vectors over memory shared with the guest have no safe form.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::iov::{IOV_MAX, IovStorage, Taken, header, push, push_guest, repeat, send};
use crate::mem::GuestBuf;
use crate::queue::burst::Frame;

/// Builds and sends one message: pieces are sent in the order of the pushes.
///
/// ```
/// use vcp_core::mem::GuestBuf;
/// use vcp_core::sock::{Gather, IovStorage, Scatter};
///
/// let (a, b) = std::os::unix::net::UnixStream::pair()?;
/// let mut storage = IovStorage::new();
/// let data = GuestBuf::for_test(4);
/// data.copy_from(0, b"data");
/// let mut gather = Gather::new(&mut storage);
/// gather.push_bytes(b"head");
/// gather.push_guest(&data, 0, 4);
/// assert_eq!(gather.send(&a)?, 8);
///
/// let into = GuestBuf::for_test(4);
/// let mut head = [0; 4];
/// let mut scatter = Scatter::new(&mut storage);
/// scatter.push_bytes_mut(&mut head);
/// scatter.push_guest(&into, 0, 4);
/// assert_eq!(scatter.recv(&b)?, 8);
/// assert_eq!(&head, b"head");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Gather<'a> {
    pub(super) iov: &'a mut Vec<libc::iovec>,
    len_bytes: usize,
}

impl<'a> Gather<'a> {
    /// An empty message in `storage`.
    pub fn new(storage: &'a mut IovStorage) -> Self {
        storage.0.clear();
        Self { iov: &mut storage.0, len_bytes: 0 }
    }

    /// Appends private bytes; returns how many were taken: all, or 0 when the vector is full.
    pub fn push_bytes(&mut self, bytes: &'a [u8]) -> usize {
        push(self.iov, &mut self.len_bytes, bytes.as_ptr().cast_mut(), bytes.len())
    }

    /// Appends `len_bytes` bytes of `data` from `offset`; returns how many were taken, fewer when the vector filled up.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn push_guest(&mut self, data: &'a GuestBuf, offset: usize, len_bytes: usize) -> usize {
        push_guest(self.iov, &mut self.len_bytes, data, offset, len_bytes)
    }

    /// Appends `len_bytes` bytes of a frame from `offset` on; returns how many were taken, fewer when the vector filled up or
    /// the frame ends before.
    pub fn push_frame(&mut self, frame: &Frame<'a>, offset: usize, len_bytes: usize) -> usize {
        let mut taken = Taken::default();
        frame.for_each(offset, len_bytes, |ptr, len| {
            taken.part(len, || push(self.iov, &mut self.len_bytes, ptr.cast_mut(), len));
        });
        taken.bytes
    }

    /// Bytes in the message so far.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Whether nothing was pushed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// Whether no further piece fits.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.iov.len() >= IOV_MAX
    }

    /// Sends without blocking; returns how many bytes the kernel took, which may be fewer than pushed. An empty
    /// message is 0 bytes without a call.
    ///
    /// # Errors
    /// `WouldBlock` when the socket buffer is full; what `sendmsg` reports otherwise (`BrokenPipe` instead of a
    /// signal).
    pub fn send(self, socket: impl AsFd) -> io::Result<usize> {
        if self.len_bytes == 0 {
            return Ok(0);
        }
        let message = header(self.iov);
        // SAFETY: each entry of the vector points to memory borrowed for `'a`: private bytes, or guest memory whose mapping a
        // borrowed `GuestBuf` keeps.
        unsafe { send(socket, &message) }
    }
}

impl Gather<'_> {
    /// Writes all of it with one `writev`, as a character device wants one frame; returns how many bytes it took.
    ///
    /// # Errors
    /// What `writev` reports; `WouldBlock` if the descriptor does not block and has no room.
    pub fn write(self, fd: impl AsFd) -> io::Result<usize> {
        repeat(|| {
            // SAFETY: each entry of the vector points to memory that is borrowed for the life of this value; the kernel
            // only reads from it.
            unsafe { libc::writev(fd.as_fd().as_raw_fd(), self.iov.as_ptr(), self.iov.len() as libc::c_int) }
        })
    }
}
