//! [`IscsiEngine`]: a logical unit of an iSCSI target as an [`Engine`].
//!
//! What it promises: a request is answered once and with the truth. Whatever goes wrong on the way - a lost
//! connection, a unit attention, a busy target, a command that takes too long, an answer that does not account for every
//! byte - is dealt with here by repetition, as often as [`MAX_FAILURES`] and the time limits allow; the device model
//! only hears of what repetition will not cure. After a lost connection nothing is repeated before a new login *with the
//! same ISID* has succeeded: the target then has ended the old session and with it every command of it (RFC 7143
//! 6.3.5), so that none can act later and overwrite newer data. Where that does not hold, because another portal group
//! answers now, the unit is reset first.

mod close;
mod outcomes;
mod recovery;

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iscsi::initiator::{Command, Counters, Event};
use iscsi::scsi;
use vcp_core::mem::GuestBuf;

use super::client::{Client, Negotiated};
use super::job::{Job, Jobs, Payload};
use super::link::Dial;
use super::login::Purpose;
use super::probe::{Found, PROBE_BUFFER_BYTES, Probe};
use super::wire::{RX_STAGING_BYTES, Wire, WireError, WireStats};
use super::{Options, PortalError};
use crate::engine::{Completion, Engine, Lun, Op, Outcome, Request, Wait};

/// Failures of one request that lead to repetition; the next one is told.
pub const MAX_FAILURES: u32 = 4;
/// First pause before a repetition, doubled each time.
const RETRY_MIN: Duration = Duration::from_millis(5);
/// Longest such pause.
const RETRY_MAX: Duration = Duration::from_secs(1);
/// A session that lived so long was a good one: the back-off starts over.
const SETTLED: Duration = Duration::from_secs(10);
/// At most one line of the same kind in the log in this time.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// What happened so far.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Stats {
    /// Requests that ended well.
    pub completed: u64,
    /// Requests that ended with an error.
    pub failed: u64,
    /// Repetitions of commands on the same session.
    pub retries: u64,
    /// Commands repeated on a new session.
    pub repeated: u64,
    /// Sessions lost.
    pub sessions_lost: u64,
    /// Sessions gained after the first.
    pub sessions_regained: u64,
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

#[derive(Debug)]
enum Phase {
    /// The session is up.
    Up,
    /// The session is up, but the unit is being looked at again before commands go out.
    Probing { probe: Box<Probe>, later: Option<Instant> },
    /// No session; the next attempt comes then.
    Waiting { until: Instant },
    /// An attempt is underway.
    Dialing(Box<Dial>),
    /// Logged out; nothing comes any more.
    Closed,
}

/// What a login with the same ISID must come to so that it ends the earlier session (RFC 7143 6.3.5): the portal group,
/// or of a target that does not name it, the portal.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Group(u16),
    Portal(String),
}

impl From<&Negotiated> for Place {
    fn from(session: &Negotiated) -> Self {
        session.portal_group_tag.map_or_else(|| Self::Portal(session.portal.clone()), Self::Group)
    }
}

/// See the [module](self).
#[derive(Debug)]
pub struct IscsiEngine {
    options: Arc<Options>,
    lun_address: scsi::Lun,
    found: Found,
    lun: Lun,
    negotiated: Negotiated,
    wire: Option<Wire>,
    phase: Phase,
    jobs: Jobs,
    free: Vec<u16>,
    /// Slot of the commands that are the engine's own.
    own_slot: u16,
    waiting: VecDeque<u16>,
    backoff: Vec<(Instant, u16)>,
    /// Slots that ended but whose data the wire still has to send.
    pinned: Vec<u16>,
    ready: Vec<Completion>,
    scratch: Vec<u16>,
    /// Commands at once, as the target's TASK SET FULL taught; grows again with successes.
    window: usize,
    window_credit: usize,
    rescan: bool,
    changed: bool,
    /// [`Engine::close`] was called.
    closing: bool,
    /// [`Engine::abandon`] was called: nobody waits for what is underway, so nothing of it is repeated.
    abandoned: bool,
    /// Where the last session was lost with commands underway, until it is certain that they are dead.
    in_doubt: Option<Place>,
    /// Since when no session was fit for commands.
    away_since: Option<Instant>,
    attempts: u32,
    up_since: Instant,
    jitter: u64,
    log: LogLimit,
    stats: Stats,
    counters: Counters,
}

