//! [`IscsiEngine`]: a logical unit of an iSCSI target as an [`Engine`].
//!
//! What it promises: a request is answered once and with the truth. Whatever goes wrong on the way - a lost
//! connection, a unit attention, a busy target, a command that takes too long, an answer that does not account for every
//! byte - is dealt with here by repetition, as often as [`MAX_FAILURES`] and the time limits allow; the device model
//! only hears of what repetition will not cure.
//!
//! The engine is a *unit* - the table of requests underway (`Jobs`, whose index is the slot and the task tag), the
//! queue of those that wait, what to do about sense data (`outcomes`) - over one or several *paths* (`path`), each a
//! session with a portal. `choose` gives commands to paths, `sessions` loses sessions and gets them back, `look` makes
//! sure that the same unit is at the end of each and reads its access state, `doubt` sees to it that a write that a lost
//! session may still carry out is repeated only when it cannot any more. With one path, all of it comes down to: log in
//! again with the same ISID, which ends the old session and its commands (RFC 7143 6.3.5), look at the unit, repeat.

mod choose;
mod close;
mod doubt;
mod export;
mod look;
mod observe;
mod outcomes;
mod path;
mod sessions;
mod size;
mod status;
mod waits;

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iscsi::initiator::{Command, Event};
use iscsi::scsi;
use vcp_core::ask::Rest;
use vcp_core::handover::Fds;
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::mem::GuestBuf;
use vcp_core::metrics::Samples;
use vcp_core::uring::Ring;

use super::client::{Client, Negotiated};
use super::job::{Job, Jobs, Payload};
use super::login::Purpose;
use super::probe::{Found, PROBE_BUFFER_BYTES};
use super::wire::{RX_STAGING_BYTES, Wire, WireError};
use super::{Options, PortalError};
use crate::engine::{Completion, Engine, Lun, Op, Outcome, Request, Wait};
use crate::recorder::{PDUS, Recorder};
use observe::Observer;
use path::{Doubt, Path, Phase, Place};
pub use path::{MAX_PATHS, PathStats};
pub use status::Stats;
use waits::Waits;

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
/// With several paths, a former process's session on one that is not reached within this time is made sure of by a reset.
const START_PATIENCE: Duration = Duration::from_secs(3);

/// See the [module](self).
#[derive(Debug)]
pub struct IscsiEngine {
    options: Arc<Options>,
    lun_address: scsi::Lun,
    found: Found,
    lun: Lun,
    paths: Vec<Path>,
    /// The paths to use: those of the best class.
    active: Vec<usize>,
    /// That class.
    class: Option<u8>,
    /// `active` is up to date.
    ranked: bool,
    /// Position in `active` that has its turn, and commands that it got in a row.
    turn: usize,
    run: u32,
    jobs: Jobs,
    free: Vec<u16>,
    waiting: VecDeque<u16>,
    backoff: Vec<(Instant, u16)>,
    /// Slots that ended but whose data a wire still has to send.
    pinned: Vec<u16>,
    ready: Vec<Completion>,
    scratch: Vec<u16>,
    changed: bool,
    /// [`Engine::close`] was called.
    closing: bool,
    /// [`Engine::abandon`] was called: nobody waits for what is underway, so nothing of it is repeated.
    abandoned: bool,
    /// Some path is in doubt; see `doubt`.
    in_doubt: bool,
    /// Nothing is written before doubts are settled.
    barrier: bool,
    reset: Option<doubt::Reset>,
    reset_not_before: Option<Instant>,
    reset_failures: u32,
    /// When the unit's size was read last.
    size_read: Instant,
    /// Since when no path was fit for commands.
    away_since: Option<Instant>,
    /// With several paths: what they wait for.
    waits: Option<Waits>,
    /// When silent paths were looked for last.
    watched: Option<Instant>,
    wait_serial: u64,
    jitter: u64,
    log: LogLimit,
    stats: Stats,
    observer: Observer,
}

impl IscsiEngine {
    /// Opens the unit that the options name; blocks for the connect and login time limits of each path at most, until one
    /// works. For the time before `ready`; the other paths follow.
    ///
    /// # Errors
    /// It cannot be reached, refuses us, or is not a disk: what was found on the first path.
    pub fn open(options: Options) -> Result<Self, PortalError> {
        options.url.require_target()?;
        let options = Arc::new(options);
        let mut first = None;
        for (index, path) in options.each_path().into_iter().enumerate() {
            match Self::open_by(&options, index, path) {
                Ok(engine) => return Ok(engine),
                Err(error) => {
                    if options.paths.len() + usize::from(options.sessions) > 1 {
                        tracing::warn!(path = index, error = chain(&error), "not by this path");
                    }
                    first.get_or_insert(error);
                }
            }
        }
        Err(first.unwrap_or(PortalError::Url(crate::url::UrlError::Missing("a target"))))
    }

