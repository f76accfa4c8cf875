use std::sync::Arc;

use proptest::prelude::*;

use crate::error::Violation;
use crate::layout::{Desc, PARKED, control_bytes, flags, lane, tag};
use crate::ring::{Consumer, Producer, Shape, Words};
use crate::sync::{AtomicU64, Ordering};

type Memory = Arc<[AtomicU64]>;

fn memory(log2: u8) -> Memory {
    (0..control_bytes(1, log2) / 8).map(|_| AtomicU64::new(0)).collect()
}

fn shape(log2: u8) -> Shape {
    Shape { lane: 0, producer_log2: log2, consumer_log2: log2, min_log2: 2 }
}

fn pair(log2: u8, start: u64) -> (Producer<Memory, Memory>, Consumer<Memory, Memory>) {
    let (ours, theirs) = (memory(log2), memory(log2));
    if start != 0 {
        // As the previous turn left it.
        let slots = lane(0, log2).slots;
        for back in 1..=1u64 << log2 {
            let index = start.wrapping_sub(back);
            let at = slots + (index & ((1 << log2) - 1)) as usize * 4 + 3;
            ours[at].store(u64::from(tag(index)) << 32, Ordering::Relaxed);
        }
    }
    (
        Producer::resume(ours.clone(), theirs.clone(), shape(log2), start),
        Consumer::resume(theirs, ours, shape(log2), start),
    )
}

fn message(cookie: u64) -> Desc {
    Desc { cookie, value: !cookie, len: cookie as u32, flags: flags::INLINE, ..Desc::default() }
}

#[test]
fn messages_arrive_in_order_and_once_across_the_turn_of_the_tag() {
    for start in [0, u64::from(u32::MAX) - 20, (1 << 40) - 7] {
        let (mut tx, mut rx) = pair(3, start);
        for round in 0..40u64 {
            assert_eq!(rx.pop(), Ok(None));
            let count = round % 8 + 1;
            assert!(tx.free(count).unwrap() >= count);
            for n in 0..count {
                tx.push(message(round * 100 + n));
            }
            for n in 0..count {
                assert_eq!(rx.pop(), Ok(Some(message(round * 100 + n))));
            }
            rx.release();
        }
    }
}

#[test]
fn a_full_ring_has_no_room_until_the_head_moves() {
    let (mut tx, mut rx) = pair(2, 0);
    for n in 0..4 {
        assert!(tx.free(1).unwrap() >= 1);
        tx.push(message(n));
    }
    assert_eq!(tx.free(1), Ok(0));
    assert!(!tx.arm(1).unwrap());
    assert_eq!(rx.pop().unwrap().unwrap().cookie, 0);
    assert_eq!(tx.free(1), Ok(0), "taken, but not released");
    assert!(rx.release(), "the producer sleeps for this one");
    assert_eq!(tx.free(1), Ok(1));
    rx.pop().unwrap();
    assert!(!rx.release(), "it asked for one kick");
    tx.disarm();
}

#[test]
fn a_head_that_lies_is_found_out() {
    let (mut tx, mut rx) = pair(2, 0);
    tx.push(message(0));
    tx.push(message(1));
    rx.pop().unwrap();
    rx.release();
    assert_eq!(tx.refresh(), Ok(()));
    let head = lane(0, 2).head;
    rx.own_words()[head].store(3, Ordering::Relaxed);
    assert_eq!(tx.refresh(), Err(Violation::HeadBeyond { head: 3, tail: 2 }));
    rx.own_words()[head].store(0, Ordering::Relaxed);
    assert_eq!(tx.refresh(), Err(Violation::HeadBack { old: 1, new: 0 }));
    rx.own_words()[head].store(u64::MAX, Ordering::Relaxed);
    assert!(tx.refresh().is_err());
}

impl Consumer<Memory, Memory> {
    fn own_words(&self) -> &[AtomicU64] {
        self.test_own().words()
    }
}

#[test]
fn kicks_are_asked_for_once_and_only_by_a_sleeper() {
    let (mut tx, mut rx) = pair(3, 0);
    tx.push(message(0));
    assert!(!tx.should_kick(), "nobody sleeps");
    assert!(rx.arm(), "there is a message");
    rx.disarm();
    rx.pop().unwrap();
    assert!(!rx.arm());
    tx.push(message(1));
    tx.push(message(2));
    assert!(tx.should_kick());
    assert!(!tx.should_kick(), "nothing new");
    tx.push(message(3));
    assert!(!tx.should_kick(), "it was kicked for an earlier one");
}

