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
use crate::queue::flight::{Flight, Position};
use crate::queue::{Chain, ChainId, RingError, take_split, take_split_again};

/// Passes before the lock is given to others.
const PASSES: usize = 64;

/// What the device and its queues are doing; one lock for everything, as the crate's model has it.
pub(super) struct State<D> {
    pub(super) device: D,
    pub(super) memory: Option<Memory>,
    /// As the crate handed them out; needed where it calls without them.
    pub(super) vrings: Vec<Vring>,
    pub(super) indirect: bool,
    pub(super) flights: Vec<Flight>,
    pub(super) broken: Vec<bool>,
    /// Queues that must not be read: being stopped.
    pub(super) stopping: Vec<bool>,
    /// Queues with used elements that the driver was not told of yet.
    used: Vec<bool>,
    /// A stop ran out of time and nothing has come back since: the next one need not wait as long to learn it.
    pub(super) stalled: bool,
    /// Engine socket and timer, as one descriptor for the crate's epoll.
    pub(super) events: OwnedFd,
    pub(super) timer: OwnedFd,
}

/// The rings of one pass.
pub(super) struct EpollRings<'a> {
    vrings: &'a [Vring],
    map: Option<Arc<GuestMap>>,
    indirect: bool,
    flights: &'a mut [Flight],
    broken: &'a mut [bool],
    stopping: &'a [bool],
    used: &'a mut [bool],
    stalled: &'a mut bool,
    metrics: &'a DeviceMetrics,
}

impl EpollRings<'_> {
    fn break_queue(&mut self, queue: usize, error: &RingError) {
        self.broken[queue] = true;
        self.metrics.broken_queues.add(1);
        tracing::warn!(queue, %error, "queue stopped: the driver broke a rule");
    }
}

