//! TCP: connections of guests, each with a socket of the host on the other side.
//!
//! [`open`] begins them, [`arrive`] takes what guests send, [`ahead`] keeps what they send behind a gap, [`serve`] sends to them, [`end`] is for those that end early,
//! [`keep`] for those that go on in another process. Here is what all share: the table, whose turn it is, and deadlines.

mod ahead;
mod arrive;
mod end;
mod keep;
mod open;
mod serve;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::RandomState;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::net::sockopt;
use serde_json::{Value, json};

pub(super) use self::keep::FlowState;
use super::super::packet::Link;
use super::super::slab::Slab;
use super::super::sys;
use super::super::tcp::{Conn, Late, Ms, Pool, Reassembly, State};
use super::shared::Shared;
use crate::switch::work::PortId;
use crate::uplink::Ingress;

/// Connections that have a turn before others than this stack do.
const FLOWS_PER_TURN: usize = 32;

/// The two ends of a connection, as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    guest: (IpAddr, u16),
    remote: (IpAddr, u16),
    vid: u16,
}

#[derive(Debug)]
struct Flow {
    key: Key,
    conn: Conn,
    /// Its station, if it is known.
    link: Option<Link>,
    port: PortId,
    /// What the guest sent behind a gap.
    ahead: Option<Box<Reassembly>>,
    /// None once all is over.
    socket: Option<OwnedFd>,
    token: u64,
    /// Where the kernel peeks next.
    peek_at: u32,
    /// The socket may have more than was read.
    readable: bool,
    /// The kernel has told of the socket's end, which it does once.
    hung_up: bool,
    /// It is in the queue of those that have something to do.
    queued: bool,
    /// It is in the set of timers with this deadline.
    timer: Ms,
}

/// See the module.
#[derive(Debug)]
pub(super) struct TcpFlows {
    flows: Slab<Flow>,
    keys: HashMap<Key, u32, RandomState>,
    ready: VecDeque<u32>,
    timers: BTreeSet<(Ms, u32)>,
    /// Whose station is not known.
    lost: Vec<u32>,
    /// Memory for what comes out of order.
    pool: Pool,
}

/// What became of a turn of a connection.
enum Turn {
    /// It has nothing more to do.
    Done,
    /// It has, but others come first.
    Again,
    /// The guest has no room.
    Full,
    /// It is over.
    Over,
}

/// How a connection ends early.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// The guest said so.
    Guest,
    /// The socket did, or we do: the guest is told.
    Host,
    /// As it should.
    Well,
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

impl TcpFlows {
    /// No connections, and so many bytes for what comes out of order.
    pub(super) fn new(ahead_bytes: u32) -> Self {
        Self {
            flows: Slab::default(),
            keys: HashMap::default(),
            ready: VecDeque::new(),
            timers: BTreeSet::new(),
            lost: Vec::new(),
            pool: Pool::new(ahead_bytes),
        }
    }

    /// Bytes of memory that hold what came out of order.
    pub(super) fn ahead_bytes(&self) -> u64 {
        self.pool.used_bytes()
    }

    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    pub(super) fn deadline(&self) -> Option<Ms> {
        self.timers.first().map(|&(deadline, _)| deadline)
    }

    pub(super) fn list(&self) -> Vec<Value> {
        let one = |(_, flow): (u32, &Flow)| {
            json!({
                "protocol": "tcp", "guest": SocketAddr::new(flow.key.guest.0, flow.key.guest.1),
                "remote": SocketAddr::new(flow.key.remote.0, flow.key.remote.1), "state": flow.conn.state,
                "in_flight": flow.conn.in_flight(), "window": flow.conn.told_room(),
                "guest_ended": flow.conn.guest_ended(), "host_ended": flow.conn.host_ended(),
            })
        };
        self.flows.iter().map(one).collect()
    }

