//! What all parts of the stack use: configuration, clock, counters, neighbours, frames on their way out, scratch memory.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::event::epoll;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
use vcp_core::sock::IovStorage;

use super::super::config::UserConfig;
use super::super::counters::Counters;
use super::super::icmp::{self, Why};
use super::super::leases::Leases;
use super::super::packet::{Arp, Link, Packet};
use super::super::resolv::{RESOLV_CONF, Resolver};
use super::super::tcp::Ms;
use super::super::{dns, ndp};
use super::errors::ErrorRate;
use crate::frame::Mac;
use crate::switch::work::PortId;

/// Most frames that wait to go out beside data.
const OUT_MAX: usize = 1024;
/// Most neighbours that are known.
const NEIGHBOURS_MAX: usize = 4096;
/// Bytes for one message with its headers in front.
pub(super) const BUFFER_BYTES: usize = HEADROOM + 65_536;
/// Room for headers.
pub(super) const HEADROOM: usize = 128;

/// See the module.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: UserConfig,
    pub(super) epoll: OwnedFd,
    /// When the clock was 0.
    pub(super) base: Instant,
    /// The clock.
    pub(super) ms: Ms,
    pub(super) counters: Counters,
    pub(super) leases: Leases,
    pub(super) resolver: Resolver,
    pub(super) out: VecDeque<Vec<u8>>,
    pub(super) storage: IovStorage,
    pub(super) buffer: Box<[u8]>,
    pub(super) head: Vec<u8>,
    /// Keys initial sequence numbers and the flow table.
    pub(super) secret: RandomState,
    /// Peeking at an offset works.
    pub(super) peeks: bool,
    ping4: bool,
    ping6: bool,
    neighbours: HashMap<IpAddr, Link>,
    /// Neighbours that were found since it was asked.
    pub(super) found: Vec<IpAddr>,
    /// Flows of each port; the last is for those of which it is not known.
    per_port: Vec<u32>,
    total: u32,
    errors: ErrorRate,
    /// When the router advertises itself again.
    pub(super) advertise_at: Ms,
}

