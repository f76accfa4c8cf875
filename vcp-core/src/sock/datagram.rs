//! Messages with more to them than bytes: where a datagram comes from or goes to, rows of datagrams (UDP GSO and GRO), a
//! look at what stays in the socket, errors that ICMP brought.
#![allow(unsafe_code)] // Addresses and control data of messages have no safe form beside I/O vectors of guest memory.

use std::io;
use std::mem::{offset_of, size_of};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};

use super::iov::{self, header, repeat};
use super::{Gather, Scatter};

/// Room for control data: a segment size, a count, and an extended error with an address.
#[repr(C, align(8))]
struct Control([u8; 128]);

/// What came with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Bytes that were filled in.
    pub len_bytes: usize,
    /// Where it comes from, as far as the socket says.
    pub from: Option<SocketAddr>,
    /// It is a row of datagrams of this length (the last may be shorter).
    pub segment: Option<u16>,
    /// There was more than room for it; the rest is lost.
    pub truncated: bool,
    /// Datagrams that the socket has had no room for so far, if it counts them (`SO_RXQ_OVFL`) and there were any.
    pub overflowed: Option<u32>,
}

/// An error that a socket with `IP_RECVERR` keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreachable {
    /// `errno`.
    pub errno: i32,
    /// Type and code of the ICMP message; zero if it came from this host.
    pub icmp: (u8, u8),
    /// What came with it: the MTU of a message that was too long.
    pub info: u32,
    /// Where the datagram went.
    pub to: Option<SocketAddr>,
    /// How many bytes of it came back.
    pub len_bytes: usize,
}

