//! [`Second`]: the first half of the line on a hardware thread of its own, where the user gave one.
//!
//! Run to completion stays the rule: a pass in which little moves is the data thread's alone. Under load the data thread lends
//! the [`Front`] and the transmit rings to the second thread for one pass. That one takes bursts, decides about them, and
//! sends them over a ring ([`rtrb`]); the data thread carries them out, with the receive rings, the uplinks and the books,
//! and sends them back with how many frames are done with; the second thread gives those back to their drivers. The pass ends
//! when all bursts are back and everything that was lent. So nothing is in flight between two passes, with two
//! threads as with one: what changes ports, rings and memory, hands them over or stops them never meets a burst on its
//! way. No value is shared: each belongs to one thread at a time.
//!
//! Back-pressure goes the same way: a burst that comes back with frames left ends the turn of its queue, and what was taken
//! behind it comes back untouched. `docs/decisions/second-thread.md` says why it is cut there and what it costs.
//!
//! A second thread that is asleep is woken, but not waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rtrb::{Consumer, Producer, RingBuffer};
use vcp_core::queue::RingError;
use vcp_core::queue::burst::BurstRing;

use super::front::{Burst, Front};
use super::line::From;

/// Bursts on their way at most. Two keep both threads at work; more even out what bursts take.
const BURSTS: usize = 8;
/// Slots of the rings: no more messages than bursts, and the lent things, are ever on their way.
const SLOTS: usize = BURSTS + 2;
/// How long the second thread looks for work before it sleeps.
const LOOK: Duration = Duration::from_micros(200);
/// Looks between two of which the processor is offered to others: where both threads share one, each waits for the other.
const LOOKS: u32 = 256;

/// States of the gate.
const LOOKING: u8 = 0;
const ENGAGED: u8 = 1;
const ASLEEP: u8 = 2;

/// A transmit ring that is lent.
#[derive(Debug)]
pub(super) struct Lent {
    pub(super) ring: BurstRing,
    pub(super) from: From,
    pub(super) header: usize,
    /// Its driver broke a rule.
    pub(super) error: Option<RingError>,
    held: bool,
    moved: bool,
}

impl Lent {
    pub(super) fn new(ring: BurstRing, from: From, header: usize) -> Self {
        Self { ring, from, header, error: None, held: false, moved: false }
    }
}

/// What is lent for a pass.
#[derive(Debug)]
pub(super) struct Pass {
    pub(super) front: Front,
    /// In the order in which they have their turns; those of a port one behind the other.
    pub(super) rings: Vec<Lent>,
    pub(super) now: Instant,
}

/// To the second thread.
#[derive(Debug)]
enum Order {
    Begin(Pass),
    /// So many frames of it are done with.
    Done(Box<Burst>, usize),
}

/// From the second thread.
#[derive(Debug)]
pub(super) enum Answer {
    Burst(Box<Burst>),
    End(Pass),
}

/// What it did, for people.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// Passes that both threads made.
    pub(super) passes: u64,
    /// Bursts that went over.
    pub(super) bursts: u64,
    /// Passes for which it was asleep, and woken.
    pub(super) asleep: u64,
}

/// See the module: the data thread's end of it.
#[derive(Debug)]
pub(super) struct Second {
    orders: Option<Producer<Order>>,
    answers: Consumer<Answer>,
    gate: Arc<AtomicU8>,
    thread: Option<JoinHandle<()>>,
    /// Storage for the next pass.
    pub(super) spare: Vec<Lent>,
    /// Queues that came back held in this pass.
    pub(super) held: Vec<usize>,
    pub(super) counts: Counts,
}

impl Second {
    /// Starts the thread; `place` runs on it first, and puts it where it is to run.
    pub(super) fn start(place: impl FnOnce() + Send + 'static) -> std::io::Result<Self> {
        let (orders, take) = RingBuffer::new(SLOTS);
        let (give, answers) = RingBuffer::new(SLOTS);
        let gate = Arc::new(AtomicU8::new(LOOKING));
        let mut worker = Worker {
            orders: take,
            answers: give,
            gate: Arc::clone(&gate),
            pool: (0..BURSTS).map(|_| Box::default()).collect(),
        };
        let thread = std::thread::Builder::new().name("line".into()).spawn(move || {
            place();
            worker.run();
        })?;
        let (spare, held) = (Vec::new(), Vec::new());
        let (orders, thread) = (Some(orders), Some(thread));
        Ok(Self { orders, answers, gate, thread, spare, held, counts: Counts::default() })
    }

    /// Whether it takes part in the pass that begins. One that sleeps is woken for a later one.
    pub(super) fn engage(&mut self) -> bool {
        // Acquire: what it did before it began to look is done.
        match self.gate.compare_exchange(LOOKING, ENGAGED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(_) => {
                self.counts.asleep += 1;
                let woken = self.gate.compare_exchange(ASLEEP, LOOKING, Ordering::AcqRel, Ordering::Acquire);
                if let (Ok(_), Some(thread)) = (woken, &self.thread) {
                    thread.thread().unpark();
                }
                false
            }
        }
    }

    /// Waits until it looks for work.
    #[cfg(test)]
    pub(super) fn wait_for(&mut self) {
        while !self.engage() {
            std::thread::yield_now();
        }
        self.gate.store(LOOKING, Ordering::Release);
    }

    /// Begins a pass in which it takes part.
    pub(super) fn begin(&mut self, pass: Pass) {
        self.counts.passes += 1;
        self.held.clear();
        self.send(Order::Begin(pass));
    }

    /// A burst is carried out.
    pub(super) fn done(&mut self, burst: Box<Burst>, done: usize) {
        self.counts.bursts += 1;
        self.send(Order::Done(burst, done));
    }

