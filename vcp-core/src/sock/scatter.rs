//! [`Scatter`]: room for a message that comes in.
#![allow(unsafe_code)] // I/O vectors over memory shared with the guest have no safe form.

use std::io;
use std::marker::PhantomData;
use std::os::fd::AsFd;

use super::iov::{IOV_MAX, IovStorage, Taken, header, push, push_guest, receive};
use crate::mem::GuestBuf;
use crate::queue::burst::Space;

/// Builds and receives one message: pieces are filled in the order of the pushes.
#[derive(Debug)]
pub struct Scatter<'a> {
    pub(super) iov: &'a mut Vec<libc::iovec>,
    len_bytes: usize,
    /// Private bytes are written to, so they are held exclusively.
    exclusive: PhantomData<&'a mut [u8]>,
}

impl<'a> Scatter<'a> {
    /// An empty message in `storage`.
    pub fn new(storage: &'a mut IovStorage) -> Self {
        storage.0.clear();
        Self { iov: &mut storage.0, len_bytes: 0, exclusive: PhantomData }
    }

    /// Appends private bytes to be filled; returns how many were taken: all, or 0 when the vector is full.
    pub fn push_bytes_mut(&mut self, bytes: &'a mut [u8]) -> usize {
        push(self.iov, &mut self.len_bytes, bytes.as_mut_ptr(), bytes.len())
    }

    /// Appends `len_bytes` bytes of `data` from `offset` to be filled; returns how many were taken, fewer when the
    /// vector filled up.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn push_guest(&mut self, data: &'a GuestBuf, offset: usize, len_bytes: usize) -> usize {
        push_guest(self.iov, &mut self.len_bytes, data, offset, len_bytes)
    }

    /// Appends room for `len_bytes` bytes in a ring's chains from `offset` on; returns how much was taken, less when the
    /// vector filled up or the room ends before.
    pub fn push_space(&mut self, space: &Space<'a>, offset: usize, len_bytes: usize) -> usize {
        let mut taken = Taken::default();
        space.for_each(offset, len_bytes, |ptr, len| {
            taken.part(len, || push(self.iov, &mut self.len_bytes, ptr, len));
        });
        taken.bytes
    }

    /// Bytes of room in the message so far.
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

    /// Receives without blocking; returns how many bytes were filled, 0 when the peer closed its side.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there, `InvalidInput` for a message without room (which could not be told from a
    /// close), what `recvmsg` reports otherwise.
    pub fn recv(self, socket: impl AsFd) -> io::Result<usize> {
        self.receive(socket, 0)
    }

    /// As [`recv`](Self::recv), but what is read stays in the socket. Where the socket has a peek offset (`SO_PEEK_OFF`),
    /// the kernel reads from there and moves it on.
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    pub fn peek(self, socket: impl AsFd) -> io::Result<usize> {
        self.receive(socket, libc::MSG_PEEK)
    }

    fn receive(self, socket: impl AsFd, flags: libc::c_int) -> io::Result<usize> {
        if self.len_bytes == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "receive without room"));
        }
        let mut message = header(self.iov);
        // SAFETY: each entry of the vector points to memory borrowed for `'a`: private bytes exclusively, or guest memory
        // that other parties may write at any time and that nothing references.
        unsafe { receive(socket, &mut message, flags) }
    }
}