impl IscsiEngine {
    /// Opens the unit that the options name; blocks for the connect and login time limits at most. For the time before
    /// `ready`.
    ///
    /// # Errors
    /// It cannot be reached, refuses us, or is not a disk.
    pub fn open(options: Options) -> Result<Self, PortalError> {
        options.url.require_target()?;
        let lun_address = options.url.require_lun()?;
        let mut client = Client::connect(options, Purpose::Normal)?;
        let (lun_address, found) = client.find_lun(lun_address)?;
        let now = Instant::now();
        let (options, wire, _, negotiated) = client.into_parts();
        let mut engine = Self::detached(options, lun_address, found, now);
        engine.negotiated = negotiated;
        engine.wire = Some(wire);
        engine.phase = Phase::Up;
        engine.away_since = None;
        Ok(engine)
    }

    /// An engine without a session, for a unit that is known from before: `found` is what it was, at `lun_address`. The
    /// first [`Engine::poll`] at `now` or later begins to log in; requests wait until the unit is there and is the same.
    pub fn detached(options: Arc<Options>, lun_address: scsi::Lun, found: Found, now: Instant) -> Self {
        let depth = options.queue_depth;
        let jobs = Jobs::new(depth + 1);
        let lun = found.lun(options.read_only);
        let jitter = options.jitter_seed << 32 ^ u64::from(options.isid()[5]) | 1;
        Self {
            options,
            lun_address,
            found,
            lun,
            negotiated: Negotiated::default(),
            wire: None,
            phase: Phase::Waiting { until: now },
            jobs,
            free: (0..depth).rev().collect(),
            own_slot: depth,
            waiting: VecDeque::with_capacity(usize::from(depth)),
            backoff: Vec::with_capacity(usize::from(depth)),
            pinned: Vec::with_capacity(usize::from(depth)),
            ready: Vec::new(),
            scratch: Vec::with_capacity(usize::from(depth)),
            window: usize::from(depth),
            window_credit: 0,
            rescan: false,
            changed: false,
            closing: false,
            abandoned: false,
            in_doubt: None,
            away_since: Some(now),
            attempts: 0,
            up_since: now,
            jitter,
            log: LogLimit::default(),
            stats: Stats::default(),
            counters: Counters::default(),
        }
    }

    /// What was found out about the unit.
    pub fn found(&self) -> &Found {
        &self.found
    }

    /// What the login agreed on.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// What the session was opened with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Whether there is a session at the moment.
    pub fn is_connected(&self) -> bool {
        matches!(self.phase, Phase::Up | Phase::Probing { .. })
    }

    /// What happened so far.
    pub fn stats(&self) -> Stats {
        let mut stats = self.stats.clone();
        let mut counters = self.counters.clone();
        if let Some(wire) = &self.wire {
            counters.add(wire.session.counters());
            add_wire(&mut stats.wire, wire.stats);
        }
        stats.violations = counters.seen().map(|(v, n)| (v.to_string(), n)).collect();
        stats
    }

    /// Most memory that the engine takes, all of it at the start but for what a target makes it keep of a text.
    pub fn memory_bound_bytes(&self) -> u64 {
        let slots = u64::from(self.own_slot) + 1;
        let digests = self.wire.as_ref().is_some_and(|w| w.session.config().data_digest);
        let arena = if digests { 4 << 20 } else { 64 << 10 };
        slots * 1024 + RX_STAGING_BYTES as u64 + PROBE_BUFFER_BYTES as u64 + arena + (64 << 10)
    }

