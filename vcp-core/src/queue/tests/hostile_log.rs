//! What a front end hands over as the in-flight log: anything is refused or made sense of, and nothing strays.

use std::fs::File;
use std::sync::Arc;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::{Bytes, VolatileMemory};

use super::{Driver, SIZE, area, memory};
use crate::queue::log::{LogArea, LogError, LogFormat, LogSpec};
use crate::queue::{Chain, Ring, RingError, VirtQueue};

fn memfd(len_bytes: u64, flags: MemfdFlags, seals: SealFlags) -> File {
    let fd = memfd_create(c"test", flags).unwrap();
    rustix::fs::ftruncate(&fd, len_bytes).unwrap();
    if !seals.is_empty() {
        fcntl_add_seals(&fd, seals).unwrap();
    }
    fd.into()
}

const SPEC: LogSpec = LogSpec { len_bytes: 0x1000, offset: 0, queues: 2, queue_size: 8 };

fn map(spec: LogSpec, file: File) -> Result<LogArea, LogError> {
    LogArea::map(spec, file, LogFormat::Packed)
}

#[test]
fn areas_that_could_hurt_are_refused() {
    let sealable = || memfd(0x2000, MemfdFlags::ALLOW_SEALING, SealFlags::empty());
    map(SPEC, sealable()).unwrap();
    map(LogSpec { offset: 0x1000, ..SPEC }, sealable()).unwrap();
    for bad in [
        LogSpec { len_bytes: 0, ..SPEC },
        LogSpec { len_bytes: 2 * 320 - 1, ..SPEC },
        LogSpec { len_bytes: 0x2001, ..SPEC },
        LogSpec { offset: 0x2000, ..SPEC },
        LogSpec { offset: u64::MAX, ..SPEC },
        LogSpec { len_bytes: u64::MAX, offset: 0x1000, ..SPEC },
        LogSpec { queues: u16::MAX, queue_size: u16::MAX, ..SPEC },
        LogSpec { queues: 0, ..SPEC },
    ] {
        let error = map(bad, sealable()).unwrap_err();
        assert!(matches!(error, LogError::Size { .. }), "{bad:?}: {error}");
    }
    assert_eq!(map(LogSpec { offset: 0x800, ..SPEC }, sealable()).unwrap_err(), LogError::Offset(0x800));
    // Could be cut short under us.
    assert_eq!(
        map(SPEC, memfd(0x1000, MemfdFlags::empty(), SealFlags::empty())).unwrap_err(),
        LogError::NotSealed
    );
    let grow_only = memfd(0x1000, MemfdFlags::ALLOW_SEALING, SealFlags::GROW | SealFlags::SEAL);
    assert_eq!(map(SPEC, grow_only).unwrap_err(), LogError::NotSealed);
    let plain = tempfile::tempfile().unwrap();
    plain.set_len(0x1000).unwrap();
    assert_eq!(map(SPEC, plain).unwrap_err(), LogError::NotSealed);
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    assert!(map(SPEC, reader.into()).is_err());
    // One that may not be written cannot be a log.
    let read_only = memfd(0x1000, MemfdFlags::ALLOW_SEALING, SealFlags::SHRINK | SealFlags::WRITE);
    assert!(matches!(map(SPEC, read_only), Err(LogError::System { .. })));
}

#[test]
fn what_we_make_cannot_change_its_size_and_has_the_layout_of_the_specification() {
    let (spec, file) = LogArea::create(3, 128, LogFormat::Split).unwrap();
    assert_eq!((spec.len_bytes, spec.offset), (3 * 2112, 0), "16 + 16 * 128, rounded up to 64");
    assert!(file.set_len(1).is_err() && file.set_len(1 << 20).is_err());
    assert_eq!(LogArea::create(1, 128, LogFormat::Packed).unwrap().0.len_bytes, 32 + 32 * 128 + 32);
}

/// Loads one number of queue 1's region.
fn word<const N: usize>(log: &LogArea, is_packed: bool, at: usize) -> u64 {
    let stride = if is_packed { LogFormat::Packed } else { LogFormat::Split }.stride(SIZE);
    let mut bytes = [0; 8];
    log.memory().as_volatile_slice().read_slice(&mut bytes[..N], stride + at).unwrap();
    u64::from_ne_bytes(bytes)
}

