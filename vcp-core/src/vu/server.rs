//! Joins everything: socket files, connections, the data thread, the control socket and signals.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use super::channel::{Peeked, peek};
use super::handler::{Facts, Handler};
use super::listen::{ListenError, SocketFile};
use super::port::{Answer, Command, Port, PortError, What};
use crate::ask::Ask;
use crate::control::{AskSource, Control, ControlOptions, StatusSource};
use crate::device::RingDevice;
use crate::http::Endpoint;
use crate::mailbox::Mailbox;
use crate::metrics::{DeviceMetrics, LoopMetrics};
use crate::poll::{CpuError, DataLoop, PollMode, check_cpu, pin_to};
use crate::process::Signals;

/// How long a front end that reconnects waits for its previous connection to be taken down. Messages already sent on
/// it are still carried out first.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a question to a device waits for the data thread; the set-up thread does nothing else meanwhile.
const STATUS_TIMEOUT: Duration = Duration::from_millis(500);

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
    /// Control socket.
    pub control: Option<PathBuf>,
    /// Page of metrics.
    pub metrics: Option<Endpoint>,
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
    /// The data thread ended by itself.
    #[error("the data thread ended: {0}")]
    DataThread(String),
}

pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> ServeError {
    move |source| ServeError::System { what, source: source.into() }
}

/// A connected front end.
struct Connection {
    stream: UnixStream,
    thread: JoinHandle<()>,
}

impl Connection {
    /// Whether the front end closed its side.
    fn is_dead(&self) -> bool {
        self.thread.is_finished() || hung_up(&self.stream)
    }
}

/// Whether the peer closed its side.
fn hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).is_ok()
        && fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
}

/// A device as the set-up thread sees it.
struct Entry {
    name: Arc<str>,
    socket: SocketFile,
    facts: Facts,
    metrics: Arc<DeviceMetrics>,
    connection: Option<Connection>,
}

/// Serves `devices` until a signal asks to end. `ready` is called once, when front ends can connect; `extra` adds the
/// application's own part to the control socket's answers.
///
/// # Errors
/// [`ServeError`].
pub fn serve<D: RingDevice>(
    devices: Vec<DeviceSpec<D>>,
    options: &ServeOptions,
    signals: &Signals,
    extra: StatusSource,
    ready: impl FnOnce(),
) -> Result<(), ServeError> {
    if let Some(cpu) = options.cpu {
        check_cpu(cpu)?;
    }
    let mailbox = Arc::new(Mailbox::new().map_err(system("create an event descriptor"))?);
    let stop = Arc::new(AtomicBool::new(false));
    let loop_metrics = Arc::new(LoopMetrics::default());
    let (mut entries, mut ports) = (Vec::new(), Vec::new());
    for spec in devices {
        let facts = Facts {
            features: spec.device.features(),
            queues: spec.device.queues(),
            queue_size_max: spec.device.queue_size_max(),
        };
        let metrics = Arc::clone(spec.device.metrics());
        let (name, socket) = (Arc::clone(&spec.name), spec.socket);
        entries.push(Entry { name, socket, facts, metrics, connection: None });
        ports.push(Port::new(spec.name, spec.device));
    }
    let parts = entries.iter().map(|entry| (Arc::clone(&entry.name), Arc::clone(&entry.metrics))).collect();
    let ask = ask_device(Arc::clone(&mailbox));
    let mut control =
        Control::new(&options.control_options(), Arc::clone(&loop_metrics), parts, ask, extra)?;

    let data = DataLoop::new(ports, Arc::clone(&mailbox), options.poll, Arc::clone(&stop), loop_metrics)
        .map_err(system("create an epoll instance"))?;
    let data = DataThread::start(data, options.cpu, &mailbox, &stop)?;
    ready();

    let result = accept_loop(&mut entries, &mut control, signals, &mailbox, &data);
    // The data thread first: it lets what is in flight end while the front ends are still there.
    let ended = data.end();
    for entry in &mut entries {
        if let Some(connection) = entry.connection.take() {
            let _ = connection.stream.shutdown(Shutdown::Both);
            // It may wait for an answer of the data thread that never comes; the process ends without it.
            let _ = wait_finished(&connection.thread, Duration::from_millis(100));
        }
    }
    result.and(ended)
}

impl ServeOptions {
    pub(crate) fn control_options(&self) -> ControlOptions<'_> {
        ControlOptions { socket: self.control.as_deref(), metrics: self.metrics.as_ref() }
    }
}

/// Asks a device on the data thread.
fn ask_device(mailbox: Arc<Mailbox<Command>>) -> AskSource {
    Box::new(move |device, ask: Ask| {
        let (reply, answer) = sync_channel(1);
        mailbox.send(Command { device, what: What::Ask(ask), reply });
        match answer.recv_timeout(STATUS_TIMEOUT) {
            Ok(Ok(Answer::Told(told))) => Some(told),
            _ => None,
        }
    })
}