    /// Something happened to a socket.
    pub(super) fn event(&mut self, token: u64, flags: EventFlags, shared: &mut Shared) {
        let Some(at) = self.flows.find(token) else { return };
        let Some(flow) = self.flows.get_mut(at) else { return };
        let Some(socket) = &flow.socket else { return };
        if flags.contains(EventFlags::ERR) || flow.conn.state == State::Connecting {
            shared.counters.calls += 1;
            let error = match sockopt::socket_error(socket) {
                Ok(Err(error)) | Err(error) => Some(error.raw_os_error()),
                Ok(Ok(())) => None,
            };
            if let Some(error) = error {
                self.failed(at, error, shared);
                return;
            }
            if flow.conn.state == State::Connecting {
                if !flags.contains(EventFlags::OUT) {
                    return;
                }
                Self::connected(flow, shared);
            }
        }
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP) {
            flow.readable = true;
            flow.hung_up |= flags.intersects(EventFlags::RDHUP | EventFlags::HUP);
        }
        if flags.contains(EventFlags::OUT) {
            Self::measure(flow, shared);
            if flow.ahead.is_some() && !self.fill(at, shared) {
                return;
            }
        }
        self.queue(at);
        self.schedule(at);
    }

    /// The host has agreed.
    fn connected(flow: &mut Flow, shared: &mut Shared) {
        flow.conn.connected(shared.ms);
        flow.readable = true;
        Self::measure(flow, shared);
    }

    /// Finds out what the socket has room for.
    fn measure(flow: &mut Flow, shared: &mut Shared) {
        let Some(socket) = &flow.socket else { return };
        shared.counters.calls += 1;
        let room = sys::send_room(socket).unwrap_or(0);
        // The kernel counts what it needs beside the data as well.
        flow.conn.room(room - room / 8);
    }

    /// Has a connection's turn come.
    fn queue(&mut self, at: u32) {
        if let Some(flow) = self.flows.get_mut(at)
            && !flow.queued
        {
            flow.queued = true;
            self.ready.push_back(at);
        }
    }

    /// Sees to it that a deadline is not missed.
    fn schedule(&mut self, at: u32) {
        let Some(flow) = self.flows.get_mut(at) else { return };
        let deadline = flow.conn.deadline();
        if deadline < flow.timer {
            self.timers.remove(&(flow.timer, at));
            flow.timer = deadline;
            self.timers.insert((deadline, at));
        }
    }

    /// Lets connections send; whether any did.
    pub(super) fn turn(&mut self, into: &mut dyn Ingress, shared: &mut Shared) -> bool {
        let mut moved = self.late(shared);
        if !shared.found.is_empty() {
            self.find_lost(shared);
        }
        let mut full = None;
        for _ in 0..self.ready.len().min(FLOWS_PER_TURN) {
            let Some(at) = self.ready.pop_front() else { break };
            let Some(flow) = self.flows.get_mut(at) else { continue };
            if !flow.queued {
                continue;
            }
            if flow.link.is_some() && flow.link == full {
                // One that has no room was found to have none a moment ago.
                self.ready.push_back(at);
                continue;
            }
            flow.queued = false;
            let link = flow.link;
            let turn = Self::serve(flow, into, shared, &mut moved);
            self.schedule(at);
            match turn {
                Turn::Done => {}
                Turn::Again => self.queue(at),
                Turn::Full => {
                    full = link;
                    self.queue(at);
                }
                Turn::Over => self.end(at, End::Host, shared),
            }
        }
        moved
    }

    /// Looks at deadlines.
    fn late(&mut self, shared: &mut Shared) -> bool {
        let mut any = false;
        while let Some(&(deadline, at)) = self.timers.first().filter(|(deadline, _)| *deadline <= shared.ms) {
            any = true;
            self.timers.remove(&(deadline, at));
            let Some(flow) = self.flows.get_mut(at) else { continue };
            flow.timer = Ms::MAX;
            match flow.conn.late(shared.ms) {
                Late::No => {}
                Late::Probe => {
                    shared.counters.tcp_probes += 1;
                    self.queue(at);
                }
                Late::Repeat => {
                    shared.counters.tcp_repeats += 1;
                    if flow.link.is_none() {
                        flow.link = shared.neighbour(flow.key.guest.0);
                    }
                    self.queue(at);
                }
                Late::GiveUp => {
                    shared.counters.drops.no_guest += u64::from(flow.link.is_none());
                    self.failed(at, libc::ETIMEDOUT, shared);
                    continue;
                }
                Late::Over => {
                    self.end(at, End::Well, shared);
                    continue;
                }
            }
            self.schedule(at);
        }
        any
    }

    /// Goes on with connections whose guest was found.
    fn find_lost(&mut self, shared: &mut Shared) {
        let found = std::mem::take(&mut shared.found);
        let lost = std::mem::take(&mut self.lost);
        for at in lost {
            let Some(flow) = self.flows.get_mut(at).filter(|flow| flow.link.is_none()) else { continue };
            if found.contains(&flow.key.guest.0) {
                flow.link = shared.neighbour(flow.key.guest.0);
                self.queue(at);
            } else {
                self.lost.push(at);
            }
        }
    }
}

/// Sees to it that the peer of a socket gets a reset when it is closed.
fn reset(socket: &OwnedFd) {
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}
