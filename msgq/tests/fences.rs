//! The sleep rule on this processor: millions of races between a producer that publishes one message and a consumer that
//! goes to sleep. With both fences no wake-up is lost; with either taken out some are. (The model check in `loom.rs` says the
//! same of every processor.)

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use msgq::layout::{Desc, control_bytes, flags};
use msgq::ring::{Consumer, Fences, Full, NoConsumer, NoProducer, Producer, Shape};

const LOG2: u8 = 4;
const SHAPE: Shape = Shape { lane: 0, producer_log2: LOG2, consumer_log2: LOG2, min_log2: 2 };

fn memory() -> Arc<[AtomicU64]> {
    (0..control_bytes(1, LOG2) / 8).map(|_| AtomicU64::new(0)).collect()
}

/// Who is at which round; each on lines of its own.
#[repr(align(128))]
struct Line(AtomicU64);

/// Looks until `look` says so; lets others run if that takes long, for then the other side does not run.
fn look_until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let mut looks = 0u32;
    loop {
        if let Some(found) = look() {
            return found;
        }
        looks += 1;
        if looks.is_multiple_of(256) {
            std::thread::yield_now();
        }
        std::hint::spin_loop();
    }
}

/// Runs `rounds` races; how many wake-ups were lost: the consumer went to sleep and the producer did not kick.
fn lost<F: Fences>(rounds: u64) -> u64 {
    let (a, b) = (memory(), memory());
    let go = Line(AtomicU64::new(0));
    let kicked = Line(AtomicU64::new(0));
    let start = Barrier::new(2);
    std::thread::scope(|scope| {
        let (producer_a, producer_b) = (Arc::clone(&a), Arc::clone(&b));
        let (go, kicked, start) = (&go, &kicked, &start);
        scope.spawn(move || {
            let mut tx = Producer::<_, _, F>::new(producer_a, producer_b, SHAPE);
            start.wait();
            for round in 1..=rounds {
                look_until(|| (go.0.load(Ordering::Acquire) == round).then_some(()));
                assert!(tx.free(1).unwrap() > 0);
                tx.push(Desc { cookie: round, flags: flags::INLINE, ..Desc::default() });
                let kick = u64::from(tx.should_kick());
                kicked.0.store(round << 1 | kick, Ordering::Release);
            }
        });
        let mut rx = Consumer::<_, _, F>::new(b, a, SHAPE);
        start.wait();
        let mut lost = 0;
        for round in 1..=rounds {
            go.0.store(round, Ordering::Release);
            for _ in 0..round % 13 {
                std::hint::spin_loop();
            }
            let sleeps = !rx.arm();
            let kick = look_until(|| {
                let seen = kicked.0.load(Ordering::Acquire);
                (seen >> 1 == round).then_some(seen & 1 == 1)
            });
            lost += u64::from(sleeps && !kick);
            rx.disarm();
            assert_eq!(rx.pop().unwrap().map(|desc| desc.cookie), Some(round));
            rx.release();
        }
        lost
    })
}

#[test]
fn no_wake_up_is_lost_and_each_fence_is_needed() {
    assert_eq!(lost::<Full>(60_000), 0);
    if std::thread::available_parallelism().is_ok_and(|threads| threads.get() < 2) {
        return;
    }
    // The races need both sides to run at once, which a busy machine allows only now and then: tried until one is lost.
    let end = Instant::now() + Duration::from_secs(120);
    let found = |race: fn(u64) -> u64| {
        loop {
            if race(5_000) > 0 {
                return true;
            }
            if Instant::now() > end {
                return false;
            }
        }
    };
    assert!(found(lost::<NoProducer>), "no wake-up was lost without the producer's fence");
    assert!(found(lost::<NoConsumer>), "no wake-up was lost without the consumer's fence");
}
