//! UDP and pings: for each port (or echo number) of a guest a socket of the host that is not connected. Whoever the guest
//! has sent to can answer through it; rows of datagrams pass in one call either way.

use std::collections::{HashMap, VecDeque};
use std::hash::RandomState;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
use serde_json::{Value, json};
use vcp_core::sock::{Gather, Scatter};

use super::super::config::{Forward, Transport};
use super::super::icmp::{self, Why};
use super::super::packet::{ICMP, ICMPV6, Link, Packet, UDP, ether_bytes, finished, ip, pseudo};
use super::super::slab::Slab;
use super::super::tcp::Ms;
use super::super::{dns, sys};
use super::shared::{BUFFER_BYTES, HEADROOM, Shared};
use super::{UDP_TOKEN, control};
use crate::frame::checksum::fold;
use crate::frame::{Gso, OutFrame, VnetHeader};
use crate::switch::work::PortId;
use crate::uplink::{Ingress, Sender, Taken};

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
    used: Ms,
    /// It is there for good, and any address may send.
    forward: Option<Forward>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct UdpFlows {
    flows: Slab<Flow>,
    keys: HashMap<Key, u32, RandomState>,
    ready: VecDeque<u32>,
    sweep_at: Ms,
}

impl UdpFlows {
    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    pub(super) fn deadline(&self) -> Option<Ms> {
        (!self.flows.is_empty()).then_some(self.sweep_at)
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

    pub(super) fn event(&mut self, token: u64, _flags: EventFlags) {
        let Some(at) = self.flows.find(token) else { return };
        let Some(flow) = self.flows.get_mut(at) else { return };
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
        shared.counters.calls += 2;
        if !key.ping {
            let _ = sys::set_udp_gro(&socket);
        }
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
            used: shared.ms,
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

    /// Takes a datagram of a guest.
    pub(super) fn datagram(
        &mut self,
        frame: &OutFrame<'_>,
        l4: &[u8],
        packet: &Packet,
        link: Link,
        from: Sender,
        shared: &mut Shared,
    ) {
        let Some(&[a, b, c, d, e, f, _, _]) = l4.first_chunk::<8>() else {
            shared.counters.drops.malformed += 1;
            return;
        };
        let (src, dst) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        let said = usize::from(u16::from_be_bytes([e, f]));
        let row = frame.meta.gso() == Some(Gso::Udp);
        let len = if row { packet.l4_bytes() } else { said };
        if len < 8 || len > packet.l4_bytes() {
            shared.counters.drops.malformed += 1;
            return;
        }
        let (payload_at, payload) = (packet.l4_at + 8, len - 8);
        let asks = shared.config.is_dns(packet.dst) && dst == dns::PORT;
        let mut query = None;
        if asks {
            let message = control::copy(frame, payload_at, payload_at + payload);
            let Some(question) = dns::parse(&message) else {
                shared.counters.drops.malformed += 1;
                return;
            };
            shared.resolver.look(shared.ms);
            let answer = dns::answer(&message, &question, &shared.config, &shared.leases)
                .or_else(|| shared.resolver.servers.is_empty().then(|| dns::failure(&message, &question)));
            if let Some(answer) = answer {
                shared.counters.dns.0 += 1;
                let us = shared.config.mac;
                shared.push(super::super::packet::udp(
                    us,
                    link,
                    (packet.dst, dst),
                    (packet.src, src),
                    &answer,
                ));
                return;
            }
            shared.counters.dns.1 += 1;
            query = Some(question.id);
        }
        let mut target = match shared.outside(packet.dst, dst) {
            Ok(target) => target,
            Err(Why::Port) => {
                let head = control::copy(frame, 0, packet.end.min(super::HEAD_BYTES));
                shared.unreachable(packet, &head, link, Why::Port);
                return;
            }
            Err(_) => {
                shared.counters.drops.bad_target += 1;
                return;
            }
        };
        let key = Key { ping: false, guest: (packet.src, src), vid: link.vid };
        let Some(at) = self.of(key, target, link, from, shared) else { return };
        let Some(flow) = self.flows.get_mut(at) else { return };
        (flow.link, flow.used) = (Some(link), shared.ms);
        match query {
            Some(id) => {
                // Who gets no answer asks again, and then another one.
                flow.query = if flow.query.0 == id { (id, flow.query.1 + 1) } else { (id, 0) };
                let servers = &shared.resolver.servers;
                if let Some(server) = servers.get(flow.query.1 % servers.len().max(1)) {
                    target.set_ip(*server);
                }
            }
            None => flow.plain = true,
        }
        if target.is_ipv6() != socket_is_v6(flow) {
            // A name server of the other family: it has a flow of its own.
            let other = Key { vid: key.vid | 0x8000, ..key };
            let Some(at) = self.of(other, target, link, from, shared) else { return };
            if let Some(flow) = self.flows.get_mut(at) {
                flow.used = shared.ms;
                Self::send(flow, frame, payload_at, payload, target, packet, link, shared);
            }
            return;
        }
        Self::send(flow, frame, payload_at, payload, target, packet, link, shared);
    }

    #[allow(clippy::too_many_arguments)] // What a packet is, in parts.
    fn send(
        flow: &mut Flow,
        frame: &OutFrame<'_>,
        at: usize,
        len: usize,
        target: SocketAddr,
        packet: &Packet,
        link: Link,
        shared: &mut Shared,
    ) {
        if !flow.peers.contains(&target.ip()) {
            if flow.peers.len() < PEERS_MAX {
                flow.peers.push(target.ip());
            } else {
                flow.peers[flow.peer_next] = target.ip();
                flow.peer_next = (flow.peer_next + 1) % PEERS_MAX;
            }
        }
        let row = (frame.meta.gso() == Some(Gso::Udp)).then_some(frame.meta.gso_size).filter(|&it| it != 0);
        let one = |from: usize, len: usize, segment: Option<u16>, shared: &mut Shared| {
            let copy;
            // An earlier error is told first, and then forgotten.
            for again in [true, false] {
                shared.counters.calls += 1;
                let mut gather = Gather::new(&mut shared.storage);
                match from.checked_sub(frame.prefix.len()) {
                    Some(at) => {
                        gather.push_frame(&frame.frame, frame.skip + at, len);
                    }
                    None => {
                        copy = control::copy(frame, from, from + len);
                        gather.push_bytes(&copy);
                        return gather.send_to(&flow.socket, Some(target), segment);
                    }
                }
                match gather.send_to(&flow.socket, Some(target), segment) {
                    Err(error)
                        if again
                            && matches!(
                                error.raw_os_error(),
                                Some(libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH)
                            ) => {}
                    result => return result,
                }
            }
            Ok(0)
        };
        let mut result = one(at, len, row.filter(|&size| usize::from(size) < len), shared);
        if let (Err(_), Some(size)) = (&result, row) {
            // More, or longer ones, than the kernel cuts: one by one.
            let size = usize::from(size);
            result = Ok(0);
            for piece in 0..len.div_ceil(size) {
                let from = piece * size;
                result = one(at + from, size.min(len - from), None, shared);
                if result.is_err() {
                    break;
                }
            }
        }
        match result {
            Ok(_) => shared.counters.udp.0 += 1,
            Err(error) => {
                shared.counters.drops.not_sent += 1;
                let mut head = control::copy(frame, 0, packet.end.min(super::HEAD_BYTES));
                head.truncate(packet.end);
                let why = match error.raw_os_error() {
                    Some(libc::EMSGSIZE) => Some(Why::TooBig(1280)),
                    Some(error) => Why::of_errno(error),
                    None => None,
                };
                if let Some(why) = why {
                    shared.unreachable(packet, &head, link, why);
                }
            }
        }
    }

    /// Takes an ICMP message of a guest.
    pub(super) fn message(
        &mut self,
        frame: &OutFrame<'_>,
        packet: &Packet,
        link: Link,
        from: Sender,
        shared: &mut Shared,
    ) {
        let v6 = packet.src.is_ipv6();
        let message = control::copy(frame, packet.l4_at, packet.end);
        let Some(answer) = icmp::echo(&message, v6) else {
            // Errors of guests about what they were sent: the flow finds out by itself.
            shared.counters.drops.not_ours += 1;
            return;
        };
        if shared.config.is_ours(packet.dst) {
            let protocol = if v6 { ICMPV6 } else { ICMP };
            shared.push(finished(shared.config.mac, link, (packet.dst, packet.src), protocol, &answer, 2));
            return;
        }
        let Ok(target) = shared.outside(packet.dst, 0) else {
            shared.counters.drops.bad_target += 1;
            return;
        };
        if !shared.can_ping(v6) {
            shared.counters.drops.not_ours += 1;
            let head = control::copy(frame, 0, packet.end.min(super::HEAD_BYTES));
            shared.unreachable(packet, &head, link, Why::Admin);
            return;
        }
        let id = u16::from_be_bytes([message[4], message[5]]);
        let key = Key { ping: true, guest: (packet.src, id), vid: link.vid };
        let Some(at) = self.of(key, target, link, from, shared) else { return };
        let Some(flow) = self.flows.get_mut(at) else { return };
        (flow.link, flow.used) = (Some(link), shared.ms);
        shared.counters.pings.0 += 1;
        Self::send(flow, frame, packet.l4_at, packet.l4_bytes(), target, packet, link, shared);
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

    /// Brings in what came; whether there was anything.
    pub(super) fn turn(&mut self, into: &mut dyn Ingress, shared: &mut Shared) -> bool {
        if !self.flows.is_empty() && shared.ms >= self.sweep_at {
            self.sweep_at = shared.ms + SWEEP_MS;
            let old = self.flows.iter().filter(|(_, flow)| {
                let idle = if flow.plain { IDLE_MS } else { SHORT_IDLE_MS };
                flow.forward.is_none() && shared.ms >= flow.used + idle
            });
            let old: Vec<u32> = old.map(|(at, _)| at).collect();
            old.into_iter().for_each(|at| self.end(at, shared));
        }
        let mut moved = false;
        for _ in 0..self.ready.len() {
            let Some(at) = self.ready.pop_front() else { break };
            let Some(flow) = self.flows.get_mut(at) else { continue };
            if !std::mem::take(&mut flow.queued) {
                continue;
            }
            self.follow(at, shared);
            let Some(flow) = self.flows.get_mut(at) else { continue };
            let (any, more) = Self::bring(flow, into, shared);
            moved |= any;
            if more {
                flow.queued = true;
                self.ready.push_back(at);
            }
        }
        moved
    }

    /// Whom a forward without a name means may have changed.
    fn follow(&mut self, at: u32, shared: &mut Shared) {
        let Some(flow) = self.flows.get_mut(at) else { return };
        let Some(forward) = flow.forward else { return };
        let guest = forward.guest.unwrap_or_else(|| shared.first_guest(forward.bind.is_ipv6()));
        if guest != flow.key.guest.0 || flow.link.is_none() {
            flow.link = shared.neighbour(guest);
            if guest != flow.key.guest.0 {
                self.keys.remove(&flow.key);
                flow.key.guest.0 = guest;
                self.keys.insert(flow.key, at);
            }
        }
    }

    /// Brings in what one flow has: whether there was anything, and whether there may be more.
    fn bring(flow: &mut Flow, into: &mut dyn Ingress, shared: &mut Shared) -> (bool, bool) {
        let mut any = false;
        for _ in 0..PER_TURN {
            shared.counters.calls += 1;
            let Shared { storage, buffer, .. } = shared;
            let mut scatter = Scatter::new(storage);
            scatter.push_bytes_mut(&mut buffer[HEADROOM..BUFFER_BYTES]);
            let got = match scatter.recv_from(&flow.socket) {
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    while Self::error(flow, shared) {
                        any = true;
                    }
                    flow.ready = false;
                    return (any, false);
                }
                // What ICMP said is in the queue of errors as well.
                Err(_) => {
                    any = true;
                    if !Self::error(flow, shared) {
                        return (any, true);
                    }
                    continue;
                }
            };
            any = true;
            let Some(from) = got.from else { continue };
            let Some(link) = flow.link else {
                shared.counters.drops.no_guest += 1;
                continue;
            };
            if flow.forward.is_none() && !flow.peers.contains(&from.ip()) {
                shared.counters.drops.bad_source += 1;
                continue;
            }
            flow.used = shared.ms;
            if flow.forward.is_some() && !flow.peers.contains(&from.ip()) && flow.peers.len() < PEERS_MAX {
                flow.peers.push(from.ip());
            }
            let guest = flow.key.guest;
            if flow.key.ping {
                let mut message = shared.buffer[HEADROOM..HEADROOM + got.len_bytes].to_vec();
                if message.len() < 8 {
                    continue;
                }
                message[4..6].copy_from_slice(&guest.1.to_be_bytes());
                let protocol = if guest.0.is_ipv6() { ICMPV6 } else { ICMP };
                let ends = (shared.inside(from.ip(), guest.0.is_ipv6()), guest.0);
                shared.counters.pings.1 += 1;
                let frame = finished(shared.config.mac, link, ends, protocol, &message, 2);
                shared.push(frame);
                continue;
            }
            let from = Self::seen(flow, from, shared);
            let segment = got.segment.map_or(got.len_bytes, usize::from);
            let limit = usize::from(shared.config.mtu) - if guest.0.is_ipv6() { 48 } else { 28 };
            if got.len_bytes > MESSAGE_MAX || (segment > limit && got.segment.is_some()) {
                shared.counters.drops.too_long += 1;
                continue;
            }
            if segment > limit {
                Self::in_parts(link, from, guest, got.len_bytes, into, shared);
                continue;
            }
            Self::give(link, from, guest, got.len_bytes, segment, into, shared);
        }
        (any, true)
    }

    /// Where a datagram comes from, as the guest sees it.
    fn seen(flow: &Flow, from: SocketAddr, shared: &Shared) -> (IpAddr, u16) {
        let v6 = flow.key.guest.0.is_ipv6();
        if flow.forward.is_none()
            && from.port() == dns::PORT
            && shared.resolver.servers.contains(&from.ip())
            && !flow.plain
        {
            let dns = if v6 { shared.config.dns6().into() } else { shared.config.dns4().into() };
            return (dns, dns::PORT);
        }
        (shared.inside(from.ip(), v6), from.port())
    }

    /// Gives a guest a datagram, or a row of them, of which the payload is in the buffer.
    fn give(
        link: Link,
        from: (IpAddr, u16),
        guest: (IpAddr, u16),
        len: usize,
        segment: usize,
        into: &mut dyn Ingress,
        shared: &mut Shared,
    ) {
        let l4_at = ether_bytes(link) + if guest.0.is_ipv6() { 40 } else { 20 };
        let Shared { head, buffer, config, .. } = shared;
        head.clear();
        ip(head, config.mac, link, (from.0, guest.0), UDP, 8 + len);
        head.extend(from.1.to_be_bytes());
        head.extend(guest.1.to_be_bytes());
        head.extend(((8 + len) as u16).to_be_bytes());
        head.extend(fold(pseudo(from.0, guest.0, UDP, 8 + len)).to_be_bytes());
        let start = HEADROOM - head.len();
        buffer[start..HEADROOM].copy_from_slice(head);
        let meta = if segment < len {
            VnetHeader::udp(l4_at, segment as u16)
        } else {
            VnetHeader::partial(l4_at, 6)
        };
        if into.frame(&OutFrame::of(meta, &buffer[start..HEADROOM + len])) == Taken::Full {
            shared.counters.drops.no_room += 1;
        } else {
            shared.counters.udp.1 += 1;
        }
    }

    /// Gives a guest a datagram that is longer than its packets, in parts (RFC 791, 3.2; RFC 8200, 4.5).
    fn in_parts(
        link: Link,
        from: (IpAddr, u16),
        guest: (IpAddr, u16),
        len: usize,
        into: &mut dyn Ingress,
        shared: &mut Shared,
    ) {
        let payload = shared.buffer[HEADROOM..HEADROOM + len].to_vec();
        let whole = super::super::packet::udp(shared.config.mac, link, from, guest, &payload);
        let number = shared.counters.udp.1 as u32;
        for part in super::super::packet::parts(&whole, link, usize::from(shared.config.mtu), number) {
            if into.frame(&OutFrame::of(VnetHeader::default(), &part)) == Taken::Full {
                shared.counters.drops.no_room += 1;
                return;
            }
        }
        shared.counters.udp.1 += 1;
    }

    /// Takes the next error out of a socket and tells the guest; false: there is none.
    fn error(flow: &mut Flow, shared: &mut Shared) -> bool {
        let Shared { storage, buffer, .. } = shared;
        let mut scatter = Scatter::new(storage);
        scatter.push_bytes_mut(&mut buffer[HEADROOM..HEADROOM + 256]);
        shared.counters.calls += 1;
        let Ok(error) = scatter.recv_error(&flow.socket) else { return false };
        let (Some(to), Some(link), false) = (error.to, flow.link, flow.key.ping) else { return true };
        let why = match error.errno {
            libc::EMSGSIZE => Some(Why::TooBig(error.info)),
            libc::EHOSTUNREACH if matches!(error.icmp.0, 11) => Some(Why::Hops),
            errno => Why::of_errno(errno),
        };
        let Some(why) = why else { return true };
        let remote = Self::seen(flow, to, shared);
        let guest = flow.key.guest;
        let payload = shared.buffer[HEADROOM..HEADROOM + error.len_bytes.min(64)].to_vec();
        let quote = icmp::quote_udp(guest, remote, &payload);
        let from = if why == Why::Port { remote.0 } else { shared.config.gateway_like(remote.0) };
        let frame = icmp::unreachable(shared.config.mac, link, (from, guest.0), why, &quote);
        shared.counters.unreachable += 1;
        shared.push(frame);
        true
    }
}

fn socket_is_v6(flow: &Flow) -> bool {
    flow.key.guest.0.is_ipv6() != (flow.key.vid & 0x8000 != 0)
}
