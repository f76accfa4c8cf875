//! [`Dialer`]: the network of a process that has none, and [`Asked`], a connection that was asked for.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use super::message::{self, Reply, Request};
use crate::portal::net::{Connecting, Network, Resolution, Stream};
use crate::portal::socket::{self, Resolving};
use crate::url::Portal;

/// Longest wait for the addresses of a name. Who wants them has limits of its own; this one ends the thread.
const RESOLVE_LIMIT: Duration = Duration::from_secs(60);

/// The channel to the process that connects.
#[derive(Debug)]
pub struct Dialer(OwnedFd);

impl Dialer {
    /// Over one end of a channel whose other end `vcp-iscsi dial` has.
    pub fn new(channel: OwnedFd) -> Self {
        Self(channel)
    }

    #[cfg(test)]
    pub(super) fn raw(&self) -> &OwnedFd {
        &self.0
    }

    fn ask(&self, request: &Request) -> io::Result<Asked> {
        let (ours, theirs) = message::pair()?;
        match message::send(&self.0, request, Some(theirs.as_fd())) {
            Ok(()) => Ok(Asked(ours)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                Err(io::Error::other("the process that connects for this one does not keep up"))
            }
            Err(error) => Err(gone(&error)),
        }
    }
}

/// Nobody connects for this process any more: its monitor starts both anew.
fn gone(error: &io::Error) -> io::Error {
    io::Error::other(format!("the process that connects for this one is gone: {error}"))
}

impl Network for Dialer {
    fn resolve(&self, portal: &Portal) -> io::Result<Resolution> {
        if let Some(address) = socket::literal(portal) {
            return Ok(Resolution::Done(vec![address]));
        }
        let asked = self.ask(&Request::Resolve { host: portal.host.clone(), port: portal.port })?;
        Ok(Resolution::Underway(Resolving::by(move || asked.addresses())?))
    }

    fn start_connect(&self, address: SocketAddr) -> io::Result<Connecting> {
        self.ask(&Request::Connect(address)).map(Connecting::Asked)
    }

    fn connected(&self, stream: &Stream) -> io::Result<bool> {
        socket::connected(stream)
    }

    fn set_user_timeout(&self, stream: &Stream, limit: Duration) -> io::Result<()> {
        socket::set_user_timeout(stream, limit)
    }
}

/// A request whose answer is awaited. Dropped, it is taken back: the answer finds nobody.
#[derive(Debug)]
pub struct Asked(OwnedFd);

impl AsFd for Asked {
    /// Readable when the answer is there.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Asked {
    fn reply(&self) -> io::Result<Option<(Reply, Option<OwnedFd>)>> {
        message::receive(&self.0).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => gone(&error),
            _ => error,
        })
    }

    /// The socket, once it is there; it may still be connecting.
    ///
    /// # Errors
    /// It was refused, or cannot be had.
    pub fn try_take(&self) -> io::Result<Option<Stream>> {
        match self.reply()? {
            None => Ok(None),
            Some((Reply::Connecting, Some(fd))) => {
                // Who sent it may be another version.
                let flags = rustix::fs::fcntl_getfl(&fd)?;
                rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
                Ok(Some(fd.into()))
            }
            Some((reply, _)) => Err(failure(reply)),
        }
    }

    /// Waits for the addresses of a name.
    fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        let by = Instant::now() + RESOLVE_LIMIT;
        loop {
            match self.reply()? {
                Some((Reply::Addresses(addresses), _)) => return Ok(addresses),
                Some((reply, _)) => return Err(failure(reply)),
                None => {}
            }
            let left = by.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn failure(reply: Reply) -> io::Error {
    match reply {
        Reply::Refused(reason) => io::Error::new(ErrorKind::PermissionDenied, reason),
        Reply::Failed(Some(errno), _) => io::Error::from_raw_os_error(errno),
        Reply::Failed(None, reason) => io::Error::other(reason),
        Reply::Addresses(_) | Reply::Connecting => {
            io::Error::new(ErrorKind::InvalidData, "the process that connects for this one makes no sense")
        }
    }
}
