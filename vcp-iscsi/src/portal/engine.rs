//! [`IscsiEngine`]: a logical unit of an iSCSI target as an [`Engine`].
//!
//! What it promises: a request is answered once and with the truth. Whatever goes wrong on the way - a lost
//! connection, a unit attention, a busy target, a command that takes too long, an answer that does not account for every
//! byte - is dealt with here by repetition, as often as [`MAX_FAILURES`] and the time limits allow; the device model
//! only hears of what repetition will not cure. After a lost connection nothing is repeated before a new login *with the
//! same ISID* has succeeded: the target then has ended the old session and with it every command of it (RFC 7143
//! 6.3.5), so that none can act later and overwrite newer data.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iscsi::initiator::{
    Command, Counters, Direction, Event, Outcome as TaskOutcome, SessionError, Violation,
};
use iscsi::pdu::framing::FrameError;
use iscsi::scsi::sense::Action;
use iscsi::scsi::{self, Cdb, SenseKey, Status, unmap};

use super::client::{Client, Negotiated};
use super::job::{Job, Jobs, Payload, unmap_payload};
use super::link::Dial;
use super::login::Purpose;
use super::probe::{Found, Next, PROBE_BUFFER_BYTES, Probe, Reply, reason};
use super::wire::{RX_STAGING_BYTES, Wire, WireError, WireStats};
use super::{Options, PortalError};
use crate::engine::{Completion, Engine, Lun, Op, Outcome, Request, Wait};
use vcp_core::mem::GuestBuf;

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
        Ok(Self::over(client, lun_address, found))
    }

    fn over(client: Client, lun_address: scsi::Lun, found: Found) -> Self {
        let (options, wire, jobs, negotiated) = client.into_parts();
        let depth = options.queue_depth;
        let lun = found.lun(options.read_only);
        // Seeds the jitter only: any number that differs between programs will do.
        let jitter = u64::from(std::process::id()) << 32 ^ u64::from(options.isid()[5]) | 1;
        Self {
            options,
            lun_address,
            found,
            lun,
            negotiated,
            wire: Some(wire),
            phase: Phase::Up,
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
            attempts: 0,
            up_since: Instant::now(),
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

    /// See [`Engine::close`]: waits for commands underway for half of `limit`, logs out, and gives up at the end of
    /// `limit`. Blocks so long at most; commands not answered by then are dropped.
    fn shut_down(&mut self, limit: Duration) {
        let start = Instant::now();
        let deadline = start + limit;
        let mut done = Vec::new();
        self.closing = true;
        match &mut self.wire {
            Some(wire) => wire.session.logout(start, limit / 2),
            None => self.phase = Phase::Closed,
        }
        while !matches!(self.phase, Phase::Closed) {
            let now = Instant::now();
            if now >= deadline {
                break;
            }
            self.poll(now, &mut done);
            done.clear();
            let Some(wire) = &self.wire else { break };
            let until = wire.session.deadline().map_or(deadline, |at| at.min(deadline));
            let until = until.max(now + Duration::from_millis(1));
            if super::socket::wait_until(wire.stream(), wire.wants_write(), until).is_err() {
                break;
            }
        }
        self.wire = None;
        self.phase = Phase::Closed;
    }

    /// The command for a request; `Err` if it can be answered without one.
    fn build(&self, request: &Request) -> Result<(Command, Payload), Outcome> {
        let blocks = request.blocks;
        let in_range = request.lba.checked_add(u64::from(blocks)).is_some_and(|end| end <= self.lun.blocks);
        let data_bytes = u64::from(blocks) * u64::from(self.lun.block_bytes);
        let limits = &self.options.timeouts;
        let command = |cdb, direction, len_bytes, timeout| Command {
            lun: self.lun_address,
            cdb,
            direction,
            len_bytes,
            // Of a parameter list, targets report all sorts of residuals (tgt: all of UNMAP's); of blocks, none may miss.
            exact: matches!(request.op, Op::Read | Op::Write { .. }),
            timeout,
        };
        if request.op != Op::Flush {
            if !in_range || (self.lun.read_only && request.op != Op::Read) {
                return Err(Outcome::IoError);
            }
            if blocks == 0 {
                // A WRITE SAME or UNMAP of no blocks would mean something else.
                return Err(Outcome::Ok);
            }
        }
        match request.op {
            Op::Read | Op::Write { .. } => {
                let len_bytes = u32::try_from(data_bytes).map_err(|_| Outcome::IoError)?;
                if request.data.len_bytes() as u64 != data_bytes {
                    return Err(Outcome::IoError);
                }
                let (cdb, direction) = match request.op {
                    Op::Write { fua } => {
                        (Cdb::write(request.lba, blocks, fua && self.lun.fua), Direction::Write)
                    }
                    _ => (Cdb::read(request.lba, blocks), Direction::Read),
                };
                Ok((command(cdb, direction, len_bytes, limits.command), Payload::Guest))
            }
            Op::Flush => Ok((
                command(Cdb::synchronize_cache_10(), Direction::None, 0, limits.command * 2),
                Payload::Guest,
            )),
            Op::Discard => {
                if self.lun.max_discard_blocks == 0 {
                    return Err(Outcome::Unsupported);
                }
                let len_bytes = unmap::ONE_DESCRIPTOR_BYTES as u32;
                let cdb = Cdb::unmap(len_bytes as u16);
                Ok((
                    command(cdb, Direction::Write, len_bytes, limits.command * 2),
                    unmap_payload(request.lba, blocks),
                ))
            }
            Op::WriteZeroes { unmap } => {
                if self.lun.max_write_zeroes_blocks == 0 {
                    return Err(Outcome::Unsupported);
                }
                let unmap = unmap && self.lun.write_zeroes_may_unmap;
                let cdb = Cdb::write_same_16(request.lba, blocks, unmap);
                let command = command(cdb, Direction::Write, self.lun.block_bytes, limits.command * 2);
                Ok((command, Payload::Zeroes))
            }
        }
    }

    /// Ends a request; its memory is given back as soon as the wire no longer needs it.
    fn finish(&mut self, slot: u16, outcome: Outcome) {
        let Some(job) = self.jobs.get_mut(slot) else { return };
        if job.unsent > 0 {
            job.ended = Some(outcome);
            self.pinned.push(slot);
            return;
        }
        let Some(job) = self.jobs.take(slot) else { return };
        let Some(tag) = job.tag else { return };
        self.free.push(slot);
        match outcome {
            Outcome::Ok => self.stats.completed += 1,
            _ => self.stats.failed += 1,
        }
        self.ready.push(Completion { tag, outcome, data: job.data });
    }

    fn release_pinned(&mut self) {
        let mut at = 0;
        while let Some(&slot) = self.pinned.get(at) {
            match self.jobs.get(slot) {
                Some(job) if job.unsent > 0 => at += 1,
                job => {
                    let outcome = job.and_then(|j| j.ended);
                    self.pinned.swap_remove(at);
                    if let Some(outcome) = outcome {
                        self.finish(slot, outcome);
                    }
                }
            }
        }
    }

    /// A number from 0.5 to 1.5 times the duration.
    fn jittered(&mut self, duration: Duration) -> Duration {
        // xorshift64
        self.jitter ^= self.jitter << 13;
        self.jitter ^= self.jitter >> 7;
        self.jitter ^= self.jitter << 17;
        duration.mul_f64(0.5 + (self.jitter >> 40) as f64 / (1u64 << 24) as f64)
    }

    /// The request failed in a way that repetition may cure.
    fn retry_failed(&mut self, slot: u16, why: &str, now: Instant) {
        let Some(job) = self.jobs.get_mut(slot) else { return };
        job.failures += 1;
        let (failures, name) = (job.failures, job.command.cdb.name());
        if failures > MAX_FAILURES {
            if self.log.allow(now) {
                tracing::error!(url = %self.options.url, command = name, why, "request failed for good");
            }
            self.finish(slot, Outcome::IoError);
            return;
        }
        if self.log.allow(now) {
            tracing::warn!(url = %self.options.url, command = name, why, failures, "command is repeated");
        }
        self.stats.retries += 1;
        let pause = self.jittered(RETRY_MIN * (1 << (failures - 1).min(8)));
        self.backoff.push((now + pause, slot));
    }

    /// The target turned the command away for the moment.
    fn retry_refused(&mut self, slot: u16, at_once: bool, why: &str, now: Instant) {
        let busy_limit = self.options.timeouts.busy;
        let Some(job) = self.jobs.get_mut(slot) else { return };
        let since = *job.refused_since.get_or_insert(now);
        job.refusals += 1;
        let (refusals, name) = (job.refusals, job.command.cdb.name());
        if now.saturating_duration_since(since) > busy_limit {
            if self.log.allow(now) {
                tracing::error!(url = %self.options.url, command = name, why, "target does not become ready");
            }
            self.finish(slot, Outcome::IoError);
            return;
        }
        self.stats.retries += 1;
        // A target has one unit attention for each event; one that never ends is slowed down like any refusal.
        if at_once && refusals <= 8 {
            self.waiting.push_front(slot);
            return;
        }
        let pause = RETRY_MAX.min(RETRY_MIN * (1 << refusals.min(8)));
        let pause = self.jittered(pause);
        self.backoff.push((now + pause, slot));
    }

    fn fail(&mut self, slot: u16, why: &str, now: Instant) {
        if self.log.allow(now)
            && let Some(job) = self.jobs.get(slot)
        {
            tracing::error!(url = %self.options.url, command = job.command.cdb.name(), why, "request failed");
        }
        self.finish(slot, Outcome::IoError);
    }

    /// A command of a request ended.
    fn ended(&mut self, slot: u16, outcome: TaskOutcome, now: Instant) {
        let (status, sense, transferred_bytes) = match outcome {
            TaskOutcome::Status { status, sense, transferred_bytes } => (status, sense, transferred_bytes),
            TaskOutcome::TargetFailure { response } => {
                return self.retry_failed(
                    slot,
                    &format!("the target failed with response {response:#04x}"),
                    now,
                );
            }
            TaskOutcome::Damaged(violation) => return self.retry_failed(slot, &violation.to_string(), now),
            TaskOutcome::Aborted => return self.retry_failed(slot, "it took too long and was aborted", now),
        };
        match status {
            Status::GOOD => return self.good(slot, now),
            Status::BUSY | Status::TASK_SET_FULL => {
                self.stats.busy += 1;
                if status == Status::TASK_SET_FULL {
                    // Half of what was too much; a success for each command of the window adds one again.
                    let underway = self.wire.as_ref().map_or(1, |w| w.session.outstanding());
                    self.window = (underway / 2).max(1);
                    self.window_credit = 0;
                }
                return self.retry_refused(slot, false, &status.to_string(), now);
            }
            Status::CHECK_CONDITION => {}
            _ if status.is_transient() => return self.retry_refused(slot, false, &status.to_string(), now),
            _ => return self.fail(slot, &status.to_string(), now),
        }
        let why = reason(status, sense);
        let Some(sense) = sense else {
            return self.retry_failed(slot, "CHECK CONDITION without sense data", now);
        };
        if sense.deferred {
            // About an earlier command, which was answered already; this one was not carried out (SPC-4 4.5.7).
            tracing::error!(url = %self.options.url, %sense, "deferred error of an earlier command");
            return self.retry_refused(slot, true, &why, now);
        }
        if sense.key == SenseKey::UnitAttention {
            self.stats.unit_attentions += 1;
            if self.log.allow(now) {
                tracing::info!(url = %self.options.url, %sense, "unit attention");
            }
        }
        match sense.action() {
            Action::Retry if sense.key == SenseKey::AbortedCommand => self.retry_failed(slot, &why, now),
            Action::Retry => self.retry_refused(slot, sense.key == SenseKey::UnitAttention, &why, now),
            Action::Rescan => {
                self.rescan = true;
                self.retry_refused(slot, true, &why, now);
            }
            Action::Log => {
                let complete = self.jobs.get(slot).is_some_and(|j| j.command.len_bytes == transferred_bytes);
                if complete {
                    if self.log.allow(now) {
                        tracing::warn!(url = %self.options.url, %sense, "done with a remark");
                    }
                    self.good(slot, now);
                } else {
                    self.retry_failed(slot, &why, now);
                }
            }
            Action::Unsupported => self.unsupported(slot, &why, now),
            Action::NoSpace => self.fail(slot, "the thinly provisioned LUN is out of space", now),
            Action::Fail => self.fail(slot, &why, now),
        }
    }

    /// The unit does not know the command.
    fn unsupported(&mut self, slot: u16, why: &str, now: Instant) {
        let Some(job) = self.jobs.get_mut(slot) else { return };
        let is_sync = matches!(
            job.command.cdb.opcode(),
            scsi::opcode::SYNCHRONIZE_CACHE_10 | scsi::opcode::SYNCHRONIZE_CACHE_16
        );
        if job.command.cdb.opcode() == scsi::opcode::SYNCHRONIZE_CACHE_10 {
            job.command.cdb = Cdb::synchronize_cache_16();
            self.waiting.push_front(slot);
        } else if is_sync && !self.lun.write_cache {
            // Without a volatile cache there is nothing to write back.
            self.finish(slot, Outcome::Ok);
        } else if matches!(job.op, Op::Discard | Op::WriteZeroes { .. }) {
            self.finish(slot, Outcome::Unsupported);
        } else {
            self.fail(slot, why, now);
        }
    }

    fn good(&mut self, slot: u16, now: Instant) {
        self.window_credit += 1;
        if self.window_credit >= self.window {
            self.window_credit = 0;
            self.window = (self.window + 1).min(usize::from(self.own_slot));
        }
        // A session that gets something done is worth having again soon; one that lasts, at once.
        let settled = now.saturating_duration_since(self.up_since) >= SETTLED;
        self.attempts = self.attempts.min(if settled { 0 } else { 1 });
        if let Some(job) = self.jobs.get_mut(slot)
            && job.op == (Op::Write { fua: true })
            && !self.lun.fua
            && self.lun.write_cache
        {
            // The unit has a volatile cache and no FUA: the write is stable after a SYNCHRONIZE CACHE behind it.
            job.op = Op::Flush;
            job.payload = Payload::Zeroes;
            job.command.cdb = Cdb::synchronize_cache_10();
            job.command.direction = Direction::None;
            job.command.len_bytes = 0;
            self.waiting.push_front(slot);
            return;
        }
        self.finish(slot, Outcome::Ok);
    }

    /// The engine's own command ended.
    fn own_ended(&mut self, outcome: TaskOutcome, now: Instant) {
        let Phase::Probing { probe, later } = &mut self.phase else { return };
        let mut data = Vec::new();
        let (status, sense) = match outcome {
            TaskOutcome::Status { status, sense, transferred_bytes } => {
                if let Some(job) = self.jobs.get(self.own_slot) {
                    data.resize(transferred_bytes as usize, 0);
                    job.data.copy_to(0, &mut data);
                }
                (status, sense)
            }
            // Tried again; the probe bounds how often.
            _ => (Status::BUSY, None),
        };
        self.jobs.take(self.own_slot);
        match probe.answer(Reply { status, sense, data: &data }) {
            Ok(Next::Send) => *later = Some(now),
            Ok(Next::Later(pause)) => *later = Some(now + pause),
            Ok(Next::Done) => self.probed(now),
            Err(source) => {
                let error = self.probe_error(source);
                self.lost(&error, 0, None, now);
            }
        }
    }

    fn probe_error(&self, source: super::probe::ProbeError) -> PortalError {
        PortalError::Probe {
            target: self.options.url.target.clone().unwrap_or_default(),
            lun: self.lun_address.to_string(),
            source,
        }
    }

    /// The unit was looked at again.
    fn probed(&mut self, now: Instant) {
        let Phase::Probing { probe, .. } = std::mem::replace(&mut self.phase, Phase::Up) else { return };
        let found = match probe.finish() {
            Ok(found) => found,
            Err(source) => {
                let error = self.probe_error(source);
                return self.lost(&error, 0, None, now);
            }
        };
        if !found.is_same_unit(&self.found) {
            let describe = |f: &Found| {
                format!(
                    "serial {:?}, {} bytes per block",
                    f.serial.as_ref().or(f.designator.as_ref()),
                    f.capacity.block_bytes
                )
            };
            let error = PortalError::OtherUnit {
                target: self.options.url.target.clone().unwrap_or_default(),
                lun: self.lun_address.to_string(),
                before: describe(&self.found),
                now: describe(&found),
            };
            return self.lost(&error, 0, None, now);
        }
        let lun = found.lun(self.options.read_only);
        if lun != self.lun {
            tracing::info!(url = %self.options.url, blocks_before = self.lun.blocks, blocks = lun.blocks, "unit changed");
            if lun.blocks < self.lun.blocks {
                tracing::warn!(url = %self.options.url, "the unit shrank; requests behind its end fail");
            }
            self.lun = lun;
            self.changed = true;
        }
        self.found = found;
    }

    /// Sends the probe's next command, if it is time.
    fn drive_probe(&mut self, now: Instant) {
        let Phase::Probing { probe, later } = &mut self.phase else { return };
        if later.is_none_or(|at| at > now) || self.jobs.get(self.own_slot).is_some() {
            return;
        }
        *later = None;
        let command = probe.next();
        self.jobs.put(self.own_slot, own_job(command));
        if let Some(wire) = &mut self.wire {
            wire.session.submit(self.own_slot, command, now);
        }
    }

    fn start_probe(&mut self, now: Instant) {
        self.rescan = false;
        self.phase = Phase::Probing { probe: Box::new(Probe::new(self.lun_address)), later: Some(now) };
        self.jobs.take(self.own_slot);
    }

    /// Ends what is not with the target: for a guest that no longer waits for it.
    fn drop_waiting(&mut self) {
        while let Some(slot) = self.waiting.pop_front() {
            self.finish(slot, Outcome::IoError);
        }
        while let Some((_, slot)) = self.backoff.pop() {
            self.finish(slot, Outcome::IoError);
        }
        self.abandoned = self.free.len() < usize::from(self.own_slot);
    }

    /// The session is lost: what it owes us waits for the next one.
    fn lost(&mut self, error: &dyn std::error::Error, time2wait_s: u16, blamed: Option<u16>, now: Instant) {
        if let Some(wire) = self.wire.take() {
            self.stats.sessions_lost += 1;
            self.counters.add(wire.session.counters());
            add_wire(&mut self.stats.wire, wire.stats);
            // The connection is closed here; nothing of it is sent any more.
            self.scratch.clear();
            wire.session.unanswered(&mut self.scratch);
            drop(wire);
            self.jobs.take(self.own_slot);
            for (_, job) in self.jobs.iter_mut() {
                job.unsent = 0;
            }
            self.release_pinned();
            let own_slot = self.own_slot;
            self.stats.repeated += self.scratch.len() as u64;
            for &slot in self.scratch.iter().rev().filter(|&&slot| slot != own_slot) {
                self.waiting.push_front(slot);
            }
            if let Some(slot) = blamed
                && let Some(job) = self.jobs.get_mut(slot)
            {
                job.failures += 1;
                if job.failures > MAX_FAILURES {
                    self.waiting.retain(|&s| s != slot);
                    self.fail(slot, &chain(error), now);
                }
            }
        }
        if self.abandoned {
            self.drop_waiting();
        }
        if self.closing {
            self.phase = Phase::Closed;
            return;
        }
        let limits = &self.options.timeouts;
        let longest = limits.backoff_max;
        let pause = match self.attempts {
            0 => Duration::ZERO,
            n => limits.backoff_max.min(limits.backoff_min * (1 << (n - 1).min(16))),
        };
        self.attempts += 1;
        let time2wait = Duration::from_secs(u64::from(time2wait_s.min(30)));
        let pause = self.jittered(pause).min(longest).max(time2wait);
        tracing::warn!(
            url = %self.options.url,
            error = chain(error),
            attempt = self.attempts,
            pause_ms = pause.as_millis() as u64,
            "no session; trying again"
        );
        self.phase = Phase::Waiting { until: now + pause };
    }

    fn wire_lost(&mut self, error: &WireError, now: Instant) {
        let (time2wait_s, blamed) = match error {
            WireError::Session(SessionError::Dropped { time2wait_s }) => (*time2wait_s, None),
            WireError::Session(error) => (0, error.slot()),
            WireError::Frame(FrameError::HeaderDigest { .. }) => {
                self.counters.count(Violation::HeaderDigest);
                (0, None)
            }
            WireError::Frame(_) => {
                self.counters.count(Violation::SegmentTooLong);
                (0, None)
            }
            WireError::Io(_) | WireError::Closed => (0, None),
        };
        self.lost(error, time2wait_s, blamed, now);
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
                Event::LogoutWanted => {
                    tracing::info!(url = %self.options.url, "the target asks for a logout");
                }
                Event::LoggedOut { time2wait_s } => self.lost(&LoggedOut, time2wait_s, None, now),
            }
        }
    }

    /// Gets the session back.
    fn reconnect(&mut self, now: Instant) -> bool {
        match &mut self.phase {
            Phase::Waiting { until } if *until <= now => {
                let tag = self.negotiated.portal_group_tag;
                match Dial::start(Arc::clone(&self.options), Purpose::Normal, tag, now) {
                    Ok(dial) => self.phase = Phase::Dialing(Box::new(dial)),
                    Err(error) => {
                        self.lost(&error, 0, None, now);
                        return true;
                    }
                }
            }
            Phase::Dialing(_) => {}
            _ => return false,
        }
        let Phase::Dialing(dial) = &mut self.phase else { return false };
        match dial.poll(now) {
            Ok(None) => false,
            Ok(Some(logged_in)) => {
                self.stats.sessions_regained += 1;
                self.up_since = now;
                self.negotiated = logged_in.negotiated();
                self.wire = Some(logged_in.into_wire(&self.options, now));
                self.start_probe(now);
                tracing::info!(url = %self.options.url, repeat = self.waiting.len(), "session regained");
                true
            }
            Err(error) => {
                self.lost(&error, 0, None, now);
                true
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
        Wait {
            fd,
            writable: writable || self.wire.as_ref().is_some_and(Wire::wants_write),
            deadline: [backoff, deadline, session].into_iter().flatten().min(),
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
pub(super) fn own_job(command: Command) -> Job {
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
pub(super) fn chain(error: &dyn std::error::Error) -> String {
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
