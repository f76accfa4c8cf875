//! From sockets to guests: rows of datagrams in one frame where the guest takes them, and what ICMP said.

use std::io;
use std::net::{IpAddr, SocketAddr};

use vcp_core::sock::Scatter;

use super::{Flow, IDLE_MS, MESSAGE_MAX, PEERS_MAX, PER_TURN, SHORT_IDLE_MS, SWEEP_MS, UdpFlows};
use crate::frame::checksum::fold;
use crate::frame::{OutFrame, VnetHeader};
use crate::uplink::{Ingress, Taken};
use crate::user::dns;
use crate::user::icmp::{self, Why};
use crate::user::packet::{ICMP, ICMPV6, Link, UDP, ether_bytes, finished, ip, parts, pseudo, udp};
use crate::user::stack::shared::{BUFFER_BYTES, HEADROOM, Shared};
use crate::user::tcp::Ms;

impl UdpFlows {
    /// Brings in what came; whether there was anything.
    pub(in crate::user::stack) fn turn(&mut self, into: &mut dyn Ingress, shared: &mut Shared) -> bool {
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
        if shared.ms >= self.patience_at {
            self.patience_at = Ms::MAX;
            moved = true;
        }
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
        while let Some((meta, bytes)) = flow.held.front() {
            if into.frame(&OutFrame::of(*meta, bytes)) == Taken::Full {
                return (any, true);
            }
            any = true;
            flow.held.pop_front();
        }
        for _ in 0..PER_TURN {
            if !flow.held.is_empty() {
                return (any, true);
            }
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
            if let Some(total) = got.overflowed {
                let before = flow.overflowed.replace(total).unwrap_or(total);
                shared.counters.udp_overflow += u64::from(total.wrapping_sub(before));
            }
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
                Self::in_parts(flow, link, from, got.len_bytes, into, shared);
                continue;
            }
            Self::give(flow, link, from, (got.len_bytes, segment), into, shared);
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
        flow: &mut Flow,
        link: Link,
        from: (IpAddr, u16),
        (len, segment): (usize, usize),
        into: &mut dyn Ingress,
        shared: &mut Shared,
    ) {
        let guest = flow.key.guest;
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
        let bytes = &buffer[start..HEADROOM + len];
        if into.frame(&OutFrame::of(meta, bytes)) == Taken::Full {
            shared.counters.udp_waits += 1;
            flow.held.push_back((meta, bytes.to_vec()));
        }
        shared.counters.udp.1 += 1;
    }

    /// Gives a guest a datagram that is longer than its packets, in parts (RFC 791, 3.2; RFC 8200, 4.5).
    fn in_parts(
        flow: &mut Flow,
        link: Link,
        from: (IpAddr, u16),
        len: usize,
        into: &mut dyn Ingress,
        shared: &mut Shared,
    ) {
        let payload = shared.buffer[HEADROOM..HEADROOM + len].to_vec();
        let whole = udp(shared.config.mac, link, from, flow.key.guest, &payload);
        let number = shared.counters.udp.1 as u32;
        for part in parts(&whole, link, usize::from(shared.config.mtu), number) {
            let meta = VnetHeader::default();
            if !flow.held.is_empty() || into.frame(&OutFrame::of(meta, &part)) == Taken::Full {
                flow.held.push_back((meta, part));
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
        shared.tell(link, flow.port, (from, guest.0), why, &quote);
        true
    }
}
