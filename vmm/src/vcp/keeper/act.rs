//! What the keeper does about an event, as [`super::super::life`] has decided.

use std::time::{Duration, Instant};

use super::work::{STANDBY_AFTER, Work};
use super::{Reply, Source};
use crate::error::Result;
use crate::exit::ExitReason;
use crate::machine::command::RateLimits;
use crate::vcp::attach::Target;
use crate::vcp::life::{Action, Event, State};
use crate::vcp::process::{First, VcpProcess};
use crate::vcp::threads;
use crate::vcp::watchdog::LOOK_EVERY;

/// The same failure is not said again for so long.
const SAY_AGAIN: Duration = Duration::from_secs(30);
/// How long a process that has handed over, or that is not wanted, may take to end.
const LEAVE_LIMIT: Duration = Duration::from_secs(2);

impl Work {
    /// Carries out one action; what it leads to at once.
    pub(super) fn act(&mut self, action: Action, now: Instant) -> Option<Event> {
        match action {
            Action::Start => self.start_process().err().map(|e| Event::Ended(crate::chain(&e))),
            Action::Attach => {
                let target = match (&self.source, &self.process) {
                    (Source::Socket(path), _) => Target::Path(path.clone()),
                    (Source::Process(..), Some(process)) => match process.try_clone_pidfd() {
                        Ok(pidfd) => Target::Process(process.front(), pidfd),
                        Err(e) => return Some(Event::Failed(crate::chain(&e))),
                    },
                    (Source::Process(..), None) => return Some(Event::Failed("has no process".into())),
                };
                self.attacher.attach(target);
                None
            }
            Action::Kill => {
                self.attacher.cancel();
                self.process.as_ref().map(VcpProcess::kill);
                None
            }
            Action::Detach => {
                self.say_lost(now);
                // It has ended: nothing is waited for here.
                self.process = None;
                (self.stream, self.channel, self.refreshing) = (None, None, false);
                self.attacher.detach();
                None
            }
            Action::StartSuccessor => {
                let (Source::Process(program, vcp), Some(old)) = (&self.source, &self.process) else {
                    return None;
                };
                match VcpProcess::take_over(program, vcp, old) {
                    Ok(successor) => {
                        self.successor = Some(successor);
                        None
                    }
                    Err(e) => {
                        let why = crate::chain(&e);
                        self.answer(&Err(why.clone()));
                        Some(Event::NotUpgraded(why))
                    }
                }
            }
            Action::Adopt => {
                let successor = self.successor.take();
                if let Some(Ok(pidfd)) = successor.as_ref().map(VcpProcess::try_clone_pidfd) {
                    self.attacher.process(pidfd);
                }
                let stopped_us = successor.as_ref().map(|new| new.beat().stopped_ns / 1000);
                let pid = successor.as_ref().map(VcpProcess::pid);
                let old = std::mem::replace(&mut self.process, successor);
                self.leave(old);
                tracing::info!(device = self.name, pid, stopped_us, "another VCP has taken over");
                self.renewed(now);
                self.answer(&Ok(()));
                None
            }
            Action::DropSuccessor => {
                let successor = self.successor.take();
                self.answer(&Err("the new process did not take over in time; the old one goes on".into()));
                successor.as_ref().map(VcpProcess::kill);
                self.leave(successor);
                None
            }
            Action::GiveUp(reason) => {
                // The error that ends the run says it to the user.
                tracing::debug!(device = self.name, "{reason}");
                self.exit.give(ExitReason::BackendGone { device: self.name.clone(), reason });
                None
            }
        }
    }

    fn start_process(&mut self) -> Result<()> {
        let Source::Process(program, vcp) = &self.source else { return Ok(()) };
        if let Some(mut standby) = self.standby.take()
            && standby.ended().is_none()
        {
            standby.go();
            self.process = Some(standby);
            return Ok(());
        }
        self.process = Some(VcpProcess::start(program, vcp, First::Serve)?);
        Ok(())
    }

