//! [`UserStack`]: the user-mode stack as an uplink. It takes frames apart, has the engines answer, and moves data between
//! guests and sockets of the host.
//!
//! All sockets hang on one epoll instance. While the data thread looks, it is asked at most every few microseconds, not for
//! each frame; while it sleeps, it is waited for.

mod control;
mod errors;
mod forward;
mod keep;
mod shared;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;

use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use serde_json::{Map, Value, json};
use vcp_core::ask::Rest;
use vcp_core::device::Wait;
use vcp_core::handover::Fds;
use vcp_core::handover::state::NotNow;
use vcp_core::metrics::{Family, Samples, Unit};

use self::forward::Forwards;
use self::shared::Shared;
use self::tcp::TcpFlows;
use self::udp::UdpFlows;
use super::config::UserConfig;
use super::packet::{HEAD_BYTES, ICMP, ICMPV6, Link, Packet, TCP, UDP};
use super::tcp::Ms;
use crate::frame::ether::{ARP, ETHER_BYTES, Ether, IPV4, IPV6, TAG_BYTES};
use crate::frame::{Offloads, OutFrame};
use crate::switch::work::PortId;
use crate::uplink::{Ingress, Sender, Sent, Taken, Uplink};

/// Kinds of tokens.
const TCP_TOKEN: u8 = 1;
const UDP_TOKEN: u8 = 2;
const LISTEN_TOKEN: u8 = 3;
/// How often the sockets are asked for while others keep the data thread busy.
const LOOK_EVERY: Duration = Duration::from_micros(4);
/// How long the flows of a guest stay whose front end is gone: it may be back soon.
const GONE_MS: Ms = 5_000;

static DROPS: Family =
    Family::counter("vcp_net_user_drops", Unit::None, "Frames that the user-mode stack dropped, by reason");
static FLOWS: Family =
    Family::gauge("vcp_net_user_flows", Unit::None, "Flows of the user-mode stack, by protocol");
static AHEAD: Family = Family::gauge(
    "vcp_net_user_ahead",
    Unit::Bytes,
    "Memory that holds what guests sent behind a gap of TCP",
);
static COUNTS: Family =
    Family::counter("vcp_net_user_events", Unit::None, "What the user-mode stack counts besides, by name");

/// See the module.
#[derive(Debug)]
pub struct UserStack {
    shared: Shared,
    tcp: TcpFlows,
    udp: UdpFlows,
    forwards: Forwards,
    looked: Option<Instant>,
    /// Front ends that are gone, and when their flows end.
    gone: Vec<(PortId, Ms)>,
}

impl UserStack {
    /// A stack that has nothing but its forwards.
    ///
    /// # Errors
    /// A forward cannot be listened on, or the system has no epoll instance.
    pub fn open(config: UserConfig) -> std::io::Result<Self> {
        let mut shared = Shared::new(config)?;
        let mut udp = UdpFlows::default();
        let mut forwards = Forwards::default();
        for forward in shared.config.forwards.clone() {
            forwards.add(forward, &mut shared, &mut udp).map_err(|error| {
                std::io::Error::new(error.kind(), format!("cannot forward {forward}: {error}"))
            })?;
        }
        let tcp = TcpFlows::new(shared.config.ahead_bytes);
        Ok(Self { shared, tcp, udp, forwards, looked: None, gone: Vec::new() })
    }

    /// Flows of TCP and of the others.
    #[must_use]
    pub fn flows(&self) -> (usize, usize) {
        (self.tcp.len(), self.udp.len())
    }

    /// Its counters.
    #[must_use]
    pub fn counters(&self) -> Value {
        serde_json::to_value(self.shared.counters).unwrap_or_default()
    }

