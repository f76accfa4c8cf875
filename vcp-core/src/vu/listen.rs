//! [`SocketFile`]: a listening Unix socket in the file system that cleans up after itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, Signal, getpid, kill_process, pidfd_getfd, pidfd_open};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::handover::Fds;
use crate::handover::state::{BadState, SocketState};

/// How often a front end is looked for that listens.
const DIAL_PERIOD: Duration = Duration::from_millis(200);

/// Why a socket file cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens there.
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    /// Something that is no socket is in the way.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// A descriptor that was to be the socket is none.
    #[error("descriptor {fd} is not a vhost-user socket: {why}")]
    Descriptor {
        /// Its number.
        fd: i32,
        /// Why.
        why: String,
    },
    /// The system refused.
    #[error("cannot listen on {path}")]
    Io {
        /// The socket file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A listening socket; its file is removed on drop if it is still ours.
#[derive(Debug)]
pub struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
    /// The same from the root: for another process, which is somewhere else.
    absolute: PathBuf,
    /// Device and inode of the file that we made.
    identity: (u64, u64),
    /// Another process goes on listening: the file stays.
    released: bool,
    /// The connection that was given in place of a socket to listen on, until it is taken. `listener` is then an eventfd
    /// that is readable so long.
    given: Mutex<Option<UnixStream>>,
    /// The front end listens, and this side connects to it. `listener` is then a timer that says when to try.
    dials: bool,
}

