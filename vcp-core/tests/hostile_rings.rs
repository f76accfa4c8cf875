//! A driver that breaks the rules of the split ring: each breach is named, and nothing panics, loops or strays.

mod support;

use std::sync::Arc;

use proptest::prelude::*;
use support::{Desc, DriverRing, INDIRECT, NEXT, WRITE};
use vcp_core::mem::GuestMap;
use vcp_core::queue::{
    Chain, MAX_CHAIN_BYTES, MAX_CHAIN_DESCRIPTORS, RingError, SplitQueue, SplitStart, VirtQueue,
};
use vm_memory::{Bytes, GuestAddress};

const MEMORY_BYTES: usize = 1 << 20;
const TABLE: u64 = 0x8000;
const DATA: u64 = 0x1_0000;

fn setup(size: u16, event_idx: bool) -> (DriverRing, SplitQueue, Arc<GuestMap>) {
    let map = Arc::new(GuestMap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap());
    let ring = DriverRing::new(&map, 0x1000, size, event_idx);
    let queue = start(&ring, true, &map).unwrap();
    (ring, queue, map)
}

fn start(ring: &DriverRing, indirect: bool, map: &GuestMap) -> Result<SplitQueue, RingError> {
    SplitQueue::start(ring.device_queue(), indirect, SplitStart::Base(0), map).map(|(queue, _)| queue)
}

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

/// What the device says to a chain made of these table entries, with head 0.
fn verdict(descs: &[Desc]) -> RingError {
    let (mut ring, mut queue, map) = setup(8, true);
    for (index, &desc) in descs.iter().enumerate() {
        ring.write_desc(ring.desc, index as u16, desc);
    }
    ring.offer(0);
    queue.take(&map, &mut Chain::default()).unwrap_err()
}

#[test]
fn a_proper_chain_is_taken_whole_and_once() {
    let (mut ring, mut queue, map) = setup(8, true);
    map.write_slice(b"request", GuestAddress(DATA)).unwrap();
    let head = ring.add(&[(DATA, 7, false), (DATA + 100, 50, true), (DATA + 200, 1, true)]).unwrap();
    let mut chain = Chain::default();
    assert!(queue.take(&map, &mut chain).unwrap());
    assert_eq!((chain.id.head, chain.readable.len_bytes(), chain.writable.len_bytes()), (head, 7, 51));
    let mut text = [0; 7];
    chain.readable.copy_to(0, &mut text);
    assert_eq!(&text, b"request");
    assert!(!queue.take(&map, &mut chain).unwrap());
    queue.put_used(&map, head, 51).unwrap();
    assert_eq!(ring.take_used(), None, "not published yet");
    assert!(queue.publish(&map).unwrap(), "used_event 0 asks to hear of the first element");
    assert_eq!(ring.take_used(), Some((head, 51)));
}

#[test]
fn an_indirect_chain_is_taken_like_a_direct_one() {
    let (mut ring, mut queue, map) = setup(8, true);
    ring.add_indirect(TABLE, &[(DATA, 16, false), (DATA + 100, 512, true), (DATA + 700, 1, true)]).unwrap();
    let mut chain = Chain::default();
    assert!(queue.take(&map, &mut chain).unwrap());
    assert_eq!((chain.readable.len_bytes(), chain.writable.len_bytes()), (16, 513));
}

#[test]
fn breaches_of_a_chain_are_named() {
    assert_eq!(verdict(&[desc(DATA, 1, NEXT, 8)]), RingError::DescriptorIndex { index: 8, size: 8 });
    assert_eq!(verdict(&[desc(DATA, 1, NEXT, 0)]), RingError::ChainTooLong(8), "a loop");
    assert_eq!(verdict(&[desc(DATA, 1, NEXT, 1), desc(DATA, 1, NEXT, 0)]), RingError::ChainTooLong(8));
    assert_eq!(
        verdict(&[desc(DATA, 1, NEXT | WRITE, 1), desc(DATA, 1, 0, 0)]),
        RingError::ReadableAfterWritable
    );
    assert!(matches!(verdict(&[desc(u64::MAX, 1, 0, 0)]), RingError::Buffer(_)));
    assert!(matches!(verdict(&[desc(u64::MAX - 1, 4, 0, 0)]), RingError::Buffer(_)));
    assert!(matches!(verdict(&[desc(MEMORY_BYTES as u64 - 1, 2, WRITE, 0)]), RingError::Buffer(_)));
    assert_eq!(verdict(&[desc(0, MAX_CHAIN_BYTES as u32 + 1, 0, 0)]), RingError::ChainTooLarge);
    assert_eq!(verdict(&[desc(0, u32::MAX, 0, 0)]), RingError::ChainTooLarge);
    assert_eq!(verdict(&[desc(TABLE, 0, INDIRECT, 0)]), RingError::IndirectLength(0));
    assert_eq!(verdict(&[desc(TABLE, 17, INDIRECT, 0)]), RingError::IndirectLength(17));
    let long = 16 * (MAX_CHAIN_DESCRIPTORS as u32 + 1);
    assert_eq!(verdict(&[desc(TABLE, long, INDIRECT, 0)]), RingError::IndirectLength(long));
    assert_eq!(verdict(&[desc(TABLE, 16, INDIRECT | NEXT, 1)]), RingError::Indirect);
    assert!(matches!(verdict(&[desc(u64::MAX - 8, 32, INDIRECT, 0)]), RingError::RingMemory(_)));
}