    /// Moves commands to the session, as many as it should have at once.
    fn feed(&mut self, now: Instant) {
        if !matches!(self.phase, Phase::Up) {
            return;
        }
        let Some(wire) = &mut self.wire else { return };
        while wire.session.outstanding() < self.window
            && let Some(slot) = self.waiting.pop_front()
        {
            if let Some(job) = self.jobs.get(slot) {
                wire.session.submit(slot, job.command, now);
            }
        }
    }

    fn exchange(&mut self, now: Instant) -> Result<bool, WireError> {
        let Some(wire) = &mut self.wire else { return Ok(false) };
        wire.session.timers(now)?;
        let mut moved = wire.send(&mut self.jobs, now)?;
        moved |= wire.receive(&mut self.jobs, now)?;
        Ok(moved)
    }

    fn events(&mut self, now: Instant) {
        while let Some(event) = self.wire.as_mut().and_then(|w| w.session.next_event()) {
            match event {
                Event::Done { slot, outcome } if slot == self.own_slot => self.own_ended(outcome, now),
                Event::Done { slot, outcome } => self.ended(slot, outcome, now),
                Event::UnitEvent { sense, .. } => {
                    tracing::info!(url = %self.options.url, ?sense, "the target reports an event of the unit");
                    self.rescan = true;
                }
                Event::Rejected { reason } => {
                    if self.log.allow(now) {
                        tracing::warn!(url = %self.options.url, %reason, "the target rejected a PDU");
                    }
                }
                Event::Recovering { step, slot } => {
                    self.stats.task_management += 1;
                    let command = self.jobs.get(slot).map_or("", |j| j.command.cdb.name());
                    tracing::warn!(url = %self.options.url, step, command, "a command takes too long");
                }
                Event::UnitReset { .. } => self.unit_reset(now),
                Event::LogoutWanted => {
                    tracing::info!(url = %self.options.url, "the target asks for a logout");
                }
                Event::LoggedOut { time2wait_s } => self.lost(&LoggedOut, time2wait_s, None, now),
            }
        }
    }
}

impl Engine for IscsiEngine {
    fn lun(&self) -> &Lun {
        &self.lun
    }

    fn room(&self) -> usize {
        self.free.len()
    }

