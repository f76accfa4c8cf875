//! One connection to a vhost-user backend, on the `vhost` crate's `Frontend`, with a time limit on every message.
//!
//! `Frontend` takes a receive timeout on its socket for a reason to try again, so that a socket option cannot bound it.
//! A watchdog thread per connection does: it is told which request is under way, and shuts the socket down when the
//! answer is late. That ends the call with an error, and marks the connection as dead for good.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::Frontend;

use crate::error::{Error, Result};

/// How long a backend has for one message. Much longer than any healthy one needs, short enough to wait for.
pub const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a backend has to stop a queue: it must finish the requests that it has begun.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// The same at the end of the run, when nobody waits for those requests any more.
pub const END_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
struct Watch {
    /// The request under way and when it must be answered.
    current: Option<(&'static str, Instant, Duration)>,
    /// Set once, when the connection is given up.
    failure: Option<String>,
    quit: bool,
}

#[derive(Debug, Default)]
struct Shared {
    watch: Mutex<Watch>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connected backend.
pub struct Link {
    device: String,
    frontend: Frontend,
    stream: UnixStream,
    shared: Arc<Shared>,
    watchdog: Option<std::thread::JoinHandle<()>>,
    message_timeout: Duration,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("device", &self.device).finish_non_exhaustive()
    }
}

impl Link {
    /// Connects to the backend that listens at `path`.
    pub fn connect(device: &str, path: &Path, queues: u16) -> Result<Self> {
        let fail = |source: rustix::io::Errno| {
            let hint = match source {
                rustix::io::Errno::NOENT => "there is no such socket; start the backend first",
                rustix::io::Errno::CONNREFUSED => "nobody listens on it any more; start the backend again",
                rustix::io::Errno::ACCESS => {
                    "no permission; check the owner and mode of the socket and its directory"
                }
                rustix::io::Errno::AGAIN => {
                    "the backend does not accept connections; is it serving another front end?"
                }
                _ => "is it the socket of a vhost-user backend?",
            };
            Error::Connect { device: device.to_owned(), path: path.to_owned(), hint, source: source.into() }
        };
        // A Unix socket connects at once or not at all: a full backlog is an error here and not a wait.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(fail)?;
        let address = SocketAddrUnix::new(path).map_err(fail)?;
        rustix::net::connect(&socket, &address).map_err(fail)?;
        rustix::io::ioctl_fionbio(&socket, false).map_err(fail)?;
        // Bounds sends where nobody reads.
        set_socket_timeout(&socket, Timeout::Send, Some(MESSAGE_TIMEOUT)).map_err(fail)?;
        Self::from_stream(device, UnixStream::from(socket), queues)
    }

    /// Takes over a connected stream.
    pub fn from_stream(device: &str, stream: UnixStream, queues: u16) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let dup = || stream.try_clone().map_err(Error::os("duplicate a socket"));
        let (theirs, watched) = (dup()?, dup()?);
        let watchdog = std::thread::Builder::new()
            .name(format!("{device}-watch"))
            .spawn({
                let shared = shared.clone();
                move || {
                    crate::confine::thread(crate::confine::Kind::Attach);
                    watch(&shared, &watched);
                }
            })
            .map_err(Error::os("start a thread"))?;
        Ok(Self {
            device: device.to_owned(),
            frontend: Frontend::from_stream(theirs, u64::from(queues)),
            stream,
            shared,
            watchdog: Some(watchdog),
            message_timeout: MESSAGE_TIMEOUT,
        })
    }

    /// Less patience than [`MESSAGE_TIMEOUT`].
    #[cfg(test)]
    pub(crate) fn with_message_timeout(mut self, timeout: Duration) -> Self {
        self.message_timeout = timeout;
        self
    }

    /// The front end, for settings that send nothing.
    pub fn frontend(&self) -> &Frontend {
        &self.frontend
    }

    /// Sends one request and waits for what answers it, at most [`MESSAGE_TIMEOUT`].
    pub fn call<T>(
        &self,
        request: &'static str,
        f: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        self.call_within(self.message_timeout, request, f)
    }

