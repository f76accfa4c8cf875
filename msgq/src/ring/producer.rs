//! [`Producer`]: the sending end of a ring.

use std::marker::PhantomData;

use super::{Fences, Full, Shape, Words};
use crate::error::Violation;
use crate::layout::{self, CONTROL_RESIZE, Desc, LOG2_SLOTS_MIN, Lane, PARKED, SLOT_WORDS, flags, tag};
use crate::sync::{Ordering, prefetch_write};

/// A change of size that the consumer may not have seen.
#[derive(Clone, Copy, Debug)]
struct Narrow {
    /// Number of the message that changes it.
    at: u64,
    /// Slots in use before it.
    before: u64,
}

/// The sending end: owns the slots in its own memory `O`, reads head and wishes in the peer's memory `P`.
///
/// Its state is private. It never reads back what it wrote, so a peer can mislead it only through its head, which is
/// checked ([`free`](Self::free)).
#[derive(Debug)]
pub struct Producer<O, P, F = Full> {
    own: O,
    peer: P,
    /// Where slots and own wishes lie.
    lane: Lane,
    /// Where the peer's head and wishes lie.
    theirs: Lane,
    max: u64,
    min: u64,
    /// Slots in use, a power of two.
    used: u64,
    /// Slots that may hold messages now: fewer than `used` after a change that the peer has not seen.
    capacity: u64,
    /// Until the peer's head has passed it, the capacity stays what it is.
    narrow: Option<Narrow>,
    /// Number of the next message.
    tail: u64,
    /// `tail` when it was last decided whether to kick.
    looked: u64,
    /// The peer's head as last loaded.
    head: u64,
    fences: PhantomData<F>,
}

impl<O: Words, P: Words, F: Fences> Producer<O, P, F> {
    /// A producer on zeroed memory, starting with message 0.
    ///
    /// # Panics
    /// If a memory is smaller than the shape says: who maps it has checked that.
    pub fn new(own: O, peer: P, shape: Shape) -> Self {
        Self::resume(own, peer, shape, 0)
    }

    /// As [`new`](Self::new), starting with message `tail`: tests of numbers whose tags come round.
    #[doc(hidden)]
    pub fn resume(own: O, peer: P, shape: Shape, tail: u64) -> Self {
        let lane = layout::lane(shape.lane, shape.producer_log2);
        let theirs = layout::lane(shape.lane, shape.consumer_log2);
        let max = 1 << shape.producer_log2;
        assert!(own.words().len() >= lane.slots + max as usize * SLOT_WORDS, "memory too small for the ring");
        assert!(peer.words().len() >= theirs.slots, "memory too small for the lines");
        let min = 1 << shape.min_log2.clamp(LOG2_SLOTS_MIN, shape.producer_log2);
        let this = Self {
            own,
            peer,
            lane,
            theirs,
            max,
            min,
            used: max,
            capacity: max,
            narrow: None,
            tail,
            looked: tail,
            head: tail,
            fences: PhantomData,
        };
        this.own.words()[lane.tx_event].store(PARKED, Ordering::Relaxed);
        this
    }