    /// The guest is served again.
    pub(super) fn back(&mut self, now: Instant) {
        self.said = None;
        let away = self.life.facts.last_away.unwrap_or_default();
        let pid = self.process.as_ref().map(VcpProcess::pid);
        let (away_ms, away_us) = (away.as_millis() as u64, away.as_micros() as u64);
        let parts = self.life.facts.last_parts;
        let [death_us, start_us, attach_us] =
            [parts.death, parts.start, parts.attach].map(|part| part.as_micros() as u64);
        tracing::warn!(
            device = self.name,
            pid,
            away_ms,
            away_us,
            death_us,
            start_us,
            attach_us,
            "the backend is back"
        );
        self.renewed(now);
        self.answer(&Ok(()));
    }

    /// Another process serves.
    pub(super) fn renewed(&mut self, now: Instant) {
        self.dog.reset();
        self.look_at = now + LOOK_EVERY;
        // One that stands by may be of another version, or on another CPU.
        self.drop_standby(now);
        if let Some(cpus) = self.pin.clone()
            && let Err(e) = self.pin(cpus)
        {
            tracing::warn!(device = self.name, error = e, "the VCP cannot be pinned again");
        }
    }

    /// Has another process stand by instead of the one that does.
    fn drop_standby(&mut self, now: Instant) {
        if let Some(standby) = self.standby.take() {
            standby.kill();
            self.leave(Some(standby));
        }
        self.standby_at = now + STANDBY_AFTER;
    }

    /// What processes that are started from now on are limited to.
    pub(super) fn limit(&mut self, limits: &RateLimits) -> std::result::Result<(), String> {
        let Source::Process(_, vcp) = &mut self.source else {
            return Err("its backend is not a process of this monitor: limit it there".into());
        };
        for (option, limit) in [("--limit-iops", limits.iops), ("--limit-bps", limits.bytes_per_s)] {
            if let Some(limit) = limit {
                vcp.set_option(option, (limit != 0).then(|| limit.to_string()));
            }
        }
        // The one that stands by was started without them.
        self.drop_standby(Instant::now());
        Ok(())
    }

    /// Lets a process end that is not watched any more.
    fn leave(&mut self, process: Option<VcpProcess>) {
        let Some(process) = process else { return };
        if let Some((last, _)) = self.leaving.replace((process, Instant::now() + LEAVE_LIMIT)) {
            last.kill();
        }
    }

    /// A restart or an upgrade that the user wants.
    pub(super) fn replace(&mut self, event: Event, reply: Reply) {
        if !matches!(self.source, Source::Process(..)) {
            return reply(Err("its backend is not a process of this monitor".into()));
        }
        if self.life.state() != &State::Serving || self.process.is_none() {
            let state = self.life.state().name();
            return reply(Err(format!("its VCP is {state} now: try again when it serves")));
        }
        self.waiting.push(reply);
        self.on(event);
    }

    pub(super) fn answer(&mut self, how: &std::result::Result<(), String>) {
        // Who is told looks at once.
        self.publish();
        for reply in self.waiting.drain(..) {
            reply(how.clone());
        }
    }

    pub(super) fn pin(&mut self, cpus: Vec<usize>) -> std::result::Result<(), String> {
        let Some(process) = &self.process else { return Err("there is no VCP at the moment".into()) };
        threads::pin(process.pid(), threads::DATA, &cpus)?;
        if let Source::Process(_, vcp) = &mut self.source {
            vcp.cpu = match cpus[..] {
                [cpu] => Some(cpu),
                _ => None,
            };
        }
        self.pin = Some(cpus);
        self.publish();
        Ok(())
    }

    /// Says that the guest has no backend, or still has none, and why: once, and again when the reason is another one or
    /// much time has passed.
    fn say_lost(&mut self, now: Instant) {
        let why = self.life.facts.last_death.clone().unwrap_or_default();
        if self.stream.is_some() {
            tracing::warn!(device = self.name, "{why}; the guest goes on when it is back");
            return;
        }
        let again = self.said.as_ref().is_none_or(|(said, at)| *said != why || now - *at >= SAY_AGAIN);
        if again {
            tracing::warn!(device = self.name, "{why}; the guest waits, and it is tried again");
            self.said = Some((why, now));
        }
    }

    pub(super) fn publish(&self) {
        self.board.put(&self.life, self.process.as_ref(), &self.source);
    }
}
