//! The split ring (VIRTIO 1.2, 2.7) in bursts.

use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::batch::{Batch, MAX_BURST, Reading};
use super::memory::{Memory, prefetch};
use crate::queue::notify::{ArmSteps, arm_then_look};
use crate::queue::{MAX_CHAIN_DESCRIPTORS, RingAddresses, RingError};

/// `VIRTQ_DESC_F_NEXT`, `_WRITE`, `_INDIRECT` (2.7.5).
pub(super) const F_NEXT: u16 = 1;
pub(super) const F_WRITE: u16 = 2;
pub(super) const F_INDIRECT: u16 = 4;
/// `VIRTQ_USED_F_NO_NOTIFY` (2.7.10) and `VIRTQ_AVAIL_F_NO_INTERRUPT` (2.7.7).
const NO_NOTIFY: u16 = 1;
const NO_INTERRUPT: u16 = 1;
/// Bytes of a descriptor and of a used element.
pub(super) const DESC_BYTES: u32 = 16;
const USED_ELEM_BYTES: u32 = 8;

/// What was negotiated that concerns a ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dialect {
    pub(super) event_idx: bool,
    pub(super) indirect: bool,
    pub(super) in_order: bool,
}

/// See the module. The pointers lead into the memory that the ring above it keeps.
#[derive(Debug)]
pub(super) struct SplitBurst {
    at: RingAddresses,
    dialect: Dialect,
    desc: *mut u8,
    avail: *mut u8,
    used: *mut u8,
    /// The first chain that was not given back.
    next: u16,
    /// The first chain that was not read; ahead of `next` by what is in the batch.
    look: u16,
    /// The available index as it was read last.
    seen: u16,
    next_used: u16,
    /// The used index as the driver knows it.
    published: u16,
}

impl SplitBurst {
    /// A ring that goes on from its used index: nothing is in flight, so what was taken and not given back by whoever
    /// ran it before is taken again, whatever `base` the front end remembers.
    pub(super) fn start(
        at: RingAddresses,
        dialect: Dialect,
        base: u16,
        memory: &Memory,
    ) -> Result<Self, RingError> {
        if at.size == 0 || !at.size.is_power_of_two() {
            return Err(RingError::RingMemory(at.desc));
        }
        let mut this = Self {
            at,
            dialect,
            desc: std::ptr::null_mut(),
            avail: std::ptr::null_mut(),
            used: std::ptr::null_mut(),
            next: base,
            look: base,
            seen: base,
            next_used: 0,
            published: 0,
        };
        this.locate(memory)?;
        let used = u16::from_le(this.index(this.used).load(Ordering::Acquire));
        if used != base {
            tracing::debug!(base, used, "the ring goes on from its used index");
        }
        (this.next, this.look, this.seen) = (used, used, used);
        (this.next_used, this.published) = (used, used);
        Ok(this)
    }

    /// Finds the ring in memory (again, after the front end changed it).
    pub(super) fn locate(&mut self, memory: &Memory) -> Result<(), RingError> {
        let size = u32::from(self.at.size);
        self.desc = memory.part(self.at.desc, DESC_BYTES * size, 16)?;
        self.avail = memory.part(self.at.avail, 6 + 2 * size, 2)?;
        self.used = memory.part(self.at.used, 6 + USED_ELEM_BYTES * size, 4)?;
        self.look = self.next;
        Ok(())
    }

    /// The index field of an available or used ring.
    #[inline]
    fn index(&self, ring: *mut u8) -> &AtomicU16 {
        // SAFETY: `locate` checked that the ring is mapped and aligned; the memory lives as long as the ring above.
        unsafe { AtomicU16::from_ptr(ring.add(2).cast()) }
    }

    #[inline]
    fn word(&self, ring: *mut u8, offset: u32) -> &AtomicU16 {
        debug_assert!(offset <= 4 + USED_ELEM_BYTES * u32::from(self.at.size));
        // SAFETY: as in `index`; callers stay inside the ring, at even offsets.
        unsafe { AtomicU16::from_ptr(ring.add(offset as usize).cast()) }
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
        let max = max.min(MAX_BURST) as u16;
        if self.seen.wrapping_sub(self.look) < max {
            let seen = u16::from_le(self.index(self.avail).load(Ordering::Acquire));
            let ahead = seen.wrapping_sub(self.next);
            if ahead > self.at.size {
                return Err(RingError::AvailIndex { ahead, size: self.at.size });
            }
            self.seen = seen;
        }
        let count = self.seen.wrapping_sub(self.look).min(max);
        let mask = self.at.size - 1;
        let mut heads = [0u16; MAX_BURST];
        for (head, at) in heads.iter_mut().zip(0..count) {
            let slot = u32::from(self.look.wrapping_add(at) & mask);
            *head = u16::from_le(self.word(self.avail, 4 + 2 * slot).load(Ordering::Relaxed));
            prefetch(self.desc.wrapping_add(DESC_BYTES as usize * usize::from(*head & mask)));
        }
        let mut done = 0;
        for &head in &heads[..usize::from(count)] {
            if !batch.has_room() {
                break;
            }
            self.chain(memory, batch, head, writable)?;
            done += 1;
        }
        self.look = self.look.wrapping_add(done);
        Ok(done.into())
    }

