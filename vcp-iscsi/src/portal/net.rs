//! The seam to the network: a [`Stream`] of bytes, and the [`Network`] that makes one from a portal.
//!
//! The engine names no TCP: what it needs of a connection is a descriptor that can be polled, read and written without
//! blocking. The real thing is [`Tcp`]; a process without a network asks another one ([`crate::dial`]); a simulation puts
//! pairs of Unix sockets and addresses of its own behind the same trait, and a process that takes over from another wraps the
//! descriptors that it was given.

use std::fmt::Debug;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::SockRef;

use super::socket::{self, Resolving};
use crate::dial::client::Asked;
use crate::url::Portal;

/// A connected (or connecting) stream socket that never blocks. What a ring does with it keeps it open until it was
/// cancelled, which is when it next enters the kernel.
#[derive(Debug)]
pub struct Stream(Arc<OwnedFd>);

impl From<OwnedFd> for Stream {
    /// The socket must be non-blocking.
    fn from(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }
}

impl From<TcpStream> for Stream {
    /// The socket must be non-blocking.
    fn from(stream: TcpStream) -> Self {
        OwnedFd::from(stream).into()
    }
}

impl From<UnixStream> for Stream {
    /// The socket must be non-blocking.
    fn from(stream: UnixStream) -> Self {
        OwnedFd::from(stream).into()
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Stream {
    /// The descriptor, for operations that outlive a call.
    pub fn shared(&self) -> &Arc<OwnedFd> {
        &self.0
    }

    /// Makes the end of the connection an abort: what was not sent is not sent after it either, and the other side hears
    /// of it by a reset. An ordinary close leaves it to the kernel to deliver the rest, which a dead link may allow minutes
    /// later.
    pub fn abort_at_end(&self) {
        if let Err(error) = SockRef::from(self).set_linger(Some(Duration::ZERO)) {
            tracing::debug!(%error, "cannot make the end of a connection an abort");
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(recv(&self.0, buffer, RecvFlags::DONTWAIT)?.0)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(&self.0, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The addresses of a portal, or the wait for them.
#[derive(Debug)]
pub enum Resolution {
    /// Known at once: the portal is given by number.
    Done(Vec<SocketAddr>),
    /// A thread asks.
    Underway(Resolving),
}

/// A connection that was begun.
#[derive(Debug)]
pub enum Connecting {
    /// A socket that connects.
    Socket(Stream),
    /// Another process was asked for one.
    Asked(Asked),
}

impl From<Stream> for Connecting {
    fn from(stream: Stream) -> Self {
        Self::Socket(stream)
    }
}

/// Makes streams. None of the methods blocks.
pub trait Network: Debug + Send + Sync {
    /// Begins to look up the addresses of a portal.
    ///
    /// # Errors
    /// Not even that is possible.
    fn resolve(&self, portal: &Portal) -> io::Result<Resolution>;

    /// Begins to connect; [`connected`](Self::connected) tells how it went.
    ///
    /// # Errors
    /// The address cannot be tried at all.
    fn start_connect(&self, address: SocketAddr) -> io::Result<Connecting>;

    /// Whether a connection begun by [`start_connect`](Self::start_connect) stands by now.
    ///
    /// # Errors
    /// It failed.
    fn connected(&self, stream: &Stream) -> io::Result<bool>;

    /// How long sent data may stay without acknowledgement before the connection counts as broken (TCP_USER_TIMEOUT).
    /// Called whenever the wanted value changes; a network without such a notion ignores it.
    ///
    /// # Errors
    /// The socket refused it.
    fn set_user_timeout(&self, stream: &Stream, limit: Duration) -> io::Result<()> {
        let _ = (stream, limit);
        Ok(())
    }
}

/// TCP, by the system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tcp;

impl Network for Tcp {
    fn resolve(&self, portal: &Portal) -> io::Result<Resolution> {
        match socket::literal(portal) {
            Some(address) => Ok(Resolution::Done(vec![address])),
            None => Ok(Resolution::Underway(Resolving::start(portal.clone())?)),
        }
    }

    fn start_connect(&self, address: SocketAddr) -> io::Result<Connecting> {
        socket::start_connect(address).map(Into::into)
    }

    fn connected(&self, stream: &Stream) -> io::Result<bool> {
        socket::connected(stream)
    }

    fn set_user_timeout(&self, stream: &Stream, limit: Duration) -> io::Result<()> {
        socket::set_user_timeout(stream, limit)
    }
}