    fn send(&mut self, order: Order) {
        // There are slots for all messages that can be on their way.
        let sent = self.orders.as_mut().map(|orders| orders.push(order));
        debug_assert!(matches!(sent, Some(Ok(()))), "a ring with too few slots");
    }

    /// What comes next in this pass.
    ///
    /// # Panics
    /// The second thread panicked, which ends the process where panics are not caught.
    pub(super) fn next(&mut self) -> Answer {
        let mut looks = 0;
        loop {
            match self.answers.pop() {
                Ok(answer) => return answer,
                Err(_) => assert!(!self.answers.is_abandoned(), "the second thread is gone"),
            }
            look_again(&mut looks);
        }
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        // It ends when nobody sends it anything any more, which it looks for before it sleeps.
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

fn look_again(looks: &mut u32) {
    *looks += 1;
    if looks.is_multiple_of(LOOKS) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

/// The second thread.
struct Worker {
    orders: Consumer<Order>,
    answers: Producer<Answer>,
    gate: Arc<AtomicU8>,
    /// Bursts that are not on their way.
    pool: Vec<Box<Burst>>,
}

impl Worker {
    fn run(&mut self) {
        while self.wait()
            && let Some(mut pass) = self.begin()
        {
            if !self.serve(&mut pass) {
                return;
            }
            // Before the pass is over for the other one, who may begin the next one at once.
            self.gate.store(LOOKING, Ordering::Release);
            let _ = self.answers.push(Answer::End(pass));
        }
    }

    /// Until it takes part in a pass; false if there will be none any more.
    fn wait(&self) -> bool {
        let (mut looks, mut since) = (0, Instant::now());
        loop {
            match self.gate.load(Ordering::Acquire) {
                ENGAGED => return true,
                _ if self.orders.is_abandoned() => return false,
                LOOKING => {
                    look_again(&mut looks);
                    if looks.is_multiple_of(LOOKS) && since.elapsed() > LOOK {
                        // Who wants it meanwhile has the gate, and then it does not sleep.
                        let _ =
                            self.gate.compare_exchange(LOOKING, ASLEEP, Ordering::AcqRel, Ordering::Acquire);
                    }
                }
                _ => {
                    // A wake-up between the look at the gate and this is not lost: it is a token.
                    std::thread::park();
                    since = Instant::now();
                }
            }
        }
    }

    fn begin(&mut self) -> Option<Pass> {
        let mut looks = 0;
        loop {
            match self.orders.pop() {
                Ok(Order::Begin(pass)) => return Some(pass),
                // It comes with nothing on its way.
                Ok(Order::Done(burst, _)) => self.pool.push(burst),
                Err(_) if self.orders.is_abandoned() => return None,
                Err(_) => look_again(&mut looks),
            }
        }
    }

    /// One pass; false if the other thread is gone.
    fn serve(&mut self, pass: &mut Pass) -> bool {
        for at in 0..pass.rings.len() {
            let port = pass.rings[at].from.port.index();
            if (at == 0 || pass.rings[at - 1].from.port.index() != port)
                && let Some(sender) = pass.front.senders.get_mut(port)
            {
                sender.credit.begin();
            }
            pass.rings[at].ring.rewind();
            if !self.serve_ring(pass, at) {
                return false;
            }
        }
        let mut looks = 0;
        while self.pool.len() < BURSTS {
            if !self.collect(pass) {
                return false;
            }
            look_again(&mut looks);
        }
        self.pool.iter_mut().for_each(|burst| burst.release());
        for chunk in pass.rings.chunk_by_mut(|a, b| a.from.port == b.from.port) {
            chunk.iter_mut().for_each(|lent| lent.ring.rewind());
            let moved = chunk.iter().any(|lent| lent.moved);
            if let (false, Some(sender)) = (moved, pass.front.senders.get_mut(chunk[0].from.port.index())) {
                sender.credit.end();
            }
        }
        true
    }

    /// Takes bursts of one ring as long as its port can afford them and they are not held.
    fn serve_ring(&mut self, pass: &mut Pass, at: usize) -> bool {
        let mut looks = 0;
        loop {
            if !self.collect(pass) {
                return false;
            }
            let Pass { front, rings, now } = pass;
            let lent = &mut rings[at];
            if lent.held {
                return true;
            }
            let Some(mut burst) = self.pool.pop() else {
                look_again(&mut looks);
                continue;
            };
            match front.take(&mut lent.ring, lent.from, lent.header, &mut burst, *now) {
                Ok(true) => {
                    burst.ring = at;
                    let more = burst.more;
                    if self.answers.push(Answer::Burst(burst)).is_err() || !more {
                        return true;
                    }
                }
                Ok(false) => {
                    self.pool.push(burst);
                    lent.ring.want(true);
                    return true;
                }
                Err(error) => {
                    self.pool.push(burst);
                    lent.error = Some(error);
                    return true;
                }
            }
        }
    }

    /// Takes bursts back; false if the other thread is gone.
    fn collect(&mut self, pass: &mut Pass) -> bool {
        loop {
            match self.orders.pop() {
                Ok(Order::Done(burst, done)) => {
                    if let Some(lent) = pass.rings.get_mut(burst.ring) {
                        pass.front.settle(&mut lent.ring, &burst, done);
                        lent.held |= done < burst.len();
                        lent.moved |= done != 0;
                    }
                    self.pool.push(burst);
                }
                Ok(Order::Begin(_)) => debug_assert!(false, "a pass begins in another"),
                Err(_) => return !self.orders.is_abandoned(),
            }
        }
    }
}
