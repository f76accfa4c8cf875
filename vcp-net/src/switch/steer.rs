//! Which pair of queues a frame goes to: the one on which the driver sent the other direction of its flow (VIRTIO 1.2,
//! 5.1.6.5.6.1, automatic receive steering).

use super::work::{Frames, Work};
use crate::frame::OutFrame;
use crate::frame::layers::Layers;

/// Bytes of a frame that are looked at: the ports behind the longest usual headers.
const HEAD_BYTES: usize = 96;
/// Entries of a port's table. Flows that meet in one share their queue.
const FLOWS: usize = 256;

/// One port's table.
#[derive(Debug)]
pub struct Steer {
    pairs: Box<[u8; FLOWS]>,
}

impl Default for Steer {
    fn default() -> Self {
        Self { pairs: Box::new([0; FLOWS]) }
    }
}

impl Steer {
    /// The driver sent these frames on pair `pair`.
    pub fn sent(&mut self, work: &Work, frames: &Frames<'_>, pair: u16) {
        for (at, item) in work.items().iter().enumerate() {
            let flow = flow(&frames.get(at, item.meta), item.ether.ethertype, item.ether.len_bytes.into());
            self.pairs[flow] = pair as u8;
        }
    }

    /// The pair for a frame, among `pairs`.
    #[must_use]
    pub fn pair(&self, frame: &OutFrame<'_>, ethertype: u16, l3_at: usize, pairs: u16) -> u16 {
        u16::from(self.pairs[flow(frame, ethertype, l3_at)]) % pairs.max(1)
    }
}

/// A number that both directions of a flow have.
fn flow(frame: &OutFrame<'_>, ethertype: u16, l3_at: usize) -> usize {
    let mut head = [0; HEAD_BYTES];
    let len = frame.copy_to(0, &mut head);
    let head = &head[..len];
    let Some(layers) = Layers::find(head, ethertype, l3_at) else { return 0 };
    let (from, size) = if layers.v6 { (l3_at + 8, 16) } else { (l3_at + 12, 4) };
    let half = |at: usize| {
        head.get(at..at + size).unwrap_or(&[]).iter().fold(0u32, |sum, &b| sum.rotate_left(5) ^ u32::from(b))
    };
    let ports = match layers.protocol {
        6 | 17 if !layers.fragment => head.get(layers.l4_at..layers.l4_at + 4),
        _ => None,
    };
    let port = |at: usize| ports.map_or(0, |ports| u32::from(u16::from_be_bytes([ports[at], ports[at + 1]])));
    let sum = half(from) ^ half(from + size) ^ port(0) ^ port(2) ^ u32::from(layers.protocol);
    (sum.wrapping_mul(0x9e37_79b1) >> 24) as usize % FLOWS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::testing::Packet;

    #[test]
    fn both_directions_of_a_flow_meet() {
        for v6 in [false, true] {
            let there = Packet::new(v6, false, 10, 0, 7).bytes;
            let mut back = there.clone();
            let (at, size) = if v6 { (22, 16) } else { (26, 4) };
            back[at..at + size].copy_from_slice(&there[at + size..at + 2 * size]);
            back[at + size..at + 2 * size].copy_from_slice(&there[at..at + size]);
            let l4 = at + 2 * size;
            back[l4..l4 + 2].copy_from_slice(&there[l4 + 2..l4 + 4]);
            back[l4 + 2..l4 + 4].copy_from_slice(&there[l4..l4 + 2]);
            assert_ne!(there, back);
            let ethertype = u16::from_be_bytes([there[12], there[13]]);
            let flow = |bytes: &[u8]| flow(&OutFrame::of(Default::default(), bytes), ethertype, 14);
            assert_eq!(flow(&there), flow(&back));
        }
    }
}
