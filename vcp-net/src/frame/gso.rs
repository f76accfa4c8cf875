//! Finishing in software what a sender left to do and a receiver does not take: checksums, segmentation of TCP (TSO) and
//! of UDP (USO).
//!
//! The payload is not copied here: each piece is headers of its own in front of a range of the sender's frame.

use super::checksum::{finish, finish_udp, fold, sum};
use super::layers::{HEADERS_BYTES, Layers, TCP, UDP};
use super::vnet::{Gso, Offloads, VnetHeader};
use super::{OutFrame, ether};

/// Most segments of a frame: what the longest frame makes at the smallest segment size that Linux uses. It bounds the
/// work that a guest can cause with one frame.
pub const MAX_SEGMENTS: usize = 2048;

/// TCP flags that not every segment keeps.
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// All pieces were taken.
    Done,
    /// The piece of this number was not taken, nor any behind it.
    Stopped(u32),
    /// It cannot be finished: its metadata does not go with its bytes.
    Malformed(&'static str),
}

/// Checks the metadata of a frame that is to be cut into segments: a receiver must be able to rely on it. `ethertype` is
/// the type of the network header at `l3_at`.
///
/// # Errors
/// What is wrong with it.
pub fn check(out: &OutFrame<'_>, ethertype: u16, l3_at: usize) -> Result<(), &'static str> {
    let mut head = [0; HEADERS_BYTES];
    let len = out.copy_to(0, &mut head);
    plan(out, &head[..len], ethertype, l3_at).map(drop)
}

/// How a frame is cut.
struct Plan {
    layers: Layers,
    /// Bytes of all headers.
    headers: usize,
    csum_offset: usize,
    gso_size: usize,
    segments: usize,
}

fn plan(out: &OutFrame<'_>, head: &[u8], ethertype: u16, l3_at: usize) -> Result<Plan, &'static str> {
    let meta = &out.meta;
    let kind = meta.gso().ok_or("a kind of segmentation that is not known")?;
    if !meta.needs_csum() {
        return Err("segmentation without a checksum to fill in");
    }
    let layers = Layers::find(head, ethertype, l3_at).ok_or("segmentation of what is not IP")?;
    let (v6, protocol, csum_offset) = match kind {
        Gso::Tcp4 => (false, TCP, 16),
        Gso::Tcp6 => (true, TCP, 16),
        Gso::Udp => (layers.v6, UDP, 6),
    };
    if layers.v6 != v6 || layers.protocol != protocol || layers.fragment {
        return Err("segmentation of another protocol than the frame has");
    }
    if usize::from(meta.csum_start) != layers.l4_at || usize::from(meta.csum_offset) != csum_offset {
        return Err("a checksum in another place than the protocol has it");
    }
    let headers = layers.headers_bytes(head).ok_or("headers that are too short or too long")?;
    let payload = out.total_bytes().saturating_sub(headers);
    let gso_size = usize::from(meta.gso_size);
    if gso_size == 0 || headers < out.prefix.len() {
        return Err("segments of no length");
    }
    let segments = payload.div_ceil(gso_size).max(1);
    if segments > MAX_SEGMENTS {
        return Err("too many segments");
    }
    Ok(Plan { layers, headers, csum_offset, gso_size, segments })
}

/// Finishes `out` for a receiver that takes `offloads`, and gives the pieces from number `from` on to `put`, which says
/// whether it took one. `ethertype` is the type of the network header at `l3_at`.
pub fn finish_frame(
    out: &OutFrame<'_>,
    ethertype: u16,
    l3_at: usize,
    offloads: Offloads,
    from: u32,
    put: &mut impl FnMut(&OutFrame<'_>) -> bool,
) -> Finished {
    let mut head = [0; HEADERS_BYTES];
    let len = out.copy_to(0, &mut head);
    if out.meta.is_gso() {
        return match plan(out, &head[..len], ethertype, l3_at) {
            Ok(plan) => segment(out, head, &plan, offloads, from, put),
            Err(why) => Finished::Malformed(why),
        };
    }
    let taken = if out.meta.needs_csum() && !offloads.csum {
        match fill_in(out, &mut head, len) {
            Ok(done) => put(&done),
            Err(why) => return Finished::Malformed(why),
        }
    } else {
        put(out)
    };
    if taken { Finished::Done } else { Finished::Stopped(0) }
}

/// Fills in the checksum of a frame that lacks nothing else. The checksum field has the sum of the pseudo header.
fn fill_in<'a>(
    out: &OutFrame<'a>,
    head: &'a mut [u8; HEADERS_BYTES],
    len: usize,
) -> Result<OutFrame<'a>, &'static str> {
    let start = usize::from(out.meta.csum_start);
    let at = start + usize::from(out.meta.csum_offset);
    if at + 2 > len {
        return Err("a checksum outside of the headers");
    }
    // Halves of even length, so that their sums add up.
    let split = len - (len - start) % 2;
    let behind = out.total_bytes() - split;
    let total =
        out.frame.sum(out.skip + split.saturating_sub(out.prefix.len()), behind, sum(&head[start..split]));
    let sum = if out.meta.csum_offset == 6 { finish_udp(total) } else { finish(total) };
    head[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    let prefix = (at + 2).max(out.prefix.len());
    Ok(OutFrame {
        meta: VnetHeader::default(),
        prefix: &head[..prefix],
        frame: out.frame,
        skip: out.skip + prefix - out.prefix.len(),
        len_bytes: out.total_bytes() - prefix,
    })
}

fn segment(
    out: &OutFrame<'_>,
    head: [u8; HEADERS_BYTES],
    plan: &Plan,
    offloads: Offloads,
    from: u32,
    put: &mut impl FnMut(&OutFrame<'_>) -> bool,
) -> Finished {
    let &Plan { layers, headers, csum_offset, gso_size, segments } = plan;
    let Layers { v6, l3_at, l4_at, protocol, .. } = layers;
    let payload = out.total_bytes() - headers;
    let payload_at = out.skip + headers - out.prefix.len();
    let word = |head: &[u8; HEADERS_BYTES], at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
    let first_id = word(&head, l3_at + 4);
    let first_seq = u32::from_be_bytes([head[l4_at + 4], head[l4_at + 5], head[l4_at + 6], head[l4_at + 7]]);
    for at in from as usize..segments {
        let offset = at * gso_size;
        let len = gso_size.min(payload - offset);
        let mut head = head;
        let mut set = |at: usize, word: u16| head[at..at + 2].copy_from_slice(&word.to_be_bytes());
        if v6 {
            set(l3_at + 4, (headers - l3_at - 40 + len) as u16);
        } else {
            set(l3_at + 2, (headers - l3_at + len) as u16);
            set(l3_at + 4, first_id.wrapping_add(at as u16));
            set(l3_at + 10, 0);
            let sum = finish(sum(&head[l3_at..l4_at]));
            head[l3_at + 10..l3_at + 12].copy_from_slice(&sum.to_be_bytes());
        }
        if protocol == TCP {
            let seq = first_seq.wrapping_add(offset as u32);
            head[l4_at + 4..l4_at + 8].copy_from_slice(&seq.to_be_bytes());
            if at + 1 != segments {
                head[l4_at + 13] &= !(FIN | PSH);
            }
            if at != 0 {
                head[l4_at + 13] &= !CWR;
            }
        } else {
            head[l4_at + 4..l4_at + 6].copy_from_slice(&((8 + len) as u16).to_be_bytes());
        }
        let sum_at = l4_at + csum_offset;
        head[sum_at..sum_at + 2].fill(0);
        let pseudo = layers.pseudo_sum(&head, headers - l4_at + len);
        let (checksum, meta) = if offloads.csum {
            (fold(pseudo), VnetHeader::partial(l4_at, csum_offset as u16))
        } else {
            // Headers of TCP and UDP have even lengths: the sums add up.
            let total = out.frame.sum(payload_at + offset, len, pseudo + sum(&head[l4_at..headers]));
            let sum = if protocol == UDP { finish_udp(total) } else { finish(total) };
            (sum, VnetHeader::default())
        };
        head[sum_at..sum_at + 2].copy_from_slice(&checksum.to_be_bytes());
        let piece = OutFrame {
            meta,
            prefix: &head[..headers],
            frame: out.frame,
            skip: payload_at + offset,
            len_bytes: len,
        };
        if !put(&piece) {
            return Finished::Stopped(at as u32);
        }
    }
    Finished::Done
}

/// Whether a frame of this type is IPv6, as far as [`Offloads::take`] needs to know.
#[must_use]
pub fn is_v6(ethertype: u16) -> bool {
    ethertype == ether::IPV6
}

#[cfg(test)]
#[path = "gso_test.rs"]
mod tests;
