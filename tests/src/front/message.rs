//! vhost-user messages that `virtio-driver` has no call for, sent on its own connection while it is silent: writing the
//! configuration space, and the channel for the back end's messages.

use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::Result;

/// Front-end messages (vhost-user specification).
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_BACKEND_REQ_FD: u32 = 21;
const SET_CONFIG: u32 = 25;
/// Version 1; the same with an answer wanted.
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;
const BACKEND_REQ: u64 = 1 << 5;
const REPLY_ACK: u64 = 1 << 3;
/// Byte `writeback` of the configuration space of a block device.
const WRITEBACK: u32 = 32;
/// Back-end message.
const CONFIG_CHANGE_MSG: u32 = 2;

/// Another handle on the connection to the socket at `path` that this process has.
fn connection(path: &Path) -> Result<OwnedFd> {
    let this = pidfd_open(getpid(), PidfdFlags::empty())?;
    for entry in std::fs::read_dir("/proc/self/fd")?.flatten() {
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(fd) = pidfd_getfd(&this, number, PidfdGetfdFlags::empty()) else { continue };
        let peer = rustix::net::getpeername(&fd).ok().flatten();
        let peer = peer.and_then(|peer| rustix::net::SocketAddrUnix::try_from(peer).ok());
        let peer = peer.and_then(|peer| peer.path().map(|path| path.to_bytes().to_vec()));
        if peer.is_some_and(|peer| peer == path.as_os_str().as_encoded_bytes()) {
            return Ok(fd);
        }
    }
    bail!("no connection to {}", path.display())
}

/// Sends a message, with a descriptor; the payload of the answer, if there is one.
fn ask(
    connection: &OwnedFd,
    request: u32,
    reply: bool,
    body: &[u8],
    fd: Option<&UnixStream>,
) -> Result<Vec<u8>> {
    let flags = VERSION | if reply && request != GET_PROTOCOL_FEATURES { NEED_REPLY } else { 0 };
    let mut message = [request, flags, body.len() as u32].map(u32::to_ne_bytes).concat();
    message.extend_from_slice(body);
    let fds = fd.map(|fd| [fd.as_fd()]);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if let Some(fds) = &fds {
        ensure!(ancillary.push(SendAncillaryMessage::ScmRights(fds)), "no room for a descriptor");
    }
    sendmsg(connection, &[IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL)?;
    if !reply {
        return Ok(Vec::new());
    }
    let mut answer = [0; 20];
    let mut none = RecvAncillaryBuffer::default();
    let got = recvmsg(connection, &mut [IoSliceMut::new(&mut answer)], &mut none, RecvFlags::WAITALL)?;
    ensure!(got.bytes == answer.len(), "the back end closed the connection");
    Ok(answer[12..].to_vec())
}

fn acknowledged(connection: &OwnedFd, request: u32, body: &[u8], fd: Option<&UnixStream>) -> Result<()> {
    let answer = ask(connection, request, true, body, fd)?;
    ensure!(answer == [0; 8], "the back end refused message {request}");
    Ok(())
}

/// Writes `writeback` of the configuration space.
pub(super) fn set_write_cache(path: &Path, on: bool) -> Result<()> {
    let connection = connection(path)?;
    with_reply_ack(&connection, 0)?;
    let mut body = [WRITEBACK, 1, 0].map(u32::to_ne_bytes).concat();
    body.push(on.into());
    acknowledged(&connection, SET_CONFIG, &body, None)
}

/// Negotiates these protocol features besides what is offered and `virtio-driver` may have asked for.
fn with_reply_ack(connection: &OwnedFd, more: u64) -> Result<()> {
    let offered = ask(connection, GET_PROTOCOL_FEATURES, true, &[], None)?;
    let offered = u64::from_ne_bytes(offered.try_into().ok().context("a short answer")?);
    let wanted = REPLY_ACK | more;
    ensure!(offered & wanted == wanted, "protocol features {offered:#x} lack some of {wanted:#x}");
    ask(connection, SET_PROTOCOL_FEATURES, false, &offered.to_ne_bytes(), None).map(|_| ())
}

/// The back end's messages.
#[derive(Debug)]
pub struct BackendMessages(UnixStream);

impl BackendMessages {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let connection = connection(path)?;
        with_reply_ack(&connection, BACKEND_REQ)?;
        let (ours, theirs) = UnixStream::pair()?;
        acknowledged(&connection, SET_BACKEND_REQ_FD, &[], Some(&theirs))?;
        Ok(Self(ours))
    }

    /// Waits for `CONFIG_CHANGE_MSG`.
    pub fn wait_config_change(&mut self, limit: Duration) -> Result<()> {
        self.0.set_read_timeout(Some(limit))?;
        let mut message = [0; 12];
        self.0.read_exact(&mut message).context("no message of the back end")?;
        let word =
            |at: usize| u32::from_ne_bytes([message[at], message[at + 1], message[at + 2], message[at + 3]]);
        ensure!((word(0), word(8)) == (CONFIG_CHANGE_MSG, 0), "another message: {message:02x?}");
        Ok(())
    }
}
