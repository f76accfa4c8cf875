//! The device as the data thread knows it: a pass, virtio's features and configuration space, and what is handed through to
//! the engine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vcp_core::ask::Rest;
use vcp_core::device::{RingDevice, Rings, Wait};
use vcp_core::handover::Fds;
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::metrics::{DeviceMetrics, Samples};
use vcp_core::queue::MAX_CHAIN_DESCRIPTORS;
use vcp_core::uring::Ring;

use super::BlkDevice;
use crate::blk::config::{CONFIG_BYTES, WRITEBACK_OFFSET, space};
use crate::blk::numbers::Numbers;
use crate::blk::slot::Slot;
use crate::engine::{Completion, Engine};
use crate::limit::Change;

/// Largest virtqueue.
const QUEUE_SIZE_MAX: u16 = 256;
/// Bytes for a piece (pointer and length).
const PIECE_BYTES: u64 = 16;

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