#[test]
fn a_split_region_reads_as_the_specification_has_it() {
    let mut driver = Driver::new(&memory(), false);
    let log = area(false);
    let (mut ring, _) = driver.start(0, Some(&log)).unwrap();
    let map = Arc::clone(driver.map());
    let mut chain = Chain::default();
    let mut heads = Vec::new();
    for _ in 0..3 {
        driver.add(2);
        assert!(ring.take(&map, &mut chain).unwrap());
        heads.push(chain.id.head);
    }
    let entry = |head: u16| 16 + 16 * usize::from(head);
    for (counter, &head) in (0..).zip(&heads) {
        assert_eq!(
            (word::<1>(&log, false, entry(head)), word::<8>(&log, false, entry(head) + 8)),
            (1, counter)
        );
    }
    ring.put_used(&map, heads[2], 16).unwrap();
    ring.put_used(&map, heads[0], 16).unwrap();
    assert_eq!(word::<2>(&log, false, 12), u64::from(heads[0]), "last_batch_head");
    assert_eq!(word::<2>(&log, false, entry(heads[0]) + 6), u64::from(heads[2]), "next");
    assert_eq!(word::<2>(&log, false, 14), 0, "used_idx");
    ring.publish(&map).unwrap();
    let inflight: Vec<u64> = heads.iter().map(|&head| word::<1>(&log, false, entry(head))).collect();
    assert_eq!(inflight, [0, 1, 0]);
    let header = [
        word::<8>(&log, false, 0),
        word::<2>(&log, false, 8),
        word::<2>(&log, false, 10),
        word::<2>(&log, false, 14),
    ];
    assert_eq!(header, [0, 1, u64::from(SIZE), 2], "features, version, desc_num, used_idx");
}

#[test]
fn a_packed_region_reads_as_the_specification_has_it() {
    let mut driver = Driver::new(&memory(), true);
    let log = area(true);
    let (mut ring, _) = driver.start(0x8000_8000, Some(&log)).unwrap();
    let map = Arc::clone(driver.map());
    let mut chain = Chain::default();
    driver.add(3);
    assert!(ring.take(&map, &mut chain).unwrap());
    assert_eq!(chain.id.head, 0);
    driver.add(2);
    assert!(ring.take(&map, &mut chain).unwrap());
    let (first, second) = (32, 32 + 3 * 32);
    assert_eq!(usize::from(chain.id.head), 3);
    let chain_of = |at| {
        [
            word::<1>(&log, true, at),
            word::<2>(&log, true, at + 4),
            word::<2>(&log, true, at + 6),
            word::<8>(&log, true, at + 8),
        ]
    };
    assert_eq!(chain_of(first), [1, 2, 3, 0], "inflight, last, num, counter");
    assert_eq!(chain_of(second), [1, 4, 2, 1]);
    let data = super::DATA + 0x100;
    assert_eq!(
        [word::<8>(&log, true, first + 24), word::<4>(&log, true, first + 20)],
        [data, 16],
        "addr, len"
    );
    assert_eq!(word::<2>(&log, true, first + 18), 1 | 1 << 7, "flags: NEXT, and available in the first lap");
    assert_eq!([word::<2>(&log, true, 12), word::<2>(&log, true, 14)], [5, 5], "free_head, old_free_head");
    ring.put_used(&map, 3, 16).unwrap();
    ring.publish(&map).unwrap();
    assert_eq!([word::<2>(&log, true, 12), word::<2>(&log, true, 14)], [3, 3], "free_head, old_free_head");
    assert_eq!([word::<2>(&log, true, 16), word::<2>(&log, true, 18)], [2, 2], "used_idx, old_used_idx");
    assert_eq!([word::<1>(&log, true, 20), word::<1>(&log, true, 21)], [1, 1], "wrap counters");
    assert_eq!(
        word::<2>(&log, true, 32 + 4 * 32 + 2),
        5,
        "the freed chain's last entry leads to the old free list"
    );
    assert_eq!(chain_of(second)[0], 0);
}

