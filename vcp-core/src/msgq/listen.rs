//! [`Listener`]: the socket where programs on this host connect, or the [seat](super::Seat) on which a monitor says who does.
//!
//! A thread accepts; each set-up runs on a thread of its own against its deadline, so that one who connects and says
//! nothing keeps nobody waiting. Only those with the right user (by the kernel's word, `SO_PEERCRED`) get an answer. A
//! finished channel goes to the data thread through a mailbox.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use msgq::Channel;
use msgq::handshake::{Config, HandshakeError, Link, LinkError, read_hello};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
    sockopt,
};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use super::Seat;
use crate::handover::Fds;
use crate::handover::state::{BadState, SocketState};
use crate::mailbox::Mailbox;

/// Set-ups at a time; more wait in the socket's backlog.
const SETUPS: u32 = 8;
/// Connections that wait.
const BACKLOG: i32 = 32;

/// Who may connect, and what they get.
#[derive(Clone, Debug)]
pub struct ListenerOptions {
    /// Limits and features.
    pub config: Config,
    /// Users besides this process's own that may connect.
    pub users: Vec<u32>,
}

/// Counters of a listener.
#[derive(Debug, Default)]
pub struct ListenerStats {
    /// Channels that came about.
    pub accepted: AtomicU64,
    /// Connections of users that may not.
    pub refused: AtomicU64,
    /// Set-ups that failed: peers that were slow, or wrong.
    pub failed: AtomicU64,
}

/// Which socket file is a listener's to remove: device and inode.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity(Option<(u64, u64)>);

/// A socket that listens. Its file is removed when this is dropped, if it was made here.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the file; none if it is not this process's to remove.
    identity: Option<(u64, u64)>,
    /// Whoever gave the socket sees to who may connect: by the file's mode. (In a user namespace of its own, a process does not
    /// know the users outside.)
    vouched: bool,
    /// It does not listen: it is a seat, and ends come on it.
    is_seat: bool,
}

impl Listener {
    /// Listens on `path`. A socket file that nobody listens on is replaced.
    ///
    /// # Errors
    /// The file cannot be made, or somebody listens there.
    pub fn bind(path: &Path) -> io::Result<Self> {
        Self::bind_with(path, None)
    }

    /// As [`bind`](Self::bind), with a file that only its owner (and root) may connect to, from the moment it is there: for
    /// a socket that is given to a process which cannot tell who connects ([`adopt`](Self::adopt)).
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn bind_for_owner(path: &Path) -> io::Result<Self> {
        Self::bind_with(path, Some(Mode::RUSR | Mode::WUSR))
    }

