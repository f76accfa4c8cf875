//! Rings in bursts against the drivers of the other ring tests, and against drivers that write what they like.

use std::collections::VecDeque;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::mem::GuestMap;
use crate::queue::packed::Place;
use crate::queue::tests::packed::PackedDriver;
use crate::queue::tests::split::DriverRing;
use crate::queue::{RingAddresses, RingError};

const SIZE: u16 = 16;
const RING: u64 = 0x1000;
const TABLES: u64 = 0x4000;
const DATA: u64 = 0x8000;
/// Bytes between two chains' memory.
const STRIDE: u64 = 0x400;

/// Address, length, whether the device may write.
type Pieces = Vec<(u64, u32, bool)>;

fn memory() -> Arc<GuestMap> {
    // Two regions that touch, so that a buffer may cross from one to the other.
    let ranges = [(GuestAddress(0), 0xa100), (GuestAddress(0xa100), 0x2_0000)];
    Arc::new(GuestMap::from_ranges(&ranges).unwrap())
}

enum Driver {
    Split(DriverRing),
    Packed(PackedDriver),
}

impl Driver {
    fn new(map: &Arc<GuestMap>, packed: bool) -> Self {
        if packed {
            Self::Packed(PackedDriver::new(map, RING, SIZE, true))
        } else {
            Self::Split(DriverRing::new(map, RING, SIZE, true))
        }
    }

    fn add(&mut self, buffers: &[(u64, u32, bool)], table: Option<u64>) -> Option<u16> {
        match (self, table) {
            (Self::Split(ring), None) => ring.add(buffers),
            (Self::Split(ring), Some(table)) => ring.add_indirect(table, buffers),
            (Self::Packed(ring), None) => ring.add(buffers),
            (Self::Packed(ring), Some(table)) => ring.add_indirect(table, buffers),
        }
    }

    fn take_used(&mut self) -> Option<(u16, u32)> {
        match self {
            Self::Split(ring) => ring.take_used(),
            Self::Packed(ring) => ring.take_used(),
        }
    }

    fn setup(&self, direction: Direction) -> BurstSetup {
        let (at, base, packed) = match self {
            Self::Split(ring) => {
                let at = RingAddresses { size: SIZE, desc: ring.desc, avail: ring.avail, used: ring.used };
                (at, 0, false)
            }
            Self::Packed(ring) => (ring.at, 0x8000_8000, true),
        };
        BurstSetup { at, base, packed, event_idx: true, indirect: true, in_order: false, direction }
    }
}

/// Pieces of these lengths at `at`, with gaps between them.
fn pieces(at: u64, lens: &[u32], writable: bool) -> Pieces {
    let mut at = at;
    let piece = |&len: &u32| {
        let piece = (at, len, writable);
        at += u64::from(len) + 3;
        piece
    };
    lens.iter().map(piece).collect()
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (seed * 31 + at * 7) as u8).collect()
}

