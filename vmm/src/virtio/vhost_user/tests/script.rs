//! A backend on the other end of a socket that answers as a test tells it to, and remembers what it was told.

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use rustix::io::IoSliceMut;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::virtio::vhost_user::link::Link;
use crate::virtio::{F_RING_EVENT_IDX, F_VERSION_1};

pub(crate) const GET_FEATURES: u32 = 1;
pub(crate) const SET_MEM_TABLE: u32 = 5;
pub(crate) const SET_VRING_BASE: u32 = 10;
pub(crate) const GET_VRING_BASE: u32 = 11;
pub(crate) const SET_VRING_KICK: u32 = 12;
pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(crate) const GET_QUEUE_NUM: u32 = 17;
pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
pub(crate) const GET_CONFIG: u32 = 24;
pub(crate) const SET_CONFIG: u32 = 25;
pub(crate) const GET_INFLIGHT_FD: u32 = 31;
pub(crate) const SET_INFLIGHT_FD: u32 = 32;
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub(crate) const F_PROTOCOL: u64 = 1 << 30;
/// Protocol features: several queues, acknowledgements, the backend's channel, the configuration space, the log.
pub(crate) const P_MQ: u64 = 1;
pub(crate) const P_ACK: u64 = 1 << 3;
pub(crate) const P_CHANNEL: u64 = 1 << 5;
pub(crate) const P_CONFIG: u64 = 1 << 9;
pub(crate) const P_LOG: u64 = 1 << 12;
const NEED_REPLY: u32 = 1 << 3;
/// Version 1, reply.
pub(crate) const REPLY: u32 = 1 | 1 << 2;

/// What a backend was sent.
#[derive(Default)]
pub(crate) struct Told {
    /// Requests with their payloads, in order.
    pub(crate) messages: Vec<(u32, Vec<u8>)>,
    /// Descriptors, with the request that brought them.
    pub(crate) fds: Vec<(u32, OwnedFd)>,
}

/// Shared with the thread of a backend.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Told>>);

impl Log {
    pub(crate) fn with<T>(&self, f: impl FnOnce(&mut Told) -> T) -> T {
        f(&mut self.0.lock().unwrap())
    }
    pub(crate) fn times(&self, request: u32) -> usize {
        self.payloads(request).len()
    }
    pub(crate) fn payloads(&self, request: u32) -> Vec<Vec<u8>> {
        self.with(|told| told.messages.iter().filter(|m| m.0 == request).map(|m| m.1.clone()).collect())
    }
    /// The two words of each message of that kind, e.g. queue and base.
    pub(crate) fn pairs(&self, request: u32) -> Vec<(u32, u32)> {
        let word = |p: &[u8], i: usize| u32::from_ne_bytes(p[i..i + 4].try_into().unwrap());
        self.payloads(request).iter().map(|p| (word(p, 0), word(p, 4))).collect()
    }
    /// A descriptor that came with a message of that kind.
    pub(crate) fn fd(&self, request: u32) -> OwnedFd {
        self.with(|told| told.fds.iter().find(|fd| fd.0 == request).unwrap().1.try_clone().unwrap())
    }
}

pub(crate) type Answer = dyn Fn(u32, &[u8], &[u32]) -> Option<Vec<u8>> + Send + Sync;

/// What a backend is like.
#[derive(Clone)]
pub(crate) struct Script {
    pub(crate) features: u64,
    pub(crate) protocol: u64,
    pub(crate) queues: u64,
    pub(crate) config: Vec<u8>,
    /// What it says of its log (`mmap_size`, `mmap_offset`, queues and size if not those asked for), and how long the
    /// file is.
    pub(crate) inflight: (u64, u64, Option<(u16, u16)>, u64),
    /// The log is a pipe.
    pub(crate) log_is_a_pipe: bool,
    /// The connection ends when this request comes.
    pub(crate) dies_at: Option<u32>,
    pub(crate) answer: Arc<Answer>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            features: F_VERSION_1 | F_PROTOCOL | F_RING_EVENT_IDX,
            protocol: P_ACK | P_CONFIG | P_MQ | P_LOG | P_CHANNEL,
            queues: 4,
            config: vec![0; 60],
            inflight: (1 << 16, 0, None, 1 << 16),
            log_is_a_pipe: false,
            dies_at: None,
            answer: Arc::new(|_, _, _| None),
        }
    }
}

