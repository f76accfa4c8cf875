//! [`RingSet`]: the virtqueues of one device on the data thread, and the lives they go through.
//!
//! What is in flight, and which life of the ring it belongs to, is [`Flight`](crate::queue::flight)'s.
//!
//! ```text
//!            SET_VRING_KICK                GET_VRING_BASE, nothing in flight
//! Stopped ------------------> Running ------------------------------------> Stopped
//!    ^                         |  | GET_VRING_BASE       all came back        ^
//!    |   broken rule, reset,   |  +----------------> Stopping ----------------+
//!    +--- disconnect ----------+                        | deadline
//!                                                       v
//!                              Parked (if the ring starts again exactly where it stopped,
//!                                      what was in flight is taken again, in its old order)
//! ```

mod export;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use rustix::event::epoll;

use super::port::{Answer, PortError, Reply};
use super::vring::{Later, STOP_TIMEOUT, Vring, drop_kick, nonblocking};
use crate::device::Rings;
use crate::mem::GuestMap;
use crate::metrics::DeviceMetrics;
use crate::queue::burst::{BurstRing, Direction};
use crate::queue::flight::Flight;
use crate::queue::log::{LogArea, LogFormat};
use crate::queue::{Chain, ChainId, Ring, RingAddresses, RingError, StartAt, VirtQueue};
use crate::uring;

/// What was negotiated that concerns rings.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Dialect {
    pub(crate) packed: bool,
    pub(crate) event_idx: bool,
    pub(crate) indirect: bool,
    pub(crate) in_order: bool,
}

/// See the module.
#[derive(Debug)]
pub struct RingSet {
    name: Arc<str>,
    vrings: Vec<Vring>,
    map: Arc<GuestMap>,
    size_max: u16,
    packed: bool,
    event_idx: bool,
    indirect: bool,
    in_order: bool,
    /// Queues that are run in bursts.
    bursts: Vec<Option<Direction>>,
    /// The in-flight log, where the front end wants one.
    log: Option<Arc<LogArea>>,
    closing: bool,
    /// A stop ran out of time and nothing has come back since: the next one need not wait as long to learn it.
    stalled: bool,
    /// For a runner that signals and listens by its own means.
    later: Option<Later>,
    metrics: Arc<DeviceMetrics>,
}

impl RingSet {
    /// `queues` stopped queues of at most `size_max` entries.
    #[must_use]
    pub fn new(name: Arc<str>, queues: u16, size_max: u16, metrics: Arc<DeviceMetrics>) -> Self {
        let vrings = (0..queues).map(|_| Vring::new(size_max)).collect();
        let bursts = vec![None; queues.into()];
        let map = Arc::default();
        Self {
            name,
            vrings,
            map,
            size_max,
            packed: false,
            log: None,
            event_idx: false,
            indirect: false,
            in_order: false,
            bursts,
            closing: false,
            stalled: false,
            later: None,
            metrics,
        }
    }

    /// Runs these queues in bursts from their next start on.
    pub(crate) fn set_bursts(&mut self, bursts: impl IntoIterator<Item = Option<Direction>>) {
        for (place, burst) in self.bursts.iter_mut().zip(bursts) {
            *place = burst;
        }
    }

    /// Requests in flight, of this and earlier lives.
    #[must_use]
    pub fn inflight(&self) -> u32 {
        self.vrings.iter().map(|vring| vring.flight.inflight() + vring.flight.orphans()).sum()
    }

    /// Whether the driver waits for any request in flight.
    pub(crate) fn any_wanted(&self) -> bool {
        self.vrings.iter().any(|vring| vring.flight.inflight() != 0)
    }

    /// From here on signals and kicks are the runner's, who asks for them with [`hand_to`](Self::hand_to).
    pub(crate) fn leave_to_runner(&mut self) {
        let watches = self.vrings.iter().filter_map(|vring| vring.kick.clone()).collect();
        self.later = Some(Later { signals: Vec::with_capacity(self.vrings.len()), watches });
    }

    /// Gives the runner's ring the signals and kicks that came up since.
    pub(crate) fn hand_to(&mut self, ring: &mut uring::Ring) {
        if let Some(later) = &mut self.later {
            later.watches.drain(..).for_each(|fd| ring.watch(&fd));
            later.signals.drain(..).for_each(|fd| ring.signal(&fd));
        }
    }