proptest! {
    #[test]
    fn what_the_driver_sends_arrives_whole_in_order_and_once(
        packed: bool,
        steps in prop::collection::vec(
            (prop::collection::vec(1u32..200, 1..4), any::<bool>(), 0usize..6, 0usize..6), 1..60),
    ) {
        let map = memory();
        let mut driver = Driver::new(&map, packed);
        let mut ring = BurstRing::new(&driver.setup(Direction::FromDriver), &map).unwrap();
        let mut batch = Batch::default();
        let mut sent: VecDeque<(u16, Vec<u8>)> = VecDeque::new();
        let mut outstanding = VecDeque::new();
        for (n, (lens, indirect, fetch, give)) in steps.iter().enumerate() {
            let place = n as u64;
            let buffers = pieces(DATA + STRIDE * place, lens, false);
            let table = indirect.then_some(TABLES + 0x40 * place);
            if let Some(id) = driver.add(&buffers, table) {
                let bytes = pattern(n, lens.iter().sum::<u32>() as usize);
                let mut rest = &bytes[..];
                for &(addr, len, _) in &buffers {
                    map.write_slice(&rest[..len as usize], GuestAddress(addr)).unwrap();
                    rest = &rest[len as usize..];
                }
                sent.push_back((id, bytes));
                outstanding.push_back(id);
            }
            let got = ring.fetch(&mut batch, *fetch).unwrap();
            prop_assert_eq!(got, (*fetch).min(sent.len()));
            for (at, (_, bytes)) in sent.iter().take(got).enumerate() {
                prop_assert_eq!(&batch.frame(at).to_vec(), bytes);
                prop_assert_eq!(&batch.frame(at).skip(3).to_vec(), &bytes[3.min(bytes.len())..]);
            }
            let give = (*give).min(got);
            ring.give_back(&batch, give);
            prop_assert!(driver.take_used().is_none(), "not published yet");
            ring.publish();
            for _ in 0..give {
                sent.pop_front();
                prop_assert_eq!(driver.take_used().map(|(id, _)| id), outstanding.pop_front());
            }
            prop_assert!(driver.take_used().is_none());
        }
    }

    #[test]
    fn what_is_put_arrives_whole_in_order_and_once(
        packed: bool,
        merge: bool,
        steps in prop::collection::vec(
            (prop::collection::vec(1u32..120, 1..4), any::<bool>(), 1usize..400, 0usize..3), 1..60),
    ) {
        let map = memory();
        let mut driver = Driver::new(&map, packed);
        let mut ring = BurstRing::new(&driver.setup(Direction::ToDriver), &map).unwrap();
        let mut room: VecDeque<(u16, Pieces)> = VecDeque::new();
        let source = pattern(1, 1000);
        for (n, (lens, indirect, len, skip)) in steps.iter().enumerate() {
            let place = n as u64;
            let buffers = pieces(DATA + STRIDE * place, lens, true);
            let table = indirect.then_some(TABLES + 0x40 * place);
            if let Some(id) = driver.add(&buffers, table) {
                room.push_back((id, buffers));
            }
            let mut header = [n as u8; 12];
            header[10..].copy_from_slice(&[1, 0]);
            let prefix = &[0x55u8; 7][..*skip];
            let out = Out {
                header: &header,
                count_at: merge.then_some(10),
                prefix,
                frame: Frame::of(&source),
                skip: *skip,
                len_bytes: *len,
            };
            let total = 12 + skip + len;
            let size = |(_, buffers): &(u16, Pieces)| -> usize {
                buffers.iter().map(|(_, len, _)| *len as usize).sum()
            };
            let put = ring.put(&out).unwrap();
            let mut needed = 0;
            let mut have = 0;
            while have < total && needed < room.len() && (merge || needed == 0) {
                have += size(&room[needed]);
                needed += 1;
            }
            if have < total {
                let expected = if merge || room.is_empty() { Put::Full } else { Put::TooLong };
                // A whole ring that is too small never takes it.
                prop_assert!(put == expected || (merge && put == Put::TooLong), "{:?}", put);
                ring.publish();
                prop_assert!(driver.take_used().is_none());
                continue;
            }
            prop_assert_eq!(put, Put::Done);
            prop_assert!(driver.take_used().is_none(), "not published yet");
            ring.publish();
            let mut got = Vec::new();
            for _ in 0..needed {
                let (id, buffers) = room.pop_front().unwrap();
                let (used, len) = driver.take_used().unwrap();
                prop_assert_eq!(used, id);
                let mut left = len as usize;
                for (addr, len, _) in buffers {
                    let mut bytes = vec![0; left.min(len as usize)];
                    map.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
                    left -= bytes.len();
                    got.extend(bytes);
                }
                prop_assert_eq!(left, 0);
            }
            prop_assert!(driver.take_used().is_none());
            let mut expected = header.to_vec();
            if merge {
                expected[10..12].copy_from_slice(&(needed as u16).to_le_bytes());
            }
            expected.extend_from_slice(prefix);
            expected.extend_from_slice(&source[*skip..skip + len]);
            prop_assert_eq!(got, expected);
        }
    }

    /// A driver that writes anything anywhere in its ring: an error or a frame, no panic and no access outside.
    #[test]
    fn any_ring_memory_is_survived(
        packed: bool,
        to_driver: bool,
        in_order: bool,
        base: u16,
        writes in prop::collection::vec((0u64..0x400, any::<u64>()), 0..80),
        index: u16,
    ) {
        let map = memory();
        let driver = Driver::new(&map, packed);
        for (at, word) in &writes {
            // Addresses and lengths that are sometimes inside.
            let word = if word & 3 == 0 { word & 0x0003_0fff_0001_ffff } else { *word };
            map.write_obj(word, GuestAddress(RING + (at & !7))).unwrap();
        }
        let direction = if to_driver { Direction::ToDriver } else { Direction::FromDriver };
        let mut setup = driver.setup(direction);
        setup.in_order = in_order;
        if packed {
            setup.base = u32::from((base % SIZE) | (base & 0x8000));
        } else {
            setup.base = base.into();
            map.write_obj(index, GuestAddress(setup.at.avail + 2)).unwrap();
        }
        let Ok(mut ring) = BurstRing::new(&setup, &map) else { return Ok(()) };
        let mut batch = Batch::default();
        for _ in 0..4 {
            if to_driver {
                let bytes = [7; 300];
                let out = Out {
                    header: &bytes[..12], count_at: Some(10), prefix: &[], frame: Frame::of(&bytes), skip: 0,
                    len_bytes: 300,
                };
                if ring.put(&out).is_err() {
                    return Ok(());
                }
            } else {
                let Ok(count) = ring.fetch(&mut batch, 8) else { return Ok(()) };
                (0..count).for_each(|at| drop(batch.frame(at).to_vec()));
                ring.give_back(&batch, count);
            }
            ring.publish();
            ring.arm().unwrap();
        }
    }
}

