//! The device, its queues and their in-flight requests under the lock of the epoll server.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use super::{Memory, Vring};
use crate::device::{RingDevice, Rings};
use crate::mem::GuestMap;
use crate::metrics::DeviceMetrics;
use crate::queue::{Chain, ChainId, RingError, take_split};

/// What the device and its queues are doing; one lock for everything, as the crate's model has it.
pub(super) struct State<D> {
    pub(super) device: D,
    pub(super) memory: Option<Memory>,
    /// As the crate handed them out; needed where it calls without them.
    pub(super) vrings: Vec<Vring>,
    pub(super) indirect: bool,
    pub(super) epochs: Vec<u32>,
    pub(super) inflight: Vec<u32>,
    pub(super) broken: Vec<bool>,
    /// Queues that must not be read: being stopped.
    pub(super) stopping: Vec<bool>,
    /// In flight of earlier lives of each queue.
    pub(super) orphans: Vec<u32>,
    /// Engine socket and timer, as one descriptor for the crate's epoll.
    pub(super) events: OwnedFd,
    pub(super) timer: OwnedFd,
}

/// The rings of one pass.
pub(super) struct EpollRings<'a> {
    vrings: &'a [Vring],
    map: Option<Arc<GuestMap>>,
    indirect: bool,
    epochs: &'a [u32],
    inflight: &'a mut [u32],
    broken: &'a mut [bool],
    stopping: &'a [bool],
    orphans: &'a mut [u32],
    used: u64,
    metrics: &'a DeviceMetrics,
}

impl EpollRings<'_> {
    fn break_queue(&mut self, queue: usize, error: RingError) {
        self.broken[queue] = true;
        self.metrics.broken_queues.add(1);
        tracing::warn!(queue, %error, "queue stopped: the driver broke a rule");
    }
}

impl Rings for EpollRings<'_> {
    fn take(&mut self, queue: u16, chain: &mut Chain) -> bool {
        let at = usize::from(queue);
        let (Some(vring), Some(map)) = (self.vrings.get(at), &self.map) else { return false };
        if self.orphans[at] != 0 || self.broken[at] || self.stopping[at] {
            return false;
        }
        let mut state = vring.get_mut();
        if !state.is_enabled() || !state.get_queue().ready() {
            return false;
        }
        let taken = take_split(state.get_queue_mut(), self.indirect, map, chain);
        drop(state);
        match taken {
            Ok(true) => {
                chain.id.queue = queue;
                chain.id.epoch = self.epochs[at];
                self.inflight[at] += 1;
                true
            }
            Ok(false) => false,
            Err(error) => {
                self.break_queue(at, error);
                false
            }
        }
    }

    fn complete(&mut self, id: ChainId, len_bytes: u32) {
        let at = usize::from(id.queue);
        if !self.wanted(id) {
            self.orphans[at] = self.orphans[at].saturating_sub(1);
            self.metrics.stale_completions.add(1);
            return;
        }
        self.inflight[at] = self.inflight[at].saturating_sub(1);
        let Some(vring) = self.vrings.get(at) else { return };
        match vring.add_used(id.head, len_bytes) {
            Ok(()) => self.used |= 1 << at,
            Err(_) => self.break_queue(at, RingError::RingMemory(0)),
        }
    }

    fn wanted(&self, id: ChainId) -> bool {
        self.epochs.get(usize::from(id.queue)) == Some(&id.epoch)
    }

    fn fail(&mut self, id: ChainId, error: RingError) {
        let at = usize::from(id.queue);
        if self.wanted(id) {
            self.inflight[at] = self.inflight[at].saturating_sub(1);
            self.break_queue(at, error);
        } else {
            self.orphans[at] = self.orphans[at].saturating_sub(1);
        }
    }
}

