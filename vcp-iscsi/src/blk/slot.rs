//! [`Slot`]: one request under way, and which part of it comes next.

use std::time::Instant;

use vcp_core::mem::GuestBuf;
use vcp_core::queue::ChainId;

use super::request::{Kind, Range, Ranges, Status};

/// A request under way.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) id: ChainId,
    pub(super) kind: Kind,
    /// Data to move; taken by the engine while a request that needs no splitting is under way.
    pub(super) data: GuestBuf,
    /// The status byte.
    pub(super) status: GuestBuf,
    pub(super) ranges: Ranges,
    /// Next part to submit: index of the range and blocks of it that were submitted.
    pub(super) range: usize,
    pub(super) done_blocks: u32,
    /// Parts at the engine.
    pub(super) outstanding: u32,
    /// Writes go out with FUA. Like `flush_after` decided once, whatever happens to the cache mode meanwhile.
    pub(super) fua: bool,
    /// A FLUSH has to follow (write through without FUA).
    pub(super) flush_after: bool,
    /// The engine's count of lost sessions when the first step was submitted.
    pub(super) losses: u64,
    /// Steps (parts, and the FLUSH behind them) submitted since.
    pub(super) steps: u32,
    /// A FLUSH was one of them.
    pub(super) flushed: bool,
    pub(super) result: Status,
    pub(super) writable_bytes: u32,
    pub(super) payload_bytes: u64,
    pub(super) since: Instant,
}

impl Slot {
    /// A free slot with storage for `pieces` pieces of data.
    pub(super) fn new(pieces: usize, now: Instant) -> Self {
        Self {
            id: ChainId::default(),
            kind: Kind::Flush,
            data: GuestBuf::with_capacity(pieces),
            status: GuestBuf::with_capacity(1),
            ranges: Ranges::default(),
            range: 0,
            done_blocks: 0,
            outstanding: 0,
            fua: false,
            flush_after: false,
            losses: 0,
            steps: 0,
            flushed: false,
            result: Status::Ok,
            writable_bytes: 0,
            payload_bytes: 0,
            since: now,
        }
    }

    /// Starts on a new request.
    pub(super) fn begin(&mut self, id: ChainId, writable_bytes: u32, now: Instant) {
        (self.id, self.writable_bytes, self.since) = (id, writable_bytes, now);
        self.data.clear();
        (self.range, self.done_blocks, self.outstanding, self.payload_bytes) = (0, 0, 0, 0);
        (self.fua, self.flush_after, self.result) = (false, false, Status::Ok);
        (self.losses, self.steps, self.flushed) = (0, 0, false);
    }

    /// Whether what it wrote may be gone although every step was answered: earlier steps were in a volatile cache when a
    /// session was lost, perhaps because the target lost power.
    pub(super) fn is_in_doubt(&self, losses: u64) -> bool {
        let writes = matches!(self.kind, Kind::Write | Kind::WriteZeroes);
        writes && !self.fua && self.steps > 1 && self.losses != losses
    }

    /// Begins with the first step again.
    pub(super) fn start_over(&mut self) {
        (self.range, self.done_blocks, self.steps) = (0, 0, 0);
        self.flush_after = std::mem::take(&mut self.flushed);
        self.skip_empty();
    }

    /// The range that the next part comes from.
    pub(super) fn current(&self) -> Option<Range> {
        self.ranges.get(self.range)
    }

    /// Steps over ranges of zero blocks, which need no command.
    pub(super) fn skip_empty(&mut self) {
        while self.current().is_some_and(|range| range.blocks == 0) {
            self.range += 1;
        }
    }

    /// Whether a part could be submitted now. The FLUSH after a write waits for its parts to end.
    pub(super) fn has_parts(&self) -> bool {
        self.result == Status::Ok && (self.current().is_some() || self.flush_after && self.outstanding == 0)
    }

    /// Marks `blocks` blocks of the current range as submitted.
    pub(super) fn submitted(&mut self, blocks: u32) {
        self.done_blocks += blocks;
        if self.current().is_some_and(|range| self.done_blocks >= range.blocks) {
            self.range += 1;
            self.done_blocks = 0;
            self.skip_empty();
        }
    }
}
