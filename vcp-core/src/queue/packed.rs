//! The packed virtqueue (VIRTIO 1.2, 2.8).
//!
//! One ring holds descriptors in both directions; two flag bits and a wrap counter on each side tell whose a slot is.
//!
//! A batch of used elements becomes visible with the store of its first element's flags, which is held back until
//! [`publish`](VirtQueue::publish): the driver reads the ring in order and stops before it. The elements behind it are in
//! the ring by then; after a crash before that store they are taken back (see [`PackedQueue::start`]).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::ledger::{Ledger, PackedDesc};
use super::log::{LogError, PackedLog, QueueLog};
use super::notify::{ArmSteps, arm_then_look};
use super::{Chain, MAX_CHAIN_DESCRIPTORS, RingAddresses, RingError, VirtQueue, crash};
use crate::mem::GuestMap;

/// `VIRTQ_DESC_F_NEXT`, `_WRITE`, `_INDIRECT`, `_AVAIL`, `_USED` (2.8.13, 2.8.1).
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const F_AVAIL: u16 = 1 << 7;
const F_USED: u16 = 1 << 15;
/// `RING_EVENT_FLAGS_*` (2.8.10).
pub(super) const EVENTS_ON: u16 = 0;
pub(super) const EVENTS_OFF: u16 = 1;
pub(super) const EVENTS_DESC: u16 = 2;
const DESC_BYTES: u64 = 16;
/// Largest ring (2.8.10.1): positions have 15 bits.
pub(super) const MAX_SIZE: u16 = 1 << 15;

/// A place in the ring and the wrap counter there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) index: u16,
    pub(crate) wrap: bool,
}

impl Place {
    /// As in event suppression structures and in ring bases: the counter in bit 15.
    pub(super) fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    pub(super) fn from_bits(bits: u16) -> Self {
        Self { index: bits & 0x7fff, wrap: bits >> 15 != 0 }
    }

    /// `slots` further on in a ring of `size`.
    pub(crate) fn advanced(self, slots: u16, size: u16) -> Self {
        let index = u32::from(self.index) + u32::from(slots);
        match index.checked_sub(size.into()) {
            Some(index) => Self { index: index as u16, wrap: !self.wrap },
            None => Self { index: index as u16, wrap: self.wrap },
        }
    }

    /// Whether flags read here say that the driver made the descriptor available (2.8.1).
    pub(crate) fn is_available(self, flags: u16) -> bool {
        (flags & F_AVAIL != 0) == self.wrap && (flags & F_USED != 0) != self.wrap
    }

    /// Whether they say that the device used it.
    pub(super) fn is_used(self, flags: u16) -> bool {
        (flags & F_AVAIL != 0) == self.wrap && (flags & F_USED != 0) == self.wrap
    }

    pub(super) fn used_flags(self) -> u16 {
        if self.wrap { F_AVAIL | F_USED } else { 0 }
    }

    fn available_flags(self) -> u16 {
        if self.wrap { F_AVAIL } else { F_USED }
    }
}

/// Where a ring starts.
#[derive(Debug)]
pub enum PackedStart {
    /// Where `SET_VRING_BASE` says: the next descriptor in bits 0-14, its wrap counter in bit 15, and the same of the
    /// next used element in the upper half. Front ends that leave the upper half 0 mean that both are the same.
    Base(u32),
    /// As [`Base`](Self::Base), with a log that starts empty.
    Fresh(u32, QueueLog),
    /// Where the log says, if it is in use; otherwise as [`Fresh`](Self::Fresh).
    Recover(u32, QueueLog),
}

/// A packed virtqueue that publishes used elements in batches.
#[derive(Debug)]
pub struct PackedQueue {
    at: RingAddresses,
    event_idx: bool,
    indirect: bool,
    /// Next descriptor to take.
    avail: Place,
    /// Where the next used element goes.
    used: Place,
    /// The same as far as the driver was shown.
    published: Place,
    ledger: Ledger,
    /// Chains completed since the last publication.
    batch: Vec<u16>,
    /// The first used element of the batch: its second half, which is not written yet.
    held_back: u64,
    log: Option<PackedLog>,
}

