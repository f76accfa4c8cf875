//! A driver that follows, and one that breaks, the rules of the packed ring: each breach is named, and nothing panics,
//! loops or strays.

#[path = "support/packed.rs"]
mod packed;

use std::collections::BTreeSet;
use std::sync::Arc;

use packed::{INDIRECT, NEXT, PackedDriver, WRITE};
use proptest::prelude::*;
use vcp_core::mem::GuestMap;
use vcp_core::queue::{
    Chain, MAX_CHAIN_BYTES, MAX_CHAIN_DESCRIPTORS, PackedQueue, PackedStart, RingAddresses, RingError,
    VirtQueue,
};
use vm_memory::{Bytes, GuestAddress};

const MEMORY_BYTES: usize = 1 << 20;
const TABLE: u64 = 0x8000;
const DATA: u64 = 0x1_0000;
/// Both positions at the start, first lap.
const START: u32 = 0x8000_8000;

fn map() -> Arc<GuestMap> {
    Arc::new(GuestMap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap())
}

fn start(at: RingAddresses, event_idx: bool, base: u32, map: &GuestMap) -> Result<PackedQueue, RingError> {
    PackedQueue::start(at, event_idx, true, PackedStart::Base(base), map).map(|(queue, _)| queue)
}

fn setup(size: u16, event_idx: bool) -> (PackedDriver, PackedQueue, Arc<GuestMap>) {
    let map = map();
    let ring = PackedDriver::new(&map, 0x1000, size, event_idx);
    let queue = start(ring.at, event_idx, START, &map).unwrap();
    (ring, queue, map)
}

/// What the device says to these descriptors.
fn verdict(descs: &[(u64, u32, u16)]) -> RingError {
    let (mut ring, mut queue, map) = setup(8, true);
    ring.offer(0, descs);
    queue.take(&map, &mut Chain::default()).unwrap_err()
}

#[test]
fn a_proper_chain_is_taken_whole_and_once() {
    let (mut ring, mut queue, map) = setup(8, true);
    map.write_slice(b"request", GuestAddress(DATA)).unwrap();
    assert!(!ring.arm());
    let id = ring.add(&[(DATA, 7, false), (DATA + 100, 50, true), (DATA + 200, 1, true)]).unwrap();
    let mut chain = Chain::default();
    assert!(queue.take(&map, &mut chain).unwrap());
    assert_eq!((chain.readable.len_bytes(), chain.writable.len_bytes()), (7, 51));
    let mut text = [0; 7];
    chain.readable.copy_to(0, &mut text);
    assert_eq!(&text, b"request");
    let head = chain.id.head;
    assert!(!queue.take(&map, &mut chain).unwrap());
    assert_eq!(queue.base(), 0x8000_8003, "three taken, nothing given back");
    queue.put_used(&map, head, 51).unwrap();
    assert_eq!(ring.take_used(), None, "not published yet");
    assert!(queue.publish(&map).unwrap(), "the driver asked to hear of the first element");
    assert_eq!(ring.take_used(), Some((id, 51)));
    assert_eq!(queue.base(), 0x8003_8003);
}

#[test]
fn an_indirect_table_is_taken_in_its_order() {
    let (mut ring, mut queue, map) = setup(8, true);
    ring.add_indirect(TABLE, &[(DATA, 16, false), (DATA + 100, 512, true), (DATA + 700, 1, true)]).unwrap();
    let mut chain = Chain::default();
    assert!(queue.take(&map, &mut chain).unwrap());
    assert_eq!((chain.readable.len_bytes(), chain.writable.len_bytes()), (16, 513));
    assert_eq!(queue.base(), 0x8000_8001, "it takes one slot");
}

