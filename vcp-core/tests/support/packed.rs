//! The driver's side of a packed virtqueue (VIRTIO 1.2, 2.8), for tests: it can follow the rules and break them.
#![allow(dead_code, unreachable_pub)] // Each test uses its own part.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vcp_core::mem::GuestMap;
use vcp_core::queue::RingAddresses;
use vm_memory::{Bytes, GuestAddress};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const AVAIL: u16 = 1 << 7;
pub const USED: u16 = 1 << 15;

/// A packed virtqueue seen from the driver.
#[derive(Debug)]
pub struct PackedDriver {
    pub map: Arc<GuestMap>,
    pub at: RingAddresses,
    pub event_idx: bool,
    /// Next slot to fill, and its wrap counter.
    pub avail: (u16, bool),
    /// Next slot to look at, and its wrap counter.
    pub used: (u16, bool),
    free_ids: Vec<u16>,
    free_slots: u16,
    /// Slots of each outstanding buffer, by its ID.
    outstanding: Vec<Option<u16>>,
}

fn advance((index, wrap): (u16, bool), by: u16, size: u16) -> (u16, bool) {
    if index + by >= size { (index + by - size, !wrap) } else { (index + by, wrap) }
}

impl PackedDriver {
    /// A ring of `size` entries from `base` on.
    pub fn new(map: &Arc<GuestMap>, base: u64, size: u16, event_idx: bool) -> Self {
        let avail = base + 16 * u64::from(size);
        let at = RingAddresses { size, desc: base, avail, used: avail + 4 };
        for at in (base..avail + 8).step_by(8) {
            map.write_obj(0u64, GuestAddress(at)).unwrap();
        }
        Self {
            map: Arc::clone(map),
            at,
            event_idx,
            avail: (0, true),
            used: (0, true),
            free_ids: (0..size).rev().collect(),
            free_slots: size,
            outstanding: vec![None; size.into()],
        }
    }

    /// `SET_VRING_BASE` as the driver knows it.
    pub fn base(&self) -> u32 {
        let bits = |(index, wrap): (u16, bool)| u32::from(index) | u32::from(wrap) << 15;
        bits(self.avail) | bits(self.used) << 16
    }

    fn slot(&self, index: u16, field: u64) -> GuestAddress {
        GuestAddress(self.at.desc + 16 * u64::from(index) + field)
    }

    /// Writes a descriptor as it is into a table.
    pub fn write_desc(&self, table: u64, index: u16, addr: u64, len: u32, id: u16, flags: u16) {
        let at = table + 16 * u64::from(index);
        self.map.write_obj(addr.to_le(), GuestAddress(at)).unwrap();
        self.map.write_obj(len.to_le(), GuestAddress(at + 8)).unwrap();
        self.map.write_obj(id.to_le(), GuestAddress(at + 12)).unwrap();
        self.map.store(flags.to_le(), GuestAddress(at + 14), Ordering::Release).unwrap();
    }

    pub fn flags(&self, index: u16) -> u16 {
        u16::from_le(self.map.load(self.slot(index, 14), Ordering::Acquire).unwrap())
    }

    fn available(wrap: bool) -> u16 {
        if wrap { AVAIL } else { USED }
    }

    /// Makes descriptors `(address, length, flags)` with buffer ID `id` available, without any check.
    pub fn offer(&mut self, id: u16, descs: &[(u64, u32, u16)]) {
        let first = self.avail;
        let mut at = first;
        for (n, &(addr, len, flags)) in descs.iter().enumerate() {
            // The first one's flags come last.
            let flags = if n == 0 { self.flags(at.0) } else { flags | Self::available(at.1) };
            self.write_desc(self.at.desc, at.0, addr, len, id, flags);
            at = advance(at, 1, self.at.size);
        }
        if let Some(&(.., flags)) = descs.first() {
            let flags = (flags | Self::available(first.1)).to_le();
            self.map.store(flags, self.slot(first.0, 14), Ordering::Release).unwrap();
        }
        self.avail = at;
    }