    /// Reads one chain.
    #[inline]
    fn chain(&self, memory: &Memory, batch: &mut Batch, head: u16, writable: bool) -> Result<(), RingError> {
        if head >= self.at.size {
            return Err(RingError::DescriptorIndex { index: head, size: self.at.size.into() });
        }
        let mut reading = Reading::new(batch, memory, writable);
        // SAFETY: `head` lies in the table, which is mapped and aligned.
        let desc = unsafe { read_desc(self.desc.add(DESC_BYTES as usize * usize::from(head))) };
        if desc.flags & (F_NEXT | F_INDIRECT) == 0 {
            reading.push(desc.addr, desc.len_bytes, desc.flags & F_WRITE != 0)?;
        } else {
            self.walk(memory, &mut reading, desc)?;
        }
        reading.finish(head, 0);
        Ok(())
    }

    /// Follows a chain of several descriptors that begins with `desc`, through at most one indirect table.
    fn walk(&self, memory: &Memory, reading: &mut Reading<'_>, desc: Desc) -> Result<(), RingError> {
        let (mut table, mut size) = (self.desc, u32::from(self.at.size));
        let (mut desc, mut in_indirect) = (desc, false);
        // Every descriptor of a table may be visited once; one more means a loop.
        let mut left = size - 1;
        loop {
            if desc.flags & F_INDIRECT != 0 {
                if in_indirect || !self.dialect.indirect || desc.flags & F_NEXT != 0 {
                    return Err(RingError::Indirect);
                }
                size = indirect_entries(desc.len_bytes)?;
                table = memory.host(desc.addr, desc.len_bytes).ok_or(RingError::RingMemory(desc.addr))?;
                (in_indirect, left) = (true, size - 1);
                // SAFETY: the table was checked to have at least one entry.
                desc = unsafe { read_desc(table) };
                continue;
            }
            reading.push(desc.addr, desc.len_bytes, desc.flags & F_WRITE != 0)?;
            if desc.flags & F_NEXT == 0 {
                return Ok(());
            }
            if left == 0 {
                return Err(RingError::ChainTooLong(size as usize));
            }
            left -= 1;
            let index = desc.next;
            if u32::from(index) >= size {
                return Err(RingError::DescriptorIndex { index, size });
            }
            // SAFETY: `index` lies in the table.
            desc = unsafe { read_desc(table.add(DESC_BYTES as usize * usize::from(index))) };
        }
    }

    /// What was read and not given back is read again by the next fetch.
    pub(super) fn rewind(&mut self) {
        self.look = self.next;
    }

    /// Gives the first `count` chains of the batch back, nothing written to them.
    #[inline]
    pub(super) fn give_back(&mut self, batch: &Batch, count: usize) {
        let count = count.min(batch.len());
        if count == 0 {
            return;
        }
        if self.dialect.in_order {
            // "In-order use of descriptors" (2.7): one element for all, with the last one's head.
            if let Some(last) = batch.chain(count - 1) {
                self.element(self.next_used, last.id, 0);
            }
            self.next_used = self.next_used.wrapping_add(count as u16);
        } else {
            for at in 0..count {
                if let Some(chain) = batch.chain(at) {
                    self.element(self.next_used, chain.id, 0);
                    self.next_used = self.next_used.wrapping_add(1);
                }
            }
        }
        self.next = self.next.wrapping_add(count as u16);
    }

    /// Gives the next chain back with `len_bytes` bytes written to it.
    #[inline]
    pub(super) fn filled(&mut self, id: u16, len_bytes: u32) {
        self.element(self.next_used, id, len_bytes);
        self.next_used = self.next_used.wrapping_add(1);
        self.next = self.next.wrapping_add(1);
    }

