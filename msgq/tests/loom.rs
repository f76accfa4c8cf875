//! Model check of the ring with its sleep rule: every interleaving, and every reordering that the memory model allows.
//!
//! The ring's very sources are compiled here a second time, on loom's atomics. Each fence is shown to be needed: without
//! either, the model finds the lost wake-up.
#![allow(dead_code, unreachable_pub, missing_docs, unused_imports)] // Only part of the sources is used here.

#[path = "../src/error.rs"]
pub mod error;
#[path = "../src/layout.rs"]
pub mod layout;
#[path = "../src/ring/mod.rs"]
pub mod ring;
pub mod sync {
    pub use loom::sync::atomic::{AtomicU64, Ordering, fence};

    /// A hint: not part of the protocol.
    pub fn prefetch_write(_: &AtomicU64) {}
}

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use layout::{Desc, flags};
use loom::sync::atomic::AtomicU64;
use loom::thread;
use ring::{Consumer, Fences, Full, NoConsumer, NoProducer, Producer, Shape, Words};

const LOG2: u8 = 2;
const SHAPE: Shape = Shape { lane: 0, producer_log2: LOG2, consumer_log2: LOG2, min_log2: 2 };

/// A control memory in which only the words that this ring uses are modelled: loom allows few objects.
struct Memory(Vec<AtomicU64>);

impl Words for Memory {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

fn message(cookie: u64) -> Desc {
    Desc { cookie, value: !cookie, flags: flags::INLINE, len: 16, ..Desc::default() }
}

/// A bell that can be rung before anybody sleeps.
struct Bell {
    rung: loom::sync::Mutex<bool>,
    wake: loom::sync::Condvar,
}

impl Bell {
    fn new() -> Self {
        Self { rung: loom::sync::Mutex::new(false), wake: loom::sync::Condvar::new() }
    }

    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.wake.notify_one();
    }

    fn sleep(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.wake.wait(rung).unwrap();
        }
        *rung = false;
    }
}

fn words() -> Memory {
    let count = layout::control_bytes(1, LOG2) / 8;
    // Pages of words that nobody touches would only cost; the lines and the slots are what there is.
    let used = layout::lane(0, LOG2).slots + 4 * layout::SLOT_WORDS;
    assert!(used <= count);
    Memory((0..used).map(|_| AtomicU64::new(0)).collect())
}

/// A producer sends `count` messages and sleeps when the ring is full; a consumer takes them and sleeps when it is
/// empty. Deadlock (which loom reports) is a lost wake-up.
fn exchange<F: Fences + 'static>(count: u64, batch: u64) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 200_000;
    builder.check(move || {
        let (a, b) = (Arc::new(words()), Arc::new(words()));
        let (to_consumer, to_producer) = (Arc::new(Bell::new()), Arc::new(Bell::new()));
        let consumer = {
            let (a, b) = (Arc::clone(&a), Arc::clone(&b));
            let (own, other) = (Arc::clone(&to_consumer), Arc::clone(&to_producer));
            thread::spawn(move || {
                let mut rx = Consumer::<_, _, F>::new(b, a, SHAPE);
                let mut next = 0;
                while next < count {
                    match rx.pop().unwrap() {
                        Some(desc) => {
                            assert_eq!(desc, message(next));
                            next += 1;
                            if rx.should_release() && rx.release() {
                                other.ring();
                            }
                        }
                        None => {
                            if rx.release() {
                                other.ring();
                            }
                            if !rx.arm() {
                                own.sleep();
                            }
                            rx.disarm();
                        }
                    }
                }
            })
        };
        let mut tx = Producer::<_, _, F>::new(a, b, SHAPE);
        let mut sent = 0;
        while sent < count {
            let mut pushed = 0;
            while pushed < batch && sent < count {
                if tx.free(1).unwrap() == 0 {
                    break;
                }
                tx.push(message(sent));
                sent += 1;
                pushed += 1;
            }
            if tx.should_kick() {
                to_consumer.ring();
            }
            if pushed == 0 {
                if !tx.arm(1).unwrap() {
                    to_producer.sleep();
                }
                tx.disarm();
            }
        }
        consumer.join().unwrap();
    });
}

fn fails(model: impl Fn() + Send + 'static) -> bool {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let failed = catch_unwind(AssertUnwindSafe(model)).is_err();
    std::panic::set_hook(hook);
    failed
}

#[test]
fn nobody_sleeps_on_a_message() {
    exchange::<Full>(2, 1);
    exchange::<Full>(2, 2);
}

#[test]
fn without_either_fence_a_wake_up_is_lost() {
    assert!(fails(|| exchange::<NoProducer>(2, 1)), "the producer's fence would not be needed");
    assert!(fails(|| exchange::<NoConsumer>(2, 1)), "the consumer's fence would not be needed");
}

/// The other direction: a full ring, a producer that sleeps for room.
#[test]
fn nobody_sleeps_on_room() {
    exchange::<Full>(5, 4);
}