    /// [`Link::call`] with a limit of its own.
    pub fn call_within<T>(
        &self,
        timeout: Duration,
        request: &'static str,
        f: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        self.shared.lock().current = Some((request, Instant::now() + timeout, timeout));
        self.shared.changed.notify_one();
        let result = f(&mut self.frontend.clone());
        let mut watch = self.shared.lock();
        let overdue = watch.current.take().is_none();
        result.map_err(|source| {
            if overdue {
                return Error::BackendTimeout { device: self.device.clone(), request, timeout };
            }
            if !in_step(&source) {
                watch.failure.get_or_insert_with(|| format!("failed at {request}: {source}"));
                // Whoever reads next would take a late answer for its own.
                let _ = self.stream.shutdown(std::net::Shutdown::Both);
            }
            Error::Backend { device: self.device.clone(), request, source }
        })
    }

    /// `SET_VRING_BASE` as the specification has it: the crate's has 16 bits, a packed ring's index has 32. `acked`:
    /// `REPLY_ACK` was negotiated.
    pub fn set_vring_base(&self, index: u16, base: u32, acked: bool) -> Result<()> {
        self.call("SET_VRING_BASE", |_| exchange_base(&self.stream, index, base, acked))
    }

    /// What happened to the connection, if it cannot be used any more.
    pub fn failure(&self) -> Option<String> {
        let failure = self.shared.lock().failure.clone();
        failure.or_else(|| hung_up(&self.stream).then(|| "closed its connection".to_owned()))
    }

    /// Another descriptor of the connection, for who waits for its end and for who ends it.
    pub fn stream(&self) -> Result<UnixStream> {
        self.stream.try_clone().map_err(Error::os("duplicate a socket"))
    }
}

/// Whether the other side has closed a connection.
fn hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(1..))
}

/// One `SET_VRING_BASE` and its answer.
fn exchange_base(mut stream: &UnixStream, index: u16, base: u32, acked: bool) -> vhost::Result<()> {
    use std::io::Write;
    use vhost::vhost_user::Error as Protocol;
    const SET_VRING_BASE: u32 = 10;
    const VERSION: u32 = 1;
    const REPLY: u32 = 1 << 2;
    const NEED_REPLY: u32 = 1 << 3;
    let flags = if acked { VERSION | NEED_REPLY } else { VERSION };
    let words = |words: [u32; 5]| words.map(u32::to_ne_bytes).concat();
    let broken = |e| vhost::Error::VhostUserProtocol(Protocol::SocketBroken(e));
    stream.write_all(&words([SET_VRING_BASE, flags, 8, u32::from(index), base])).map_err(broken)?;
    if !acked {
        return Ok(());
    }
    let mut answer = [0u8; 20];
    stream.read_exact(&mut answer).map_err(broken)?;
    if answer[..12] != words([SET_VRING_BASE, VERSION | REPLY, 8, 0, 0])[..12] {
        return Err(vhost::Error::VhostUserProtocol(Protocol::InvalidMessage));
    }
    match answer[12..] {
        [0, 0, 0, 0, 0, 0, 0, 0] => Ok(()),
        _ => Err(vhost::Error::VhostUserProtocol(Protocol::BackendInternalError)),
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.watchdog.take() {
            let _ = thread.join();
        }
    }
}

/// Whether the connection can still be used after this error: the backend has answered properly, with a refusal, or
/// nothing was sent at all.
fn in_step(error: &vhost::Error) -> bool {
    use vhost::vhost_user::Error as Protocol;
    matches!(
        error,
        vhost::Error::VhostUserProtocol(
            Protocol::BackendInternalError
                | Protocol::InvalidParam
                | Protocol::InvalidOperation(_)
                | Protocol::InactiveFeature(_)
                | Protocol::InactiveOperation(_)
        )
    )
}

