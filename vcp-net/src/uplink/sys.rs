//! The system calls of uplinks that have no safe wrapper: `ioctl` of TAP devices, options of packet sockets.
#![allow(unsafe_code)] // `ioctl` and `setsockopt` take pointers to structures that the kernel defines.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::frame::vnet::HEADER_BYTES;

/// `TUN_F_*` (linux/if_tun.h).
const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An interface request with this name.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all-zero is a valid `ifreq`: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.bytes().any(|b| b == 0 || b == b'/') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the name of a network interface"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// Makes `tun` (an open `/dev/net/tun`) the TAP device `name`, with headers; creates the device if it is not there and
/// this process may.
pub(super) fn attach_tap(tun: &File, name: &str) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request is an `ifreq`, as TUNSETIFF wants it, and lives through the call.
    checked(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let header = HEADER_BYTES as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads an int.
    checked(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })
}

/// Tells a TAP device what its frames may leave to us; returns whether UDP segmentation is part of it.
pub(super) fn set_tap_offloads(tun: &File) -> io::Result<bool> {
    let tcp = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
    let set = |bits: u32| {
        // SAFETY: TUNSETOFFLOAD takes its bits by value.
        checked(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
    };
    if set(tcp | TUN_F_USO4 | TUN_F_USO6).is_ok() {
        return Ok(true);
    }
    // Kernels before 6.2.
    set(tcp).map(|()| false)
}

/// The MTU of an interface.
pub(super) fn mtu(socket: impl AsFd, name: &str) -> io::Result<usize> {
    let mut request = request(name)?;
    // SAFETY: the request is an `ifreq`, as SIOCGIFMTU wants it, and lives through the call.
    checked(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) })?;
    // SAFETY: SIOCGIFMTU has filled in this member.
    Ok(usize::try_from(unsafe { request.ifr_ifru.ifru_mtu }).unwrap_or(0))
}
