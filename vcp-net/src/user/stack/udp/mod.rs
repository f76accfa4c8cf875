//! UDP and pings: for each port (or echo number) of a guest a socket of the host that is not connected. Whoever the guest
//! has sent to can answer through it; rows of datagrams pass in one call either way ([`send`], [`bring`]).

mod bring;
mod keep;
mod send;

use std::collections::{HashMap, VecDeque};
use std::hash::RandomState;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with, sockopt};
use serde_json::{Value, json};

pub(super) use self::keep::FlowState;
use super::super::config::{Forward, Transport};
use super::super::packet::Link;
use super::super::slab::Slab;
use super::super::sys;
use super::super::tcp::Ms;
use super::UDP_TOKEN;
use super::shared::Shared;
use crate::frame::VnetHeader;
use crate::switch::work::PortId;
use crate::uplink::Sender;

/// How long a port of a guest is kept that nobody uses (RFC 4787, 4.3: two minutes at least).
const IDLE_MS: Ms = 180_000;
/// The same, of one that only asked for names, and of pings.
const SHORT_IDLE_MS: Ms = 15_000;
/// How often is looked for such.
const SWEEP_MS: Ms = 5_000;
/// Messages for one flow before it is another one's turn.
const PER_TURN: usize = 32;
/// Peers of a port that are remembered.
const PEERS_MAX: usize = 64;
/// Room that the kernel is asked for in a socket, for what a guest cannot take yet.
const SOCKET_BYTES: usize = 4 << 20;
/// How long a guest's frames wait for a socket that has no room: the kernel may be asking for an address that nobody has.
const PATIENCE_MS: Ms = 20;
/// Most bytes of a message.
const MESSAGE_MAX: usize = 65_507;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    ping: bool,
    guest: (IpAddr, u16),
    vid: u16,
}

#[derive(Debug)]
struct Flow {
    key: Key,
    link: Option<Link>,
    port: PortId,
    socket: OwnedFd,
    /// Addresses that may answer, as the host sees them.
    peers: Vec<IpAddr>,
    peer_next: usize,
    /// It has sent to others than name servers.
    plain: bool,
    /// The last query, and how often it was repeated.
    query: (u16, usize),
    /// Something may be there to be read.
    ready: bool,
    queued: bool,
    /// Frames for which the guest had no room: they go first, and the socket keeps what comes behind them.
    held: VecDeque<(VnetHeader, Vec<u8>)>,
    used: Ms,
    /// The socket has had no room since then.
    blocked: Option<Ms>,
    /// What the socket has had no room for, as far as is known: not at all where another process made it.
    overflowed: Option<u32>,
    /// It is there for good, and any address may send.
    forward: Option<Forward>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct UdpFlows {
    flows: Slab<Flow>,
    keys: HashMap<Key, u32, RandomState>,
    ready: VecDeque<u32>,
    sweep_at: Ms,
    /// When a frame has waited for room long enough.
    patience_at: Ms,
}

impl Default for UdpFlows {
    fn default() -> Self {
        Self {
            flows: Slab::default(),
            keys: HashMap::default(),
            ready: VecDeque::new(),
            sweep_at: 0,
            patience_at: Ms::MAX,
        }
    }
}

impl UdpFlows {
    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether every socket was read to its end, and no frame waits for room.
    #[cfg(test)]
    pub(super) fn is_drained(&self) -> bool {
        self.flows.iter().all(|(_, flow)| !flow.ready && flow.held.is_empty())
    }

    pub(super) fn deadline(&self) -> Option<Ms> {
        (!self.flows.is_empty()).then_some(self.sweep_at.min(self.patience_at))
    }

    pub(super) fn list(&self) -> Vec<Value> {
        let one = |(_, flow): (u32, &Flow)| {
            json!({
                "protocol": if flow.key.ping { "ping" } else { "udp" },
                "guest": SocketAddr::new(flow.key.guest.0, flow.key.guest.1), "peers": flow.peers,
                "forward": flow.forward.map(|it| it.to_string()),
            })
        };
        self.flows.iter().map(one).collect()
    }

    pub(super) fn event(&mut self, token: u64, flags: EventFlags, shared: &mut Shared) {
        let Some(at) = self.flows.find(token) else { return };
        let Some(flow) = self.flows.get_mut(at) else { return };
        if flags.contains(EventFlags::OUT) && flow.blocked.take().is_some() {
            shared.watch_input(&flow.socket, token);
        }
        flow.ready = true;
        if !std::mem::replace(&mut flow.queued, true) {
            self.ready.push_back(at);
        }
    }

