//! [`Link`]: the control socket. It carries the set-up, regions that come and go later, and, by hanging up, the news of the
//! peer's death. Nothing of a message's way goes through it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg,
    socket_with, socketpair,
};

use super::wire::{self, Message, WireError};

/// Why the control socket is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer is gone.
    #[error("the peer is gone")]
    Gone,
    /// A message that cannot be read.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Another number of descriptors than the message has.
    #[error("message type {kind} with {found} descriptors")]
    Descriptors {
        /// Its type.
        kind: u16,
        /// How many came.
        found: usize,
    },
    /// More than fits was sent, or descriptors were lost on the way.
    #[error("a message or its descriptors were cut")]
    Truncated,
    /// Nothing came in time.
    #[error("the peer did not answer in time")]
    Late,
    /// The system refused something.
    #[error("cannot {what}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        error: Errno,
    },
}

/// A connected `SOCK_SEQPACKET` socket.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
}

impl Link {
    /// Takes a connected socket.
    ///
    /// # Errors
    /// It is no `SOCK_SEQPACKET` Unix socket.
    pub fn new(socket: OwnedFd) -> Result<Self, LinkError> {
        let kind = rustix::net::sockopt::socket_type(&socket)
            .map_err(|error| LinkError::System { what: "use the control socket", error })?;
        if kind != SocketType::SEQPACKET {
            return Err(LinkError::System { what: "use the control socket", error: Errno::PROTOTYPE });
        }
        Ok(Self { socket })
    }

    /// Connects to a socket file.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn dial(path: &std::path::Path) -> Result<Self, LinkError> {
        let failed = |error| LinkError::System { what: "connect", error };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(failed)?;
        connect(&socket, &address).map_err(failed)?;
        Ok(Self { socket })
    }

    /// Two that are connected to each other.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn pair() -> Result<(Self, Self), LinkError> {
        let flags = SocketFlags::CLOEXEC;
        let (one, two) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(|error| LinkError::System { what: "make a socket pair", error })?;
        Ok((Self { socket: one }, Self { socket: two }))
    }

    /// The socket, to be given to another process.
    #[must_use]
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Sends a message without blocking; false if there is no room now.
    ///
    /// # Errors
    /// The peer is gone, or the system refused.
    pub fn send(&self, message: &Message, fd: Option<BorrowedFd<'_>>) -> Result<bool, LinkError> {
        let bytes = message.encode();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = fd.map(|fd| [fd]);
        if let Some(fds) = &fds {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            match sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, flags) {
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(LinkError::Gone),
                Err(error) => return Err(LinkError::System { what: "send on the control socket", error }),
            }
        }
    }

    /// Receives a message without blocking; `None` if none is there.
    ///
    /// # Errors
    /// The peer is gone, or sent what is no message.
    pub fn receive(&self) -> Result<Option<(Message, Option<OwnedFd>)>, LinkError> {
        let mut bytes = [0; wire::BYTES + 1];
        // Room for more than is ever right; what does not fit, the system closes and says so.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut reset = false;
        let received = loop {
            match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
                Ok(received) => break received,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                // A peer that died with messages of ours unread: told once, before the messages that it had sent itself.
                Err(Errno::CONNRESET) if !reset => reset = true,
                Err(Errno::CONNRESET) => return Err(LinkError::Gone),
                Err(error) => return Err(LinkError::System { what: "receive on the control socket", error }),
            }
        };
        // Taken out whatever else is wrong, so that they are closed.
        let mut fds = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Err(LinkError::Gone);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(LinkError::Truncated);
        }
        let message = Message::decode(&bytes[..received.bytes])?;
        if fds.len() != message.descriptors() {
            return Err(LinkError::Descriptors { kind: message.kind(), found: fds.len() });
        }
        Ok(Some((message, fds.pop())))
    }

    /// Waits until there is something to receive (or, with `writable`, room to send).
    ///
    /// # Errors
    /// The deadline passed.
    pub fn wait(&self, writable: bool, deadline: Instant) -> Result<(), LinkError> {
        let flags = if writable { PollFlags::OUT } else { PollFlags::IN };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LinkError::Late);
            }
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let mut fds = [PollFd::new(&self.socket, flags)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => {}
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(LinkError::System { what: "wait for the peer", error }),
            }
        }
    }

    /// The next message, waited for.
    ///
    /// # Errors
    /// As [`receive`](Self::receive) and [`wait`](Self::wait).
    pub fn expect(&self, deadline: Instant) -> Result<(Message, Option<OwnedFd>), LinkError> {
        loop {
            if let Some(message) = self.receive()? {
                return Ok(message);
            }
            self.wait(false, deadline)?;
        }
    }

    /// Whether the peer hung up, without taking a message that may be there.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::empty())];
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut fds, Some(&zero)), Ok(1))
            && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
