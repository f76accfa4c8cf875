//! The network: [`SimNetwork`] gives the engine one end of a socket pair for each connection; the world holds the other and
//! decides what passes, and when.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use vcp_iscsi::portal::net::{Connecting, Network, Resolution, Stream};
use vcp_iscsi::url::Portal;

pub type ConnId = u32;

/// How an attempt to connect stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    Pending,
    Up,
    Refused,
}

#[derive(Debug, Default)]
struct State {
    next: ConnId,
    /// The newest connection of each descriptor.
    by_fd: BTreeMap<RawFd, ConnId>,
    attempts: BTreeMap<ConnId, Attempt>,
    begun: Vec<(ConnId, SocketAddr, UnixStream)>,
    send_buffer_bytes: usize,
}

/// What the engine connects with.
#[derive(Clone, Debug)]
pub struct SimNetwork(Arc<Mutex<State>>);

impl SimNetwork {
    /// `send_buffer_bytes`: of the engine's sockets.
    pub fn new(send_buffer_bytes: usize) -> Self {
        Self(Arc::new(Mutex::new(State { send_buffer_bytes, ..State::default() })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("one thread")
    }

    /// Connections that the engine began since the last call.
    pub fn begun(&self) -> Vec<(ConnId, SocketAddr, UnixStream)> {
        std::mem::take(&mut self.lock().begun)
    }

    /// Whether the descriptor is of a connection that is still being made: such a one is not ready, whatever the pair is.
    pub fn is_pending(&self, fd: &impl AsFd) -> bool {
        let state = self.lock();
        let id = state.by_fd.get(&fd.as_fd().as_raw_fd());
        id.and_then(|id| state.attempts.get(id)) == Some(&Attempt::Pending)
    }

    pub fn decide(&self, id: ConnId, attempt: Attempt) {
        self.lock().attempts.insert(id, attempt);
    }
}

impl Network for SimNetwork {
    fn resolve(&self, portal: &Portal) -> io::Result<Resolution> {
        let host = portal.host.parse().map_err(|_| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(Resolution::Done(vec![SocketAddr::new(host, portal.port)]))
    }

    fn start_connect(&self, address: SocketAddr) -> io::Result<Connecting> {
        let (engine, world) = UnixStream::pair()?;
        engine.set_nonblocking(true)?;
        world.set_nonblocking(true)?;
        let mut state = self.lock();
        rustix::net::sockopt::set_socket_send_buffer_size(&engine, state.send_buffer_bytes)?;
        state.next += 1;
        let id = state.next;
        state.by_fd.insert(engine.as_raw_fd(), id);
        state.attempts.insert(id, Attempt::Pending);
        state.begun.push((id, address, world));
        Ok(Stream::from(engine).into())
    }

    fn connected(&self, stream: &Stream) -> io::Result<bool> {
        let state = self.lock();
        let id = state.by_fd.get(&stream.as_fd().as_raw_fd());
        match id.and_then(|id| state.attempts.get(id)) {
            Some(Attempt::Up) => Ok(true),
            Some(Attempt::Pending) => Ok(false),
            Some(Attempt::Refused) | None => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }
}

/// What travels.
#[derive(Debug)]
pub enum Item {
    Bytes(Vec<u8>),
    /// The sender closed.
    End,
    /// The connection was reset: what is still on its way is lost.
    Reset,
}

/// One direction of a connection: in order, each piece due at its time.
#[derive(Debug, Default)]
pub struct Pipe {
    pub queue: VecDeque<(u64, Item)>,
    /// Nothing arrives before.
    pub hold_until: u64,
    /// Bytes that still pass before the connection is cut.
    pub cut_after: Option<u64>,
    last: u64,
    ended: bool,
}

impl Pipe {
    /// Sends something that takes until `at`, or behind what was sent before; returns when it is due.
    pub fn push(&mut self, at: u64, item: Item) -> Option<u64> {
        if self.ended {
            return None;
        }
        self.ended = !matches!(item, Item::Bytes(_));
        self.last = self.last.max(at).max(self.hold_until);
        self.queue.push_back((self.last, item));
        Some(self.last)
    }

    /// Holds back what is underway as well.
    pub fn hold(&mut self, until: u64) {
        self.hold_until = self.hold_until.max(until);
        self.last = self.last.max(until);
        for (at, _) in &mut self.queue {
            *at = (*at).max(until);
        }
    }

    /// Loses what would arrive later than that.
    pub fn forget_after(&mut self, at: u64) {
        self.queue.retain(|(due, _)| *due <= at);
    }

    pub fn due(&mut self, now: u64) -> Option<Item> {
        if self.queue.front().is_some_and(|(at, _)| *at <= now) {
            self.queue.pop_front().map(|(_, item)| item)
        } else {
            None
        }
    }
}

/// A connection as the network has it.
#[derive(Debug)]
pub struct Conn {
    pub portal: usize,
    /// The other end of the engine's socket; `None` once one of both closed it.
    pub socket: Option<UnixStream>,
    pub up: bool,
    pub to_target: Pipe,
    pub to_engine: Pipe,
    /// The engine's bytes stay in its socket until then.
    pub stop_reading_until: u64,
    /// What the engine's socket did not take.
    pub stuck: Vec<u8>,
    /// Whether the target still has it.
    pub at_target: bool,
}

impl Conn {
    pub fn new(portal: usize, socket: UnixStream) -> Self {
        Self {
            portal,
            socket: Some(socket),
            up: false,
            to_target: Pipe::default(),
            to_engine: Pipe::default(),
            stop_reading_until: 0,
            stuck: Vec::new(),
            at_target: false,
        }
    }

    /// What the engine sent: `Some(None)` once it closed its end.
    pub fn take_sent(&mut self, buffer: &mut [u8]) -> Option<Option<usize>> {
        let socket = self.socket.as_mut()?;
        match socket.read(buffer) {
            Ok(0) => Some(None),
            Ok(got) => Some(Some(got)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            // It closed with bytes of ours unread.
            Err(_) => Some(None),
        }
    }

    /// Gives bytes to the engine's socket; what does not fit waits.
    pub fn give(&mut self, bytes: &[u8]) {
        self.stuck.extend_from_slice(bytes);
        self.give_stuck();
    }

    /// Whether anything moved.
    pub fn give_stuck(&mut self) -> bool {
        let Some(socket) = self.socket.as_mut() else {
            self.stuck.clear();
            return false;
        };
        let mut moved = false;
        while !self.stuck.is_empty() {
            match socket.write(&self.stuck) {
                Ok(taken) => {
                    self.stuck.drain(..taken);
                    moved = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.stuck.clear(),
            }
        }
        moved
    }
}
