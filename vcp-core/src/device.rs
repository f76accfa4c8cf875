//! The seam between a device model and whatever runs it: the poll loop ([`crate::vu`]) or the epoll server
//! ([`crate::epoll`]).
//!
//! A [`RingDevice`] knows virtio semantics and an engine below it. It never sees a ring, a file descriptor of the front
//! end or a connection; those are the runner's.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::ask::Rest;
use crate::handover::Fds;
use crate::handover::state::{BadState, NotNow};
use crate::metrics::{DeviceMetrics, Samples};
use crate::queue::burst::Direction;
use crate::queue::{Chain, ChainId, RingError};
use crate::uring::Ring;

/// What has to happen before [`RingDevice::poll`] must be called again (besides a kick).
#[derive(Debug, Default)]
pub struct Wait<'a> {
    /// Readiness to wait for, to read at least; `None` while the engine has no socket.
    pub fd: Option<BorrowedFd<'a>>,
    /// Whether it also waits to write (it always waits to read).
    pub writable: bool,
    /// When it must be polled even if nothing happens.
    pub deadline: Option<Instant>,
}

impl<'a> Wait<'a> {
    /// The same again.
    pub(crate) fn again(&self) -> Wait<'a> {
        Wait { fd: self.fd, writable: self.writable, deadline: self.deadline }
    }
}

/// The virtqueues of one device, as the device model sees them.
pub trait Rings {
    /// Takes the next chain of queue `queue` into `chain`; false if there is none or the queue does not run. A broken
    /// ring is dealt with inside: the queue stops.
    fn take(&mut self, queue: u16, chain: &mut Chain) -> bool;

    /// How many chains of queue `queue` the driver has made available that were not taken, as far as that is cheap to
    /// know; 0 otherwise. Not checked: only for statistics.
    fn available(&self, _queue: u16) -> u16 {
        0
    }

    /// Gives a chain back with the number of bytes written to it. Exactly once for each chain taken; the runner knows
    /// which completions belong to a ring that no longer exists.
    fn complete(&mut self, id: ChainId, len_bytes: u32);

    /// Whether the driver still waits for this chain. If not (its ring stopped or is gone), guest memory must not be
    /// written for it any more; it is given back all the same.
    fn wanted(&self, id: ChainId) -> bool;

    /// The request in this chain breaks the rules of the device: its queue stops, the chain is not given back.
    fn fail(&mut self, id: ChainId, error: RingError);
}

/// A virtio device model that can be run by either server.
pub trait RingDevice: Send + 'static {
    /// Number of virtqueues, at most 256.
    fn queues(&self) -> u16;

    /// What `GET_QUEUE_NUM` is answered with. Front ends of network devices count pairs of queues.
    fn queue_num(&self) -> u16 {
        self.queues()
    }

    /// Largest virtqueue size, a power of two.
    fn queue_size_max(&self) -> u16;

    /// Whether queue `queue` is run in bursts ([`crate::queue::burst`]), and which way its chains go. Such a queue gives
    /// nothing by [`Rings::take`]; it is reached through [`RingSet::burst`](crate::vu::RingSet::burst). Only the poll
    /// loop runs queues in bursts.
    fn burst(&self, _queue: u16) -> Option<Direction> {
        None
    }

    /// Whether its requests stay in flight, so that front ends are offered a log of them.
    fn keeps_log(&self) -> bool {
        true
    }

    /// Feature bits offered, without the vhost-user one.
    fn features(&self) -> u64;

    /// The driver's choice of [`features`](Self::features); also 0 at reset.
    fn set_features(&mut self, acked: u64);

    /// Fills `out` with the configuration space from `offset`; bytes past its end read as 0.
    fn read_config(&self, offset: u32, out: &mut [u8]);

    /// The driver writes to the configuration space. Fields that cannot be written are left as they are.
    fn write_config(&mut self, offset: u32, data: &[u8]);

    /// Takes chains while there is room, moves the engine, completes what ended. Never blocks; returns whether
    /// anything moved.
    fn poll<R: Rings>(&mut self, rings: &mut R, now: Instant) -> bool;

    /// Whether it would take a chain now. While it would not, only what [`wait`](Self::wait) names can change that.
    fn has_room(&self) -> bool;

    /// What to wait for.
    fn wait(&self) -> Wait<'_>;

    /// What the runner knows of the descriptor in [`wait`](Self::wait): it is readable or may be (`ready`), or it is not
    /// and need not be looked at. A runner that never calls this knows nothing, and the device looks every time.
    fn readiness(&mut self, _ready: bool) {}

    /// Gives a runner's ring what is to be sent and received for the device, which from then on makes no such calls of its
    /// own, until [`leave_ring`](Self::leave_ring). Called before the runner waits, and while it looks. Returns whether it
    /// must not wait: there is more to do than could be given.
    fn submit_to(&mut self, _ring: &mut Ring) -> bool {
        false
    }

    /// Takes from the ring what ended there; [`poll`](Self::poll) follows.
    fn reap_from(&mut self, _ring: &mut Ring) {}

    /// Nothing of the device is under way in the ring any more, and it makes its own calls again.
    fn leave_ring(&mut self) {}

    /// Whether it moves long transfers: looking for what is next while several are in flight then only takes the
    /// pieces one by one.
    fn moves_long(&self) -> bool {
        false
    }

    /// A front end connected, or the one that was is gone.
    fn attached(&mut self, _attached: bool) {}

    /// Whether the configuration space changed by itself since the last call.
    fn take_config_change(&mut self) -> bool {
        false
    }

    /// The guest no longer waits for what is in flight (reset, or a stop that took too long): end it as soon as it is
    /// certain that it has no further effect on guest memory. Completions are still reported.
    fn abandon(&mut self) {}

    /// The process ends: ends what it holds outside (sessions) in order, within `limit` at most.
    fn close(&mut self, _limit: Duration) {}

    /// What people want to know of it, for the control socket. Called on the data thread, so it must not take long.
    fn status(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Its own metrics, besides [`metrics`](Self::metrics). Called on the data thread, so it must not take long.
    fn collect(&self, _samples: &mut Samples) {}

    /// A command of the control socket; `None` if it does not know it. Called on the data thread: what takes long is
    /// left to the thread that asked, as [`Rest`].
    fn command(
        &mut self,
        _name: &str,
        _args: &serde_json::Map<String, serde_json::Value>,
        _now: Instant,
    ) -> Option<Result<Rest, String>> {
        None
    }

    /// Its state for another process, if nothing is under way. Changes nothing: this process may go on all the same.
    ///
    /// # Errors
    /// Something is under way, or it cannot be handed over at all.
    fn export(&self, _fds: &mut Fds, _now: Instant) -> Result<serde_json::Value, NotNow> {
        Err(NotNow::Never("this device cannot be handed over".into()))
    }

    /// Goes on where the device of another process stopped. It is not used otherwise before or after an error; the
    /// other one may still be the owner, so nothing outside is touched.
    ///
    /// # Errors
    /// The state is not understood.
    fn import(&mut self, _state: serde_json::Value, _fds: &mut Fds, _now: Instant) -> Result<(), BadState> {
        Err(BadState::Text("this device cannot be taken over".into()))
    }

    /// Bytes of memory it can take at most, all of it taken at start.
    fn memory_bound_bytes(&self) -> u64;

    /// Its counters.
    fn metrics(&self) -> &Arc<DeviceMetrics>;
}