fn encode(to: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: all-zero is a valid `sockaddr_storage`.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let at = &raw mut storage;
    let len = match to {
        SocketAddr::V4(to) => {
            // SAFETY: all-zero is a valid `sockaddr_in`.
            let mut name: libc::sockaddr_in = unsafe { std::mem::zeroed() };
            name.sin_family = libc::AF_INET as libc::sa_family_t;
            name.sin_port = to.port().to_be();
            name.sin_addr.s_addr = u32::from_ne_bytes(to.ip().octets());
            // SAFETY: the storage is large enough and aligned for every kind of address.
            unsafe { at.cast::<libc::sockaddr_in>().write(name) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(to) => {
            // SAFETY: all-zero is a valid `sockaddr_in6`.
            let mut name: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
            name.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            name.sin6_port = to.port().to_be();
            name.sin6_addr.s6_addr = to.ip().octets();
            name.sin6_scope_id = to.scope_id();
            // SAFETY: as above.
            unsafe { at.cast::<libc::sockaddr_in6>().write(name) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, len as libc::socklen_t)
}

fn decode(storage: &libc::sockaddr_storage, len: libc::socklen_t) -> Option<SocketAddr> {
    let at = &raw const *storage;
    match i32::from(storage.ss_family) {
        libc::AF_INET if len as usize >= size_of::<libc::sockaddr_in>() => {
            // SAFETY: the storage is large enough and aligned; the kernel filled in an address of this family.
            let name = unsafe { at.cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(name.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddrV4::new(ip, u16::from_be(name.sin_port)).into())
        }
        libc::AF_INET6 if len as usize >= size_of::<libc::sockaddr_in6>() => {
            // SAFETY: as above.
            let name = unsafe { at.cast::<libc::sockaddr_in6>().read() };
            let ip = Ipv6Addr::from(name.sin6_addr.s6_addr);
            let port = u16::from_be(name.sin6_port);
            Some(match ip.to_ipv4_mapped() {
                Some(ip) => SocketAddr::new(IpAddr::V4(ip), port),
                None => SocketAddrV6::new(ip, port, 0, name.sin6_scope_id).into(),
            })
        }
        _ => None,
    }
}

impl Gather<'_> {
    /// Sends it as a datagram, to `to` if the socket is not connected, or as a row of datagrams of `segment` bytes each.
    /// Unlike [`send`](Self::send) it sends empty ones.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn send_to(
        self,
        socket: impl AsFd,
        to: Option<SocketAddr>,
        segment: Option<u16>,
    ) -> io::Result<usize> {
        let mut message = header(self.iov);
        let mut name = to.map(encode);
        if let Some((storage, len)) = &mut name {
            message.msg_name = (&raw mut *storage).cast();
            message.msg_namelen = *len;
        }
        let mut control = Control([0; 128]);
        if let Some(segment) = segment {
            message.msg_control = (&raw mut control).cast();
            // SAFETY: these compute lengths only.
            message.msg_controllen = unsafe { libc::CMSG_SPACE(2) } as _;
            // SAFETY: the control buffer is aligned and has room for one header with two bytes of data, as the message
            // says.
            unsafe {
                let cmsg = libc::CMSG_FIRSTHDR(&raw const message);
                (*cmsg).cmsg_level = libc::SOL_UDP;
                (*cmsg).cmsg_type = libc::UDP_SEGMENT;
                (*cmsg).cmsg_len = libc::CMSG_LEN(2) as _;
                libc::CMSG_DATA(cmsg).cast::<u16>().write_unaligned(segment);
            }
        }
        // SAFETY: the vector's entries are borrowed for the life of this value, name and control data live on this stack.
        unsafe { iov::send(socket, &message) }
    }
}

impl Scatter<'_> {
    /// Receives a datagram, or a row of them if the socket has `UDP_GRO`.
    ///
    /// # Errors
    /// As [`recv`](Self::recv); what ICMP said of an earlier one.
    pub fn recv_from(mut self, socket: impl AsFd) -> io::Result<Datagram> {
        receive(&mut self, socket, 0).map(|(datagram, ..)| datagram)
    }

    /// Takes the next error out of a socket with `IP_RECVERR` or `IPV6_RECVERR`; the bytes of the datagram that it is
    /// about come along.
    ///
    /// # Errors
    /// `WouldBlock` if there is none.
    pub fn recv_error(mut self, socket: impl AsFd) -> io::Result<Unreachable> {
        let (datagram, error) = receive(&mut self, socket, libc::MSG_ERRQUEUE)?;
        let error = error.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(Unreachable { to: datagram.from, len_bytes: datagram.len_bytes, ..error })
    }
}

fn receive(
    scatter: &mut Scatter<'_>,
    socket: impl AsFd,
    flags: libc::c_int,
) -> io::Result<(Datagram, Option<Unreachable>)> {
    // SAFETY: all-zero is a valid `sockaddr_storage`.
    let mut name: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut control = Control([0; 128]);
    let mut message = header(scatter.iov);
    message.msg_name = (&raw mut name).cast();
    message.msg_control = (&raw mut control).cast();
    message.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    message.msg_controllen = size_of::<Control>() as _;
    // SAFETY: the vector's entries are borrowed for the life of `scatter`, exclusively where they are private; name and
    // control buffers live on this stack and are as long as the message says.
    let len_bytes = unsafe { iov::receive(socket, &mut message, flags) }?;
    let mut datagram = Datagram {
        len_bytes,
        from: decode(&name, message.msg_namelen),
        segment: None,
        truncated: message.msg_flags & libc::MSG_TRUNC != 0,
        overflowed: None,
    };
    let mut error = None;
    // SAFETY: the message describes the control buffer as the kernel left it.
    let mut cmsg = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !cmsg.is_null() {
        // SAFETY: a header inside the control buffer; its data is as long as it says, and read unaligned.
        unsafe {
            let (level, kind) = ((*cmsg).cmsg_level, (*cmsg).cmsg_type);
            let data = libc::CMSG_DATA(cmsg);
            let len = (*cmsg).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
            match (level, kind) {
                (libc::SOL_UDP, libc::UDP_GRO) if len >= size_of::<libc::c_int>() => {
                    let segment = data.cast::<libc::c_int>().read_unaligned();
                    datagram.segment = u16::try_from(segment).ok().filter(|&segment| segment != 0);
                }
                (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) if len >= size_of::<u32>() => {
                    datagram.overflowed = Some(data.cast::<u32>().read_unaligned());
                }
                (libc::SOL_IP, libc::IP_RECVERR) | (libc::SOL_IPV6, libc::IPV6_RECVERR)
                    if len >= size_of::<libc::sock_extended_err>() =>
                {
                    const { assert!(offset_of!(libc::sock_extended_err, ee_errno) == 0) };
                    let found = data.cast::<libc::sock_extended_err>().read_unaligned();
                    let icmp = matches!(found.ee_origin, libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6);
                    error = Some(Unreachable {
                        errno: i32::try_from(found.ee_errno).unwrap_or(libc::EIO),
                        icmp: if icmp { (found.ee_type, found.ee_code) } else { (0, 0) },
                        info: found.ee_info,
                        to: None,
                        len_bytes: 0,
                    });
                }
                _ => {}
            }
            cmsg = libc::CMSG_NXTHDR(&raw const message, cmsg);
        }
    }
    Ok((datagram, error))
}

/// Throws away up to `len_bytes` bytes that a TCP socket has received; returns how many there were.
///
/// # Errors
/// What `recv` reports.
pub fn discard(socket: impl AsFd, len_bytes: usize) -> io::Result<usize> {
    if len_bytes == 0 {
        return Ok(0);
    }
    repeat(|| {
        // SAFETY: with MSG_TRUNC, TCP does not touch the buffer (tcp(7)), which may be null.
        unsafe {
            libc::recv(
                socket.as_fd().as_raw_fd(),
                std::ptr::null_mut(),
                len_bytes,
                libc::MSG_TRUNC | libc::MSG_DONTWAIT,
            )
        }
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::super::IovStorage;
    use super::*;

    #[test]
    fn datagrams_say_where_they_come_from_and_errors_where_they_went() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let (Ok(a), Ok(b)) = (UdpSocket::bind(any), UdpSocket::bind(any)) else { continue };
            let mut storage = IovStorage::new();
            let to = b.local_addr().unwrap();
            let mut gather = Gather::new(&mut storage);
            gather.push_bytes(b"hello");
            assert_eq!(gather.send_to(&a, Some(to), None).unwrap(), 5);
            let mut buffer = [0; 16];
            let mut scatter = Scatter::new(&mut storage);
            scatter.push_bytes_mut(&mut buffer);
            let got = scatter.recv_from(&b).unwrap();
            assert_eq!((got.len_bytes, got.from), (5, Some(a.local_addr().unwrap())));
            assert_eq!((got.segment, got.truncated), (None, false));
            let mut scatter = Scatter::new(&mut storage);
            scatter.push_bytes_mut(&mut buffer);
            assert_eq!(scatter.recv_error(&a).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn what_is_looked_at_stays_until_it_is_thrown_away() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (b, _) = listener.accept().unwrap();
        a.write_all(b"abcdef").unwrap();
        let mut storage = IovStorage::new();
        let mut look = |max: usize| {
            let mut buffer = [0; 16];
            let mut scatter = Scatter::new(&mut storage);
            scatter.push_bytes_mut(&mut buffer[..max]);
            let len = scatter.peek(&b).unwrap();
            buffer[..len].to_vec()
        };
        assert_eq!(look(4), b"abcd");
        assert_eq!(look(16), b"abcdef");
        assert_eq!(discard(&b, 2).unwrap(), 2);
        assert_eq!(look(16), b"cdef");
        assert_eq!(discard(&b, 100).unwrap(), 4);
        assert_eq!(discard(&b, 1).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
