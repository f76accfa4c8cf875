//! Keeps one vhost-user device supplied with a backend: waits for the backend's end on a thread of its own, starts or
//! seeks another one, and has the device go on with it. The guest runs all the while.
//!
//! ```text
//!            handshake done, queues started
//!   Away --------------------------------------> Served
//!    ^  \ not there, not fit: pause                |
//!    |   +--+  (none, 50 ms, ... 3 s)              | the connection ends
//!    |      |                                      |
//!    +------+<-------- killed if still there ------+
//! ```
//!
//! The connection is what counts, and not the process: a backend that hands its connection to another process goes on.
//! A process of ours whose connection is lost is killed and waited for, before its successor touches anything.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::backoff::Backoff;
use super::process::{IscsiVcp, VcpProcess, left_until};
use super::runtime_dir::RuntimeDir;
use crate::error::{Error, Result};
use crate::exit::{ExitReason, ExitSignal};
use crate::machine::status::BackendStatus;
use crate::virtio::vhost_user::channel::Channel;
use crate::virtio::vhost_user::front::{Front, make_sure_dead};
use crate::virtio::vhost_user::link::Link;
use crate::virtio::vhost_user::session::Session;

/// How long a process may take to end by itself once its connection is gone: it tells how it ended.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// Least time between two readings of a configuration that changes all the time.
const CONFIG_PAUSE: Duration = Duration::from_millis(20);
/// The same failure is not said again for so long.
const SAY_AGAIN: Duration = Duration::from_secs(30);

/// Where backends of a device come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Somebody else's process listens there.
    Socket(PathBuf),
    /// The monitor starts a `vcp-iscsi`: the program and what it is started with.
    Process(PathBuf, Box<IscsiVcp>),
}

/// Ends a keeper's waiting, whatever it waits for.
#[derive(Debug)]
struct Quit {
    event: OwnedFd,
    /// The connection on which the keeper waits for an answer.
    stream: Mutex<Option<UnixStream>>,
}

/// What others may know of a device's backend.
#[derive(Debug, Default)]
struct Facts {
    /// Process id, 0 if it is none of ours or gone.
    pid: AtomicU32,
    restarts: AtomicU64,
}

/// The thread that keeps one device.
#[derive(Debug)]
pub struct Keeper {
    quit: Arc<Quit>,
    front: Arc<Front>,
    facts: Arc<Facts>,
    thread: Option<std::thread::JoinHandle<Option<VcpProcess>>>,
}

impl Keeper {
    /// Keeps the device `front`, which has a backend now: `process`, if it is one of ours.
    pub fn start(
        front: Arc<Front>,
        channel: Option<Channel>,
        source: Source,
        process: Option<VcpProcess>,
        exit: ExitSignal,
    ) -> Result<Self> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let event = eventfd(0, flags).map_err(Error::os("create an eventfd"))?;
        let quit = Arc::new(Quit { event, stream: Mutex::new(None) });
        if let Some(process) = &process {
            front.set_process(Some(process.try_clone_pidfd()?));
        }
        let facts = Arc::new(Facts::default());
        facts.pid.store(process.as_ref().map_or(0, VcpProcess::pid), Ordering::Relaxed);
        let mut work = Work {
            facts: facts.clone(),
            name: front.name().to_owned(),
            front: front.clone(),
            channel,
            source,
            process,
            exit,
            quit: quit.clone(),
            backoff: Backoff::default(),
            said: None,
        };
        let thread = std::thread::Builder::new()
            .name(format!("{}-keeper", work.name))
            .spawn(move || {
                work.keep();
                work.process
            })
            .map_err(Error::os("start a thread"))?;
        Ok(Self { quit, front, facts, thread: Some(thread) })
    }

    /// What is known of the backend now.
    pub fn status(&self) -> BackendStatus {
        let pid = self.facts.pid.load(Ordering::Relaxed);
        BackendStatus {
            connected: self.front.is_connected(),
            pid: (pid != 0).then_some(pid),
            restarts: self.facts.restarts.load(Ordering::Relaxed),
            control: None,
        }
    }

    /// Ends the keeping; the device has the backend that it has. The process is given back, for its end in order.
    pub fn stop(mut self) -> Option<VcpProcess> {
        self.end()
    }

    fn end(&mut self) -> Option<VcpProcess> {
        // Fails only if the counter is full, and then it is signalled.
        let _ = rustix::io::write(&self.quit.event, &1u64.to_ne_bytes());
        if let Some(stream) = &*self.quit.stream.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        self.thread.take().and_then(|thread| thread.join().ok()).flatten()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the keeper's thread works with.
struct Work {
    facts: Arc<Facts>,
    name: String,
    front: Arc<Front>,
    channel: Option<Channel>,
    source: Source,
    process: Option<VcpProcess>,
    exit: ExitSignal,
    quit: Arc<Quit>,
    backoff: Backoff,
    /// The failure that was last said, and when.
    said: Option<(String, Instant)>,
}

/// What a wait has found.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    quit: bool,
    hung_up: bool,
    ended: bool,
    output: bool,
    channel: bool,
}