#[test]
fn an_indirect_table_inside_another_is_refused() {
    let (mut ring, mut queue, map) = setup(8, true);
    ring.write_desc(TABLE, 0, desc(TABLE, 16, INDIRECT, 0));
    ring.write_desc(ring.desc, 0, desc(TABLE, 16, INDIRECT, 0));
    ring.offer(0);
    assert_eq!(queue.take(&map, &mut Chain::default()), Err(RingError::Indirect));
}

#[test]
fn indirect_is_refused_where_it_was_not_negotiated() {
    let (mut ring, _, map) = setup(8, true);
    let mut queue = start(&ring, false, &map).unwrap();
    ring.add_indirect(TABLE, &[(DATA, 16, false)]).unwrap();
    assert_eq!(queue.take(&map, &mut Chain::default()), Err(RingError::Indirect));
}

#[test]
fn breaches_of_the_ring_are_named() {
    let (mut ring, mut queue, map) = setup(8, true);
    ring.set_avail_idx(9);
    assert_eq!(queue.take(&map, &mut Chain::default()), Err(RingError::AvailIndex { ahead: 9, size: 8 }));
    ring.set_avail_idx(0);
    ring.offer(8);
    assert_eq!(
        queue.take(&map, &mut Chain::default()),
        Err(RingError::DescriptorIndex { index: 8, size: 8 })
    );
    // Memory that shrank under a running ring.
    let empty = Arc::new(GuestMap::default());
    assert!(matches!(queue.take(&empty, &mut Chain::default()), Err(RingError::RingMemory(_))));
    assert!(matches!(queue.put_used(&empty, 0, 0), Err(RingError::RingMemory(_))));
    assert!(matches!(queue.arm(&empty), Err(RingError::RingMemory(_))));
    assert!(start(&ring, true, &empty).is_err());
}

#[test]
fn empty_descriptors_are_harmless() {
    let (mut ring, mut queue, map) = setup(8, true);
    ring.add(&[(DATA, 0, false), (u64::MAX, 0, true)]).unwrap();
    let mut chain = Chain::default();
    assert!(queue.take(&map, &mut chain).unwrap());
    assert!(chain.readable.is_empty() && chain.writable.is_empty());
}

#[test]
fn notifications_follow_the_event_index_across_the_wrap() {
    for event_idx in [true, false] {
        let (mut ring, mut queue, map) = setup(8, event_idx);
        let mut chain = Chain::default();
        for round in 0..70_000u32 {
            let old = ring.avail_idx;
            assert!(!queue.arm(&map).unwrap(), "round {round}: nothing to take");
            let head = ring.add(&[(DATA, 1, false)]).unwrap();
            assert!(ring.needs_kick(old), "round {round}: an armed queue wants the kick");
            assert!(queue.arm(&map).unwrap(), "round {round}: the last look sees it");
            queue.disarm(&map).unwrap();
            assert!(!ring.arm());
            assert!(queue.take(&map, &mut chain).unwrap());
            queue.put_used(&map, head, 0).unwrap();
            assert!(queue.publish(&map).unwrap(), "round {round}: an armed driver is notified");
            assert!(!queue.publish(&map).unwrap(), "round {round}: once");
            assert_eq!(ring.take_used(), Some((head, 0)));
        }
    }
}

#[test]
fn a_driver_that_does_not_look_is_not_notified_for_every_element() {
    let (mut ring, mut queue, map) = setup(8, true);
    let mut chain = Chain::default();
    let mut notified = 0;
    for _ in 0..4 {
        let head = ring.add(&[(DATA, 1, false)]).unwrap();
        queue.take(&map, &mut chain).unwrap();
        queue.put_used(&map, head, 0).unwrap();
        notified += u32::from(queue.publish(&map).unwrap());
    }
    assert_eq!(notified, 1, "used_event stayed at 0");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    /// Any bytes as a ring: the device ends each look in bounded time, and what it accepts lies in guest memory.
    #[test]
    fn any_memory_is_survived(
        bytes in prop::collection::vec(any::<u8>(), 16 * 8), small in any::<bool>(), heads in prop::collection::vec(0u16..10, 1..8),
    ) {
        let (mut ring, mut queue, map) = setup(8, true);
        for index in 0..8u16 {
            let at = usize::from(index) * 16;
            let raw: [u8; 16] = bytes[at..at + 16].try_into().unwrap();
            let word = |range: std::ops::Range<usize>| raw[range].iter().fold(0u64, |sum, &byte| sum << 8 | u64::from(byte));
            // Half of the cases use values near the valid ones, so that deep paths are reached.
            let desc = if small {
                desc(word(0..8) % MEMORY_BYTES as u64, (word(8..12) % 2048) as u32, (word(12..13) % 8) as u16, (word(14..15) % 9) as u16)
            } else {
                desc(word(0..8), word(8..12) as u32, word(12..14) as u16, word(14..16) as u16)
            };
            ring.write_desc(ring.desc, index, desc);
        }
        heads.iter().for_each(|&head| ring.offer(head));
        let mut chain = Chain::default();
        for _ in 0..heads.len() {
            match queue.take(&map, &mut chain) {
                Ok(true) => {
                    chain.writable.fill_zero(0, chain.writable.len_bytes());
                    let mut out = vec![0; chain.readable.len_bytes()];
                    chain.readable.copy_to(0, &mut out);
                }
                Ok(false) | Err(_) => break,
            }
        }
    }
}
