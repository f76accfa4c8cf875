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
mod ring_device;
mod taking;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use vcp_core::device::Rings;
use vcp_core::mem::GuestBuf;
use vcp_core::metrics::{DeviceMetrics, OpMetrics};
use vcp_core::queue::Chain;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use super::backlog::Backlogs;
use super::config::{bit, features};
use super::request::{Kind, Status};
use super::slot::Slot;
use crate::engine::{Completion, Engine, Lun, Op, Outcome, Request};
use crate::limit::{Limiter, Limits};

/// Most slots of a device: no target takes more commands at a time.
const MAX_SLOTS: usize = 1024;
/// Pieces that a buffer has storage for from the start: 126 segments, header and status.
const PIECES: usize = 128;

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
}

fn counters(metrics: &DeviceMetrics, kind: Kind) -> &OpMetrics {
    match kind {
        Kind::Read => &metrics.read,
        Kind::Write => &metrics.write,
        Kind::Flush => &metrics.flush,
        Kind::Discard | Kind::WriteZeroes | Kind::GetId => &metrics.other,
    }
}

#[cfg(test)]
#[path = "device_test.rs"]
mod tests;
