//! The split virtqueue (VIRTIO 1.2, 2.7) on [`virtio_queue::Queue`].
//!
//! `Queue` keeps the ring's addresses and positions; walking a chain is ours, because the crate's iterator ends
//! silently where a rule is broken, which here must stop the queue.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::log::{QueueLog, SplitLog};
use super::notify::{ArmSteps, arm_then_look};
use super::{Chain, MAX_CHAIN_DESCRIPTORS, RingAddresses, RingError, VirtQueue, crash};
use crate::mem::GuestMap;

/// `VIRTQ_DESC_F_NEXT`, `_WRITE`, `_INDIRECT` (2.7.5).
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
/// `VIRTQ_USED_F_NO_NOTIFY` (2.7.10) and `VIRTQ_AVAIL_F_NO_INTERRUPT` (2.7.7).
const NO_NOTIFY: u16 = 1;
const NO_INTERRUPT: u16 = 1;
/// Bytes of a descriptor and of a used element.
const DESC_BYTES: u64 = 16;
const USED_ELEM_BYTES: u64 = 8;

/// Takes the next chain from `queue` into `chain`; false if there is none. The part of [`SplitQueue`] that the epoll
/// server uses on `vhost-user-backend`'s own queues.
///
/// # Errors
/// [`RingError`].
pub fn take_split(
    queue: &mut Queue,
    indirect: bool,
    map: &Arc<GuestMap>,
    chain: &mut Chain,
) -> Result<bool, RingError> {
    let size = queue.size();
    let ring_memory = |_| RingError::RingMemory(queue.avail_ring());
    let avail =
        queue.avail_idx(&**map, Ordering::Acquire).map_err(|_| RingError::RingMemory(queue.avail_ring()))?;
    let next = Wrapping(queue.next_avail());
    let ahead = (avail - next).0;
    if ahead == 0 {
        return Ok(false);
    }
    if ahead > size {
        return Err(RingError::AvailIndex { ahead, size });
    }
    let slot = 4 + 2 * u64::from(next.0 % size);
    let head: u16 = map.load(at(queue.avail_ring(), slot)?, Ordering::Relaxed).map_err(ring_memory)?;
    let head = u16::from_le(head);
    chain.begin(head);
    walk(map, queue.desc_table(), u32::from(size), head, indirect, chain)?;
    queue.set_next_avail((next + Wrapping(1)).0);
    Ok(true)
}

/// Takes the chain at `head` from `queue` again: it was taken before and not given back.
///
/// # Errors
/// [`RingError`].
pub fn take_split_again(
    queue: &Queue,
    indirect: bool,
    map: &Arc<GuestMap>,
    head: u16,
    chain: &mut Chain,
) -> Result<(), RingError> {
    chain.begin(head);
    walk(map, queue.desc_table(), u32::from(queue.size()), head, indirect, chain)
}

/// Follows a chain from `head`, through at most one indirect table.
fn walk(
    map: &Arc<GuestMap>,
    table: u64,
    size: u32,
    head: u16,
    indirect: bool,
    chain: &mut Chain,
) -> Result<(), RingError> {
    let (mut table, mut size, mut index) = (table, size, head);
    let mut in_indirect = false;
    // Every descriptor of a table may be visited once; one more means a loop.
    let mut left = size;
    loop {
        if u32::from(index) >= size {
            return Err(RingError::DescriptorIndex { index, size });
        }
        if left == 0 {
            return Err(RingError::ChainTooLong(size as usize));
        }
        left -= 1;
        let addr = at(table, DESC_BYTES * u64::from(index))?;
        let desc: Descriptor = map.read_obj(addr).map_err(|_| RingError::RingMemory(addr.0))?;
        let flags = desc.flags();
        if flags & F_INDIRECT != 0 {
            if in_indirect || !indirect || flags & F_NEXT != 0 {
                return Err(RingError::Indirect);
            }
            let len = desc.len();
            let entries = u64::from(len) / DESC_BYTES;
            if len == 0 || u64::from(len) % DESC_BYTES != 0 || entries > MAX_CHAIN_DESCRIPTORS as u64 {
                return Err(RingError::IndirectLength(len));
            }
            (table, size, index, in_indirect) = (desc.addr().0, entries as u32, 0, true);
            left = size;
            continue;
        }
        chain.push(map, desc.addr().0, desc.len(), flags & F_WRITE != 0)?;
        if flags & F_NEXT == 0 {
            return Ok(());
        }
        index = desc.next();
    }
}