/// A whole message.
pub(crate) fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    let header = [request, REPLY, payload.len() as u32];
    header.iter().flat_map(|word| word.to_le_bytes()).chain(payload.iter().copied()).collect()
}

impl Script {
    /// `answer` says what goes back for a request and its payload, and the requests before it; where it says `None`,
    /// what a good backend would say.
    pub(crate) fn answering(
        answer: impl Fn(u32, &[u8], &[u32]) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> Self {
        Self { answer: Arc::new(answer), ..Self::default() }
    }

    /// A backend of this kind, connected.
    pub(crate) fn link(&self) -> (Link, Log) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Link::from_stream("disk0", ours, 4).unwrap(), self.serve(theirs))
    }

    /// Serves a connection on a thread.
    pub(crate) fn serve(&self, stream: UnixStream) -> Log {
        let (script, log) = (self.clone(), Log::default());
        std::thread::spawn({
            let log = log.clone();
            move || while script.one(&stream, &log).is_some() {}
        });
        log
    }

    fn one(&self, mut stream: &UnixStream, log: &Log) -> Option<()> {
        let (header, fds) = receive(stream, 12)?;
        let word = |i: usize| u32::from_le_bytes(header[i..i + 4].try_into().unwrap());
        let (request, flags, len) = (word(0), word(4), word(8) as usize);
        let payload = if len == 0 { Vec::new() } else { receive(stream, len)?.0 };
        if self.dies_at == Some(request) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
            return None;
        }
        let before = log.with(|told| {
            let before: Vec<u32> = told.messages.iter().map(|m| m.0).collect();
            told.messages.push((request, payload.clone()));
            told.fds.extend(fds.into_iter().map(|fd| (request, fd)));
            before
        });
        if let Some(bytes) = (self.answer)(request, &payload, &before) {
            return stream.write_all(&bytes).ok();
        }
        if request == GET_INFLIGHT_FD {
            return self.give_log(stream, &payload);
        }
        let good = match request {
            GET_FEATURES => reply(request, &self.features.to_le_bytes()),
            GET_PROTOCOL_FEATURES => reply(request, &self.protocol.to_le_bytes()),
            GET_QUEUE_NUM => reply(request, &self.queues.to_le_bytes()),
            GET_VRING_BASE => reply(request, &payload),
            GET_CONFIG => reply(request, &[&payload[..12], &self.config[..]].concat()),
            _ if flags & NEED_REPLY != 0 => reply(request, &[0; 8]),
            _ => return Some(()),
        };
        stream.write_all(&good).ok()
    }

    fn give_log(&self, stream: &UnixStream, asked: &[u8]) -> Option<()> {
        let (len, offset, shape, file_len) = self.inflight;
        let shape = shape.map(|(queues, size)| [queues.to_ne_bytes(), size.to_ne_bytes()].concat());
        let payload =
            [&len.to_ne_bytes()[..], &offset.to_ne_bytes(), shape.as_deref().unwrap_or(&asked[16..20])]
                .concat();
        // As in the C structure, padded to eight bytes.
        let payload = [&payload[..], &[0; 4]].concat();
        if self.log_is_a_pipe {
            return send(stream, &reply(GET_INFLIGHT_FD, &payload), &std::io::pipe().unwrap().0);
        }
        let file = rustix::fs::memfd_create("inflight", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, file_len).unwrap();
        send(stream, &reply(GET_INFLIGHT_FD, &payload), &file)
    }
}

/// Sends bytes with a descriptor.
pub(crate) fn send(stream: &UnixStream, bytes: &[u8], fd: &impl AsFd) -> Option<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).ok().map(drop)
}

fn receive(stream: &UnixStream, len: usize) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let (mut bytes, mut got, mut fds) = (vec![0; len], 0, Vec::new());
    while got < len {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let read =
            recvmsg(stream, &mut [IoSliceMut::new(&mut bytes[got..])], &mut ancillary, flags).ok()?.bytes;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(new) = message {
                fds.extend(new);
            }
        }
        if read == 0 {
            return None;
        }
        got += read;
    }
    Some((bytes, fds))
}