impl PackedQueue {
    /// A ring that starts at `start`, and the chains in flight, newest first, if the log said what they are.
    ///
    /// # Errors
    /// The ring lies outside guest memory, or the log does not fit it.
    pub fn start(
        at: RingAddresses,
        event_idx: bool,
        indirect: bool,
        start: PackedStart,
        map: &GuestMap,
    ) -> Result<(Self, Option<Vec<u16>>), RingError> {
        if at.size == 0 || at.size > MAX_SIZE {
            return Err(RingError::RingMemory(at.desc));
        }
        let first = Place { index: 0, wrap: true };
        let mut this = Self {
            at,
            event_idx,
            indirect,
            avail: first,
            used: first,
            published: first,
            ledger: Ledger::new(0),
            batch: Vec::with_capacity(at.size.into()),
            held_back: 0,
            log: None,
        };
        this.check(map)?;
        let mut again = None;
        match start {
            PackedStart::Base(base) => {
                this.start_at(base)?;
                this.ledger = Ledger::new(at.size);
            }
            PackedStart::Fresh(base, log) => this.start_logged(base, log)?,
            PackedStart::Recover(base, log) => {
                let flags = |index| this.flags(map, index);
                match PackedLog::recover(log, at.size, flags)? {
                    Ok(found) => {
                        (this.ledger, again) = (found.ledger, Some(found.heads));
                        this.used = found.used;
                        this.published = found.used;
                        // What was taken and not given back lies between the two (2.8.6: a used element skips as many
                        // slots as its chain had).
                        this.avail = found.used.advanced(this.ledger.slots, at.size);
                        this.log = Some(found.log);
                        this.take_back(map)?;
                    }
                    Err(unused) => this.start_logged(base, unused)?,
                }
            }
        }
        Ok((this, again))
    }

    fn start_at(&mut self, base: u32) -> Result<(), RingError> {
        let (avail, used) = (Place::from_bits(base as u16), Place::from_bits((base >> 16) as u16));
        let used = if base >> 16 == 0 { avail } else { used };
        if avail.index >= self.at.size || used.index >= self.at.size {
            return Err(RingError::Base(base));
        }
        (self.avail, self.used, self.published) = (avail, used, used);
        Ok(())
    }

    fn start_logged(&mut self, base: u32, log: QueueLog) -> Result<(), RingError> {
        self.start_at(base)?;
        if self.used != self.avail {
            // What lies between the two was in flight when the ring stopped, and nobody knows its descriptors any more.
            return Err(RingError::Base(base));
        }
        let (log, ledger) = PackedLog::fresh(log, self.used);
        (self.log, self.ledger) = (Some(log), ledger);
        Ok(())
    }

    /// Used elements behind the first of a batch that was never published: the driver must not see them when it comes
    /// there. It does not look behind the first slot that is not used, so nobody reads them meanwhile.
    fn take_back(&self, map: &GuestMap) -> Result<(), RingError> {
        for ahead in 1..self.ledger.slots {
            let place = self.used.advanced(ahead, self.at.size);
            let flags = self.flags(map, place.index)?;
            if place.is_used(flags) {
                crash::point();
                let addr = self.slot(place.index, 14)?;
                map.store(place.available_flags().to_le(), addr, Ordering::Release)
                    .map_err(|_| RingError::RingMemory(addr.0))?;
            }
        }
        Ok(())
    }

    /// Whether the ring and the event structures are guest memory, and aligned (2.8.10.1).
    ///
    /// # Errors
    /// [`RingError::RingMemory`].
    pub(crate) fn check(&self, map: &GuestMap) -> Result<(), RingError> {
        let RingAddresses { size, desc, avail, used } = self.at;
        for (addr, len, align) in
            [(desc, DESC_BYTES * u64::from(size), DESC_BYTES), (avail, 4, 4), (used, 4, 4)]
        {
            if addr % align != 0 || !map.check_range(GuestAddress(addr), len as usize) {
                return Err(RingError::RingMemory(addr));
            }
        }
        Ok(())
    }

    /// Whether it is the ring that these describe.
    pub(crate) fn is_like(&self, at: RingAddresses, event_idx: bool, indirect: bool) -> bool {
        (self.at, self.event_idx, self.indirect) == (at, event_idx, indirect)
    }

    /// Addresses and size.
    pub(crate) fn addresses(&self) -> RingAddresses {
        self.at
    }

    fn slot(&self, index: u16, field: u64) -> Result<GuestAddress, RingError> {
        let addr = self.at.desc.checked_add(DESC_BYTES * u64::from(index) + field);
        addr.map(GuestAddress).ok_or(RingError::RingMemory(self.at.desc))
    }

