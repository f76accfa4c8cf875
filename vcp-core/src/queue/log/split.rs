//! The log of a split ring: `QueueRegionSplit`.
//!
//! ```text
//! 0 features u64 | 8 version u16 | 10 desc_num u16 | 12 last_batch_head u16 | 14 used_idx u16 | 16 entries
//! entry: 0 inflight u8 | 6 next u16 | 8 counter u64
//! ```
//!
//! What can be lost between two stores:
//!
//! * taken, not logged: the head counts as available still, because `used index + logged heads` is where the available
//!   ring goes on. Nothing was done for it.
//! * completed, used index not stored: the driver saw nothing, the request is done again.
//! * used index stored, log not cleared: the index runs ahead of `used_idx` by the size of the batch, whose heads are
//!   the first of the list from `last_batch_head`. They are cleared, not done again.

use super::{LogError, QueueLog};

pub(super) const HEADER: usize = 16;
pub(super) const ENTRY: usize = 16;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

fn entry(head: u16, field: usize) -> usize {
    HEADER + ENTRY * usize::from(head) + field
}

/// See the module.
#[derive(Debug)]
pub(crate) struct SplitLog {
    log: QueueLog,
    counter: u64,
    last_batch_head: u16,
    /// Heads completed since the last publication.
    batch: Vec<u16>,
}

impl SplitLog {
    /// A region without anything in flight, for a ring whose used index is `used_idx`.
    pub(crate) fn fresh(log: QueueLog, used_idx: u16) -> Self {
        log.initialise(|log| {
            for head in 0..log.desc_num {
                log.put(entry(head, INFLIGHT), 0u8);
            }
            log.put(LAST_BATCH_HEAD, 0u16);
            log.put(USED_IDX, used_idx);
        });
        Self::over(log)
    }

    fn over(log: QueueLog) -> Self {
        let batch = Vec::with_capacity(log.desc_num.into());
        Self { log, counter: 0, last_batch_head: 0, batch }
    }

    /// Goes on where another process stopped: the log, and the heads in flight, newest first. `None` if the region is not
    /// in use. `used_idx` is the one in the ring of `size` entries.
    pub(crate) fn recover(
        log: QueueLog,
        size: u16,
        used_idx: u16,
    ) -> Result<Result<(Self, Vec<u16>), QueueLog>, LogError> {
        if !log.in_use()? {
            return Ok(Err(log));
        }
        let mut this = Self::over(log);
        let log = &this.log;
        let mut inflight: Vec<(u64, u16)> = Vec::new();
        let mut flags = vec![false; log.desc_num.into()];
        for head in 0..log.desc_num {
            match log.get::<u8>(entry(head, INFLIGHT)) {
                0 => {}
                1 if head < size => flags[usize::from(head)] = true,
                1 => return Err(LogError::Contradiction("the size of the ring")),
                _ => return Err(LogError::Contradiction("its format: in flight or not")),
            }
        }
        this.last_batch_head = log.get(LAST_BATCH_HEAD);
        let behind = used_idx.wrapping_sub(log.get(USED_IDX));
        if behind > size {
            return Err(LogError::Contradiction("the used index of the ring"));
        }
        let mut head = this.last_batch_head;
        for _ in 0..behind {
            let Some(flag) = flags.get_mut(usize::from(head)) else {
                return Err(LogError::Contradiction("its own list of the last batch"));
            };
            *flag = false;
            log.put(entry(head, INFLIGHT), 0u8);
            head = log.get(entry(head, NEXT));
        }
        log.put(USED_IDX, used_idx);
        for (head, _) in (0..log.desc_num).zip(&flags).filter(|(_, flag)| **flag) {
            inflight.push((log.get(entry(head, COUNTER)), head));
        }
        inflight.sort_unstable_by(|a, b| b.cmp(a));
        this.counter = inflight.first().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Ok((this, inflight.into_iter().map(|(_, head)| head).collect())))
    }

    /// The chain at `head` was taken and is about to be submitted.
    #[inline]
    pub(crate) fn taken(&mut self, head: u16) {
        self.log.put(entry(head, COUNTER), self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.log.put(entry(head, INFLIGHT), 1u8);
    }

    /// Its used element is written and will be published.
    #[inline]
    pub(crate) fn completed(&mut self, head: u16) {
        self.log.put(entry(head, NEXT), self.last_batch_head);
        self.last_batch_head = head;
        self.log.put(LAST_BATCH_HEAD, head);
        self.batch.push(head);
    }

    /// The used index is published. A full fence stands between its store and this call.
    #[inline]
    pub(crate) fn published(&mut self, used_idx: u16) {
        for head in self.batch.drain(..) {
            self.log.put(entry(head, INFLIGHT), 0u8);
        }
        self.log.put(USED_IDX, used_idx);
    }
}
