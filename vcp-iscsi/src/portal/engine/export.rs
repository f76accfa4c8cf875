//! The engine between two processes: what is known of the unit, and the sessions that stand.
//!
//! Only an engine without a request is handed over, and none of whose paths is being looked at or in doubt: what an
//! earlier session may still write is not a matter for two processes. Paths without a session are not carried; they are
//! dialled by the new process as they would have been by the old one.

use std::time::{Duration, Instant};

use iscsi::initiator::Counters;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vcp_core::handover::Fds;
use vcp_core::handover::state::{BadState, NotNow};

use super::path::{Path, PathStats, Phase};
use super::{IscsiEngine, MAX_PATHS, Stats};
use crate::engine::Lun;
use crate::portal::client::Negotiated;
use crate::portal::probe::{Access, Found, Identity};
use crate::portal::wire::{Wire, WireState, WireStats};
use crate::recorder::Recorder;
use iscsi::scsi::vpd::Designators;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    found: Found,
    lun_address: [u8; 8],
    lun: Lun,
    changed: bool,
    stats: Stats,
    paths: Vec<PathState>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PathState {
    /// Where it leads, to tell it from others.
    url: String,
    lun: [u8; 8],
    up: Option<Up>,
    identity: Option<Identity>,
    names: Designators,
    access: Option<Access>,
    stats: PathStats,
    /// Of sessions that ended.
    wire_stats: WireStats,
    violations: Vec<(String, u64)>,
}

/// A session that stands.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Up {
    wire: WireState,
    negotiated: Negotiated,
    window: usize,
    user_timeout: Option<Duration>,
}

impl IscsiEngine {
    pub(super) fn make_state(&self, fds: &mut Fds) -> Result<Value, NotNow> {
        let busy = |why: &str| Err(NotNow::Busy(why.to_owned()));
        let under_way = usize::from(self.depth()) - self.free.len();
        match () {
            () if self.closing => return busy("the sessions are being closed"),
            () if under_way != 0 => return busy(&format!("{under_way} requests are with the target")),
            () if !self.pinned.is_empty() || !self.ready.is_empty() => return busy("requests are ending"),
            () if self.in_doubt || self.barrier || self.reset.is_some() => {
                return busy("it is not certain yet that the writes of a lost session are dead");
            }
            () => {}
        }
        let paths = self.paths.iter().map(|path| path.make_state(fds)).collect::<Result<_, _>>()?;
        let state = State {
            found: self.found.clone(),
            lun_address: self.lun_address.0,
            lun: self.lun.clone(),
            changed: self.changed,
            stats: self.stats.clone(),
            paths,
        };
        serde_json::to_value(state)
            .map_err(|error| NotNow::Never(format!("the state cannot be written: {error}")))
    }

    pub(super) fn take_state(&mut self, state: Value, fds: &mut Fds, now: Instant) -> Result<(), BadState> {
        let state: State = serde_json::from_value(state)
            .map_err(|source| BadState::Json { what: "the iSCSI engine", source })?;
        if state.paths.len() != self.paths.len() {
            let (theirs, ours) = (state.paths.len(), self.paths.len());
            return Err(BadState::Text(format!("{theirs} paths for a unit with {ours}")));
        }
        let slots = self.depth() + MAX_PATHS as u16;
        for (path, state) in self.paths.iter_mut().zip(state.paths) {
            path.take_state(state, slots, fds, now)?;
        }
        self.found = state.found;
        self.lun_address.0 = state.lun_address;
        self.lun = state.lun;
        self.changed = state.changed;
        self.stats = state.stats;
        self.away_since = Some(now);
        self.doubts_changed();
        self.rank(now);
        self.update_waits();
        Ok(())
    }
}

impl Path {
    fn make_state(&self, fds: &mut Fds) -> Result<PathState, NotNow> {
        let busy = |why: &str| Err(NotNow::Busy(format!("{}: {why}", self.options.url)));
        if self.look.is_some() || self.rescan {
            return busy("the unit is being looked at");
        }
        let up = match (&self.phase, &self.wire) {
            (Phase::Up, Some(wire)) => Some(Up {
                wire: wire.export(fds)?,
                negotiated: self.negotiated.clone(),
                window: self.window,
                user_timeout: self.user_timeout,
            }),
            (Phase::Waiting { .. } | Phase::Dialing(_), None) => None,
            _ => return busy("its session is beginning or ending"),
        };
        Ok(PathState {
            url: self.options.url.to_string(),
            lun: self.lun.0,
            up,
            identity: self.identity.clone(),
            names: self.names.clone(),
            access: self.access,
            stats: self.stats.clone(),
            wire_stats: self.wire_stats,
            violations: self.counters.seen().map(|(what, n)| (what.to_string(), n)).collect(),
        })
    }

    fn take_state(
        &mut self,
        state: PathState,
        slots: u16,
        fds: &mut Fds,
        now: Instant,
    ) -> Result<(), BadState> {
        let ours = self.options.url.to_string();
        if state.url != ours {
            return Err(BadState::Text(format!("a path to {} where {ours} belongs", state.url)));
        }
        self.lun.0 = state.lun;
        (self.identity, self.names, self.access) = (state.identity, state.names, state.access);
        self.stats = state.stats;
        self.wire_stats = state.wire_stats;
        self.counters = Counters::of_text(&state.violations);
        // The other process was in no doubt, or it would not have given the state.
        self.doubt = None;
        match state.up {
            None => self.phase = Phase::Waiting { until: now },
            Some(up) => {
                let mut wire = Wire::import(up.wire, slots, fds, now)?;
                wire.recorder = Recorder::of(self.options.recorder.as_ref());
                self.wire = Some(wire);
                self.negotiated = up.negotiated;
                self.window = up.window.clamp(1, usize::from(self.options.queue_depth));
                self.user_timeout = up.user_timeout;
                self.up_since = now;
                self.check_at = self.access.map(|_| now);
                self.phase = Phase::Up;
            }
        }
        Ok(())
    }
}
