//! Recorded PDUs as a pcapng file (draft-ietf-opsawg-pcapng), one PDU in a made-up TCP segment.
//!
//! Addresses and ports are made up, sequence numbers are those of a connection without digests whose first recorded
//! byte has number 1. Of each PDU the header and the first bytes of data are there; the rest counts in the packet's
//! original length, as in a capture with a snapshot length. Why the file was written stands in its comments.

use std::time::{Instant, SystemTime};

use vcp_core::pcapng::{self, ETHERNET, Packet, wall_ns};

use super::{Entry, Way};

/// Ethernet, IPv4 and TCP headers.
const FRAME_BYTES: usize = 14 + 20 + 20;
const INITIATOR: [u8; 4] = [10, 0, 0, 1];
const TARGET: [u8; 4] = [10, 0, 0, 2];
const INITIATOR_PORT: u16 = 49152;
/// iSCSI's, so that a decoder knows what it is.
const TARGET_PORT: u16 = 3260;

/// What a file says of itself.
#[derive(Clone, Debug)]
pub struct About {
    /// Which session, and why the file was written.
    pub comment: String,
    /// What stands at the last PDU: what went wrong with it or after it.
    pub at_the_end: Option<String>,
    /// A moment on both clocks.
    pub clock: (Instant, SystemTime),
}

/// The file.
#[must_use]
pub fn write(entries: &[Entry], about: &About) -> Vec<u8> {
    let mut out = Vec::with_capacity(512 + entries.len() * 224);
    pcapng::section(&mut out, &about.comment, concat!("vcp-iscsi ", env!("CARGO_PKG_VERSION")));
    pcapng::interface(&mut out, ETHERNET, None);
    let (mut up, mut down) = (1_u32, 1_u32);
    for (at, entry) in entries.iter().enumerate() {
        let is_last = at + 1 == entries.len();
        let comment = about.at_the_end.as_deref().filter(|_| is_last);
        let (seq, ack) = if entry.way == Way::ToTarget { (up, down) } else { (down, up) };
        packet(&mut out, entry, (seq, ack), wall_ns(entry.at, about.clock), comment);
        let len = entry.len_bytes() as u32;
        match entry.way {
            Way::ToTarget => up = up.wrapping_add(len),
            Way::ToInitiator => down = down.wrapping_add(len),
        }
    }
    out
}

fn packet(out: &mut Vec<u8>, entry: &Entry, (seq, ack): (u32, u32), at_ns: u64, comment: Option<&str>) {
    let data = if entry.data_follows() { entry.data() } else { &[] };
    let there = FRAME_BYTES + entry.header.len() + data.len();
    let original = FRAME_BYTES + entry.len_bytes();
    let about = Packet { at_ns, original_bytes: original, comment, ..Packet::default() };
    pcapng::packet(out, &about, there, |body| {
        frame(body, entry, seq, ack);
        body.extend(entry.header);
        body.extend(data);
    });
}

/// Ethernet, IPv4 and TCP.
fn frame(out: &mut Vec<u8>, entry: &Entry, seq: u32, ack: u32) {
    let (from, to, ports) = match entry.way {
        Way::ToTarget => (INITIATOR, TARGET, [INITIATOR_PORT, TARGET_PORT]),
        Way::ToInitiator => (TARGET, INITIATOR, [TARGET_PORT, INITIATOR_PORT]),
    };
    // Locally administered addresses that end like the IPv4 ones.
    out.extend([2, 0, to[0], to[1], to[2], to[3], 2, 0, from[0], from[1], from[2], from[3], 8, 0]);
    let ip = out.len();
    // 0 is how captures say that a segment is longer than the field can tell.
    let total = u16::try_from(40 + entry.len_bytes()).unwrap_or(0);
    out.extend([0x45, 0]);
    out.extend(total.to_be_bytes());
    out.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
    out.extend(from.iter().chain(&to));
    let checksum = checksum(&out[ip..ip + 20]).to_be_bytes();
    out[ip + 10..ip + 12].copy_from_slice(&checksum);
    out.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
    out.extend(seq.to_be_bytes());
    out.extend(ack.to_be_bytes());
    // 20 bytes, PSH and ACK, no checksum: the data that it would cover is not there.
    out.extend([0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use vcp_core::pcapng::{ENHANCED_PACKET, INTERFACE, SECTION_HEADER};

    use super::super::Recorder;
    use super::*;

    /// Walks the blocks as the draft says; returns type and body of each.
    fn blocks(mut file: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let mut found = Vec::new();
        while !file.is_empty() {
            let (kind, len) = (word(file, 0), word(file, 4) as usize);
            assert!(len.is_multiple_of(4) && len >= 12 && len <= file.len(), "{kind:#x} of {len} bytes");
            assert_eq!(word(file, len - 4) as usize, len, "both lengths are the same");
            found.push((kind, file[8..len - 4].to_vec()));
            file = &file[len..];
        }
        found
    }

    #[test]
    fn blocks_are_whole_and_sequence_numbers_go_on() {
        let start = Instant::now();
        let mut recorder = Recorder::new(8, true);
        let pdu = |opcode: u8, len: u32| {
            let mut header = [0; 48];
            header[0] = opcode;
            header[5..8].copy_from_slice(&len.to_be_bytes()[1..]);
            header
        };
        recorder.sent(&pdu(0x01, 5), b"hello", start + Duration::from_nanos(7));
        recorder.received(&pdu(0x25, 100_000), start + Duration::from_micros(9));
        recorder.received_data(&[0xaa; 100]);
        recorder.sent(&pdu(0x00, 0), &[], start);
        let wall = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let about = About { comment: "why".into(), at_the_end: Some("lost".into()), clock: (start, wall) };
        let blocks = blocks(&write(&recorder.snapshot(), &about));
        let kinds: Vec<u32> = blocks.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [SECTION_HEADER, INTERFACE, ENHANCED_PACKET, ENHANCED_PACKET, ENHANCED_PACKET]);
        let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let facts = |n: usize| {
            let body = &blocks[2 + n].1;
            let at_ns = u64::from(word(body, 4)) << 32 | u64::from(word(body, 8));
            let seq = u32::from_be_bytes(body[20 + 38..20 + 42].try_into().unwrap());
            let ack = u32::from_be_bytes(body[20 + 42..20 + 46].try_into().unwrap());
            (at_ns - 1_800_000_000_000_000_000, word(body, 12), word(body, 16), seq, ack)
        };
        assert_eq!(facts(0), (7, 54 + 53, 54 + 56, 1, 1));
        assert_eq!(facts(1), (9000, 54 + 48 + 32, 54 + 100_048, 1, 57));
        assert_eq!(facts(2), (0, 54 + 48, 54 + 48, 57, 100_049));
        let text = |n: usize| String::from_utf8_lossy(&blocks[n].1).into_owned();
        assert!(text(0).contains("why") && text(4).contains("lost") && !text(3).contains("lost"));
        assert_eq!(&blocks[3].1[20 + 16..20 + 18], [0, 0], "longer than IPv4 can say");
    }

    #[test]
    fn an_empty_recorder_makes_an_empty_capture() {
        let about =
            About { comment: String::new(), at_the_end: None, clock: (Instant::now(), SystemTime::now()) };
        assert_eq!(blocks(&write(&[], &about)).len(), 2);
    }

    #[test]
    fn the_checksum_is_the_one_of_the_rfc() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
