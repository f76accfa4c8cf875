//! How connections begin: a guest's question, or one of the host's side.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

use super::{Flow, Key, TcpFlows, reset};
use crate::switch::work::PortId;
use crate::uplink::Sender;
use crate::user::icmp::Why;
use crate::user::packet::{Link, Packet, TCP, finished};
use crate::user::stack::TCP_TOKEN;
use crate::user::stack::shared::Shared;
use crate::user::sys;
use crate::user::tcp::segment::{HEADER_MAX, Segment};
use crate::user::tcp::{Conn, Ms};

impl TcpFlows {
    /// Answers a segment of no connection.
    pub(super) fn refuse(
        &self,
        seg: &Segment,
        payload: u32,
        packet: &Packet,
        link: Link,
        shared: &mut Shared,
    ) {
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
    pub(super) fn open(
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
    pub(in crate::user::stack) fn accepted(
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

    pub(super) fn insert(
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
            ahead: None,
            socket: None,
            token: 0,
            peek_at: 0,
            readable: false,
            hung_up: false,
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
}