    /// A socket that listens for a guest.
    pub(super) fn forward(
        &mut self,
        forward: Forward,
        socket: OwnedFd,
        shared: &mut Shared,
    ) -> io::Result<u32> {
        debug_assert_eq!(forward.transport, Transport::Udp);
        let guest = forward.guest.unwrap_or_else(|| shared.first_guest(forward.bind.is_ipv6()));
        let key = Key { ping: false, guest: (guest, forward.port), vid: 0 };
        if self.keys.contains_key(&key) {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "this port of the guest is forwarded already",
            ));
        }
        self.insert(key, None, PortId::UPLINK, socket, Some(forward), shared)
            .ok_or_else(|| io::Error::other("no room for another flow"))
    }

    fn insert(
        &mut self,
        key: Key,
        link: Option<Link>,
        port: PortId,
        socket: OwnedFd,
        forward: Option<Forward>,
        shared: &mut Shared,
    ) -> Option<u32> {
        if !shared.take_flow(port) {
            return None;
        }
        shared.counters.calls += 4;
        if !key.ping {
            let _ = sys::set_udp_gro(&socket);
        }
        // A guest that stands still for a moment loses nothing; the kernel has a limit of its own.
        let _ = sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BYTES);
        let _ = sys::set_count_overflow(&socket);
        let _ = sys::set_recv_errors(&socket, key.guest.0.is_ipv6());
        let flow = Flow {
            key,
            link,
            port,
            socket,
            peers: Vec::new(),
            peer_next: 0,
            plain: false,
            query: (0, 0),
            ready: false,
            queued: false,
            held: VecDeque::new(),
            used: shared.ms,
            blocked: None,
            overflowed: Some(0),
            forward,
        };
        let at = self.flows.insert(flow);
        let token = self.flows.token(UDP_TOKEN, at);
        let watched = self.flows.get(at).map(|flow| shared.watch(&flow.socket, token, false));
        if !matches!(watched, Some(Ok(()))) {
            self.flows.remove(at);
            shared.give_flow(port);
            shared.counters.drops.no_socket += 1;
            return None;
        }
        self.keys.insert(key, at);
        if self.flows.len() == 1 {
            self.sweep_at = shared.ms + SWEEP_MS;
        }
        Some(at)
    }

    /// The flow of a guest's port, a new one if there is none.
    fn of(
        &mut self,
        key: Key,
        target: SocketAddr,
        link: Link,
        from: Sender,
        shared: &mut Shared,
    ) -> Option<u32> {
        if let Some(&at) = self.keys.get(&key) {
            return Some(at);
        }
        let (family, protocol) = match (target.is_ipv6(), key.ping) {
            (false, false) => (AddressFamily::INET, None),
            (true, false) => (AddressFamily::INET6, None),
            (false, true) => (AddressFamily::INET, Some(ipproto::ICMP)),
            (true, true) => (AddressFamily::INET6, Some(ipproto::ICMPV6)),
        };
        shared.counters.calls += 1;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = socket_with(family, SocketType::DGRAM, flags, protocol) else {
            shared.counters.drops.no_socket += 1;
            return None;
        };
        self.insert(key, Some(link), from.port, socket, None, shared)
    }

    /// Ends a flow.
    pub(super) fn end(&mut self, at: u32, shared: &mut Shared) {
        if let Some(flow) = self.flows.remove(at) {
            if self.keys.get(&flow.key) == Some(&at) {
                self.keys.remove(&flow.key);
            }
            shared.give_flow(flow.port);
            shared.counters.calls += 1;
        }
    }

    /// Ends the flows of a port.
    pub(super) fn end_port(&mut self, port: PortId, shared: &mut Shared) {
        let own = self.flows.iter().filter(|(_, it)| it.port == port && it.forward.is_none());
        let own: Vec<u32> = own.map(|(at, _)| at).collect();
        own.into_iter().for_each(|at| self.end(at, shared));
    }
}

fn socket_is_v6(flow: &Flow) -> bool {
    flow.key.guest.0.is_ipv6() != (flow.key.vid & 0x8000 != 0)
}
