//! What the stack answers itself: ARP, discovery of neighbours and routers, DHCP.

use std::net::IpAddr;

use super::super::packet::{Arp, Link, Packet, udp};
use super::super::{dhcp4, dhcp6, ndp};
use super::shared::Shared;
use crate::frame::{Mac, OutFrame};

/// Bytes of a message that are looked at.
const MESSAGE_MAX: usize = 1500;
/// How often the router advertises itself unasked.
const ADVERTISE_MS: u64 = 200_000;

pub(super) fn arp(shared: &mut Shared, bytes: &[u8], link: Link) {
    let Some(arp) = Arp::parse(bytes) else {
        shared.counters.drops.malformed += 1;
        return;
    };
    let (mac, ip) = arp.from;
    if mac == link.mac && !ip.is_unspecified() {
        shared.learn(ip.into(), link);
    }
    if arp.asks && shared.config.is_ours(arp.to.1.into()) && ip != arp.to.1 {
        let answer = Arp { asks: false, from: (shared.config.mac, arp.to.1), to: arp.from };
        shared.push(answer.emit(link));
    }
}

/// Whether a datagram is one for the stack itself: DHCP, DHCPv6.
pub(super) fn is_local(l4: &[u8]) -> bool {
    matches!(l4.get(..4), Some(&[_, _, a, b]) if matches!(u16::from_be_bytes([a, b]), dhcp4::SERVER | dhcp6::SERVER))
}

/// The bytes of a packet from `at` on, as many as are looked at.
pub(super) fn copy(frame: &OutFrame<'_>, at: usize, end: usize) -> Vec<u8> {
    let mut bytes = vec![0; end.saturating_sub(at).min(65_536)];
    let len = frame.copy_to(at, &mut bytes);
    bytes.truncate(len);
    bytes
}

pub(super) fn datagram(shared: &mut Shared, frame: &OutFrame<'_>, packet: &Packet, link: Link) {
    let bytes = copy(frame, packet.l4_at, packet.end.min(packet.l4_at + MESSAGE_MAX));
    let (Some(&[from_a, from_b, ..]), Some(message)) = (bytes.first_chunk::<8>(), bytes.get(8..)) else {
        shared.counters.drops.malformed += 1;
        return;
    };
    let from_port = u16::from_be_bytes([from_a, from_b]);
    shared.resolver.look(shared.ms);
    let Shared { config, leases, resolver, counters, .. } = shared;
    let us = config.mac;
    let frame = match packet.src {
        IpAddr::V4(_) => {
            let Some(answer) = dhcp4::answer(message, link, config, &resolver.search, leases) else { return };
            counters.leases.0 += 1;
            let to = Link { mac: answer.mac, ..link };
            let src = (config.gateway4.into(), dhcp4::SERVER);
            udp(us, to, src, (answer.to.into(), dhcp4::CLIENT), &answer.bytes)
        }
        IpAddr::V6(_) => {
            let Some(answer) = dhcp6::answer(message, link, config, &resolver.search, leases) else { return };
            counters.leases.1 += 1;
            udp(us, link, (config.link_local().into(), dhcp6::SERVER), (packet.src, from_port), &answer)
        }
    };
    shared.push(frame);
}

/// Takes a message of neighbour discovery; false: it is another one.
pub(super) fn discovery(shared: &mut Shared, frame: &OutFrame<'_>, packet: &Packet, link: Link) -> bool {
    let bytes = copy(frame, packet.l4_at, packet.end.min(packet.l4_at + MESSAGE_MAX));
    if !matches!(bytes.first(), Some(130..=137 | 143)) {
        return false;
    }
    let (IpAddr::V6(src), 255) = (packet.src, packet.hops) else {
        // From beyond a router, or a report of a group, which nobody here needs.
        return true;
    };
    let Some(heard) = ndp::parse(&bytes) else { return true };
    // One that has no address yet is answered by what all hear.
    let (to, dst) = if src.is_unspecified() {
        (Link { mac: Mac(0x3333_0000_0001), ..link }, ndp::ALL_NODES)
    } else {
        (link, src)
    };
    match heard {
        ndp::Heard::WhereRouter => {
            shared.resolver.look(shared.ms);
            let frame = ndp::advertise_router(&shared.config, &shared.resolver.search, to, dst);
            shared.push(frame);
        }
        ndp::Heard::WhoHas(target) if shared.config.is_ours(target.into()) => {
            let frame = ndp::advertise(&shared.config, to, dst, target);
            shared.push(frame);
        }
        ndp::Heard::WhoHas(_) => {}
        ndp::Heard::Has(ip, mac) => {
            if mac.is_none_or(|mac| mac == link.mac) {
                shared.learn(ip.into(), link);
            }
        }
    }
    true
}

/// What happens by itself; whether anything did.
pub(super) fn tick(shared: &mut Shared) -> bool {
    if shared.ms < shared.advertise_at || shared.deadline().is_none() {
        return false;
    }
    shared.advertise_at = shared.ms + ADVERTISE_MS;
    shared.resolver.look(shared.ms);
    let to = Link { mac: Mac(0x3333_0000_0001), vid: 0 };
    let frame = ndp::advertise_router(&shared.config, &shared.resolver.search, to, ndp::ALL_NODES);
    shared.push(frame);
    true
}