    fn flags(&self, map: &GuestMap, index: u16) -> Result<u16, RingError> {
        let addr = self.slot(index, 14)?;
        let flags: u16 = map.load(addr, Ordering::Acquire).map_err(|_| RingError::RingMemory(addr.0))?;
        Ok(u16::from_le(flags))
    }

    /// The descriptor in slot `index`: its second half, with the flags, in one load, so that all of it is of one moment.
    fn read(&self, map: &GuestMap, index: u16) -> Result<PackedDesc, RingError> {
        let failed = |_| RingError::RingMemory(self.at.desc);
        let word: u64 = map.load(self.slot(index, 8)?, Ordering::Acquire).map_err(failed)?;
        let addr: u64 = map.load(self.slot(index, 0)?, Ordering::Relaxed).map_err(failed)?;
        let word = u64::from_le(word);
        Ok(PackedDesc {
            addr: u64::from_le(addr),
            len_bytes: word as u32,
            id: (word >> 32) as u16,
            flags: (word >> 48) as u16,
        })
    }

    /// One descriptor of a chain: its buffer, or the table that it points at.
    fn push(&self, map: &Arc<GuestMap>, desc: PackedDesc, chain: &mut Chain) -> Result<(), RingError> {
        if desc.flags & F_INDIRECT == 0 {
            return chain.push(map, desc.addr, desc.len_bytes, desc.flags & F_WRITE != 0);
        }
        if !self.indirect || desc.flags & F_NEXT != 0 {
            return Err(RingError::Indirect);
        }
        let entries = u64::from(desc.len_bytes) / DESC_BYTES;
        if desc.len_bytes == 0
            || u64::from(desc.len_bytes) % DESC_BYTES != 0
            || entries > MAX_CHAIN_DESCRIPTORS as u64
        {
            return Err(RingError::IndirectLength(desc.len_bytes));
        }
        // 2.8.7: all entries, one after the other; of their flags only WRITE counts.
        for entry in 0..entries {
            let addr = desc.addr.checked_add(DESC_BYTES * entry).ok_or(RingError::RingMemory(desc.addr))?;
            let entry: virtio_queue::desc::packed::Descriptor =
                map.read_obj(GuestAddress(addr)).map_err(|_| RingError::RingMemory(addr))?;
            let entry = PackedDesc::from(entry);
            chain.push(map, entry.addr, entry.len_bytes, entry.flags & F_WRITE != 0)?;
        }
        Ok(())
    }

    /// Whether the driver wants to hear of the batch of `slots` slots that ends where `used` is (2.8.10).
    fn wants_notification(&self, map: &GuestMap, slots: u16) -> Result<bool, RingError> {
        let addr = self.at.avail;
        let word: u32 =
            map.load(GuestAddress(addr), Ordering::Relaxed).map_err(|_| RingError::RingMemory(addr))?;
        let word = u32::from_le(word);
        match (word >> 16) as u16 & 3 {
            EVENTS_OFF => Ok(false),
            EVENTS_DESC if self.event_idx => {
                let event = Place::from_bits(word as u16);
                // Distances modulo 2^16 as in the split ring; an event of the other lap lies one ring behind.
                let behind = if event.wrap == self.used.wrap { 0 } else { self.at.size };
                let event = event.index.wrapping_sub(behind);
                Ok(self.used.index.wrapping_sub(event).wrapping_sub(1) < slots)
            }
            _ => Ok(true),
        }
    }

    fn store_event(&self, map: &GuestMap, place: u16, flags: u16) -> Result<(), RingError> {
        let word = u32::from(place) | u32::from(flags) << 16;
        map.store(word.to_le(), GuestAddress(self.at.used), Ordering::Relaxed)
            .map_err(|_| RingError::RingMemory(self.at.used))
    }
}

