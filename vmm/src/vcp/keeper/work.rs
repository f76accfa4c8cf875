//! The keeper's thread: what it hears, and when it looks.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::{Order, Reply, Source};
use crate::exit::ExitSignal;
use crate::vcp::attach::{Attacher, Report};
use crate::vcp::backoff::Backoff;
use crate::vcp::dialer::Dialer;
use crate::vcp::life::{Event, Life, State};
use crate::vcp::process::{First, Said, VcpProcess, left_until};
use crate::vcp::report::Board;
use crate::vcp::watchdog::{LOOK_EVERY, Watchdog};
use crate::virtio::vhost_user::channel::Channel;
use crate::virtio::vhost_user::front::Front;

/// Least time between two readings of a configuration that changes all the time.
const CONFIG_PAUSE: Duration = Duration::from_millis(20);
/// How long the guest is served before a process is started that stands by: what is in a hurry goes first.
pub(super) const STANDBY_AFTER: Duration = Duration::from_millis(300);

/// What the keeper's thread works with.
pub(super) struct Work {
    pub(super) name: String,
    pub(super) front: Arc<Front>,
    pub(super) attacher: Attacher,
    pub(super) life: Life,
    pub(super) source: Source,
    pub(super) process: Option<VcpProcess>,
    /// Takes over from `process`.
    pub(super) successor: Option<VcpProcess>,
    pub(super) standby: Option<VcpProcess>,
    /// Ends by itself until then, or is killed.
    pub(super) leaving: Option<(VcpProcess, Instant)>,
    pub(super) stream: Option<UnixStream>,
    pub(super) channel: Option<Channel>,
    /// The channel is left alone until then.
    pub(super) quiet_until: Option<Instant>,
    pub(super) refreshing: bool,
    pub(super) dog: Watchdog,
    pub(super) look_at: Instant,
    /// When the process that connects is looked at next.
    pub(super) dialer_at: Instant,
    pub(super) standby_at: Instant,
    pub(super) standby_pauses: Backoff,
    /// Where the data thread is to run, if the user has said so since the start.
    pub(super) pin: Option<Vec<usize>>,
    /// Who waits for a restart or an upgrade.
    pub(super) waiting: Vec<Reply>,
    pub(super) board: Arc<Board>,
    pub(super) orders: Receiver<Order>,
    pub(super) event: Arc<OwnedFd>,
    pub(super) exit: ExitSignal,
    /// The failure that was last said, and when.
    pub(super) said: Option<(String, Instant)>,
}

/// What a descriptor that fired belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Orders,
    Reports,
    Stream,
    Channel,
    Ended,
    Output,
    SuccessorEnded,
    SuccessorOutput,
    StandbyEnded,
    StandbyOutput,
    Left,
    DialerEnded,
}

impl Work {
    pub(super) fn keep(&mut self) {
        loop {
            let fired = self.wait();
            for what in fired {
                if self.hear(what) {
                    return;
                }
            }
            self.time();
        }
    }

    /// Waits for something that concerns a keeper.
    fn wait(&self) -> Vec<Heard> {
        use Heard::{
            Channel, DialerEnded, Ended, Left, Orders, Output, Reports, StandbyEnded, StandbyOutput, Stream,
            SuccessorEnded, SuccessorOutput,
        };
        let dialer = self.dialer().and_then(|dialer| dialer.watch());
        let mut watched: Vec<(Heard, BorrowedFd<'_>, PollFlags)> = vec![
            (Orders, self.event.as_fd(), PollFlags::IN),
            (Reports, self.attacher.event(), PollFlags::IN),
        ];
        if let Some(dialer) = &dialer {
            // Before the ends of those that it served: what replaces them needs another one.
            watched.push((DialerEnded, dialer.as_fd(), PollFlags::IN));
        }
        if self.life.serves()
            && let Some(stream) = &self.stream
        {
            // Not for input: replies are read where they are waited for.
            watched.push((Stream, stream.as_fd(), PollFlags::RDHUP));
        }
        if let (Some(channel), None, false) = (&self.channel, self.quiet_until, self.refreshing) {
            watched.push((Channel, channel.as_fd(), PollFlags::IN));
        }
        let processes = [
            (&self.process, Ended, Output),
            (&self.successor, SuccessorEnded, SuccessorOutput),
            (&self.standby, StandbyEnded, StandbyOutput),
        ];
        for (process, ended, output) in processes {
            let Some(process) = process else { continue };
            // What it said comes before how it ended.
            if let Some(stdout) = process.stdout() {
                watched.push((output, stdout, PollFlags::IN));
            }
            if !process.has_ended() {
                watched.push((ended, process.pidfd(), PollFlags::IN));
            }
        }
        if let Some((process, _)) = &self.leaving {
            watched.push((Left, process.pidfd(), PollFlags::IN));
        }
        let mut fds: Vec<_> =
            watched.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        let left = self.deadline().map(left_until);
        if poll(&mut fds, left.as_ref()).is_err() {
            // Interrupted, or out of memory: the caller comes again.
            return Vec::new();
        }
        fds.iter().zip(&watched).filter(|(fd, _)| !fd.revents().is_empty()).map(|(_, w)| w.0).collect()
    }

