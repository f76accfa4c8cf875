//! Packets that the stack takes apart and puts together: Ethernet, IPv4 (RFC 791), IPv6 (RFC 8200), UDP, checksums.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::frame::checksum::{finish, finish_udp, sum};
use crate::frame::ether::{ARP, ETHER_BYTES, IPV4, IPV6, TAG_BYTES, VLAN};
use crate::frame::{Mac, OutFrame};

/// Protocol numbers.
pub const ICMP: u8 = 1;
/// See [`ICMP`].
pub const TCP: u8 = 6;
/// See [`ICMP`].
pub const UDP: u8 = 17;
/// See [`ICMP`].
pub const ICMPV6: u8 = 58;
/// Bytes of a frame that are looked at: all headers.
pub const HEAD_BYTES: usize = 256;
/// Hop limit of what the stack sends.
const HOPS: u8 = 64;

/// A station behind the switch, as the stack reaches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Link {
    /// Its address.
    pub mac: Mac,
    /// Its VLAN; 0: none.
    pub vid: u16,
}

/// An IP packet in a frame. Offsets count from the frame's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// From.
    pub src: IpAddr,
    /// To.
    pub dst: IpAddr,
    /// The protocol above.
    pub protocol: u8,
    /// The network header.
    pub l3_at: usize,
    /// The header above.
    pub l4_at: usize,
    /// The packet's end.
    pub end: usize,
    /// Time to live, or hop limit.
    pub hops: u8,
    /// It is a part of a packet: identification, offset of its bytes, whether more follow.
    pub part: Option<(u32, u16, bool)>,
}

impl Packet {
    /// Of a frame of `total` bytes that begins with `head`. `None` if it is broken.
    #[must_use]
    pub fn parse(head: &[u8], ethertype: u16, l3_at: usize, total: usize) -> Option<Self> {
        let ip = head.get(l3_at..)?;
        let word = |at: usize| Some(u16::from_be_bytes([*ip.get(at)?, *ip.get(at + 1)?]));
        if ethertype == IPV4 {
            let header: &[u8; 20] = ip.first_chunk()?;
            let len = usize::from(header[0] & 0xf) * 4;
            let whole = usize::from(word(2)?);
            if header[0] >> 4 != 4 || len < 20 || whole < len || l3_at + whole > total || ip.len() < len {
                return None;
            }
            if finish(sum(&ip[..len])) != 0 {
                return None;
            }
            let fragment = word(6)?;
            let (offset, more) = ((fragment & 0x1fff) * 8, fragment & 0x2000 != 0);
            let ident = u32::from(word(4)?);
            return Some(Self {
                src: Ipv4Addr::from(*header[12..].first_chunk::<4>()?).into(),
                dst: Ipv4Addr::from(*header[16..].first_chunk::<4>()?).into(),
                protocol: header[9],
                l3_at,
                l4_at: l3_at + len,
                end: l3_at + whole,
                hops: header[8],
                part: (offset != 0 || more).then_some((ident, offset, more)),
            });
        }
        let header: &[u8; 40] = ip.first_chunk()?;
        let end = l3_at + 40 + usize::from(word(4)?);
        if header[0] >> 4 != 6 || end > total {
            return None;
        }
        let (mut protocol, mut at, mut part) = (header[6], 40, None);
        loop {
            match protocol {
                // Hop by hop, routing, destination.
                0 | 43 | 60 => {
                    protocol = *ip.get(at)?;
                    at += 8 * (usize::from(*ip.get(at + 1)?) + 1);
                }
                44 => {
                    let field = word(at + 2)?;
                    let ident = u32::from_be_bytes(*ip.get(at + 4..)?.first_chunk()?);
                    protocol = *ip.get(at)?;
                    at += 8;
                    let (offset, more) = (field & 0xfff8, field & 1 != 0);
                    part = (offset != 0 || more).then_some((ident, offset, more));
                    break;
                }
                _ => break,
            }
        }
        if l3_at + at > end || at > ip.len() {
            return None;
        }
        Some(Self {
            src: Ipv6Addr::from(*header[8..].first_chunk::<16>()?).into(),
            dst: Ipv6Addr::from(*header[24..].first_chunk::<16>()?).into(),
            protocol,
            l3_at,
            l4_at: l3_at + at,
            end,
            hops: header[7],
            part,
        })
    }

    /// Bytes behind the IP header.
    #[must_use]
    pub fn l4_bytes(&self) -> usize {
        self.end - self.l4_at
    }

