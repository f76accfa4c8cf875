//! The seam between the devices of a data thread: who lets them move, and what joins them.
//!
//! Disks have nothing to do with each other: [`Apart`] lets each move by itself. The ports of a switch do: a fabric sees
//! all of them and their rings at once, so that a frame goes from ring to ring without a stop in between.

use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use crate::ask::Rest;
use crate::device::{RingDevice, Wait};
use crate::handover::Fds;
use crate::handover::state::{BadState, NotNow};
use crate::metrics::Samples;
use crate::vu::port::Port;

/// See the module. Everything is called on the data thread.
pub trait Fabric<D: RingDevice>: Send + 'static {
    /// Lets the devices move. Never blocks; returns whether anything moved. A port whose rings were given something is
    /// [touched](Port::touch), so that it is published.
    fn poll(&mut self, ports: &mut [Port<D>], now: Instant) -> bool;

    /// What to wait for besides what the devices wait for.
    fn waits<'a>(&'a self, _add: &mut dyn FnMut(Wait<'a>)) {}

    /// What people want to know of it, for the control socket.
    fn status(&self, _ports: &[Port<D>]) -> Value {
        Value::Null
    }

    /// Its metrics, besides those of the devices.
    fn collect(&self, _samples: &mut Samples) {}

    /// A command of the control socket that names no device; `None` if it does not know it. What takes long is left to
    /// the thread that asked, as [`Rest`].
    fn command(
        &mut self,
        _ports: &mut [Port<D>],
        _name: &str,
        _args: &Map<String, Value>,
        _now: Instant,
    ) -> Option<Result<Rest, String>> {
        None
    }

    /// Its state for another process, if nothing is under way. Changes nothing: this process may go on all the same.
    ///
    /// # Errors
    /// Something is under way, or it cannot be handed over at all.
    fn export(&self, _fds: &mut Fds, _now: Instant) -> Result<Value, NotNow> {
        Ok(Value::Null)
    }

    /// Goes on where the fabric of another process stopped. Nothing outside is touched: the other one may still be the
    /// owner.
    ///
    /// # Errors
    /// The state is not understood.
    fn import(&mut self, state: Value, _fds: &mut Fds, _now: Instant) -> Result<(), BadState> {
        match state {
            Value::Null => Ok(()),
            _ => Err(BadState::Text("state of a fabric where there is none".into())),
        }
    }

    /// The process ends: ends what it holds outside in order, within `limit` at most.
    fn close(&mut self, _limit: Duration) {}
}

/// Devices that have nothing to do with each other.
#[derive(Clone, Copy, Debug, Default)]
pub struct Apart;

impl<D: RingDevice> Fabric<D> for Apart {
    fn poll(&mut self, ports: &mut [Port<D>], now: Instant) -> bool {
        ports.iter_mut().fold(false, |moved, port| port.poll(now) | moved)
    }
}