/// Accepts until a signal comes or the data thread ends.
fn accept_loop(
    entries: &mut [Entry],
    control: &mut Control,
    signals: &Signals,
    mailbox: &Arc<Mailbox<Command>>,
    data: &DataThread,
) -> Result<(), ServeError> {
    loop {
        let mut fds = vec![PollFd::new(signals, PollFlags::IN), PollFd::new(data, PollFlags::IN)];
        fds.extend(entries.iter().map(|entry| PollFd::new(&entry.socket, PollFlags::IN)));
        fds.extend(control.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match rustix::event::poll(&mut fds, control.timeout().as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(system("wait for connections")(error)),
        }
        let fired: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if fired[0]
            && let Some(signal) = signals.take()
        {
            tracing::info!(signal, "ending");
            return Ok(());
        }
        if fired[1] {
            return Ok(());
        }
        for (index, entry) in entries.iter_mut().enumerate() {
            if fired[2 + index] {
                accept(index, entry, mailbox);
            }
        }
        control.serve();
    }
}

/// Accepts or refuses one front end.
fn accept(index: usize, entry: &mut Entry, mailbox: &Arc<Mailbox<Command>>) {
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
            entry.metrics.refused_connections.add(1);
            tracing::warn!(device = &*entry.name, "a second front end was refused: one is connected");
            return;
        }
        if !wait_finished(&connection.thread, TAKE_OVER_TIMEOUT) {
            entry.metrics.refused_connections.add(1);
            tracing::error!(device = &*entry.name, "front end refused: the previous connection does not end");
            return;
        }
        entry.connection = None;
    }
    match connect(index, entry, stream, Arc::clone(mailbox)) {
        Ok(connection) => {
            entry.metrics.connections.add(1);
            entry.connection = Some(connection);
        }
        Err(error) => tracing::warn!(device = &*entry.name, %error, "cannot serve a front end"),
    }
}

fn connect(
    index: usize,
    entry: &Entry,
    stream: UnixStream,
    mailbox: Arc<Mailbox<Command>>,
) -> io::Result<Connection> {
    let keep = stream.try_clone()?;
    let peeker = stream.try_clone()?;
    let (name, facts) = (Arc::clone(&entry.name), entry.facts);
    let thread = std::thread::Builder::new().name(format!("vu-{index}")).spawn(move || {
        let handler = Arc::new(Mutex::new(Handler::new(index, facts, mailbox)));
        tracing::info!(device = &*name, "front end connected");
        let end = converse(stream, &peeker, &handler);
        let handler = handler.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = handler.ask(What::Detach) {
            tracing::error!(device = &*name, %error, "cannot detach the front end");
        }
        let _ = peeker.shutdown(Shutdown::Both);
        match end {
            VhostError::Disconnected | VhostError::SocketBroken(_) | VhostError::PartialMessage => {
                tracing::info!(device = &*name, "front end disconnected");
            }
            error => tracing::warn!(device = &*name, %error, "front end disconnected after a bad message"),
        }
    })?;
    Ok(Connection { stream: keep, thread })
}

/// Handles messages until the connection ends; returns why it did.
fn converse(stream: UnixStream, peeker: &UnixStream, handler: &Arc<Mutex<Handler>>) -> VhostError {
    let lock = || handler.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = lock().ask(What::Attach) {
        return port_error(&error);
    }
    let mut connection = BackendReqHandler::from_stream(stream, Arc::clone(handler));
    loop {
        match peek(peeker) {
            Ok(Peeked::Other) => {}
            // Before the crate acknowledges the message: from then on the front end counts on being told.
            Ok(Peeked::Channel(channel)) => {
                let handler = lock();
                if handler.has(VhostUserProtocolFeatures::BACKEND_REQ)
                    && let Err(error) = handler.ask(What::SetChannel(channel))
                {
                    return port_error(&error);
                }
            }
            Err(error) => return VhostError::SocketBroken(error),
        }
        match connection.handle_request() {
            Ok(()) => {}
            // The message was whole and understood, and the front end was told that it failed.
            Err(error @ (VhostError::ReqHandlerError(_) | VhostError::InvalidOperation(_)))
                if lock().has(VhostUserProtocolFeatures::REPLY_ACK) =>
            {
                tracing::warn!(%error, "message from the front end refused");
            }
            Err(error) => return error,
        }
    }
}

fn port_error(error: &PortError) -> VhostError {
    VhostError::ReqHandlerError(io::Error::other(crate::process::chain(error)))
}

/// Waits for a thread to end; false if it did not in time.
fn wait_finished<T>(thread: &JoinHandle<T>, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    while !thread.is_finished() {
        if Instant::now() >= deadline {
            return false;
        }
        // There is no way to wait for a thread with a deadline; this happens once per reconnect.
        std::thread::sleep(Duration::from_millis(1));
    }
    true
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
    fn start<D: RingDevice>(
        mut data: DataLoop<D>,
        cpu: Option<usize>,
        mailbox: &Arc<Mailbox<Command>>,
        stop: &Arc<AtomicBool>,
    ) -> Result<Self, ServeError> {
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
        Ok(Self { thread, stop: Arc::clone(stop), mailbox: Arc::clone(mailbox), ended })
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
