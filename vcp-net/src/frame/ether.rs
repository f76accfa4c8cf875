//! Ethernet: addresses, types, 802.1Q tags.

use std::fmt;
use std::str::FromStr;

/// Bytes of an Ethernet header.
pub const ETHER_BYTES: usize = 14;
/// Bytes of a VLAN tag.
pub const TAG_BYTES: usize = 4;
/// EtherType of a VLAN tag (802.1Q).
pub const VLAN: u16 = 0x8100;
/// EtherTypes.
pub const IPV4: u16 = 0x0800;
/// See [`IPV4`].
pub const IPV6: u16 = 0x86dd;
/// See [`IPV4`].
pub const ARP: u16 = 0x0806;

/// A MAC address, as the number that its bytes make in network order.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub u64);

impl Mac {
    /// To all.
    pub const BROADCAST: Self = Self(0xffff_ffff_ffff);

    /// From its bytes.
    #[inline]
    #[must_use]
    pub fn new(bytes: [u8; 6]) -> Self {
        let [a, b, c, d, e, f] = bytes;
        Self(u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        let [_, _, a, b, c, d, e, f] = self.0.to_be_bytes();
        [a, b, c, d, e, f]
    }

    /// A group address, the broadcast address included.
    #[inline]
    #[must_use]
    pub fn is_group(self) -> bool {
        self.0 & 0x0100_0000_0000 != 0
    }

    /// Addresses that bridges do not forward (802.1Q, table 8-1).
    #[must_use]
    pub fn is_link_local_control(self) -> bool {
        self.0 & !0xf == 0x0180_c200_0000
    }

    /// Whether a station can have it.
    #[must_use]
    pub fn is_station(self) -> bool {
        self.0 != 0 && !self.is_group()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.bytes();
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is not a MAC address (six bytes in hexadecimal with colons)");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| (1..=2).contains(&part.len())).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self::new(bytes)) }
    }
}

/// A VLAN tag's contents: priority, drop eligibility, VLAN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tci(pub u16);

impl Tci {
    /// The VLAN; 0: priority only.
    #[must_use]
    pub fn vid(self) -> u16 {
        self.0 & 0xfff
    }

    /// The same in another VLAN.
    #[must_use]
    pub fn with_vid(self, vid: u16) -> Self {
        Self(self.0 & 0xf000 | vid & 0xfff)
    }
}

/// What the first bytes of a frame say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ether {
    /// Where it goes.
    pub dst: Mac,
    /// Where it comes from.
    pub src: Mac,
    /// The outermost VLAN tag.
    pub tag: Option<Tci>,
    /// The type behind the tag.
    pub ethertype: u16,
    /// Bytes before the payload.
    pub len_bytes: u8,
}

impl Ether {
    /// Of a frame of `len` bytes that begins with `head`; `None` if it is too short.
    #[inline]
    #[must_use]
    pub fn parse(head: &[u8; ETHER_BYTES + TAG_BYTES], len: usize) -> Option<Self> {
        if len < ETHER_BYTES {
            return None;
        }
        let word =
            u64::from_be_bytes([head[0], head[1], head[2], head[3], head[4], head[5], head[6], head[7]]);
        let low = u32::from_be_bytes([head[8], head[9], head[10], head[11]]);
        let (dst, src) = (Mac(word >> 16), Mac((word & 0xffff) << 32 | u64::from(low)));
        let ethertype = u16::from_be_bytes([head[12], head[13]]);
        if ethertype != VLAN {
            return Some(Self { dst, src, tag: None, ethertype, len_bytes: ETHER_BYTES as u8 });
        }
        if len < ETHER_BYTES + TAG_BYTES {
            return None;
        }
        let tag = Some(Tci(u16::from_be_bytes([head[14], head[15]])));
        let ethertype = u16::from_be_bytes([head[16], head[17]]);
        Some(Self { dst, src, tag, ethertype, len_bytes: (ETHER_BYTES + TAG_BYTES) as u8 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let mac: Mac = "52:54:00:12:34:ff".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:12:34:ff");
        assert_eq!(mac.bytes(), [0x52, 0x54, 0, 0x12, 0x34, 0xff]);
        assert!(mac.is_station() && !mac.is_group());
        for bad in
            ["", "52:54:00:12:34", "52:54:00:12:34:ff:00", "52:54:00:12:34:fff", "g:0:0:0:0:0", "::::: "]
        {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn headers_with_and_without_a_tag() {
        let mut head = [0; 18];
        head[..6].copy_from_slice(&[1, 2, 3, 4, 5, 6]);
        head[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        head[12..14].copy_from_slice(&[0x08, 0]);
        let plain = Ether::parse(&head, 60).unwrap();
        assert_eq!((plain.dst, plain.src), (Mac(0x0102_0304_0506), Mac(0x0200_0000_0009)));
        assert_eq!((plain.tag, plain.ethertype, plain.len_bytes), (None, IPV4, 14));
        head[12..18].copy_from_slice(&[0x81, 0, 0x60, 5, 0x86, 0xdd]);
        let tagged = Ether::parse(&head, 60).unwrap();
        assert_eq!((tagged.tag, tagged.ethertype, tagged.len_bytes), (Some(Tci(0x6005)), IPV6, 18));
        assert_eq!(tagged.tag.unwrap().with_vid(7), Tci(0x6007));
        assert!(Ether::parse(&head, 17).is_none() && Ether::parse(&head, 13).is_none());
    }
}
