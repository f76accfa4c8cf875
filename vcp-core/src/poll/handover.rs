//! The data thread's part of a hand-over: stopping between two requests, and going on where another process stopped.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{DataLoop, timespec, wait_for};
use crate::device::RingDevice;
use crate::fabric::Fabric;
use crate::handover::state::{BadState, NotNow, PortState};
use crate::handover::{Fds, monotonic_ns};
use crate::mem::GuestMap;
use crate::vu::give::{StopOrder, Stopped, Verdict};
use crate::vu::port::Port;

/// Where another process stopped.
#[derive(Debug)]
pub(super) struct Resumed {
    stopped_ns: u64,
    completed_ns: u64,
    /// Completions when this loop began.
    completions: u64,
}

impl<D: RingDevice, F: Fabric<D>> DataLoop<D, F> {
    /// Stops as ordered; true if another process is the owner now. The mailbox is not looked into meanwhile: the
    /// connections stand still as well.
    pub(super) fn hand_over(&mut self, order: &StopOrder) -> rustix::io::Result<bool> {
        self.hold(true);
        let stopped = self.stop_and_export(order.limit)?;
        let given = stopped.is_ok();
        let asked = order.answer.send(stopped).is_ok();
        // The asker says something in the end, or is gone, which says the same as `Stay`.
        let gone = given && asked && order.verdict.recv() == Ok(Verdict::Gone);
        if gone {
            self.sides.iter_mut().for_each(|side| side.given());
        } else {
            self.hold(false);
        }
        Ok(gone)
    }

    fn hold(&mut self, hold: bool) {
        self.ports.iter_mut().for_each(|port| port.rings.hold(hold));
        self.sides.iter_mut().for_each(|side| side.hold(hold));
    }

    fn stop_and_export(&mut self, limit: Duration) -> rustix::io::Result<Result<Stopped, NotNow>> {
        let stopped_ns = monotonic_ns();
        let mut completed_ns = stopped_ns;
        let mut completions = self.completions();
        let deadline = Instant::now() + limit;
        self.leave_ring()?;
        loop {
            let now = Instant::now();
            self.readiness(true);
            let mut moved = self.move_ports(now);
            for side in &mut self.sides {
                moved |= side.pass(now);
            }
            self.metrics.passes.add(1);
            self.signal_by_ring()?;
            if std::mem::replace(&mut completions, self.completions()) != completions {
                completed_ns = monotonic_ns();
            }
            let mut fds = Fds::default();
            let ports: Result<Vec<PortState>, NotNow> =
                self.ports.iter().map(|port| port.export(&mut fds, now)).collect();
            let all = ports.and_then(|ports| {
                let sides = self.sides.iter().map(|side| side.export(&mut fds, now));
                let sides = sides.collect::<Result<Vec<_>, _>>()?;
                Ok((ports, sides, self.fabric.export(&mut fds, now)?))
            });
            match all {
                Ok((ports, sides, fabric)) => {
                    let metrics = serde_json::to_value(&*self.metrics).unwrap_or_default();
                    return Ok(Ok(Stopped { ports, sides, fabric, fds, stopped_ns, completed_ns, metrics }));
                }
                Err(why) if !why.passes() || now >= deadline => return Ok(Err(why)),
                Err(_) if moved => {}
                Err(_) => {
                    let timeout = timespec(Duration::from_millis(1).min(deadline - now));
                    let mut waits: Vec<_> = self.ports.iter().map(|port| port.device.wait()).collect();
                    self.sides.iter().for_each(|side| side.waits(&mut waits));
                    let mut fds: Vec<_> = waits.iter().filter_map(super::poll_fd).collect();
                    wait_for(&mut fds, Some(&timeout)).0?;
                }
            }
        }
    }

    pub(super) fn completions(&self) -> u64 {
        self.ports.iter().map(|port| port.rings.completions()).fold(0, u64::wrapping_add)
    }

    /// Brings the state of another process's device into `port`, which is to be [added](Self::add).
    pub(crate) fn import(
        &self,
        port: &mut Port<D>,
        state: PortState,
        map: Arc<GuestMap>,
        fds: &mut Fds,
        now: Instant,
    ) -> Result<(), BadState> {
        if self.ring.is_some() {
            port.rings.leave_to_runner();
        }
        port.import(&self.epoll, state, map, fds, now)
    }

    /// Brings the state of another process's fabric in.
    pub(crate) fn import_fabric(
        &mut self,
        state: serde_json::Value,
        fds: &mut Fds,
        now: Instant,
    ) -> Result<(), BadState> {
        self.fabric.import(state, fds, now)
    }

    /// Brings the states of another process's sides into those here.
    pub(crate) fn import_sides(
        &mut self,
        states: Vec<serde_json::Value>,
        fds: &mut Fds,
        now: Instant,
    ) -> Result<(), BadState> {
        let (theirs, ours) = (states.len(), self.sides.len());
        if theirs != ours {
            return Err(BadState::Text(format!("a state of {theirs} fronts for msgq clients, not {ours}")));
        }
        self.sides.iter_mut().zip(states).try_for_each(|(side, state)| side.import(state, fds, now))
    }

    /// Counters of the sides, in order.
    pub(crate) fn side_metrics(&self) -> Vec<Arc<crate::metrics::DeviceMetrics>> {
        self.sides.iter().map(|side| side.metrics()).collect()
    }

    /// This process is the owner of what its sides brought in.
    pub(crate) fn own_sides(&mut self) -> std::io::Result<()> {
        self.sides.iter_mut().try_for_each(|side| side.own())
    }

    /// Appends a device.
    pub(crate) fn add(&mut self, port: Port<D>) {
        self.ports.push(port);
    }

    /// This loop goes on where another process stopped.
    pub(crate) fn resume_from(&mut self, stopped_ns: u64, completed_ns: u64) {
        self.resumed = Some(Resumed { stopped_ns, completed_ns, completions: 0 });
    }

    /// The first look at a ring of a loop that goes on.
    pub(super) fn first_look(&mut self) {
        let completions = self.completions();
        let Some(resumed) = &mut self.resumed else { return };
        resumed.completions = completions;
        self.metrics.take_overs.add(1);
        self.metrics.take_over_stopped_ns.set(monotonic_ns().saturating_sub(resumed.stopped_ns));
        self.metrics.take_over_gap_ns.set(0);
    }

    /// Whether the first request was completed; says how long that took since the other process's last one.
    pub(super) fn look_for_completion(&mut self) {
        let completions = self.completions();
        if let Some(resumed) = self.resumed.take_if(|resumed| resumed.completions != completions) {
            self.metrics.take_over_gap_ns.set(monotonic_ns().saturating_sub(resumed.completed_ns));
        }
    }
}
