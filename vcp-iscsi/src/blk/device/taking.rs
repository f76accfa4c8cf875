//! Taking chains out of the rings: which queue has its turn, and what a chain asks for.

use std::time::Instant;

use vcp_core::device::Rings;
use vcp_core::queue::RingError;

use super::{BlkDevice, counters};
use crate::blk::request::{HEADER_BYTES, Header, ID_BYTES, Kind, Ranges, Status, read_ranges};
use crate::engine::Engine;

/// Chains taken from one queue before the next one has its turn, and from all queues before other devices have theirs.
const BATCH: usize = 32;
const PASS: usize = 64;
/// Most writable bytes of a request that has no use for them (they are zeroed, while other devices wait).
const MAX_ROOM_BYTES: usize = 4096;

impl<E: Engine> BlkDevice<E> {
    /// Whether there is a slot for one more request and the engine can start on it.
    pub(super) fn takes_more(&self) -> bool {
        self.limiter.is_open()
            && self.unsubmitted.is_empty()
            && !self.free.is_empty()
            && self.engine.room() != 0
    }

    pub(super) fn take<R: Rings>(&mut self, rings: &mut R, now: Instant) -> bool {
        let (mut left, first) = (PASS, self.turn);
        self.limiter.refill(now);
        for turn in 0..self.queues {
            let queue = (first + turn) % self.queues;
            let mut emptied = false;
            for _ in 0..BATCH.min(left) {
                if !self.takes_more() {
                    break;
                }
                if !rings.take(queue, &mut self.chain) {
                    emptied = true;
                    break;
                }
                left -= 1;
                // The last one that took something has its next turn after all others.
                self.turn = (queue + 1) % self.queues;
                self.begin(rings, now);
                self.submit(rings, now);
            }
            // What stays behind is looked at once per pass, so that its wait is known when it is taken.
            let behind = if emptied { 0 } else { rings.available(queue) };
            self.backlogs.left(queue, behind, now);
        }
        // An idle device holds no mapping.
        self.chain.readable.clear();
        self.chain.writable.clear();
        left != PASS
    }

    /// Turns the chain just taken into a slot under way, or answers it at once.
    fn begin<R: Rings>(&mut self, rings: &mut R, now: Instant) {
        let id = self.chain.id;
        if self.chain.readable.len_bytes() < HEADER_BYTES {
            rings.fail(id, RingError::Framing("no room for the request header"));
            return;
        }
        if self.chain.writable.is_empty() {
            rings.fail(id, RingError::Framing("no room for the status byte"));
            return;
        }
        let Some(index) = self.free.pop() else {
            // `take` is called with a free slot only.
            rings.fail(id, RingError::Framing("no slot"));
            return;
        };
        let header = Header::read(&self.chain.readable);
        self.chain.readable.advance(HEADER_BYTES);
        let slot = &mut self.slots[index as usize];
        let writable = self.chain.writable.len_bytes();
        self.chain.writable.split_off_into(writable - 1, &mut slot.status);
        slot.begin(id, writable as u32, now);
        self.metrics.inflight.set((self.slots.len() - self.free.len()) as u64);
        let planned = self.plan(index, header);
        let slot = &self.slots[index as usize];
        let ring_wait = self.backlogs.took(id.queue, now);
        counters(&self.metrics, slot.kind).ring_wait.record_ns(ring_wait);
        // One that will be refused counts as well: it costs the same here.
        self.limiter.spend(slot.payload_bytes, now);
        match planned {
            Ok(true) => self.unsubmitted.push_back(index),
            Ok(false) => self.finish(rings, index, now),
            Err(status) => {
                self.slots[index as usize].result = status;
                self.finish(rings, index, now);
            }
        }
    }

    /// Works out what the engine has to do; false if nothing.
    fn plan(&mut self, index: u32, header: Header) -> Result<bool, Status> {
        let must_make_durable = self.must_make_durable();
        let fua = self.lun.fua;
        let slot = &mut self.slots[index as usize];
        // Requests that fail before their type is known are counted among the others.
        slot.kind = Kind::GetId;
        let kind = header.kind()?;
        slot.kind = kind;
        if kind != Kind::Read && self.chain.writable.len_bytes() > MAX_ROOM_BYTES {
            return Err(Status::IoError);
        }
        match kind {
            Kind::Read => {
                slot.ranges = Ranges::one(header.range(&self.lun, self.chain.writable.len_bytes())?);
                std::mem::swap(&mut slot.data, &mut self.chain.writable);
            }
            Kind::Write => {
                let range = header.range(&self.lun, self.chain.readable.len_bytes())?;
                if self.lun.read_only {
                    return Err(Status::IoError);
                }
                slot.ranges = Ranges::one(range);
                std::mem::swap(&mut slot.data, &mut self.chain.readable);
                (slot.fua, slot.flush_after) = (must_make_durable && fua, must_make_durable && !fua);
            }
            Kind::Flush => {
                // Nothing to flush: every write was durable when it completed.
                if !self.lun.write_cache {
                    return Ok(false);
                }
                slot.ranges = Ranges::default();
                slot.flush_after = true;
            }
            Kind::Discard | Kind::WriteZeroes => {
                let supported = match kind {
                    Kind::Discard => self.lun.max_discard_blocks,
                    _ => self.lun.max_write_zeroes_blocks,
                };
                if supported == 0 {
                    return Err(Status::Unsupported);
                }
                if self.lun.read_only {
                    return Err(Status::IoError);
                }
                slot.ranges = read_ranges(&self.lun, kind, &self.chain.readable)?;
                slot.flush_after = must_make_durable && kind == Kind::WriteZeroes;
            }
            Kind::GetId => {
                let mut id = [0; ID_BYTES];
                for (byte, from) in id.iter_mut().zip(self.lun.serial.bytes()) {
                    *byte = from;
                }
                let len = self.chain.writable.len_bytes().min(ID_BYTES);
                self.chain.writable.copy_from(0, &id[..len]);
                let rest = self.chain.writable.len_bytes() - len;
                self.chain.writable.fill_zero(len, rest);
                return Ok(false);
            }
        }
        slot.payload_bytes = slot.data.len_bytes() as u64;
        if !matches!(kind, Kind::Read) {
            // Bytes before the status that nobody asked for: defined all the same, the used length covers them.
            self.chain.writable.fill_zero(0, self.chain.writable.len_bytes());
        }
        slot.skip_empty();
        Ok(slot.flush_after || slot.current().is_some())
    }
}
