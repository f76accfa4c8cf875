//! ICMP (RFC 792) and ICMPv6 (RFC 4443): echo, and what could not be delivered.

use std::net::IpAddr;

use super::packet::{ICMP, ICMPV6, Link, finished, pseudo};
use crate::frame::Mac;
use crate::frame::checksum::{finish, sum};

/// Types of echo request and reply.
pub const ECHO4: (u8, u8) = (8, 0);
/// See [`ECHO4`].
pub const ECHO6: (u8, u8) = (128, 129);
/// Most bytes of a packet that come back: so that a message fits into any MTU.
const QUOTE_BYTES: usize = 512;

/// Why a packet did not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// No way to the network.
    Net,
    /// No way to the host.
    Host,
    /// Nobody has the port.
    Port,
    /// Forbidden.
    Admin,
    /// Longer than this MTU.
    TooBig(u32),
    /// Too many hops.
    Hops,
    /// A protocol that is not carried.
    Protocol,
}

impl Why {
    /// From what a socket says.
    #[must_use]
    pub fn of_errno(errno: i32) -> Option<Self> {
        Some(match errno {
            libc::ENETUNREACH | libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT => Self::Net,
            libc::EHOSTUNREACH | libc::ETIMEDOUT | libc::EHOSTDOWN => Self::Host,
            libc::ECONNREFUSED => Self::Port,
            libc::EACCES | libc::EPERM => Self::Admin,
            _ => return None,
        })
    }

    /// Type, code, the second word.
    fn message(self, v6: bool) -> (u8, u8, u32) {
        match (self, v6) {
            (Self::Net, false) => (3, 0, 0),
            (Self::Host, false) => (3, 1, 0),
            (Self::Protocol, false) => (3, 2, 0),
            (Self::Port, false) => (3, 3, 0),
            (Self::Admin, false) => (3, 13, 0),
            (Self::TooBig(mtu), false) => (3, 4, mtu.min(0xffff)),
            (Self::Hops, false) => (11, 0, 0),
            (Self::Net, true) => (1, 0, 0),
            (Self::Admin, true) => (1, 1, 0),
            (Self::Host, true) => (1, 3, 0),
            (Self::Port, true) => (1, 4, 0),
            (Self::TooBig(mtu), true) => (2, 0, mtu),
            (Self::Hops, true) => (3, 0, 0),
            (Self::Protocol, true) => (4, 1, 40),
        }
    }
}

/// A frame that tells `to` why its packet, which began with `quote` (its IP header first), did not arrive.
#[must_use]
pub fn unreachable(us: Mac, to: Link, ends: (IpAddr, IpAddr), why: Why, quote: &[u8]) -> Vec<u8> {
    let v6 = ends.0.is_ipv6();
    let (kind, code, word) = why.message(v6);
    let mut out = vec![kind, code, 0, 0];
    out.extend(word.to_be_bytes());
    out.extend(&quote[..quote.len().min(QUOTE_BYTES)]);
    finished(us, to, ends, if v6 { ICMPV6 } else { ICMP }, &out, 2)
}

/// The IP header and the first bytes of UDP of a packet that is not at hand any more, for [`unreachable()`].
#[must_use]
pub fn quote_udp(src: (IpAddr, u16), dst: (IpAddr, u16), payload: &[u8]) -> Vec<u8> {
    let link = Link { mac: Mac(0), vid: 0 };
    super::packet::udp(Mac(0), link, src, dst, payload).split_off(14)
}

/// The answer to an echo request (the bytes behind IP); `None` if it is none.
#[must_use]
pub fn echo(request: &[u8], v6: bool) -> Option<Vec<u8>> {
    let (ask, answer) = if v6 { ECHO6 } else { ECHO4 };
    if request.len() < 8 || request[..2] != [ask, 0] {
        return None;
    }
    let mut out = request.to_vec();
    out[0] = answer;
    Some(out)
}

/// Whether the checksum of an ICMP message is right.
#[must_use]
pub fn is_sound(bytes: &[u8], ends: (IpAddr, IpAddr)) -> bool {
    let pseudo = if ends.0.is_ipv6() { pseudo(ends.0, ends.1, ICMPV6, bytes.len()) } else { 0 };
    finish(pseudo + sum(bytes)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_comes_back_with_a_good_sum() {
        let link = Link { mac: Mac(1), vid: 0 };
        for (ends, protocol, ask) in [
            (("10.0.2.2".parse().unwrap(), "10.0.2.15".parse().unwrap()), ICMP, 8),
            (("fd00::2".parse().unwrap(), "fd00::3".parse().unwrap()), ICMPV6, 128),
        ] {
            let v6 = protocol == ICMPV6;
            let answer = echo(&[ask, 0, 9, 9, 0, 1, 0, 2, b'x'], v6).unwrap();
            let frame = finished(Mac(2), link, ends, protocol, &answer, 2);
            assert!(is_sound(&frame[if v6 { 54 } else { 34 }..], ends));
            assert_eq!(echo(&answer, v6), None);
            let quote = quote_udp((ends.1, 1), (ends.0, 2), b"payload");
            let frame = unreachable(Mac(2), link, ends, Why::Port, &quote);
            assert!(is_sound(&frame[if v6 { 54 } else { 34 }..], ends));
        }
    }
}
