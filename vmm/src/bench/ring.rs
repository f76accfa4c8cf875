//! The driver's side of a split virtqueue (virtio 1.2, 2.7) with fixed request slots: a slot owns its descriptors, its
//! header, its status byte and its data for good.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use anyhow::{Result, bail};
use vhost::VringConfigData;
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};

use super::args::WaitMode;
use super::shared::Shared;

const DESCRIPTOR: usize = 16;
const HEADER: usize = 16;
const PER_REQUEST: usize = 3;
/// The least and the largest ring; backends commonly take 128 to 1024 entries.
const MIN_SIZE: usize = 128;
const MAX_SIZE: usize = 1024;
const PAGE: usize = 4096;

/// Where everything of one queue lies in the shared region.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    size: usize,
    slots: usize,
    data_bytes: usize,
    indirect: bool,
    descriptors: usize,
    avail: usize,
    used: usize,
    tables: usize,
    headers: usize,
    statuses: usize,
    data: usize,
    end: usize,
}

impl Layout {
    /// Lays a queue out from `start` for `slots` requests with up to `data_bytes` of data each.
    pub(super) fn new(start: usize, slots: u16, data_bytes: usize, indirect: bool) -> Result<Self> {
        let slots = usize::from(slots);
        let entries = if indirect { slots } else { slots * PER_REQUEST };
        let size = entries.next_power_of_two().max(MIN_SIZE);
        if size > MAX_SIZE {
            bail!(
                "--qd {slots} needs a ring of {size} entries without indirect descriptors; the largest is {MAX_SIZE}"
            );
        }
        let mut next = start;
        let mut take = |len: usize| {
            let at = next;
            next = (next + len).next_multiple_of(PAGE);
            at
        };
        let descriptors = take(size * DESCRIPTOR);
        let avail = take(6 + 2 * size);
        let used = take(6 + 8 * size);
        let tables = take(slots * PER_REQUEST * DESCRIPTOR);
        let headers = take(slots * HEADER);
        let statuses = take(slots);
        let data = take(slots * data_bytes);
        let end = take(0);
        Ok(Self {
            size,
            slots,
            data_bytes,
            indirect,
            descriptors,
            avail,
            used,
            tables,
            headers,
            statuses,
            data,
            end,
        })
    }

    /// First free byte behind the queue.
    pub(super) fn end(&self) -> usize {
        self.end
    }
}

/// A request in a slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    /// Request type (virtio 1.2, 5.2.6).
    pub(super) kind: u32,
    /// First sector.
    pub(super) sector: u64,
    /// Bytes of data; 0 for none.
    pub(super) len: usize,
    /// Whether the device writes the data.
    pub(super) device_writes: bool,
}

/// The driver's side of one virtqueue.
#[derive(Debug)]
pub(super) struct Ring {
    memory: Arc<Shared>,
    layout: Layout,
    event_idx: bool,
    avail_idx: u16,
    /// `avail_idx` when the device's wish to be kicked was last looked at.
    looked_idx: u16,
    used_idx: u16,
}

impl Ring {
    pub(super) fn new(memory: Arc<Shared>, layout: Layout, event_idx: bool) -> Self {
        Self { memory, layout, event_idx, avail_idx: 0, looked_idx: 0, used_idx: 0 }
    }

    /// Number of ring entries.
    pub(super) fn size(&self) -> u16 {
        self.layout.size as u16
    }

