//! The driver's side of a virtqueue, split or packed, that stays as it is while backends come and go.
//!
//! Each request slot has a place of its own in memory, and its number names it in the ring: descriptors `3 * slot ..` of a
//! split ring, the buffer ID of a packed one. A used element for a slot that has nothing in flight is an error.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use anyhow::{Context, ensure};
use vm_memory::{AtomicAccess, Bytes, GuestAddress, GuestMemoryMmap};

use crate::Result;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Descriptors of a request.
const PARTS: u16 = 3;

/// A piece of a request's memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) writable: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ring {
    memory: Arc<GuestMemoryMmap>,
    packed: bool,
    size: u16,
    pub(super) desc: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    /// Next place to offer at and to look at; of a packed ring with their wrap counters.
    avail: (u16, bool),
    used: (u16, bool),
    /// Ring slots of what each request slot has in flight; 0: nothing.
    in_flight: Vec<u16>,
}

impl Ring {
    /// Bytes that a ring of `size` takes at most.
    pub(super) fn bytes(size: u16) -> u64 {
        (32 * u64::from(size) + 64).next_multiple_of(4096)
    }

    /// An empty ring of `size` (a power of two) in zeroed memory at `base`, for `slots` requests at once.
    pub(super) fn new(
        memory: &Arc<GuestMemoryMmap>,
        base: u64,
        size: u16,
        packed: bool,
        slots: usize,
    ) -> Self {
        let driver = base + 16 * u64::from(size);
        let split_device = (driver + 6 + 2 * u64::from(size)).next_multiple_of(4);
        Self {
            memory: Arc::clone(memory),
            packed,
            size,
            desc: base,
            driver,
            device: if packed { driver + 4 } else { split_device },
            avail: (0, true),
            used: (0, true),
            in_flight: vec![0; slots],
        }
    }

    fn load<T: AtomicAccess>(&self, addr: u64, order: Ordering) -> Result<T> {
        self.memory.load(GuestAddress(addr), order).context("ring memory")
    }

    fn store<T: AtomicAccess>(&self, addr: u64, value: T, order: Ordering) -> Result<()> {
        self.memory.store(value, GuestAddress(addr), order).context("ring memory")
    }

    /// Writes a descriptor but for its last two fields.
    fn write_desc(&self, at: u64, addr: u64, len: u32) -> Result<()> {
        self.store(at, addr.to_le(), Ordering::Relaxed)?;
        self.store(at + 8, len.to_le(), Ordering::Relaxed)
    }

    /// What `SET_VRING_BASE` says to the next backend: what QEMU can know after a crash, which of a packed ring is nothing.
    pub(super) fn base(&self) -> Result<u16> {
        if self.packed {
            Ok(1 << 15)
        } else {
            Ok(u16::from_le(self.load(self.device + 2, Ordering::Acquire)?))
        }
    }