    /// Takes no more chains from now on (the process ends).
    pub(crate) fn close(&mut self) {
        self.closing = true;
    }

    /// What the driver and the front end agreed on; for rings that start from now on.
    pub(crate) fn set_features(&mut self, dialect: Dialect, enable_all: bool) {
        let Dialect { packed, event_idx, indirect, in_order } = dialect;
        (self.packed, self.event_idx, self.indirect, self.in_order) = (packed, event_idx, indirect, in_order);
        if enable_all {
            self.vrings.iter_mut().for_each(|vring| vring.enabled = true);
        }
    }

    pub(crate) fn set_map(&mut self, map: Arc<GuestMap>) {
        self.map = map;
        for queue in 0..self.vrings.len() {
            let ring = self.vrings[queue].ring.as_mut().and_then(Ring::burst);
            if let Some(Err(error)) = ring.map(|ring| ring.set_map(&self.map)) {
                self.break_queue(queue, &error);
            }
        }
    }

    /// Queue `queue`, if it runs and is run in bursts.
    #[inline]
    pub fn burst(&mut self, queue: u16) -> Option<&mut BurstRing> {
        let vring = self.vrings.get_mut(usize::from(queue))?;
        if self.closing || !vring.runs() {
            return None;
        }
        vring.ring.as_mut()?.burst()
    }

    /// Takes the ring of queue `queue` out, if it runs and is run in bursts: for another thread, which serves it while this one
    /// is in the same pass. Until it [comes back](Self::take_back), before the pass ends, the queue looks as if it did
    /// not run.
    pub fn lend(&mut self, queue: u16) -> Option<BurstRing> {
        self.burst(queue)?;
        let place = &mut self.vrings.get_mut(usize::from(queue))?.ring;
        match place.take() {
            Some(Ring::Burst(ring)) => Some(ring),
            other => {
                *place = other;
                None
            }
        }
    }

    /// A ring that was [lent](Self::lend) comes back.
    pub fn take_back(&mut self, queue: u16, ring: BurstRing) {
        if let Some(vring) = self.vrings.get_mut(usize::from(queue))
            && vring.ring.is_none()
        {
            vring.ring = Some(Ring::Burst(ring));
        }
    }

    /// The driver of queue `queue` broke a rule: the queue stops.
    #[cold]
    pub fn broke(&mut self, queue: u16, error: &RingError) {
        if usize::from(queue) < self.vrings.len() {
            self.break_queue(queue.into(), error);
        }
    }

    /// Whether the driver and the front end have queue `queue` running.
    #[must_use]
    pub fn is_running(&self, queue: u16) -> bool {
        !self.closing && self.vrings.get(usize::from(queue)).is_some_and(Vring::runs)
    }

    /// The log that rings use from their next start on.
    pub(crate) fn set_log(&mut self, log: Arc<LogArea>) -> Result<(), PortError> {
        if let Some(queue) = (0u32..).zip(&self.vrings).find_map(|(n, it)| it.ring.is_some().then_some(n)) {
            return Err(PortError::Running { queue });
        }
        self.log = Some(log);
        Ok(())
    }

    fn vring(&mut self, queue: u32) -> Result<&mut Vring, PortError> {
        let queues = self.vrings.len();
        self.vrings.get_mut(queue as usize).ok_or(PortError::NoSuchQueue { queue, queues })
    }

    fn stopped(&mut self, queue: u32) -> Result<&mut Vring, PortError> {
        let vring = self.vring(queue)?;
        if vring.ring.is_some() { Err(PortError::Running { queue }) } else { Ok(vring) }
    }

    pub(crate) fn set_size(&mut self, queue: u32, size: u32) -> Result<(), PortError> {
        let (max, packed) = (self.size_max, self.packed);
        let vring = self.stopped(queue)?;
        // Only a split ring's has to be a power of two (2.7, 2.8.10.1).
        let valid = |size: &u16| *size != 0 && *size <= max && (packed || size.is_power_of_two());
        let size = u16::try_from(size).ok().filter(valid).ok_or(PortError::Size { queue, size, max })?;
        vring.setup.size = size;
        Ok(())
    }