    /// Where the backend finds the ring.
    pub(super) fn config(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size(),
            queue_size: self.size(),
            flags: 0,
            desc_table_addr: self.memory.address(self.layout.descriptors),
            used_ring_addr: self.memory.address(self.layout.used),
            avail_ring_addr: self.memory.address(self.layout.avail),
            log_addr: None,
        }
    }

    /// Offset of a slot's data in the shared region.
    pub(super) fn data(&self, slot: u16) -> usize {
        self.layout.data + usize::from(slot) * self.layout.data_bytes
    }

    /// Returns the status byte of a slot.
    pub(super) fn status(&self, slot: u16) -> u8 {
        self.memory.get(self.layout.statuses + usize::from(slot))
    }

    /// Writes a request's header and descriptors and makes it available. [`Ring::should_kick`] says whether to kick.
    pub(super) fn submit(&mut self, slot: u16, request: Request) {
        let at = usize::from(slot);
        let header = self.layout.headers + at * HEADER;
        let status = self.layout.statuses + at;
        self.memory.put(header, request.kind);
        self.memory.put(header + 4, 0u32);
        self.memory.put(header + 8, request.sector);
        // Not a status that a device writes, so that a completion without one is seen.
        self.memory.put(status, 0xffu8);

        let (table, first) = match self.layout.indirect {
            true => (self.layout.tables + at * PER_REQUEST * DESCRIPTOR, 0),
            false => (self.layout.descriptors + at * PER_REQUEST * DESCRIPTOR, at * PER_REQUEST),
        };
        let device_writes = if request.device_writes { VRING_DESC_F_WRITE } else { 0 };
        let mut entries = 0;
        let mut push = |offset: usize, len: usize, flags: u32, last: bool| {
            let flags = if last { flags } else { flags | VRING_DESC_F_NEXT };
            let next = if last { 0 } else { first + entries + 1 };
            self.descriptor(table + entries * DESCRIPTOR, self.memory.guest(offset), len, flags, next);
            entries += 1;
        };
        push(header, HEADER, 0, false);
        if request.len > 0 {
            push(self.data(slot), request.len, device_writes, false);
        }
        push(status, 1, VRING_DESC_F_WRITE, true);
        let head = match self.layout.indirect {
            true => {
                let own = self.layout.descriptors + at * DESCRIPTOR;
                self.descriptor(
                    own,
                    self.memory.guest(table),
                    entries * DESCRIPTOR,
                    VRING_DESC_F_INDIRECT,
                    0,
                );
                slot
            }
            false => first as u16,
        };
        let entry = usize::from(self.avail_idx) % self.layout.size;
        self.memory.store16(self.layout.avail + 4 + 2 * entry, head, Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.memory.store16(self.layout.avail + 2, self.avail_idx, Ordering::Release);
    }

    fn descriptor(&self, at: usize, address: u64, len: usize, flags: u32, next: usize) {
        self.memory.put(at, address);
        self.memory.put(at + 8, len as u32);
        self.memory.put(at + 12, flags as u16);
        self.memory.put(at + 14, next as u16);
    }

    /// Returns whether the device wants a kick for what was submitted since the last look (2.7.10).
    pub(super) fn should_kick(&mut self) -> bool {
        let (old, new) = (self.looked_idx, self.avail_idx);
        self.looked_idx = new;
        if old == new {
            return false;
        }
        // The device arms its notification and then looks at the ring; we fill the ring and then look at its wish.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.memory.load16(self.layout.used + 4 + 8 * self.layout.size, Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            u32::from(self.memory.load16(self.layout.used, Ordering::Relaxed)) & VRING_USED_F_NO_NOTIFY == 0
        }
    }

    /// Returns whether something is completed.
    pub(super) fn has_completed(&self) -> bool {
        self.memory.load16(self.layout.used + 2, Ordering::Acquire) != self.used_idx
    }

    /// Takes the next completed slot.
    pub(super) fn complete(&mut self) -> Result<Option<u16>> {
        let device_idx = self.memory.load16(self.layout.used + 2, Ordering::Acquire);
        let pending = device_idx.wrapping_sub(self.used_idx);
        if pending == 0 {
            return Ok(None);
        }
        if usize::from(pending) > self.layout.slots {
            bail!(
                "the backend moved its used index from {} to {device_idx}: that many were never made",
                self.used_idx
            );
        }
        let entry = usize::from(self.used_idx) % self.layout.size;
        let id = self.memory.load32(self.layout.used + 4 + 8 * entry, Ordering::Relaxed) as usize;
        self.used_idx = self.used_idx.wrapping_add(1);
        let step = if self.layout.indirect { 1 } else { PER_REQUEST };
        if !id.is_multiple_of(step) || id / step >= self.layout.slots {
            bail!("the backend completed descriptor {id}, which is the head of no request");
        }
        Ok(Some((id / step) as u16))
    }

    /// Asks for calls or for none. To be repeated after completions were taken: with EVENT_IDX the wish is an index.
    pub(super) fn want_calls(&self, wait: WaitMode) {
        if self.event_idx {
            let event = match wait {
                WaitMode::Event => self.used_idx,
                // As far from the next completion as it gets.
                WaitMode::Poll => self.used_idx.wrapping_add(0x8000),
            };
            self.memory.store16(self.layout.avail + 4 + 2 * self.layout.size, event, Ordering::Release);
        } else {
            let flags = if wait == WaitMode::Poll { VRING_AVAIL_F_NO_INTERRUPT as u16 } else { 0 };
            self.memory.store16(self.layout.avail, flags, Ordering::Release);
        }
        // Then the ring is looked at once more: the device looks at the wish after it has moved its index.
        fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
