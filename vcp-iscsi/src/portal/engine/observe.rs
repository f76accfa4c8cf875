//! What the engine tells of itself besides its status: repetitions by cause, the latency split, captures of anomalies;
//! and the commands of the control socket that are the engine's.
//!
//! Times are those of passes: a command was queued in the pass that first saw it, sent in the pass that handed it to the
//! wire, answered in the pass that ended it. No clock is read for it.

use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime};

use iscsi::initiator::{Outcome as TaskOutcome, Violation};
use iscsi::scsi::{SenseKey, Status};
use serde_json::json;
use vcp_core::ask::Rest;
use vcp_core::metrics::{Family, Latency, Samples, Unit, families};

use super::{IscsiEngine, Path, Phase};
use crate::engine::Op;
use crate::portal::Options;
use crate::recorder::pcapng::About;
use crate::recorder::store::Snapshot;
use crate::recorder::{Recorder, Store};

/// Kinds of requests, as they are told apart outside.
const OPS: [&str; 4] = ["read", "write", "flush", "other"];

/// Why a command was repeated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Cause {
    #[default]
    Status,
    TargetFailure,
    Violation,
    Timeout,
    Busy,
    TaskSetFull,
    UnitAttention,
    NotReady,
    AbortedCommand,
    DeferredError,
    Sense,
}

const CAUSES: [(Cause, &str); 11] = [
    (Cause::Status, "status"),
    (Cause::TargetFailure, "target_failure"),
    (Cause::Violation, "violation"),
    (Cause::Timeout, "timeout"),
    (Cause::Busy, "busy"),
    (Cause::TaskSetFull, "task_set_full"),
    (Cause::UnitAttention, "unit_attention"),
    (Cause::NotReady, "not_ready"),
    (Cause::AbortedCommand, "aborted_command"),
    (Cause::DeferredError, "deferred_error"),
    (Cause::Sense, "sense"),
];

