//! Joins everything: socket files, connections, the data thread, the control socket and signals.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::connection::{Connection, hung_up, wait_finished};
use super::give::{Give, Progress};
use super::handler::{Facts, Handler};
use super::listen::{ListenError, SocketFile};
use super::port::{Answer, Command, Port, What};
use crate::ask::Ask;
use crate::control::{AskSource, Control, StatusSource, TakeOver};
use crate::device::RingDevice;
use crate::fabric::{Apart, Fabric};
use crate::handover::anchor::{Lifeline, Word};
use crate::handover::giver::Giving;
use crate::handover::state::BadState;
use crate::handover::taker::TakeError;
use crate::http::HttpServer;
use crate::mailbox::Mailbox;
use crate::metrics::{DeviceMetrics, LoopMetrics};
use crate::poll::{CpuError, DataLoop, PollMode, Share, Side, check_cpu, pin_to};
use crate::process::Signals;
use crate::pulse::Pulse;
use crate::uring::Ring;

/// How long a front end that reconnects waits for its previous connection to be taken down. Messages already sent on
/// it are still carried out first.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a second front end waits for the first one to leave before it is refused: a child of the first, between its
/// fork and its exec, holds the connection for a moment after it was closed.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(50);

/// How long a question to a device waits for the data thread; the set-up thread does nothing else meanwhile.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the data thread may take to end. It keeps to far less by itself, unless something outside holds it.
const END_TIMEOUT: Duration = Duration::from_secs(4);

/// One device to serve.
#[derive(Debug)]
pub struct DeviceSpec<D> {
    /// Name in logs and metrics.
    pub name: Arc<str>,
    /// Where front ends connect. Listening from before the device exists, so that two processes never both open what
    /// is behind the same socket.
    pub socket: SocketFile,
    /// The device model.
    pub device: D,
}

/// How to serve.
#[derive(Debug, Default)]
pub struct ServeOptions {
    /// Hardware thread of the data thread.
    pub cpu: Option<usize>,
    /// What an idle data thread does.
    pub poll: PollMode,
    /// How much of its time an idle data thread may look for work.
    pub poll_share: Share,
    /// The page that a supervisor reads.
    pub pulse: Option<Arc<Pulse>>,
    /// Control socket. It is there already: a confined process opens none.
    pub control: Option<SocketFile>,
    /// Page of metrics.
    pub metrics: Option<HttpServer>,
    /// What another process is offered that wants to take over; without it none can.
    pub giving: Option<Giving>,
    /// For the data thread, instead of plain system calls.
    pub ring: Mutex<Option<Ring>>,
    /// What else the data thread drives: names and fronts. Only for the poll loop.
    pub sides: Mutex<Vec<NamedSide>>,
}

/// A side and its name in logs and metrics.
pub type NamedSide = (Arc<str>, Box<dyn Side>);

