//! The system calls of the user-mode stack that have no safe wrapper: options of sockets.
#![allow(unsafe_code)] // `setsockopt` and `getsockopt` take pointers to values that the kernel defines.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};

fn set(socket: impl AsFd, level: i32, name: i32, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the value is an int that lives through the call, and its length is said.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Where the next `MSG_PEEK` begins (socket(7); TCP since Linux 6.9).
pub(super) fn set_peek_offset(socket: impl AsFd, offset: u32) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset as libc::c_int)
}

/// Rows of datagrams are received as one (udp(7)).
pub(super) fn set_udp_gro(socket: impl AsFd) -> io::Result<()> {
    set(socket, libc::SOL_UDP, libc::UDP_GRO, 1)
}

/// What has no room in the socket is counted (socket(7)).
pub(super) fn set_count_overflow(socket: impl AsFd) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1)
}

/// Errors are kept with the datagram that they are about (ip(7)).
pub(super) fn set_recv_errors(socket: impl AsFd, v6: bool) -> io::Result<()> {
    let (level, name) =
        if v6 { (libc::SOL_IPV6, libc::IPV6_RECVERR) } else { (libc::SOL_IP, libc::IP_RECVERR) };
    set(socket, level, name, 1)
}

/// What a TCP socket can still take: bytes between what is queued and the size of its buffer (socket(7), `SO_MEMINFO`).
pub(super) fn send_room(socket: impl AsFd) -> io::Result<u32> {
    // linux/sock_diag.h: SK_MEMINFO_SNDBUF, SK_MEMINFO_WMEM_QUEUED.
    const SNDBUF: usize = 3;
    const WMEM_QUEUED: usize = 5;
    let mut info = [0u32; 9];
    let mut len = size_of::<[u32; 9]>() as libc::socklen_t;
    // SAFETY: the array is as long as is said, and lives through the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(info[SNDBUF].saturating_sub(info[WMEM_QUEUED]))
    }
}
