//! [`BlkDevice`]: requests in slots, split into engine requests, completed once all parts ended.
//!
//! ```text
//! take chain -> slot -> [queued part by part while the engine has room] -> engine -> parts come back
//!                          write through: a FLUSH follows the last part -------^          |
//!                                                                            status byte, used element
//! ```
//!
//! Slots and all their storage are taken at start. A chain stays in the ring until there is a slot for it and the
//! engine has room: the ring is the queue, and nothing is buffered twice.

mod export;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vcp_core::ask::Rest;
use vcp_core::device::{RingDevice, Rings, Wait};
use vcp_core::handover::Fds;
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::mem::GuestBuf;
use vcp_core::metrics::{DeviceMetrics, OpMetrics, Samples};
use vcp_core::queue::{Chain, MAX_CHAIN_DESCRIPTORS, RingError};
use vcp_core::uring::Ring;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use super::backlog::Backlogs;
use super::config::{CONFIG_BYTES, WRITEBACK_OFFSET, bit, features, space};
use super::numbers::Numbers;
use super::request::{HEADER_BYTES, Header, ID_BYTES, Kind, Ranges, Status, read_ranges};
use super::slot::Slot;
use crate::engine::{Completion, Engine, Lun, Op, Outcome, Request};
use crate::limit::{Change, Limiter, Limits};

/// Largest virtqueue.
const QUEUE_SIZE_MAX: u16 = 256;
/// Most slots of a device: no target takes more commands at a time.
const MAX_SLOTS: usize = 1024;
/// Chains taken from one queue before the next one has its turn, and from all queues before other devices have theirs.
const BATCH: usize = 32;
const PASS: usize = 64;
/// Most writable bytes of a request that has no use for them (they are zeroed, while other devices wait).
const MAX_ROOM_BYTES: usize = 4096;
/// Pieces that a buffer has storage for from the start: 126 segments, header and status.
const PIECES: usize = 128;
/// Bytes for a piece (pointer and length).
const PIECE_BYTES: u64 = 16;

/// A virtio-blk device on top of an engine.
#[derive(Debug)]
pub struct BlkDevice<E> {
    engine: E,
    lun: Lun,
    queues: u16,
    /// Features as first offered. They stay, whatever becomes of the unit: a driver that took them cannot give them up,
    /// and a front end that reconnects insists on them. What the unit can no longer do is refused request by request.
    offered: u64,
    acked: u64,
    /// The cache mode byte: true is write back.
    writeback: bool,
    config_changed: bool,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots with parts to submit, oldest first.
    unsubmitted: VecDeque<u32>,
    /// Recycled buffers for parts.
    spare: Vec<GuestBuf>,
    done: Vec<Completion>,
    chain: Chain,
    /// Queue that has the first turn.
    turn: u16,
    limiter: Limiter,
    backlogs: Backlogs,
    /// Times the unit became smaller.
    shrunk: u64,
    /// Times the driver was told of another size or other limits.
    changes: u64,
    metrics: Arc<DeviceMetrics>,
}

impl<E: Engine> BlkDevice<E> {
    /// A device with `queues` queues for the engine's logical unit.
    #[must_use]
    pub fn new(engine: E, queues: u16) -> Self {
        let lun = engine.lun().clone();
        let queues = queues.max(1);
        // A request without a place at the engine waits in its ring, so more slots than places are of no use.
        let count = engine.room().clamp(1, MAX_SLOTS);
        let now = Instant::now();
        let slots = (0..count).map(|_| Slot::new(PIECES, now)).collect();
        let writeback = lun.write_cache;
        let offered = features(&lun, queues);
        Self {
            engine,
            lun,
            queues,
            offered,
            acked: 0,
            writeback,
            config_changed: false,
            slots,
            free: (0..count as u32).rev().collect(),
            unsubmitted: VecDeque::with_capacity(count),
            spare: (0..count).map(|_| GuestBuf::with_capacity(PIECES)).collect(),
            done: Vec::with_capacity(count),
            chain: Chain::with_capacity(PIECES),
            turn: 0,
            limiter: Limiter::new(Limits::default(), now),
            backlogs: Backlogs::new(queues),
            shrunk: 0,
            changes: 0,
            metrics: Arc::default(),
        }
    }

