//! The I/O vector of a message, and the calls that send and receive one.
#![allow(unsafe_code)] // I/O vectors over memory shared with the guest have no safe form.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::mem::GuestBuf;

/// Most entries the kernel takes in one call (`IOV_MAX` of Linux).
pub const IOV_MAX: usize = 1024;

/// Reusable storage for the I/O vector of a [`Gather`](super::Gather) or [`Scatter`](super::Scatter); keeps its capacity from call to call.
#[derive(Debug, Default)]
pub struct IovStorage(pub(super) Vec<libc::iovec>);

// SAFETY: between two uses the storage is dead memory: `Gather` and `Scatter` clear it before they push and nothing
// else reads it. While one of them borrows it, it carries the lifetime of what the entries point to.
unsafe impl Send for IovStorage {}
// SAFETY: as above; a shared reference gives no access to the entries.
unsafe impl Sync for IovStorage {}

impl IovStorage {
    /// Storage for [`IOV_MAX`] entries, allocated now.
    #[must_use]
    pub fn new() -> Self {
        Self(Vec::with_capacity(IOV_MAX))
    }
}

/// Bytes that a vector took of parts that belong together: none is taken behind one that was refused.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pub(crate) bytes: usize,
    refused: bool,
}

impl Taken {
    /// Offers the next part of `len_bytes` bytes; `push` returns how many were taken, all or none.
    pub(crate) fn part(&mut self, len_bytes: usize, push: impl FnOnce() -> usize) {
        if !self.refused {
            let taken = push();
            self.refused = taken != len_bytes;
            self.bytes += taken;
        }
    }
}

/// Appends a piece; returns how many bytes were taken: all, or 0 when the vector is full.
pub(super) fn push(iov: &mut Vec<libc::iovec>, total: &mut usize, ptr: *mut u8, len_bytes: usize) -> usize {
    if len_bytes == 0 || iov.len() >= IOV_MAX {
        return 0;
    }
    iov.push(libc::iovec { iov_base: ptr.cast(), iov_len: len_bytes });
    *total += len_bytes;
    len_bytes
}

/// Appends a range of guest memory; returns how many bytes were taken.
pub(super) fn push_guest(
    iov: &mut Vec<libc::iovec>,
    total: &mut usize,
    data: &GuestBuf,
    offset: usize,
    len_bytes: usize,
) -> usize {
    let mut taken = Taken::default();
    data.for_each(offset, len_bytes, |ptr, len, _| taken.part(len, || push(iov, total, ptr, len)));
    taken.bytes
}

/// A message with this vector, without name and control data.
pub(super) fn header(iov: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all-zero is a valid `msghdr`: no name, no vector, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov.as_mut_ptr();
    message.msg_iovlen = iov.len() as _;
    message
}

/// Sends a message without blocking; returns how many bytes the kernel took.
///
/// # Safety
/// All that the message points to is valid for reading for the length that the message says.
pub(super) unsafe fn send(socket: impl AsFd, message: &libc::msghdr) -> io::Result<usize> {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    repeat(|| {
        // SAFETY: as the caller says; the kernel only reads.
        unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const *message, flags) }
    })
}

/// Receives a message without blocking; returns how many bytes were filled.
///
/// # Safety
/// All that the message points to is valid for writing for the length that the message says: private memory exclusively,
/// memory shared with others without a reference to it.
pub(super) unsafe fn receive(
    socket: impl AsFd,
    message: &mut libc::msghdr,
    flags: libc::c_int,
) -> io::Result<usize> {
    let name_and_control = (message.msg_namelen, message.msg_controllen);
    repeat(|| {
        (message.msg_namelen, message.msg_controllen) = name_and_control;
        // SAFETY: as the caller says.
        unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut *message, libc::MSG_DONTWAIT | flags) }
    })
}

/// Calls until no signal comes first.
pub(super) fn repeat(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(len) = usize::try_from(call()) {
            return Ok(len);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
