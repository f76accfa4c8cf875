//! [`IscsiEngine`]: a logical unit of an iSCSI target as an [`Engine`](crate::engine::Engine).
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
mod log;
mod look;
mod observe;
mod opening;
mod outcomes;
mod path;
mod seam;
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
use vcp_core::mem::GuestBuf;

use super::Options;
use super::client::Negotiated;
use super::job::{Job, Jobs, Payload};
use super::probe::{Found, PROBE_BUFFER_BYTES};
use super::wire::{RX_STAGING_BYTES, WireError};
use crate::engine::{Completion, Lun, Op};
use crate::recorder::{PDUS, Recorder};
use log::LogLimit;
pub(in crate::portal) use log::chain;
use observe::Observer;
pub use path::{MAX_PATHS, PathStats};
use path::{Path, Phase};
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

/// A command of the engine's own, with memory of its own.
pub(in crate::portal) fn own_job(command: Command) -> Job {
    Job::new(command, Op::Read, GuestBuf::for_test(PROBE_BUFFER_BYTES), Payload::Guest)
}

#[derive(Debug, thiserror::Error)]
#[error("the session was logged out")]
struct LoggedOut;
