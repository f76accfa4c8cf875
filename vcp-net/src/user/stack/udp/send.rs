//! From guests to sockets: one `sendmsg` out of the guest's memory, for a row of datagrams too. What a socket has no room
//! for stays in the guest's ring for a moment, as it would in front of a busy network card.

use std::io;
use std::net::SocketAddr;

use vcp_core::sock::Gather;

use super::{Flow, Key, PATIENCE_MS, PEERS_MAX, UdpFlows, socket_is_v6};
use crate::frame::{Gso, OutFrame};
use crate::uplink::{Sender, Sent};
use crate::user::dns;
use crate::user::icmp::{self, Why};
use crate::user::packet::{ICMP, ICMPV6, Link, Packet, finished, udp};
use crate::user::stack::shared::Shared;
use crate::user::stack::{HEAD_BYTES, UDP_TOKEN, control};

impl UdpFlows {
    /// Takes a datagram of a guest.
    pub(in crate::user::stack) fn datagram(
        &mut self,
        frame: &OutFrame<'_>,
        l4: &[u8],
        packet: &Packet,
        link: Link,
        from: Sender,
        shared: &mut Shared,
    ) -> Sent {
        let Some(&[a, b, c, d, e, f, _, _]) = l4.first_chunk::<8>() else {
            shared.counters.drops.malformed += 1;
            return Sent::Done;
        };
        let (src, dst) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        let said = usize::from(u16::from_be_bytes([e, f]));
        let row = frame.meta.gso() == Some(Gso::Udp);
        let len = if row { packet.l4_bytes() } else { said };
        if len < 8 || len > packet.l4_bytes() {
            shared.counters.drops.malformed += 1;
            return Sent::Done;
        }
        let (payload_at, payload) = (packet.l4_at + 8, len - 8);
        let asks = shared.config.is_dns(packet.dst) && dst == dns::PORT;
        let mut query = None;
        if asks {
            let message = control::copy(frame, payload_at, payload_at + payload);
            let Some(question) = dns::parse(&message) else {
                shared.counters.drops.malformed += 1;
                return Sent::Done;
            };
            shared.resolver.look(shared.ms);
            let answer = dns::answer(&message, &question, &shared.config, &shared.leases)
                .or_else(|| shared.resolver.servers.is_empty().then(|| dns::failure(&message, &question)));
            if let Some(answer) = answer {
                shared.counters.dns.0 += 1;
                let us = shared.config.mac;
                shared.push(udp(us, link, (packet.dst, dst), (packet.src, src), &answer));
                return Sent::Done;
            }
            shared.counters.dns.1 += 1;
            query = Some(question.id);
        }
        let mut target = match shared.outside(packet.dst, dst) {
            Ok(target) => target,
            Err(Why::Port) => {
                let head = control::copy(frame, 0, packet.end.min(HEAD_BYTES));
                shared.unreachable(packet, &head, (link, from.port), Why::Port);
                return Sent::Done;
            }
            Err(_) => {
                shared.counters.drops.bad_target += 1;
                return Sent::Done;
            }
        };
        let key = Key { ping: false, guest: (packet.src, src), vid: link.vid };
        let Some(at) = self.of(key, target, link, from, shared) else { return Sent::Done };
        let Some(flow) = self.flows.get_mut(at) else { return Sent::Done };
        if query.is_none() && Self::must_wait(flow, shared) {
            return Sent::Full;
        }
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
            let Some(at) = self.of(other, target, link, from, shared) else { return Sent::Done };
            if let Some(flow) = self.flows.get_mut(at) {
                flow.used = shared.ms;
                Self::send(flow, frame, payload_at, payload, target, packet, link, shared);
            }
            return Sent::Done;
        }
        let sent = Self::send(flow, frame, payload_at, payload, target, packet, link, shared);
        // Who asks for a name asks again.
        if query.is_some() { Sent::Done } else { self.waits(at, sent, shared) }
    }

    /// Whether a frame has to wait for room in the socket of its flow: not for ever, since everything behind it in its
    /// ring waits with it.
    fn must_wait(flow: &Flow, shared: &Shared) -> bool {
        flow.blocked.is_some_and(|since| shared.ms < since + PATIENCE_MS)
    }

    /// Sees to it that a socket without room says when it has some.
    fn waits(&mut self, at: u32, sent: Sent, shared: &mut Shared) -> Sent {
        let token = self.flows.token(UDP_TOKEN, at);
        if let (Sent::Full, Some(flow)) = (sent, self.flows.get_mut(at)) {
            shared.counters.udp_send_waits += 1;
            flow.blocked = Some(shared.ms);
            self.patience_at = self.patience_at.min(shared.ms + PATIENCE_MS);
            shared.watch_again(&flow.socket, token);
        }
        sent
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
    ) -> Sent {
        if flow.blocked.is_some() {
            // It waited long enough, and the socket still has no room.
            shared.counters.drops.not_sent += 1;
            return Sent::Done;
        }
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
        if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            return Sent::Full;
        }
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
                let mut head = control::copy(frame, 0, packet.end.min(HEAD_BYTES));
                head.truncate(packet.end);
                let why = match error.raw_os_error() {
                    Some(libc::EMSGSIZE) => Some(Why::TooBig(1280)),
                    Some(error) => Why::of_errno(error),
                    None => None,
                };
                if let Some(why) = why {
                    shared.unreachable(packet, &head, (link, flow.port), why);
                }
            }
        }
        Sent::Done
    }

    /// Takes an ICMP message of a guest.
    pub(in crate::user::stack) fn message(
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
            let head = control::copy(frame, 0, packet.end.min(HEAD_BYTES));
            shared.unreachable(packet, &head, (link, from.port), Why::Admin);
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
}
