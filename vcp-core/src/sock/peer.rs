//! Who is at the other end of a Unix socket.
#![allow(unsafe_code)] // The safe wrapper does not take what the kernel tells of other process namespaces.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

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