impl ServeOptions {
    /// The sides, for the one data thread.
    pub(super) fn take_sides(&self) -> Vec<NamedSide> {
        std::mem::take(&mut *self.sides.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The ring, for the one data thread.
    pub(super) fn take_ring(&self) -> Option<Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Why a VCP cannot serve, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket file.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The hardware thread.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// The system refused something at start.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nothing was taken over: the old process said or did something else.
    #[error("cannot take over")]
    Take(#[from] TakeError),
    /// Nothing was taken over: the state cannot be gone on from.
    #[error("cannot take over")]
    State(#[from] BadState),
    /// The data thread ended by itself.
    #[error("the data thread ended: {0}")]
    DataThread(String),
}

pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> ServeError {
    move |source| ServeError::System { what, source: source.into() }
}

/// A device as the set-up thread sees it.
pub(super) struct Entry {
    pub(super) name: Arc<str>,
    pub(super) socket: SocketFile,
    pub(super) facts: Facts,
    pub(super) metrics: Arc<DeviceMetrics>,
    pub(super) connection: Option<Connection>,
}

/// Why a server ended without an error.
#[derive(Debug)]
#[must_use]
pub enum End {
    /// A signal asked for it.
    Signal,
    /// Another process is the owner. With a lifeline, this one has to stay as its [`anchor`](crate::handover::anchor).
    HandedOver(Option<UnixStream>),
}

/// Serves `devices` until a signal asks to end. `ready` is called once, when front ends can connect; `extra` adds the
/// application's own part to the control socket's answers.
///
/// # Errors
/// [`ServeError`].
pub fn serve<D: RingDevice>(
    devices: Vec<DeviceSpec<D>>,
    options: ServeOptions,
    signals: &Signals,
    extra: StatusSource,
    ready: impl FnOnce(),
) -> Result<End, ServeError> {
    serve_joined(devices, Apart, options, signals, extra, ready)
}

/// As [`serve`], of devices that `fabric` joins.
///
/// # Errors
/// [`ServeError`].
pub fn serve_joined<D: RingDevice, F: Fabric<D>>(
    devices: Vec<DeviceSpec<D>>,
    fabric: F,
    mut options: ServeOptions,
    signals: &Signals,
    extra: StatusSource,
    ready: impl FnOnce(),
) -> Result<End, ServeError> {
    if let Some(cpu) = options.cpu {
        check_cpu(cpu)?;
    }
    let mailbox = Arc::new(Mailbox::new().map_err(system("create an event descriptor"))?);
    let loop_metrics = Arc::new(LoopMetrics::default());
    let (mut entries, mut ports) = (Vec::new(), Vec::new());
    for spec in devices {
        let facts = Facts::of(&spec.device);
        let metrics = Arc::clone(spec.device.metrics());
        let (name, socket) = (Arc::clone(&spec.name), spec.socket);
        entries.push(Entry { name, socket, facts, metrics, connection: None });
        ports.push(Port::new(spec.name, spec.device));
    }
    let mut parts: Vec<_> =
        entries.iter().map(|entry| (Arc::clone(&entry.name), Arc::clone(&entry.metrics))).collect();
    let mut sides = Vec::new();
    for (name, side) in options.take_sides() {
        parts.push((name, side.metrics()));
        sides.push(side);
    }
    let ask = ask_device(Arc::clone(&mailbox));
    let (socket, http) = (options.control.take(), options.metrics.take());
    let control = Control::new(socket, http, Arc::clone(&loop_metrics), parts, ask, extra);
    let data = DataLoop::new(ports, fabric, Arc::clone(&mailbox), options.poll, Arc::default(), loop_metrics)
        .map_err(system("create an epoll instance"))?
        .with_sides(sides)
        .with_ring(options.take_ring())
        .supervised(options.pulse.clone(), options.poll_share);
    let server = Server::start(entries, control, data, mailbox, &options)?;
    ready();
    server.run(signals)
}

/// Everything that runs.
pub(super) struct Server {
    pub(super) entries: Vec<Entry>,
    control: Control,
    mailbox: Arc<Mailbox<Command>>,
    data: DataThread,
    giving: Option<Giving>,
    give: Option<Give>,
    /// The connection to the anchor, in a process that took over.
    pub(super) lifeline: Option<Lifeline>,
}

impl Server {
    /// Starts the data thread.
    pub(super) fn start<D: RingDevice, F: Fabric<D>>(
        entries: Vec<Entry>,
        control: Control,
        data: DataLoop<D, F>,
        mailbox: Arc<Mailbox<Command>>,
        options: &ServeOptions,
    ) -> Result<Self, ServeError> {
        let data = DataThread::start(data, options.cpu, &mailbox)?;
        let giving = options.giving.clone();
        Ok(Self { entries, control, mailbox, data, giving, give: None, lifeline: None })
    }

    /// Serves until it is over, and ends everything in order.
    pub(super) fn run(mut self, signals: &Signals) -> Result<End, ServeError> {
        let result = self.accept_loop(signals);
        let Self { mut entries, mut control, data, lifeline, .. } = self;
        let given = matches!(result, Ok(End::HandedOver(_)));
        // The data thread first: it lets what is in flight end while the front ends are still there.
        let ended = data.end();
        for entry in &mut entries {
            if given {
                entry.socket.release();
            }
            if let Some(connection) = entry.connection.take() {
                if !given {
                    let _ = connection.stream.shutdown(Shutdown::Both);
                }
                // It may wait for an answer of the data thread that never comes; the process ends without it.
                let _ = wait_finished(&connection.thread, Duration::from_millis(100));
            }
        }
        if given {
            control.release();
        } else if let Some(lifeline) = lifeline
            && result.is_ok()
            && ended.is_ok()
        {
            lifeline.finish();
        }
        ended.and(result)
    }

    /// Accepts until a signal comes, the data thread ends, or another process has taken over.
    fn accept_loop(&mut self, signals: &Signals) -> Result<End, ServeError> {
        loop {
            let mut fds = vec![PollFd::new(signals, PollFlags::IN), PollFd::new(&self.data, PollFlags::IN)];
            fds.extend(self.entries.iter().map(|entry| PollFd::new(&entry.socket, PollFlags::IN)));
            fds.extend(self.control.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            let give = self.give.as_ref().map(Give::fd);
            fds.extend(give.map(|(fd, flags)| PollFd::new(fd, flags)));
            let lifeline = self.lifeline.as_ref().map(Lifeline::stream);
            fds.extend(lifeline.map(|fd| PollFd::new(fd, PollFlags::IN)));
            let give = self.give.as_ref().and_then(|give| give.timeout(Instant::now()));
            let timeout = [give, self.control.timeout()].into_iter().flatten().min();
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(system("wait for connections")(error)),
            }
            let fired: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            if fired[0]
                && let Some(signal) = signals.take()
            {
                tracing::info!(signal, "ending");
                return Ok(End::Signal);
            }
            if fired[1] {
                return Ok(End::Signal);
            }
            match self.lifeline.as_mut().map_or(Word::None, Lifeline::listen) {
                Word::None => {}
                Word::Signal(signal) => {
                    tracing::info!(signal, "ending");
                    return Ok(End::Signal);
                }
                // Killed, and so is this process: whoever did it may start the disk again at any moment.
                Word::End => std::process::exit(1),
            }
            for (index, entry) in self.entries.iter_mut().enumerate() {
                if fired[2 + index] {
                    accept(index, entry, &self.mailbox);
                }
            }
            self.control.allow_take_over(match (&self.giving, &self.give) {
                (None, _) => TakeOver::Never,
                (Some(_), None) => TakeOver::Free,
                (Some(_), Some(_)) => TakeOver::Busy,
            });
            self.control.serve();
            if let Some(anchor) = self.hand_over() {
                return Ok(End::HandedOver(anchor));
            }
        }
    }

    /// Moves a hand-over on, if one is wanted; what it left here once it is done.
    fn hand_over(&mut self) -> Option<Option<UnixStream>> {
        let now = Instant::now();
        if let (Some(wanted), Some(giving)) = (self.control.take_successor(), &self.giving) {
            match Give::start(wanted.stream, wanted.keep_pid, giving.clone(), now) {
                Ok(give) => self.give = Some(give),
                Err(error) => tracing::warn!(%error, "a hand-over was refused"),
            }
        }
        let give = self.give.as_mut()?;
        match give.poll(&mut self.entries, &mut self.control, &self.mailbox, self.lifeline.as_ref(), now) {
            Progress::Pending => None,
            Progress::Failed(why) => {
                self.give = None;
                tracing::warn!(why, "the hand-over came to nothing; this process goes on");
                None
            }
            Progress::Given(anchor) => {
                self.give = None;
                Some(anchor)
            }
        }
    }
}

/// Asks a device on the data thread.
pub(super) fn ask_device(mailbox: Arc<Mailbox<Command>>) -> AskSource {
    Box::new(move |device, ask: Ask| {
        let (reply, answer) = sync_channel(1);
        mailbox.send(Command { device, what: What::Ask(ask), reply });
        match answer.recv_timeout(STATUS_TIMEOUT) {
            Ok(Ok(Answer::Told(told))) => Some(told),
            _ => None,
        }
    })
}

/// Accepts or refuses one front end.
fn accept(index: usize, entry: &mut Entry, mailbox: &Arc<Mailbox<Command>>) {
    if entry.socket.dials() && entry.connection.as_ref().is_some_and(|connection| !connection.is_dead()) {
        entry.socket.rest();
        return;
    }
    let stream = match entry.socket.accept() {
        Ok(Some(stream)) => stream,
        Ok(None) => return,
        Err(error) => {
            tracing::warn!(device = &*entry.name, %error, "cannot accept a front end");
            // Out of descriptors, say: the connection stays in the backlog and would be reported at once again.
            std::thread::sleep(Duration::from_millis(10));
            return;
        }
    };
    if let Some(connection) = &entry.connection {
        if !connection.is_dead() {
            if hung_up(&stream) {
                // Another process that looked whether somebody listens here.
                return;
            }
            if !connection.is_dead_within(LEAVE_TIMEOUT) {
                entry.metrics.refused_connections.add(1);
                tracing::warn!(device = &*entry.name, "a second front end was refused: one is connected");
                return;
            }
        }
        if !wait_finished(&connection.thread, TAKE_OVER_TIMEOUT) {
            entry.metrics.refused_connections.add(1);
            tracing::error!(device = &*entry.name, "front end refused: the previous connection does not end");
            return;
        }
        entry.connection = None;
    }
    let handler = Handler::new(index, entry.facts, Arc::clone(mailbox));
    match Connection::start(Arc::clone(&entry.name), stream, handler) {
        Ok(connection) => {
            entry.metrics.connections.add(1);
            entry.connection = Some(connection);
        }
        Err(error) => tracing::warn!(device = &*entry.name, %error, "cannot serve a front end"),
    }
}

/// The running data thread.
struct DataThread {
    thread: JoinHandle<Result<(), String>>,
    stop: Arc<AtomicBool>,
    mailbox: Arc<Mailbox<Command>>,
    /// Readable once the thread ended, however it did.
    ended: UnixStream,
}

impl DataThread {
    fn start<D: RingDevice, F: Fabric<D>>(
        mut data: DataLoop<D, F>,
        cpu: Option<usize>,
        mailbox: &Arc<Mailbox<Command>>,
    ) -> Result<Self, ServeError> {
        let stop = data.stop_flag();
        let (ended, guard) = UnixStream::pair().map_err(system("create a socket pair"))?;
        let thread = std::thread::Builder::new()
            .name("vcp-data".into())
            .spawn(move || {
                // Dropped (closed) when the thread ends, also by a panic.
                let _guard = guard;
                if let Some(cpu) = cpu {
                    pin_to(cpu).map_err(|error| crate::process::chain(&error))?;
                }
                data.run().map_err(|error| format!("waiting failed: {error}"))
            })
            .map_err(system("start the data thread"))?;
        Ok(Self { thread, stop, mailbox: Arc::clone(mailbox), ended })
    }

    /// Asks the thread to end and waits for it, for [`END_TIMEOUT`] at most.
    fn end(self) -> Result<(), ServeError> {
        self.stop.store(true, Ordering::Relaxed);
        self.mailbox.wake();
        let mut fds = [PollFd::new(&self.ended, PollFlags::IN)];
        let timeout = Timespec { tv_sec: END_TIMEOUT.as_secs() as i64, tv_nsec: 0 };
        while let Err(rustix::io::Errno::INTR) = rustix::event::poll(&mut fds, Some(&timeout)) {}
        if fds[0].revents().is_empty() {
            return Err(ServeError::DataThread("it is stuck and ends with the process".into()));
        }
        match self.thread.join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(ServeError::DataThread(error)),
            Err(_) => Err(ServeError::DataThread("it panicked".into())),
        }
    }
}

impl AsFd for DataThread {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }
}