    /// Looks at the sockets.
    fn look(&mut self, now: Instant) -> bool {
        if self.looked.is_some_and(|looked| now.saturating_duration_since(looked) < LOOK_EVERY) {
            return false;
        }
        self.looked = Some(now);
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 64];
        self.shared.counters.calls += 1;
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let Ok(count) = epoll::wait(&self.shared.epoll, &mut events[..], Some(&at_once)) else {
            return false;
        };
        for event in &events[..count] {
            let token = event.data.u64();
            match (token >> 56) as u8 {
                TCP_TOKEN => self.tcp.event(token, event.flags, &mut self.shared),
                UDP_TOKEN => self.udp.event(token, event.flags, &mut self.shared),
                LISTEN_TOKEN => self.forwards.event(token),
                _ => {}
            }
        }
        count != 0
    }

    fn packet(&mut self, frame: &OutFrame<'_>, head: &[u8], ether: &Ether, from: Sender) -> Sent {
        let shared = &mut self.shared;
        let drops = &mut shared.counters.drops;
        let total = frame.total_bytes();
        let l3_at = usize::from(ether.len_bytes);
        let Some(packet) = Packet::parse(head, ether.ethertype, l3_at, total) else {
            drops.malformed += 1;
            return Sent::Done;
        };
        let link = Link { mac: ether.src, vid: from.vid };
        let config = &shared.config;
        let fresh = packet.src.is_unspecified();
        if !fresh && (!config.is_inside(packet.src) || config.is_ours(packet.src)) {
            drops.bad_source += 1;
            return Sent::Done;
        }
        if packet.part.is_some() {
            drops.fragment += 1;
            return Sent::Done;
        }
        if !packet.is_sound(frame) {
            drops.checksum += 1;
            return Sent::Done;
        }
        let l4 = &head[packet.l4_at.min(head.len())..packet.end.min(head.len())];
        if !fresh {
            shared.learn(packet.src, link);
        }
        match packet.protocol {
            UDP if control::is_local(l4) => control::datagram(shared, frame, &packet, link),
            ICMPV6 if control::discovery(shared, frame, &packet, link) => {}
            _ if fresh => drops_bad_source(shared),
            _ if packet.hops <= 1
                && !shared.config.is_ours(packet.dst)
                && !shared.config.is_inside(packet.dst) =>
            {
                shared.unreachable(&packet, head, (link, from.port), super::icmp::Why::Hops);
            }
            TCP => self.tcp.segment(frame, l4, &packet, link, from, shared),
            UDP => return self.udp.datagram(frame, l4, &packet, link, from, shared),
            ICMP | ICMPV6 => self.udp.message(frame, &packet, link, from, shared),
            _ => {
                shared.counters.drops.not_ours += 1;
                if !packet.dst.is_multicast() {
                    shared.unreachable(&packet, head, (link, from.port), super::icmp::Why::Protocol);
                }
            }
        }
        Sent::Done
    }

    /// Ends the flows of guests that did not come back.
    fn forget(&mut self, now: Ms) -> bool {
        let Self { gone, tcp, udp, shared, .. } = self;
        let before = gone.len();
        gone.retain(|&(port, deadline)| {
            if now < deadline {
                return true;
            }
            tcp.end_port(port, shared);
            udp.end_port(port, shared);
            false
        });
        gone.len() != before
    }
}

fn drops_bad_source(shared: &mut Shared) {
    shared.counters.drops.bad_source += 1;
}

