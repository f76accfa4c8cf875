//! Neighbour and router discovery (RFC 4861), with prefix, MTU, name servers and domains (RFC 8106), as a router speaks.

use std::net::Ipv6Addr;

use super::config::UserConfig;
use super::packet::{ICMPV6, Link, finished};
use crate::frame::Mac;

/// All nodes.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// How long an advertisement holds; it is repeated well before.
const LIFETIME_S: u16 = 1800;
const PREFIX_S: u32 = 86_400;

/// What a message of a neighbour says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// It asks for routers.
    WhereRouter,
    /// It asks who has an address.
    WhoHas(Ipv6Addr),
    /// It says that it has one.
    Has(Ipv6Addr, Option<Mac>),
}

/// Reads an ICMPv6 message; `None` if it is none of discovery, or broken. Their hop limit is 255, which the caller checks.
#[must_use]
pub fn parse(bytes: &[u8]) -> Option<Heard> {
    let &[kind, code, ..] = bytes.first_chunk::<4>()?;
    let target = || Some(Ipv6Addr::from(*bytes.get(8..)?.first_chunk::<16>()?));
    let mut mac = None;
    let mut options = match kind {
        ROUTER_SOLICITATION => bytes.get(8..)?,
        SOLICITATION | ADVERTISEMENT => bytes.get(24..)?,
        _ => return None,
    };
    while let [option, units, ..] = *options {
        let len = usize::from(units) * 8;
        let value = options.get(..len).filter(|_| len != 0)?;
        if option == 2 {
            mac = value.get(2..).and_then(|it| it.first_chunk()).map(|&it| Mac::new(it));
        }
        options = &options[len..];
    }
    match (kind, code) {
        (ROUTER_SOLICITATION, 0) => Some(Heard::WhereRouter),
        (SOLICITATION, 0) => Some(Heard::WhoHas(target()?)),
        (ADVERTISEMENT, 0) => Some(Heard::Has(target()?, mac)),
        _ => None,
    }
}

/// A router's advertisement, to `to` at `dst`.
#[must_use]
pub fn advertise_router(config: &UserConfig, search: &[String], to: Link, dst: Ipv6Addr) -> Vec<u8> {
    // Addresses and the rest are to be had by DHCPv6 as well.
    let mut out = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0xc0];
    out.extend(LIFETIME_S.to_be_bytes());
    out.extend([0; 8]);
    out.extend([1, 1]);
    out.extend(config.mac.bytes());
    out.extend([5, 1, 0, 0]);
    out.extend(u32::from(config.mtu).to_be_bytes());
    // On link, for addresses of their own making.
    out.extend([3, 4, 64, 0xc0]);
    out.extend(PREFIX_S.to_be_bytes());
    out.extend(PREFIX_S.to_be_bytes());
    out.extend([0; 4]);
    out.extend(&config.gateway6.octets()[..8]);
    out.extend([0; 8]);
    out.extend([25, 3, 0, 0]);
    out.extend(u32::from(LIFETIME_S).to_be_bytes());
    out.extend(config.dns6().octets());
    let mut names = Vec::new();
    for domain in std::iter::once(&config.domain).chain(search) {
        super::dns::push_name(&mut names, domain);
    }
    names.resize(names.len().next_multiple_of(8), 0);
    out.extend([31, (names.len() / 8 + 1) as u8, 0, 0]);
    out.extend(u32::from(LIFETIME_S).to_be_bytes());
    out.extend(names);
    finished(config.mac, to, (config.link_local().into(), dst.into()), ICMPV6, &out, 2)
}

/// The answer to who has `target`.
#[must_use]
pub fn advertise(config: &UserConfig, to: Link, dst: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    // A router; solicited unless it goes to all; overriding.
    let flags = if dst == ALL_NODES { 0xa0 } else { 0xe0 };
    let mut out = vec![ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    out.extend(target.octets());
    out.extend([2, 1]);
    out.extend(config.mac.bytes());
    finished(config.mac, to, (target.into(), dst.into()), ICMPV6, &out, 2)
}

/// Asks who has `target`.
#[must_use]
pub fn solicit(config: &UserConfig, vid: u16, target: Ipv6Addr) -> Vec<u8> {
    let low = (u128::from(target) & 0xff_ffff) as u32;
    let dst = Ipv6Addr::from(0xff02_0000_0000_0000_0000_0001_ff00_0000u128 | u128::from(low));
    let to = Link { mac: Mac(0x3333_ff00_0000 | u64::from(low)), vid };
    let mut out = vec![SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    out.extend(target.octets());
    out.extend([1, 1]);
    out.extend(config.mac.bytes());
    let src = if target.is_unicast_link_local() { config.link_local() } else { config.gateway6 };
    finished(config.mac, to, (src.into(), dst.into()), ICMPV6, &out, 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_we_say_is_what_a_neighbour_reads() {
        let config = UserConfig::default();
        let link = Link { mac: Mac(0x5254_0000_0001), vid: 0 };
        let target = config.guest6(0);
        let asked = solicit(&config, 0, target);
        assert_eq!(parse(&asked[54..]), Some(Heard::WhoHas(target)));
        let said = advertise(&config, link, target, config.gateway6);
        assert_eq!(parse(&said[54..]), Some(Heard::Has(config.gateway6, Some(config.mac))));
        for len in 54..said.len() - 8 {
            assert_eq!(parse(&said[54..len]), None);
        }
    }

    #[test]
    fn smoltcp_understands_the_advertisement() {
        use smoltcp::phy::ChecksumCapabilities;
        use smoltcp::wire::{Icmpv6Packet, Icmpv6Repr, NdiscRepr};
        let config = UserConfig::default();
        let link = Link { mac: Mac(0x5254_0000_0001), vid: 0 };
        let frame = advertise_router(&config, &["example.org".into()], link, ALL_NODES);
        let packet = Icmpv6Packet::new_checked(&frame[54..]).unwrap();
        let repr =
            Icmpv6Repr::parse(&config.link_local(), &ALL_NODES, &packet, &ChecksumCapabilities::default());
        let Ok(Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert { mtu, prefix_info, .. })) = repr else {
            panic!("not read");
        };
        let prefix = prefix_info.unwrap();
        assert_eq!((mtu, prefix.prefix_len, prefix.prefix.segments()[0]), (Some(1500), 64, 0xfd76));
    }
}
