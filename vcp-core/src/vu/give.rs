//! Hands everything over to a new process: the old one's steps, driven by the loop of the set-up thread.
//!
//! The new process's preparations are waited for on a thread of their own, so that the set-up thread serves on. Then it is
//! tried to catch a moment with nothing in flight: the connections stop between two messages, the data thread stops
//! taking chains, and if what is in flight ends within `DRAIN_LIMIT`, the state goes out. If not, everything goes on and
//! it is tried again a little later, until `GIVE_UP`.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFlags, Timespec};

use super::connection::wait_finished;
use super::port::{Command, What};
use super::server::Entry;
use crate::control::Control;
use crate::handover::Fds;
use crate::handover::anchor::Lifeline;
use crate::handover::giver::{GiveError, Giving, Successor};
use crate::handover::state::{
    DeviceState, FrontEndState, NotNow, PortState, RegionState, ServerState, SocketState,
};
use crate::mailbox::Mailbox;
use crate::process::chain;

/// How long requests may be in flight after the data thread stopped taking new ones. A healthy target answers in less;
/// for one that does not, standing still longer would be a pause that the guest feels.
const DRAIN_LIMIT: Duration = Duration::from_millis(30);
/// How long a connection may take to come between two messages.
const GATE_LIMIT: Duration = Duration::from_millis(20);
/// Between two tries. The tries take a small part of the time, so that the guest gets its work done.
const PAUSE: Duration = Duration::from_millis(200);
/// After so long without a quiet moment it is given up.
const GIVE_UP: Duration = Duration::from_secs(15);

/// An order to the data thread: stop, give out the state, and wait for the verdict.
#[derive(Debug)]
pub struct StopOrder {
    /// How long what is in flight may take to end.
    pub limit: Duration,
    /// What came of it. After an error the thread has gone on.
    pub answer: SyncSender<Result<Stopped, NotNow>>,
    /// How it goes on after a state was given. Without one it goes on as if nothing had happened.
    pub verdict: Receiver<Verdict>,
}

/// How a data thread that stopped goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As if nothing had happened.
    Stay,
    /// Not at all: another process is the owner.
    Gone,
}

/// The data thread's part of the state.
#[derive(Debug)]
pub struct Stopped {
    /// The devices.
    pub ports: Vec<PortState>,
    /// What else the data thread drives.
    pub sides: Vec<serde_json::Value>,
    /// What joins them.
    pub fabric: serde_json::Value,
    /// Their descriptors.
    pub fds: Fds,
    /// Of the [`ServerState`].
    pub stopped_ns: u64,
    /// Of the [`ServerState`].
    pub completed_ns: u64,
    /// Counters.
    pub metrics: serde_json::Value,
}

/// What came of a try.
#[derive(Debug)]
pub(super) enum Progress {
    /// It goes on.
    Pending,
    /// It came to nothing, for this reason.
    Failed(String),
    /// The other process is the owner. What is left here is an anchor at most.
    Given(Option<UnixStream>),
}

/// A hand-over under way.
pub(super) struct Give {
    /// Readable once the preparations ended.
    prepared: UnixStream,
    result: Receiver<Result<Successor, GiveError>>,
    successor: Option<Successor>,
    keep_pid: bool,
    next: Instant,
    until: Option<Instant>,
}

impl Give {
    /// Begins with the process behind `stream`. With `keep_pid` this one stays as its anchor.
    pub(super) fn start(
        stream: UnixStream,
        keep_pid: bool,
        giving: Giving,
        now: Instant,
    ) -> io::Result<Self> {
        let (prepared, guard) = UnixStream::pair()?;
        let (sender, result) = sync_channel(1);
        std::thread::Builder::new().name("hand-over".into()).spawn(move || {
            let _guard = guard;
            let _ = sender.send(Successor::accept(stream, &giving));
        })?;
        Ok(Self { prepared, result, successor: None, keep_pid, next: now, until: None })
    }

    /// What to wait for.
    pub(super) fn fd(&self) -> (&UnixStream, PollFlags) {
        let flags = if self.successor.is_none() { PollFlags::IN } else { PollFlags::empty() };
        (&self.prepared, flags)
    }

    /// How long to wait at most.
    pub(super) fn timeout(&self, now: Instant) -> Option<Timespec> {
        self.successor.as_ref()?;
        let left = self.next.saturating_duration_since(now);
        Some(Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() })
    }

    /// Moves on.
    pub(super) fn poll(
        &mut self,
        entries: &mut [Entry],
        control: &mut Control,
        mailbox: &Mailbox<Command>,
        lifeline: Option<&Lifeline>,
        now: Instant,
    ) -> Progress {
        if self.successor.is_none() {
            match self.result.try_recv() {
                Ok(Ok(successor)) => self.successor = Some(successor),
                Ok(Err(error)) => return Progress::Failed(chain(&error)),
                Err(std::sync::mpsc::TryRecvError::Empty) => return Progress::Pending,
                Err(_) => return Progress::Failed("the preparing thread panicked".into()),
            }
        }
        if now < self.next {
            return Progress::Pending;
        }
        let until = *self.until.get_or_insert(now + GIVE_UP);
        let Some(successor) = self.successor.take() else { return Progress::Pending };
        if successor.is_gone() {
            return Progress::Failed("the new process ended before it could take over".into());
        }
        match attempt(&successor, self.keep_pid, entries, control, mailbox, lifeline) {
            Ok(anchor) => {
                tracing::info!(pid = successor.pid, program = successor.program, "handed over");
                Progress::Given(anchor)
            }
            Err(Failed::NotNow(why)) if why.passes() && now < until => {
                tracing::debug!(%why, "no hand-over yet");
                self.next = Instant::now() + PAUSE;
                self.successor = Some(successor);
                Progress::Pending
            }
            Err(Failed::NotNow(why)) => {
                let why = match why.passes() {
                    true => format!("no quiet moment within {} s: {}", GIVE_UP.as_secs(), chain(&why)),
                    false => chain(&why),
                };
                successor.refuse(&why);
                Progress::Failed(why)
            }
            Err(Failed::Give(error)) => Progress::Failed(chain(&error)),
        }
    }
}