    /// The same device with these limits.
    #[must_use]
    pub fn limited(mut self, limits: Limits, now: Instant) -> Self {
        self.limiter = Limiter::new(limits, now);
        self
    }

    /// The engine below.
    pub fn engine(&self) -> &E {
        &self.engine
    }

    /// Whether a write must be durable when it completes (5.2.6.2): the driver cannot flush, or turned the cache off.
    fn write_through(&self) -> bool {
        let has = |feature| self.acked & bit(feature) != 0;
        !has(VIRTIO_BLK_F_FLUSH) || has(VIRTIO_BLK_F_CONFIG_WCE) && !self.writeback
    }

    /// Whether the unit itself makes that necessary.
    fn must_make_durable(&self) -> bool {
        self.lun.write_cache && self.write_through()
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

    /// Submits parts of waiting requests, oldest first, while the engine has room; whether any was submitted.
    fn submit<R: Rings>(&mut self, rings: &mut R, now: Instant) -> bool {
        let mut moved = false;
        while let Some(&index) = self.unsubmitted.front() {
            let slot = &mut self.slots[index as usize];
            if !rings.wanted(slot.id) {
                // Its ring stopped or is gone: it must not reach the disk or guest memory any further.
                slot.result = Status::IoError;
                let under_way = slot.outstanding != 0;
                self.unsubmitted.pop_front();
                if !under_way {
                    self.finish(rings, index, now);
                }
                moved = true;
                continue;
            }
            if self.engine.room() == 0 {
                break;
            }
            match self.next_part(index) {
                Some(request) => {
                    self.slots[index as usize].outstanding += 1;
                    self.engine.submit(request);
                    moved = true;
                    if !self.slots[index as usize].has_parts() {
                        self.unsubmitted.pop_front();
                    }
                }
                None => drop(self.unsubmitted.pop_front()),
            }
        }
        moved
    }

    fn next_part(&mut self, index: u32) -> Option<Request> {
        let slot = &mut self.slots[index as usize];
        if slot.result != Status::Ok {
            return None;
        }
        let tag = u64::from(index);
        if slot.steps == 0 {
            slot.losses = self.engine.losses();
        }
        let Some(range) = slot.current() else {
            if !slot.flush_after || slot.outstanding != 0 {
                return None;
            }
            slot.flush_after = false;
            slot.flushed = true;
            slot.steps += 1;
            return Some(Request { tag, op: Op::Flush, lba: 0, blocks: 0, data: GuestBuf::new() });
        };
        let (op, most) = match slot.kind {
            Kind::Read => (Op::Read, self.lun.max_transfer_blocks),
            Kind::Write => (Op::Write { fua: slot.fua }, self.lun.max_transfer_blocks),
            Kind::Discard => (Op::Discard, self.lun.max_discard_blocks),
            _ => {
                let unmap = range.unmap && self.lun.write_zeroes_may_unmap;
                (Op::WriteZeroes { unmap }, self.lun.max_write_zeroes_blocks)
            }
        };
        let blocks = (range.blocks - slot.done_blocks).min(most.max(1));
        let lba = range.lba + u64::from(slot.done_blocks);
        let data = match slot.kind {
            // With a FLUSH behind it, it may have to be written again.
            Kind::Read | Kind::Write if blocks == range.blocks && !slot.flush_after => {
                std::mem::take(&mut slot.data)
            }
            Kind::Read | Kind::Write => {
                let mut part = self.spare.pop().unwrap_or_default();
                let at = slot.done_blocks as usize * self.lun.block_bytes as usize;
                slot.data.slice_into(at, blocks as usize * self.lun.block_bytes as usize, &mut part);
                part
            }
            _ => GuestBuf::new(),
        };
        slot.submitted(blocks);
        slot.steps += 1;
        Some(Request { tag, op, lba, blocks, data })
    }

    /// Takes back what the engine ended.
    fn reap<R: Rings>(&mut self, rings: &mut R, now: Instant) {
        let mut done = std::mem::take(&mut self.done);
        for completion in done.drain(..) {
            let index = completion.tag as u32;
            let Some(slot) = self.slots.get_mut(index as usize).filter(|slot| slot.outstanding != 0) else {
                tracing::error!(
                    tag = completion.tag,
                    "the engine completed a request that was not under way"
                );
                continue;
            };
            slot.outstanding -= 1;
            let status = match completion.outcome {
                Outcome::Ok => Status::Ok,
                Outcome::IoError => Status::IoError,
                Outcome::Unsupported => Status::Unsupported,
            };
            // The first failure is the answer; parts that were not submitted yet are not tried.
            if slot.result == Status::Ok {
                slot.result = status;
            }
            let mut data = completion.data;
            if data.capacity() != 0 {
                data.clear();
                self.spare.push(data);
            }
            if slot.outstanding != 0 {
                continue;
            }
            let unfinished = slot.result == Status::Ok && (slot.flush_after || slot.current().is_some());
            if !unfinished
                && slot.result == Status::Ok
                && self.lun.write_cache
                && slot.is_in_doubt(self.engine.losses())
            {
                slot.start_over();
                self.unsubmitted.push_back(index);
            } else if !unfinished {
                self.finish(rings, index, now);
            } else if slot.current().is_none() {
                // All written: the FLUSH goes out next. (With parts left the slot is still queued.)
                self.unsubmitted.push_back(index);
            }
        }
        self.done = done;
    }

    /// Writes the status byte and gives the chain back.
    fn finish<R: Rings>(&mut self, rings: &mut R, index: u32, now: Instant) {
        // A request that failed half-way may still be queued for its next part.
        if self.slots[index as usize].result != Status::Ok {
            self.unsubmitted.retain(|&queued| queued != index);
        }
        let slot = &mut self.slots[index as usize];
        if rings.wanted(slot.id) {
            slot.status.copy_from(0, &[slot.result as u8]);
        }
        let counters = counters(&self.metrics, slot.kind);
        if slot.result == Status::Ok {
            counters.ok.add(1);
            counters.bytes.add(slot.payload_bytes);
        } else {
            counters.failed.add(1);
        }
        let took = now.saturating_duration_since(slot.since);
        counters.latency.record_ns(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        // The mapping must not live longer than the request.
        slot.status.clear();
        slot.data.clear();
        if slot.data.capacity() == 0 {
            // The engine still has (or gave back to `spare`) the storage of this slot's data.
            slot.data = self.spare.pop().unwrap_or_default();
        }
        let (id, len) = (slot.id, slot.writable_bytes);
        self.free.push(index);
        self.metrics.inflight.set((self.slots.len() - self.free.len()) as u64);
        rings.complete(id, len);
    }

    /// Whether there is a slot for one more request and the engine can start on it.
    fn takes_more(&self) -> bool {
        self.limiter.is_open()
            && self.unsubmitted.is_empty()
            && !self.free.is_empty()
            && self.engine.room() != 0
    }

    fn take<R: Rings>(&mut self, rings: &mut R, now: Instant) -> bool {
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
}

fn counters(metrics: &DeviceMetrics, kind: Kind) -> &OpMetrics {
    match kind {
        Kind::Read => &metrics.read,
        Kind::Write => &metrics.write,
        Kind::Flush => &metrics.flush,
        Kind::Discard | Kind::WriteZeroes | Kind::GetId => &metrics.other,
    }
}

impl<E: Engine + Send + 'static> RingDevice for BlkDevice<E> {
    fn queues(&self) -> u16 {
        self.queues
    }

    fn queue_size_max(&self) -> u16 {
        QUEUE_SIZE_MAX
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn set_features(&mut self, acked: u64) {
        self.acked = acked;
        if acked == 0 {
            self.backlogs.clear();
            self.writeback = self.lun.write_cache;
        }
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let space: [u8; CONFIG_BYTES] = space(&self.lun, self.queues, self.writeback);
        out.fill(0);
        let from = space.get(offset as usize..).unwrap_or_default();
        let len = from.len().min(out.len());
        out[..len].copy_from_slice(&from[..len]);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        // Monitors write back the whole space; what counts is the one byte that may change.
        let at = WRITEBACK_OFFSET.checked_sub(offset).map(|at| at as usize);
        match at.and_then(|at| data.get(at)) {
            Some(&mode @ (0 | 1)) => self.writeback = mode == 1,
            _ => self.metrics.refused_config_writes.add(1),
        }
    }

    fn poll<R: Rings>(&mut self, rings: &mut R, now: Instant) -> bool {
        let mut moved = self.submit(rings, now);
        moved |= self.take(rings, now);
        let mut done = std::mem::take(&mut self.done);
        moved |= self.engine.poll(now, &mut done);
        self.done = done;
        if !self.done.is_empty() {
            moved = true;
            // `now` is from before the engine's system calls: a request may have begun and ended in this very pass.
            self.reap(rings, Instant::now());
        }
        if self.engine.take_change() {
            let lun = self.engine.lun().clone();
            if lun.block_bytes == self.lun.block_bytes {
                if lun != self.lun {
                    self.config_changed = true;
                    self.changes += 1;
                }
                // From here on requests behind the new end fail; those under way are the target's to refuse.
                self.shrunk += u64::from(lun.blocks < self.lun.blocks);
                self.lun = lun;
            } else {
                tracing::error!(
                    was = self.lun.block_bytes,
                    is = lun.block_bytes,
                    "the unit changed its block size, which a running guest cannot follow; its size is ignored"
                );
            }
        }
        moved
    }

    fn readiness(&mut self, ready: bool) {
        self.engine.readiness(ready);
    }

    fn submit_to(&mut self, ring: &mut Ring) -> bool {
        self.engine.submit_to(ring)
    }

    fn reap_from(&mut self, ring: &mut Ring) {
        self.engine.reap_from(ring);
    }

    fn leave_ring(&mut self) {
        self.engine.leave_ring();
    }

    fn moves_long(&self) -> bool {
        self.engine.moves_long()
    }

    fn has_room(&self) -> bool {
        self.takes_more()
    }

    fn wait(&self) -> Wait<'_> {
        let wait = self.engine.wait();
        let limited = self.limiter.closed_until();
        let deadline = wait.deadline.into_iter().chain(limited).min();
        Wait { fd: wait.fd, writable: wait.writable, deadline }
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    fn export(&self, fds: &mut Fds, now: Instant) -> Result<serde_json::Value, NotNow> {
        self.make_state(fds, now)
    }

    fn import(&mut self, state: serde_json::Value, fds: &mut Fds, now: Instant) -> Result<(), BadState> {
        self.take_state(state, fds, now)
    }

    fn abandon(&mut self) {
        self.engine.abandon();
    }

    fn close(&mut self, limit: Duration) {
        self.engine.close(limit);
    }

    fn status(&self) -> serde_json::Value {
        let mut status =
            serde_json::json!({ "lun": self.lun, "queues": self.queues, "writeback": self.writeback });
        status["limits"] = serde_json::json!(self.limiter.limits());
        status["shrunk"] = self.shrunk.into();
        status["engine"] = self.engine.status();
        status
    }

    fn collect(&self, samples: &mut Samples) {
        let numbers =
            Numbers { lun: &self.lun, shrunk: self.shrunk, changes: self.changes, limiter: &self.limiter };
        numbers.collect(samples);
        self.engine.collect(samples);
    }

    fn command(
        &mut self,
        name: &str,
        args: &serde_json::Map<String, serde_json::Value>,
        now: Instant,
    ) -> Option<Result<Rest, String>> {
        match name {
            "limit" => Some(Change::parse(args).map(|change| {
                self.limiter.change(change, now);
                Rest::done(serde_json::json!({ "limits": self.limiter.limits() }))
            })),
            _ => self.engine.command(name, args, now),
        }
    }

    fn memory_bound_bytes(&self) -> u64 {
        // Each slot's buffers and the part that may be cut from them, at the longest chain that is accepted.
        let buffers = 2 * MAX_CHAIN_DESCRIPTORS as u64 * PIECE_BYTES;
        self.slots.len() as u64 * (size_of::<Slot>() as u64 + buffers + size_of::<Completion>() as u64)
    }

    fn metrics(&self) -> &Arc<DeviceMetrics> {
        &self.metrics
    }
}

#[cfg(test)]
#[path = "device_test.rs"]
mod tests;
