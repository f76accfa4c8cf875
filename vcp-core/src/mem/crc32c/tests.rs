use proptest::prelude::*;

use super::*;

/// Every way that this processor has.
fn ways() -> Vec<(&'static str, Kernel)> {
    let mut ways: Vec<(&'static str, Kernel)> = vec![("library", library), ("chosen", choose())];
    #[cfg(target_arch = "x86_64")]
    {
        if x86::has_wide() {
            ways.push(("wide", x86::wide));
        }
        if x86::has_narrow() {
            ways.push(("narrow", x86::narrow));
        }
    }
    ways
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Copies within larger buffers, whose other bytes must stay as they are.
fn copied(way: Kernel, from: &[u8], to_offset: usize, crc: u32) -> (Vec<u8>, u32) {
    let mut to = vec![0xa5; to_offset + from.len() + 70];
    // SAFETY: both ranges are within their buffers, which are different ones; `ways` gives what this processor has.
    let crc = unsafe { way(from.as_ptr(), to.as_mut_ptr().add(to_offset), from.len(), crc) };
    assert!(to[..to_offset].iter().chain(&to[to_offset + from.len()..]).all(|&byte| byte == 0xa5));
    (to[to_offset..to_offset + from.len()].to_vec(), crc)
}

#[test]
fn every_length_is_copied_whole_and_digested_as_the_library_does() {
    let data = noise(4096 + 64, 7);
    for (name, way) in ways() {
        for len in 0..=4096 {
            let (from, to) = (len % 61, len % 67);
            let (copy, crc) = copied(way, &data[from..from + len], to, !0);
            assert_eq!(copy, &data[from..from + len], "{name}, {len} bytes");
            assert_eq!(!crc, crc_fast::crc32_iscsi(&copy), "{name}, {len} bytes");
        }
    }
}

#[test]
fn all_alignments_of_both_sides() {
    let data = noise(2 * 1500, 8);
    for (name, way) in ways() {
        for (from, to) in (0..64).flat_map(|from| (0..64).map(move |to| (from, to))) {
            let len = 1411;
            let (copy, crc) = copied(way, &data[from..from + len], to, !0);
            assert_eq!(copy, &data[from..from + len], "{name}, from {from} to {to}");
            assert_eq!(!crc, crc_fast::crc32_iscsi(&copy), "{name}, from {from} to {to}");
        }
    }
}

proptest! {
    #[test]
    fn pieces_come_to_the_same_as_the_whole(len in 0usize..70_000, seed: u64, cuts in proptest::collection::vec(0usize..70_000, 0..8)) {
        let data = noise(len, seed);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(len)).chain([0, len]).collect();
        cuts.sort_unstable();
        for (name, way) in ways() {
            let mut all = !0;
            for cut in cuts.windows(2) {
                let (copy, crc) = copied(way, &data[cut[0]..cut[1]], cut[0] % 64, all);
                prop_assert_eq!(&copy[..], &data[cut[0]..cut[1]], "{}", name);
                all = crc;
            }
            prop_assert_eq!(!all, crc_fast::crc32_iscsi(&data), "{}", name);
        }
    }
}

/// Another thread writes the source all the time: what was stored and what was digested are still the same.
#[test]
fn the_digest_is_of_what_was_stored_while_the_source_changes() {
    use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
    let source: Vec<AtomicU8> = (0..20_000).map(|_| AtomicU8::new(0)).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut value = 0u8;
            while !over.load(Relaxed) {
                value = value.wrapping_add(1);
                source.iter().for_each(|byte| byte.store(value, Relaxed));
            }
        });
        for (name, way) in ways() {
            for round in 0..400 {
                let len = 19_000 + round;
                let mut to = vec![0; len];
                // SAFETY: the ranges are within their buffers, different ones; atomic bytes may be written meanwhile.
                let crc = unsafe { way(source.as_ptr().cast(), to.as_mut_ptr(), len, !0) };
                assert_eq!(!crc, crc_fast::crc32_iscsi(&to), "{name}");
            }
        }
        over.store(true, Relaxed);
    });
}

/// The figures of `docs/decisions/data-path.md`: medians of 300, 128 KiB, buffers as many as at depth 8.
#[test]
#[ignore = "measures: cargo test --release -p vcp-core --lib what_128_kib_take -- --ignored --nocapture"]
fn what_128_kib_take() {
    const LEN: usize = 128 << 10;
    let median = |mut one: Box<dyn FnMut(usize) -> u32>| {
        let mut took: Vec<f64> = (0..300)
            .map(|round| {
                let started = std::time::Instant::now();
                std::hint::black_box(one(round));
                started.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        took.sort_by(f64::total_cmp);
        took[150]
    };
    let buffers = || -> Vec<Vec<u8>> { (0..8).map(|seed| noise(LEN + 64, seed)).collect() };
    for offset in [0, 52] {
        let mut ways = ways();
        ways.retain(|(name, _)| *name != "chosen");
        for (name, way) in ways {
            // Received: from one staging buffer to many; sent: from many to one.
            let (source, mut targets) = (noise(2 * LEN + 64, 1), buffers());
            let receives = median(Box::new(move |round| {
                let from = &source[offset + round % 2 * LEN..][..LEN];
                // SAFETY: both are that long, and different buffers; `ways` gives what this processor has.
                unsafe { way(from.as_ptr(), targets[round % 8].as_mut_ptr(), LEN, !0) }
            }));
            let (sources, mut target) = (buffers(), noise(2 * LEN + 64, 1));
            let sends = median(Box::new(move |round| {
                let to = &mut target[offset + round % 2 * LEN..][..LEN];
                // SAFETY: as before.
                unsafe { way(sources[round % 8].as_ptr(), to.as_mut_ptr(), LEN, !0) }
            }));
            println!("{name}, staging at {offset}: receives {receives:.2} us, sends {sends:.2} us");
        }
        let (source, mut targets) = (noise(2 * LEN + 64, 1), buffers());
        let copies = median(Box::new(move |round| {
            let from = &source[offset + round % 2 * LEN..][..LEN];
            targets[round % 8][..LEN].copy_from_slice(from);
            std::hint::black_box(&mut targets);
            0
        }));
        let (source, mut targets) = (noise(2 * LEN + 64, 1), buffers());
        let turns = median(Box::new(move |round| {
            let from = &source[offset + round % 2 * LEN..][..LEN];
            let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
            for (from, to) in from.chunks(16 << 10).zip(targets[round % 8].chunks_mut(16 << 10)) {
                to.copy_from_slice(from);
                digest.update(from);
            }
            std::hint::black_box(&mut targets);
            digest.finalize() as u32
        }));
        let source = noise(2 * LEN + 64, 1);
        let digests =
            median(Box::new(move |round| crc_fast::crc32_iscsi(&source[offset + round % 2 * LEN..][..LEN])));
        println!(
            "staging at {offset}: copy {copies:.2} us, digest {digests:.2} us, in turns of 16 KiB {turns:.2} us"
        );
    }
}