fn at(base: u64, offset: u64) -> Result<GuestAddress, RingError> {
    base.checked_add(offset).map(GuestAddress).ok_or(RingError::RingMemory(base))
}

/// A split virtqueue that publishes used elements in batches.
#[derive(Debug)]
pub struct SplitQueue {
    queue: Queue,
    indirect: bool,
    /// Used index as the driver last saw it; elements between it and `queue.next_used()` are written, not published.
    published: Wrapping<u16>,
    log: Option<SplitLog>,
}

/// Where a split ring starts. The used index is always the one found in memory.
#[derive(Debug)]
pub enum SplitStart {
    /// At this available index (`SET_VRING_BASE`).
    Base(u16),
    /// As [`Base`](Self::Base), with a log that starts empty.
    Fresh(u16, QueueLog),
    /// At the used index plus what the log has in flight, if it is in use; otherwise as [`Fresh`](Self::Fresh).
    Recover(u16, QueueLog),
}

impl SplitQueue {
    /// A ring that starts at `start`, and the heads in flight, newest first, if the log said what they are.
    ///
    /// # Errors
    /// [`RingError`]: a part of the ring lies outside guest memory, or the log does not fit it.
    pub fn start(
        mut queue: Queue,
        indirect: bool,
        start: SplitStart,
        map: &GuestMap,
    ) -> Result<(Self, Option<Vec<u16>>), RingError> {
        queue.set_ready(true);
        if !queue.is_valid(map) {
            return Err(RingError::RingMemory(queue.desc_table()));
        }
        let used =
            queue.used_idx(map, Ordering::Acquire).map_err(|_| RingError::RingMemory(queue.used_ring()))?;
        queue.set_next_used(used.0);
        let fresh = |log| Some(SplitLog::fresh(log, used.0));
        let (next_avail, log, again) = match start {
            SplitStart::Base(base) => (base, None, None),
            SplitStart::Fresh(base, log) => (base, fresh(log), None),
            SplitStart::Recover(base, log) => match SplitLog::recover(log, queue.size(), used.0)? {
                // What was taken is what was given back and what is in flight. No front end knows it after a crash.
                Ok((log, heads)) => (used.0.wrapping_add(heads.len() as u16), Some(log), Some(heads)),
                Err(unused) => (base, fresh(unused), None),
            },
        };
        queue.set_next_avail(next_avail);
        Ok((Self { queue, indirect, published: used, log }, again))
    }

    /// Addresses and size.
    #[must_use]
    pub fn addresses(&self) -> RingAddresses {
        let queue = &self.queue;
        RingAddresses {
            size: queue.size(),
            desc: queue.desc_table(),
            avail: queue.avail_ring(),
            used: queue.used_ring(),
        }
    }

    /// Addresses, size and positions.
    #[must_use]
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    fn used_error(&self) -> RingError {
        RingError::RingMemory(self.queue.used_ring())
    }

    /// Whether the driver wants to hear of used elements `from .. to` (2.7.7.2).
    fn wants_notification(
        &self,
        map: &GuestMap,
        from: Wrapping<u16>,
        to: Wrapping<u16>,
    ) -> Result<bool, RingError> {
        let avail = self.queue.avail_ring();
        let read = |offset| -> Result<u16, RingError> {
            let value: u16 =
                map.load(at(avail, offset)?, Ordering::Relaxed).map_err(|_| RingError::RingMemory(avail))?;
            Ok(u16::from_le(value))
        };
        if self.queue.event_idx_enabled() {
            let event = Wrapping(read(4 + 2 * u64::from(self.queue.size()))?);
            Ok((to - event - Wrapping(1)) < (to - from))
        } else {
            Ok(read(0)? & NO_INTERRUPT == 0)
        }
    }
}

