//! The packed ring (VIRTIO 1.2, 2.8) in bursts.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::batch::{Batch, Reading};
use super::memory::Memory;
use super::recover;
use super::split::{DESC_BYTES, Dialect, F_INDIRECT, F_NEXT, F_WRITE, indirect_entries};
use crate::queue::notify::{ArmSteps, arm_then_look};
use crate::queue::packed::{EVENTS_DESC, EVENTS_OFF, EVENTS_ON, MAX_SIZE, Place};
use crate::queue::{RingAddresses, RingError};

/// How often a ring is read until its driver leaves it alone: of the longest, a millisecond or so.
const SETTLE_TRIES: usize = 50;

/// See the module. The pointers lead into the memory that the ring above it keeps.
#[derive(Debug)]
pub(super) struct PackedBurst {
    at: RingAddresses,
    dialect: Dialect,
    desc: *mut u8,
    driver_event: *mut u8,
    device_event: *mut u8,
    /// The first chain that was not given back.
    next: Place,
    /// The first slot that was not read; ahead of `next` by what is in the batch.
    look: Place,
    /// Slots between the two.
    ahead: u16,
    /// The first used element since the last publication: its second half and the slots that it stands for, not written yet.
    held_back: Option<(u64, u16)>,
    /// Where it goes.
    published: Place,
}

impl PackedBurst {
    /// A ring that starts where the front end says, or where its slots say if that cannot be: with nothing in flight,
    /// positions of both sides are one.
    pub(super) fn start(
        at: RingAddresses,
        dialect: Dialect,
        base: u32,
        memory: &Memory,
    ) -> Result<Self, RingError> {
        if at.size == 0 || at.size > MAX_SIZE {
            return Err(RingError::RingMemory(at.desc));
        }
        let (avail, used) = (Place::from_bits(base as u16), Place::from_bits((base >> 16) as u16));
        // Front ends that leave the upper half 0 mean that both are the same. Otherwise what lies between the two was in
        // flight in another process, and is taken again.
        let next = if base >> 16 == 0 { avail } else { used };
        if next.index >= at.size {
            return Err(RingError::Base(base));
        }
        let null = std::ptr::null_mut();
        let mut this = Self {
            at,
            dialect,
            desc: null,
            driver_event: null,
            device_event: null,
            next,
            look: next,
            ahead: 0,
            held_back: None,
            published: next,
        };
        this.locate(memory)?;
        // Where one used element stands for many, the slots do not tell.
        if !dialect.in_order {
            this.recover();
        }
        Ok(this)
    }

    /// Goes on where the process before stopped, if it had no time to tell.
    fn recover(&mut self) {
        let size = self.at.size;
        let mut seen = self.seen();
        // A process dies once, so there is one such chain. It was given back, and its address is lost.
        let cut = (0..size).find_map(|index| seen[usize::from(index)].cut_in(index));
        if let Some((place, slots)) = cut {
            self.empty(place, slots.min(size), &seen);
            seen = self.seen();
        }
        let recover::Found { next, held_back, .. } = recover::position(&seen, self.next);
        if let Some((first, slots)) = held_back {
            // The others of its burst were never seen by the driver: all of them come back empty, this one last.
            let mut at = first.advanced(slots, size);
            let mut left = size - slots.min(size);
            while at != next && left != 0 {
                let slots = seen[usize::from(at.index)].slots().clamp(1, left);
                self.empty_used(at);
                (at, left) = (at.advanced(slots, size), left - slots);
            }
            self.empty(first, slots, &seen);
        }
        if next != self.next || held_back.is_some() {
            tracing::info!(told = ?self.next, found = ?next, ?held_back, "a packed ring goes on where its slots say");
        }
        (self.next, self.look, self.published) = (next, next, next);
    }