#[test]
fn one_element_stands_for_a_burst_where_the_driver_agreed() {
    let map = memory();
    let mut driver = DriverRing::new(&map, RING, SIZE, true);
    for at in 0..5 {
        driver.add(&[(DATA + at * STRIDE, 60, false)]).unwrap();
    }
    let mut setup = Driver::Split(driver).setup(Direction::FromDriver);
    setup.in_order = true;
    let mut ring = BurstRing::new(&setup, &map).unwrap();
    let mut batch = Batch::default();
    assert_eq!(ring.fetch(&mut batch, 64).unwrap(), 5);
    ring.give_back(&batch, 4);
    ring.publish();
    let index: u16 = map.read_obj(GuestAddress(setup.at.used + 2)).unwrap();
    let first: u32 = map.read_obj(GuestAddress(setup.at.used + 4)).unwrap();
    let second: u64 = map.read_obj(GuestAddress(setup.at.used + 12)).unwrap();
    assert_eq!((index, first, second), (4, 3, 0), "the last one's head, once");
    assert_eq!(ring.fetch(&mut batch, 64).unwrap(), 1);
}

#[test]
fn one_element_stands_for_a_burst_in_a_packed_ring() {
    let map = memory();
    let mut driver = PackedDriver::new(&map, RING, SIZE, true);
    let ids: Vec<u16> = (0..5).map(|at| driver.add(&[(DATA + at * STRIDE, 60, false)]).unwrap()).collect();
    let mut setup = BurstSetup {
        at: driver.at,
        base: 0x8000_8000,
        packed: true,
        event_idx: true,
        indirect: true,
        in_order: true,
        direction: Direction::FromDriver,
    };
    let mut ring = BurstRing::new(&setup, &map).unwrap();
    let mut batch = Batch::default();
    assert_eq!(ring.fetch(&mut batch, 64).unwrap(), 5);
    ring.give_back(&batch, 4);
    ring.publish();
    let id: u16 = map.read_obj(GuestAddress(driver.at.desc + 12)).unwrap();
    assert!(driver.has_used());
    assert_eq!(id, ids[3], "the last one's ID in the first one's slot");
    // Another process goes on where this one is.
    setup.base = ring.base();
    let mut next = BurstRing::new(&setup, &map).unwrap();
    assert_eq!(next.fetch(&mut batch, 64).unwrap(), 1);
}

