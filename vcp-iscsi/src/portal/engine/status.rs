//! What people want to know of the engine.

use iscsi::initiator::Counters;
use serde_json::json;

use super::{IscsiEngine, Path, Phase};
use crate::portal::wire::WireStats;

/// What happened so far.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Stats {
    /// Requests that ended well.
    pub completed: u64,
    /// Requests that ended with an error.
    pub failed: u64,
    /// Repetitions of commands on the same session.
    pub retries: u64,
    /// Commands repeated on a new session or another path.
    pub repeated: u64,
    /// Sessions lost.
    pub sessions_lost: u64,
    /// Sessions gained after the first.
    pub sessions_regained: u64,
    /// Times that commands had to take another path because theirs died or was closed.
    pub failovers: u64,
    /// Times that better paths came back into use.
    pub failbacks: u64,
    /// Lost sessions that were ended by a login in their name through another portal.
    pub fences: u64,
    /// Resets of the unit because of writes in doubt.
    pub unit_resets: u64,
    /// Times that a path led to another unit.
    pub wrong_units: u64,
    /// BUSY and TASK SET FULL.
    pub busy: u64,
    /// Unit attentions.
    pub unit_attentions: u64,
    /// Task management functions sent.
    pub task_management: u64,
    /// What the target did against RFC 7143: description and count.
    pub violations: Vec<(String, u64)>,
    /// Traffic.
    pub wire: WireStats,
}

impl IscsiEngine {
    /// What happened so far.
    pub fn stats(&self) -> Stats {
        let mut stats = self.stats.clone();
        let mut counters = Counters::default();
        for path in &self.paths {
            counters.add(&path.counters);
            stats.wire.add(path.wire_stats);
            if let Some(wire) = &path.wire {
                counters.add(wire.session.counters());
                stats.wire.add(wire.stats);
            }
        }
        stats.violations = counters.seen().map(|(v, n)| (v.to_string(), n)).collect();
        stats
    }

    /// The state in words.
    fn state(&self) -> &'static str {
        // The path that is nearest to being used speaks for the unit.
        let rank = |path: &&Path| match path.phase {
            Phase::Up if path.class().is_some() => 0,
            Phase::Up => 1,
            Phase::Probing => 2,
            Phase::Dialing(_) => 3,
            Phase::Waiting { .. } => 4,
            Phase::Closed => 5,
        };
        match self.paths.iter().min_by_key(rank) {
            Some(path)
                if matches!(path.phase, Phase::Up) && path.class().is_none() && path.doubt.is_none() =>
            {
                "up, but no path gives access"
            }
            Some(path) => path.state(),
            None => "closed",
        }
    }

    pub(super) fn describe(&self) -> serde_json::Value {
        json!({
            "url": self.options.url.to_string(),
            "state": self.state(),
            "unit": self.found.identity().to_string(),
            "session": self.negotiated(),
            "paths": self.paths.iter().enumerate().map(|(index, path)| self.describe_path(index, path)).collect::<Vec<_>>(),
            "stats": self.stats(),
        })
    }

    fn describe_path(&self, index: usize, path: &Path) -> serde_json::Value {
        let round_trip = path.wire.as_ref().and_then(|wire| wire.session.round_trip());
        json!({
            "url": path.options.url.to_string(),
            "portal": path.negotiated.portal,
            "isid": path.negotiated.isid,
            "portal_group_tag": path.negotiated.portal_group_tag,
            "state": path.state(),
            "problem": path.problem,
            "in_use": self.active.contains(&index),
            "access": path.access.map(|access| access.state),
            "access_group": path.access.and_then(|access| access.group),
            "preferred": path.access.map(|access| access.preferred),
            "round_trip_us": round_trip.map(|rtt| rtt.as_micros() as u64),
            "in_flight": path.outstanding(),
            "window": path.window,
            "writes_in_doubt": path.doubt.as_ref().map_or(0, |doubt| doubt.held.len()),
            "stats": path.stats,
        })
    }
}

impl WireStats {
    pub(super) fn add(&mut self, more: Self) {
        self.sends += more.sends;
        self.receives += more.receives;
        self.sent_bytes += more.sent_bytes;
        self.received_bytes += more.received_bytes;
        self.copied_bytes += more.copied_bytes;
        self.direct_bytes += more.direct_bytes;
    }
}