    pub(crate) fn set_addresses(
        &mut self,
        queue: u32,
        desc: u64,
        avail: u64,
        used: u64,
    ) -> Result<(), PortError> {
        let packed = self.packed;
        let vring = self.vring(queue)?;
        if let Some(ring) = &vring.ring {
            // Front ends repeat the addresses to switch logging on and off; anything else needs a stop first.
            let same = RingAddresses { desc, avail, used, ..ring.addresses() } == ring.addresses();
            return if same { Ok(()) } else { Err(PortError::Running { queue }) };
        }
        let aligned = [(desc, 16), (avail, if packed { 4 } else { 2 }), (used, 4)];
        if !aligned.iter().all(|(addr, to)| addr.is_multiple_of(*to)) {
            return Err(PortError::Alignment { queue, desc, avail, used });
        }
        vring.setup = RingAddresses { size: vring.setup.size, desc, avail, used };
        vring.addresses_set = true;
        Ok(())
    }

    pub(crate) fn set_base(&mut self, queue: u32, base: u32) -> Result<(), PortError> {
        let packed = self.packed;
        let vring = self.stopped(queue)?;
        if !packed && base > u32::from(u16::MAX) {
            return Err(PortError::Base { queue, base });
        }
        vring.base = base;
        Ok(())
    }

    pub(crate) fn set_enabled(&mut self, queue: u32, enabled: bool) -> Result<(), PortError> {
        self.vring(queue)?.enabled = enabled;
        Ok(())
    }

    pub(crate) fn set_call(&mut self, queue: u32, fd: Option<File>) -> Result<(), PortError> {
        let fd = fd.map(|fd| nonblocking(fd, queue)).transpose()?;
        let vring = self.vring(queue)?;
        vring.call = fd.map(Arc::new);
        if vring.recovered {
            // The interrupt for what the process before us published last may be missing. One too many is harmless.
            self.notify(queue as usize);
        }
        Ok(())
    }

    pub(crate) fn set_err(&mut self, queue: u32, fd: Option<File>) -> Result<(), PortError> {
        self.vring(queue)?.err = fd.map(|fd| nonblocking(fd, queue)).transpose()?;
        Ok(())
    }

    /// `SET_VRING_KICK`: the ring starts.
    pub(crate) fn set_kick(
        &mut self,
        epoll: &OwnedFd,
        queue: u32,
        fd: Option<File>,
    ) -> Result<(), PortError> {
        let queues = self.vrings.len();
        let vring = self.vrings.get_mut(queue as usize).ok_or(PortError::NoSuchQueue { queue, queues })?;
        drop_kick(epoll, vring);
        vring.polled = fd.is_none();
        if let Some(fd) = fd {
            let fd = Arc::new(OwnedFd::from(fd));
            // Edge-triggered and never read: each kick is an edge, and there is nothing that could block.
            match &mut self.later {
                Some(later) => later.watches.push(Arc::clone(&fd)),
                None => {
                    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
                    epoll::add(epoll, &fd, epoll::EventData::new_u64(0), flags)
                        .map_err(|error| PortError::Descriptor { queue, error })?;
                }
            }
            vring.kick = Some(fd);
        }
        if vring.ring.is_none() && vring.addresses_set {
            self.start(queue as usize)?;
        }
        Ok(())
    }

    /// Starts a ring. Where it was stopped in this connection, and starts elsewhere, the log of it is old. Where it was
    /// not, the log (if in use) knows better than the front end where it stands: the process before us crashed.
    fn start(&mut self, queue: usize) -> Result<(), PortError> {
        let failed = |source| PortError::Ring { queue: queue as u32, source };
        let vring = &mut self.vrings[queue];
        let mut start = StartAt {
            queue,
            at: vring.setup,
            base: vring.base,
            packed: self.packed,
            event_idx: self.event_idx,
            indirect: self.indirect,
            in_order: self.in_order,
            burst: self.bursts.get(queue).copied().flatten(),
            log: self.log.as_ref(),
            forget: false,
        };
        let position = Ring::position_at(&start, &self.map);
        let kept = vring.kept.take();
        start.forget = kept.as_ref().is_some_and(|(at, _)| *at != position);
        let (mut ring, logged) = match kept {
            // Only the ring itself knows what a packed one had in flight.
            Some((at, Ring::Packed(ring)))
                if at == position
                    && start.log.is_none()
                    && ring.is_like(start.at, start.event_idx, start.indirect) =>
            {
                ring.check(&self.map).map_err(failed)?;
                (Ring::Packed(ring), None)
            }
            _ => Ring::start(&start, &self.map).map_err(failed)?,
        };
        // A running ring is armed only while the loop sleeps; one that never sleeps needs no kick at all.
        ring.disarm(&self.map).map_err(failed)?;
        let goes_on = ring.burst().is_some_and(|ring| !ring.is_fresh());
        vring.recovered |= logged.is_some() || goes_on;
        match logged {
            Some(heads) => {
                if !heads.is_empty() {
                    let inflight = heads.len();
                    tracing::info!(device = &*self.name, queue, inflight, "taking again what was in flight");
                }
                self.metrics.resubmitted.add(heads.len() as u64);
                vring.flight.start_logged(heads);
            }
            // It went on with requests that its new log does not have: the next crash would lose them.
            None if start.log.is_some() && vring.flight.is_parked_at(position) => {
                return Err(failed(RingError::Base(start.base)));
            }
            None => vring.flight.start(ring.position()),
        }
        tracing::debug!(
            device = &*self.name,
            queue,
            base = ring.base(),
            packed = self.packed,
            logged = self.log.is_some(),
            orphans = vring.flight.orphans(),
            "ring starts"
        );
        vring.ring = Some(ring);
        if vring.recovered {
            self.notify(queue);
        }
        Ok(())
    }

