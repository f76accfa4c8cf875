//! A device between two processes.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vcp_core::handover::Fds;
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::metrics::DeviceMetrics;

use super::BlkDevice;
use crate::engine::{Engine, Lun};
use crate::limit::{Limiter, LimiterState};

/// A device with no request under way. What the driver acknowledged comes with the rings.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    lun: Lun,
    queues: u16,
    offered: u64,
    writeback: bool,
    config_changed: bool,
    shrunk: u64,
    changes: u64,
    limiter: LimiterState,
    metrics: Value,
    engine: Value,
}

impl<E: Engine> BlkDevice<E> {
    pub(super) fn make_state(&self, fds: &mut Fds, now: Instant) -> Result<Value, NotNow> {
        let under_way = self.slots.len() - self.free.len();
        if under_way != 0 || !self.unsubmitted.is_empty() {
            return Err(NotNow::Busy(format!("{under_way} requests are under way")));
        }
        let text = |error: serde_json::Error| NotNow::Never(format!("the state cannot be written: {error}"));
        let state = State {
            lun: self.lun.clone(),
            queues: self.queues,
            offered: self.offered,
            writeback: self.writeback,
            config_changed: self.config_changed,
            shrunk: self.shrunk,
            changes: self.changes,
            limiter: self.limiter.export(now),
            metrics: serde_json::to_value(&*self.metrics).map_err(text)?,
            engine: self.engine.export(fds, now)?,
        };
        serde_json::to_value(state).map_err(text)
    }

    pub(super) fn take_state(&mut self, state: Value, fds: &mut Fds, now: Instant) -> Result<(), BadState> {
        let json = |what| move |source| BadState::Json { what, source };
        let state: State = serde_json::from_value(state).map_err(json("the device"))?;
        if state.queues != self.queues {
            let (theirs, ours) = (state.queues, self.queues);
            return Err(BadState::Text(format!("{theirs} queues for a device with {ours}")));
        }
        let metrics: DeviceMetrics = serde_json::from_value(state.metrics).map_err(json("the counters"))?;
        self.engine.import(state.engine, fds, now)?;
        // What the driver was told, whatever the engine knows by now: it hears of the difference as of any change.
        self.lun = state.lun;
        self.offered = state.offered;
        self.writeback = state.writeback;
        self.config_changed = state.config_changed;
        (self.shrunk, self.changes) = (state.shrunk, state.changes);
        self.limiter = Limiter::import(state.limiter, now).map_err(BadState::Text)?;
        self.metrics = metrics.into();
        Ok(())
    }
}