impl Work {
    fn keep(&mut self) {
        self.backoff.up(Instant::now());
        while let Some(reason) = self.watch() {
            let lost = Instant::now();
            if !self.front.recovers() {
                return self.give_up(reason);
            }
            tracing::warn!(device = self.name, "{reason}; the guest goes on when it is back");
            match self.recover() {
                Ok(()) => {
                    let away_ms = lost.elapsed().as_millis() as u64;
                    let pid = self.process.as_ref().map(VcpProcess::pid);
                    self.facts.pid.store(pid.unwrap_or(0), Ordering::Relaxed);
                    self.facts.restarts.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(device = self.name, pid, away_ms, "the backend is back");
                }
                Err(Error::Interrupted) => return,
                Err(Error::Unrecoverable { reason, .. }) => {
                    return self.give_up(format!("the vhost-user backend {reason}"));
                }
                Err(e) => return self.give_up(crate::chain(&e)),
            }
        }
    }

    fn give_up(&self, reason: String) {
        // The error that ends the run says it to the user.
        tracing::debug!(device = self.name, "{reason}");
        self.exit.give(ExitReason::BackendGone { device: self.name.clone(), reason });
    }

    /// Waits until the backend is gone, and says how it went; `None` when the keeping shall end.
    fn watch(&mut self) -> Option<String> {
        let stream = match self.front.stream() {
            Ok(stream) => stream,
            Err(e) => return Some(crate::chain(&e)),
        };
        let mut quiet_until = None;
        let mut ended = None;
        loop {
            let seen = self.wait(stream.as_ref(), quiet_until, ended.is_some());
            if seen.quit {
                return None;
            }
            if seen.hung_up || stream.is_none() {
                return Some(self.bury(ended));
            }
            if seen.output
                && let Some(process) = &mut self.process
            {
                process.drain();
            }
            if seen.ended {
                // If it has left its connection to another process, that one is the backend now.
                ended = self.process.as_mut().and_then(VcpProcess::ended);
                self.front.set_process(None);
                tracing::debug!(device = self.name, ended, "the VCP's process has ended");
            }
            if quiet_until.is_some_and(|until| until <= Instant::now()) {
                quiet_until = None;
            }
            if seen.channel {
                self.listen();
                quiet_until = Some(Instant::now() + CONFIG_PAUSE);
            }
        }
    }