#[test]
fn breaches_of_a_chain_are_named() {
    let endless: Vec<_> = (0..8).map(|n| (DATA + n, 1, NEXT)).collect();
    assert_eq!(verdict(&endless), RingError::ChainTooLong(8), "the whole ring, and on");
    assert_eq!(verdict(&[(DATA, 1, NEXT | WRITE), (DATA, 1, 0)]), RingError::ReadableAfterWritable);
    assert!(matches!(verdict(&[(u64::MAX, 1, 0)]), RingError::Buffer(_)));
    assert!(matches!(verdict(&[(MEMORY_BYTES as u64 - 1, 2, WRITE)]), RingError::Buffer(_)));
    assert_eq!(verdict(&[(0, MAX_CHAIN_BYTES as u32 + 1, 0)]), RingError::ChainTooLarge);
    assert_eq!(verdict(&[(0, u32::MAX, 0)]), RingError::ChainTooLarge);
    assert_eq!(verdict(&[(TABLE, 0, INDIRECT)]), RingError::IndirectLength(0));
    assert_eq!(verdict(&[(TABLE, 17, INDIRECT)]), RingError::IndirectLength(17));
    let long = 16 * (MAX_CHAIN_DESCRIPTORS as u32 + 1);
    assert_eq!(verdict(&[(TABLE, long, INDIRECT)]), RingError::IndirectLength(long));
    assert_eq!(verdict(&[(TABLE, 16, INDIRECT | NEXT), (DATA, 1, 0)]), RingError::Indirect);
    assert!(matches!(verdict(&[(u64::MAX - 8, 32, INDIRECT)]), RingError::RingMemory(_)));
    assert!(matches!(verdict(&[(MEMORY_BYTES as u64 - 16, 32, INDIRECT)]), RingError::RingMemory(_)));
}

#[test]
fn indirect_is_refused_where_it_was_not_negotiated() {
    let map = map();
    let mut ring = PackedDriver::new(&map, 0x1000, 8, true);
    let (mut queue, _) = PackedQueue::start(ring.at, true, false, PackedStart::Base(START), &map).unwrap();
    ring.add_indirect(TABLE, &[(DATA, 16, false)]).unwrap();
    assert_eq!(queue.take(&map, &mut Chain::default()), Err(RingError::Indirect));
}

#[test]
fn slots_in_flight_are_not_taken_twice() {
    let (mut ring, mut queue, map) = setup(4, true);
    let mut chain = Chain::default();
    for _ in 0..4 {
        ring.add(&[(DATA, 1, false)]).unwrap();
        assert!(queue.take(&map, &mut chain).unwrap());
    }
    assert!(!queue.take(&map, &mut chain).unwrap(), "all of the ring is in flight");
    ring.offer(0, &[(DATA, 1, 0)]);
    assert_eq!(
        queue.take(&map, &mut chain),
        Err(RingError::ChainTooLong(0)),
        "the driver fills a slot that it does not own"
    );
}

#[test]
fn rings_that_cannot_be_are_refused() {
    let map = map();
    let at = PackedDriver::new(&map, 0x1000, 8, true).at;
    let refused = |at, base| start(at, true, base, &map).unwrap_err();
    assert!(matches!(refused(RingAddresses { size: 0, ..at }, START), RingError::RingMemory(_)));
    assert!(matches!(refused(RingAddresses { size: 0x8001, ..at }, START), RingError::RingMemory(_)));
    assert!(matches!(refused(RingAddresses { desc: 0x1008, ..at }, START), RingError::RingMemory(0x1008)));
    assert!(matches!(refused(RingAddresses { avail: 0x2002, ..at }, START), RingError::RingMemory(0x2002)));
    assert!(matches!(refused(RingAddresses { used: u64::MAX - 3, ..at }, START), RingError::RingMemory(_)));
    assert!(matches!(
        refused(RingAddresses { desc: MEMORY_BYTES as u64 - 16, ..at }, START),
        RingError::RingMemory(_)
    ));
    assert_eq!(refused(at, 0x8008), RingError::Base(0x8008));
    assert_eq!(refused(at, 0x8008_0000), RingError::Base(0x8008_0000));
    assert!(start(RingAddresses { size: 7, ..at }, true, START, &map).is_ok(), "need not be a power of two");
    // Memory that shrank under a running ring.
    let mut queue = start(at, true, START, &map).unwrap();
    let empty = Arc::new(GuestMap::default());
    assert!(matches!(queue.take(&empty, &mut Chain::default()), Err(RingError::RingMemory(_))));
    assert!(matches!(queue.arm(&empty), Err(RingError::RingMemory(_))));
    assert!(matches!(queue.disarm(&empty), Err(RingError::RingMemory(_))));
}

#[test]
fn bases_have_both_positions_or_one() {
    let map = map();
    let at = PackedDriver::new(&map, 0x1000, 8, true).at;
    let base = |base| start(at, true, base, &map).unwrap().base();
    assert_eq!(base(0x8003_8005), 0x8003_8005, "as QEMU and Linux send it");
    assert_eq!(base(0x8000), 0x8000_8000, "as DPDK's virtio_user sends it");
    assert_eq!(base(3), 0x0003_0003);
    assert_eq!(base(0x8007_0001), 0x8007_0001, "the used position one lap behind");
}