    /// A chain of `(address, length, writable)`; its buffer ID. `None` if there is no room.
    pub fn add(&mut self, buffers: &[(u64, u32, bool)]) -> Option<u16> {
        let num = buffers.len() as u16;
        if num > self.free_slots {
            return None;
        }
        let id = self.free_ids.pop()?;
        let last = buffers.len() - 1;
        let flags = |n, writable| if writable { WRITE } else { 0 } | if n == last { 0 } else { NEXT };
        let descs: Vec<_> = buffers
            .iter()
            .enumerate()
            .map(|(n, &(addr, len, writable))| (addr, len, flags(n, writable)))
            .collect();
        self.offer(id, &descs);
        self.hold(id, num);
        Some(id)
    }

    /// A chain in an indirect table at `table`; it takes one slot.
    pub fn add_indirect(&mut self, table: u64, buffers: &[(u64, u32, bool)]) -> Option<u16> {
        if self.free_slots == 0 {
            return None;
        }
        let id = self.free_ids.pop()?;
        for (n, &(addr, len, writable)) in buffers.iter().enumerate() {
            // 2.8.7: the other bits and the ID mean nothing here.
            let junk = NEXT | INDIRECT | AVAIL;
            self.write_desc(table, n as u16, addr, len, 0x5555, junk | if writable { WRITE } else { 0 });
        }
        self.offer(id, &[(table, 16 * buffers.len() as u32, INDIRECT)]);
        self.hold(id, 1);
        Some(id)
    }

    fn hold(&mut self, id: u16, num: u16) {
        self.free_slots -= num;
        self.outstanding[usize::from(id)] = Some(num);
    }

    /// Outstanding buffers.
    pub fn outstanding(&self) -> usize {
        self.outstanding.iter().flatten().count()
    }

    /// Whether the device wants a kick for what was added since `old` (2.8.10; as Linux computes it).
    pub fn needs_kick(&self, old: (u16, bool)) -> bool {
        fence(Ordering::SeqCst);
        let word: u32 = self.map.load(GuestAddress(self.at.used), Ordering::Relaxed).unwrap();
        let word = u32::from_le(word);
        let (off_wrap, flags) = (word as u16, (word >> 16) as u16);
        if flags != 2 {
            return flags != 1;
        }
        let added =
            if old.1 == self.avail.1 { self.avail.0 - old.0 } else { self.avail.0 + self.at.size - old.0 };
        let mut event = off_wrap & 0x7fff;
        if (off_wrap >> 15 != 0) != self.avail.1 {
            event = event.wrapping_sub(self.at.size);
        }
        self.avail.0.wrapping_sub(event).wrapping_sub(1) < added
    }

    /// Whether the next slot is used.
    pub fn has_used(&self) -> bool {
        let flags = self.flags(self.used.0);
        (flags & AVAIL != 0) == self.used.1 && (flags & USED != 0) == self.used.1
    }

    /// The next used element, if there is one: buffer ID and length. Its slots are free again.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let len = u32::from_le(self.map.read_obj(self.slot(self.used.0, 8)).unwrap());
        let id = u16::from_le(self.map.read_obj(self.slot(self.used.0, 12)).unwrap());
        let num = self.outstanding.get_mut(usize::from(id)).and_then(Option::take);
        let num = num.unwrap_or_else(|| panic!("used element for buffer {id}, which is not outstanding"));
        self.used = advance(self.used, num, self.at.size);
        self.free_slots += num;
        self.free_ids.push(id);
        Some((id, len))
    }

    /// Asks to be notified of the next used element, then looks; true if one is there already.
    pub fn arm(&self) -> bool {
        let place = self.used.0 | u16::from(self.used.1) << 15;
        let word = if self.event_idx { u32::from(place) | 2 << 16 } else { 0 };
        self.map.store(word.to_le(), GuestAddress(self.at.avail), Ordering::Relaxed).unwrap();
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Asks not to be notified.
    pub fn disarm(&self) {
        self.map.store((1u32 << 16).to_le(), GuestAddress(self.at.avail), Ordering::Relaxed).unwrap();
    }
}
