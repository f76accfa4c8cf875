//! [`Gather`] and [`Scatter`]: one `sendmsg`/`recvmsg` over a mix of private bytes and guest memory.
//!
//! They borrow everything they point to until they are used up, so that safe code in other crates can move data
//! between a socket and guest memory without a copy. They never block: a call that cannot proceed gives
//! [`ErrorKind::WouldBlock`](std::io::ErrorKind::WouldBlock).
#![allow(unsafe_code)] // I/O vectors over memory shared with the guest have no safe form.

mod datagram;

pub use datagram::{Datagram, Unreachable, discard};

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::mem::GuestBuf;
use crate::queue::burst::{Frame, Space};

/// Most entries the kernel takes in one call (`IOV_MAX` of Linux).
pub const IOV_MAX: usize = 1024;

/// Reusable storage for the I/O vector of a [`Gather`] or [`Scatter`]; keeps its capacity from call to call.
#[derive(Debug, Default)]
pub struct IovStorage(Vec<libc::iovec>);

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
    iov: &'a mut Vec<libc::iovec>,
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
        let mut taken = 0;
        let mut full = false;
        frame.for_each(offset, len_bytes, |ptr, len| {
            // Once a piece was refused, later ones must not follow it.
            let pushed = if full { 0 } else { push(self.iov, &mut self.len_bytes, ptr.cast_mut(), len) };
            full |= pushed != len;
            taken += pushed;
        });
        taken
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
        loop {
            // SAFETY: each entry of the vector points to memory borrowed for `'a` (private bytes, or guest memory
            // whose mapping a borrowed `GuestBuf` keeps); the kernel only reads from it.
            let sent = unsafe {
                libc::sendmsg(
                    socket.as_fd().as_raw_fd(),
                    &raw const message,
                    libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
                )
            };
            if let Some(result) = outcome(sent) {
                return result;
            }
        }
    }
}

impl Gather<'_> {
    /// Writes all of it with one `writev`, as a character device wants one frame; returns how many bytes it took.
    ///
    /// # Errors
    /// What `writev` reports; `WouldBlock` if the descriptor does not block and has no room.
    pub fn write(self, fd: impl AsFd) -> io::Result<usize> {
        loop {
            // SAFETY: each entry of the vector points to memory that is borrowed for the life of this value; the kernel
            // only reads from it.
            let written = unsafe {
                libc::writev(fd.as_fd().as_raw_fd(), self.iov.as_ptr(), self.iov.len() as libc::c_int)
            };
            if let Some(result) = outcome(written) {
                return result;
            }
        }
    }
}

/// Builds and receives one message: pieces are filled in the order of the pushes.
#[derive(Debug)]
pub struct Scatter<'a> {
    iov: &'a mut Vec<libc::iovec>,
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
        let mut taken = 0;
        let mut full = false;
        space.for_each(offset, len_bytes, |ptr, len| {
            let pushed = if full { 0 } else { push(self.iov, &mut self.len_bytes, ptr, len) };
            full |= pushed != len;
            taken += pushed;
        });
        taken
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
        if self.len_bytes == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "receive without room"));
        }
        let mut message = header(self.iov);
        loop {
            // SAFETY: each entry of the vector points to memory borrowed for `'a`: private bytes exclusively, or
            // guest memory that other parties may write at any time and that nothing references.
            let got =
                unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
            if let Some(result) = outcome(got) {
                return result;
            }
        }
    }
}

fn push(iov: &mut Vec<libc::iovec>, total: &mut usize, ptr: *mut u8, len_bytes: usize) -> usize {
    if len_bytes == 0 || iov.len() >= IOV_MAX {
        return 0;
    }
    iov.push(libc::iovec { iov_base: ptr.cast(), iov_len: len_bytes });
    *total += len_bytes;
    len_bytes
}

fn push_guest(
    iov: &mut Vec<libc::iovec>,
    total: &mut usize,
    data: &GuestBuf,
    offset: usize,
    len_bytes: usize,
) -> usize {
    let mut taken = 0;
    data.for_each(offset, len_bytes, |ptr, len, at| {
        // Once a piece was refused, later ones must not follow it.
        if at == taken {
            taken += push(iov, total, ptr, len);
        }
    });
    taken
}

fn header(iov: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all-zero is a valid `msghdr`: no name, no vector, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov.as_mut_ptr();
    message.msg_iovlen = iov.len() as _;
    message
}

/// The result of a call, or `None` to repeat it (a signal came first).
fn outcome(returned: isize) -> Option<io::Result<usize>> {
    match usize::try_from(returned) {
        Ok(len) => Some(Ok(len)),
        Err(_) => {
            let error = io::Error::last_os_error();
            (error.kind() != io::ErrorKind::Interrupted).then_some(Err(error))
        }
    }
}

/// The user of the process at the other end of a Unix socket, as it was when it connected, and as this process's user
/// namespace knows it. (The process number that the kernel tells beside it is 0 where the peer is not in this process's
/// namespace, which the safe wrapper does not take.)
///
/// # Errors
/// It is no connected Unix socket.
pub(crate) fn peer_uid(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `peer` is a structure of `len` bytes that the kernel may fill with any integers.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    match result {
        0 => Ok(peer.uid),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn pieces_travel_in_order_and_split_where_pushed() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut storage = IovStorage::new();
        let data = GuestBuf::for_test_pieces(&[3, 5, 8]);
        data.copy_from(0, b"abcdefghijklmnop");
        let mut gather = Gather::new(&mut storage);
        assert_eq!(gather.push_bytes(b"<"), 1);
        assert_eq!(gather.push_guest(&data, 1, 9), 9);
        assert_eq!(gather.push_bytes(b">"), 1);
        assert_eq!(gather.send(&a).unwrap(), 11);

        let into = GuestBuf::for_test_pieces(&[2, 7]);
        let (mut head, mut tail) = ([0; 1], [0; 8]);
        let mut scatter = Scatter::new(&mut storage);
        scatter.push_bytes_mut(&mut head);
        scatter.push_guest(&into, 0, 9);
        scatter.push_bytes_mut(&mut tail);
        assert_eq!(scatter.recv(&b).unwrap(), 11);
        let mut middle = [0; 9];
        into.copy_to(0, &mut middle);
        assert_eq!((&head, &middle, tail[0]), (b"<", b"bcdefghij", b'>'));
    }

    #[test]
    fn an_empty_socket_would_block_and_a_closed_one_is_zero() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut storage = IovStorage::new();
        let mut byte = [0; 1];
        let mut scatter = Scatter::new(&mut storage);
        scatter.push_bytes_mut(&mut byte);
        assert_eq!(scatter.recv(&b).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(a);
        let mut scatter = Scatter::new(&mut storage);
        scatter.push_bytes_mut(&mut byte);
        assert_eq!(scatter.recv(&b).unwrap(), 0);
        assert_eq!(Scatter::new(&mut storage).recv(&b).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let mut gather = Gather::new(&mut storage);
        gather.push_bytes(b"x");
        assert_eq!(gather.send(&b).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_full_vector_takes_no_more_and_says_so() {
        let mut storage = IovStorage::new();
        let data = GuestBuf::for_test_pieces(&vec![1; IOV_MAX + 10]);
        let mut gather = Gather::new(&mut storage);
        assert_eq!(gather.push_bytes(b"h"), 1);
        assert_eq!(gather.push_guest(&data, 0, data.len_bytes()), IOV_MAX - 1);
        assert!(gather.is_full());
        assert_eq!(gather.push_bytes(b"t"), 0);
        assert_eq!(gather.len_bytes(), IOV_MAX);
    }
}