    /// Whether the checksum of TCP, UDP or ICMPv6 in `frame` (or of ICMP, which has no pseudo header) is right.
    #[must_use]
    pub fn is_sound(&self, frame: &OutFrame<'_>) -> bool {
        if !frame.meta.is_plain() || self.part.is_some() {
            return true;
        }
        let pseudo = if self.protocol == ICMP {
            0
        } else {
            pseudo(self.src, self.dst, self.protocol, self.l4_bytes())
        };
        let prefix = frame.prefix.get(self.l4_at..).unwrap_or(&[]);
        if prefix.len() % 2 != 0 {
            return finish(pseudo + sum(&frame.to_vec()[self.l4_at..self.end])) == 0;
        }
        let rest_at = (self.l4_at + prefix.len()).saturating_sub(frame.prefix.len());
        let rest = self.l4_bytes() - prefix.len().min(self.l4_bytes());
        finish(frame.frame.sum(frame.skip + rest_at, rest, pseudo + sum(prefix))) == 0
    }
}

/// The sum of the pseudo header, not folded.
#[must_use]
pub fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, l4_bytes: usize) -> u64 {
    let one = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => sum(&ip.octets()),
        IpAddr::V6(ip) => sum(&ip.octets()),
    };
    one(src) + one(dst) + u64::from(protocol) + l4_bytes as u64
}

/// Appends an Ethernet header.
pub fn ether(out: &mut Vec<u8>, from: Mac, to: Link, ethertype: u16) {
    out.extend(to.mac.bytes());
    out.extend(from.bytes());
    if to.vid != 0 {
        out.extend(VLAN.to_be_bytes());
        out.extend(to.vid.to_be_bytes());
    }
    out.extend(ethertype.to_be_bytes());
}

/// Bytes of that header.
#[must_use]
pub fn ether_bytes(to: Link) -> usize {
    if to.vid == 0 { ETHER_BYTES } else { ETHER_BYTES + TAG_BYTES }
}

/// Appends the headers of a frame up to IP, for `l4_bytes` bytes above it. `hops`: 255 where the protocol wants it.
pub fn ip(out: &mut Vec<u8>, from: Mac, to: Link, ends: (IpAddr, IpAddr), protocol: u8, l4_bytes: usize) {
    ip_with(out, from, to, ends, protocol, l4_bytes, if protocol == ICMPV6 { 255 } else { HOPS });
}

fn ip_with(
    out: &mut Vec<u8>,
    from: Mac,
    to: Link,
    ends: (IpAddr, IpAddr),
    protocol: u8,
    l4_bytes: usize,
    hops: u8,
) {
    match ends {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            ether(out, from, to, IPV4);
            let at = out.len();
            out.extend([0x45, 0]);
            out.extend(((20 + l4_bytes) as u16).to_be_bytes());
            // Never in parts: identification is of no use (RFC 6864).
            out.extend([0, 0, 0x40, 0, hops, protocol, 0, 0]);
            out.extend(src.octets());
            out.extend(dst.octets());
            let sum = finish(sum(&out[at..]));
            out[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
        }
        (src, dst) => {
            ether(out, from, to, IPV6);
            out.extend([0x60, 0, 0, 0]);
            out.extend((l4_bytes as u16).to_be_bytes());
            out.extend([protocol, hops]);
            out.extend(as_v6(src).octets());
            out.extend(as_v6(dst).octets());
        }
    }
}

fn as_v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

/// A whole frame around what is above IP, whose checksum field (at `sum_at` in it) is filled in.
#[must_use]
pub fn finished(
    from: Mac,
    to: Link,
    ends: (IpAddr, IpAddr),
    protocol: u8,
    l4: &[u8],
    sum_at: usize,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(ETHER_BYTES + TAG_BYTES + 40 + l4.len());
    ip(&mut out, from, to, ends, protocol, l4.len());
    let at = out.len();
    out.extend_from_slice(l4);
    out[at + sum_at..at + sum_at + 2].fill(0);
    let pseudo = if protocol == ICMP { 0 } else { pseudo(ends.0, ends.1, protocol, l4.len()) };
    let total = pseudo + sum(&out[at..]);
    let total = if protocol == UDP { finish_udp(total) } else { finish(total) };
    out[at + sum_at..at + sum_at + 2].copy_from_slice(&total.to_be_bytes());
    out
}

/// A frame with a UDP datagram.
#[must_use]
pub fn udp(from: Mac, to: Link, src: (IpAddr, u16), dst: (IpAddr, u16), payload: &[u8]) -> Vec<u8> {
    let mut l4 = Vec::with_capacity(8 + payload.len());
    l4.extend(src.1.to_be_bytes());
    l4.extend(dst.1.to_be_bytes());
    l4.extend(((8 + payload.len()) as u16).to_be_bytes());
    l4.extend([0, 0]);
    l4.extend_from_slice(payload);
    finished(from, to, (src.0, dst.0), UDP, &l4, 6)
}