impl SocketFile {
    /// Listens on `path`. A socket file that nobody listens on is left from a process that died and is replaced.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Io { path: path.into(), source };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path).map_err(failed)?
            }
            result => result.map_err(failed)?,
        };
        listener.set_nonblocking(true).map_err(failed)?;
        let meta = std::fs::symlink_metadata(path).map_err(failed)?;
        Ok(Self {
            listener,
            path: path.into(),
            absolute: std::path::absolute(path).map_err(failed)?,
            identity: (meta.dev(), meta.ino()),
            given: Mutex::default(),
            dials: false,
            released: false,
        })
    }

    /// The socket that this process was started with as descriptor `fd` (`--fd`): one that listens, as service managers
    /// pass it, or one that a front end is connected to. In the second case there will be no other front end, and
    /// SIGTERM is sent to this process when that one is gone. The socket file, if there is one, stays at the end.
    ///
    /// # Errors
    /// [`ListenError::Descriptor`].
    pub fn adopt(fd: i32) -> Result<Self, ListenError> {
        let refused = |why: &str| ListenError::Descriptor { fd, why: why.into() };
        let failed = |error: &dyn std::fmt::Display| ListenError::Descriptor { fd, why: error.to_string() };
        if fd < 0 {
            return Err(refused("numbers start at 0"));
        }
        let this = pidfd_open(getpid(), PidfdFlags::empty()).map_err(|e| failed(&e))?;
        // A copy of it under a number that nothing else owns.
        let socket: OwnedFd = pidfd_getfd(&this, fd, PidfdGetfdFlags::empty()).map_err(|e| failed(&e))?;
        if sockopt::socket_domain(&socket).map_err(|e| failed(&e))? != AddressFamily::UNIX {
            return Err(refused("it is no Unix socket"));
        }
        if sockopt::socket_type(&socket).map_err(|e| failed(&e))? != SocketType::STREAM {
            return Err(refused("it is no stream socket"));
        }
        let mut path = PathBuf::from(format!("fd:{fd}"));
        if sockopt::socket_acceptconn(&socket).map_err(|e| failed(&e))? {
            let listener = UnixListener::from(socket);
            listener.set_nonblocking(true).map_err(|e| failed(&e))?;
            if let Some(name) =
                listener.local_addr().ok().and_then(|addr| addr.as_pathname().map(Path::to_owned))
            {
                path = name;
            }
            let absolute = path.clone();
            return Ok(Self {
                listener,
                path,
                absolute,
                identity: (0, 0),
                given: Mutex::default(),
                dials: false,
                released: true,
            });
        }
        let stream = UnixStream::from(socket);
        stream.peer_addr().map_err(|_| refused("it neither listens nor is connected"))?;
        stream.set_nonblocking(false).map_err(|e| failed(&e))?;
        let watched = stream.try_clone().map_err(|e| failed(&e))?;
        std::thread::Builder::new()
            .name("fd-watch".into())
            .spawn(move || end_with(&watched))
            .map_err(|e| failed(&e))?;
        let ready = eventfd(1, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(|e| failed(&e))?;
        let given = Mutex::new(Some(stream));
        let absolute = path.clone();
        Ok(Self {
            listener: ready.into(),
            path,
            absolute,
            identity: (0, 0),
            given,
            dials: false,
            released: true,
        })
    }

    /// The front end listens on `path`, or will: this side connects to it, again and again while it is not connected.
    ///
    /// # Errors
    /// [`ListenError::Io`]: no timer could be had.
    pub fn dial(path: &Path) -> Result<Self, ListenError> {
        let failed = |source: io::Error| ListenError::Io { path: path.into(), source };
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(|e| failed(e.into()))?;
        let period = Timespec { tv_sec: 0, tv_nsec: DIAL_PERIOD.as_nanos() as _ };
        let first = Timespec { tv_sec: 0, tv_nsec: 1 };
        let times = Itimerspec { it_interval: period, it_value: first };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &times).map_err(|e| failed(e.into()))?;
        Ok(Self {
            listener: timer.into(),
            path: path.into(),
            absolute: std::path::absolute(path).map_err(failed)?,
            identity: (0, 0),
            given: Mutex::default(),
            dials: true,
            released: true,
        })
    }

    /// Whether this side connects.
    pub(crate) fn dials(&self) -> bool {
        self.dials
    }

    /// There is no reason to connect now: the timer's tick is taken.
    pub(crate) fn rest(&self) {
        let _ = rustix::io::read(&self.listener, &mut [0; 8]);
    }

    fn connect(&self) -> io::Result<Option<UnixStream>> {
        self.rest();
        match UnixStream::connect(&self.absolute) {
            Ok(stream) => Ok(Some(stream)),
            // Nobody listens there yet, or not any more.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether it is one connection and not a socket that listens.
    #[must_use]
    pub fn is_one_connection(&self) -> bool {
        !self.dials && !sockopt::socket_acceptconn(&self.listener).unwrap_or(false)
    }

    /// The next connection, if one waits.
    ///
    /// # Errors
    /// What `accept` reports, except that nobody waits.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        if self.dials {
            return self.connect();
        }
        if let Some(stream) = self.given.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = rustix::io::read(&self.listener, &mut [0; 8]);
            return Ok(Some(stream));
        }
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                Ok(Some(stream))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // The peer left between connect and accept, or a signal came: nobody waits.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The same socket for a server that has a loop of its own. The file stays this value's.
    ///
    /// # Errors
    /// No descriptor could be had.
    pub fn try_clone_listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }

    /// The same socket as the `vhost` crate's listener, for its own daemon.
    pub(crate) fn listener(&self) -> io::Result<vhost::vhost_user::Listener> {
        self.listener.try_clone().map(Into::into)
    }

    /// For another process.
    pub(crate) fn export(&self, fds: &mut Fds) -> io::Result<SocketState> {
        if self.is_one_connection() {
            return Err(io::Error::other("a server for the one connection that it was given has no other"));
        }
        Ok(SocketState {
            path: self.absolute.clone(),
            identity: self.identity,
            fd: fds.put_copy(&self.listener)?,
            dials: self.dials,
        })
    }

    /// From another process. The file stays until this one is the owner and [says so](Self::own).
    pub(crate) fn import(state: SocketState, fds: &mut Fds) -> Result<Self, BadState> {
        let SocketState { path, identity, fd, dials } = state;
        if dials {
            // The timer that came along is as good as a new one, and is closed.
            drop(fds.take(fd)?);
            return Self::dial(&path).map_err(|error| BadState::Text(crate::process::chain(&error)));
        }
        let listener = UnixListener::from(fds.take(fd)?);
        let listens = rustix::net::sockopt::socket_acceptconn(&listener).unwrap_or(false);
        if !listens {
            return Err(BadState::Text(format!("what is to listen on {} does not listen", path.display())));
        }
        let failed = |source| BadState::System { what: "use a listening socket", source };
        listener.set_nonblocking(true).map_err(failed)?;
        let absolute = path.clone();
        Ok(Self { listener, path, absolute, identity, released: true, given: Mutex::default(), dials: false })
    }

    /// The file stays when this is dropped.
    pub(crate) fn release(&mut self) {
        self.released = true;
    }

    /// The file goes when this is dropped, if it is ours.
    pub(crate) fn own(&mut self) {
        self.released = self.dials;
    }

    /// The socket file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for SocketFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        let ours = std::fs::symlink_metadata(&self.absolute)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if ours {
            let _ = std::fs::remove_file(&self.absolute);
        }
    }
}

