//! The system calls of uplinks that have no safe wrapper: `ioctl` of TAP devices, options of packet sockets.
#![allow(unsafe_code)] // `ioctl` and `setsockopt` take pointers to structures that the kernel defines.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

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

/// A packet socket on interface `name`, in promiscuous mode, that does not see what it sent itself; frames have headers
/// ([`SHORT_HEADER_BYTES`](crate::frame::vnet::SHORT_HEADER_BYTES) long) in front.
pub(super) fn open_packet(name: &str) -> io::Result<OwnedFd> {
    let all = (libc::ETH_P_ALL as u16).to_be();
    // No protocol yet: nothing of other interfaces is to arrive before the socket is bound.
    let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::socket(libc::AF_PACKET, flags, 0) };
    checked(fd)?;
    // SAFETY: the descriptor is new and ours.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut named = request(name)?;
    // SAFETY: SIOCGIFINDEX takes an `ifreq`, which lives through the call.
    checked(unsafe { libc::ioctl(fd, libc::SIOCGIFINDEX, &raw mut named) })?;
    // SAFETY: SIOCGIFINDEX has filled in this member.
    let index = unsafe { named.ifr_ifru.ifru_ifindex };
    let on: libc::c_int = 1;
    for option in [libc::PACKET_VNET_HDR, libc::PACKET_IGNORE_OUTGOING, libc::PACKET_AUXDATA] {
        set_option(&socket, option, &on)?;
    }
    // SAFETY: all-zero is a valid `packet_mreq`.
    let mut membership: libc::packet_mreq = unsafe { std::mem::zeroed() };
    (membership.mr_ifindex, membership.mr_type) = (index, libc::PACKET_MR_PROMISC as libc::c_ushort);
    set_option(&socket, libc::PACKET_ADD_MEMBERSHIP, &membership)?;
    // SAFETY: all-zero is a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as libc::c_ushort;
    (address.sll_protocol, address.sll_ifindex) = (all, index);
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is a `sockaddr_ll` of that length.
    checked(unsafe { libc::bind(fd, (&raw const address).cast(), len) })?;
    Ok(socket)
}

fn set_option<T>(socket: &OwnedFd, option: libc::c_int, value: &T) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of a value of the type that the option has.
    checked(unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, std::ptr::from_ref(value).cast(), len)
    })
}

/// Receives one frame with its header into `buffer`; returns its length, and the VLAN tag that the kernel had taken out.
/// A frame that is longer than the buffer is an error.
pub(super) fn receive_packet(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<(usize, Option<u16>)> {
    #[repr(C, align(8))]
    struct Room([u8; 64]);
    let mut room = Room([0; 64]);
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all-zero is a valid `msghdr`.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut iov, 1);
    (message.msg_control, message.msg_controllen) = (room.0.as_mut_ptr().cast(), room.0.len() as _);
    // SAFETY: vector and control data point to memory that is held exclusively and lives through the call.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let Ok(len) = usize::try_from(got) else { return Err(io::Error::last_os_error()) };
    if message.msg_flags & libc::MSG_TRUNC != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame that is longer than any"));
    }
    // SAFETY: the kernel has filled in control data and its length, and the macros stay inside of them.
    let tag = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let is_ours = !header.is_null()
            && (*header).cmsg_level == libc::SOL_PACKET
            && (*header).cmsg_type == libc::PACKET_AUXDATA
            && (*header).cmsg_len as usize
                >= libc::CMSG_LEN(size_of::<libc::tpacket_auxdata>() as u32) as usize;
        is_ours.then(|| libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned())
    };
    let tag = tag.filter(|aux| aux.tp_status & libc::TP_STATUS_VLAN_VALID != 0).map(|aux| aux.tp_vlan_tci);
    Ok((len, tag))
}
