//! [`Connection`]: one front end, served by a thread of its own; begun by `accept` or taken over from another process.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use super::channel::{Peeked, peek};
use super::gate::{Gate, Turn};
use super::handler::Handler;
use super::port::{F_PROTOCOL_FEATURES, PortError, What};

/// A connected front end.
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) thread: JoinHandle<()>,
    pub(super) gate: Arc<Gate>,
    handler: Arc<Mutex<Handler>>,
}

impl Connection {
    /// Serves a front end that just connected.
    pub(super) fn start(name: Arc<str>, stream: UnixStream, handler: Handler) -> io::Result<Self> {
        Self::spawn(name, stream, handler, |stream, handler| {
            handler.lock().unwrap_or_else(PoisonError::into_inner).ask(What::Attach)?;
            // QEMU enables the rings of a network device before it acknowledges any features.
            match super::resume::requests(&stream, handler, F_PROTOCOL_FEATURES, 0) {
                Ok(requests) => Ok(requests),
                Err(error) => {
                    tracing::warn!(%error, "a front end that enables rings early will be refused");
                    Ok(BackendReqHandler::from_stream(stream, Arc::clone(handler)))
                }
            }
        })
    }

    /// Goes on serving a front end that acknowledged `features` and whose `handler` knows the rest. `requests` is what
    /// [`super::resume::requests`] made.
    pub(super) fn resume(
        name: Arc<str>,
        stream: UnixStream,
        handler: Arc<Mutex<Handler>>,
        requests: BackendReqHandler<Mutex<Handler>>,
    ) -> io::Result<Self> {
        Self::spawn_with(name, stream, handler, move |_, _| Ok(requests))
    }

    fn spawn(
        name: Arc<str>,
        stream: UnixStream,
        handler: Handler,
        begin: impl FnOnce(UnixStream, &Arc<Mutex<Handler>>) -> Result<Requests, PortError> + Send + 'static,
    ) -> io::Result<Self> {
        Self::spawn_with(name, stream, Arc::new(Mutex::new(handler)), begin)
    }

    fn spawn_with(
        name: Arc<str>,
        stream: UnixStream,
        handler: Arc<Mutex<Handler>>,
        begin: impl FnOnce(UnixStream, &Arc<Mutex<Handler>>) -> Result<Requests, PortError> + Send + 'static,
    ) -> io::Result<Self> {
        let (keep, peeker) = (stream.try_clone()?, stream.try_clone()?);
        let gate = Arc::new(Gate::new()?);
        let (at, theirs) = (Arc::clone(&gate), Arc::clone(&handler));
        let index = lock(&handler).device;
        let thread = std::thread::Builder::new().name(format!("vu-{index}")).spawn(move || {
            tracing::info!(device = &*name, "front end connected");
            let end = match begin(stream, &theirs) {
                Ok(requests) => converse(requests, &peeker, &theirs, &at),
                Err(error) => Some(port_error(&error)),
            };
            // Another process goes on with it: not a byte, not a state of it is touched.
            let Some(end) = end else { return };
            if let Err(error) = lock(&theirs).ask(What::Detach) {
                tracing::error!(device = &*name, %error, "cannot detach the front end");
            }
            // Who waits for the next front end keeps this handler; the guest's memory is not to stay with it.
            lock(&theirs).forget_memory();
            let _ = peeker.shutdown(Shutdown::Both);
            match end {
                VhostError::Disconnected | VhostError::SocketBroken(_) | VhostError::PartialMessage => {
                    tracing::info!(device = &*name, "front end disconnected");
                }
                error => {
                    tracing::warn!(device = &*name, %error, "front end disconnected after a bad message");
                }
            }
        })?;
        Ok(Self { stream: keep, thread, gate, handler })
    }

    /// What set-up alone needs; only while the thread is stopped at the gate.
    pub(super) fn handler(&self) -> MutexGuard<'_, Handler> {
        lock(&self.handler)
    }

    /// Whether the front end closed its side.
    pub(super) fn is_dead(&self) -> bool {
        self.is_dead_within(Duration::ZERO)
    }

    /// The same; waits for that so long.
    pub(super) fn is_dead_within(&self, wait: Duration) -> bool {
        self.thread.is_finished() || hangs_up(&self.stream, wait)
    }
}

type Requests = BackendReqHandler<Mutex<Handler>>;

fn lock(handler: &Mutex<Handler>) -> MutexGuard<'_, Handler> {
    handler.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the peer closed its side.
pub(super) fn hung_up(stream: &UnixStream) -> bool {
    hangs_up(stream, Duration::ZERO)
}

/// Whether the peer closes its side within less than a second.
fn hangs_up(stream: &UnixStream, wait: Duration) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: wait.subsec_nanos().into() };
    rustix::event::poll(&mut fds, Some(&now)).is_ok()
        && fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
}

/// Handles messages until the connection ends; returns why it did, or `None` if it goes on elsewhere.
fn converse(
    mut requests: Requests,
    peeker: &UnixStream,
    handler: &Arc<Mutex<Handler>>,
    gate: &Gate,
) -> Option<VhostError> {
    loop {
        match gate.pass(peeker) {
            Ok(Turn::Message) => {}
            Ok(Turn::Leave) => return None,
            Err(error) => return Some(VhostError::SocketBroken(error.into())),
        }
        match peek(peeker) {
            Ok(Peeked::Other) => {}
            // Before the crate acknowledges the message: from then on the front end counts on being told.
            Ok(Peeked::Channel(channel)) => {
                let handler = lock(handler);
                if handler.has(VhostUserProtocolFeatures::BACKEND_REQ)
                    && let Err(error) = handler.ask(What::SetChannel(channel))
                {
                    return Some(port_error(&error));
                }
            }
            Ok(Peeked::Status) => {
                let mut handler = lock(handler);
                if handler.has(VhostUserProtocolFeatures::STATUS) {
                    let acks = handler.has(VhostUserProtocolFeatures::REPLY_ACK);
                    match super::status::answer(peeker, &mut handler.status, acks) {
                        Ok(()) => continue,
                        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                            return Some(VhostError::InvalidMessage);
                        }
                        Err(error) => return Some(VhostError::SocketBroken(error)),
                    }
                }
            }
            Err(error) => return Some(VhostError::SocketBroken(error)),
        }
        match requests.handle_request() {
            Ok(()) => {}
            // The message was whole and understood, and the front end was told that it failed.
            Err(error @ (VhostError::ReqHandlerError(_) | VhostError::InvalidOperation(_)))
                if lock(handler).has(VhostUserProtocolFeatures::REPLY_ACK) =>
            {
                tracing::warn!(%error, "message from the front end refused");
            }
            Err(error) => return Some(error),
        }
    }
}

fn port_error(error: &PortError) -> VhostError {
    VhostError::ReqHandlerError(io::Error::other(crate::process::chain(error)))
}

/// Waits for a thread to end; false if it did not in time.
pub(super) fn wait_finished<T>(thread: &JoinHandle<T>, timeout: Duration) -> bool {
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
