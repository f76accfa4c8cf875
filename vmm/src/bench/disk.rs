//! One queue of the disk under load: slots with requests in flight, kicks, calls, waiting, and the checks that every
//! completion has to pass.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::args::WaitMode;
use super::pattern::SECTOR;
use super::ring::{Request, Ring};
use super::shared::Shared;

/// Polls of the used ring between two looks at the clock and at the socket.
const POLLS_PER_LOOK: u32 = 4096;

const CALL: u64 = 0;
const ERROR: u64 = 1;
const SOCKET: u64 = 2;

/// Kinds of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Read,
    Write,
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    op: Op,
    sector: u64,
    started: Instant,
}

/// A finished request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) slot: u16,
    pub(super) latency: Duration,
}

/// What a load is put on: slots with a request each.
pub(super) trait LoadQueue: Send {
    /// Number of slots.
    fn depth(&self) -> u16;
    /// Number of requests in flight.
    fn inflight(&self) -> usize;
    /// Writes the data of a slot that is not in flight.
    fn write_data(&mut self, slot: u16, bytes: &[u8]);
    /// Reads the data of a slot that is not in flight.
    fn read_data(&mut self, slot: u16, bytes: &mut [u8]);
    /// Starts a request in a free slot. [`notify`](Self::notify) tells the backend.
    fn submit(&mut self, slot: u16, op: Op, sector: u64, len: usize) -> Result<()>;
    /// Tells the backend if it wants to be told.
    fn notify(&mut self) -> Result<()>;
    /// Takes a completion if there is one. A failed request is an error.
    fn poll(&mut self) -> Result<Option<Done>>;
    /// Notifies the backend and waits for a completion.
    fn wait(&mut self) -> Result<Done>;
    /// Makes all that was written durable. Nothing may be in flight.
    fn flush(&mut self) -> Result<()>;
    /// Signals sent, and taken.
    fn signals(&self) -> (u64, u64);
}

/// One virtqueue and its requests.
#[derive(Debug)]
pub(super) struct Queue {
    ring: Ring,
    memory: Arc<Shared>,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
    pub(super) error: EventFd,
    epoll: Epoll,
    wait: WaitMode,
    timeout: Duration,
    slots: Vec<Option<InFlight>>,
    inflight: usize,
    /// Kicks written.
    pub(super) kicks: u64,
    /// Calls received.
    pub(super) calls: u64,
}