    fn open_by(options: &Arc<Options>, index: usize, path: Arc<Options>) -> Result<Self, PortalError> {
        let wanted = path.url.require_lun()?;
        let mut client = Client::connect(path, Purpose::Normal)?;
        let (lun_address, found) = client.find_lun(wanted)?;
        let identity = found.identity();
        if let Some(wanted) = options.unit_id.as_ref().filter(|wanted| !wanted.names(&identity)) {
            let error = PortalError::OtherUnit {
                target: client.options().url.target.clone().unwrap_or_default(),
                lun: lun_address.to_string(),
                portal: client.options().url.portal.to_string(),
                why: format!("{identity}, not {wanted}"),
            };
            client.logout();
            return Err(error);
        }
        let now = Instant::now();
        let (_, wire, _, negotiated) = client.into_parts();
        let mut engine = Self::detached(Arc::clone(options), lun_address, found, now);
        if let Some(path) = engine.paths.get_mut(index) {
            let fresh = Path::new(Arc::clone(&path.options), lun_address, path.own_slot, now);
            *path = fresh.with_session(wire, negotiated, &engine.found);
        }
        engine.doubts_changed();
        engine.rank(now);
        Ok(engine)
    }

    /// An engine without a session, for a unit that is known from before: `found` is what it was, at `lun_address`. The
    /// first [`Engine::poll`] at `now` or later begins to log in; requests wait until the unit is there and is the same.
    pub fn detached(options: Arc<Options>, lun_address: scsi::Lun, found: Found, now: Instant) -> Self {
        let depth = options.queue_depth;
        let lun = found.lun(options.read_only);
        let jitter = options.jitter_seed << 32 ^ u64::from(options.isid()[5]) | 1;
        let url_lun = options.url.lun.unwrap_or_default();
        let mut paths: Vec<_> = options
            .each_path()
            .into_iter()
            .zip(depth..)
            .map(|(path, own_slot)| {
                let lun = look::address_at(path.url.lun.unwrap_or_default(), url_lun, lun_address);
                Path::new(path, lun, own_slot, now)
            })
            .collect();
        if paths.len() > 1 {
            // A process before this one may have left sessions with writes underway. The login of each path ends its own.
            for path in &mut paths {
                path.doubt = Some(Doubt::of_a_former_process(now + START_PATIENCE));
            }
        }
        let mut engine = Self {
            observer: Observer::new(&options, now),
            jobs: Jobs::new(depth + paths.len() as u16),
            waits: if paths.len() > 1 { Waits::new() } else { None },
            wait_serial: 0,
            watched: None,
            active: Vec::with_capacity(paths.len()),
            paths,
            options,
            lun_address,
            found,
            lun,
            class: None,
            ranked: false,
            turn: 0,
            run: 0,
            free: (0..depth).rev().collect(),
            waiting: VecDeque::with_capacity(usize::from(depth)),
            backoff: Vec::with_capacity(usize::from(depth)),
            pinned: Vec::with_capacity(usize::from(depth)),
            ready: Vec::new(),
            scratch: Vec::with_capacity(usize::from(depth)),
            changed: false,
            closing: false,
            abandoned: false,
            in_doubt: false,
            barrier: false,
            reset: None,
            reset_not_before: None,
            reset_failures: 0,
            size_read: now,
            away_since: Some(now),
            jitter,
            log: LogLimit::default(),
            stats: Stats::default(),
        };
        engine.doubts_changed();
        engine
    }

    /// Requests at once; slots from here on are the paths' own.
    fn depth(&self) -> u16 {
        self.options.queue_depth
    }

    /// What was found out about the unit.
    pub fn found(&self) -> &Found {
        &self.found
    }

    /// Its address at the target of the options' URL.
    pub fn lun_address(&self) -> scsi::Lun {
        self.lun_address
    }

    /// What the login agreed on, on the first path in use.
    pub fn negotiated(&self) -> &Negotiated {
        let first = self.active.first().copied().unwrap_or_default();
        &self.paths[first].negotiated
    }

    /// What the session was opened with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Whether there is a session at the moment.
    pub fn is_connected(&self) -> bool {
        self.paths.iter().any(|path| path.wire.is_some())
    }

