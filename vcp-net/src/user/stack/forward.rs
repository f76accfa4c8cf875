//! What listens on the host for guests.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use rustix::net::{
    AddressFamily, SocketFlags, SocketType, acceptfrom_with, bind, getsockname, listen, socket_with, sockopt,
};
use serde_json::{Value, json};
use vcp_core::handover::Fds;
use vcp_core::handover::state::{BadState, NotNow};

use super::super::config::{Forward, Transport};
use super::super::slab::Slab;
use super::LISTEN_TOKEN;
use super::keep::{ListenerState, cannot_watch};
use super::shared::Shared;
use super::tcp::TcpFlows;
use super::udp::UdpFlows;

/// Connections that are accepted in a turn, per listener.
const PER_TURN: usize = 16;
const BACKLOG: i32 = 128;
/// Most forwards.
const FORWARDS_MAX: usize = 1024;

#[derive(Debug)]
struct Listener {
    forward: Forward,
    bound: SocketAddr,
    /// A listening socket; of UDP, the flow that has the socket.
    what: What,
    ready: bool,
}

#[derive(Debug)]
enum What {
    Tcp(OwnedFd),
    Udp(u32),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Forwards {
    listeners: Slab<Listener>,
}

fn socket(forward: &Forward) -> rustix::io::Result<(OwnedFd, SocketAddr)> {
    let family = if forward.bind.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let kind = match forward.transport {
        Transport::Tcp => SocketType::STREAM,
        Transport::Udp => SocketType::DGRAM,
    };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    if family == AddressFamily::INET6 {
        // IPv4 has its own: each address is exactly what it says.
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if forward.transport == Transport::Tcp {
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind(&socket, &forward.bind)?;
    if forward.transport == Transport::Tcp {
        listen(&socket, BACKLOG)?;
    }
    let bound = SocketAddr::try_from(getsockname(&socket)?).unwrap_or(forward.bind);
    Ok((socket, bound))
}

impl Forwards {
    /// Listens; where.
    pub(super) fn add(
        &mut self,
        forward: Forward,
        shared: &mut Shared,
        udp: &mut UdpFlows,
    ) -> std::io::Result<SocketAddr> {
        if self.listeners.iter().any(|(_, it)| it.forward == forward) {
            return Err(std::io::Error::new(std::io::ErrorKind::AlreadyExists, "it is forwarded already"));
        }
        if self.listeners.len() >= FORWARDS_MAX {
            return Err(std::io::Error::other("too many forwards"));
        }
        let (socket, bound) = socket(&forward)?;
        match forward.transport {
            Transport::Tcp => {
                let what = What::Tcp(socket);
                let at = self.listeners.insert(Listener { forward, bound, what, ready: true });
                let token = self.listeners.token(LISTEN_TOKEN, at);
                if let Some(Listener { what: What::Tcp(socket), .. }) = self.listeners.get(at)
                    && let Err(error) = shared.watch(socket, token, false)
                {
                    self.listeners.remove(at);
                    return Err(error);
                }
            }
            Transport::Udp => {
                let flow = udp.forward(forward, socket, shared)?;
                self.listeners.insert(Listener { forward, bound, what: What::Udp(flow), ready: false });
            }
        }
        Ok(bound)
    }

    /// Stops listening; whether it did. Connections that were made stay.
    pub(super) fn remove(&mut self, forward: &Forward, shared: &mut Shared, udp: &mut UdpFlows) -> bool {
        let found = self.listeners.iter().find(|(_, it)| it.forward == *forward).map(|(at, _)| at);
        let Some(listener) = found.and_then(|at| self.listeners.remove(at)) else { return false };
        if let What::Udp(flow) = listener.what {
            udp.end(flow, shared);
        }
        true
    }

    /// What another process goes on from.
    pub(super) fn export(&self, fds: &mut Fds) -> Result<Vec<ListenerState>, NotNow> {
        let one = |(_, it): (u32, &Listener)| {
            let (socket, flow) = match &it.what {
                What::Tcp(socket) => (Some(fds.put_copy(socket)?), None),
                What::Udp(flow) => (None, Some(*flow)),
            };
            Ok(ListenerState { forward: it.forward, bound: it.bound, socket, flow })
        };
        self.listeners.iter().map(one).collect()
    }

    /// Goes on with what another process listened on. `numbers`: what numbers of flows were there, and are here.
    pub(super) fn restore(
        states: Vec<ListenerState>,
        numbers: &[(u32, u32)],
        fds: &mut Fds,
        shared: &mut Shared,
    ) -> Result<Self, BadState> {
        let mut this = Self::default();
        for ListenerState { forward, bound, socket, flow } in states {
            let there = numbers.iter().find(|(old, _)| Some(*old) == flow);
            let what = match (fds.take_if(socket)?, there) {
                (Some(socket), _) => What::Tcp(socket),
                (None, Some(&(_, flow))) => What::Udp(flow),
                (None, None) => return Err(BadState::Text(format!("{forward} listens nowhere"))),
            };
            let at = this.listeners.insert(Listener { forward, bound, what, ready: true });
            let token = this.listeners.token(LISTEN_TOKEN, at);
            if let Some(Listener { what: What::Tcp(socket), .. }) = this.listeners.get(at) {
                shared.watch(socket, token, false).map_err(cannot_watch)?;
            }
        }
        Ok(this)
    }

    pub(super) fn list(&self) -> Value {
        let one = |(_, it): (u32, &Listener)| json!({ "forward": it.forward.to_string(), "bound": it.bound });
        self.listeners.iter().map(one).collect()
    }

    pub(super) fn event(&mut self, token: u64) {
        if let Some(listener) = self.listeners.find(token).and_then(|at| self.listeners.get_mut(at)) {
            listener.ready = true;
        }
    }

    /// Accepts what waits; whether anything did.
    pub(super) fn accept(&mut self, tcp: &mut TcpFlows, shared: &mut Shared) -> bool {
        let mut moved = false;
        let ready: Vec<u32> = self.listeners.iter().filter(|(_, it)| it.ready).map(|(at, _)| at).collect();
        for at in ready {
            let Some(listener) = self.listeners.get_mut(at) else { continue };
            let What::Tcp(socket) = &listener.what else { continue };
            for _ in 0..PER_TURN {
                shared.counters.calls += 1;
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let (accepted, peer) = match acceptfrom_with(socket, flags) {
                    Ok((accepted, peer)) => (accepted, peer),
                    Err(rustix::io::Errno::CONNABORTED | rustix::io::Errno::INTR) => continue,
                    Err(rustix::io::Errno::AGAIN) => {
                        listener.ready = false;
                        break;
                    }
                    Err(_) => {
                        // No descriptors are left; some may be with the next connection.
                        shared.counters.drops.no_socket += 1;
                        listener.ready = false;
                        break;
                    }
                };
                moved = true;
                let Some(peer) = peer.and_then(|peer| SocketAddr::try_from(peer).ok()) else { continue };
                let guest = listener.forward.guest;
                let guest = guest.unwrap_or_else(|| shared.first_guest(peer.is_ipv6()));
                tcp.accepted(accepted, peer, (guest, listener.forward.port), shared);
            }
        }
        moved
    }
}