impl VirtQueue for PackedQueue {
    fn take(&mut self, map: &Arc<GuestMap>, chain: &mut Chain) -> Result<bool, RingError> {
        let size = self.at.size;
        let mut desc = self.read(map, self.avail.index)?;
        if !self.avail.is_available(desc.flags) {
            return Ok(false);
        }
        let head = self.ledger.free_head;
        chain.begin(head);
        let (mut entry, mut num) = (head, 0);
        let last = loop {
            num += 1;
            // Slots in flight are not the driver's to fill. A loop ends here as well.
            if num > size - self.ledger.slots.min(size) {
                return Err(RingError::ChainTooLong((size - self.ledger.slots.min(size)).into()));
            }
            self.push(map, desc, chain)?;
            let next = self.ledger.fill(entry, desc).ok_or(RingError::ChainTooLong(size.into()))?;
            if desc.flags & F_NEXT == 0 {
                let last = entry;
                entry = next;
                break last;
            }
            entry = next;
            desc = self.read(map, self.avail.advanced(num, size).index)?;
        };
        self.ledger.commit(last, num, entry);
        if let Some(log) = &mut self.log {
            log.taken(&self.ledger, head);
        }
        self.avail = self.avail.advanced(num, size);
        Ok(true)
    }

    fn take_again(&mut self, map: &Arc<GuestMap>, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.begin(head);
        self.ledger.chain(head).try_for_each(|desc| self.push(map, desc, chain))
    }

    fn put_used(&mut self, map: &GuestMap, head: u16, len_bytes: u32) -> Result<(), RingError> {
        // Ours, not the driver's: it cannot be wrong.
        let Some((id, num)) = self.ledger.identity(head) else { return Ok(()) };
        let write = if len_bytes == 0 { 0 } else { F_WRITE };
        let flags = self.used.used_flags() | write;
        let word = (u64::from(len_bytes) | u64::from(id) << 32 | u64::from(flags) << 48).to_le();
        if self.batch.is_empty() {
            self.held_back = word;
        } else {
            let addr = self.slot(self.used.index, 8)?;
            crash::point();
            map.store(word, addr, Ordering::Release).map_err(|_| RingError::RingMemory(addr.0))?;
        }
        self.batch.push(head);
        self.used = self.used.advanced(num, self.at.size);
        Ok(())
    }

    fn publish(&mut self, map: &GuestMap) -> Result<bool, RingError> {
        if self.batch.is_empty() {
            return Ok(false);
        }
        let before = self.ledger.slots;
        for &head in &self.batch {
            self.ledger.free(head);
        }
        let slots = before - self.ledger.slots;
        if let Some(log) = &mut self.log {
            log.completing(&self.ledger, &self.batch, self.used);
        }
        let addr = self.slot(self.published.index, 8)?;
        crash::point();
        // Release: the elements behind this one are visible before it.
        map.store(self.held_back, addr, Ordering::Release).map_err(|_| RingError::RingMemory(addr.0))?;
        self.published = self.used;
        // The mirror image of the driver's "set the event structure, fence, look at the flags"; and what follows in the
        // log stays behind the store.
        fence(Ordering::SeqCst);
        if let Some(log) = &mut self.log {
            log.completed(&self.ledger, &self.batch, self.used);
        }
        self.batch.clear();
        self.wants_notification(map, slots)
    }

    fn arm(&mut self, map: &GuestMap) -> Result<bool, RingError> {
        arm_then_look(&mut Armed { queue: self, map })
    }

    fn disarm(&mut self, map: &GuestMap) -> Result<(), RingError> {
        self.store_event(map, 0, EVENTS_OFF)
    }

    /// 1 for any number: there is no index that counts them.
    fn available(&self, map: &GuestMap) -> u16 {
        self.flags(map, self.avail.index).is_ok_and(|flags| self.avail.is_available(flags)).into()
    }

    fn base(&self) -> u32 {
        u32::from(self.avail.bits()) | u32::from(self.published.bits()) << 16
    }
}

/// [`ArmSteps`] on real guest memory.
struct Armed<'a> {
    queue: &'a PackedQueue,
    map: &'a GuestMap,
}

impl ArmSteps for Armed<'_> {
    type Error = RingError;

    fn announce(&mut self) -> Result<(), RingError> {
        // One store for place and flags: the driver never sees the place of one with the flags of the other.
        if self.queue.event_idx {
            self.queue.store_event(self.map, self.queue.avail.bits(), EVENTS_DESC)
        } else {
            self.queue.store_event(self.map, 0, EVENTS_ON)
        }
    }

    fn fence(&mut self) {
        fence(Ordering::SeqCst);
    }

    fn look(&mut self) -> Result<bool, RingError> {
        let flags = self.queue.flags(self.map, self.queue.avail.index)?;
        Ok(self.queue.avail.is_available(flags))
    }
}

impl From<LogError> for RingError {
    fn from(error: LogError) -> Self {
        Self::Log(error)
    }
}