    /// What all slots hold, at a moment at which the driver changed none of them and was not in the middle of a chain.
    fn seen(&self) -> Vec<recover::Seen> {
        let look = || {
            let slot = |index| recover::Seen { half: self.half_at(index), addr: self.addr(index) };
            (0..self.at.size).map(slot).collect::<Vec<_>>()
        };
        let mut seen = look();
        // Nobody takes what it offers, so it comes to its end; one that does not has itself to blame.
        for _ in 0..SETTLE_TRIES {
            let again = look();
            let is_tidy = recover::position(&again, self.next).is_tidy;
            if is_tidy && again == seen {
                break;
            }
            seen = again;
            std::thread::yield_now();
        }
        seen
    }

    fn half_at(&self, index: u16) -> u64 {
        u64::from_le(self.half(index).load(Ordering::Acquire))
    }

    /// Gives a chain of so many slots back that was taken and never came back: empty.
    fn empty(&self, at: Place, slots: u16, seen: &[recover::Seen]) {
        let last = at.advanced(slots.saturating_sub(1), self.at.size);
        // The buffer ID is in the last descriptor of a chain (2.8.6).
        let id = seen[usize::from(last.index)].half & 0xffff << 32;
        let flags = at.used_flags() | seen[usize::from(at.index)].flags() & F_WRITE;
        self.mark(at, slots);
        self.half(at.index).store((id | u64::from(flags) << 48).to_le(), Ordering::Release);
    }

    /// Makes a used element empty that the driver has not seen.
    fn empty_used(&self, at: Place) {
        let word = self.half_at(at.index) & !0xffff_ffff;
        self.half(at.index).store(word.to_le(), Ordering::Release);
    }

    /// Leaves word in a chain that is given back of how many slots it has, for who finds this ring after a crash.
    #[inline]
    fn mark(&self, at: Place, slots: u16) {
        if slots > 1 && !self.dialect.in_order {
            self.mark_slots(at, slots);
        }
    }

    fn mark_slots(&self, at: Place, slots: u16) {
        for n in 0..slots {
            let place = at.advanced(n, self.at.size);
            let mark = recover::mark(place, if n == 0 { slots } else { 0 });
            // SAFETY: as in `half`; the field is the first one of a descriptor, aligned to 16.
            let addr = unsafe { AtomicU64::from_ptr(self.desc.add(16 * usize::from(place.index)).cast()) };
            // In this order, and before the flags: so that it is found whole, or found to be unfinished.
            addr.store(mark.to_le(), Ordering::Release);
        }
        fence(Ordering::Release);
    }

    /// Finds the ring in memory (again, after the front end changed it).
    pub(super) fn locate(&mut self, memory: &Memory) -> Result<(), RingError> {
        self.desc = memory.part(self.at.desc, DESC_BYTES * u32::from(self.at.size), 16)?;
        self.driver_event = memory.part(self.at.avail, 4, 4)?;
        self.device_event = memory.part(self.at.used, 4, 4)?;
        self.rewind();
        Ok(())
    }

    /// The second half of a descriptor: length, buffer ID, flags.
    #[inline]
    fn half(&self, index: u16) -> &AtomicU64 {
        debug_assert!(index < self.at.size);
        // SAFETY: `locate` checked that the ring is mapped and aligned to 16; callers' indices lie in it.
        unsafe { AtomicU64::from_ptr(self.desc.add(16 * usize::from(index) + 8).cast()) }
    }

    #[inline]
    fn addr(&self, index: u16) -> u64 {
        // SAFETY: as in `half`.
        u64::from_le(unsafe { self.desc.add(16 * usize::from(index)).cast::<u64>().read_volatile() })
    }

    /// Reads up to `max` more chains into `batch`.
    #[inline]
    pub(super) fn fetch(
        &mut self,
        memory: &Memory,
        batch: &mut Batch,
        max: usize,
        writable: bool,
    ) -> Result<usize, RingError> {
        let mut done = 0;
        while done < max && batch.has_room() && self.chain(memory, batch, writable)? {
            done += 1;
        }
        Ok(done)
    }