impl VirtQueue for SplitQueue {
    fn take(&mut self, map: &Arc<GuestMap>, chain: &mut Chain) -> Result<bool, RingError> {
        let taken = take_split(&mut self.queue, self.indirect, map, chain)?;
        if taken && let Some(log) = &mut self.log {
            log.taken(chain.id.head);
        }
        Ok(taken)
    }

    fn take_again(&mut self, map: &Arc<GuestMap>, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        take_split_again(&self.queue, self.indirect, map, head, chain)
    }

    fn put_used(&mut self, map: &GuestMap, head: u16, len_bytes: u32) -> Result<(), RingError> {
        let next = self.queue.next_used();
        let slot = 4 + USED_ELEM_BYTES * u64::from(next % self.queue.size());
        // `struct virtq_used_elem`: le32 id, le32 len.
        let element = (u64::from(head) | u64::from(len_bytes) << 32).to_le();
        crash::point();
        map.write_obj(element, at(self.queue.used_ring(), slot)?).map_err(|_| self.used_error())?;
        self.queue.set_next_used(next.wrapping_add(1));
        if let Some(log) = &mut self.log {
            log.completed(head);
        }
        Ok(())
    }

    fn publish(&mut self, map: &GuestMap) -> Result<bool, RingError> {
        let (from, to) = (self.published, Wrapping(self.queue.next_used()));
        if from == to {
            return Ok(false);
        }
        crash::point();
        // Release: the elements are visible before the index that covers them.
        map.store(to.0.to_le(), at(self.queue.used_ring(), 2)?, Ordering::Release)
            .map_err(|_| self.used_error())?;
        self.published = to;
        // The mirror image of the driver's "set used_event, fence, look at the used index"; and what follows in the log
        // stays behind the store.
        fence(Ordering::SeqCst);
        if let Some(log) = &mut self.log {
            log.published(to.0);
        }
        self.wants_notification(map, from, to)
    }

    fn arm(&mut self, map: &GuestMap) -> Result<bool, RingError> {
        arm_then_look(&mut Armed { queue: &self.queue, map })
    }

    fn disarm(&mut self, map: &GuestMap) -> Result<(), RingError> {
        if self.queue.event_idx_enabled() {
            // The event index lies behind as soon as the driver passes it; nothing to write.
            return Ok(());
        }
        map.store(NO_NOTIFY.to_le(), GuestAddress(self.queue.used_ring()), Ordering::Relaxed)
            .map_err(|_| self.used_error())
    }

    fn available(&self, map: &GuestMap) -> u16 {
        let index = self.queue.avail_idx(map, Ordering::Relaxed).unwrap_or(Wrapping(self.queue.next_avail()));
        (index - Wrapping(self.queue.next_avail())).0.min(self.queue.size())
    }

    fn base(&self) -> u32 {
        u32::from(self.queue.next_avail())
    }
}

/// [`ArmSteps`] on real guest memory.
struct Armed<'a> {
    queue: &'a Queue,
    map: &'a GuestMap,
}

impl ArmSteps for Armed<'_> {
    type Error = RingError;

    fn announce(&mut self) -> Result<(), RingError> {
        let used = self.queue.used_ring();
        let (value, addr) = if self.queue.event_idx_enabled() {
            let offset = 4 + USED_ELEM_BYTES * u64::from(self.queue.size());
            (self.queue.next_avail(), at(used, offset)?)
        } else {
            (0, GuestAddress(used))
        };
        self.map.store(value.to_le(), addr, Ordering::Relaxed).map_err(|_| RingError::RingMemory(used))
    }

    fn fence(&mut self) {
        fence(Ordering::SeqCst);
    }

    fn look(&mut self) -> Result<bool, RingError> {
        let avail = self
            .queue
            .avail_idx(self.map, Ordering::Acquire)
            .map_err(|_| RingError::RingMemory(self.queue.avail_ring()))?;
        Ok(avail.0 != self.queue.next_avail())
    }
}
