//! [`Front`]: the first half of the way of a frame, from transmit queues to what was decided about each frame. It is one
//! value, with everything that it needs, so that it can be another thread's during a pass (`second`).

use std::time::Instant;

use vcp_core::queue::RingError;
use vcp_core::queue::burst::{Batch, BurstRing, MAX_BURST};

use super::line::{From, Line, Sender};
use super::work::{Frames, Work};

/// A burst on its way from the first half to the second.
#[derive(Debug)]
pub struct Burst {
    /// The chains.
    batch: Batch,
    /// What was decided.
    pub work: Work,
    /// Where it comes from.
    pub from: From,
    /// Bytes of the header in front of each frame.
    header: usize,
    /// There may be more behind it that this port can afford now.
    pub more: bool,
    /// It is one of those that are timed.
    pub timed: bool,
    /// For the second thread: which of its rings it is from.
    pub ring: usize,
}

impl Default for Burst {
    fn default() -> Self {
        let from = From { port: super::work::PortId::UPLINK, pair: 0, host: None };
        let (batch, work) = (Batch::default(), Work::default());
        Self { batch, work, from, header: 0, more: false, timed: false, ring: 0 }
    }
}

impl Burst {
    /// Its frames.
    #[inline]
    #[must_use]
    pub fn frames(&self) -> Frames<'_> {
        Frames::Ring(&self.batch, self.header)
    }

    /// How many there are.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.batch.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// Lets go of the mapping.
    pub fn release(&mut self) {
        self.batch.release();
    }

    /// Bytes of chains `from` and up.
    fn bytes(&self, from: usize) -> u64 {
        (from..self.batch.len()).map(|at| self.batch.frame(at).len_bytes() as u64).sum()
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Front {
    /// The lines of all switches.
    pub lines: Vec<Line>,
    /// All ports.
    pub senders: Vec<Sender>,
}

impl Front {
    /// Takes the next burst of a transmit queue that its port can afford, and decides about it. False if there is none.
    ///
    /// # Errors
    /// The driver broke a rule.
    #[inline]
    pub fn take(
        &mut self,
        ring: &mut BurstRing,
        from: From,
        header: usize,
        burst: &mut Burst,
        now: Instant,
    ) -> Result<bool, RingError> {
        let Some(sender) = self.senders.get_mut(from.port.index()) else { return Ok(false) };
        let Some(line) = self.lines.get_mut(usize::from(sender.spec.switch)) else { return Ok(false) };
        if !sender.credit.has_any() {
            return Ok(false);
        }
        // Headers that are not read stay where they are.
        let unread = if from.host.is_none() { header } else { 0 };
        let fetched = ring.fetch_more(&mut burst.batch, MAX_BURST, unread)?;
        if fetched == 0 {
            return Ok(false);
        }
        let lens = (0..fetched).map(|at| burst.batch.frame(at).len_bytes() as u64);
        let afford = sender.credit.afford(lens);
        burst.batch.truncate(afford);
        let affords_more = sender.credit.spend(afford as u64, burst.bytes(0));
        burst.more = affords_more && afford == fetched && fetched == MAX_BURST;
        (burst.from, burst.header) = (from, header);
        let frames = Frames::Ring(&burst.batch, header);
        burst.timed = line.decide(&mut burst.work, &frames, from, Some(sender), now);
        Ok(true)
    }

    /// The first `done` frames of a burst are done with and go back to their driver; the rest of it stays in the ring, as if
    /// it had not been taken.
    #[inline]
    pub fn settle(&mut self, ring: &mut BurstRing, burst: &Burst, done: usize) {
        ring.give_back(&burst.batch, done);
        let left = burst.len().saturating_sub(done);
        // One that waits for room elsewhere is not woken by its own driver.
        ring.want(left == 0);
        if left != 0
            && let Some(sender) = self.senders.get_mut(burst.from.port.index())
        {
            sender.credit.put_back(left as u64, burst.bytes(done));
            if let Some(line) = self.lines.get_mut(usize::from(sender.spec.switch)) {
                line.police.undo(&burst.work, done, sender);
            }
        }
    }
}