#[test]
fn a_split_ring_goes_on_from_its_used_index() {
    let map = memory();
    let mut driver = Driver::new(&map, false);
    for at in 0..3 {
        driver.add(&[(DATA + at * STRIDE, 60, false)], None).unwrap();
    }
    let setup = driver.setup(Direction::FromDriver);
    let mut batch = Batch::default();
    let mut ring = BurstRing::new(&setup, &map).unwrap();
    ring.fetch(&mut batch, 2).unwrap();
    ring.give_back(&batch, 1);
    ring.publish();
    // Killed here; the front end remembers something older or newer.
    for base in [0, 1, 3] {
        let mut ring = BurstRing::new(&BurstSetup { base, ..setup }, &map).unwrap();
        assert_eq!(ring.fetch(&mut batch, 64).unwrap(), 2);
    }
}

/// What was under way when the process was killed comes again (or back, empty), whatever the front end remembers, and from
/// then on the ring goes on as ever: with chains of one slot and of several.
#[test]
fn a_packed_ring_goes_on_from_what_its_slots_say() {
    for lens in [&[60][..], &[12, 60], &[12, 40, 20]] {
        for published in [false, true] {
            for before in 0..3 * usize::from(SIZE) {
                goes_on(lens, published, before);
            }
        }
    }
}

fn goes_on(lens: &[u32], published: bool, before: usize) {
    let map = memory();
    let mut driver = Driver::new(&map, true);
    let setup = driver.setup(Direction::FromDriver);
    let mut batch = Batch::default();
    let send = |driver: &mut Driver, n: usize| {
        let at = DATA + STRIDE * (n % usize::from(SIZE)) as u64;
        driver.add(&pieces(at, lens, false), None).unwrap()
    };
    let found = |driver: &mut Driver, ids: &[u16]| {
        for id in ids {
            assert_eq!(driver.take_used().map(|(id, _)| id), Some(*id), "{lens:?}, {before} before");
        }
    };
    let mut ring = BurstRing::new(&setup, &map).unwrap();
    for n in 0..before {
        let id = send(&mut driver, n);
        assert_eq!(ring.fetch(&mut batch, 64).unwrap(), 1);
        ring.give_back(&batch, 1);
        ring.publish();
        found(&mut driver, &[id]);
    }
    let ids: Vec<u16> = (0..5).map(|n| send(&mut driver, before + n)).collect();
    assert_eq!(ring.fetch(&mut batch, 64).unwrap(), 5);
    ring.give_back(&batch, 3);
    if published {
        ring.publish();
    }
    // Killed here.
    let mut ring = BurstRing::new(&setup, &map).unwrap();
    found(&mut driver, &ids[..3]);
    assert!(driver.take_used().is_none());
    assert_eq!(ring.fetch(&mut batch, 64).unwrap(), 2, "{lens:?}, {before} before");
    ring.give_back(&batch, 2);
    ring.publish();
    found(&mut driver, &ids[3..]);
}

/// The process dies while it gives a chain back: the addresses in it are lost, and the chain comes back empty.
#[test]
fn a_chain_that_was_half_given_back_comes_back_empty() {
    for before in 0..2 * u64::from(SIZE) {
        let map = memory();
        let mut driver = Driver::new(&map, true);
        let setup = driver.setup(Direction::FromDriver);
        let mut batch = Batch::default();
        let mut ring = BurstRing::new(&setup, &map).unwrap();
        let chain = pieces(DATA, &[12, 40], false);
        for _ in 0..before {
            driver.add(&chain, None).unwrap();
            ring.fetch(&mut batch, 1).unwrap();
            ring.give_back(&batch, 1);
            ring.publish();
            driver.take_used().unwrap();
        }
        let place = Place { index: ring.base() as u16 & 0x7fff, wrap: ring.base() & 0x8000 != 0 };
        let ids = [driver.add(&chain, None).unwrap(), driver.add(&chain, None).unwrap()];
        for (n, slots) in [(0, 2), (1, 0)].into_iter().take(1 + before as usize % 2) {
            let place = place.advanced(n, SIZE);
            let addr = GuestAddress(setup.at.desc + 16 * u64::from(place.index));
            map.write_obj(super::recover::mark(place, slots).to_le(), addr).unwrap();
        }
        let mut ring = BurstRing::new(&setup, &map).unwrap();
        assert_eq!(driver.take_used(), Some((ids[0], 0)), "{before} before");
        assert_eq!(ring.fetch(&mut batch, 64).unwrap(), 1);
        ring.give_back(&batch, 1);
        ring.publish();
        assert_eq!(driver.take_used().map(|(id, _)| id), Some(ids[1]));
    }
}

