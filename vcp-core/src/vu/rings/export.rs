//! The rings of a device between two processes. A ring is brought in as the front end's own messages would set it up,
//! with the same checks.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::RingSet;
use crate::handover::Fds;
use crate::handover::state::{BadState, NotNow, VringState};
use crate::metrics::DeviceMetrics;
use crate::queue::log::LogArea;
use crate::queue::{Ring, VirtQueue};
use crate::vu::vring::{Vring, eventfd};

impl RingSet {
    /// Takes no more chains while `held`.
    pub(crate) fn hold(&mut self, held: bool) {
        self.closing = held;
    }

    /// Whether nothing is in flight, nor about to be.
    pub(crate) fn is_quiet(&self) -> Result<(), NotNow> {
        for (queue, vring) in self.vrings.iter().enumerate() {
            let busy = |why: &str| Err(NotNow::Busy(format!("{}, queue {queue}: {why}", self.name)));
            if vring.stopping.is_some() {
                return busy("it is being stopped");
            }
            if vring.flight.is_parked() {
                return busy("it was stopped with requests in flight, and the guest has not gone on yet");
            }
            let inflight = vring.flight.inflight() + vring.flight.orphans();
            if inflight != 0 {
                return busy(&format!("{inflight} requests are in flight"));
            }
            if !vring.flight.is_drained() || vring.unpublished {
                return busy("requests are due");
            }
        }
        Ok(())
    }

    /// Moves with every completion.
    pub(crate) fn completions(&self) -> u64 {
        self.vrings.iter().map(|vring| vring.flight.ended_count()).fold(0, u64::wrapping_add)
    }

    /// Counts in `metrics` from now on.
    pub(crate) fn set_metrics(&mut self, metrics: Arc<DeviceMetrics>) {
        self.metrics = metrics;
    }

    /// The in-flight log.
    pub(crate) fn log(&self) -> Option<&Arc<LogArea>> {
        self.log.as_ref()
    }

    /// The rings, if nothing is in flight.
    pub(crate) fn export(&self, fds: &mut Fds) -> Result<Vec<VringState>, NotNow> {
        self.is_quiet()?;
        self.vrings.iter().map(|vring| export(vring, fds)).collect()
    }

    /// Brings the rings in. Features and memory come first, as from a front end.
    pub(crate) fn import(
        &mut self,
        epoll: &OwnedFd,
        states: Vec<VringState>,
        fds: &mut Fds,
    ) -> Result<(), BadState> {
        if states.len() != self.vrings.len() {
            let (theirs, ours) = (states.len(), self.vrings.len());
            return Err(BadState::Text(format!("{theirs} queues for a device with {ours}")));
        }
        for (queue, state) in (0..).zip(states) {
            let mut event = |index| -> Result<Option<File>, BadState> {
                let fd = fds.take_if(index)?.map(File::from);
                Ok(fd.map(|fd| eventfd(fd, queue)).transpose()?)
            };
            let (kick, call, err) = (event(state.kick)?, event(state.call)?, event(state.err)?);
            self.set_size(queue, state.size)?;
            if let Some((desc, avail, used)) = state.addresses {
                self.set_addresses(queue, desc, avail, used)?;
            }
            self.set_base(queue, state.base)?;
            self.set_call(queue, call)?;
            self.set_err(queue, err)?;
            if state.running {
                if kick.is_some() == state.polled || state.addresses.is_none() {
                    return Err(BadState::Text(format!("queue {queue} runs without what it needs")));
                }
                self.set_kick(epoll, queue, kick)?;
            }
            self.set_enabled(queue, state.enabled)?;
        }
        Ok(())
    }
}

fn export(vring: &Vring, fds: &mut Fds) -> Result<VringState, NotNow> {
    let setup = vring.ring.as_ref().map_or(vring.setup, Ring::addresses);
    Ok(VringState {
        size: setup.size.into(),
        addresses: vring.addresses_set.then_some((setup.desc, setup.avail, setup.used)),
        base: vring.ring.as_ref().map_or(vring.base, VirtQueue::base),
        running: vring.ring.is_some(),
        enabled: vring.enabled,
        kick: fds.put_copy_of(vring.kick.as_ref())?,
        polled: vring.polled,
        call: fds.put_copy_of(vring.call.as_ref())?,
        err: fds.put_copy_of(vring.err.as_ref())?,
    })
}
