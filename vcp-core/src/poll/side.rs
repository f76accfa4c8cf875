//! [`Side`]: something else than a vhost-user device that the data thread drives, say a front for host programs.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::ask::{Ask, Told};
use crate::device::Wait;
use crate::handover::Fds;
use crate::handover::state::{BadState, NotNow};
use crate::metrics::DeviceMetrics;
use crate::uring::Ring;

/// Driven by the data thread between its devices, under the same rules: never blocks, bounded work in each pass.
pub trait Side: Send + Debug {
    /// Takes, moves, completes, notifies. Returns whether anything moved.
    fn pass(&mut self, now: Instant) -> bool;

    /// Asks to be notified, and looks once more; true if the thread must not sleep.
    fn arm(&mut self) -> bool;

    /// The thread is awake: no notifications are needed.
    fn disarm(&mut self);

    /// Appends what to wait for. While it is [held](Self::hold), only what its engine waits for.
    fn waits<'a>(&'a self, waits: &mut Vec<Wait<'a>>);

    /// When it must be called even if nothing happens.
    fn deadline(&self) -> Option<Instant>;

    /// As [`RingDevice::submit_to`](crate::device::RingDevice::submit_to).
    fn submit_to(&mut self, ring: &mut Ring) -> bool;

    /// As [`RingDevice::reap_from`](crate::device::RingDevice::reap_from).
    fn reap_from(&mut self, ring: &mut Ring);

    /// As [`RingDevice::leave_ring`](crate::device::RingDevice::leave_ring).
    fn leave_ring(&mut self);

    /// What is known of its engine's descriptor; see [`RingDevice::readiness`](crate::device::RingDevice::readiness).
    fn readiness(&mut self, ready: bool);

    /// Whether long transfers are among what is in flight.
    fn moves_long(&self) -> bool;

    /// Requests under way.
    fn inflight(&self) -> u32;

    /// No new requests are taken (a hand-over, or the process ends), or they are again.
    fn hold(&mut self, hold: bool);

    /// Its state for another process, if it is held and nothing is under way. Changes nothing.
    ///
    /// # Errors
    /// Something is under way, or it cannot be handed over at all.
    fn export(&self, fds: &mut Fds, now: Instant) -> Result<Value, NotNow>;

    /// Goes on where that of another process stopped, which may still be the owner: nothing outside is touched before
    /// [`own`](Self::own).
    ///
    /// # Errors
    /// The state is not understood.
    fn import(&mut self, state: Value, fds: &mut Fds, now: Instant) -> Result<(), BadState>;

    /// This process is the owner now.
    ///
    /// # Errors
    /// It cannot serve.
    fn own(&mut self) -> std::io::Result<()>;

    /// Another process is the owner now: clients are left to it, and nothing outside is touched any more.
    fn given(&mut self);

    /// The process ends: ends what it holds outside, within `limit` at most.
    fn close(&mut self, limit: Duration);

    /// Its counters.
    fn metrics(&self) -> Arc<DeviceMetrics>;

    /// A question of the control socket.
    fn tell(&mut self, ask: Ask, now: Instant) -> Told;
}