    /// Reads the next chain; false if there is none.
    #[inline]
    fn chain(&mut self, memory: &Memory, batch: &mut Batch, writable: bool) -> Result<bool, RingError> {
        let size = self.at.size;
        // Slots that are in the batch are not the driver's to fill.
        if self.ahead >= size {
            return Ok(false);
        }
        let mut word = u64::from_le(self.half(self.look.index).load(Ordering::Acquire));
        if !self.look.is_available((word >> 48) as u16) {
            return Ok(false);
        }
        let mut reading = Reading::new(batch, memory, writable);
        let (mut place, mut num) = (self.look, 0);
        let id = loop {
            num += 1;
            if num > size - self.ahead {
                return Err(RingError::ChainTooLong((size - self.ahead).into()));
            }
            let (len_bytes, id, flags) = (word as u32, (word >> 32) as u16, (word >> 48) as u16);
            let addr = self.addr(place.index);
            if flags & F_INDIRECT != 0 {
                self.indirect(memory, &mut reading, (addr, len_bytes, flags))?;
            } else {
                reading.push(addr, len_bytes, flags & F_WRITE != 0)?;
            }
            place = place.advanced(1, size);
            if flags & F_NEXT == 0 {
                break id;
            }
            word = u64::from_le(self.half(place.index).load(Ordering::Acquire));
        };
        reading.finish(id, num);
        (self.look, self.ahead) = (place, self.ahead + num);
        Ok(true)
    }

    fn indirect(
        &self,
        memory: &Memory,
        reading: &mut Reading<'_>,
        (addr, len_bytes, flags): (u64, u32, u16),
    ) -> Result<(), RingError> {
        if !self.dialect.indirect || flags & F_NEXT != 0 {
            return Err(RingError::Indirect);
        }
        let entries = indirect_entries(len_bytes)?;
        let table = memory.host(addr, len_bytes).ok_or(RingError::RingMemory(addr))?;
        // 2.8.7: all entries, one after the other; of their flags only WRITE counts.
        for at in 0..entries as usize {
            // SAFETY: the entry lies in the table, which was checked; it need not be aligned.
            let (addr, word) = unsafe {
                let entry = table.add(16 * at);
                (
                    std::ptr::read_volatile(entry.cast::<[u8; 8]>()),
                    std::ptr::read_volatile(entry.add(8).cast::<[u8; 8]>()),
                )
            };
            let word = u64::from_le_bytes(word);
            reading.push(u64::from_le_bytes(addr), word as u32, (word >> 48) as u16 & F_WRITE != 0)?;
        }
        Ok(())
    }

    /// What was read and not given back is read again by the next fetch.
    pub(super) fn rewind(&mut self) {
        (self.look, self.ahead) = (self.next, 0);
    }

    /// Gives the first `count` chains of the batch back, nothing written to them.
    #[inline]
    pub(super) fn give_back(&mut self, batch: &Batch, count: usize) {
        let count = count.min(batch.len());
        if self.dialect.in_order {
            // "In-order use of descriptors" (2.8): one element for all, with the last one's buffer ID, in the first slot.
            let chains = (0..count).filter_map(|at| batch.chain(at));
            let slots: u16 = chains.map(|chain| chain.slots).sum();
            if let Some(last) = count.checked_sub(1).and_then(|at| batch.chain(at)) {
                self.element(last.id, slots, 0, 0);
            }
            return;
        }
        for at in 0..count {
            if let Some(chain) = batch.chain(at) {
                self.element(chain.id, chain.slots, 0, 0);
            }
        }
    }

    /// Gives the next chain back with `len_bytes` bytes written to it.
    #[inline]
    pub(super) fn filled(&mut self, id: u16, slots: u16, len_bytes: u32) {
        self.element(id, slots, len_bytes, F_WRITE);
    }

    #[inline]
    fn element(&mut self, id: u16, slots: u16, len_bytes: u32, flags: u16) {
        let flags = self.next.used_flags() | flags;
        let word = (u64::from(len_bytes) | u64::from(id) << 32 | u64::from(flags) << 48).to_le();
        if self.held_back.is_none() {
            self.held_back = Some((word, slots));
            self.published = self.next;
        } else {
            self.mark(self.next, slots);
            self.half(self.next.index).store(word, Ordering::Relaxed);
        }
        self.next = self.next.advanced(slots, self.at.size);
        self.ahead = self.ahead.saturating_sub(slots);
    }

