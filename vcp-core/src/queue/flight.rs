//! [`Flight`]: what a queue has in flight, of its present life and of earlier ones. Both servers keep one per queue.
//!
//! A queue's *epoch* changes whenever its ring starts anew. A completion that carries an older epoch belongs to a ring
//! that is gone; until all of those (*orphans*) have come back, nothing is taken from the new ring, because the driver
//! may repeat the very requests that are still under way.

use virtio_queue::{Queue, QueueT};

use super::{Chain, ChainId, RingError};

/// Where a ring stands, to tell whether it resumes where it stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    base: u32,
    used: u16,
    desc_table: u64,
}

impl Position {
    /// Where `queue` stands now.
    pub(crate) fn of(queue: &Queue) -> Self {
        Self { base: queue.next_avail().into(), used: queue.next_used(), desc_table: queue.desc_table() }
    }

    /// A place by the base that the front end is told, the used index, and the address of the descriptors.
    pub(crate) fn new(base: u32, used: u16, desc_table: u64) -> Self {
        Self { base, used, desc_table }
    }
}

/// A ring that was stopped with requests in flight, as the front end was told.
///
/// The stop is either a pause, and the guest still waits for these requests, or part of a reset, and the guest must
/// not see them (or have its memory written by them) any more. Only the next start tells. So they are orphaned at
/// once, and a ring that resumes takes them again from its descriptors.
#[derive(Debug)]
struct Parked {
    at: Position,
    /// Heads of the chains in flight, newest first.
    heads: Vec<u16>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Flight {
    epoch: u32,
    inflight: u32,
    /// In flight of earlier epochs.
    orphans: u32,
    /// When each head was taken, by a counter; 0: not in flight.
    taken: Vec<u64>,
    taken_count: u64,
    /// Heads to take again before anything new, newest first.
    again: Vec<u16>,
    parked: Option<Parked>,
}

impl Flight {
    /// Nothing in flight, on a ring of at most `size_max` entries.
    pub(crate) fn new(size_max: u16) -> Self {
        let taken = vec![0; size_max.into()];
        Self { epoch: 0, inflight: 0, orphans: 0, taken, taken_count: 0, again: Vec::new(), parked: None }
    }

    /// Requests in flight that the driver waits for.
    pub(crate) fn inflight(&self) -> u32 {
        self.inflight
    }

    /// Requests in flight of rings that are gone.
    pub(crate) fn orphans(&self) -> u32 {
        self.orphans
    }

    /// How many chains have come back, modulo 2^64.
    pub(crate) fn ended_count(&self) -> u64 {
        self.taken_count.wrapping_sub((self.inflight + self.orphans).into())
    }

    /// Whether nothing is under way, of this life or another.
    pub(crate) fn is_quiet(&self) -> bool {
        self.inflight == 0 && self.orphans == 0
    }

    /// Whether nothing is under way, nor to be taken again.
    pub(crate) fn is_drained(&self) -> bool {
        self.is_quiet() && self.again.is_empty()
    }

    /// Whether there are chains to take again.
    pub(crate) fn has_again(&self) -> bool {
        !self.again.is_empty()
    }

    /// The next head to take again, before anything new.
    pub(crate) fn next_again(&mut self) -> Option<u16> {
        self.again.pop()
    }

    /// `chain` was taken from queue `queue`: it is in flight now.
    ///
    /// # Errors
    /// [`RingError::InFlight`]: it was already. Both would be answered with the same head.
    pub(crate) fn took(&mut self, queue: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.id.queue = queue;
        chain.id.epoch = self.epoch;
        self.taken_count += 1;
        if let Some(at) = self.taken.get_mut(usize::from(chain.id.head)) {
            if *at != 0 {
                return Err(RingError::InFlight(chain.id.head));
            }
            *at = self.taken_count;
        }
        self.inflight += 1;
        Ok(())
    }

    /// Whether `id` belongs to the present life.
    pub(crate) fn is_current(&self, id: ChainId) -> bool {
        id.epoch == self.epoch
    }

