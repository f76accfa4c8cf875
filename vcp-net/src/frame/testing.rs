//! Packets for tests, and a receiver that checks everything.

use super::checksum::{finish, fold, sum};
use super::ether::{IPV4, IPV6};
use super::layers::{Layers, TCP};
use super::vnet::VnetHeader;

/// A packet as a sender would write it.
#[derive(Clone, Debug)]
pub struct Packet {
    /// What is left to do.
    pub meta: VnetHeader,
    /// The frame.
    pub bytes: Vec<u8>,
    /// Its type.
    pub ethertype: u16,
    /// Its first TCP sequence number.
    pub seq: u32,
    /// FIN and PSH as in its TCP header.
    pub fin_psh: u8,
    l4_at: usize,
    headers: usize,
    udp: bool,
}

impl Packet {
    /// A packet with this much payload and so many words of TCP options. Its checksum field has the sum of the pseudo
    /// header, nothing more.
    #[must_use]
    pub fn new(v6: bool, udp: bool, payload: usize, options: usize, seed: u8) -> Self {
        let seq = 0xffff_f000 + u32::from(seed);
        let l3 = if v6 { 40 } else { 20 };
        let options = if udp { 0 } else { options };
        let l4 = if udp { 8 } else { 20 + 4 * options };
        let l4_bytes = l4 + payload;
        let mut bytes = vec![0x02, 0, 0, 0, 0, 2, 0x02, 0, 0, 0, 0, 1];
        let ethertype = if v6 { IPV6 } else { IPV4 };
        bytes.extend(ethertype.to_be_bytes());
        let protocol = if udp { 17 } else { TCP };
        if v6 {
            bytes.extend([0x60, 0, 0, 0]);
            bytes.extend((l4_bytes as u16).to_be_bytes());
            bytes.extend([protocol, 64]);
            bytes.extend((0..32).map(|at| seed.wrapping_mul(3).wrapping_add(at)));
        } else {
            bytes.extend([0x45, 0]);
            bytes.extend(((20 + l4_bytes) as u16).to_be_bytes());
            bytes.extend([0x12, seed, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, seed]);
            let sum = finish(sum(&bytes[14..34]));
            bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        let l4_at = 14 + l3;
        bytes.extend([0x30, 0x39, 0x00, seed]);
        if udp {
            bytes.extend((l4_bytes as u16).to_be_bytes());
            bytes.extend([0, 0]);
        } else {
            bytes.extend(seq.to_be_bytes());
            bytes.extend([0, 0, 0, 1, ((5 + options) as u8) << 4, 0x19, 0x40, 0, 0, 0, 0, 0]);
            bytes.extend(std::iter::repeat_n(1, 4 * options));
        }
        bytes.extend((0..payload).map(|at| (at as u8).wrapping_mul(7).wrapping_add(seed)));
        let headers = l4_at + l4;
        let mut this =
            Self { meta: VnetHeader::default(), bytes, ethertype, seq, fin_psh: 0x09, l4_at, headers, udp };
        let layers = Layers::find(&this.bytes, ethertype, 14).expect("it is IP");
        let pseudo = fold(layers.pseudo_sum(&this.bytes, l4_bytes));
        let at = this.sum_at();
        this.bytes[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
        this
    }

    /// Bytes and metadata that need not go together.
    #[must_use]
    pub fn raw(meta: VnetHeader, ethertype: u16, bytes: Vec<u8>) -> Self {
        Self { meta, bytes, ethertype, seq: 0, fin_psh: 0, l4_at: 0, headers: 0, udp: false }
    }

    fn sum_at(&self) -> usize {
        self.l4_at + if self.udp { 6 } else { 16 }
    }

    /// To be cut into segments.
    #[must_use]
    pub fn gso(mut self, gso_size: u16) -> Self {
        self.meta = if self.udp {
            VnetHeader::udp(self.l4_at, gso_size)
        } else {
            VnetHeader::tcp(self.ethertype == IPV6, self.l4_at, self.headers, gso_size)
        };
        self
    }

    /// To be given its checksum.
    #[must_use]
    pub fn partial(mut self) -> Self {
        self.meta = VnetHeader::partial(self.l4_at, if self.udp { 6 } else { 16 });
        self
    }

    /// With its checksum.
    #[must_use]
    pub fn complete(mut self) -> Self {
        let total = sum(&self.bytes[self.l4_at..]);
        let sum = if self.udp { super::checksum::finish_udp(total) } else { finish(total) };
        let at = self.sum_at();
        self.bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        self.meta = VnetHeader::default();
        self
    }

    /// Between these stations.
    #[must_use]
    pub fn between(mut self, src: super::Mac, dst: super::Mac) -> Self {
        self.bytes[..6].copy_from_slice(&dst.bytes());
        self.bytes[6..12].copy_from_slice(&src.bytes());
        self
    }

    /// What is behind the headers.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.bytes[self.headers..]
    }
}

/// What a receiver found.
#[derive(Debug)]
pub struct Check {
    /// The payload of TCP or UDP.
    pub payload: Vec<u8>,
    /// The TCP sequence number.
    pub seq: u32,
    /// FIN and PSH.
    pub fin_psh: u8,
    /// The checksum is there and right; if not, it is right as far as a sender goes.
    pub complete: bool,
    /// The frame is a row of segments.
    pub gso: bool,
}

/// Checks a frame as its receiver would have to: lengths, header checksum, the checksum of TCP or UDP as far as `meta` says
/// that it is there.
///
/// # Errors
/// What is wrong.
pub fn verify(meta: &VnetHeader, bytes: &[u8]) -> Result<Check, String> {
    let (ethertype, l3_at) = match bytes.get(12..14) {
        Some([0x81, 0]) => (u16::from_be_bytes([bytes[16], bytes[17]]), 18),
        Some(&[a, b]) => (u16::from_be_bytes([a, b]), 14),
        _ => return Err("no Ethernet header".into()),
    };
    let layers = Layers::find(bytes, ethertype, l3_at).ok_or("no IP header")?;
    let headers = layers.headers_bytes(bytes).ok_or("no TCP or UDP header")?;
    let word = |at: usize| usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
    let l3_bytes = bytes.len() - l3_at;
    let said = if layers.v6 { word(l3_at + 4) + 40 } else { word(l3_at + 2) };
    if said != l3_bytes {
        return Err(format!("the IP header says {said} bytes of {l3_bytes}"));
    }
    if !layers.v6 && fold(sum(&bytes[l3_at..layers.l4_at])) != 0xffff {
        return Err("wrong checksum in the IP header".into());
    }
    if layers.protocol != TCP && word(layers.l4_at + 4) != bytes.len() - layers.l4_at {
        return Err("wrong length in the UDP header".into());
    }
    let pseudo = layers.pseudo_sum(bytes, bytes.len() - layers.l4_at);
    let complete = !meta.needs_csum();
    if complete {
        if fold(pseudo + sum(&bytes[layers.l4_at..])) != 0xffff {
            return Err("wrong checksum".into());
        }
    } else {
        let offset = if layers.protocol == TCP { 16 } else { 6 };
        if usize::from(meta.csum_start) != layers.l4_at || usize::from(meta.csum_offset) != offset {
            return Err(format!("metadata out of place: {meta:?}"));
        }
        if word(layers.l4_at + offset) != usize::from(fold(pseudo)) {
            return Err("wrong sum of the pseudo header".into());
        }
    }
    let (seq, fin_psh) = if layers.protocol == TCP {
        let at = layers.l4_at;
        let seq = u32::from_be_bytes([bytes[at + 4], bytes[at + 5], bytes[at + 6], bytes[at + 7]]);
        (seq, bytes[at + 13] & 0x09)
    } else {
        (0, 0)
    };
    Ok(Check { payload: bytes[headers..].to_vec(), seq, fin_psh, complete, gso: meta.is_gso() })
}
