//! The back-end channel (`SET_BACKEND_REQ_FD`), of which we use one message: `CONFIG_CHANGE_MSG`.
//!
//! `vhost` 0.18 receives the channel but its `Backend` cannot send this message and does not give the socket out. The
//! descriptor is therefore taken by peeking at the message before the crate reads it: a peek duplicates the passed
//! descriptor, and the crate then handles (and closes) its own copy.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::io::IoSliceMut;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::status::{GET_STATUS, SET_STATUS};

/// `VHOST_USER_SET_BACKEND_REQ_FD` and `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const SET_BACKEND_REQ_FD: u32 = 21;
const CONFIG_CHANGE_MSG: u32 = 2;
/// Message flags: protocol version 1, no reply wanted.
const VERSION: u32 = 1;

/// What a peek at the next message told.
#[derive(Debug)]
pub(crate) enum Peeked {
    /// Nothing to do but handle it.
    Other,
    /// It brings the back-end channel.
    Channel(UnixStream),
    /// It tells the driver's status, or asks for it.
    Status,
}

/// Waits for the next message header and looks at it without taking it.
///
/// Descriptors of other messages would be duplicated for nothing, so the first look leaves them out.
pub(crate) fn peek(socket: &UnixStream) -> io::Result<Peeked> {
    let mut header = [0; 12];
    let got = loop {
        match rustix::net::recv(socket, &mut header, RecvFlags::PEEK) {
            Ok((got, _)) => break got,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    let request = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
    if got == header.len() && matches!(request, SET_STATUS | GET_STATUS) {
        return Ok(Peeked::Status);
    }
    if got < header.len() || request != SET_BACKEND_REQ_FD {
        return Ok(Peeked::Other);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    recvmsg(socket, &mut [IoSliceMut::new(&mut header)], &mut ancillary, flags)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message
            && let Some(fd) = fds.next()
        {
            return Ok(channel(fd).map_or(Peeked::Other, Peeked::Channel));
        }
    }
    Ok(Peeked::Other)
}

/// The descriptor as a socket that never blocks the data thread; `None` if it is no stream socket.
fn channel(fd: OwnedFd) -> Option<UnixStream> {
    let is_unix =
        rustix::net::sockopt::socket_domain(&fd).is_ok_and(|it| it == rustix::net::AddressFamily::UNIX);
    let is_stream =
        rustix::net::sockopt::socket_type(&fd).is_ok_and(|it| it == rustix::net::SocketType::STREAM);
    if !is_unix || !is_stream {
        return None;
    }
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(true).ok()?;
    Some(stream)
}

/// Sends `CONFIG_CHANGE_MSG`: the front end reads the configuration space again and interrupts its guest.
pub(crate) fn notify_config_change(channel: &UnixStream) -> io::Result<()> {
    let mut message = [0; 12];
    message[..4].copy_from_slice(&CONFIG_CHANGE_MSG.to_ne_bytes());
    message[4..8].copy_from_slice(&VERSION.to_ne_bytes());
    let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
    match rustix::net::send(channel, &message, flags)? {
        12 => Ok(()),
        sent => Err(io::Error::new(io::ErrorKind::WriteZero, format!("{sent} of 12 bytes sent"))),
    }
}
