//! What a port may send: its VLANs, its addresses, its rate.

use std::time::Instant;

use super::account::Reason;
use super::line::Sender;
use super::table::MacTable;
use super::work::{Fate, Item, PortId, Work};
use crate::frame::gso::MAX_SEGMENTS;
use crate::port::{Rate, Vlan};

/// The longest burst that a rate allows, as a part of a second.
const BURST_PART: u64 = 20;
/// Smallest burst in bytes: the longest frame fits.
const BURST_BYTES: u64 = 128 << 10;
/// And in frames: the longest row of segments fits.
const BURST_FRAMES: u64 = MAX_SEGMENTS as u64;

/// A bucket of tokens that fills with time.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    per_s: u64,
    size: u64,
    tokens: u64,
    at: Instant,
}

impl Bucket {
    fn new(per_s: u64, least: u64, now: Instant) -> Self {
        let size = (per_s / BURST_PART).max(least);
        Self { per_s, size, tokens: size, at: now }
    }

    fn fill(&mut self, now: Instant) {
        let ns = now.saturating_duration_since(self.at).as_nanos().min(1_000_000_000) as u64;
        let more = (u128::from(self.per_s) * u128::from(ns) / 1_000_000_000) as u64;
        if more != 0 {
            self.tokens = self.tokens.saturating_add(more).min(self.size);
            self.at = now;
        }
    }
}

/// The rate limits of one port.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limiter {
    bytes: Option<Bucket>,
    frames: Option<Bucket>,
}

impl Limiter {
    /// As `rate` says, from now on.
    #[must_use]
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self {
            bytes: rate.bytes.map(|per_s| Bucket::new(per_s, BURST_BYTES, now)),
            frames: rate.frames.map(|per_s| Bucket::new(per_s, BURST_FRAMES, now)),
        }
    }

    fn is_off(&self) -> bool {
        self.bytes.is_none() && self.frames.is_none()
    }

    fn begin(&mut self, now: Instant) {
        self.bytes.iter_mut().chain(&mut self.frames).for_each(|bucket| bucket.fill(now));
    }

    /// Takes what a frame costs, if it is there.
    fn take(&mut self, item: &Item) -> bool {
        let (bytes, frames) = cost(item);
        let has = |bucket: &Option<Bucket>, cost| bucket.is_none_or(|bucket| bucket.tokens >= cost);
        if !has(&self.bytes, bytes) || !has(&self.frames, frames) {
            return false;
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.tokens -= bytes;
        }
        if let Some(bucket) = &mut self.frames {
            bucket.tokens -= frames;
        }
        true
    }

    /// Gives back what a frame cost that was not sent after all.
    fn put_back(&mut self, item: &Item) {
        let (bytes, frames) = cost(item);
        for (bucket, cost) in [(&mut self.bytes, bytes), (&mut self.frames, frames)] {
            if let Some(bucket) = bucket {
                bucket.tokens = bucket.tokens.saturating_add(cost).min(bucket.size);
            }
        }
    }
}

/// Bytes and frames; a row of segments is as many frames as it makes.
fn cost(item: &Item) -> (u64, u64) {
    let bytes = u64::from(item.len_bytes);
    let frames = if item.meta.is_gso() { bytes.div_ceil(u64::from(item.meta.gso_size.max(1))) } else { 1 };
    (bytes, frames)
}

/// See the module.
#[derive(Debug, Default)]
pub struct Police {
    /// Frames that were looked at.
    pub seen: u64,
}

impl Police {
    /// Decides about a burst that came from `port`.
    #[inline]
    pub fn run(
        &mut self,
        work: &mut Work,
        port: PortId,
        sender: &mut Sender,
        table: &MacTable,
        now: Instant,
    ) {
        self.seen += work.items().len() as u64;
        let limited = !sender.limiter.is_off();
        if limited {
            sender.limiter.begin(now);
        }
        if !sender.spec.link {
            work.open().for_each(|item| item.fate = Fate::Drop(Reason::LinkDown));
            return;
        }
        let plain = sender.is_plain() && !table.has_fixed();
        for item in work.open() {
            // The usual port: any VLAN as it comes, any address.
            if plain && item.ether.tag.is_none() {
                if !item.ether.src.is_station() {
                    item.fate = Fate::Drop(Reason::BadSource);
                    continue;
                }
            } else if let Err(reason) = admit(item, port, sender, table) {
                item.fate = Fate::Drop(reason);
                continue;
            }
            if limited && !sender.limiter.take(item) {
                item.fate = Fate::Drop(Reason::RateLimit);
            }
        }
    }

    /// Decides about a burst that came from an uplink: it may send what it likes, except from addresses that belong to
    /// ports.
    pub fn run_uplink(&mut self, work: &mut Work, port: PortId, table: &MacTable) {
        self.seen += work.items().len() as u64;
        for item in work.open() {
            let vid = item.ether.tag.map_or(0, crate::frame::Tci::vid);
            item.vid = if vid == 0xfff { 0 } else { vid };
            let owner = if table.has_fixed() {
                table.owner(item.vid, item.ether.src).or_else(|| table.owner(0, item.ether.src))
            } else {
                None
            };
            if !item.ether.src.is_station() {
                item.fate = Fate::Drop(Reason::BadSource);
            } else if owner.is_some_and(|owner| owner != port) {
                item.fate = Fate::Drop(Reason::Spoofed);
            }
        }
    }

    /// The frames from number `from` on stay with their sender: they cost nothing yet.
    pub fn undo(&mut self, work: &Work, from: usize, sender: &mut Sender) {
        if sender.limiter.is_off() {
            return;
        }
        for item in work.items().iter().skip(from) {
            if item.fate != Fate::Drop(Reason::RateLimit) {
                sender.limiter.put_back(item);
            }
        }
    }
}

fn admit(item: &mut Item, port: PortId, sender: &Sender, table: &MacTable) -> Result<(), Reason> {
    if !item.ether.src.is_station() {
        return Err(Reason::BadSource);
    }
    item.vid = vlan_of(item, &sender.spec.vlan).ok_or(Reason::Vlan)?;
    let owner = table.owner(item.vid, item.ether.src).or_else(|| table.owner(0, item.ether.src));
    match owner {
        Some(owner) if owner != port => Err(Reason::Spoofed),
        Some(_) => Ok(()),
        None if sender.spec.protect => Err(Reason::Spoofed),
        None => Ok(()),
    }
}

/// The VLAN that a frame is in, if its port is in it.
fn vlan_of(item: &Item, vlan: &Vlan) -> Option<u16> {
    let tagged = item.ether.tag.map(crate::frame::Tci::vid).filter(|&vid| vid != 0);
    match (vlan, tagged) {
        (Vlan::Access(own), None) => Some(*own),
        (Vlan::Access(own), Some(vid)) => (vid == *own).then_some(vid),
        (Vlan::Trunk { native, .. }, None) => *native,
        (Vlan::Trunk { allowed, .. }, Some(vid)) => {
            (vid != 0xfff && (allowed.is_empty() || allowed.contains(&vid))).then_some(vid)
        }
    }
}
