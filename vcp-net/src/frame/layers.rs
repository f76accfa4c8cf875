//! Where the layers of a frame begin, as far as checksums and segmentation need it.

use super::ether::{IPV4, IPV6};

/// Bytes in which all headers of a frame that is segmented must lie.
pub const HEADERS_BYTES: usize = 256;

/// Protocol numbers.
pub const TCP: u8 = 6;
/// See [`TCP`].
pub const UDP: u8 = 17;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;

/// See the module. Offsets are from the frame's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layers {
    /// The network layer is IPv6, not IPv4.
    pub v6: bool,
    /// The network header.
    pub l3_at: usize,
    /// The protocol above.
    pub protocol: u8,
    /// Its header.
    pub l4_at: usize,
    /// The packet is a fragment.
    pub fragment: bool,
}

impl Layers {
    /// Of a frame whose network header, of type `ethertype`, begins at `l3_at`; `head` is its beginning, at least as far
    /// as its headers go. `None` if it is no IP, or broken.
    #[must_use]
    pub fn find(head: &[u8], ethertype: u16, l3_at: usize) -> Option<Self> {
        match ethertype {
            IPV4 => Self::ipv4(head, l3_at),
            IPV6 => Self::ipv6(head, l3_at),
            _ => None,
        }
    }

    fn ipv4(head: &[u8], l3_at: usize) -> Option<Self> {
        let ip = head.get(l3_at..)?;
        let (first, protocol) = (*ip.first()?, *ip.get(9)?);
        let len = usize::from(first & 0xf) * 4;
        if first >> 4 != 4 || len < 20 || ip.len() < len {
            return None;
        }
        let fragment = u16::from_be_bytes([*ip.get(6)?, *ip.get(7)?]) & 0x3fff != 0;
        Some(Self { v6: false, l3_at, protocol, l4_at: l3_at + len, fragment })
    }

    fn ipv6(head: &[u8], l3_at: usize) -> Option<Self> {
        let ip = head.get(l3_at..)?;
        if ip.len() < 40 || ip[0] >> 4 != 6 {
            return None;
        }
        let (mut protocol, mut at) = (ip[6], 40);
        while matches!(protocol, HOP_BY_HOP | ROUTING | DESTINATION) {
            let next = *ip.get(at)?;
            at += 8 * (usize::from(*ip.get(at + 1)?) + 1);
            protocol = next;
        }
        if at > ip.len() {
            return None;
        }
        let fragment = protocol == 44;
        Some(Self { v6: true, l3_at, protocol, l4_at: l3_at + at, fragment })
    }

    /// Bytes of all headers up to the payload of TCP or UDP; `None` for other protocols, or if it is broken.
    #[must_use]
    pub fn headers_bytes(&self, head: &[u8]) -> Option<usize> {
        let len = match self.protocol {
            TCP => {
                let len = usize::from(*head.get(self.l4_at + 12)? >> 4) * 4;
                (len >= 20).then_some(len)?
            }
            UDP => 8,
            _ => return None,
        };
        let end = self.l4_at + len;
        (end <= head.len()).then_some(end)
    }

    /// The sum of the pseudo header (RFC 793, RFC 8200 8.1) for `l4_bytes` bytes of TCP or UDP, not folded.
    #[must_use]
    pub fn pseudo_sum(&self, head: &[u8], l4_bytes: usize) -> u64 {
        let addresses =
            if self.v6 { self.l3_at + 8..self.l3_at + 40 } else { self.l3_at + 12..self.l3_at + 20 };
        let addresses = head.get(addresses).unwrap_or(&[]);
        let sum: u64 =
            addresses.chunks_exact(2).map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        sum + u64::from(self.protocol) + l4_bytes as u64
    }
}
