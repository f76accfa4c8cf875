//! The seam between a device model (virtio semantics, above) and an engine (a protocol that reaches a disk, below).
//!
//! The device model turns a descriptor chain into one or more [`Request`]s, each small enough for the limits in
//! [`Lun`]; the engine carries each out as one SCSI command and gives it back as a [`Completion`] exactly once. The
//! engine repeats what a lost connection interrupted; the device model never does. Both run on the data thread.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use vcp_core::ask::Rest;
use vcp_core::handover::Fds;
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::mem::GuestBuf;
use vcp_core::metrics::Samples;
use vcp_core::uring::Ring;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read `blocks` into the buffer.
    Read,
    /// Write the buffer; `fua`: it is on stable storage before the completion.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Everything completed before is on stable storage when this completes (SYNCHRONIZE CACHE).
    Flush,
    /// The blocks are no longer needed (UNMAP).
    Discard,
    /// The blocks read as zeroes afterwards; `unmap` allows to deallocate them (WRITE SAME).
    WriteZeroes {
        /// Deallocation allowed.
        unmap: bool,
    },
}

/// One command for the logical unit.
#[derive(Debug)]
pub struct Request {
    /// The device model's name for it, returned in the completion.
    pub tag: u64,
    /// What to do.
    pub op: Op,
    /// First logical block (in units of [`Lun::block_bytes`]).
    pub lba: u64,
    /// Number of logical blocks.
    pub blocks: u32,
    /// Guest memory to read from or write to, of `blocks * block_bytes` bytes; empty for operations without data.
    pub data: GuestBuf,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done, every byte accounted for.
    Ok,
    /// Failed and will not be repeated.
    IoError,
    /// The logical unit cannot do this.
    Unsupported,
}

/// The answer to one [`Request`].
#[derive(Debug)]
pub struct Completion {
    /// As in the request.
    pub tag: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// The request's buffer, for reuse; the engine no longer touches the memory behind it.
    pub data: GuestBuf,
}

/// The logical unit as the engine found it: nothing here is a constant of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Lun {
    /// Number of logical blocks.
    pub blocks: u64,
    /// Bytes in a logical block (512 or 4096; READ CAPACITY(16)).
    pub block_bytes: u32,
    /// Logical blocks per physical block, as a power of two.
    pub physical_exponent: u8,
    /// First naturally aligned logical block.
    pub lowest_aligned: u16,
    /// Write protected (MODE SENSE), or opened read-only.
    pub read_only: bool,
    /// The write cache is on (caching mode page, WCE), so FLUSH matters.
    pub write_cache: bool,
    /// FUA is honoured (DPOFUA).
    pub fua: bool,
    /// Largest transfer of one command, in logical blocks (VPD B0h, or what the CDB can carry); never 0.
    pub max_transfer_blocks: u32,
    /// Optimal transfer length in logical blocks (VPD B0h), 0 if not told.
    pub opt_transfer_blocks: u32,
    /// Optimal transfer length granularity in logical blocks (VPD B0h), 0 if not told.
    pub min_transfer_blocks: u32,
    /// Largest UNMAP in blocks for one request; 0: discard is not supported.
    pub max_discard_blocks: u32,
    /// Optimal unmap granularity in blocks, at least 1 where discard is supported.
    pub discard_granularity: u32,
    /// Alignment of that granularity in blocks.
    pub discard_alignment: u32,
    /// Largest WRITE SAME in blocks for one request; 0: write-zeroes is not supported.
    pub max_write_zeroes_blocks: u32,
    /// WRITE SAME may deallocate (VPD B2h LBPWS).
    pub write_zeroes_may_unmap: bool,
    /// Serial number for VIRTIO_BLK_T_GET_ID: unit serial number (VPD 80h) or designation (VPD 83h).
    pub serial: String,
    /// INQUIRY vendor identification.
    pub vendor: String,
    /// INQUIRY product identification.
    pub product: String,
    /// INQUIRY product revision.
    pub revision: String,
}

