//! The driver's side against the device's side of the `virtio-queue` crate, which is written by others.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;

/// The same bytes as guest memory, copied there and back around each step of the device.
struct Device {
    memory: GuestMemoryMmap,
    queue: Queue,
    base: u64,
    len: usize,
}

impl Device {
    fn new(shared: &Shared, layout: &Layout, event_idx: bool) -> Self {
        let base = shared.guest(0);
        let len = layout.end();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(base), len)]).unwrap();
        let mut queue = Queue::new(1024).unwrap();
        queue.set_size(layout.size as u16);
        queue.set_event_idx(event_idx);
        queue.try_set_desc_table_address(GuestAddress(shared.guest(layout.descriptors))).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(shared.guest(layout.avail))).unwrap();
        queue.try_set_used_ring_address(GuestAddress(shared.guest(layout.used))).unwrap();
        queue.set_ready(true);
        Self { memory, queue, base, len }
    }

    fn copy_in(&self, shared: &Shared) {
        let mut bytes = vec![0; self.len];
        shared.read(0, &mut bytes);
        self.memory.write_slice(&bytes, GuestAddress(self.base)).unwrap();
    }

    fn copy_out(&self, shared: &Shared) {
        let mut bytes = vec![0; self.len];
        self.memory.read_slice(&mut bytes, GuestAddress(self.base)).unwrap();
        shared.write(0, &bytes);
    }

    /// Takes all requests, answers each with its sector in every data byte, and returns the sectors.
    fn serve(&mut self, shared: &Shared) -> Vec<u64> {
        self.copy_in(shared);
        let mut sectors = Vec::new();
        while let Some(mut chain) = self.queue.pop_descriptor_chain(&self.memory) {
            let head = chain.head_index();
            let header = chain.next().unwrap();
            assert!(!header.is_write_only() && header.len() == 16);
            let sector: u64 = self.memory.read_obj(GuestAddress(header.addr().0 + 8)).unwrap();
            let data = chain.next().unwrap();
            assert!(data.is_write_only());
            self.memory.write_slice(&vec![sector as u8; data.len() as usize], data.addr()).unwrap();
            let status = chain.next().unwrap();
            assert!(status.is_write_only() && status.len() == 1 && chain.next().is_none());
            self.memory.write_obj(0u8, status.addr()).unwrap();
            self.queue.add_used(&self.memory, head, data.len() + 1).unwrap();
            sectors.push(sector);
        }
        self.copy_out(shared);
        sectors
    }
}

fn setup(slots: u16, indirect: bool, event_idx: bool) -> (Arc<Shared>, Ring, Device) {
    let layout = Layout::new(0, slots, 512, indirect).unwrap();
    let shared = Arc::new(Shared::new(layout.end()).unwrap());
    let device = Device::new(&shared, &layout, event_idx);
    (Arc::clone(&shared), Ring::new(shared, layout, event_idx), device)
}

const fn read(sector: u64) -> Request {
    Request { kind: 0, sector, len: 512, device_writes: true }
}

/// More than 65536 requests, so that every index wraps.
fn around(indirect: bool, event_idx: bool) {
    let (shared, mut ring, mut device) = setup(5, indirect, event_idx);
    let mut sector = 0;
    for _ in 0..14_000 {
        for slot in 0..5 {
            ring.submit(slot, read(sector + u64::from(slot)));
        }
        assert_eq!(device.serve(&shared), (sector..sector + 5).collect::<Vec<_>>());
        for slot in 0..5u16 {
            assert_eq!(ring.complete().unwrap(), Some(slot));
            assert_eq!(ring.status(slot), 0);
            assert_eq!(shared.get::<u8>(ring.data(slot) + 511), (sector + u64::from(slot)) as u8);
        }
        assert_eq!(ring.complete().unwrap(), None);
        sector += 5;
    }
}

#[test]
fn direct_descriptors_around_the_indices() {
    around(false, false);
}

#[test]
fn indirect_descriptors_around_the_indices() {
    around(true, true);
}

#[test]
fn kick_is_asked_once_for_a_batch_and_never_when_suppressed() {
    let (shared, mut ring, mut device) = setup(4, true, true);
    assert!(!ring.should_kick());
    ring.submit(0, read(1));
    ring.submit(1, read(2));
    assert!(ring.should_kick(), "the event index is 0: the first request is asked for");
    assert!(!ring.should_kick(), "nothing new");
    device.serve(&shared);
    ring.submit(2, read(3));
    assert!(!ring.should_kick(), "the device did not arm again");
    device.serve(&shared);
    device.copy_in(&shared);
    device.queue.enable_notification(&device.memory).unwrap();
    device.copy_out(&shared);
    ring.submit(3, read(4));
    assert!(ring.should_kick(), "the device armed before the last request");
}

#[test]
fn calls_are_asked_for_and_suppressed() {
    for event_idx in [false, true] {
        let (shared, mut ring, mut device) = setup(4, true, event_idx);
        ring.want_calls(WaitMode::Event);
        ring.submit(0, read(1));
        device.serve(&shared);
        assert!(device.queue.needs_notification(&device.memory).unwrap());
        ring.complete().unwrap();
        ring.want_calls(WaitMode::Poll);
        ring.submit(0, read(1));
        device.serve(&shared);
        // Without EVENT_IDX the crate leaves the flag to its caller.
        let wanted = if event_idx {
            device.queue.needs_notification(&device.memory).unwrap()
        } else {
            shared.load16(ring.layout.avail, Ordering::Relaxed) & 1 == 0
        };
        assert!(!wanted);
    }
}

#[test]
fn wrong_completions_are_refused() {
    let (shared, mut ring, _) = setup(4, false, false);
    ring.submit(0, read(1));
    shared.put(ring.layout.used + 4, 1u32);
    shared.store16(ring.layout.used + 2, 1, Ordering::Release);
    let error = ring.complete().unwrap_err().to_string();
    assert_eq!(error, "the backend completed descriptor 1, which is the head of no request");
    shared.store16(ring.layout.used + 2, 0x4000, Ordering::Release);
    assert!(ring.complete().unwrap_err().to_string().contains("that many were never made"));
}

#[test]
fn depth_that_fits_no_ring_is_refused() {
    assert!(Layout::new(0, 400, 512, false).is_err());
    assert!(Layout::new(0, 1024, 512, true).is_ok());
}