    /// Waits for one of the things that concern a keeper. A channel that has just been read is left alone until
    /// `quiet_until`.
    fn wait(&self, stream: Option<&UnixStream>, quiet_until: Option<Instant>, ended: bool) -> Seen {
        let process = self.process.as_ref().filter(|_| !ended);
        let watched: [Option<(BorrowedFd<'_>, PollFlags)>; 5] = [
            Some((self.quit.event_fd(), PollFlags::IN)),
            // Not for input: replies are read where they are waited for.
            stream.map(|stream| (stream.as_fd(), PollFlags::RDHUP)),
            process.map(|process| (process.pidfd(), PollFlags::IN)),
            process.and_then(VcpProcess::stdout).map(|stdout| (stdout, PollFlags::IN)),
            self.channel
                .as_ref()
                .filter(|_| quiet_until.is_none())
                .map(|channel| (channel.as_fd(), PollFlags::IN)),
        ];
        let mut fds: Vec<_> =
            watched.iter().flatten().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        let left = quiet_until.map(left_until);
        if poll(&mut fds, left.as_ref()).is_err() {
            // Interrupted, or out of memory: the caller comes again.
            return Seen::default();
        }
        let mut fired = fds.iter().map(|fd| !fd.revents().is_empty());
        let mut next = |watched: &Option<_>| watched.is_some() && fired.next().unwrap_or(false);
        let [quit, hung_up, ended, output, channel] = [0, 1, 2, 3, 4].map(|i: usize| next(&watched[i]));
        Seen { quit, hung_up, ended, output, channel }
    }

    /// Reads the backend's own channel.
    fn listen(&mut self) {
        let Some(channel) = &mut self.channel else { return };
        let heard = match channel.read() {
            Ok(heard) => heard,
            Err(reason) => {
                tracing::warn!(device = self.name, "the backend's channel {reason}: it is read no more");
                self.channel = None;
                return;
            }
        };
        if heard.closed {
            self.channel = None;
        }
        if heard.config_change
            && let Err(e) = self.front.refresh_config()
        {
            tracing::warn!(device = self.name, error = %crate::chain(&e), "the backend's new configuration is not taken");
        }
    }

    /// Makes sure that the lost backend is gone, and tells how it went. `ended`: what is known of its process.
    fn bury(&mut self, ended: Option<String>) -> String {
        let mut reason = ended;
        if let Some(process) = &mut self.process {
            let mut fds = [PollFd::from_borrowed_fd(process.pidfd(), PollFlags::IN)];
            let patience = Timespec { tv_sec: 0, tv_nsec: LAST_WORDS.as_nanos() as i64 };
            if reason.is_none() && matches!(poll(&mut fds, Some(&patience)), Ok(1..)) {
                reason = process.ended();
            }
            if reason.is_none() {
                // It lives without its connection: hung, or out of step.
                match process.try_clone_pidfd().and_then(|pidfd| make_sure_dead(&self.name, &pidfd)) {
                    Ok(()) => {
                        process.ended();
                    }
                    Err(e) => {
                        tracing::error!(device = self.name, error = %crate::chain(&e), "a lost VCP cannot be killed");
                    }
                }
            }
        }
        let connection = self.front.detach().unwrap_or_else(|| "closed its connection".into());
        self.channel = None;
        // It has ended: nothing is waited for here.
        self.process = None;
        reason.unwrap_or_else(|| format!("the vhost-user backend {connection}"))
    }

    /// Gets the device another backend, however long it takes.
    fn recover(&mut self) -> Result<()> {
        loop {
            let pause = self.backoff.next(Instant::now());
            self.sleep(pause)?;
            match self.attempt() {
                Ok(()) => {
                    self.backoff.up(Instant::now());
                    self.said = None;
                    return Ok(());
                }
                Err(e @ (Error::Interrupted | Error::Unrecoverable { .. })) => return Err(e),
                Err(_) if self.quit.is_set() => return Err(Error::Interrupted),
                Err(e) => self.complain(&crate::chain(&e)),
            }
            self.process = None;
            self.channel = None;
            self.front.detach();
        }
    }

    fn sleep(&self, pause: Duration) -> Result<()> {
        let deadline = Instant::now() + pause;
        loop {
            let fd = self.quit.event_fd();
            let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
            match poll(&mut fds, Some(&left_until(deadline))) {
                Ok(0) => return Ok(()),
                Ok(_) => return Err(Error::Interrupted),
                Err(_) => {}
            }
        }
    }

    /// One attempt: a process if it is to be one of ours, a connection, a handshake, the queues.
    fn attempt(&mut self) -> Result<()> {
        let device = self.name.clone();
        let queues = self.front.kind().queue_max_sizes.len() as u16;
        let started = Instant::now();
        let link = match &self.source {
            Source::Socket(path) => Link::connect(&device, path, queues)?,
            Source::Process(program, vcp) => {
                // Gone again when this returns: a connection needs no name.
                let dir = RuntimeDir::create_unswept()?;
                let socket = dir.socket(&device);
                let mut process = VcpProcess::start(program, vcp, &socket)?;
                let pidfd = process.try_clone_pidfd()?;
                // It may take as long as its target is away.
                let ready = process.wait_ready(None, self.quit.event_fd());
                self.process = Some(process);
                ready?;
                tracing::debug!(
                    device,
                    ready_us = started.elapsed().as_micros() as u64,
                    "the new VCP is ready"
                );
                self.front.set_process(Some(pidfd));
                Link::connect(&device, &socket, queues)?
            }
        };
        self.quit.hold(Some(link.stream()?));
        if self.quit.is_set() {
            return Err(Error::Interrupted);
        }
        let attached = Session::start(&device, self.front.kind(), link).and_then(|(session, channel)| {
            self.channel = channel;
            self.front.attach(session)
        });
        self.quit.hold(None);
        tracing::debug!(device, done_us = started.elapsed().as_micros() as u64, "the attempt is over");
        attached
    }

    /// Says why there is no backend: once, and again when the reason is another one or much time has passed.
    fn complain(&mut self, failure: &str) {
        let now = Instant::now();
        let again = self.said.as_ref().is_none_or(|(said, at)| said != failure || now - *at >= SAY_AGAIN);
        if again {
            tracing::warn!(device = self.name, "{failure}; the guest waits, and it is tried again");
            self.said = Some((failure.to_owned(), now));
        }
    }
}

impl Quit {
    fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn is_set(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.event_fd(), PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..))
    }

    /// Remembers the connection that is waited on.
    fn hold(&self, stream: Option<UnixStream>) {
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
mod tests;