fn watch(shared: &Shared, stream: &UnixStream) {
    let mut watch = shared.lock();
    while !watch.quit {
        let now = Instant::now();
        match watch.current {
            Some((request, deadline, timeout)) if deadline <= now => {
                watch.current = None;
                watch.failure = Some(format!("did not answer {request} within {timeout:?}"));
                // Ends the call that waits, and tells the backend.
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
            Some((_, deadline, _)) => {
                watch = shared
                    .changed
                    .wait_timeout(watch, deadline - now)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
            None => watch = shared.changed.wait(watch).unwrap_or_else(PoisonError::into_inner),
        }
    }
}

#[cfg(test)]
mod tests {
    use vhost::VhostBackend;

    use super::*;

    #[test]
    fn missing_socket_is_one_clear_error() {
        let error = Link::connect("disk0", Path::new("/nonexistent/socket"), 1).unwrap_err();
        assert!(crate::chain(&error).contains(
            "disk0: cannot connect to the vhost-user socket /nonexistent/socket: there is no such socket"
        ));
    }

    #[test]
    fn silent_backend_is_given_up() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let link = Link::from_stream("disk0", ours, 1).unwrap();
        let limit = Duration::from_millis(50);
        let error = link.call_within(limit, "GET_FEATURES", |f| f.get_features()).unwrap_err();
        assert!(matches!(error, Error::BackendTimeout { request: "GET_FEATURES", .. }), "{error}");
        // The connection is dead: the next call fails at once.
        assert!(link.call("GET_FEATURES", |f| f.get_features()).is_err());
    }

    #[test]
    fn answer_to_another_question_ends_the_connection() {
        use std::io::{Read, Write};
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let link = Link::from_stream("disk0", ours, 1).unwrap();
        // Version 1, reply; eight bytes. GET_FEATURES is 1, GET_QUEUE_NUM 17.
        let reply: Vec<u8> = [17u32, 5, 8, 1, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        theirs.write_all(&reply).unwrap();
        let error = link.call("GET_FEATURES", |f| f.get_features()).unwrap_err();
        assert!(matches!(error, Error::Backend { .. }), "{error}");
        theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut rest = Vec::new();
        theirs.read_to_end(&mut rest).unwrap();
        assert_eq!(rest.len(), 12, "the request and the end");
        assert!(link.failure().is_some());
    }

    #[test]
    fn refusal_leaves_the_connection_as_it_is() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let link = Link::from_stream("disk0", ours, 1).unwrap();
        let refuse = |_: &mut Frontend| -> vhost::Result<()> {
            Err(vhost::Error::VhostUserProtocol(vhost::vhost_user::Error::BackendInternalError))
        };
        assert!(link.call("SET_CONFIG", refuse).is_err());
        assert!(link.failure().is_none());
        link.call("SET_OWNER", |f| f.set_owner()).unwrap();
        drop(theirs);
    }

    #[test]
    fn base_of_a_packed_ring_has_32_bits() {
        use std::io::{Read, Write};
        let words = |words: [u32; 5]| words.map(u32::to_ne_bytes).concat();
        // Taken, refused, an answer to something else.
        for (request, value, good) in [(10, 0, Some(true)), (10, 1, Some(true)), (11, 0, Some(false))] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(&words([request, 5, 8, value, 0])).unwrap();
            let link = Link::from_stream("disk0", ours, 3).unwrap();
            let result = link.set_vring_base(2, 0x8000_8000, true);
            assert_eq!(result.is_ok(), request == 10 && value == 0, "{result:?}");
            // A refusal leaves the connection as it is; a wrong answer ends it.
            assert_eq!(Some(link.failure().is_none()), good);
            let mut sent = [0u8; 20];
            theirs.read_exact(&mut sent).unwrap();
            assert_eq!(sent[..], words([10, 9, 8, 2, 0x8000_8000])[..]);
        }
    }

    #[test]
    fn closed_backend_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let link = Link::from_stream("disk0", ours, 1).unwrap();
        let error = link.call("GET_FEATURES", |f| f.get_features()).unwrap_err();
        assert!(matches!(error, Error::Backend { .. }), "{error}");
    }
}