/// Waits until the peer of a connection is gone, then asks this process to end.
fn end_with(stream: &UnixStream) {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    while let Err(rustix::io::Errno::INTR) = poll(&mut fds, None) {}
    tracing::info!("the front end of --fd is gone");
    if kill_process(getpid(), Signal::TERM).is_err() {
        std::process::exit(0);
    }
}

fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Io { path: path.into(), source };
    let meta = std::fs::symlink_metadata(path).map_err(failed)?;
    if !meta.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.into()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        // Somebody accepted, or has a full backlog.
        _ => Err(ListenError::InUse(path.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves the file behind");
        let socket = SocketFile::bind(&path).unwrap();
        assert!(matches!(SocketFile::bind(&path), Err(ListenError::InUse(_))));
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_front_end_that_listens_is_dialed_until_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = SocketFile::dial(&path).unwrap();
        assert!(!socket.is_one_connection());
        let tick = || {
            let mut fds = [PollFd::new(&socket, PollFlags::IN)];
            assert_eq!(poll(&mut fds, Some(&Timespec { tv_sec: 20, tv_nsec: 0 })).unwrap(), 1);
        };
        tick();
        assert!(socket.accept().unwrap().is_none());
        let listener = UnixListener::bind(&path).unwrap();
        tick();
        assert!(socket.accept().unwrap().is_some());
        listener.accept().unwrap();
        drop(socket);
        assert!(path.exists(), "it is the front end's");
    }

    #[test]
    fn a_file_that_is_no_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"precious").unwrap();
        assert!(matches!(SocketFile::bind(&path), Err(ListenError::NotASocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_listening_descriptor_is_adopted_and_its_file_stays() {
        use std::os::fd::AsRawFd;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let socket = SocketFile::adopt(listener.as_raw_fd()).unwrap();
        assert_eq!(socket.path(), path);
        assert!(!socket.is_one_connection());
        assert!(socket.accept().unwrap().is_none());
        let _client = UnixStream::connect(&path).unwrap();
        assert!(socket.accept().unwrap().is_some());
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn a_connected_descriptor_is_adopted_once() {
        use std::os::fd::AsRawFd;
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let socket = SocketFile::adopt(ours.as_raw_fd()).unwrap();
        assert!(socket.is_one_connection());
        let ready = || {
            let mut fds = [PollFd::new(&socket, PollFlags::IN)];
            poll(&mut fds, Some(&rustix::event::Timespec::default())).unwrap() == 1
        };
        assert!(ready());
        assert!(socket.accept().unwrap().is_some());
        assert!(!ready(), "nobody else will come");
        // The watching thread lives as long as the test's process: `_theirs` must, too, or it would end it.
        std::mem::forget(_theirs);
    }

    #[test]
    fn other_descriptors_are_refused_by_number() {
        use std::os::fd::AsRawFd;
        let file = tempfile::tempfile().unwrap();
        let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for fd in [file.as_raw_fd(), datagram.as_raw_fd(), tcp.as_raw_fd(), 99_999, -1] {
            let error = SocketFile::adopt(fd).unwrap_err().to_string();
            assert!(error.contains(&format!("descriptor {fd} ")), "{error}");
        }
    }

    #[test]
    fn a_replaced_file_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = SocketFile::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _second = SocketFile::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }
}