impl<D: RingDevice> State<D> {
    pub(super) fn new(device: D) -> rustix::io::Result<Self> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        epoll::add(&events, &timer, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        let queues = usize::from(device.queues());
        Ok(Self {
            device,
            memory: None,
            vrings: Vec::new(),
            indirect: false,
            epochs: vec![0; queues],
            inflight: vec![0; queues],
            broken: vec![false; queues],
            stopping: vec![false; queues],
            orphans: vec![0; queues],
            events,
            timer,
        })
    }

    /// One pass; whether anything moved.
    pub(super) fn pass(&mut self) -> bool {
        let metrics = Arc::clone(self.device.metrics());
        let map = self.memory.as_ref().map(|memory| memory.memory().into_inner());
        let mut rings = EpollRings {
            vrings: &self.vrings,
            map,
            indirect: self.indirect,
            epochs: &self.epochs,
            inflight: &mut self.inflight,
            broken: &mut self.broken,
            stopping: &self.stopping,
            orphans: &mut self.orphans,
            used: 0,
            metrics: &metrics,
        };
        let moved = self.device.poll(&mut rings, Instant::now());
        let used = rings.used;
        for (at, vring) in self.vrings.iter().enumerate().filter(|(at, _)| used & 1 << at != 0) {
            if vring.needs_notification().unwrap_or(true) {
                metrics.notifications.add(1);
                if let Err(error) = vring.signal_used_queue() {
                    tracing::warn!(queue = at, %error, "cannot notify the driver");
                }
            }
        }
        moved
    }

    /// Runs until nothing moves, notifications are armed, and the engine's wishes are known to `events`.
    pub(super) fn run(&mut self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.timer, &mut count);
        loop {
            while self.pass() {}
            if self.device.has_room() && self.arm() {
                continue;
            }
            break;
        }
        if let Err(error) = self.wait_for_engine() {
            tracing::error!(%error, "cannot wait for the engine");
        }
    }

    fn arm(&mut self) -> bool {
        let (broken, stopping) = (&self.broken, &self.stopping);
        let live = self.vrings.iter().enumerate().filter(|(at, _)| !broken[*at] && !stopping[*at]);
        let orphans = &self.orphans;
        live.fold(false, |more, (at, vring)| {
            let blocked = orphans[at] != 0;
            let runs = vring.get_ref().is_enabled() && vring.get_ref().get_queue().ready();
            (runs && !blocked && vring.enable_notification().unwrap_or(false)) || more
        })
    }

    /// Registers the engine's socket and deadline. The socket may be another one under the same number, so it is
    /// registered anew each time.
    fn wait_for_engine(&self) -> rustix::io::Result<()> {
        let wait = self.device.wait();
        if let Some(fd) = wait.fd {
            let writable = if wait.writable { epoll::EventFlags::OUT } else { epoll::EventFlags::empty() };
            let flags = epoll::EventFlags::IN | writable;
            let data = epoll::EventData::new_u64(1);
            match epoll::modify(&self.events, fd, data, flags) {
                Err(rustix::io::Errno::NOENT) => epoll::add(&self.events, fd, data, flags)?,
                result => result?,
            }
        }
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let it_value = wait.deadline.map_or(none, |deadline| {
            // Zero would disarm the timer.
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        timerfd_settime(
            &self.timer,
            TimerfdTimerFlags::empty(),
            &Itimerspec { it_interval: none, it_value },
        )?;
        Ok(())
    }

    /// What is in flight on this queue belongs to the past.
    pub(super) fn orphan(&mut self, at: usize) {
        self.epochs[at] = self.epochs[at].wrapping_add(1);
        self.orphans[at] += std::mem::take(&mut self.inflight[at]);
    }

    /// The connection is gone.
    pub(super) fn detach(&mut self) {
        self.vrings.clear();
        self.memory = None;
        (0..self.epochs.len()).for_each(|at| self.orphan(at));
        if self.orphans.iter().any(|&orphans| orphans != 0) {
            self.device.abandon();
        }
        self.broken.fill(false);
        self.stopping.fill(false);
        self.device.set_features(0);
    }
}