impl Queue {
    /// Makes a queue with `depth` slots. `socket` is watched for the backend's end.
    pub(super) fn new(
        ring: Ring,
        memory: Arc<Shared>,
        depth: u16,
        wait: WaitMode,
        timeout: Duration,
        socket: RawFd,
    ) -> Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context("cannot make an eventfd");
        let (kick, call, error) = (event()?, event()?, event()?);
        let epoll = Epoll::new().context("cannot make an epoll descriptor")?;
        for (fd, events, data) in [
            (call.as_raw_fd(), EventSet::IN, CALL),
            (error.as_raw_fd(), EventSet::IN, ERROR),
            (socket, EventSet::READ_HANG_UP, SOCKET),
        ] {
            epoll
                .ctl(ControlOperation::Add, fd, EpollEvent::new(events, data))
                .context("cannot watch an eventfd")?;
        }
        let slots = vec![None; usize::from(depth)];
        let this = Self {
            ring,
            memory,
            kick,
            call,
            error,
            epoll,
            wait,
            timeout,
            slots,
            inflight: 0,
            kicks: 0,
            calls: 0,
        };
        this.ring.want_calls(wait);
        Ok(this)
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Asks for a call, looks once more, then sleeps until it comes.
    fn sleep(&mut self, end: Instant) -> Result<()> {
        self.ring.want_calls(WaitMode::Event);
        if self.ring.has_completed() {
            return Ok(());
        }
        let left = end.saturating_duration_since(Instant::now());
        // Rounded up: a wait of 0 ms would spin.
        self.watch(i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX))?;
        // A call may have got lost, which is the backend's fault and not a lack of progress.
        if Instant::now() >= end {
            if self.ring.has_completed() {
                bail!("the backend completed a request and made no call for it");
            }
            return self.late();
        }
        Ok(())
    }

    fn spin(&mut self, end: Instant) -> Result<()> {
        for _ in 0..POLLS_PER_LOOK {
            if self.ring.has_completed() {
                self.ring.want_calls(WaitMode::Poll);
                return Ok(());
            }
            std::hint::spin_loop();
        }
        self.watch(0)?;
        if Instant::now() >= end { self.late() } else { Ok(()) }
    }

    fn late(&self) -> Result<()> {
        bail!("no completion for {} s with {} requests in flight", self.timeout.as_secs_f32(), self.inflight)
    }

    fn watch(&mut self, timeout_ms: i32) -> Result<()> {
        let mut events = [EpollEvent::default(); 3];
        let n = match self.epoll.wait(timeout_ms, &mut events) {
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(e).context("cannot wait for the backend"),
        };
        for event in &events[..n] {
            match event.data() {
                CALL => self.calls += self.call.read().unwrap_or(0),
                ERROR => bail!("the backend reports an error on the queue (SET_VRING_ERR)"),
                SOCKET if !self.ring.has_completed() => {
                    bail!("the backend closed the connection with {} requests in flight", self.inflight)
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl LoadQueue for Queue {
    fn depth(&self) -> u16 {
        self.slots.len() as u16
    }

    fn inflight(&self) -> usize {
        self.inflight
    }

    fn write_data(&mut self, slot: u16, bytes: &[u8]) {
        debug_assert!(self.slots[usize::from(slot)].is_none());
        self.memory.write(self.ring.data(slot), bytes);
    }

    fn read_data(&mut self, slot: u16, bytes: &mut [u8]) {
        debug_assert!(self.slots[usize::from(slot)].is_none());
        self.memory.read(self.ring.data(slot), bytes);
    }

    fn submit(&mut self, slot: u16, op: Op, sector: u64, len: usize) -> Result<()> {
        let kind = match op {
            Op::Read => VIRTIO_BLK_T_IN,
            Op::Write => VIRTIO_BLK_T_OUT,
            Op::Flush => VIRTIO_BLK_T_FLUSH,
        };
        debug_assert!(self.slots[usize::from(slot)].is_none());
        self.slots[usize::from(slot)] = Some(InFlight { op, sector, started: Instant::now() });
        self.inflight += 1;
        self.ring.submit(slot, Request { kind, sector, len, device_writes: op == Op::Read });
        Ok(())
    }

    fn notify(&mut self) -> Result<()> {
        if self.ring.should_kick() {
            self.kick.write(1).context("cannot kick")?;
            self.kicks += 1;
        }
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<Done>> {
        let Some(slot) = self.ring.complete()? else { return Ok(None) };
        let Some(request) = self.slots[usize::from(slot)].take() else {
            bail!("the backend completed slot {slot} twice");
        };
        self.inflight -= 1;
        let latency = request.started.elapsed();
        match self.ring.status(slot) {
            0 => Ok(Some(Done { slot, latency })),
            status => {
                let InFlight { op, sector, .. } = request;
                let what = match status {
                    1 => "I/O error",
                    2 => "not supported",
                    0xff => "no status was written",
                    _ => "unknown",
                };
                bail!("{op:?} at sector {sector} failed with status {status} ({what})")
            }
        }
    }

    fn wait(&mut self) -> Result<Done> {
        self.notify()?;
        let end = Instant::now() + self.timeout;
        loop {
            if let Some(done) = self.poll()? {
                return Ok(done);
            }
            match self.wait {
                WaitMode::Event => self.sleep(end)?,
                WaitMode::Poll => self.spin(end)?,
            }
        }
    }

    fn flush(&mut self) -> Result<()> {
        self.submit(0, Op::Flush, 0, 0)?;
        while self.inflight > 0 {
            self.wait()?;
        }
        Ok(())
    }

    fn signals(&self) -> (u64, u64) {
        (self.kicks, self.calls)
    }
}

/// Number of sectors in `len_bytes`.
pub(super) fn sectors(len_bytes: u64) -> u64 {
    len_bytes / SECTOR as u64
}
