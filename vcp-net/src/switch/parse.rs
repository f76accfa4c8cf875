//! The first operation: reads the header in front of a frame and the Ethernet header, and refuses what is no frame.

use super::account::Reason;
use super::work::{Fate, Frames, Work};
use crate::frame::ether::{ETHER_BYTES, Ether, IPV6, TAG_BYTES};
use crate::frame::vnet::SHORT_HEADER_BYTES;
use crate::frame::{MAX_FRAME_BYTES, Offloads, OutFrame, VnetHeader, gso};

/// Bytes of a frame that are looked at.
const HEAD_BYTES: usize = ETHER_BYTES + TAG_BYTES;

/// See the module.
#[derive(Debug, Default)]
pub struct Parse {
    /// Frames that were left to be finished.
    pub unfinished: u64,
}

impl Parse {
    /// Reads all frames of a burst. `host` is what the sender may leave to others; without any, headers are not read:
    /// such a driver has nothing to say in them.
    #[inline]
    pub fn run(&mut self, work: &mut Work, frames: &Frames<'_>, host: Option<Offloads>) {
        work.begin(frames.len());
        for (at, item) in work.items_mut().iter_mut().enumerate() {
            item.meta = VnetHeader::default();
            item.fate = Fate::Open;
            item.vid = 0;
            let frame = match *frames {
                Frames::Ring(batch, header) => {
                    let chain = batch.frame(at);
                    if chain.len_bytes() < header + ETHER_BYTES {
                        item.len_bytes = 0;
                        item.fate = Fate::Drop(Reason::TooShort);
                        continue;
                    }
                    if host.is_some() {
                        let mut bytes = [0; SHORT_HEADER_BYTES];
                        chain.copy_to(0, &mut bytes);
                        item.meta = VnetHeader::parse(&bytes);
                        // Anything else in the flags is not a driver's to say.
                        item.meta.flags &= crate::frame::vnet::NEEDS_CSUM;
                    }
                    OutFrame::whole(item.meta, chain.skip(header))
                }
                Frames::One(frame) => {
                    item.meta = frame.meta;
                    *frame
                }
            };
            let len = frame.total_bytes();
            item.len_bytes = len as u32;
            if len > MAX_FRAME_BYTES {
                item.fate = Fate::Drop(Reason::TooLong);
                continue;
            }
            let mut head = [0; HEAD_BYTES];
            if frame.prefix.is_empty() && len >= HEAD_BYTES {
                frame.frame.copy_to(frame.skip, &mut head);
            } else {
                frame.copy_to(0, &mut head);
            }
            match Ether::parse(&head, len) {
                Some(ether) => item.ether = ether,
                None => {
                    item.fate = Fate::Drop(Reason::TooShort);
                    continue;
                }
            }
            if !item.meta.is_plain() {
                self.unfinished += 1;
                let host = host.unwrap_or(Offloads::ALL);
                if !Self::is_good(&frame, &item.ether, host) {
                    item.fate = Fate::Drop(Reason::BadHeader);
                }
            }
        }
    }

    /// Whether a receiver can rely on what a header says.
    #[cold]
    fn is_good(frame: &OutFrame<'_>, ether: &Ether, host: Offloads) -> bool {
        let meta = &frame.meta;
        if !host.take(meta, ether.ethertype == IPV6) {
            return false;
        }
        if meta.is_gso() {
            return gso::check(frame, ether.ethertype, ether.len_bytes.into()).is_ok();
        }
        let at = usize::from(meta.csum_start) + usize::from(meta.csum_offset);
        usize::from(meta.csum_start) >= usize::from(ether.len_bytes) && at + 2 <= frame.total_bytes()
    }
}
