//! Messages of the channel: one JSON text each, with at most one descriptor. Both directions come from a process that may
//! be in somebody else's hands: length and number of descriptors are bounded, and what is not understood is an error.

use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest message, bytes: a name has 253, and an answer at most [`MAX_ADDRESSES`] addresses.
pub const MAX_BYTES: usize = 4096;
/// Most addresses of a name that are used.
pub const MAX_ADDRESSES: usize = 32;

/// What is asked. The descriptor with it is where the answer goes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// The addresses of a portal.
    Resolve {
        /// Name or address.
        host: String,
        /// TCP port.
        port: u16,
    },
    /// A connection to this address.
    Connect(SocketAddr),
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Reply {
    /// The addresses of a name.
    Addresses(Vec<SocketAddr>),
    /// The descriptor with it is a socket that connects, or has connected.
    Connecting,
    /// It is not allowed, for this reason.
    Refused(String),
    /// It could not be done: the system's error number, if there is one, and words.
    Failed(Option<i32>, String),
}

/// A pair of sockets that keep messages apart. Neither end waits.
///
/// # Errors
/// What the system reports.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Sends a message, with a descriptor if there is one; never waits.
///
/// # Errors
/// The other side is gone, or does not listen ([`ErrorKind::WouldBlock`]).
pub fn send(to: impl AsFd, message: &impl Serialize, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    if text.len() > MAX_BYTES {
        return Err(io::Error::new(ErrorKind::InvalidInput, "a message that is too long"));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    sendmsg(to, &[IoSlice::new(&text)], &mut ancillary, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
    Ok(())
}

/// Receives a message and its descriptor; never waits. `None`: there is none yet.
///
/// # Errors
/// The other side is gone ([`ErrorKind::UnexpectedEof`]), or what it sent is no such message.
pub fn receive<T: DeserializeOwned>(from: impl AsFd) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    let mut text = [0u8; MAX_BYTES];
    // Room for one: what else is sent is closed by the kernel.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = match recvmsg(from, &mut [IoSliceMut::new(&mut text)], &mut ancillary, flags) {
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        other => other?,
    };
    let mut fd = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message {
            fd = fds.next();
        }
    }
    if got.bytes == 0 && fd.is_none() {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    let wrong = |what: String| io::Error::new(ErrorKind::InvalidData, what);
    if got.flags.contains(rustix::net::ReturnFlags::TRUNC) {
        return Err(wrong("a message that is too long".into()));
    }
    let text = text.get(..got.bytes).unwrap_or_default();
    let message = serde_json::from_slice(text).map_err(|error| wrong(error.to_string()))?;
    Ok(Some((message, fd)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_keep_their_descriptors() {
        let (a, b) = pair().unwrap();
        assert!(receive::<Request>(&b).unwrap().is_none());
        let (theirs, ours) = pair().unwrap();
        let request = Request::Connect("[::1]:3260".parse().unwrap());
        send(&a, &request, Some(theirs.as_fd())).unwrap();
        send(&a, &Request::Resolve { host: "h".into(), port: 1 }, None).unwrap();
        let (got, fd) = receive::<Request>(&b).unwrap().unwrap();
        assert_eq!(got, request);
        send(fd.unwrap(), &Reply::Failed(Some(5), "x".into()), None).unwrap();
        assert_eq!(receive::<Reply>(&ours).unwrap().unwrap().0, Reply::Failed(Some(5), "x".into()));
        assert!(receive::<Request>(&b).unwrap().unwrap().1.is_none());
        drop(a);
        assert_eq!(receive::<Request>(&b).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let (a, b) = pair().unwrap();
        for text in [
            &b"{"[..],
            b"{\"listen\":1}",
            b"\"connect\"",
            b"{\"connect\":\"host:1\"}",
            &[b' '; MAX_BYTES + 1],
        ] {
            rustix::net::send(&a, text, SendFlags::empty()).unwrap();
            assert_eq!(receive::<Request>(&b).unwrap_err().kind(), ErrorKind::InvalidData);
        }
        // And it goes on.
        send(&a, &Request::Resolve { host: String::new(), port: 0 }, None).unwrap();
        assert!(receive::<Request>(&b).unwrap().is_some());
    }
}