    /// Whether anything is in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.iter().filter(|slots| **slots != 0).count()
    }

    /// Offers the request of `slot`, through an indirect table if it gets one; whether the device wants a kick.
    pub(super) fn offer(&mut self, slot: u16, parts: [Part; 3], table: Option<u64>) -> Result<bool> {
        let old = self.avail;
        let in_flight = &mut self.in_flight[usize::from(slot)];
        ensure!(*in_flight == 0, "slot {slot} is in flight");
        *in_flight = if table.is_some() { 1 } else { PARTS };
        if self.packed {
            self.offer_packed(slot, parts, table)?;
        } else {
            self.offer_split(slot, parts, table)?;
        }
        fence(Ordering::SeqCst);
        self.wants_kick(old)
    }

    fn offer_split(&mut self, slot: u16, parts: [Part; 3], table: Option<u64>) -> Result<()> {
        let head = PARTS * slot;
        // In an indirect table the indices start at 0.
        let (first_at, first_index) =
            table.map_or((self.desc + 16 * u64::from(head), head), |table| (table, 0));
        for (n, part) in (0u16..).zip(parts) {
            let at = first_at + 16 * u64::from(n);
            let flags = if part.writable { WRITE } else { 0 } | if n + 1 < PARTS { NEXT } else { 0 };
            self.write_desc(at, part.addr, part.len)?;
            self.store(at + 12, flags.to_le(), Ordering::Relaxed)?;
            self.store(at + 14, (first_index + n + 1).to_le(), Ordering::Relaxed)?;
        }
        if let Some(table) = table {
            let at = self.desc + 16 * u64::from(head);
            self.write_desc(at, table, 16 * u32::from(PARTS))?;
            self.store(at + 12, INDIRECT.to_le(), Ordering::Relaxed)?;
        }
        let index = self.avail.0;
        self.store(self.driver + 4 + 2 * u64::from(index % self.size), head.to_le(), Ordering::Relaxed)?;
        self.avail.0 = index.wrapping_add(1);
        self.store(self.driver + 2, self.avail.0.to_le(), Ordering::Release)
    }

    fn offer_packed(&mut self, slot: u16, parts: [Part; 3], table: Option<u64>) -> Result<()> {
        let mut descs: Vec<(u64, u32, u16)> = Vec::with_capacity(parts.len());
        if let Some(table) = table {
            for (n, part) in (0u64..).zip(parts) {
                self.write_desc(table + 16 * n, part.addr, part.len)?;
                let flags = if part.writable { WRITE } else { 0 };
                self.store(table + 16 * n + 14, flags.to_le(), Ordering::Relaxed)?;
            }
            descs.push((table, 16 * u32::from(PARTS), INDIRECT));
        } else {
            let flags =
                |n, part: &Part| if part.writable { WRITE } else { 0 } | if n + 1 < PARTS { NEXT } else { 0 };
            descs.extend((0u16..).zip(&parts).map(|(n, part)| (part.addr, part.len, flags(n, part))));
        }
        let mut first = None;
        for (addr, len, flags) in descs {
            let (index, wrap) = self.avail;
            let at = self.desc + 16 * u64::from(index);
            let flags = flags | if wrap { AVAIL } else { USED };
            self.write_desc(at, addr, len)?;
            self.store(at + 12, slot.to_le(), Ordering::Relaxed)?;
            // The first one's flags come last.
            match first {
                None => first = Some((at + 14, flags)),
                Some(_) => self.store(at + 14, flags.to_le(), Ordering::Release)?,
            }
            self.avail = self.after(self.avail, 1);
        }
        let (at, flags) = first.context("a request has parts")?;
        self.store(at, flags.to_le(), Ordering::Release)
    }

    fn after(&self, (index, wrap): (u16, bool), by: u16) -> (u16, bool) {
        if index + by >= self.size { (index + by - self.size, !wrap) } else { (index + by, wrap) }
    }

    /// Whether the device wants a kick for what was offered since `old` (2.7.10 and 2.8.10, with EVENT_IDX).
    fn wants_kick(&self, old: (u16, bool)) -> Result<bool> {
        if !self.packed {
            let event: u16 = self.load(self.device + 4 + 8 * u64::from(self.size), Ordering::Relaxed)?;
            let (new, event) = (self.avail.0, u16::from_le(event));
            return Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old.0));
        }
        let word = u32::from_le(self.load(self.device, Ordering::Relaxed)?);
        let (place, flags) = (word as u16, (word >> 16) as u16);
        if flags != 2 {
            return Ok(flags != 1);
        }
        let lap = if old.1 == self.avail.1 { 0 } else { self.size };
        let behind = if (place >> 15 != 0) == self.avail.1 { 0 } else { self.size };
        let event = (place & 0x7fff).wrapping_sub(behind);
        Ok(self.avail.0.wrapping_sub(event).wrapping_sub(1) < self.avail.0 + lap - old.0)
    }

    /// The slot of the next used element, if there is one, and the bytes written.
    pub(super) fn take_used(&mut self) -> Result<Option<(u16, u32)>> {
        if !self.has_used()? {
            return Ok(None);
        }
        let (slot, len) = if self.packed {
            let at = self.desc + 16 * u64::from(self.used.0);
            (
                u16::from_le(self.load(at + 12, Ordering::Relaxed)?),
                u32::from_le(self.load(at + 8, Ordering::Relaxed)?),
            )
        } else {
            let at = self.device + 4 + 8 * u64::from(self.used.0 % self.size);
            let head = u32::from_le(self.load(at, Ordering::Relaxed)?);
            ensure!(head % u32::from(PARTS) == 0, "used element for descriptor {head}, which is no head");
            let len = u32::from_le(self.load(at + 4, Ordering::Relaxed)?);
            (u16::try_from(head)? / PARTS, len)
        };
        let in_flight = self.in_flight.get_mut(usize::from(slot)).filter(|slots| **slots != 0);
        let ring_slots =
            std::mem::take(in_flight.with_context(|| format!("slot {slot} answered, but not asked"))?);
        self.used =
            if self.packed { self.after(self.used, ring_slots) } else { (self.used.0.wrapping_add(1), true) };
        Ok(Some((slot, len)))
    }

    fn has_used(&self) -> Result<bool> {
        if self.packed {
            let flags =
                u16::from_le(self.load(self.desc + 16 * u64::from(self.used.0) + 14, Ordering::Acquire)?);
            return Ok((flags & AVAIL != 0) == self.used.1 && (flags & USED != 0) == self.used.1);
        }
        Ok(u16::from_le(self.load(self.device + 2, Ordering::Acquire)?) != self.used.0)
    }

    /// Asks to be interrupted for the next used element; true if there is one already.
    pub(super) fn arm(&self) -> Result<bool> {
        if self.packed {
            let place = self.used.0 | u16::from(self.used.1) << 15;
            self.store(self.driver, (u32::from(place) | 2 << 16).to_le(), Ordering::Relaxed)?;
        } else {
            self.store(self.driver + 4 + 2 * u64::from(self.size), self.used.0.to_le(), Ordering::Relaxed)?;
        }
        fence(Ordering::SeqCst);
        self.has_used()
    }
}