#[test]
fn logs_of_another_kind_are_named() {
    for is_packed in [false, true] {
        let driver = Driver::new(&memory(), is_packed);
        let verdict = |log: &Arc<LogArea>| match driver.start(driver.base(), Some(log)) {
            Err(RingError::Log(error)) => Some(error),
            Err(other) => panic!("{other}"),
            Ok(_) => None,
        };
        let stride = if is_packed { LogFormat::Packed } else { LogFormat::Split }.stride(SIZE);
        let with = |at: usize, bytes: &[u8]| {
            let log = area(is_packed);
            assert_eq!(verdict(&log), None);
            log.memory().as_volatile_slice().write_slice(bytes, stride + at).unwrap();
            verdict(&log)
        };
        assert_eq!(with(8, &[2, 0]), Some(LogError::Unknown { version: 2, features: 0 }));
        assert_eq!(with(0, &[1]), Some(LogError::Unknown { version: 1, features: 1 }));
        assert_eq!(with(10, &[9, 0]), Some(LogError::QueueSize { logged: 9, size: SIZE }));
        assert_eq!(with(8, &[0, 0, 9, 9]), None, "not in use, so nothing in it counts");
        if is_packed {
            assert_eq!(with(32, &[2]), None, "what lies in the free list is not in flight");
            assert!(
                matches!(with(32 + 2, &[0, 0]), Some(LogError::Contradiction(_))),
                "a loop in the free list"
            );
        } else {
            assert!(matches!(with(16, &[2]), Some(LogError::Contradiction(_))));
        }
        // In flight, and more published than the ring has entries.
        let used = if is_packed { 16 } else { 14 };
        assert!(matches!(with(used, &[0xf0, 0xf0, 0xf0, 0xf0]), Some(LogError::Contradiction(_))));
        // A log for fewer entries than the ring has.
        let format = if is_packed { LogFormat::Packed } else { LogFormat::Split };
        let (spec, file) = LogArea::create(2, SIZE / 2, format).unwrap();
        let small = Arc::new(LogArea::map(spec, file, format).unwrap());
        assert_eq!(verdict(&small), Some(LogError::QueueSize { logged: SIZE / 2, size: SIZE }));
        // A log for fewer queues than the device has.
        let (spec, file) = LogArea::create(1, SIZE, format).unwrap();
        let few = Arc::new(LogArea::map(spec, file, format).unwrap());
        assert!(matches!(verdict(&few), Some(LogError::Size { .. })));
    }
}

#[test]
fn a_packed_ring_refuses_an_area_that_has_room_for_split_ones_only() {
    let driver = Driver::new(&memory(), true);
    let log = area(false);
    assert!(matches!(driver.start(driver.base(), Some(&log)), Err(RingError::Log(LogError::Size { .. }))));
}

#[test]
fn an_area_that_came_before_the_features_serves_either_format() {
    let (spec, file) = LogArea::create(2, SIZE, LogFormat::Packed).unwrap();
    let log = Arc::new(LogArea::map(spec, file, LogFormat::Split).unwrap());
    for is_packed in [true, false] {
        let driver = Driver::new(&memory(), is_packed);
        log.forget(LogFormat::Packed);
        log.forget(LogFormat::Split);
        driver.start(driver.base(), Some(&log)).unwrap();
    }
}

/// A ring with some requests in flight and its log, in which these bytes are then overwritten.
fn survives(is_packed: bool, requests: &[usize], junk: &[(usize, u8)]) {
    let mut driver = Driver::new(&memory(), is_packed);
    let log = area(is_packed);
    let (mut ring, _) = driver.start(driver.base(), Some(&log)).unwrap();
    let map = Arc::clone(driver.map());
    let mut chain = Chain::default();
    for &descs in requests {
        driver.add(descs);
        ring.take(&map, &mut chain).unwrap();
    }
    let stride = if is_packed { LogFormat::Packed } else { LogFormat::Split }.stride(SIZE);
    for &(at, byte) in junk {
        // Version and size stay, so that it is looked at.
        if !(8..12).contains(&(at % stride)) {
            log.memory().as_volatile_slice().write_slice(&[byte], stride + at % stride).unwrap();
        }
    }
    let Ok((mut ring, heads)) = driver.start(driver.base(), Some(&log)) else { return };
    let mut heads = heads.unwrap();
    assert!(heads.len() <= usize::from(SIZE));
    let mut unique = heads.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), heads.len());
    while let Some(head) = heads.pop() {
        if ring.take_again(&map, head, &mut chain).is_err() {
            return;
        }
        ring.put_used(&map, head, 0).unwrap();
    }
    ring.publish(&map).unwrap();
    for _ in 0..3 * SIZE {
        match take(&mut ring, &map, &mut chain) {
            Some(head) => ring.put_used(&map, head, 0).unwrap(),
            None => return,
        }
        ring.publish(&map).unwrap();
    }
}

fn take(ring: &mut Ring, map: &Arc<crate::mem::GuestMap>, chain: &mut Chain) -> Option<u16> {
    ring.take(map, chain).ok().filter(|taken| *taken).map(|_| chain.id.head)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn any_log_is_survived(
        is_packed in any::<bool>(),
        requests in prop::collection::vec(0usize..4, 0..5),
        junk in prop::collection::vec((0usize..512, prop_oneof![0u8..10, any::<u8>()]), 1..12),
    ) {
        survives(is_packed, &requests, &junk);
    }
}