#[test]
fn a_stopped_ring_goes_on_where_it_was() {
    let (mut ring, mut queue, map) = setup(4, true);
    let mut chain = Chain::default();
    for round in 0..23 {
        let id = ring.add(&[(DATA, 1, false), (DATA, 1, true), (DATA, 1, true)]).unwrap();
        assert!(queue.take(&map, &mut chain).unwrap(), "round {round}");
        queue.put_used(&map, chain.id.head, 2).unwrap();
        queue.publish(&map).unwrap();
        assert_eq!(ring.take_used(), Some((id, 2)), "round {round}");
        assert_eq!(queue.base(), ring.base(), "round {round}");
        queue = start(ring.at, true, queue.base(), &map).unwrap();
    }
}

#[test]
fn a_chain_that_was_overwritten_in_the_ring_can_be_taken_again() {
    let (mut ring, mut queue, map) = setup(4, true);
    let mut chain = Chain::default();
    map.write_slice(b"kept", GuestAddress(DATA)).unwrap();
    let first = ring.add(&[(DATA, 4, false), (DATA + 8, 1, true)]).unwrap();
    let second = ring.add(&[(DATA + 16, 1, true)]).unwrap();
    assert!(queue.take(&map, &mut chain).unwrap());
    let head = chain.id.head;
    assert!(queue.take(&map, &mut chain).unwrap());
    // The second is used first: its element lies where the first one's descriptor was.
    queue.put_used(&map, chain.id.head, 1).unwrap();
    queue.publish(&map).unwrap();
    assert_eq!(ring.take_used(), Some((second, 1)));
    queue.take_again(&map, head, &mut chain).unwrap();
    let mut text = [0; 4];
    chain.readable.copy_to(0, &mut text);
    assert_eq!((&text, chain.writable.len_bytes()), (b"kept", 1));
    queue.put_used(&map, head, 1).unwrap();
    queue.publish(&map).unwrap();
    assert_eq!(ring.take_used(), Some((first, 1)));
}

#[test]
fn notifications_follow_the_event_structures_across_the_wrap() {
    for (size, event_idx) in [(8, true), (7, true), (8, false)] {
        let (mut ring, mut queue, map) = setup(size, event_idx);
        let mut chain = Chain::default();
        for round in 0..70_000u32 {
            let old = ring.avail;
            assert!(!queue.arm(&map).unwrap(), "round {round}: nothing to take");
            let slots: Vec<_> = (0..=round % 3).map(|_| (DATA, 1, false)).collect();
            let id = ring.add(&slots).unwrap();
            assert!(ring.needs_kick(old), "round {round}: an armed queue wants the kick");
            assert!(queue.arm(&map).unwrap(), "round {round}: the last look sees it");
            queue.disarm(&map).unwrap();
            assert!(!ring.needs_kick(old), "round {round}: disarmed");
            assert!(!ring.arm());
            assert!(queue.take(&map, &mut chain).unwrap());
            queue.put_used(&map, chain.id.head, 0).unwrap();
            assert!(queue.publish(&map).unwrap(), "round {round}: an armed driver is notified");
            assert!(!queue.publish(&map).unwrap(), "round {round}: once");
            assert_eq!(ring.take_used(), Some((id, 0)));
        }
    }
}

#[test]
fn a_driver_that_does_not_look_is_not_notified_for_every_element() {
    let (mut ring, mut queue, map) = setup(8, true);
    let mut chain = Chain::default();
    let mut notified = 0;
    assert!(!ring.arm());
    for _ in 0..4 {
        ring.add(&[(DATA, 1, false)]).unwrap();
        queue.take(&map, &mut chain).unwrap();
        queue.put_used(&map, chain.id.head, 0).unwrap();
        notified += u32::from(queue.publish(&map).unwrap());
    }
    assert_eq!(notified, 1, "the event stayed at the first element");
    ring.disarm();
    ring.add(&[(DATA, 1, false)]).unwrap();
    queue.take(&map, &mut chain).unwrap();
    queue.put_used(&map, chain.id.head, 0).unwrap();
    assert!(!queue.publish(&map).unwrap());
}