impl Shared {
    pub(super) fn new(config: UserConfig) -> std::io::Result<Self> {
        let ping = |family, protocol| {
            socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(protocol)).is_ok()
        };
        let tcp = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            base: Instant::now(),
            ms: 0,
            counters: Counters::default(),
            leases: Leases::default(),
            resolver: Resolver::new(RESOLV_CONF.as_ref(), &config.dns),
            out: VecDeque::with_capacity(64),
            storage: IovStorage::new(),
            buffer: vec![0; BUFFER_BYTES].into(),
            head: Vec::with_capacity(HEADROOM),
            secret: RandomState::new(),
            peeks: super::super::sys::set_peek_offset(&tcp, 0).is_ok(),
            ping4: ping(AddressFamily::INET, ipproto::ICMP),
            ping6: ping(AddressFamily::INET6, ipproto::ICMPV6),
            neighbours: HashMap::new(),
            found: Vec::new(),
            per_port: vec![0; usize::from(u8::MAX) + 1],
            total: 0,
            errors: ErrorRate::new(),
            advertise_at: 0,
            config,
        })
    }

    /// Sets the clock.
    #[inline]
    pub(super) fn now(&mut self, now: Instant) {
        self.ms = now.saturating_duration_since(self.base).as_millis() as Ms;
    }

    pub(super) fn deadline(&self) -> Option<Ms> {
        (!self.neighbours.is_empty()).then_some(self.advertise_at)
    }

    /// The neighbours that are known.
    pub(super) fn neighbours(&self) -> Vec<(IpAddr, Link)> {
        self.neighbours.iter().map(|(&ip, &link)| (ip, link)).collect()
    }

    /// Which families can be pinged outside.
    pub(super) fn pings(&self) -> (bool, bool) {
        (self.ping4, self.ping6)
    }

    pub(super) fn can_ping(&self, v6: bool) -> bool {
        if v6 { self.ping6 } else { self.ping4 }
    }

    /// Whether there is room for a flow of `port`, which is then taken.
    pub(super) fn take_flow(&mut self, port: PortId) -> bool {
        let own = &mut self.per_port[port.index()];
        if *own >= self.config.flows || u64::from(self.total) >= self.config.flows_max() {
            self.counters.drops.no_flow += 1;
            return false;
        }
        *own += 1;
        self.total += 1;
        true
    }

    /// A flow is no more.
    pub(super) fn give_flow(&mut self, port: PortId) {
        self.per_port[port.index()] -= 1;
        self.total -= 1;
    }

    /// Whether what can be said later as well may be said now: the queue is for what cannot.
    pub(super) fn has_room(&self) -> bool {
        self.out.len() < OUT_MAX / 2
    }

    /// A frame goes out as soon as it can.
    pub(super) fn push(&mut self, frame: Vec<u8>) {
        if self.out.len() >= OUT_MAX {
            self.counters.drops.no_room += 1;
            return;
        }
        self.out.push_back(frame);
    }

    /// A station has this address.
    pub(super) fn learn(&mut self, ip: IpAddr, link: Link) {
        if !self.config.is_inside(ip) || self.config.is_ours(ip) || !link.mac.is_station() {
            return;
        }
        if self.neighbours.get(&ip) == Some(&link) {
            return;
        }
        if self.neighbours.len() >= NEIGHBOURS_MAX && !self.neighbours.contains_key(&ip) {
            // Whoever makes up addresses must not keep others out for ever.
            self.neighbours.clear();
        }
        if self.neighbours.insert(ip, link).is_none() {
            self.found.push(ip);
        }
    }

    /// The station with this address; it is asked for if it is not known.
    pub(super) fn neighbour(&mut self, ip: IpAddr) -> Option<Link> {
        if let Some(link) = self.neighbours.get(&ip) {
            return Some(*link);
        }
        let config = &self.config;
        let frame = match ip {
            IpAddr::V4(ip) => {
                let to = Link { mac: Mac::BROADCAST, vid: 0 };
                Arp { asks: true, from: (config.mac, config.gateway4), to: (Mac(0), ip) }.emit(to)
            }
            IpAddr::V6(ip) => ndp::solicit(config, 0, ip),
        };
        self.push(frame);
        None
    }

    /// The guest that is meant if none is named.
    pub(super) fn first_guest(&self, v6: bool) -> IpAddr {
        let bound = |lease: &super::super::leases::Lease| if v6 { lease.bound6 } else { lease.bound4 };
        let at = self.leases.iter().find(|(_, lease)| bound(lease)).map_or(0, |(at, _)| at);
        match self.config.guest4(at) {
            Some(ip) if !v6 => ip.into(),
            _ => self.config.guest6(at).into(),
        }
    }

    /// Where on the host's side an address leads that a guest names; an error says why nowhere.
    pub(super) fn outside(&self, ip: IpAddr, port: u16) -> Result<SocketAddr, Why> {
        let config = &self.config;
        if config.is_dns(ip) && port == dns::PORT {
            return match self.resolver.servers.first() {
                Some(&server) => Ok(SocketAddr::new(server, port)),
                None => Err(Why::Port),
            };
        }
        if config.is_gateway(ip) && config.host {
            let host = if ip.is_ipv4() {
                IpAddr::V4(std::net::Ipv4Addr::LOCALHOST)
            } else {
                IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)
            };
            return Ok(SocketAddr::new(host, port));
        }
        if config.is_ours(ip) {
            return Err(Why::Port);
        }
        let bad = match ip {
            IpAddr::V4(ip) => {
                let first = ip.octets()[0];
                first == 0 || first >= 224 || ip.is_loopback()
            }
            IpAddr::V6(ip) => {
                // Whatever stands for an IPv4 address would pass by what is checked for IPv4.
                let embedded = ip.to_ipv4().is_some();
                ip.is_loopback()
                    || ip.is_unspecified()
                    || ip.is_multicast()
                    || ip.is_unicast_link_local()
                    || embedded
            }
        };
        if bad || config.is_inside(ip) { Err(Why::Host) } else { Ok(SocketAddr::new(ip, port)) }
    }

    /// How a guest sees an address of the host's side.
    pub(super) fn inside(&self, ip: IpAddr, v6: bool) -> IpAddr {
        let gateway = || if v6 { self.config.gateway6.into() } else { self.config.gateway4.into() };
        let same = ip.is_ipv6() == v6;
        let local = ip.is_loopback() || ip.is_unspecified() || self.config.is_inside(ip);
        if same && !local { ip } else { gateway() }
    }

    /// Tells a guest why its packet did not arrive.
    pub(super) fn unreachable(
        &mut self,
        packet: &Packet,
        head: &[u8],
        (link, port): (Link, PortId),
        why: Why,
    ) {
        let quote = &head[packet.l3_at..packet.end.min(head.len())];
        let quote = &quote[..quote.len().min(if packet.src.is_ipv4() { 60 + 68 } else { HEADROOM })];
        // The one who says it: the target itself for what only it can know, the gateway else.
        let from = if why == Why::Port { packet.dst } else { self.config.gateway_like(packet.dst) };
        if from.is_multicast() || packet.dst.is_multicast() {
            return;
        }
        self.tell(link, port, (from, packet.src), why, quote);
    }

    /// Tells a station behind `port` what became of its packet that began with `quote`, unless it was told too much of late.
    pub(super) fn tell(&mut self, link: Link, port: PortId, ends: (IpAddr, IpAddr), why: Why, quote: &[u8]) {
        if !self.errors.take(port, self.ms) {
            self.counters.unreachable_limited += 1;
            return;
        }
        self.counters.unreachable += 1;
        self.push(icmp::unreachable(self.config.mac, link, ends, why, quote));
    }

    /// An initial sequence number (RFC 6528): a clock, and a keyed hash of the connection.
    pub(super) fn isn(&self, key: &impl std::hash::Hash) -> u32 {
        // The clock ticks every 4 us.
        let clock = self.ms.wrapping_mul(250) as u32;
        clock.wrapping_add(self.secret.hash_one(key) as u32)
    }

    /// Watches a socket.
    pub(super) fn watch(&mut self, socket: &OwnedFd, token: u64, out: bool) -> std::io::Result<()> {
        let mut flags = epoll::EventFlags::IN | epoll::EventFlags::ET | epoll::EventFlags::RDHUP;
        if out {
            flags |= epoll::EventFlags::OUT;
        }
        self.counters.calls += 1;
        epoll::add(&self.epoll, socket, epoll::EventData::new_u64(token), flags)?;
        Ok(())
    }

    /// Says no more when there is room, but what comes.
    pub(super) fn watch_input(&mut self, socket: &OwnedFd, token: u64) {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET | epoll::EventFlags::RDHUP;
        self.counters.calls += 1;
        let _ = epoll::modify(&self.epoll, socket, epoll::EventData::new_u64(token), flags);
    }

    /// Says again when a socket that was ready is so, even if nothing changed.
    pub(super) fn watch_again(&mut self, socket: &OwnedFd, token: u64) {
        let flags =
            epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET | epoll::EventFlags::RDHUP;
        self.counters.calls += 1;
        // It is there: it was added.
        let _ = epoll::modify(&self.epoll, socket, epoll::EventData::new_u64(token), flags);
    }
}
