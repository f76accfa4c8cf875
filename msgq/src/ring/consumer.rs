//! [`Consumer`]: the receiving end of a ring.

use std::marker::PhantomData;

use super::{Fences, Full, Shape, Words};
use crate::error::Violation;
use crate::layout::{
    self, CONTROL_RESIZE, Desc, LOG2_SLOTS_MIN, Lane, PARKED, SLOT_WORDS, flags, tag, tag_of,
};
use crate::sync::Ordering;

/// The receiving end: reads slots in the peer's memory `P`, keeps head and wishes in its own memory `O`.
#[derive(Debug)]
pub struct Consumer<O, P, F = Full> {
    own: O,
    peer: P,
    /// Where own head and wishes lie.
    lane: Lane,
    /// Where the peer's slots and wishes lie.
    theirs: Lane,
    max: u64,
    min: u64,
    /// Slots in use, a power of two.
    used: u64,
    /// Number of the next message.
    head: u64,
    /// What the peer was told of `head`.
    released: u64,
    fences: PhantomData<F>,
}

impl<O: Words, P: Words, F: Fences> Consumer<O, P, F> {
    /// A consumer on zeroed memory, starting with message 0.
    ///
    /// # Panics
    /// If a memory is smaller than the shape says: who maps it has checked that.
    pub fn new(own: O, peer: P, shape: Shape) -> Self {
        Self::resume(own, peer, shape, 0)
    }

    /// As [`new`](Self::new), starting with message `head`: tests of numbers whose tags come round.
    #[doc(hidden)]
    pub fn resume(own: O, peer: P, shape: Shape, head: u64) -> Self {
        let lane = layout::lane(shape.lane, shape.consumer_log2);
        let theirs = layout::lane(shape.lane, shape.producer_log2);
        let max = 1 << shape.producer_log2;
        assert!(
            peer.words().len() >= theirs.slots + max as usize * SLOT_WORDS,
            "memory too small for the ring"
        );
        assert!(own.words().len() >= lane.slots, "memory too small for the lines");
        let min = 1 << shape.min_log2.clamp(LOG2_SLOTS_MIN, shape.producer_log2);
        let this =
            Self { own, peer, lane, theirs, max, min, used: max, head, released: head, fences: PhantomData };
        this.own.words()[lane.rx_event].store(PARKED, Ordering::Relaxed);
        this.own.words()[lane.head].store(head, Ordering::Relaxed);
        this
    }

    /// Number of the next message.
    #[inline]
    #[must_use]
    pub fn head(&self) -> u64 {
        self.head
    }

    /// Number of the first message that was not released: the producer does not write over it.
    #[inline]
    #[must_use]
    pub fn released(&self) -> u64 {
        self.released
    }

    /// Slots in use.
    #[must_use]
    pub fn slots(&self) -> u64 {
        self.used
    }

    #[cfg(test)]
    pub(crate) fn test_own(&self) -> &O {
        &self.own
    }

    #[inline(always)]
    fn at(&self) -> usize {
        self.theirs.slots + (self.head & (self.used - 1)) as usize * SLOT_WORDS
    }

    /// Whether there is a message.
    #[inline]
    #[must_use]
    pub fn has_message(&self) -> bool {
        tag_of(self.peer.words()[self.at() + 3].load(Ordering::Acquire)) == tag(self.head)
    }

    /// Takes the next message as a private copy: each word is loaded once. Messages for the queue itself are carried out
    /// here.
    ///
    /// # Errors
    /// A message for the queue itself that makes no sense.
    #[inline(always)]
    pub fn pop(&mut self) -> Result<Option<Desc>, Violation> {
        loop {
            let at = self.at();
            let slot = &self.peer.words()[at..at + SLOT_WORDS];
            let last = slot[3].load(Ordering::Acquire);
            if tag_of(last) != tag(self.head) {
                return Ok(None);
            }
            let desc = Desc::from_words([
                slot[0].load(Ordering::Relaxed),
                slot[1].load(Ordering::Relaxed),
                slot[2].load(Ordering::Relaxed),
                last,
            ]);
            self.head += 1;
            if desc.kind() != flags::CONTROL {
                return Ok(Some(desc));
            }
            self.control(&desc)?;
        }
    }

    #[cold]
    fn control(&mut self, desc: &Desc) -> Result<(), Violation> {
        let used = u32::try_from(desc.value).ok().and_then(|log2| 1u64.checked_shl(log2)).unwrap_or(0);
        let known = desc.opcode == CONTROL_RESIZE && desc.flags == flags::CONTROL;
        if !known || used < self.min || used > self.max {
            return Err(Violation::Control { opcode: desc.opcode, value: desc.value });
        }
        self.used = used;
        Ok(())
    }

    /// Whether so much was taken since the last release that the producer should hear of it: a quarter of the ring.
    #[inline]
    #[must_use]
    pub fn should_release(&self) -> bool {
        self.head - self.released >= self.used / 4
    }

    /// Tells the producer that the slots of all messages taken so far are free; whether it has to be kicked, because
    /// it sleeps until then.
    #[inline]
    pub fn release(&mut self) -> bool {
        let old = self.released;
        if old == self.head {
            return false;
        }
        self.released = self.head;
        self.own.words()[self.lane.head].store(self.head, Ordering::Release);
        F::producer();
        let event = self.peer.words()[self.theirs.tx_event].load(Ordering::Relaxed);
        old < event && event <= self.head
    }

    /// First half of going to sleep: announces it. [`Self::fence`] and [`has_message`](Self::has_message) have to follow,
    /// once for all rings that are armed together.
    #[inline]
    pub fn announce(&mut self) {
        self.own.words()[self.lane.rx_event].store(self.head, Ordering::Relaxed);
    }

    /// Orders announcements before the last look.
    #[inline]
    pub fn fence() {
        F::consumer();
    }

    /// Announces the sleep and looks again; true if it must not sleep because there is a message.
    #[inline]
    pub fn arm(&mut self) -> bool {
        self.announce();
        Self::fence();
        self.has_message()
    }

    /// Takes the announcement back.
    #[inline]
    pub fn disarm(&mut self) {
        self.own.words()[self.lane.rx_event].store(PARKED, Ordering::Relaxed);
    }
}

const _: () = assert!(1 << LOG2_SLOTS_MIN >= 4, "a quarter of the ring is at least one slot");