    /// How many paths commands take now.
    pub fn paths_in_use(&self) -> usize {
        self.paths.iter().filter(|path| path.class().is_some() && path.class() == self.class).count()
    }

    /// Most memory that the engine takes, all of it at the start but for what a target makes it keep of a text.
    pub fn memory_bound_bytes(&self) -> u64 {
        let slots = u64::from(self.depth()) + self.paths.len() as u64;
        let digests = self
            .paths
            .iter()
            .any(|path| path.wire.as_ref().is_some_and(|wire| wire.session.config().data_digest));
        let arena = if digests { 4 << 20 } else { 64 << 10 };
        let session = slots * 1024 + RX_STAGING_BYTES as u64 + PROBE_BUFFER_BYTES as u64 + arena;
        let recorder = if self.options.recorder.is_some() { Recorder::memory_bytes(PDUS) as u64 } else { 0 };
        (session + recorder) * self.paths.len() as u64 + (64 << 10)
    }

    fn exchange(&mut self, index: usize, now: Instant) -> Result<bool, WireError> {
        let Some(wire) = &mut self.paths[index].wire else { return Ok(false) };
        wire.session.timers(now)?;
        let mut moved = wire.send(&mut self.jobs, now)?;
        moved |= wire.receive(&mut self.jobs, now)?;
        Ok(moved)
    }

    fn events(&mut self, index: usize, now: Instant) {
        let own_slot = self.paths[index].own_slot;
        while let Some(event) = self.paths[index].wire.as_mut().and_then(|w| w.session.next_event()) {
            match event {
                Event::Done { slot, outcome } if slot == own_slot => self.own_ended(index, outcome, now),
                Event::Done { slot, outcome } => self.ended(index, slot, outcome, now),
                Event::UnitEvent { sense, .. } => {
                    tracing::info!(url = %self.options.url, ?sense, "the target reports an event of the unit");
                    self.paths[index].rescan = true;
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
                    self.anomaly(index, "timeout", "a command takes too long", now);
                }
                Event::UnitReset { .. } => self.unit_reset(index, now),
                Event::LogoutWanted => {
                    tracing::info!(url = %self.options.url, "the target asks for a logout");
                }
                Event::LoggedOut { time2wait_s } => self.lost(index, &LoggedOut, time2wait_s, None, now),
            }
        }
    }

    /// Moves every session.
    fn exchange_all(&mut self, now: Instant) -> bool {
        let mut moved = false;
        for index in 0..self.paths.len() {
            match self.exchange(index, now) {
                Ok(any) => moved |= any,
                Err(error) => {
                    // What was answered before the connection broke counts.
                    self.events(index, now);
                    self.wire_lost(index, &error, now);
                    moved = true;
                }
            }
            self.events(index, now);
            self.observe_violations(index, now);
        }
        moved
    }

    /// Sends what came up since.
    fn send_all(&mut self, now: Instant) -> bool {
        let mut moved = false;
        for index in 0..self.paths.len() {
            let Some(wire) = &mut self.paths[index].wire else { continue };
            match wire.send(&mut self.jobs, now) {
                Ok(any) => moved |= any,
                Err(error) => {
                    self.wire_lost(index, &error, now);
                    moved = true;
                }
            }
        }
        moved
    }