enum Failed {
    NotNow(NotNow),
    Give(GiveError),
}

impl<E: Into<NotNow>> From<E> for Failed {
    fn from(error: E) -> Self {
        Self::NotNow(error.into())
    }
}

/// One try. With an error everything goes on as before.
fn attempt(
    successor: &Successor,
    keep_pid: bool,
    entries: &mut [Entry],
    control: &Control,
    mailbox: &Mailbox<Command>,
    lifeline: Option<&Lifeline>,
) -> Result<Option<UnixStream>, Failed> {
    let gates = Gates::close(entries)?;
    let (verdict, verdicts) = sync_channel(1);
    let (sender, answer) = sync_channel(1);
    let order = StopOrder { limit: DRAIN_LIMIT, answer: sender, verdict: verdicts };
    mailbox.send(order_command(order));
    // The thread answers within the limit, or is held up by something outside; then it goes on once it is told nothing.
    let stopped = answer.recv_timeout(DRAIN_LIMIT + Duration::from_secs(1));
    let stopped = stopped.unwrap_or_else(|_| Err(NotNow::Busy("the data thread does not answer".into())))?;
    let Stopped { ports, sides, fabric, mut fds, stopped_ns, completed_ns, metrics } = stopped;
    let devices = entries.iter().zip(ports).map(|(entry, port)| device(entry, port, &mut fds));
    let devices = devices.collect::<io::Result<Vec<_>>>()?;
    let mut anchor = None;
    let lifeline = match lifeline {
        Some(lifeline) => Some(fds.put_copy(lifeline.stream())?),
        None if keep_pid => {
            let (ours, theirs) = UnixStream::pair()?;
            anchor = Some(ours);
            Some(fds.put(theirs.into()))
        }
        None => None,
    };
    // Whoever reads the log of this process reads that of the next one, if that takes its place.
    let log = if lifeline.is_some() { Some(fds.put_copy(std::io::stderr())?) } else { None };
    let (control, page) = control.export(&mut fds)?;
    let state = ServerState {
        stopped_ns,
        completed_ns,
        metrics,
        control,
        page,
        devices,
        sides,
        fabric,
        lifeline,
        log,
    };
    successor.give(state, &fds).map_err(Failed::Give)?;
    // From here on it is the other one's. The thread ends; it cannot be told otherwise any more.
    let _ = verdict.send(Verdict::Gone);
    gates.leave();
    Ok(anchor)
}

fn order_command(order: StopOrder) -> Command {
    // Nobody waits for the reply to the command itself.
    Command { device: 0, what: What::Stop(Box::new(order)), reply: sync_channel(1).0 }
}

fn device(entry: &Entry, port: PortState, fds: &mut Fds) -> io::Result<DeviceState> {
    let front_end = match &entry.connection {
        Some(connection) if !connection.thread.is_finished() => {
            let handler = connection.handler();
            let region = |(spec, file): (_, &std::fs::File)| -> io::Result<RegionState> {
                Ok(RegionState { spec, fd: fds.put_copy(file)? })
            };
            let memory = handler.memory().regions().map(region).collect::<io::Result<Vec<_>>>()?;
            let protocol = handler.protocol().bits();
            let (fd, status) = (fds.put_copy(&connection.stream)?, handler.status);
            Some(FrontEndState { fd, protocol, status, memory })
        }
        _ => None,
    };
    let socket: SocketState = entry.socket.export(fds)?;
    Ok(DeviceState { name: entry.name.to_string(), socket, front_end, port })
}

/// The gates of all connections, closed. Open again when dropped.
struct Gates(Vec<std::sync::Arc<super::gate::Gate>>);

impl Gates {
    fn close(entries: &[Entry]) -> Result<Self, NotNow> {
        let mut closed = Self(Vec::new());
        for entry in entries {
            let Some(connection) = &entry.connection else { continue };
            if connection.gate.close(GATE_LIMIT) {
                closed.0.push(std::sync::Arc::clone(&connection.gate));
            } else if !wait_finished(&connection.thread, Duration::ZERO) {
                return Err(NotNow::Busy(format!("{}: its front end is setting it up", entry.name)));
            }
        }
        Ok(closed)
    }

    fn leave(mut self) {
        self.0.drain(..).for_each(|gate| gate.leave());
    }
}

impl Drop for Gates {
    fn drop(&mut self) {
        self.0.iter().for_each(|gate| gate.open());
    }
}
