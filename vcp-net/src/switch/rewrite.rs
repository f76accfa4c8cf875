//! What changes in a frame between two ports: its VLAN tag.

use super::account::Reason;
use super::work::Item;
use crate::frame::ether::{TAG_BYTES, VLAN};
use crate::frame::layers::HEADERS_BYTES;
use crate::frame::{OutFrame, Tci};
use crate::port::Vlan;

/// Bytes of both addresses.
const ADDRESSES: usize = 12;

/// See the module.
#[derive(Debug, Default)]
pub struct Rewrite {
    /// Tags put in.
    pub tagged: u64,
    /// Tags taken out.
    pub untagged: u64,
    /// Tags changed.
    pub retagged: u64,
}

/// Room for the part of a frame that is written anew: a tag, and what an uplink had put in front of its frame.
pub type Head = [u8; HEADERS_BYTES + TAG_BYTES];

impl Rewrite {
    /// The frame as it goes to a port with these VLANs, with its network header's place; `head` holds what is new.
    ///
    /// # Errors
    /// The port is not in the frame's VLAN.
    #[inline]
    pub fn run<'a>(
        &mut self,
        item: &Item,
        frame: OutFrame<'a>,
        vlan: &Vlan,
        head: &'a mut Head,
    ) -> Result<(OutFrame<'a>, usize), Reason> {
        let tag = tag_for(item, vlan).ok_or(Reason::TargetVlan)?;
        let l3_at = usize::from(item.ether.len_bytes);
        if tag == item.ether.tag {
            return Ok((frame, l3_at));
        }
        frame.copy_to(0, &mut head[..ADDRESSES]);
        let had = if item.ether.tag.is_some() { TAG_BYTES } else { 0 };
        let has = if tag.is_some() { TAG_BYTES } else { 0 };
        match (item.ether.tag, tag) {
            (None, _) => self.tagged += 1,
            (_, None) => self.untagged += 1,
            _ => self.retagged += 1,
        }
        if let Some(Tci(tci)) = tag {
            head[ADDRESSES..ADDRESSES + 2].copy_from_slice(&VLAN.to_be_bytes());
            head[ADDRESSES + 2..ADDRESSES + 4].copy_from_slice(&tci.to_be_bytes());
        }
        // What an uplink had put in front of its frame goes on behind the tag.
        let rest = frame.prefix.get(ADDRESSES + had..).unwrap_or(&[]);
        if !frame.prefix.is_empty() && frame.prefix.len() < ADDRESSES + had
            || rest.len() > HEADERS_BYTES - ADDRESSES
        {
            return Err(Reason::Unfinishable);
        }
        let new = ADDRESSES + has + rest.len();
        head[ADDRESSES + has..new].copy_from_slice(rest);
        let skip = if frame.prefix.is_empty() { ADDRESSES + had } else { 0 };
        let moved = has as i16 - had as i16;
        let out = OutFrame {
            meta: frame.meta.shifted(moved),
            prefix: &head[..new],
            frame: frame.frame,
            skip: frame.skip + skip,
            len_bytes: frame.len_bytes - skip,
        };
        Ok((out, l3_at - had + has))
    }
}

/// The tag with which a frame goes to a port (none, or one), if it may go there.
#[inline]
fn tag_for(item: &Item, vlan: &Vlan) -> Option<Option<Tci>> {
    match vlan {
        Vlan::Access(own) => (item.vid == *own).then_some(None),
        Vlan::Trunk { native, .. } if *native == Some(item.vid) => Some(None),
        Vlan::Trunk { allowed, .. } => {
            let is_in = item.vid != 0 && (allowed.is_empty() || allowed.contains(&item.vid));
            is_in.then(|| Some(item.tci().with_vid(item.vid)))
        }
    }
}
