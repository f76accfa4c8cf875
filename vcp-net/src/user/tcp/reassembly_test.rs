//! Pieces in any order, with overlaps that differ, against a list of what came first for each number.

use proptest::prelude::*;

use super::*;

/// Where the numbers go round.
const START: u32 = u32::MAX - 30_000;
const LEN: usize = 70_000;

/// What is at a number in copy `copy` of the stream.
fn byte(at: usize, copy: u8) -> u8 {
    (at ^ at >> 7) as u8 ^ copy.wrapping_mul(37)
}

fn put(
    this: &mut Reassembly,
    pool: &mut Pool,
    next: usize,
    (at, len, fin): (usize, usize, bool),
    copy: u8,
) -> Kept {
    let seq = |at: usize| START.wrapping_add(at as u32);
    this.put(pool, seq(next), (seq(at), len as u32, fin), |from, bytes| {
        for (n, to) in bytes.iter_mut().enumerate() {
            *to = byte(at + from as usize + n, copy);
        }
    })
}

fn read(this: &Reassembly, pool: &Pool, next: usize) -> Vec<u8> {
    let mut got = Vec::new();
    this.each(pool, START.wrapping_add(next as u32), |bytes| {
        got.extend_from_slice(bytes);
        true
    });
    got
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_came_first_comes_out_once_and_in_order(
        pieces in proptest::collection::vec((0usize..LEN, 1usize..9000, 0usize..3000), 1..60),
        blocks in 2u32..40,
    ) {
        let mut pool = Pool::new(blocks * 8 * BLOCK_BYTES as u32);
        let mut this = Reassembly::new(3);
        let mut model: Vec<Option<u8>> = vec![None; LEN + 9000];
        let mut next = 0;
        for (copy, &(at, len, direct)) in pieces.iter().enumerate() {
            let copy = copy as u8;
            let before = model.iter().skip(next).filter(|it| it.is_some()).count();
            if at > next {
                let kept = put(&mut this, &mut pool, next, (at, len, false), copy);
                let mut left = kept.bytes;
                for (n, there) in model.iter_mut().enumerate().skip(at).take(len) {
                    if there.is_none() && left != 0 {
                        *there = Some(byte(n, copy));
                        left -= 1;
                    }
                }
                prop_assert_eq!(left, 0, "more is kept than there was");
                let again = (at..at + len).find(|&n| model[n] != Some(byte(n, copy)) && model[n].is_some());
                prop_assert!(again.is_none() || kept.again.is_some() || kept.refused != 0, "a copy was not told of");
                let now = model.iter().skip(next).filter(|it| it.is_some()).count();
                prop_assert_eq!(now, before + kept.bytes as usize);
            } else {
                // The next bytes came, as many as the socket took, whatever is here of them.
                next += direct;
            }
            this.advance(&mut pool, START.wrapping_add(next as u32));
            let expected: Vec<u8> = model[next..].iter().map_while(|it| *it).collect();
            prop_assert_eq!(this.ready(START.wrapping_add(next as u32)) as usize, expected.len());
            prop_assert!(read(&this, &pool, next) == expected, "other bytes");
            // A part of it goes.
            next += expected.len().min(direct);
            this.advance(&mut pool, START.wrapping_add(next as u32));
            // What the guest is told is there, all of it.
            for (left, right) in this.told(START.wrapping_add(next as u32)) {
                let (left, right) = (left.wrapping_sub(START) as usize, right.wrapping_sub(START) as usize);
                if left != right {
                    prop_assert!(left > next && model[left..right].iter().all(Option::is_some));
                    prop_assert!(model[left - 1].is_none() && model[right].is_none(), "a part of a range");
                }
            }
            prop_assert!(pool.used_bytes() <= u64::from(blocks) * BLOCK_BYTES as u64);
        }
        this.clear(&mut pool);
        prop_assert_eq!(pool.used_bytes(), 0);
    }
}

#[test]
fn the_end_waits_for_what_is_before_it() {
    let (mut pool, mut this) = (Pool::new(1 << 20), Reassembly::new(0));
    let seq = |at: u32| START.wrapping_add(at);
    assert_eq!(put(&mut this, &mut pool, 0, (30_000, 0, true), 0), Kept::default());
    assert_eq!(this.told(START)[0], (seq(30_000), seq(30_001)));
    // Behind the end there is nothing, and there is one end.
    assert_eq!(put(&mut this, &mut pool, 0, (40_000, 9, true), 0), Kept::default());
    assert_eq!(put(&mut this, &mut pool, 0, (29_000, 5000, true), 0).bytes, 1000);
    assert_eq!(put(&mut this, &mut pool, 0, (30_000, 0, true), 0).again, Some((seq(30_000), seq(30_001))));
    assert_eq!((this.told(START)[0], this.end()), ((seq(29_000), seq(30_001)), Some(seq(30_001))));
    this.advance(&mut pool, seq(29_000));
    assert_eq!((this.ready(seq(29_000)), this.ends(seq(29_000))), (1000, false));
    this.advance(&mut pool, seq(30_000));
    assert_eq!((this.ready(seq(30_000)), this.ends(seq(30_000)), this.is_empty()), (0, true, false));
    this.advance(&mut pool, seq(30_001));
    assert_eq!((this.is_empty(), pool.used_bytes()), (true, 0));
    // Before what is there already, it is none.
    put(&mut this, &mut pool, 0, (500, 100, false), 0);
    put(&mut this, &mut pool, 0, (550, 10, true), 0);
    assert!(!this.ends(seq(560)) && this.end() == Some(seq(600)));
}

#[test]
fn what_changed_last_is_told_first() {
    let (mut pool, mut this) = (Pool::new(1 << 20), Reassembly::new(0));
    let block = |at: u32| (START.wrapping_add(at), START.wrapping_add(at + 10));
    for at in [100, 300, 200, 400] {
        put(&mut this, &mut pool, 0, (at, 10, false), 0);
    }
    assert_eq!(this.told(START), [block(400), block(200), block(300)]);
    let kept = put(&mut this, &mut pool, 0, (100, 10, false), 1);
    assert_eq!((kept.again, kept.bytes), (Some(block(100)), 0));
    assert_eq!(this.told(START), [block(100), block(400), block(200)]);
}

#[test]
fn a_guest_that_sends_crumbs_is_bounded() {
    let (mut pool, mut this) = (Pool::new(64 << 20), Reassembly::new(0));
    for at in 1..2000 {
        put(&mut this, &mut pool, 0, (at * 9, 1, false), 0);
    }
    assert_eq!(this.ranges.len(), RANGES_MAX);
    assert!(this.blocks.len() <= RANGES_MAX);
    let kept = put(&mut this, &mut pool, 0, (3_000_000, 5, false), 0);
    assert_eq!((kept.bytes, kept.refused), (0, 5));
}
