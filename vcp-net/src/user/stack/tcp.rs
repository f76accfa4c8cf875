//! TCP: connections of guests, each with a socket of the host on the other side.
//!
//! From guest to socket: one `sendmsg` out of the guest's memory per frame. From socket to guest: one `recvmsg` that leaves
//! the data in the socket (it is thrown away there when the guest has acknowledged it), straight into the guest's memory
//! where the port allows it, as one frame of up to 64 KiB.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::RandomState;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::net::{
    AddressFamily, Shutdown, SocketFlags, SocketType, connect, shutdown, socket_with, sockopt,
};
use serde_json::{Value, json};
use vcp_core::sock::{Gather, Scatter, discard};

use super::super::icmp::Why;
use super::super::packet::{Link, Packet, TCP, ether_bytes, finished, ip, pseudo};
use super::super::slab::Slab;
use super::super::sys;
use super::super::tcp::segment::{HEADER_MAX, SYN, Segment};
use super::super::tcp::{Conn, Late, Ms, Next, State};
use super::TCP_TOKEN;
use super::shared::Shared;
use crate::frame::checksum::fold;
use crate::frame::{OutFrame, VnetHeader};
use crate::switch::work::PortId;
use crate::uplink::{Ingress, Room, Sender, Taken};

/// Longest IPv4 packet.
const PACKET_MAX: usize = 65_535;
/// Frames for one connection before it is another one's turn.
const FRAMES_PER_TURN: usize = 4;
/// Connections that have a turn before others than this stack do.
const FLOWS_PER_TURN: usize = 32;
/// Most bytes in flight where the kernel cannot peek at an offset.
const PEEK_MAX: u32 = 65_536;

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
    /// None once all is over.
    socket: Option<OwnedFd>,
    token: u64,
    /// Where the kernel peeks next.
    peek_at: u32,
    /// The socket may have more than was read.
    readable: bool,
    /// It is in the queue of those that have something to do.
    queued: bool,
    /// It is in the set of timers with this deadline.
    timer: Ms,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct TcpFlows {
    flows: Slab<Flow>,
    keys: HashMap<Key, u32, RandomState>,
    ready: VecDeque<u32>,
    timers: BTreeSet<(Ms, u32)>,
    /// Whose station is not known.
    lost: Vec<u32>,
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
        }
        if flags.contains(EventFlags::OUT) {
            Self::measure(flow, shared);
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

    /// A connection could not be made, or broke.
    fn failed(&mut self, at: u32, error: i32, shared: &mut Shared) {
        let Some(flow) = self.flows.get(at) else { return };
        let why = Why::of_errno(error).filter(|why| *why != Why::Port);
        if flow.conn.state == State::Connecting {
            shared.counters.tcp_refused += 1;
            if let (Some(why), Some(link)) = (why, flow.link) {
                // What ICMP would have said of the guest's question.
                let (guest, remote) = (flow.key.guest, flow.key.remote);
                let mut quote = super::super::icmp::quote_udp(guest, remote, &[0; 12]);
                Self::as_question(&mut quote, &flow.conn, guest.0.is_ipv6());
                let from = shared.config.gateway_like(remote.0);
                let ends = (from, guest.0);
                shared.counters.unreachable += 1;
                shared.push(super::super::icmp::unreachable(shared.config.mac, link, ends, why, &quote));
                self.end(at, End::Well, shared);
                return;
            }
        }
        self.end(at, End::Host, shared);
    }

    /// Makes the quote of a datagram one of a connection's first segment.
    fn as_question(quote: &mut [u8], conn: &Conn, v6: bool) {
        let (protocol_at, l4_at) = if v6 { (6, 40) } else { (9, 20) };
        quote[protocol_at] = TCP;
        let seq = conn.reset().ack.wrapping_sub(1);
        quote[l4_at + 4..l4_at + 8].copy_from_slice(&seq.to_be_bytes());
        if !v6 {
            quote[10..12].fill(0);
            let sum = crate::frame::checksum::finish(crate::frame::checksum::sum(&quote[..20]));
            quote[10..12].copy_from_slice(&sum.to_be_bytes());
        }
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

    /// Takes a segment of a guest.
    pub(super) fn segment(
        &mut self,
        frame: &OutFrame<'_>,
        l4: &[u8],
        packet: &Packet,
        link: Link,
        from: Sender,
        shared: &mut Shared,
    ) {
        let Some(seg) = Segment::parse(l4).filter(|seg| usize::from(seg.header_bytes) <= packet.l4_bytes())
        else {
            shared.counters.drops.malformed += 1;
            return;
        };
        let header = usize::from(seg.header_bytes);
        let payload = (packet.l4_bytes() - header) as u32;
        let key = Key { guest: (packet.src, seg.from), remote: (packet.dst, seg.to), vid: link.vid };
        let found = self.keys.get(&key).copied();
        let fresh = seg.flags & (SYN | 0x14) == SYN;
        let old =
            found.and_then(|at| self.flows.get(at)).is_some_and(|flow| flow.conn.state == State::TimeWait);
        if let Some(at) = found.filter(|_| old && fresh) {
            // The guest uses the same numbers again.
            self.end(at, End::Well, shared);
        } else if let Some(at) = found {
            self.arrived(at, frame, &seg, payload, packet, link, shared);
            return;
        }
        if fresh {
            self.open(key, &seg, packet, link, from, shared);
            return;
        }
        shared.counters.drops.no_connection += 1;
        self.refuse(&seg, payload, packet, link, shared);
    }

    /// Answers a segment of no connection.
    fn refuse(&self, seg: &Segment, payload: u32, packet: &Packet, link: Link, shared: &mut Shared) {
        let Some(answer) = seg.refusal(payload) else { return };
        if packet.dst.is_multicast() || !link.mac.is_station() {
            return;
        }
        let mut bytes = [0; HEADER_MAX];
        let len = answer.emit(&mut bytes);
        shared.push(finished(shared.config.mac, link, (packet.dst, packet.src), TCP, &bytes[..len], 16));
    }

    /// A guest wants a connection.
    #[allow(clippy::too_many_arguments)] // What a packet is, in parts.
    fn open(
        &mut self,
        key: Key,
        seg: &Segment,
        packet: &Packet,
        link: Link,
        from: Sender,
        shared: &mut Shared,
    ) {
        shared.resolver.look(shared.ms);
        let target = match shared.outside(key.remote.0, key.remote.1) {
            Ok(target) => target,
            Err(Why::Port) => {
                shared.counters.tcp_refused += 1;
                self.refuse(seg, 0, packet, link, shared);
                return;
            }
            Err(_) => {
                shared.counters.drops.bad_target += 1;
                return;
            }
        };
        if !shared.take_flow(from.port) {
            self.refuse(seg, 0, packet, link, shared);
            return;
        }
        let family = if target.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        shared.counters.calls += 2;
        let Ok(socket) = socket_with(family, SocketType::STREAM, flags, None) else {
            shared.give_flow(from.port);
            shared.counters.drops.no_socket += 1;
            self.refuse(seg, 0, packet, link, shared);
            return;
        };
        // The guest has its own idea of when to wait for more.
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        let result = connect(&socket, &target);
        let isn = shared.isn(&key);
        let conn = Conn::asked(seg, key.guest.0.is_ipv6(), isn, shared.ms);
        let Some(at) = self.insert(key, conn, Some(link), from.port, socket, shared) else { return };
        match result {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(error) => self.failed(at, error.raw_os_error(), shared),
        }
    }

    /// A connection that was accepted on the host's side, from `peer`, is taken to `guest`.
    pub(super) fn accepted(
        &mut self,
        socket: OwnedFd,
        peer: SocketAddr,
        guest: (IpAddr, u16),
        shared: &mut Shared,
    ) {
        let remote_ip = shared.inside(peer.ip(), guest.0.is_ipv6());
        let mut key = Key { guest, remote: (remote_ip, peer.port()), vid: 0 };
        // Two peers behind one address may have the same port.
        let mut tries = 0;
        while self.keys.contains_key(&key) && tries < 64 {
            key.remote.1 = 49_152 + (key.remote.1.wrapping_mul(31).wrapping_add(tries) & 0x3fff);
            tries += 1;
        }
        if self.keys.contains_key(&key) || !shared.take_flow(PortId::UPLINK) {
            reset(&socket);
            return;
        }
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        let link = shared.neighbour(guest.0);
        let isn = shared.isn(&key);
        let conn = Conn::asking(isn, shared.ms);
        if let Some(at) = self.insert(key, conn, link, PortId::UPLINK, socket, shared) {
            if link.is_none() {
                self.lost.push(at);
            }
            self.queue(at);
        }
    }

    fn insert(
        &mut self,
        key: Key,
        conn: Conn,
        link: Option<Link>,
        port: PortId,
        socket: OwnedFd,
        shared: &mut Shared,
    ) -> Option<u32> {
        if shared.peeks {
            shared.counters.calls += 1;
            let _ = sys::set_peek_offset(&socket, 0);
        }
        let flow = Flow {
            key,
            conn,
            link,
            port,
            socket: None,
            token: 0,
            peek_at: 0,
            readable: false,
            queued: false,
            timer: Ms::MAX,
        };
        let at = self.flows.insert(flow);
        let token = self.flows.token(TCP_TOKEN, at);
        if shared.watch(&socket, token, true).is_err() {
            self.flows.remove(at);
            shared.give_flow(port);
            shared.counters.drops.no_socket += 1;
            reset(&socket);
            return None;
        }
        let flow = self.flows.get_mut(at)?;
        (flow.socket, flow.token) = (Some(socket), token);
        self.keys.insert(key, at);
        self.schedule(at);
        Some(at)
    }

    /// A segment of a connection.
    #[allow(clippy::too_many_arguments)] // What a packet is, in parts.
    fn arrived(
        &mut self,
        at: u32,
        frame: &OutFrame<'_>,
        seg: &Segment,
        payload: u32,
        packet: &Packet,
        link: Link,
        shared: &mut Shared,
    ) {
        let Some(flow) = self.flows.get_mut(at) else { return };
        flow.link = Some(link);
        let now = shared.ms;
        let outcome = flow.conn.segment(seg, payload, packet.src.is_ipv6(), now);
        shared.counters.tcp_odd += u64::from(outcome.odd);
        if outcome.reset {
            if flow.conn.state == State::SynSent {
                shared.counters.tcp_refused += 1;
            }
            self.end(at, End::Guest, shared);
            return;
        }
        if outcome.opened {
            if seg.has(SYN) {
                shared.counters.tcp_opened.1 += 1;
                flow.readable = true;
                Self::measure(flow, shared);
            } else {
                shared.counters.tcp_opened.0 += 1;
            }
        }
        let Some(socket) = &flow.socket else {
            self.queue(at);
            return;
        };
        if outcome.acked != 0 {
            let mut left = outcome.acked;
            while left != 0 {
                shared.counters.calls += 1;
                match discard(socket, left as usize) {
                    Ok(0) => break,
                    Ok(gone) => left -= (gone as u32).min(left),
                    Err(error) => {
                        let error = errno(&error);
                        self.failed(at, error, shared);
                        return;
                    }
                }
            }
            flow.peek_at = flow.peek_at.saturating_sub(outcome.acked);
        }
        if outcome.deliver != 0 || outcome.fin {
            let offset = packet.l4_at + usize::from(seg.header_bytes) + outcome.skip as usize;
            let len = outcome.deliver as usize;
            let taken = match send(socket, frame, offset, len, shared) {
                Ok(taken) => taken,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => {
                    self.failed(at, errno(&error), shared);
                    return;
                }
            };
            shared.counters.tcp_out_bytes += taken as u64;
            let fin = outcome.fin && taken == len;
            if fin {
                shared.counters.calls += 1;
                let _ = shutdown(socket, Shutdown::Write);
            }
            flow.conn.received(taken as u32, fin, now);
            let short = taken < len;
            shared.counters.tcp_short += u64::from(short);
            if !fin && (short || flow.conn.told_room() < LOW_ROOM) {
                Self::measure(flow, shared);
                if short || flow.conn.told_room() < u32::from(flow.conn.mss()) {
                    let token = flow.token;
                    if let Some(socket) = &flow.socket {
                        shared.watch_again(socket, token);
                    }
                }
            }
        }
        self.finish(at, shared);
        self.queue(at);
        self.schedule(at);
    }

    /// Closes the socket of a connection that is over, whose guest may still have missed it.
    fn finish(&mut self, at: u32, shared: &mut Shared) {
        let Some(flow) = self.flows.get_mut(at) else { return };
        if flow.conn.state == State::TimeWait && flow.socket.take().is_some() {
            shared.counters.calls += 1;
        }
    }

    /// Ends a connection.
    fn end(&mut self, at: u32, how: End, shared: &mut Shared) {
        let Some(mut flow) = self.flows.remove(at) else { return };
        self.keys.remove(&flow.key);
        self.timers.remove(&(flow.timer, at));
        shared.give_flow(flow.port);
        if how == End::Host
            && let Some(link) = flow.link
        {
            let mut seg = flow.conn.reset();
            (seg.from, seg.to) = (flow.key.remote.1, flow.key.guest.1);
            let mut bytes = [0; HEADER_MAX];
            let len = seg.emit(&mut bytes);
            let ends = (flow.key.remote.0, flow.key.guest.0);
            shared.push(finished(shared.config.mac, link, ends, TCP, &bytes[..len], 16));
            shared.counters.tcp_resets.1 += 1;
        }
        if how == End::Guest {
            shared.counters.tcp_resets.0 += 1;
        }
        if let Some(socket) = flow.socket.take() {
            shared.counters.calls += 1;
            if how != End::Well {
                reset(&socket);
            }
        }
    }

    /// Ends the connections of a port.
    pub(super) fn end_port(&mut self, port: PortId, shared: &mut Shared) {
        let own: Vec<u32> = self.flows.iter().filter(|(_, it)| it.port == port).map(|(at, _)| at).collect();
        for at in own {
            self.end(at, End::Guest, shared);
        }
    }

    /// Ends all of them.
    pub(super) fn close(&mut self, shared: &mut Shared) {
        let all: Vec<u32> = self.flows.iter().map(|(at, _)| at).collect();
        for at in all {
            self.end(at, End::Guest, shared);
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

    /// One connection's turn.
    fn serve(flow: &mut Flow, into: &mut dyn Ingress, shared: &mut Shared, moved: &mut bool) -> Turn {
        let Some(link) = flow.link else { return Turn::Done };
        for _ in 0..FRAMES_PER_TURN {
            match flow.conn.next(flow.readable, shared.ms) {
                Next::Nothing => return Turn::Done,
                Next::Bare => {
                    let before = flow.conn.clone();
                    let mss = PACKET_MAX as u16 - if flow.key.guest.0.is_ipv6() { 60 } else { 40 };
                    let mut seg = flow.conn.bare(mss, shared.ms);
                    (seg.from, seg.to) = (flow.key.remote.1, flow.key.guest.1);
                    let mut bytes = [0; HEADER_MAX];
                    let len = seg.emit(&mut bytes);
                    let ends = (flow.key.remote.0, flow.key.guest.0);
                    let frame = finished(shared.config.mac, link, ends, TCP, &bytes[..len], 16);
                    if into.frame(&OutFrame::of(VnetHeader::default(), &frame)) == Taken::Full {
                        flow.conn = before;
                        return Turn::Full;
                    }
                    *moved = true;
                }
                Next::Data { offset, max } => match Self::data(flow, link, offset, max, into, shared) {
                    Ok(sent) => *moved |= sent,
                    Err(turn) => return turn,
                },
            }
        }
        Turn::Again
    }

    /// Sends bytes of the socket's queue as one frame; whether there were any.
    fn data(
        flow: &mut Flow,
        link: Link,
        offset: u32,
        max: u32,
        into: &mut dyn Ingress,
        shared: &mut Shared,
    ) -> Result<bool, Turn> {
        let Some(socket) = &flow.socket else { return Err(Turn::Done) };
        let v6 = flow.key.guest.0.is_ipv6();
        let mss = usize::from(flow.conn.mss());
        let l4_at = ether_bytes(link) + if v6 { 40 } else { 20 };
        let l4_bytes = flow.conn.data_header_bytes();
        let headers = l4_at + l4_bytes;
        let port = into.find(link.vid, link.mac);
        let offloads = port.map(|port| into.offloads(port)).unwrap_or_default();
        let whole = if v6 { offloads.tso6 } else { offloads.tso4 };
        let longest = if whole { PACKET_MAX - (headers - ether_bytes(link)) } else { mss };
        let mut len = longest.min(max as usize);
        if !shared.peeks {
            len = len.min(PEEK_MAX.saturating_sub(offset) as usize);
            if len == 0 {
                return Err(Turn::Done);
            }
        } else if flow.peek_at != offset {
            shared.counters.calls += 1;
            if sys::set_peek_offset(socket, offset).is_err() {
                return Err(Turn::Over);
            }
            flow.peek_at = offset;
        }
        shared.counters.calls += 1;
        let mut room = match port.filter(|_| whole) {
            Some(port) => {
                // A guest with little room gets what it has room for.
                if matches!(into.direct(port, headers + len), Room::Full) {
                    len = len.min(mss);
                }
                into.direct(port, headers + len)
            }
            None => Room::Unfit,
        };
        if matches!(room, Room::Full) {
            return Err(Turn::Full);
        }
        let Shared { storage, buffer, counters, peeks, ms, config, head, .. } = shared;
        let mut skipped = if *peeks { Vec::new() } else { vec![0; offset as usize] };
        let got = {
            let mut scatter = Scatter::new(storage);
            if !*peeks && offset != 0 {
                scatter.push_bytes_mut(&mut skipped);
            }
            match &mut room {
                Room::Ready(direct) => {
                    direct.scatter(headers, len, &mut scatter);
                }
                _ => {
                    scatter.push_bytes_mut(&mut buffer[headers..headers + len]);
                }
            }
            scatter.peek(socket)
        };
        let skip = if *peeks { 0 } else { offset as usize };
        let got = match got {
            // All that there is was seen before.
            Ok(got) if skip != 0 && got <= skip => {
                flow.readable = false;
                return Ok(false);
            }
            Ok(0) => {
                flow.conn.ended(offset);
                flow.readable = false;
                return Ok(false);
            }
            Ok(got) => got - skip,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                flow.readable = false;
                return Ok(false);
            }
            Err(_) => return Err(Turn::Over),
        };
        flow.peek_at = offset + got as u32;
        let before = flow.conn.clone();
        let mut seg = flow.conn.data(offset, got as u32, got < len, *ms);
        (seg.from, seg.to) = (flow.key.remote.1, flow.key.guest.1);
        let mut l4 = [0; HEADER_MAX];
        seg.emit(&mut l4);
        let ends = (flow.key.remote.0, flow.key.guest.0);
        head.clear();
        ip(head, config.mac, link, ends, TCP, l4_bytes + got);
        let sum = fold(pseudo(ends.0, ends.1, TCP, l4_bytes + got));
        l4[16..18].copy_from_slice(&sum.to_be_bytes());
        head.extend_from_slice(&l4[..l4_bytes]);
        let meta = if got > mss {
            VnetHeader::tcp(v6, l4_at, headers, mss as u16)
        } else {
            VnetHeader::partial(l4_at, 16)
        };
        counters.tcp_in_bytes += got as u64;
        counters.tcp_in_frames += 1;
        if let Room::Ready(direct) = room {
            counters.tcp_direct += 1;
            direct.commit(&meta, head, headers + got);
            return Ok(true);
        }
        buffer[..headers].copy_from_slice(head);
        if into.frame(&OutFrame::of(meta, &buffer[..headers + got])) == Taken::Full {
            flow.conn = before;
            counters.tcp_in_bytes -= got as u64;
            counters.tcp_in_frames -= 1;
            return Err(Turn::Full);
        }
        Ok(true)
    }
}

/// Room that a guest knows of below which the socket is asked for more.
const LOW_ROOM: u32 = 256 << 10;

/// Sends part of a frame; how much of it the socket took.
fn send(
    socket: &OwnedFd,
    frame: &OutFrame<'_>,
    offset: usize,
    len: usize,
    shared: &mut Shared,
) -> io::Result<usize> {
    if len == 0 {
        return Ok(0);
    }
    shared.counters.calls += 1;
    let copy;
    let mut gather = Gather::new(&mut shared.storage);
    match offset.checked_sub(frame.prefix.len()) {
        Some(at) => {
            gather.push_frame(&frame.frame, frame.skip + at, len);
        }
        None => {
            copy = super::control::copy(frame, offset, offset + len);
            gather.push_bytes(&copy);
        }
    }
    gather.send(socket)
}

/// Sees to it that the peer of a socket gets a reset when it is closed.
fn reset(socket: &OwnedFd) {
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}