    fn notify(&mut self, queue: usize) -> bool {
        self.vrings[queue].notify(self.later.as_mut())
    }

    /// `GET_VRING_BASE`: the ring stops; [`finish_stops`](Self::finish_stops) replies when nothing is in flight or the
    /// time is up.
    pub(crate) fn stop(&mut self, queue: u32, reply: SyncSender<Reply>, now: Instant) {
        let vring = match self.vring(queue) {
            Ok(vring) => vring,
            Err(error) => {
                let _ = reply.try_send(Err(error));
                return;
            }
        };
        vring.stopping = Some((reply, now + STOP_TIMEOUT));
    }

    /// Ends the stops that can end; returns whether one ended with requests in flight.
    pub(crate) fn finish_stops(&mut self, epoll: &OwnedFd, now: Instant) -> bool {
        let mut late = false;
        for queue in 0..self.vrings.len() {
            let Some((_, deadline)) = self.vrings[queue].stopping else { continue };
            let vring = &self.vrings[queue];
            let (quiet, drained) = (vring.flight.is_quiet(), vring.flight.is_drained());
            if !quiet && now < deadline && !self.stalled {
                continue;
            }
            self.publish(queue);
            let vring = &mut self.vrings[queue];
            let Some((reply, _)) = vring.stopping.take() else { continue };
            if !quiet {
                late = true;
                tracing::warn!(
                    device = &*self.name,
                    queue,
                    inflight = vring.flight.inflight() + vring.flight.orphans(),
                    "ring stopped with requests in flight: they do not end in {STOP_TIMEOUT:?}"
                );
            }
            if let Some(ring) = vring.ring.take() {
                vring.base = ring.base();
                if !drained {
                    vring.flight.park(ring.position());
                }
                vring.kept = Some((ring.position(), ring));
            }
            drop_kick(epoll, vring);
            vring.polled = false;
            vring.call = None;
            let _ = reply.try_send(Ok(Answer::Base(vring.base)));
        }
        self.stalled |= late;
        late
    }

    /// Back to the state before the first message (disconnect) or of a reset device.
    pub(crate) fn reset(&mut self, epoll: &OwnedFd) {
        for vring in &mut self.vrings {
            drop_kick(epoll, vring);
            vring.flight.orphan();
            let fresh = Vring::new(self.size_max);
            let flight = std::mem::replace(&mut vring.flight, Flight::new(0));
            *vring = Vring { flight, ..fresh };
        }
        (self.packed, self.event_idx, self.indirect, self.in_order) = (false, false, false, false);
        self.log = None;
    }

    /// The device is reset: nothing is in flight any more, whatever the log says.
    pub(crate) fn forget_log(&mut self) {
        if let Some(log) = &self.log {
            log.forget(if self.packed { LogFormat::Packed } else { LogFormat::Split });
        }
    }

