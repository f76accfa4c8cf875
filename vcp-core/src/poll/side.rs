//! [`Side`]: something else than a vhost-user device that the data thread drives, say a front for host programs.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFd;

use crate::ask::{Ask, Told};
use crate::metrics::DeviceMetrics;

/// Driven by the data thread between its devices, under the same rules: never blocks, bounded work in each pass.
pub trait Side: Send + Debug {
    /// Takes, moves, completes, notifies. Returns whether anything moved.
    fn pass(&mut self, now: Instant) -> bool;

    /// Asks to be notified, and looks once more; true if the thread must not sleep.
    fn arm(&mut self) -> bool;

    /// The thread is awake: no notifications are needed.
    fn disarm(&mut self);

    /// Appends what to wait for.
    fn fds<'a>(&'a self, fds: &mut Vec<PollFd<'a>>);

    /// When it must be called even if nothing happens.
    fn deadline(&self) -> Option<Instant>;

    /// What is known of its engine's descriptor; see [`RingDevice::readiness`](crate::device::RingDevice::readiness).
    fn readiness(&mut self, ready: bool);

    /// Whether long transfers are among what is in flight.
    fn moves_long(&self) -> bool;

    /// Requests under way.
    fn inflight(&self) -> u32;

    /// The process ends: no new requests are taken.
    fn stop(&mut self);

    /// The process ends: ends what it holds outside, within `limit` at most.
    fn close(&mut self, limit: Duration);

    /// Its counters.
    fn metrics(&self) -> Arc<DeviceMetrics>;

    /// A question of the control socket.
    fn tell(&mut self, ask: Ask, now: Instant) -> Told;
}