/// What the data thread waits for before it has to call [`Engine::poll`] again.
#[derive(Debug)]
pub struct Wait<'a> {
    /// Readiness to wait for; `None` while nothing is connected.
    pub fd: Option<BorrowedFd<'a>>,
    /// Whether the engine waits to write (it always waits to read).
    pub writable: bool,
    /// When it must be polled even if nothing happens.
    pub deadline: Option<Instant>,
}

/// A disk behind a protocol, driven by the data thread.
pub trait Engine {
    /// The logical unit.
    fn lun(&self) -> &Lun;

    /// How many more requests [`submit`](Self::submit) takes now.
    fn room(&self) -> usize;

    /// Takes a request. Call only with [`room`](Self::room) left; nothing is sent before the next `poll`.
    fn submit(&mut self, request: Request);

    /// Sends all that is queued, receives what is there, runs timers; appends what ended to `done`. Never blocks.
    /// Returns whether anything moved.
    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) -> bool;

    /// See [`RingDevice::readiness`](vcp_core::device::RingDevice::readiness).
    fn readiness(&mut self, _ready: bool) {}

    /// See [`RingDevice::submit_to`](vcp_core::device::RingDevice::submit_to).
    fn submit_to(&mut self, _ring: &mut Ring) -> bool {
        false
    }

    /// See [`RingDevice::reap_from`](vcp_core::device::RingDevice::reap_from).
    fn reap_from(&mut self, _ring: &mut Ring) {}

    /// See [`RingDevice::leave_ring`](vcp_core::device::RingDevice::leave_ring).
    fn leave_ring(&mut self) {}

    /// See [`RingDevice::moves_long`](vcp_core::device::RingDevice::moves_long).
    fn moves_long(&self) -> bool {
        false
    }

    /// What to wait for before the next `poll`.
    fn wait(&self) -> Wait<'_>;

    /// Nobody waits for what is in flight any more (the guest was reset, or a stop took too long): end each request as
    /// soon as it is certain that the guest memory in its buffer is no longer read or written. Requests not yet sent
    /// can end at once. Each is still given back as a completion. The default lets them run their course, which is
    /// right for an engine whose requests end soon anyway.
    fn abandon(&mut self) {}

    /// The process ends: ends the session in order, within `limit` at most. Nothing is submitted afterwards.
    fn close(&mut self, _limit: Duration) {}

    /// How many sessions were lost so far. The target may have lost power with one, and with it what it had written to a
    /// volatile cache only: a write in several steps counts only if none was lost from its first step to its last.
    fn losses(&self) -> u64 {
        0
    }

    /// What people want to know of it (state of the session, counters), for the control socket.
    fn status(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Its own metrics.
    fn collect(&self, _samples: &mut Samples) {}

    /// A command of the control socket; `None` if it does not know it. See [`vcp_core::device::RingDevice::command`].
    fn command(
        &mut self,
        _name: &str,
        _args: &serde_json::Map<String, serde_json::Value>,
        _now: Instant,
    ) -> Option<Result<Rest, String>> {
        None
    }

    /// See [`RingDevice::export`](vcp_core::device::RingDevice::export).
    ///
    /// # Errors
    /// Something is under way, or it cannot be handed over at all.
    fn export(&self, _fds: &mut Fds, _now: Instant) -> Result<serde_json::Value, NotNow> {
        Err(NotNow::Never("this engine cannot be handed over".into()))
    }

    /// See [`RingDevice::import`](vcp_core::device::RingDevice::import).
    ///
    /// # Errors
    /// The state is not understood.
    fn import(&mut self, _state: serde_json::Value, _fds: &mut Fds, _now: Instant) -> Result<(), BadState> {
        Err(BadState::Text("this engine cannot be taken over".into()))
    }

    /// The unit changed (capacity, limits) since the last call: the device model tells its driver.
    fn take_change(&mut self) -> bool {
        false
    }
}