/// What the model driver and the device do next.
#[derive(Clone, Debug)]
enum Step {
    /// Add a chain of so many slots; 0: an indirect one.
    Add(u16),
    Take,
    /// Give back one of those taken.
    Complete(prop::sample::Index),
    Publish,
    Collect,
    /// Stop and start at the base that was reported, with nothing unpublished.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u16..4).prop_map(Step::Add),
        4 => Just(Step::Take),
        4 => any::<prop::sample::Index>().prop_map(Step::Complete),
        2 => Just(Step::Publish),
        2 => Just(Step::Collect),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..300)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    /// Any order of steps: every chain is taken once, in the order in which it was added, and answered once, in the
    /// order of completion and with the right length.
    #[test]
    fn device_and_model_driver_agree(size in 2u16..9, event_idx in any::<bool>(), steps in steps()) {
        let (mut ring, mut queue, map) = setup(size, event_idx);
        let (mut added, mut taken, mut completed, mut visible) =
            (Vec::new(), Vec::new(), Vec::new(), std::collections::VecDeque::new());
        let mut chain = Chain::default();
        for step in steps {
            match step {
                Step::Add(slots) => {
                    // The address tells the chain.
                    let addr = DATA + 16 * (added.len() as u64 % 1000);
                    let buffers: Vec<_> = (0..slots.max(2)).map(|n| (addr, 16, n != 0)).collect();
                    let table = TABLE + 64 * (added.len() as u64 % 64);
                    let id = match slots {
                        0 => ring.add_indirect(table, &buffers),
                        1 => ring.add(&[(addr, 16, true)]),
                        _ => ring.add(&buffers),
                    };
                    if let Some(id) = id {
                        added.push((id, if slots == 1 { 16 } else { 16 * (u32::from(slots.max(2)) - 1) }));
                    }
                }
                Step::Take => {
                    let expected = taken.len() < added.len();
                    prop_assert_eq!(queue.take(&map, &mut chain), Ok(expected));
                    if expected {
                        let (id, writable) = added[taken.len()];
                        prop_assert_eq!(chain.writable.len_bytes(), writable as usize);
                        taken.push(Some((chain.id.head, id, writable)));
                    }
                }
                Step::Complete(which) => {
                    let open: Vec<_> = (0..taken.len()).filter(|&at| taken[at].is_some()).collect();
                    if !open.is_empty()
                        && let Some((head, id, len)) = taken[*which.get(&open)].take()
                    {
                        queue.put_used(&map, head, len).unwrap();
                        completed.push((id, len));
                    }
                }
                Step::Publish => {
                    queue.publish(&map).unwrap();
                    visible.extend(completed.drain(..));
                }
                Step::Collect => {
                    while let Some(used) = ring.take_used() {
                        prop_assert_eq!(Some(used), visible.pop_front());
                    }
                    prop_assert!(visible.is_empty(), "published, but not seen");
                }
                Step::Restart if taken.iter().all(Option::is_none) => {
                    queue.publish(&map).unwrap();
                    visible.extend(completed.drain(..));
                    queue = start(ring.at, event_idx, queue.base(), &map).unwrap();
                }
                Step::Restart => {}
            }
            // No two chains in flight have the same number.
            let heads: BTreeSet<u16> = taken.iter().flatten().map(|(head, ..)| *head).collect();
            prop_assert_eq!(heads.len(), taken.iter().flatten().count());
        }
    }

    /// Any bytes as a ring: the device ends each look in bounded time, and what it accepts lies in guest memory.
    #[test]
    fn any_memory_is_survived(words in prop::collection::vec(any::<(u64, u32, u16, u16)>(), 8), small in any::<bool>()) {
        let (ring, mut queue, map) = setup(8, true);
        for (index, &(addr, len, id, flags)) in (0u16..).zip(&words) {
            // Half of the cases use values near the valid ones, so that deep paths are reached.
            if small {
                let available = if flags & 0x100 == 0 { packed::AVAIL } else { flags & 0x8080 };
                ring.write_desc(ring.at.desc, index, addr % MEMORY_BYTES as u64, len % 2048, id, flags & 7 | available);
            } else {
                ring.write_desc(ring.at.desc, index, addr, len, id, flags);
            }
        }
        let mut chain = Chain::default();
        for round in 0..20u32 {
            match queue.take(&map, &mut chain) {
                Ok(true) => {
                    let len = chain.writable.len_bytes();
                    chain.writable.fill_zero(0, len);
                    queue.put_used(&map, chain.id.head, len as u32).unwrap();
                    if round % 3 == 0 {
                        queue.publish(&map).unwrap();
                    }
                }
                Ok(false) | Err(_) => break,
            }
        }
    }
}