    fn deadline(&self) -> Option<Instant> {
        let serving = self.life.serves() && self.process.is_some();
        let wants_standby = serving && self.standby.is_none() && self.wants_standby();
        [
            self.life.deadline(),
            self.quiet_until,
            serving.then_some(self.look_at),
            self.dialer().is_some().then_some(self.dialer_at),
            wants_standby.then_some(self.standby_at),
            self.leaving.as_ref().map(|(_, at)| *at),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Something has happened. True if the keeping is over.
    fn hear(&mut self, what: Heard) -> bool {
        match what {
            Heard::Orders => {
                let _ = rustix::io::read(&*self.event, &mut [0; 8]);
                while let Ok(order) = self.orders.try_recv() {
                    match order {
                        Order::Stop => return true,
                        Order::Pin(cpus, reply) => reply(self.pin(cpus)),
                        Order::Limit(limits, reply) => reply(self.limit(&limits)),
                        Order::Restart(reply) => self.replace(Event::Restart, reply),
                        Order::Upgrade(reply) => self.replace(Event::Upgrade, reply),
                    }
                }
            }
            Heard::Reports => {
                while let Some(report) = self.attacher.report() {
                    self.report(report);
                }
            }
            Heard::Stream => {
                let how = self.front.failure().unwrap_or_else(|| "closed its connection".into());
                self.on(Event::Lost(format!("the vhost-user backend {how}")));
            }
            Heard::Channel => self.listen(),
            Heard::Ended => {
                if let Some(how) = self.process.as_mut().and_then(VcpProcess::ended) {
                    // Killed at start, or at work: either way the handshake with it is over.
                    self.attacher.cancel();
                    self.on(Event::Ended(how));
                }
            }
            Heard::Output => {
                if self.process.as_mut().and_then(VcpProcess::listen) == Some(Said::Ready) {
                    self.on(Event::Ready);
                }
            }
            Heard::SuccessorOutput => {
                if self.successor.as_mut().and_then(VcpProcess::listen) == Some(Said::Ready) {
                    self.on(Event::Upgraded);
                }
            }
            Heard::SuccessorEnded => {
                // It may have spoken just before.
                if self.successor.as_mut().and_then(VcpProcess::listen) == Some(Said::Ready) {
                    self.on(Event::Upgraded);
                } else if let Some(how) = self.successor.as_mut().and_then(VcpProcess::ended) {
                    self.answer(&Err(format!("{how} before it took over; the old one goes on")));
                    self.on(Event::NotUpgraded(how));
                }
            }
            Heard::StandbyOutput => {
                if let Some(standby) = &mut self.standby {
                    standby.listen();
                }
            }
            Heard::StandbyEnded => {
                if let Some(how) = self.standby.as_mut().and_then(VcpProcess::ended) {
                    tracing::warn!(device = self.name, "{how}, which stood by");
                    self.standby = None;
                    let now = Instant::now();
                    self.standby_at = now + self.standby_pauses.next(now).max(STANDBY_AFTER);
                }
            }
            Heard::Left => self.leaving = None,
            Heard::DialerEnded => self.lost_dialer(),
        }
        false
    }

    /// What is due.
    fn time(&mut self) {
        let now = Instant::now();
        if self.quiet_until.is_some_and(|until| until <= now) {
            self.quiet_until = None;
        }
        if self.life.deadline().is_some_and(|at| at <= now) {
            self.on(Event::Time);
        }
        if let Some((process, _)) = self.leaving.take_if(|(_, at)| *at <= now) {
            process.kill();
        }
        if self.dialer_at <= now
            && let Some(dialer) = self.dialer()
        {
            // Whether the guest is served or not: a VCP that is being started waits for it.
            if let Some(silent) = dialer.look() {
                tracing::warn!(
                    device = self.name,
                    "the process that connects for the VCP has not answered for {silent:?}: it is killed"
                );
            }
            self.dialer_at = now + LOOK_EVERY;
        }
        if !self.life.serves() {
            return;
        }
        if self.look_at <= now {
            self.look_at = now + LOOK_EVERY;
            self.look();
        }
        if self.standby_at <= now && self.standby.is_none() && self.wants_standby() {
            self.stand_by(now);
        }
    }

    /// Looks whether the data loop moves.
    fn look(&mut self) {
        let Some(process) = self.process.as_ref().filter(|process| !process.has_ended()) else { return };
        let beat = process.beat();
        let holds_work = beat.inflight > 0 || self.front.holds_work();
        if let Some(time) = self.dog.look(beat.passes, holds_work) {
            self.on(Event::Stalled(time));
        }
    }

    /// What connects for the disk's processes.
    fn dialer(&self) -> Option<&Arc<Dialer>> {
        match &self.source {
            Source::Process(_, vcp) => vcp.dialer.as_ref(),
            Source::Socket(_) => None,
        }
    }

    /// Nobody connects any more for the processes that are there: others take their place, with another dialer.
    fn lost_dialer(&mut self) {
        let Some(dialer) = self.dialer() else { return };
        let how = dialer.forget();
        tracing::warn!(
            device = self.name,
            how,
            "the process that connects for the VCP ended: both are started anew"
        );
        for process in [&self.process, &self.standby, &self.successor].into_iter().flatten() {
            process.kill();
        }
    }

    fn wants_standby(&self) -> bool {
        matches!(&self.source, Source::Process(_, vcp) if vcp.standby) && self.life.state() == &State::Serving
    }

    fn stand_by(&mut self, now: Instant) {
        let Source::Process(program, vcp) = &self.source else { return };
        match VcpProcess::start(program, vcp, First::StandBy) {
            Ok(process) => {
                self.standby = Some(process);
                self.standby_pauses.up(now);
            }
            Err(e) => {
                tracing::warn!(device = self.name, error = %crate::chain(&e), "no process can stand by");
                self.standby_at = now + self.standby_pauses.next(now).max(STANDBY_AFTER);
            }
        }
        self.publish();
    }

    /// Reads the backend's own channel.
    fn listen(&mut self) {
        let Some(channel) = &mut self.channel else { return };
        match channel.read() {
            Ok(heard) => {
                if heard.closed {
                    self.channel = None;
                }
                if heard.config_change {
                    self.refreshing = true;
                    self.attacher.refresh();
                }
            }
            Err(reason) => {
                tracing::warn!(device = self.name, "the backend's channel {reason}: it is read no more");
                self.channel = None;
            }
        }
    }

    fn report(&mut self, report: Report) {
        match report {
            Report::Attached(stream, channel) => {
                self.stream = Some(stream);
                self.channel = channel;
                self.on(Event::Attached);
            }
            Report::Failed(why) => self.on(Event::Failed(why)),
            Report::Hopeless(why) => self.on(Event::Hopeless(why)),
            Report::Refreshed => {
                self.refreshing = false;
                self.quiet_until = Some(Instant::now() + CONFIG_PAUSE);
            }
        }
    }

    /// Takes an event, and all that follows from it.
    pub(super) fn on(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let now = Instant::now();
            let served = self.life.serves();
            let actions = self.life.on(event, now);
            for action in actions {
                if let Some(next) = self.act(action, now) {
                    events.push_back(next);
                }
            }
            if self.life.serves() && !served {
                self.back(now);
            }
        }
        self.publish();
    }

    /// The end of the keeping.
    pub(super) fn finish(mut self) -> Option<VcpProcess> {
        self.life.stop();
        self.answer(&Err("the machine ends".into()));
        // Nobody waits for these.
        for process in [self.standby.take(), self.successor.take()].into_iter().flatten() {
            process.kill();
        }
        let served = self.stream.is_some();
        self.attacher.end();
        if !served && let Some(process) = &self.process {
            process.kill();
        }
        self.process
    }
}
