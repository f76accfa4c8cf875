//! Blocks of a pcapng file (draft-ietf-opsawg-pcapng): what VCPs write of what passed. Bytes into a vector; no file.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Type of the block that begins a file.
pub const SECTION_HEADER: u32 = 0x0A0D_0D0A;
/// Type of the block that describes an interface.
pub const INTERFACE: u32 = 1;
/// Type of a packet's block.
pub const ENHANCED_PACKET: u32 = 6;
/// `LINKTYPE_ETHERNET`.
pub const ETHERNET: u16 = 1;
/// `epb_flags`: received by the interface, sent by it.
pub const INBOUND: u32 = 1;
/// See [`INBOUND`].
pub const OUTBOUND: u32 = 2;

const OPT_COMMENT: u16 = 1;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;
const EPB_DROPCOUNT: u16 = 4;

/// The beginning of a file: why it was written, and by what.
pub fn section(out: &mut Vec<u8>, comment: &str, application: &str) {
    block(out, SECTION_HEADER, |body| {
        // Byte order, version 1.0, length not told.
        body.extend(0x1A2B_3C4D_u32.to_le_bytes());
        body.extend([1, 0, 0, 0]);
        body.extend(u64::MAX.to_le_bytes());
        option(body, OPT_COMMENT, comment.as_bytes());
        option(body, SHB_USERAPPL, application.as_bytes());
        option(body, 0, &[]);
    });
}

/// An interface, whose times are nanoseconds; they are numbered in their order.
pub fn interface(out: &mut Vec<u8>, link_type: u16, name: Option<&str>) {
    block(out, INTERFACE, |body| {
        body.extend(link_type.to_le_bytes());
        body.extend([0; 6]);
        if let Some(name) = name {
            option(body, IF_NAME, name.as_bytes());
        }
        option(body, IF_TSRESOL, &[9]);
        option(body, 0, &[]);
    });
}

/// What stands beside a packet's bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Packet<'a> {
    /// Number of its interface.
    pub interface: u32,
    /// Nanoseconds since 1970.
    pub at_ns: u64,
    /// Its length before anything was cut off.
    pub original_bytes: usize,
    /// [`INBOUND`], [`OUTBOUND`]; 0: not told.
    pub flags: u32,
    /// Packets that should stand before it and do not.
    pub lost: u64,
    /// For people.
    pub comment: Option<&'a str>,
}

/// A packet, of which `fill` appends `there` bytes.
pub fn packet(out: &mut Vec<u8>, packet: &Packet<'_>, there: usize, fill: impl FnOnce(&mut Vec<u8>)) {
    block(out, ENHANCED_PACKET, |body| {
        body.extend(packet.interface.to_le_bytes());
        body.extend(((packet.at_ns >> 32) as u32).to_le_bytes());
        body.extend((packet.at_ns as u32).to_le_bytes());
        body.extend((there as u32).to_le_bytes());
        body.extend((packet.original_bytes as u32).to_le_bytes());
        fill(body);
        pad(body, there);
        let mut any = false;
        if let Some(comment) = packet.comment {
            option(body, OPT_COMMENT, comment.as_bytes());
            any = true;
        }
        if packet.flags != 0 {
            option(body, EPB_FLAGS, &packet.flags.to_le_bytes());
            any = true;
        }
        if packet.lost != 0 {
            option(body, EPB_DROPCOUNT, &packet.lost.to_le_bytes());
            any = true;
        }
        if any {
            option(body, 0, &[]);
        }
    });
}

/// A block: type, length, what `build` makes of it, length.
fn block(out: &mut Vec<u8>, kind: u32, build: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend(kind.to_le_bytes());
    out.extend([0; 4]);
    build(out);
    let len = ((out.len() - start + 4) as u32).to_le_bytes();
    out[start + 4..start + 8].copy_from_slice(&len);
    out.extend(len);
}

fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    // The length has 16 bits.
    let value = &value[..value.len().min(4096)];
    out.extend(code.to_le_bytes());
    out.extend((value.len() as u16).to_le_bytes());
    out.extend(value);
    pad(out, value.len());
}

/// To a multiple of four.
fn pad(out: &mut Vec<u8>, len: usize) {
    out.extend([0; 3].iter().take(len.next_multiple_of(4) - len));
}

/// Nanoseconds since 1970 of `at`; the two of `clock` are one moment on both clocks.
#[must_use]
pub fn wall_ns(at: Instant, (instant, wall): (Instant, SystemTime)) -> u64 {
    let wall = match instant.checked_duration_since(at) {
        Some(before) => wall.checked_sub(before),
        None => wall.checked_add(at.duration_since(instant)),
    };
    let since = wall.and_then(|wall| wall.duration_since(UNIX_EPOCH).ok()).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_their_lengths_at_both_ends_and_options_an_end() {
        let mut file = Vec::new();
        section(&mut file, "why", "test");
        interface(&mut file, ETHERNET, Some("port0"));
        let about =
            Packet { flags: OUTBOUND, lost: 3, comment: Some("odd"), original_bytes: 9, ..Packet::default() };
        packet(&mut file, &about, 5, |out| out.extend(b"hello"));
        packet(&mut file, &Packet::default(), 0, |_| {});
        let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize;
        let (mut at, mut kinds) = (0, Vec::new());
        while at < file.len() {
            let len = word(at + 4);
            assert!(len.is_multiple_of(4) && word(at + len - 4) == len);
            kinds.push((word(at) as u32, len));
            at += len;
        }
        let kinds: Vec<(u32, usize)> = kinds;
        assert_eq!(kinds[2], (ENHANCED_PACKET, 12 + 20 + 8 + 8 + 8 + 12 + 4));
        assert_eq!((kinds[0].0, kinds[1].0, kinds[3]), (SECTION_HEADER, INTERFACE, (ENHANCED_PACKET, 32)));
        assert_eq!(at, file.len());
    }

    #[test]
    fn a_moment_is_the_same_on_both_clocks() {
        let clock = (Instant::now(), UNIX_EPOCH + Duration::from_secs(5));
        assert_eq!(wall_ns(clock.0, clock), 5_000_000_000);
        assert_eq!(wall_ns(clock.0 + Duration::from_nanos(7), clock), 5_000_000_007);
        assert_eq!(wall_ns(clock.0 - Duration::from_secs(1), clock), 4_000_000_000);
    }
}