    /// See [`VirtQueue::publish`](crate::queue::VirtQueue::publish).
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let Some((word, slots)) = self.held_back.take() else { return false };
        self.mark(self.published, slots);
        // Release: the elements behind this one are visible before it; the driver stops at the first that is not used.
        self.half(self.published.index).store(word, Ordering::Release);
        // The mirror image of the driver's "set the event structure, fence, look at the flags".
        fence(Ordering::SeqCst);
        // SAFETY: `locate` checked that the structure is mapped and aligned.
        let event = unsafe { AtomicU32::from_ptr(self.driver_event.cast()) }.load(Ordering::Relaxed);
        let event = u32::from_le(event);
        match (event >> 16) as u16 & 3 {
            EVENTS_OFF => false,
            EVENTS_DESC if self.dialect.event_idx => {
                let wanted = Place::from_bits(event as u16);
                // Distances modulo 2^16 as in the split ring; an event of the other lap lies one ring behind.
                let behind = if wanted.wrap == self.next.wrap { 0 } else { self.at.size };
                let wanted = wanted.index.wrapping_sub(behind);
                let lap = if self.published.wrap == self.next.wrap { 0 } else { self.at.size };
                let slots = (self.next.index + lap).wrapping_sub(self.published.index);
                self.next.index.wrapping_sub(wanted).wrapping_sub(1) < slots
            }
            _ => true,
        }
    }

    /// Whether something is to be published.
    #[inline]
    pub(super) fn is_unpublished(&self) -> bool {
        self.held_back.is_some()
    }

    /// See [`VirtQueue::arm`](crate::queue::VirtQueue::arm); with `more`, of chains behind those that were read.
    pub(super) fn arm(&mut self, more: bool) -> Result<bool, RingError> {
        let from = if more { self.look } else { self.next };
        if more && self.ahead >= self.at.size {
            // All of the ring was read: nothing can come before something was given back.
            self.disarm();
            return Ok(false);
        }
        arm_then_look(&mut Armed { ring: self, from })
    }

    /// See [`VirtQueue::disarm`](crate::queue::VirtQueue::disarm).
    pub(super) fn disarm(&self) {
        self.store_event(0, EVENTS_OFF);
    }

    fn store_event(&self, place: u16, flags: u16) {
        let word = u32::from(place) | u32::from(flags) << 16;
        // SAFETY: `locate` checked that the structure is mapped and aligned.
        unsafe { AtomicU32::from_ptr(self.device_event.cast()) }.store(word.to_le(), Ordering::Relaxed);
    }

    /// Whether anything is available that was not given back, as 1 or 0: there is no index that counts it.
    pub(super) fn available(&self) -> u16 {
        let word = u64::from_le(self.half(self.next.index).load(Ordering::Relaxed));
        self.next.is_available((word >> 48) as u16).into()
    }

    pub(super) fn addresses(&self) -> RingAddresses {
        self.at
    }

    pub(super) fn base(&self) -> u32 {
        let bits = u32::from(self.next.bits());
        bits | bits << 16
    }
}

/// [`ArmSteps`] on a ring.
struct Armed<'a> {
    ring: &'a mut PackedBurst,
    from: Place,
}

impl ArmSteps for Armed<'_> {
    type Error = RingError;

    fn announce(&mut self) -> Result<(), RingError> {
        // One store for place and flags: the driver never sees the place of one with the flags of the other.
        if self.ring.dialect.event_idx {
            self.ring.store_event(self.from.bits(), EVENTS_DESC);
        } else {
            self.ring.store_event(0, EVENTS_ON);
        }
        Ok(())
    }

    fn fence(&mut self) {
        fence(Ordering::SeqCst);
    }

    fn look(&mut self) -> Result<bool, RingError> {
        let word = u64::from_le(self.ring.half(self.from.index).load(Ordering::Acquire));
        Ok(self.from.is_available((word >> 48) as u16))
    }
}