impl Uplink for UserStack {
    fn kind(&self) -> &'static str {
        "user"
    }

    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn waits_when_full(&self) -> bool {
        true
    }

    fn send(&mut self, frame: &OutFrame<'_>, from: Sender) -> Sent {
        self.shared.now(from.now);
        self.shared.counters.frames += 1;
        let mut head = [0; HEAD_BYTES];
        let len = frame.copy_to(0, &mut head);
        let head = &head[..len];
        let first: &[u8; ETHER_BYTES + TAG_BYTES] = match head.first_chunk() {
            Some(first) => first,
            None => {
                self.shared.counters.drops.malformed += 1;
                return Sent::Done;
            }
        };
        let Some(ether) = Ether::parse(first, frame.total_bytes()) else {
            self.shared.counters.drops.malformed += 1;
            return Sent::Done;
        };
        if ether.dst != self.shared.config.mac && !ether.dst.is_group() {
            self.shared.counters.drops.not_ours += 1;
            return Sent::Done;
        }
        let link = Link { mac: ether.src, vid: from.vid };
        match ether.ethertype {
            ARP => control::arp(&mut self.shared, &head[usize::from(ether.len_bytes)..], link),
            IPV4 | IPV6 => {
                let sent = self.packet(frame, head, &ether, from);
                // What waits is counted when it has gone.
                self.shared.counters.frames -= u64::from(sent == Sent::Full);
                return sent;
            }
            _ => self.shared.counters.drops.not_ours += 1,
        }
        Sent::Done
    }

    fn receive(&mut self, into: &mut dyn Ingress, now: Instant) -> bool {
        self.shared.now(now);
        let ms = self.shared.ms;
        let mut moved = self.look(now);
        moved |= self.forget(ms);
        moved |= self.forwards.accept(&mut self.tcp, &mut self.shared);
        moved |= control::tick(&mut self.shared);
        while let Some(bytes) = self.shared.out.pop_front() {
            moved = true;
            if into.frame(&OutFrame::of(crate::frame::VnetHeader::default(), &bytes)) == Taken::Full {
                self.shared.counters.drops.no_room += 1;
            }
        }
        moved |= self.udp.turn(into, &mut self.shared);
        moved | self.tcp.turn(into, &mut self.shared)
    }

    fn waits<'a>(&'a self, add: &mut dyn FnMut(Wait<'a>)) {
        use std::os::fd::AsFd;
        let gone = self.gone.iter().map(|&(_, deadline)| deadline).min();
        let deadlines = [self.tcp.deadline(), self.udp.deadline(), gone, self.shared.deadline()];
        let deadline =
            deadlines.into_iter().flatten().min().map(|ms| self.shared.base + Duration::from_millis(ms));
        add(Wait { fd: Some(self.shared.epoll.as_fd()), deadline, ..Wait::default() });
    }

    fn attached(&mut self, port: PortId, attached: bool) {
        self.gone.retain(|&(gone, _)| gone != port);
        if !attached {
            self.gone.push((port, self.shared.ms + GONE_MS));
        }
    }

    fn status(&self) -> Value {
        let config = &self.shared.config;
        let leases = self.shared.leases.iter().map(|(at, lease)| {
            json!({
                "mac": lease.link.mac.to_string(), "name": lease.name,
                "ip4": config.guest4(at).filter(|_| lease.bound4),
                "ip6": lease.bound6.then(|| config.guest6(at)),
            })
        });
        json!({
            "kind": "user", "gateway4": config.gateway4, "gateway6": config.gateway6, "dns4": config.dns4(),
            "domain": config.domain, "servers": self.shared.resolver.servers, "ping": self.shared.pings(),
            "leases": leases.collect::<Vec<_>>(), "forwards": self.forwards.list(),
            "flows": { "tcp": self.tcp.len(), "udp": self.udp.len() }, "ahead_bytes": self.tcp.ahead_bytes(),
            "counters": self.shared.counters,
        })
    }

    fn collect(&self, samples: &mut Samples) {
        let counters = serde_json::to_value(self.shared.counters).unwrap_or_default();
        for (name, value) in counters["drops"].as_object().into_iter().flatten() {
            samples.add(&DROPS, &[("reason", name)], value.as_u64().unwrap_or(0));
        }
        for (name, value) in counters.as_object().into_iter().flatten() {
            if let Some(value) = value.as_u64() {
                samples.add(&COUNTS, &[("event", name)], value);
            }
        }
        samples.add(&FLOWS, &[("protocol", "tcp")], self.tcp.len() as u64);
        samples.add(&FLOWS, &[("protocol", "udp")], self.udp.len() as u64);
        samples.add(&AHEAD, &[], self.tcp.ahead_bytes());
    }

    fn command(
        &mut self,
        name: &str,
        args: &Map<String, Value>,
        _now: Instant,
    ) -> Option<Result<Rest, String>> {
        let forward = || {
            let text = args.get("forward").and_then(Value::as_str);
            text.ok_or_else(|| "`forward` is missing (tcp:ADDR:PORT-[GUEST:]PORT)".to_owned())?.parse()
        };
        let Self { shared, forwards, udp, tcp, .. } = self;
        Some(match name {
            "forwards" => Ok(Rest::done(forwards.list())),
            "forward-add" => forward().and_then(|forward| {
                let done = forwards.add(forward, shared, udp);
                done.map(|bound| Rest::done(json!({ "bound": bound })))
                    .map_err(|error| format!("cannot forward {forward}: {error}"))
            }),
            "forward-remove" => forward().and_then(|forward| {
                if forwards.remove(&forward, shared, udp) {
                    Ok(Rest::done(Value::Bool(true)))
                } else {
                    Err(format!("{forward} is not forwarded"))
                }
            }),
            "flows" => {
                let mut flows = tcp.list();
                flows.extend(udp.list());
                Ok(Rest::done(Value::Array(flows)))
            }
            _ => return None,
        })
    }

    fn export(&self, fds: &mut Fds, _now: Instant) -> Result<Value, NotNow> {
        self.keep(fds)
    }

    fn close(&mut self) {
        self.tcp.close(&mut self.shared);
    }
}