    /// A chain came back; false if it belongs to a life that is over.
    pub(crate) fn ended(&mut self, id: ChainId) -> bool {
        if !self.is_current(id) {
            self.orphans = self.orphans.saturating_sub(1);
            return false;
        }
        self.inflight = self.inflight.saturating_sub(1);
        if let Some(at) = self.taken.get_mut(usize::from(id.head)) {
            *at = 0;
        }
        true
    }

    /// Everything in flight now belongs to the past.
    pub(crate) fn orphan(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        self.orphans += std::mem::take(&mut self.inflight);
        self.parked = None;
        self.again.clear();
        self.taken.fill(0);
    }

    /// The ring stops with requests in flight.
    pub(crate) fn park(&mut self, at: Position) {
        let taken = self.taken.iter().zip(0..).filter(|(at, _)| **at != 0);
        let mut heads: Vec<(u64, u16)> = taken.map(|(at, head)| (*at, head)).collect();
        heads.sort_unstable_by(|a, b| b.cmp(a));
        // What was still to be taken again is newer than what was.
        let mut all = std::mem::take(&mut self.again);
        all.extend(heads.into_iter().map(|(_, head)| head));
        self.orphan();
        self.parked = Some(Parked { at, heads: all });
    }

    /// Whether the last stop left requests that go on if the ring starts at `at`.
    pub(crate) fn is_parked_at(&self, at: Position) -> bool {
        self.parked.as_ref().is_some_and(|parked| parked.at == at && !parked.heads.is_empty())
    }

    /// Whether the last stop left requests for [`start`](Self::start) to judge.
    pub(crate) fn is_parked(&self) -> bool {
        self.parked.is_some()
    }

    /// The ring starts at `at`: a new life, or the old one again if it was parked exactly there.
    pub(crate) fn start(&mut self, at: Position) {
        match self.parked.take().filter(|parked| parked.at == at) {
            Some(parked) => self.again = parked.heads,
            None => self.orphan(),
        }
    }

    /// The ring starts with these heads in flight according to its log, newest first.
    pub(crate) fn start_logged(&mut self, heads: Vec<u16>) {
        self.orphan();
        self.again = heads;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Position = Position { base: 5, used: 1, desc_table: 0x1000 };

    fn take(flight: &mut Flight, head: u16) -> ChainId {
        let mut chain = Chain::default();
        chain.begin(head);
        flight.took(3, &mut chain).unwrap();
        chain.id
    }

    #[test]
    fn a_ring_that_resumes_takes_again_in_the_old_order() {
        let mut flight = Flight::new(8);
        let ids: Vec<ChainId> = [6, 2, 7, 0].map(|head| take(&mut flight, head)).into();
        assert!(flight.ended(ids[1]));
        flight.park(HERE);
        assert_eq!((flight.inflight(), flight.orphans()), (0, 3));
        flight.start(HERE);
        assert_eq!(flight.next_again(), Some(6));
        take(&mut flight, 6);
        // Stopped again before all of them were taken again.
        flight.park(HERE);
        flight.start(HERE);
        let order: Vec<u16> = std::iter::from_fn(|| flight.next_again()).collect();
        assert_eq!(order, [6, 7, 0]);
        for id in [ids[0], ids[2], ids[3]] {
            assert!(!flight.ended(id), "of an earlier life");
        }
        assert_eq!((flight.orphans(), flight.is_quiet()), (1, false));
    }

    #[test]
    fn a_head_in_flight_is_not_taken_twice() {
        let mut flight = Flight::new(8);
        let id = take(&mut flight, 5);
        let mut chain = Chain::default();
        chain.begin(5);
        assert_eq!(flight.took(3, &mut chain), Err(RingError::InFlight(5)));
        assert!(flight.ended(id));
        flight.took(3, &mut chain).unwrap();
    }

    #[test]
    fn a_ring_that_starts_elsewhere_starts_empty() {
        let mut flight = Flight::new(8);
        let id = take(&mut flight, 1);
        flight.park(HERE);
        flight.start(Position { base: 0, ..HERE });
        assert_eq!((flight.next_again(), flight.is_drained()), (None, false));
        assert!(!flight.ended(id) && flight.is_drained());
    }
}