    fn bind_with(path: &Path, mode: Option<Mode>) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let address = SocketAddrUnix::new(path)?;
        let new = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let socket = new()?;
        if let Some(mode) = mode {
            // The file gets the mode of the socket.
            rustix::fs::fchmod(&socket, mode)?;
        }
        if let Err(error) = bind(&socket, &address) {
            let in_use = error == Errno::ADDRINUSE;
            if !in_use || connect(new()?, &address) != Err(Errno::CONNREFUSED) {
                return Err(error.into());
            }
            std::fs::remove_file(path)?;
            bind(&socket, &address)?;
        }
        listen(&socket, BACKLOG)?;
        let meta = std::fs::symlink_metadata(path)?;
        let path = std::path::absolute(path)?;
        Ok(Self { socket, path, identity: Some((meta.dev(), meta.ino())), vouched: false, is_seat: false })
    }

    /// The socket that this process was started with as descriptor `fd`. Either whoever started it listens on it: a monitor
    /// keeps the file, and clients wait there while a VCP that died is started again. Or it is a [seat](super::Seat), on which
    /// the monitor sends an end whenever another VCP is to be a client.
    ///
    /// # Errors
    /// It is no Unix socket of whole messages that listens or is connected.
    pub fn adopt(fd: i32) -> io::Result<Self> {
        let wrong =
            |why: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("descriptor {fd}: {why}"));
        if fd < 0 {
            return Err(wrong("numbers start at 0"));
        }
        let this = pidfd_open(getpid(), PidfdFlags::empty())?;
        // A copy of it under a number that nothing else owns.
        Self::listening(pidfd_getfd(&this, fd, PidfdGetfdFlags::empty())?, format!("fd:{fd}").into())
            .map_err(wrong)
    }

    fn listening(socket: OwnedFd, otherwise: PathBuf) -> Result<Self, &'static str> {
        if sockopt::socket_domain(&socket) != Ok(AddressFamily::UNIX) {
            return Err("it is no Unix socket");
        }
        if sockopt::socket_type(&socket) != Ok(SocketType::SEQPACKET) {
            return Err("it is no socket of whole messages (SOCK_SEQPACKET)");
        }
        let listens = sockopt::socket_acceptconn(&socket) == Ok(true);
        if !listens && rustix::net::getpeername(&socket).is_err() {
            return Err("it neither listens nor is connected");
        }
        rustix::io::ioctl_fionbio(&socket, true).map_err(|_| "it cannot be set up")?;
        let name = rustix::net::getsockname(&socket).ok();
        let name = name.and_then(|name| SocketAddrUnix::try_from(name).ok());
        let name = name.and_then(|name| Some(PathBuf::from(OsStr::from_bytes(name.path()?.to_bytes()))));
        let path = name.filter(|_| listens).unwrap_or(otherwise);
        Ok(Self { socket, path, identity: None, vouched: true, is_seat: !listens })
    }

    /// From another process ([`Serving::export`]).
    ///
    /// # Errors
    /// The state or its descriptor is not what it should be.
    pub(super) fn import(state: SocketState, fds: &mut Fds) -> Result<Self, BadState> {
        let SocketState { path, identity, fd, .. } = state;
        let listener = Self::listening(fds.take(fd)?, path.clone());
        let mut listener = listener.map_err(|why| BadState::Text(format!("{}: {why}", path.display())))?;
        (listener.path, listener.identity) = (path, (identity != (0, 0)).then_some(identity));
        listener.vouched = listener.identity.is_none();
        Ok(listener)
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file stays when this is dropped. Gives back what [`own`](Self::own) needs to undo that.
    pub(super) fn release(&mut self) -> Identity {
        Identity(self.identity.take())
    }

    /// The file goes when this is dropped, if it ever was to.
    pub(super) fn own(&mut self, identity: Identity) {
        self.identity = identity.0;
    }

    /// Accepts from here on, until the returned value is dropped. Channels arrive in the mailbox.
    ///
    /// # Errors
    /// No thread or descriptor can be had.
    pub fn start(
        self,
        options: ListenerOptions,
        mailbox: Arc<Mailbox<Channel>>,
        stats: Arc<ListenerStats>,
    ) -> io::Result<Serving> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let door = Arc::new(Door {
            socket: self.socket.try_clone()?,
            vouched: self.vouched,
            is_seat: self.is_seat,
            wake,
            state: AtomicU32::new(OPEN),
            guests: AtomicU32::new(0),
        });
        let at = Arc::clone(&door);
        std::thread::Builder::new()
            .name("msgq-accept".into())
            .spawn(move || at.accept(&options, &mailbox, &stats))?;
        Ok(Serving { listener: self, door })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(identity) = self.identity else { return };
        let ours =
            std::fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == identity);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

const OPEN: u32 = 0;
const HELD: u32 = 1;
const SHUT: u32 = 2;

/// What the accepting thread and its owner share.
#[derive(Debug)]
struct Door {
    socket: OwnedFd,
    vouched: bool,
    is_seat: bool,
    /// Readable once the state has changed.
    wake: OwnedFd,
    state: AtomicU32,
    /// Connections that were accepted and are being set up.
    guests: AtomicU32,
}

impl Door {
    fn set(&self, state: u32) {
        self.state.store(state, Ordering::SeqCst);
        self.nudge();
    }