    /// Tells `waits` which sockets there are.
    fn update_waits(&mut self) {
        let Some(waits) = &mut self.waits else { return };
        for (index, path) in self.paths.iter().enumerate() {
            let wanted = match (&path.wire, &path.phase) {
                (Some(wire), _) if wire.is_in_ring() => {
                    waits.remove(index, wire.stream().as_fd());
                    continue;
                }
                (Some(wire), _) => {
                    Some((wire.stream().as_fd(), path.stats.sessions_gained, wire.wants_write()))
                }
                (None, Phase::Dialing(dial)) => {
                    // It may go from one socket to the next by itself.
                    self.wait_serial += 1;
                    dial.fd().map(|fd| (fd, self.wait_serial | 1 << 63, dial.wants_write()))
                }
                _ => None,
            };
            waits.set(index, wanted);
            let dial = path.doubt.as_ref().and_then(|doubt| doubt.dial.as_ref());
            let wanted = dial.and_then(|dial| {
                self.wait_serial += 1;
                dial.fd().map(|fd| (fd, self.wait_serial | 1 << 63, dial.wants_write()))
            });
            waits.set(MAX_PATHS + index, wanted);
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
            losses: self.stats.sessions_lost,
            written: None,
            path: 0,
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
        self.observe_pass(now);
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
        if self.in_doubt || self.reset.is_some() {
            moved |= self.settle(now);
        }
        if !self.ranked {
            self.rank(now);
        }
        self.give_up(now);
        self.look_again(now);
        self.read_size(now);
        self.feed(now);
        moved |= self.exchange_all(now);
        self.release_pinned();
        if self.paths.len() > 1 {
            self.watch(now);
        }
        // What the answers led to (R2Ts, repetitions, the look's next command) goes out now, not with the next wake-up.
        self.look_again(now);
        self.feed(now);
        moved |= self.send_all(now);
        self.release_pinned();
        self.update_waits();
        moved |= !self.ready.is_empty();
        done.append(&mut self.ready);
        moved
    }

    fn submit_to(&mut self, ring: &mut Ring) -> bool {
        let mut again = false;
        for wire in self.paths.iter_mut().filter_map(|path| path.wire.as_mut()) {
            again |= wire.submit_to(&self.jobs, ring);
        }
        again
    }

    fn reap_from(&mut self, ring: &mut Ring) {
        for wire in self.paths.iter_mut().filter_map(|path| path.wire.as_mut()) {
            wire.reap_from(&mut self.jobs, ring);
        }
    }

    fn leave_ring(&mut self) {
        self.paths.iter_mut().filter_map(|path| path.wire.as_mut()).for_each(Wire::leave_ring);
        self.update_waits();
    }

    fn readiness(&mut self, ready: bool) {
        let set = match &self.waits {
            Some(waits) if ready && !waits.is_empty() => waits.ready(),
            _ => 0,
        };
        let many = self.waits.is_some();
        for (index, path) in self.paths.iter_mut().enumerate() {
            if let Some(wire) = &mut path.wire {
                wire.readiness(if many { set >> index & 1 != 0 } else { ready });
            }
        }
    }

    fn moves_long(&self) -> bool {
        self.paths.iter().any(|path| path.wire.as_ref().is_some_and(Wire::receives_long))
    }

    fn wait(&self) -> Wait<'_> {
        let mut deadline = self.backoff.iter().map(|&(at, _)| at).min();
        let mut sooner = |at: Option<Instant>| deadline = [deadline, at].into_iter().flatten().min();
        for path in &self.paths {
            sooner(match &path.phase {
                Phase::Waiting { until } => Some(*until),
                Phase::Dialing(dial) => Some(dial.deadline()),
                Phase::Up | Phase::Probing | Phase::Closed => None,
            });
            sooner(path.wire.as_ref().and_then(|wire| wire.session.deadline()));
        }
        sooner(self.look_at());
        sooner(self.size_due());
        sooner(self.watch_at());
        if self.in_doubt || self.reset.is_some() {
            sooner(self.settle_at());
        }
        sooner(self.give_up_at().filter(|_| self.someone_waits()));
        let (fd, writable) = match (&self.waits, &self.paths[..]) {
            (Some(waits), _) => (Some(waits.fd()).filter(|_| !waits.is_empty()), false),
            (None, [path, ..]) => match (&path.wire, &path.phase) {
                (Some(wire), _) if wire.is_in_ring() => (None, false),
                (Some(wire), _) => (Some(wire.stream().as_fd()), wire.wants_write()),
                (None, Phase::Dialing(dial)) => (dial.fd(), dial.wants_write()),
                _ => (None, false),
            },
            (None, []) => (None, false),
        };
        Wait { fd, writable, deadline }
    }

    fn abandon(&mut self) {
        self.abandoned = true;
        if self.active.is_empty() {
            self.drop_waiting();
        } else {
            for slot in self.take_held() {
                self.finish(slot, Outcome::IoError);
            }
        }
    }

    fn close(&mut self, limit: Duration) {
        self.shut_down(limit);
    }

    fn export(&self, fds: &mut Fds, _now: Instant) -> Result<serde_json::Value, NotNow> {
        self.make_state(fds)
    }

    fn import(&mut self, state: serde_json::Value, fds: &mut Fds, now: Instant) -> Result<(), BadState> {
        self.take_state(state, fds, now)
    }

    fn losses(&self) -> u64 {
        self.stats.sessions_lost
    }

    fn status(&self) -> serde_json::Value {
        self.describe()
    }

    fn collect(&self, samples: &mut Samples) {
        self.collect_samples(samples);
    }

    fn command(
        &mut self,
        name: &str,
        args: &serde_json::Map<String, serde_json::Value>,
        now: Instant,
    ) -> Option<Result<Rest, String>> {
        self.run_command(name, args, now)
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
        losses: 0,
        written: None,
        path: 0,
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