/// Cuts a whole frame into parts of its IP packet, none longer than `mtu` (RFC 791, 3.2; RFC 8200, 4.5). `number`
/// identifies them.
#[must_use]
pub fn parts(whole: &[u8], to: Link, mtu: usize, number: u32) -> Vec<Vec<u8>> {
    let l3_at = ether_bytes(to);
    let v6 = whole.get(l3_at).is_some_and(|first| first >> 4 == 6);
    let header = l3_at + if v6 { 40 } else { 20 };
    let extra = if v6 { 8 } else { 0 };
    let step = (mtu - (header - l3_at) - extra) & !7;
    let Some((head, payload)) = whole.split_at_checked(header) else { return Vec::new() };
    let count = payload.len().div_ceil(step);
    let one = |(at, piece): (usize, &[u8])| {
        let mut out = head.to_vec();
        let (offset, more) = ((at * step) as u16, at + 1 != count);
        if v6 {
            out[l3_at + 4..l3_at + 6].copy_from_slice(&((8 + piece.len()) as u16).to_be_bytes());
            let protocol = std::mem::replace(&mut out[l3_at + 6], 44);
            out.extend([protocol, 0]);
            out.extend((offset | u16::from(more)).to_be_bytes());
            out.extend(number.to_be_bytes());
        } else {
            out[l3_at + 2..l3_at + 4].copy_from_slice(&((20 + piece.len()) as u16).to_be_bytes());
            out[l3_at + 4..l3_at + 6].copy_from_slice(&(number as u16).to_be_bytes());
            let field = (offset / 8) | if more { 0x2000 } else { 0 };
            out[l3_at + 6..l3_at + 8].copy_from_slice(&field.to_be_bytes());
            out[l3_at + 10..l3_at + 12].fill(0);
            let sum = finish(sum(&out[l3_at..header]));
            out[l3_at + 10..l3_at + 12].copy_from_slice(&sum.to_be_bytes());
        }
        out.extend_from_slice(piece);
        out
    };
    payload.chunks(step).enumerate().map(one).collect()
}

/// An ARP packet (RFC 826) for IPv4 over Ethernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// It asks (and does not answer).
    pub asks: bool,
    /// Who speaks.
    pub from: (Mac, Ipv4Addr),
    /// Who is spoken of.
    pub to: (Mac, Ipv4Addr),
}

impl Arp {
    /// From the bytes behind the Ethernet header.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let arp: &[u8; 28] = bytes.first_chunk()?;
        if arp[..6] != [0, 1, 8, 0, 6, 4] || arp[6] != 0 || !matches!(arp[7], 1 | 2) {
            return None;
        }
        let side = |at: usize| {
            let mac = Mac::new(*arp[at..].first_chunk::<6>()?);
            Some((mac, Ipv4Addr::from(*arp[at + 6..].first_chunk::<4>()?)))
        };
        Some(Self { asks: arp[7] == 1, from: side(8)?, to: side(18)? })
    }

    /// As a frame.
    #[must_use]
    pub fn emit(&self, to: Link) -> Vec<u8> {
        let mut out = Vec::with_capacity(60);
        ether(&mut out, self.from.0, to, ARP);
        out.extend([0, 1, 8, 0, 6, 4, 0, if self.asks { 1 } else { 2 }]);
        for (mac, ip) in [self.from, self.to] {
            out.extend(mac.bytes());
            out.extend(ip.octets());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Mac = Mac(0x0200_0000_0002);
    const GUEST: Link = Link { mac: Mac(0x5254_0000_0001), vid: 0 };

    #[test]
    fn a_datagram_is_read_as_it_was_written_and_its_sum_is_checked() {
        let v4 = ("10.0.2.2".parse().unwrap(), "10.0.2.15".parse().unwrap());
        let v6 = ("fd00::2".parse().unwrap(), "fd00::15".parse().unwrap());
        for (link, ends) in [(GUEST, v4), (GUEST, v6), (Link { vid: 5, ..GUEST }, v4)] {
            let mut bytes = udp(US, link, (ends.0, 53), (ends.1, 4000), b"odd");
            let ethertype = if ends.0.is_ipv4() { IPV4 } else { IPV6 };
            let l3_at = ether_bytes(link);
            let packet = Packet::parse(&bytes, ethertype, l3_at, bytes.len()).unwrap();
            assert_eq!((packet.src, packet.dst, packet.protocol), (ends.0, ends.1, UDP));
            assert_eq!((packet.l4_bytes(), packet.end), (11, bytes.len()));
            assert!(packet.is_sound(&OutFrame::of(crate::frame::VnetHeader::default(), &bytes)));
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            assert!(!packet.is_sound(&OutFrame::of(crate::frame::VnetHeader::default(), &bytes)));
            for len in 0..last {
                assert_eq!(Packet::parse(&bytes[..len], ethertype, l3_at, len), None);
            }
        }
    }

    #[test]
    fn arp_is_read_as_it_was_written() {
        let arp = Arp {
            asks: true,
            from: (US, Ipv4Addr::new(10, 0, 2, 2)),
            to: (Mac(0), Ipv4Addr::new(10, 0, 2, 15)),
        };
        let bytes = arp.emit(GUEST);
        assert_eq!(Arp::parse(&bytes[14..]), Some(arp));
        assert_eq!(Arp::parse(&bytes[14..41]), None);
    }
}