/// Whatever a hostile peer writes as its wish, each batch kicks at most once.
#[test]
fn no_wish_makes_more_kicks_than_batches() {
    let (mut tx, mut rx) = pair(3, 0);
    let event = lane(0, 3).rx_event;
    for wish in [0, 1, 2, PARKED, PARKED - 1, 1 << 63] {
        rx.own_words()[event].store(wish, Ordering::Relaxed);
        tx.push(message(1));
        let kick = tx.should_kick();
        assert!(!kick || wish == tx.tail() - 1);
        assert!(!tx.should_kick());
        rx.pop().unwrap();
        rx.release();
    }
}

#[test]
fn a_resize_out_of_bounds_is_a_violation() {
    for (opcode, value) in [(1, 1), (1, 4), (1, 64), (1, u64::MAX), (2, 2), (0, 2)] {
        let (mut tx, mut rx) = pair(3, 0);
        tx.push(Desc { opcode, value, flags: flags::CONTROL, ..Desc::default() });
        assert_eq!(rx.pop(), Err(Violation::Control { opcode, value }));
    }
    let (mut tx, mut rx) = pair(3, 0);
    tx.push(Desc { opcode: 1, value: 2, flags: flags::CONTROL | flags::MORE, ..Desc::default() });
    assert!(rx.pop().is_err());
    assert_eq!(tx.resize(1), Ok(false));
    assert_eq!(tx.resize(4), Ok(false));
    assert_eq!(tx.resize(3), Ok(false), "already so");
}

#[derive(Clone, Debug)]
enum Step {
    Push(u8),
    Pop(u8),
    Release,
    Resize(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1u8..20).prop_map(Step::Push),
        4 => (1u8..20).prop_map(Step::Pop),
        2 => Just(Step::Release),
        1 => (2u8..6).prop_map(Step::Resize),
    ];
    proptest::collection::vec(step, 1..200)
}

proptest! {
    /// Any mix of sending, taking, releasing and resizing, beginning anywhere: every message once, in order, whole.
    #[test]
    fn nothing_is_lost_or_changed_whatever_the_size_does(
        steps in steps(),
        start in prop_oneof![Just(0u64), (u64::from(u32::MAX) - 100)..(u64::from(u32::MAX) + 10)],
    ) {
        let (mut tx, mut rx) = pair(5, start);
        let (mut sent, mut got) = (0, 0);
        for step in steps {
            match step {
                Step::Push(count) => {
                    for _ in 0..count {
                        if tx.free(1).unwrap() == 0 {
                            break;
                        }
                        tx.push(message(sent));
                        sent += 1;
                    }
                }
                Step::Pop(count) => {
                    for _ in 0..count {
                        match rx.pop().unwrap() {
                            Some(desc) => {
                                prop_assert_eq!(desc, message(got));
                                got += 1;
                            }
                            None => prop_assert_eq!(got, sent),
                        }
                    }
                }
                Step::Release => {
                    rx.release();
                }
                Step::Resize(log2) => {
                    let before = tx.slots();
                    if tx.resize(log2).unwrap() {
                        prop_assert_eq!(tx.slots(), 1 << log2);
                    } else {
                        prop_assert_eq!(tx.slots(), before);
                    }
                }
            }
        }
        while let Some(desc) = rx.pop().unwrap() {
            prop_assert_eq!(desc, message(got));
            got += 1;
        }
        prop_assert_eq!(got, sent);
        prop_assert_eq!(rx.slots(), tx.slots());
    }

    /// Random words in the slots: a message, nothing, or a violation; never anything else.
    #[test]
    fn random_slots_never_panic(words in proptest::collection::vec(any::<u64>(), 32), tags in any::<bool>()) {
        let (tx, mut rx) = pair(3, 0);
        let first = lane(0, 3).slots;
        for (at, word) in words.iter().enumerate() {
            // Random tags hardly ever match; half of the runs have them right.
            let word = if tags && at % 4 == 3 { word & 0xffff_ffff | (at as u64 / 4 + 1) << 32 } else { *word };
            tx.test_own().words()[first + at].store(word, Ordering::Relaxed);
        }
        for _ in 0..20 {
            match rx.pop() {
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
    }
}