    /// The accepting thread looks again.
    fn nudge(&self) {
        // Full: it is readable already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// The next client's socket, if there is one.
    fn next(&self) -> Result<Option<OwnedFd>, LinkError> {
        if self.is_seat {
            let seat = self.socket.try_clone().map_err(|_| LinkError::Gone).and_then(Seat::new)?;
            return Ok(seat.try_next()?.map(Link::into_socket));
        }
        match accept_with(&self.socket, SocketFlags::CLOEXEC) {
            Ok(socket) => Ok(Some(socket)),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(error) => Err(LinkError::System { what: "accept", error }),
        }
    }

    fn accept(
        self: &Arc<Self>,
        options: &ListenerOptions,
        mailbox: &Arc<Mailbox<Channel>>,
        stats: &Arc<ListenerStats>,
    ) {
        loop {
            let open = match self.state.load(Ordering::SeqCst) {
                SHUT => return,
                state => state == OPEN && self.guests.load(Ordering::SeqCst) < SETUPS,
            };
            let mut fds = [PollFd::new(&self.wake, PollFlags::IN), PollFd::new(&self.socket, PollFlags::IN)];
            // Those who do not fit wait in the backlog: each of the others ends at its deadline and wakes this thread.
            match rustix::event::poll(&mut fds[..1 + usize::from(open)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot wait for msgq clients any more");
                    return;
                }
            }
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            if !open {
                continue;
            }
            // Counted before the state is looked at: whoever holds the door and finds nobody counted knows that nobody
            // will be.
            let guest = Guest::enter(self);
            if self.state.load(Ordering::SeqCst) != OPEN {
                continue;
            }
            let socket = match self.next() {
                Ok(Some(socket)) => socket,
                Ok(None) => continue,
                Err(error) if self.is_seat => {
                    // The monitor is gone, or not itself; those that are connected stay so.
                    tracing::debug!(error = crate::process::chain(&error), "no more msgq clients come");
                    return;
                }
                Err(error) => {
                    tracing::warn!(error = crate::process::chain(&error), "cannot accept a msgq client");
                    std::thread::park_timeout(Duration::from_millis(10));
                    continue;
                }
            };
            if !self.vouched && !may_connect(&socket, &options.users) {
                stats.refused.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let (mailbox, counters) = (Arc::clone(mailbox), Arc::clone(stats));
            let config = options.config.clone();
            let one = std::thread::Builder::new().name("msgq-setup".into()).spawn(move || {
                match set_up(socket, &config) {
                    Ok(channel) => {
                        counters.accepted.fetch_add(1, Ordering::Relaxed);
                        mailbox.send(channel);
                    }
                    Err(error) => {
                        counters.failed.fetch_add(1, Ordering::Relaxed);
                        tracing::warn!(error = crate::process::chain(&error), "a msgq client was not set up");
                    }
                }
                let door = Arc::clone(&guest.0);
                drop(guest);
                // It may wait for a place.
                door.nudge();
            });
            if one.is_err() {
                stats.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// A connection that is being set up.
struct Guest(Arc<Door>);

impl Guest {
    fn enter(door: &Arc<Door>) -> Self {
        door.guests.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(door))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.0.guests.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A listener that accepts. Dropping it ends that, and removes the socket file if it is this process's.
#[derive(Debug)]
pub struct Serving {
    listener: Listener,
    door: Arc<Door>,
}

impl Serving {
    /// Nobody is accepted any more (they wait in the backlog), or again.
    pub(super) fn hold(&self, hold: bool) {
        self.door.set(if hold { HELD } else { OPEN });
    }

    /// Whether nobody is being set up.
    pub(super) fn is_quiet(&self) -> bool {
        self.door.guests.load(Ordering::SeqCst) == 0
    }

    /// For another process.
    pub(super) fn export(&self, fds: &mut Fds) -> io::Result<SocketState> {
        let Listener { path, identity, socket, .. } = &self.listener;
        let fd = fds.put_copy(socket)?;
        Ok(SocketState { path: path.clone(), identity: identity.unwrap_or_default(), fd, dials: false })
    }

    /// Another process listens on: the file stays.
    pub(super) fn release(&mut self) {
        let _ = self.listener.release();
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.door.set(SHUT);
    }
}

fn set_up(socket: OwnedFd, config: &Config) -> Result<Channel, HandshakeError> {
    let link = Link::new(socket)?;
    let hello = read_hello(&link, Instant::now() + config.deadline)?;
    Channel::accept(link, hello, config, &[])
}

/// This process's own user, root, and those that were named.
fn may_connect(socket: impl AsFd, users: &[u32]) -> bool {
    let Ok(peer) = rustix::net::sockopt::socket_peercred(socket) else { return false };
    let user = peer.uid.as_raw();
    user == 0 || peer.uid == rustix::process::geteuid() || users.contains(&user)
}

#[cfg(test)]
#[path = "listen_tests.rs"]
mod tests;