impl Rings for EpollRings<'_> {
    fn take(&mut self, queue: u16, chain: &mut Chain) -> bool {
        let at = usize::from(queue);
        let (Some(vring), Some(map)) = (self.vrings.get(at), &self.map) else { return false };
        let flight = &mut self.flights[at];
        if flight.orphans() != 0 || self.broken[at] || self.stopping[at] {
            return false;
        }
        let mut state = vring.get_mut();
        if !state.is_enabled() || !state.get_queue().ready() {
            return false;
        }
        if flight.is_parked() {
            // The first look since it stopped: it resumes, or was reset meanwhile.
            flight.start(Position::of(state.get_queue()));
            if flight.orphans() != 0 {
                return false;
            }
        }
        let taken = match flight.next_again() {
            Some(head) => take_split_again(state.get_queue(), self.indirect, map, head, chain).map(|()| true),
            None => take_split(state.get_queue_mut(), self.indirect, map, chain),
        };
        drop(state);
        match taken.and_then(|taken| if taken { flight.took(queue, chain).map(|()| true) } else { Ok(false) })
        {
            Ok(taken) => taken,
            Err(error) => {
                self.break_queue(at, &error);
                false
            }
        }
    }

    fn complete(&mut self, id: ChainId, len_bytes: u32) {
        let at = usize::from(id.queue);
        *self.stalled = false;
        if !self.flights.get_mut(at).is_some_and(|flight| flight.ended(id)) {
            self.metrics.stale_completions.add(1);
            return;
        }
        let Some(vring) = self.vrings.get(at) else { return };
        match vring.add_used(id.head, len_bytes) {
            Ok(()) => self.used[at] = true,
            Err(_) => self.break_queue(at, &RingError::RingMemory(0)),
        }
    }

    fn available(&self, queue: u16) -> u16 {
        let (Some(vring), Some(map)) = (self.vrings.get(usize::from(queue)), &self.map) else { return 0 };
        let state = vring.get_ref();
        let queue = state.get_queue();
        if !queue.ready() {
            return 0;
        }
        let next = std::num::Wrapping(queue.next_avail());
        queue.avail_idx(&**map, std::sync::atomic::Ordering::Relaxed).map_or(0, |index| (index - next).0)
    }

    fn wanted(&self, id: ChainId) -> bool {
        self.flights.get(usize::from(id.queue)).is_some_and(|flight| flight.is_current(id))
    }

    fn fail(&mut self, id: ChainId, error: RingError) {
        let at = usize::from(id.queue);
        if self.flights.get_mut(at).is_some_and(|flight| flight.ended(id)) {
            self.break_queue(at, &error);
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
        let size_max = device.queue_size_max();
        Ok(Self {
            device,
            memory: None,
            vrings: Vec::new(),
            indirect: false,
            flights: (0..queues).map(|_| Flight::new(size_max)).collect(),
            broken: vec![false; queues],
            stopping: vec![false; queues],
            used: vec![false; queues],
            stalled: false,
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
            flights: &mut self.flights,
            broken: &mut self.broken,
            stopping: &self.stopping,
            used: &mut self.used,
            stalled: &mut self.stalled,
            metrics: &metrics,
        };
        let moved = self.device.poll(&mut rings, Instant::now());
        for (at, (vring, used)) in self.vrings.iter().zip(&mut self.used).enumerate() {
            if std::mem::take(used) && vring.needs_notification().unwrap_or(true) {
                metrics.notifications.add(1);
                if let Err(error) = vring.signal_used_queue() {
                    tracing::warn!(queue = at, %error, "cannot notify the driver");
                }
            }
        }
        moved
    }

    /// Runs until nothing moves, notifications are armed, and the engine's wishes are known to `events`. Under load it
    /// returns now and then, so that set-up messages get the lock, and is called again through the timer.
    pub(super) fn run(&mut self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.timer, &mut count);
        let mut idle = false;
        for _ in 0..PASSES {
            let more = self.pass() || self.device.has_room() && self.arm();
            idle = !more;
            if idle {
                break;
            }
        }
        if let Err(error) = self.wait_for_engine(!idle) {
            tracing::error!(%error, "cannot wait for the engine");
        }
    }

    fn arm(&mut self) -> bool {
        let (broken, stopping) = (&self.broken, &self.stopping);
        let live = self.vrings.iter().enumerate().filter(|(at, _)| !broken[*at] && !stopping[*at]);
        let flights = &self.flights;
        live.fold(false, |more, (at, vring)| {
            let blocked = flights[at].orphans() != 0;
            let runs = vring.get_ref().is_enabled() && vring.get_ref().get_queue().ready();
            (runs && !blocked && (vring.enable_notification().unwrap_or(false) || flights[at].has_again()))
                || more
        })
    }

    /// Registers the engine's socket and deadline. The socket may be another one under the same number, so it is
    /// registered anew each time. `soon`: does not wait at all.
    fn wait_for_engine(&self, soon: bool) -> rustix::io::Result<()> {
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
        let deadline = if soon { Some(Instant::now()) } else { wait.deadline };
        let it_value = deadline.map_or(none, |deadline| {
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

    /// Requests in flight, of present and earlier lives of the queues.
    pub(super) fn inflight(&self) -> u32 {
        self.flights.iter().map(|flight| flight.inflight() + flight.orphans()).sum()
    }

    /// Queue `at` was stopped and its requests do not end: they are left behind.
    pub(super) fn leave_behind(&mut self, at: usize) {
        match self.vrings.get(at) {
            Some(vring) => self.flights[at].park(Position::of(vring.get_ref().get_queue())),
            None => self.flights[at].orphan(),
        }
        self.stalled |= !self.flights[at].is_quiet();
        // Not before nobody waits for anything: it would fail what is wanted on the other queues.
        if self.flights.iter().all(|flight| flight.inflight() == 0) {
            self.device.abandon();
        }
    }

    /// The connection is gone.
    pub(super) fn detach(&mut self) {
        self.vrings.clear();
        self.memory = None;
        self.flights.iter_mut().for_each(Flight::orphan);
        if self.inflight() != 0 {
            self.device.abandon();
        }
        self.broken.fill(false);
        self.stopping.fill(false);
        self.device.set_features(0);
    }
}
