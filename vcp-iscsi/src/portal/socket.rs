//! Name resolution and TCP sockets that never block.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use super::net::Stream;
use crate::url::Portal;

/// Unacknowledged data and unanswered keepalives end a connection after so long; the ping of the session is usually
/// faster, this is for the time in which nothing can be sent.
const USER_TIMEOUT: Duration = Duration::from_secs(15);

/// Resolves a portal's name; blocks, so not for the data thread unless [`literal`] knows the answer.
///
/// # Errors
/// The name has no address, or the resolver cannot be reached.
pub fn resolve(portal: &Portal) -> io::Result<Vec<SocketAddr>> {
    let addresses: Vec<_> = (portal.host.as_str(), portal.port).to_socket_addrs()?.collect();
    if addresses.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    }
    Ok(addresses)
}

/// The address of a portal that is given by number.
pub fn literal(portal: &Portal) -> Option<SocketAddr> {
    portal.host.parse().ok().map(|ip| SocketAddr::new(ip, portal.port))
}

/// A resolution on a thread of its own.
#[derive(Debug)]
pub struct Resolving(mpsc::Receiver<io::Result<Vec<SocketAddr>>>);

impl Resolving {
    /// Starts it.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(portal: Portal) -> io::Result<Self> {
        Self::by(move || resolve(&portal))
    }

    /// Starts another way to find addresses, which may wait.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn by(find: impl FnOnce() -> io::Result<Vec<SocketAddr>> + Send + 'static) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        std::thread::Builder::new().name("resolve".into()).spawn(move || {
            // Nobody listens any more if the engine was closed meanwhile.
            let _ = sender.send(find());
        })?;
        Ok(Self(receiver))
    }

    /// The result, once it is there.
    pub fn try_take(&self) -> Option<io::Result<Vec<SocketAddr>>> {
        match self.0.try_recv() {
            Ok(result) => Some(result),
            Err(mpsc::TryRecvError::Empty) => None,
            Err(mpsc::TryRecvError::Disconnected) => {
                Some(Err(io::Error::other("the resolver thread ended without a result")))
            }
        }
    }
}

/// Begins to connect; [`connected`] tells how it went.
///
/// # Errors
/// The address cannot be tried at all.
pub fn start_connect(address: SocketAddr) -> io::Result<Stream> {
    let socket =
        Socket::new(Domain::for_address(address), Type::STREAM.cloexec().nonblocking(), Some(Protocol::TCP))?;
    // Each PDU batch is one send; nothing is gained by waiting for more.
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&address.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {}
        Err(error) => return Err(error),
    }
    Ok(OwnedFd::from(socket).into())
}

/// Whether a connection begun by [`start_connect`] stands; looks without waiting.
///
/// # Errors
/// It failed.
pub fn connected(stream: &Stream) -> io::Result<bool> {
    let mut fds = [PollFd::new(stream, PollFlags::OUT)];
    if poll(&mut fds, Some(&Timespec::default()))? == 0 {
        return Ok(false);
    }
    let socket = SockRef::from(stream);
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(Duration::from_secs(10))
            .with_interval(Duration::from_secs(5))
            .with_retries(3),
    )?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    Ok(true)
}

/// How long sent data may stay without acknowledgement before the connection breaks.
///
/// # Errors
/// The socket refused it.
pub fn set_user_timeout(stream: &Stream, limit: Duration) -> io::Result<()> {
    SockRef::from(stream).set_tcp_user_timeout(Some(limit))
}

/// Waits until the socket is readable (or writable, if asked) or the deadline has come; returns whether it is.
///
/// # Errors
/// What `poll` reports.
pub fn wait_until(stream: &Stream, writable: bool, deadline: Instant) -> io::Result<bool> {
    let mut events = PollFlags::IN;
    if writable {
        events |= PollFlags::OUT;
    }
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let mut fds = [PollFd::new(stream, events)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