    fn submit(&mut self, request: Request) {
        let (slot, (command, payload)) = match (self.build(&request), self.free.pop()) {
            (Ok(built), Some(slot)) => (slot, built),
            // No room is against the contract; an error is better than a lost request.
            (built, slot) => {
                self.free.extend(slot);
                let outcome = built.err().unwrap_or(Outcome::IoError);
                match outcome {
                    Outcome::Ok => self.stats.completed += 1,
                    _ => self.stats.failed += 1,
                }
                self.ready.push(Completion { tag: request.tag, outcome, data: request.data });
                return;
            }
        };
        // Somebody waits again; what is still underway from before ends in its own time.
        self.abandoned = false;
        let job = Job {
            command,
            tag: Some(request.tag),
            op: request.op,
            data: request.data,
            payload,
            unsent: 0,
            ended: None,
            failures: 0,
            refusals: 0,
            refused_since: None,
        };
        self.jobs.put(slot, job);
        self.waiting.push_back(slot);
    }

    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) -> bool {
        let mut moved = false;
        let mut at = 0;
        while let Some(&(due, slot)) = self.backoff.get(at) {
            if due <= now {
                self.backoff.swap_remove(at);
                self.waiting.push_back(slot);
            } else {
                at += 1;
            }
        }
        moved |= self.reconnect(now);
        self.give_up(now);
        if self.rescan && matches!(self.phase, Phase::Up) {
            self.start_probe(now);
        }
        self.drive_probe(now);
        self.feed(now);
        match self.exchange(now) {
            Ok(any) => moved |= any,
            Err(error) => {
                // What was answered before the connection broke counts.
                self.events(now);
                self.wire_lost(&error, now);
                moved = true;
            }
        }
        self.events(now);
        self.release_pinned();
        if self.rescan && matches!(self.phase, Phase::Up) {
            self.start_probe(now);
        }
        // What the answers led to (R2Ts, repetitions, the probe's next command) goes out now, not with the next wake-up.
        self.drive_probe(now);
        self.feed(now);
        if let Some(wire) = &mut self.wire {
            match wire.send(&mut self.jobs, now) {
                Ok(any) => moved |= any,
                Err(error) => {
                    self.wire_lost(&error, now);
                    moved = true;
                }
            }
            self.release_pinned();
        }
        moved |= !self.ready.is_empty();
        done.append(&mut self.ready);
        moved
    }

    fn readiness(&mut self, ready: bool) {
        if let Some(wire) = &mut self.wire {
            wire.readiness(ready);
        }
    }

    fn moves_long(&self) -> bool {
        self.wire.as_ref().is_some_and(Wire::receives_long)
    }

    fn wait(&self) -> Wait<'_> {
        let backoff = self.backoff.iter().map(|&(at, _)| at).min();
        let (fd, writable, deadline) = match &self.phase {
            Phase::Up => (self.wire.as_ref().map(|w| w.stream().as_fd()), false, None),
            Phase::Probing { later, .. } => (self.wire.as_ref().map(|w| w.stream().as_fd()), false, *later),
            Phase::Waiting { until } => (None, false, Some(*until)),
            Phase::Dialing(dial) => (dial.fd(), dial.wants_write(), Some(dial.deadline())),
            Phase::Closed => (None, false, None),
        };
        let session = self.wire.as_ref().and_then(|w| w.session.deadline());
        let give_up = self.give_up_at().filter(|_| !self.waiting.is_empty());
        Wait {
            fd,
            writable: writable || self.wire.as_ref().is_some_and(Wire::wants_write),
            deadline: [backoff, deadline, session, give_up].into_iter().flatten().min(),
        }
    }

    fn abandon(&mut self) {
        self.abandoned = true;
        if !matches!(self.phase, Phase::Up) {
            self.drop_waiting();
        }
    }

    fn close(&mut self, limit: Duration) {
        self.shut_down(limit);
    }

    fn status(&self) -> serde_json::Value {
        let state = match self.phase {
            Phase::Up => "up",
            Phase::Probing { .. } => "looking at the unit",
            Phase::Waiting { .. } => "lost, pause before the next attempt",
            Phase::Dialing(_) => "lost, logging in",
            Phase::Closed => "closed",
        };
        serde_json::json!({
            "url": self.options.url.to_string(),
            "state": state,
            "session": self.negotiated,
            "stats": self.stats(),
        })
    }

    fn take_change(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }
}

/// A command of the engine's own, with memory of its own.
pub(in crate::portal) fn own_job(command: Command) -> Job {
    Job {
        command,
        tag: None,
        op: Op::Read,
        data: GuestBuf::for_test(PROBE_BUFFER_BYTES),
        payload: Payload::Guest,
        unsent: 0,
        ended: None,
        failures: 0,
        refusals: 0,
        refused_since: None,
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the session was logged out")]
struct LoggedOut;

/// An error and what caused it, on one line.
pub(in crate::portal) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

fn add_wire(sum: &mut WireStats, more: WireStats) {
    sum.sends += more.sends;
    sum.receives += more.receives;
    sum.sent_bytes += more.sent_bytes;
    sum.received_bytes += more.received_bytes;
    sum.copied_bytes += more.copied_bytes;
    sum.direct_bytes += more.direct_bytes;
}

/// Keeps a broken target from filling the log.
#[derive(Debug, Default)]
struct LogLimit {
    last: Option<Instant>,
}

impl LogLimit {
    fn allow(&mut self, now: Instant) -> bool {
        let allowed = self.last.is_none_or(|at| now.saturating_duration_since(at) >= LOG_EVERY);
        if allowed {
            self.last = Some(now);
        }
        allowed
    }
}