#[test]
fn breaches_are_named() {
    let map = memory();
    let verdict = |descs: &[(u64, u32, u16, u16)], ahead: u16| {
        let ring = DriverRing::new(&map, RING, SIZE, true);
        for (index, &(addr, len, flags, next)) in descs.iter().enumerate() {
            let desc = crate::queue::tests::split::Desc { addr, len, flags, next };
            ring.write_desc(ring.desc, index as u16, desc);
        }
        ring.set_avail_idx(ahead);
        let mut ring = BurstRing::new(&Driver::Split(ring).setup(Direction::FromDriver), &map).unwrap();
        let error = ring.fetch(&mut Batch::default(), 64).unwrap_err();
        assert_eq!(ring.fetch(&mut Batch::default(), 64).unwrap_err(), error, "it stays broken");
        error
    };
    assert_eq!(verdict(&[], 17), RingError::AvailIndex { ahead: 17, size: 16 });
    assert_eq!(verdict(&[(DATA, 1, 1, 16)], 1), RingError::DescriptorIndex { index: 16, size: 16 });
    assert_eq!(verdict(&[(DATA, 1, 1, 0)], 1), RingError::ChainTooLong(16));
    assert!(matches!(verdict(&[(DATA, 1, 2, 0)], 1), RingError::Framing(_)));
    assert!(matches!(verdict(&[(0x3_0000, 1, 0, 0)], 1), RingError::Buffer(_)));
    assert!(matches!(verdict(&[(u64::MAX, 2, 0, 0)], 1), RingError::Buffer(_)));
    assert_eq!(verdict(&[(TABLES, 15, 4, 0)], 1), RingError::IndirectLength(15));
    assert_eq!(verdict(&[(TABLES, 16, 5, 0)], 1), RingError::Indirect);
}

#[test]
fn a_receive_queue_is_armed_only_for_what_it_lacks() {
    for packed in [false, true] {
        let map = memory();
        let mut driver = Driver::new(&map, packed);
        driver.add(&[(DATA, 100, true)], None).unwrap();
        let mut ring = BurstRing::new(&driver.setup(Direction::ToDriver), &map).unwrap();
        assert!(!ring.arm().unwrap(), "nobody waits for room");
        assert_eq!(ring.reserve(200, true).unwrap(), Err(Put::Full));
        ring.want(true);
        assert!(!ring.arm().unwrap(), "what is there was seen");
        driver.add(&[(DATA + STRIDE, 100, true)], None).unwrap();
        assert!(ring.arm().unwrap());
        assert_eq!(ring.reserve(200, true).unwrap(), Ok(2));
    }
}

#[test]
fn checksums_do_not_depend_on_how_a_frame_is_cut() {
    let map = memory();
    let mut driver = Driver::new(&map, false);
    let buffers = pieces(DATA, &[7, 1, 30, 5], false);
    driver.add(&buffers, None).unwrap();
    let bytes = pattern(9, 43);
    let mut rest = &bytes[..];
    for &(addr, len, _) in &buffers {
        map.write_slice(&rest[..len as usize], GuestAddress(addr)).unwrap();
        rest = &rest[len as usize..];
    }
    let mut ring = BurstRing::new(&driver.setup(Direction::FromDriver), &map).unwrap();
    let mut batch = Batch::default();
    ring.fetch(&mut batch, 1).unwrap();
    let folded = |sum: u64| (0..4).fold(sum, |sum, _| (sum & 0xffff) + (sum >> 16));
    for (from, len) in [(0, 43), (1, 40), (6, 3), (8, 1), (0, 7), (42, 9)] {
        let whole = Frame::of(&bytes).sum(from, len, 0);
        assert_eq!(folded(batch.frame(0).sum(from, len, 0)), folded(whole), "{from}+{len}");
        let plain = bytes[from..(from + len).min(43)].chunks(2);
        let plain: u64 =
            plain.map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0))).sum();
        assert_eq!(folded(whole), folded(plain));
    }
}