impl From<&TaskOutcome> for Cause {
    fn from(outcome: &TaskOutcome) -> Self {
        let TaskOutcome::Status { status, sense, .. } = outcome else {
            return match outcome {
                TaskOutcome::Damaged(_) => Self::Violation,
                TaskOutcome::Aborted => Self::Timeout,
                _ => Self::TargetFailure,
            };
        };
        match (*status, sense) {
            // Said of a write whose data was not all fetched.
            (Status::GOOD, _) => Self::Violation,
            (Status::BUSY, _) => Self::Busy,
            (Status::TASK_SET_FULL, _) => Self::TaskSetFull,
            (Status::CHECK_CONDITION, Some(sense)) if sense.deferred => Self::DeferredError,
            (Status::CHECK_CONDITION, Some(sense)) => match sense.key {
                SenseKey::UnitAttention => Self::UnitAttention,
                SenseKey::NotReady => Self::NotReady,
                SenseKey::AbortedCommand => Self::AbortedCommand,
                _ => Self::Sense,
            },
            (Status::CHECK_CONDITION, None) => Self::Sense,
            _ => Self::Status,
        }
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Observer {
    /// The pass at hand.
    now: Instant,
    window: Box<[Latency; OPS.len()]>,
    target: Box<[Latency; OPS.len()]>,
    cause: Cause,
    retries: [u64; CAUSES.len()],
    store: Option<Store>,
    /// Violations that captures were thought of for.
    violations: u64,
}

impl Observer {
    pub(super) fn new(options: &Options, now: Instant) -> Self {
        let open = |store: &crate::recorder::StoreOptions| match Store::open(store.clone()) {
            Ok(store) => Some(store),
            Err(error) => {
                tracing::error!(dir = %store.dir.display(), %error, "cannot record: no captures of anomalies");
                None
            }
        };
        Self {
            now,
            window: Box::default(),
            target: Box::default(),
            cause: Cause::default(),
            retries: [0; CAUSES.len()],
            store: options.recorder.as_ref().and_then(open),
            violations: 0,
        }
    }

    /// A command ended so; what is counted as repeated from here on is for that reason.
    pub(super) fn outcome(&mut self, outcome: &TaskOutcome) {
        self.cause = outcome.into();
    }

    /// A command is repeated.
    pub(super) fn retried(&mut self) {
        if let Some(at) = CAUSES.iter().position(|(cause, _)| *cause == self.cause) {
            self.retries[at] += 1;
        }
    }
}

/// Index in [`OPS`].
fn kind(op: Op) -> usize {
    match op {
        Op::Read => 0,
        Op::Write { .. } => 1,
        Op::Flush => 2,
        Op::Discard | Op::WriteZeroes { .. } => 3,
    }
}

impl IscsiEngine {
    /// A pass begins: what was submitted since the last one is queued from now on.
    pub(super) fn observe_pass(&mut self, now: Instant) {
        self.observer.now = now;
        for &slot in self.waiting.iter().rev() {
            if !self.jobs.saw(slot, now) {
                break;
            }
        }
    }

    /// The request in this slot is given back.
    pub(super) fn observe_end(&mut self, slot: u16) {
        let times = self.jobs.times(slot);
        let (Some(queued), Some(sent)) = (times.queued, times.sent) else { return };
        let kind = kind(times.op);
        self.observer.window[kind].record(queued, sent);
        self.observer.target[kind].record(sent, self.observer.now);
    }

    /// Something went wrong on a path: its last PDUs are written, if the user wants that.
    pub(super) fn anomaly(&mut self, index: usize, word: &'static str, why: &str, now: Instant) {
        let path = &self.paths[index];
        if let (Some(store), Some(wire)) = (&mut self.observer.store, &path.wire) {
            store.anomaly(now, || snapshot(path, &wire.recorder, word, why, now));
        }
    }

    /// Looks for violations that did not end anything and so were not told otherwise.
    pub(super) fn observe_violations(&mut self, index: usize, now: Instant) {
        if self.observer.store.is_none() {
            return;
        }
        let total: u64 = self.paths.iter().map(Path::violations).sum();
        if total > self.observer.violations {
            self.observer.violations = total;
            self.anomaly(index, "violation", "the target broke a rule of RFC 7143", now);
        }
    }

    pub(super) fn run_command(
        &mut self,
        name: &str,
        args: &serde_json::Map<String, serde_json::Value>,
        now: Instant,
    ) -> Option<Result<Rest, String>> {
        if !["rescan", "dump"].contains(&name) {
            return None;
        }
        if let Some(unknown) = args.keys().next() {
            return Some(Err(format!("`{name}` takes no `{unknown}`")));
        }
        Some(if name == "rescan" { self.rescan() } else { self.dump(now) })
    }

    /// The unit is looked at again, on every path, with the next pass; without a session, as soon as there is one.
    fn rescan(&mut self) -> Result<Rest, String> {
        for path in &mut self.paths {
            path.rescan = true;
        }
        let sessions = self.paths.iter().filter(|path| path.wire.is_some()).count();
        let size_bytes = self.lun.blocks.saturating_mul(self.lun.block_bytes.into());
        Ok(Rest::done(json!({ "looking": sessions, "size_bytes_before": size_bytes })))
    }

    fn dump(&mut self, now: Instant) -> Result<Rest, String> {
        let Some(store) = &self.observer.store else {
            return Err("there is no --recorder-dir to write to".into());
        };
        let writes: Vec<_> = self
            .paths
            .iter()
            .filter_map(|path| Some((path, path.wire.as_ref()?)))
            .map(|(path, wire)| store.on_request(snapshot(path, &wire.recorder, "request", "asked for", now)))
            .collect();
        if writes.is_empty() {
            return Err("no session at the moment, so nothing is recorded".into());
        }
        Ok(Rest::new(move || {
            let mut files = Vec::new();
            for write in writes {
                let file = write().map_err(|error| format!("cannot write: {error}"))?;
                files.push(file.display().to_string());
            }
            Ok(json!({ "files": files }))
        }))
    }

    pub(super) fn collect_samples(&self, samples: &mut Samples) {
        for (at, op) in OPS.into_iter().enumerate() {
            let stage = |name| [("op", op), ("stage", name)];
            samples.add_latency(&families::STAGE, &stage("window"), &self.observer.window[at]);
            samples.add_latency(&families::STAGE, &stage("target"), &self.observer.target[at]);
        }
        for ((_, cause), count) in CAUSES.iter().zip(self.observer.retries) {
            samples.add(&RETRIES, &[("cause", cause)], count);
        }
        let stats = self.stats();
        for (family, count) in [
            (&REPEATED, stats.repeated),
            (&SESSIONS_LOST, stats.sessions_lost),
            (&RECONNECTS, stats.sessions_regained),
            (&FAILOVERS, stats.failovers),
            (&FAILBACKS, stats.failbacks),
            (&FENCES, stats.fences),
            (&UNIT_RESETS, stats.unit_resets),
            (&WRONG_UNITS, stats.wrong_units),
            (&BUSY, stats.busy),
            (&UNIT_ATTENTIONS, stats.unit_attentions),
            (&TASK_MANAGEMENT, stats.task_management),
        ] {
            samples.add(family, &[], count);
        }
        for violation in Violation::ALL {
            let count = self.paths.iter().map(|path| path.violation(*violation)).sum();
            samples.add(&VIOLATIONS, &[("violation", &snake(&format!("{violation:?}")))], count);
        }
        for (index, path) in self.paths.iter().enumerate() {
            samples.within("path", &index.to_string(), |samples| self.collect_path(index, path, samples));
        }
        if let Some(store) = &self.observer.store {
            let stats = store.stats();
            for (result, count) in
                [("written", &stats.written), ("left_out", &stats.left_out), ("failed", &stats.failed)]
            {
                samples.add(&CAPTURES, &[("result", result)], count.load(Ordering::Relaxed));
            }
        }
    }

    fn collect_path(&self, index: usize, path: &Path, samples: &mut Samples) {
        let (mut wire_stats, mut flow) = (path.wire_stats, path.flow);
        if let Some(wire) = &path.wire {
            wire_stats.add(wire.stats);
            flow.add(wire.session.flow());
        }
        let is_up = matches!(path.phase, Phase::Up | Phase::Probing);
        for (family, number) in [
            (&PATH_UP, is_up.into()),
            (&PATH_IN_USE, self.active.contains(&index).into()),
            (&PATH_OUTSTANDING, path.outstanding() as u64),
            (&PATH_WINDOW, path.window as u64),
            (&PATH_COMMANDS, path.stats.commands),
            (&PATH_LOST, path.stats.sessions_lost),
            (&SENDS, wire_stats.sends),
            (&RECEIVES, wire_stats.receives),
            (&SENT, wire_stats.sent_bytes),
            (&RECEIVED, wire_stats.received_bytes),
            (&COPIED, wire_stats.copied_bytes),
            (&DIRECT, wire_stats.direct_bytes),
            (&WINDOW_STALLS, flow.window_stalls),
            (&WINDOW_STALL_TIME, flow.window_stall_ns),
            (&R2TS, flow.r2ts),
            (&R2T_WAIT, flow.r2t_wait_ns),
        ] {
            samples.add(family, &[], number);
        }
        if let Some(round_trip) = path.wire.as_ref().and_then(|wire| wire.session.round_trip()) {
            samples.add(&ROUND_TRIP, &[], u64::try_from(round_trip.as_nanos()).unwrap_or(u64::MAX));
        }
    }
}

impl Path {
    fn violation(&self, violation: Violation) -> u64 {
        let now = self.wire.as_ref().map_or(0, |wire| wire.session.counters().get(violation));
        self.counters.get(violation) + now
    }

    fn violations(&self) -> u64 {
        let now = self.wire.as_ref().map_or(0, |wire| wire.session.counters().total());
        self.counters.total() + now
    }
}

/// A copy of a recorder, with what it is of.
fn snapshot(path: &Path, recorder: &Recorder, word: &'static str, why: &str, now: Instant) -> Snapshot {
    let url = &path.options.url;
    let comment = format!(
        "the last PDUs of the session with {} at {} (isid {}, tsih {}); {} were exchanged in all; written because: {why}. \
         Addresses and ports are made up, data is cut, digests are left out",
        url.target.as_deref().unwrap_or_default(),
        path.negotiated.portal,
        path.negotiated.isid,
        path.negotiated.tsih,
        recorder.total(),
    );
    let at_the_end = (word != "request").then(|| why.to_owned());
    let about = About { comment, at_the_end, clock: (now, SystemTime::now()) };
    Snapshot { entries: recorder.snapshot(), about, word }
}

/// `DataSnGap` as `data_sn_gap`, `R2tTooMany` as `r2t_too_many`.
fn snake(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 4);
    for (at, c) in name.char_indices() {
        if c.is_ascii_uppercase() && at > 0 {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

/// A counter without a unit.
const fn count(name: &'static str, help: &'static str) -> Family {
    Family::counter(name, Unit::None, help)
}

static RETRIES: Family = count("vcp_iscsi_retries", "Commands repeated on the same session, by cause");
static REPEATED: Family = count(
    "vcp_iscsi_repeated",
    "Commands repeated on a new session or another path after a session was lost",
);
static SESSIONS_LOST: Family = count("vcp_iscsi_sessions_lost", "Sessions lost, on all paths");
static RECONNECTS: Family = count("vcp_iscsi_reconnects", "Sessions gained after the first, on all paths");
static FAILOVERS: Family = count("vcp_iscsi_failovers", "Times that commands had to take another path");
static FAILBACKS: Family = count("vcp_iscsi_failbacks", "Times that better paths came back into use");
static FENCES: Family = count(
    "vcp_iscsi_fences",
    "Lost sessions that were ended by a login in their name through another portal",
);
static UNIT_RESETS: Family = count("vcp_iscsi_unit_resets", "Resets of the unit because of writes in doubt");
static WRONG_UNITS: Family = count("vcp_iscsi_wrong_units", "Times that a path led to another unit");
static BUSY: Family = count("vcp_iscsi_busy", "Answers BUSY and TASK SET FULL");
static UNIT_ATTENTIONS: Family = count("vcp_iscsi_unit_attentions", "Unit attentions");
static TASK_MANAGEMENT: Family = count("vcp_iscsi_task_management", "Task management functions sent");
static VIOLATIONS: Family =
    count("vcp_iscsi_violations", "What the target did against RFC 7143, by kind of violation");
static CAPTURES: Family = count("vcp_iscsi_captures", "Captures of the last PDUs, by what became of them");
static PATH_UP: Family = Family::gauge("vcp_iscsi_path_up", Unit::None, "1 while the path has a session");
static PATH_IN_USE: Family =
    Family::gauge("vcp_iscsi_path_in_use", Unit::None, "1 while commands take the path");
static PATH_OUTSTANDING: Family =
    Family::gauge("vcp_iscsi_path_commands_in_flight", Unit::None, "Commands given to the session");
static PATH_WINDOW: Family = Family::gauge(
    "vcp_iscsi_path_queue_depth",
    Unit::None,
    "Commands that the session gets at once, as TASK SET FULL taught",
);
static PATH_COMMANDS: Family = count("vcp_iscsi_path_commands", "Commands sent");
static PATH_LOST: Family = count("vcp_iscsi_path_sessions_lost", "Sessions lost");
static SENDS: Family = count("vcp_iscsi_sends", "Calls of sendmsg");
static RECEIVES: Family = count("vcp_iscsi_receives", "Calls of recvmsg");
static SENT: Family = Family::counter("vcp_iscsi_sent", Unit::Bytes, "Bytes sent, with headers");
static RECEIVED: Family = Family::counter("vcp_iscsi_received", Unit::Bytes, "Bytes received, with headers");
static COPIED: Family =
    Family::counter("vcp_iscsi_copied", Unit::Bytes, "Payload copied from the receive buffer to the guest");
static DIRECT: Family = Family::counter(
    "vcp_iscsi_direct",
    Unit::Bytes,
    "Payload received into the guest's memory without a copy",
);
static WINDOW_STALLS: Family = count(
    "vcp_iscsi_window_stalls",
    "Times that commands were ready but the target's command window was closed",
);
static WINDOW_STALL_TIME: Family =
    Family::counter("vcp_iscsi_window_stall_time", Unit::Seconds, "Time in such stalls");
static R2TS: Family = count("vcp_iscsi_r2ts", "R2Ts received");
static R2T_WAIT: Family =
    Family::counter("vcp_iscsi_r2t_wait", Unit::Seconds, "Time in which writes waited for an R2T, summed up");
static ROUND_TRIP: Family =
    Family::gauge("vcp_iscsi_round_trip", Unit::Seconds, "Round trip of pings, smoothed");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_labels() {
        for (name, label) in [("DataSnGap", "data_sn_gap"), ("R2tLun", "r2t_lun"), ("Rejected", "rejected")] {
            assert_eq!(snake(name), label);
        }
        let labels: Vec<_> = Violation::ALL.iter().map(|v| snake(&format!("{v:?}"))).collect();
        for (at, label) in labels.iter().enumerate() {
            assert!(!labels[..at].contains(label), "{label} twice");
        }
    }

    #[test]
    fn causes_are_told_apart() {
        let status = |status| TaskOutcome::Status { status, sense: None, transferred_bytes: 0 };
        for (outcome, cause) in [
            (TaskOutcome::Aborted, Cause::Timeout),
            (TaskOutcome::Damaged(Violation::DataDigest), Cause::Violation),
            (TaskOutcome::TargetFailure { response: 1 }, Cause::TargetFailure),
            (status(Status::BUSY), Cause::Busy),
            (status(Status::TASK_SET_FULL), Cause::TaskSetFull),
            (status(Status::CHECK_CONDITION), Cause::Sense),
            (status(Status::RESERVATION_CONFLICT), Cause::Status),
        ] {
            assert_eq!(Cause::from(&outcome), cause);
        }
        assert!(CAUSES.iter().enumerate().all(|(at, (cause, _))| *cause as usize == at));
    }
}