    #[inline]
    fn element(&self, index: u16, id: u16, len_bytes: u32) {
        let slot = usize::from(index & (self.at.size - 1));
        // `struct virtq_used_elem`: le32 id, le32 len.
        let element = (u64::from(id) | u64::from(len_bytes) << 32).to_le();
        // SAFETY: the slot lies in the used ring, which is mapped; only the driver reads it, after the index said so.
        unsafe { self.used.add(4 + 8 * slot).cast::<u64>().write_unaligned(element) };
    }

    /// See [`VirtQueue::publish`](crate::queue::VirtQueue::publish).
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let (from, to) = (self.published, self.next_used);
        if from == to {
            return false;
        }
        // Release: the elements are visible before the index that covers them.
        self.index(self.used).store(to.to_le(), Ordering::Release);
        self.published = to;
        // The mirror image of the driver's "set used_event, fence, look at the used index".
        fence(Ordering::SeqCst);
        if self.dialect.event_idx {
            let event = self.word(self.avail, 4 + 2 * u32::from(self.at.size)).load(Ordering::Relaxed);
            let event = u16::from_le(event);
            to.wrapping_sub(event).wrapping_sub(1) < to.wrapping_sub(from)
        } else {
            u16::from_le(self.word(self.avail, 0).load(Ordering::Relaxed)) & NO_INTERRUPT == 0
        }
    }

    /// Whether something is to be published.
    #[inline]
    pub(super) fn is_unpublished(&self) -> bool {
        self.published != self.next_used
    }

    /// See [`VirtQueue::arm`](crate::queue::VirtQueue::arm); `from` is the first chain to hear of.
    pub(super) fn arm(&mut self, more: bool) -> Result<bool, RingError> {
        let from = if more { self.seen } else { self.next };
        arm_then_look(&mut Armed { ring: self, from })
    }

    /// See [`VirtQueue::disarm`](crate::queue::VirtQueue::disarm).
    pub(super) fn disarm(&self) {
        // An event index lies behind as soon as the driver passes it; nothing to write.
        if !self.dialect.event_idx {
            self.word(self.used, 0).store(NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }

    /// Chains that are available and not given back; what a hostile driver says is cut to the size.
    pub(super) fn available(&self) -> u16 {
        let index = u16::from_le(self.index(self.avail).load(Ordering::Relaxed));
        index.wrapping_sub(self.next).min(self.at.size)
    }

    pub(super) fn addresses(&self) -> RingAddresses {
        self.at
    }

    pub(super) fn base(&self) -> u16 {
        self.next
    }

    pub(super) fn used_index(&self) -> u16 {
        self.next_used
    }
}

/// A descriptor, read once.
#[derive(Clone, Copy, Debug)]
struct Desc {
    addr: u64,
    len_bytes: u32,
    flags: u16,
    next: u16,
}

/// # Safety
/// `ptr` is valid for reads of 16 bytes.
#[inline(always)]
unsafe fn read_desc(ptr: *const u8) -> Desc {
    // SAFETY: the caller's promise. An indirect table need not be aligned.
    let (addr, word) = unsafe {
        (ptr.cast::<u64>().read_unaligned(), std::ptr::read_volatile(ptr.add(8).cast::<[u8; 8]>()))
    };
    let word = u64::from_le_bytes(word);
    let addr = u64::from_le(addr);
    Desc { addr, len_bytes: word as u32, flags: (word >> 32) as u16, next: (word >> 48) as u16 }
}

/// Entries of an indirect table of so many bytes (2.7.5.3).
pub(super) fn indirect_entries(len_bytes: u32) -> Result<u32, RingError> {
    let entries = len_bytes / DESC_BYTES;
    if len_bytes == 0 || !len_bytes.is_multiple_of(DESC_BYTES) || entries as usize > MAX_CHAIN_DESCRIPTORS {
        return Err(RingError::IndirectLength(len_bytes));
    }
    Ok(entries)
}

/// [`ArmSteps`] on a ring.
struct Armed<'a> {
    ring: &'a mut SplitBurst,
    from: u16,
}

impl ArmSteps for Armed<'_> {
    type Error = RingError;

    fn announce(&mut self) -> Result<(), RingError> {
        let ring = &self.ring;
        if ring.dialect.event_idx {
            let offset = 4 + USED_ELEM_BYTES * u32::from(ring.at.size);
            ring.word(ring.used, offset).store(self.from.to_le(), Ordering::Relaxed);
        } else {
            ring.word(ring.used, 0).store(0, Ordering::Relaxed);
        }
        Ok(())
    }

    fn fence(&mut self) {
        fence(Ordering::SeqCst);
    }

    fn look(&mut self) -> Result<bool, RingError> {
        let index = self.ring.index(self.ring.avail).load(Ordering::Acquire);
        Ok(u16::from_le(index) != self.from)
    }
}