    /// When [`finish_stops`](Self::finish_stops) has to be called again at the latest.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.vrings.iter().filter_map(|vring| vring.stopping.as_ref().map(|(_, deadline)| *deadline)).min()
    }

    /// Whether a running ring has no kick descriptor, so that the loop must not sleep.
    pub(crate) fn must_poll(&self) -> bool {
        self.vrings.iter().any(|vring| vring.polled && vring.runs())
    }

    /// Publishes what was completed and notifies the driver where it wants it: once per queue and batch.
    pub(crate) fn publish_all(&mut self) {
        for queue in 0..self.vrings.len() {
            self.publish(queue);
        }
    }

    fn publish(&mut self, queue: usize) {
        let vring = &mut self.vrings[queue];
        let unpublished = std::mem::take(&mut vring.unpublished);
        let Some(ring) = &mut vring.ring else { return };
        let burst = ring.burst().is_some_and(|ring| ring.is_unpublished());
        if !unpublished && !burst {
            return;
        }
        match ring.publish(&self.map) {
            Ok(true) => {
                if self.notify(queue) {
                    self.metrics.notifications.add(1);
                }
            }
            Ok(false) => {}
            Err(error) => self.break_queue(queue, &error),
        }
    }

    /// Arms kicks on all running rings; true if one of them has something already.
    pub(crate) fn arm(&mut self) -> bool {
        let mut more = false;
        for queue in 0..self.vrings.len() {
            let vring = &mut self.vrings[queue];
            if !vring.runs() || self.closing {
                continue;
            }
            match vring.ring.as_mut().map(|ring| ring.arm(&self.map)) {
                Some(Ok(pending)) => more |= pending || vring.flight.has_again(),
                Some(Err(error)) => self.break_queue(queue, &error),
                None => {}
            }
        }
        more
    }

    /// Disarms kicks on all running rings.
    pub(crate) fn disarm(&mut self) {
        for queue in 0..self.vrings.len() {
            let vring = &mut self.vrings[queue];
            if !vring.runs() {
                continue;
            }
            if let Some(Err(error)) = vring.ring.as_mut().map(|ring| ring.disarm(&self.map)) {
                self.break_queue(queue, &error);
            }
        }
    }

    /// Stops one queue whose driver broke a rule, and says so through its error descriptor.
    fn break_queue(&mut self, queue: usize, error: &RingError) {
        let vring = &mut self.vrings[queue];
        if let Some(ring) = vring.ring.take() {
            vring.base = ring.base();
        }
        vring.flight.orphan();
        vring.unpublished = false;
        self.metrics.broken_queues.add(1);
        tracing::warn!(device = &*self.name, queue, %error, "queue stopped: the driver broke a rule");
        if let Some(err) = &vring.err {
            let _ = rustix::io::write(err, &1u64.to_ne_bytes());
        }
    }
}

impl Rings for RingSet {
    fn take(&mut self, queue: u16, chain: &mut Chain) -> bool {
        let Some(vring) = self.vrings.get_mut(usize::from(queue)) else { return false };
        if !vring.runs() || self.closing {
            return false;
        }
        match vring.take(queue, &self.map, chain) {
            Ok(taken) => taken,
            Err(error) => {
                self.break_queue(usize::from(queue), &error);
                false
            }
        }
    }

    fn complete(&mut self, id: ChainId, len_bytes: u32) {
        let queue = usize::from(id.queue);
        let Some(vring) = self.vrings.get_mut(queue) else { return };
        self.stalled = false;
        if !vring.flight.ended(id) {
            self.metrics.stale_completions.add(1);
            return;
        }
        match vring.ring.as_mut().map(|ring| ring.put_used(&self.map, id.head, len_bytes)) {
            Some(Ok(())) => vring.unpublished = true,
            Some(Err(error)) => self.break_queue(queue, &error),
            None => self.metrics.stale_completions.add(1),
        }
    }

    fn available(&self, queue: u16) -> u16 {
        let running = self.vrings.get(usize::from(queue)).filter(|vring| vring.runs());
        running.and_then(|vring| vring.ring.as_ref()).map_or(0, |ring| ring.available(&self.map))
    }

    fn wanted(&self, id: ChainId) -> bool {
        self.vrings
            .get(usize::from(id.queue))
            .is_some_and(|vring| vring.flight.is_current(id) && vring.ring.is_some())
    }

    fn fail(&mut self, id: ChainId, error: RingError) {
        let queue = usize::from(id.queue);
        let Some(vring) = self.vrings.get_mut(queue) else { return };
        if vring.flight.ended(id) {
            self.break_queue(queue, &error);
        }
    }
}