    /// Number of the next message.
    #[inline]
    #[must_use]
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// The peer's head as last loaded.
    #[inline]
    #[must_use]
    pub fn head(&self) -> u64 {
        self.head
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

    /// Free slots as far as known; at least `wanted` if there are that many. Loads the peer's head only when short.
    ///
    /// # Errors
    /// The peer's head is not between the last one and the tail.
    #[inline(always)]
    pub fn free(&mut self, wanted: u64) -> Result<u64, Violation> {
        let free = self.capacity - (self.tail - self.head);
        if free >= wanted {
            return Ok(free);
        }
        self.refresh()?;
        Ok(self.capacity - (self.tail - self.head))
    }

    /// Loads the peer's head, once, and checks it.
    ///
    /// # Errors
    /// As [`free`](Self::free).
    #[cold]
    pub fn refresh(&mut self) -> Result<(), Violation> {
        // Acquire: what the consumer read from a slot happened before the slot is written again.
        let head = self.peer.words()[self.theirs.head].load(Ordering::Acquire);
        if head < self.head {
            return Err(Violation::HeadBack { old: self.head, new: head });
        }
        if head > self.tail {
            return Err(Violation::HeadBeyond { head, tail: self.tail });
        }
        self.head = head;
        if self.narrow.is_some_and(|narrow| head > narrow.at) {
            self.narrow = None;
            self.capacity = self.used;
        }
        Ok(())
    }

    /// Writes and publishes a message.
    ///
    /// # Panics
    /// In debug builds, if [`free`](Self::free) did not say that there is room.
    #[inline(always)]
    pub fn push(&mut self, desc: Desc) {
        debug_assert!(self.capacity > self.tail - self.head, "push without room");
        let at = self.lane.slots + (self.tail & (self.used - 1)) as usize * SLOT_WORDS;
        let [w0, w1, w2, w3] = desc.to_words(tag(self.tail));
        let slot = &self.own.words()[at..at + SLOT_WORDS];
        slot[0].store(w0, Ordering::Relaxed);
        slot[1].store(w1, Ordering::Relaxed);
        slot[2].store(w2, Ordering::Relaxed);
        // Release: whoever sees the tag sees the rest, and all that the sender wrote before (payload, its own head).
        slot[3].store(w3, Ordering::Release);
        self.tail += 1;
    }

    /// A message follows soon: has the line of its slot brought here, which the consumer, who looks at it, has taken a copy
    /// of. What the caller does until [`push`](Self::push) then overlaps with it.
    #[inline(always)]
    pub fn prepare(&self) {
        let at = self.lane.slots + (self.tail & (self.used - 1)) as usize * SLOT_WORDS;
        prefetch_write(&self.own.words()[at]);
    }

    /// Whether messages were pushed since it was last decided whether to kick.
    #[inline]
    #[must_use]
    pub fn has_news(&self) -> bool {
        self.looked != self.tail
    }

    /// To be called after one or more messages were pushed: whether the consumer has to be kicked.
    ///
    /// The consumer announces its sleep, fences, and looks again; this side has published, fences, and looks for the
    /// announcement. The two fences are totally ordered, so at least one side sees the other's store.
    #[inline]
    pub fn should_kick(&mut self) -> bool {
        let old = self.looked;
        if old == self.tail {
            return false;
        }
        self.looked = self.tail;
        F::producer();
        let event = self.peer.words()[self.theirs.rx_event].load(Ordering::Relaxed);
        old <= event && event < self.tail
    }

    /// Announces that this side sleeps until `wanted` slots are free, and looks again: true if it must not sleep.
    ///
    /// # Errors
    /// As [`free`](Self::free).
    pub fn arm(&mut self, wanted: u64) -> Result<bool, Violation> {
        let needed = (self.tail + wanted).saturating_sub(self.capacity);
        self.own.words()[self.lane.tx_event].store(needed, Ordering::Relaxed);
        F::consumer();
        self.refresh()?;
        Ok(self.capacity - (self.tail - self.head) >= wanted)
    }

    /// Takes the announcement back.
    pub fn disarm(&mut self) {
        self.own.words()[self.lane.tx_event].store(PARKED, Ordering::Relaxed);
    }

    /// Uses `2^log2` slots from the message after next on (this takes one message). False, and nothing is done, if the
    /// number is not between the bounds, is the one in use, or the ring is too full for the change now.
    ///
    /// Shrinking and growing move messages to other slots. Two messages that share a slot under the two maps are at least
    /// the smaller number of slots apart, so no unread message is overwritten while no more than that many are under
    /// way: that holds before the change is published, and until the consumer has passed it.
    ///
    /// # Errors
    /// As [`free`](Self::free).
    pub fn resize(&mut self, log2: u8) -> Result<bool, Violation> {
        let new = 1u64.checked_shl(log2.into()).unwrap_or(0);
        if new < self.min || new > self.max || new == self.used {
            return Ok(false);
        }
        self.refresh()?;
        let narrow = new.min(self.used);
        if self.narrow.is_some() || self.tail - self.head >= narrow {
            return Ok(false);
        }
        if new > self.used {
            // Slots that were out of use may hold tags from one full turn of the tag's 32 bits ago.
            let stale = u64::from(tag(self.tail).wrapping_add(1 << 31)) << 32;
            let words = self.own.words();
            for slot in self.used..new {
                words[self.lane.slots + slot as usize * SLOT_WORDS + 3].store(stale, Ordering::Relaxed);
            }
        }
        let (at, before) = (self.tail, self.used);
        self.push(Desc {
            value: log2.into(),
            opcode: CONTROL_RESIZE,
            flags: flags::CONTROL,
            ..Desc::default()
        });
        self.used = new;
        self.capacity = narrow;
        self.narrow = Some(Narrow { at, before });
        Ok(true)
    }

    /// The message with this number as it was published, if it is still in its slot: for sending again what a dead
    /// consumer left behind. Only own memory is read.
    #[must_use]
    pub fn published(&self, index: u64) -> Option<Desc> {
        let used = match self.narrow {
            Some(narrow) if index <= narrow.at => narrow.before,
            _ => self.used,
        };
        let at = self.lane.slots + (index & (used - 1)) as usize * SLOT_WORDS;
        let slot = &self.own.words()[at..at + SLOT_WORDS];
        let words = [0, 1, 2, 3].map(|word| slot[word].load(Ordering::Relaxed));
        (layout::tag_of(words[3]) == tag(index)).then(|| Desc::from_words(words))
    }
}
