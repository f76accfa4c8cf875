//! The driver's side of a split virtqueue, for tests: it can follow the rules and break them.
#![allow(dead_code, unreachable_pub)] // Each test uses its own part.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vcp_core::mem::GuestMap;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// One descriptor as written to memory.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// A split virtqueue seen from the driver.
#[derive(Debug)]
pub struct DriverRing {
    pub map: Arc<GuestMap>,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub event_idx: bool,
    pub avail_idx: u16,
    pub used_seen: u16,
    free: Vec<u16>,
    /// Descriptors of each chain by its head.
    chains: Vec<Vec<u16>>,
}

impl DriverRing {
    /// A ring of `size` entries whose parts lie from `base` on, at most 64 KiB of them.
    pub fn new(map: &Arc<GuestMap>, base: u64, size: u16, event_idx: bool) -> Self {
        let desc = base;
        let avail = desc + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let end = used + 6 + 8 * u64::from(size);
        for at in (base..end.next_multiple_of(8)).step_by(8) {
            map.write_obj(0u64, GuestAddress(at)).unwrap();
        }
        Self {
            map: Arc::clone(map),
            size,
            desc,
            avail,
            used,
            event_idx,
            avail_idx: 0,
            used_seen: 0,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); size.into()],
        }
    }

    /// The device's view of the same addresses.
    pub fn device_queue(&self) -> Queue {
        let mut queue = Queue::new(self.size.next_power_of_two()).unwrap();
        queue.try_set_size(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.desc)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used)).unwrap();
        queue.set_event_idx(self.event_idx);
        queue
    }

    pub fn write_desc(&self, table: u64, index: u16, desc: Desc) {
        let at = table + 16 * u64::from(index);
        self.map.write_obj(desc.addr.to_le(), GuestAddress(at)).unwrap();
        self.map.write_obj(desc.len.to_le(), GuestAddress(at + 8)).unwrap();
        self.map.write_obj(desc.flags.to_le(), GuestAddress(at + 12)).unwrap();
        self.map.write_obj(desc.next.to_le(), GuestAddress(at + 14)).unwrap();
    }

    /// Makes `head` available without any check.
    pub fn offer(&mut self, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.avail_idx % self.size);
        self.map.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.set_avail_idx(self.avail_idx);
    }

    pub fn set_avail_idx(&self, index: u16) {
        self.map.store(index.to_le(), GuestAddress(self.avail + 2), Ordering::Release).unwrap();
    }

    /// A chain of `(address, length, writable)`; `None` if there are not enough free descriptors.
    pub fn add(&mut self, buffers: &[(u64, u32, bool)]) -> Option<u16> {
        if self.free.len() < buffers.len() {
            return None;
        }
        let indices: Vec<u16> = buffers.iter().filter_map(|_| self.free.pop()).collect();
        for (at, &(addr, len, writable)) in buffers.iter().enumerate() {
            let next = indices.get(at + 1).copied();
            let flags = if writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.write_desc(self.desc, indices[at], Desc { addr, len, flags, next: next.unwrap_or(0) });
        }
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        self.offer(head);
        Some(head)
    }

    /// A chain in an indirect table at `table`.
    pub fn add_indirect(&mut self, table: u64, buffers: &[(u64, u32, bool)]) -> Option<u16> {
        let head = self.free.pop()?;
        for (at, &(addr, len, writable)) in buffers.iter().enumerate() {
            let last = at + 1 == buffers.len();
            let flags = if writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.write_desc(table, at as u16, Desc { addr, len, flags, next: at as u16 + 1 });
        }
        let len = 16 * buffers.len() as u32;
        self.write_desc(self.desc, head, Desc { addr: table, len, flags: INDIRECT, next: 0 });
        self.chains[usize::from(head)] = vec![head];
        self.offer(head);
        Some(head)
    }

    /// Whether the device wants a kick for what was added since `old` (2.7.10).
    pub fn needs_kick(&self, old: u16) -> bool {
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = self.used + 4 + 8 * u64::from(self.size);
            let event: u16 = self.map.load(GuestAddress(at), Ordering::Relaxed).unwrap();
            self.avail_idx.wrapping_sub(u16::from_le(event)).wrapping_sub(1)
                < self.avail_idx.wrapping_sub(old)
        } else {
            let flags: u16 = self.map.load(GuestAddress(self.used), Ordering::Relaxed).unwrap();
            u16::from_le(flags) & 1 == 0
        }
    }

    pub fn used_idx(&self) -> u16 {
        u16::from_le(self.map.load(GuestAddress(self.used + 2), Ordering::Acquire).unwrap())
    }

    /// The next used element, if there is one; its descriptors are free again.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.used_idx() == self.used_seen {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.used_seen % self.size);
        let head = u32::from_le(self.map.read_obj(GuestAddress(at)).unwrap());
        let len = u32::from_le(self.map.read_obj(GuestAddress(at + 4)).unwrap());
        self.used_seen = self.used_seen.wrapping_add(1);
        let head = u16::try_from(head).expect("a head is an index");
        let chain = std::mem::take(&mut self.chains[usize::from(head)]);
        assert!(!chain.is_empty(), "used element for head {head}, which is not outstanding");
        self.free.extend(chain);
        Some((head, len))
    }

    /// Asks to be notified of the next used element, then looks; true if one is there already.
    pub fn arm(&self) -> bool {
        if self.event_idx {
            let at = self.avail + 4 + 2 * u64::from(self.size);
            self.map.store(self.used_seen.to_le(), GuestAddress(at), Ordering::Relaxed).unwrap();
        }
        fence(Ordering::SeqCst);
        self.used_idx() != self.used_seen
    }
}
