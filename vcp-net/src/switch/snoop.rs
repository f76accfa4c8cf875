//! IGMP and MLD snooping (RFC 4541): frames for a group go to the ports that want them.
//!
//! Only while somebody asks for memberships (a querier): otherwise memberships are not renewed, and a group whose list is
//! out of date would be cut off from some of its members. Without a querier frames for groups go everywhere.

use super::work::{Frames, PortId, PortSet, Work};
use crate::frame::ether::{IPV4, IPV6};
use crate::frame::layers::Layers;
use crate::frame::{Mac, OutFrame};

/// How long a membership lasts without being renewed, and a querier without asking again, in seconds (RFC 3376, 8.4, 8.5).
const MEMBER_S: u32 = 260;
const QUERIER_S: u32 = 255;
/// Groups at most; what is behind that goes everywhere.
const GROUPS_MAX: usize = 1024;
/// Bytes of a report that are looked at.
const REPORT_BYTES: usize = 1500;

const IGMP: u8 = 2;
const ICMPV6: u8 = 58;

#[derive(Clone, Copy, Debug)]
struct Member {
    port: PortId,
    seen_s: u32,
}

#[derive(Debug)]
struct Group {
    vid: u16,
    mac: Mac,
    members: Vec<Member>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Snoop {
    groups: Vec<Group>,
    /// Ports behind which somebody asks, by VLAN.
    queriers: Vec<(u16, Member)>,
    /// Reports that were understood.
    pub reports: u64,
    /// Queries.
    pub queries: u64,
}

/// A group as the control socket shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupMembers {
    /// VLAN; 0: none.
    pub vid: u16,
    /// Address.
    pub mac: Mac,
    /// Who is in it.
    pub ports: Vec<PortId>,
}

/// What a message says.
enum Said {
    Query,
    Join(Mac),
    Leave(Mac),
}

fn group4(group: &[u8]) -> Mac {
    let low = group.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    Mac(0x0100_5e00_0000 | low & 0x7f_ffff)
}

fn group6(group: &[u8]) -> Mac {
    let low = group[12..16].iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    Mac(0x3333_0000_0000 | low)
}

/// Groups that every station is in or that routers talk in: never filtered.
fn is_always_flooded(mac: Mac) -> bool {
    // 224.0.0.x (its MAC addresses are others' as well, which then also go everywhere) and ff02::1.
    mac.0 & !0xff == 0x0100_5e00_0000 || mac == Mac(0x3333_0000_0001)
}

impl Snoop {
    /// Listens to a burst that came from `port`.
    #[inline]
    pub fn run(&mut self, work: &Work, frames: &Frames<'_>, port: PortId, now_s: u32) {
        for (at, item) in work.items().iter().enumerate() {
            if item.is_open() && item.ether.dst.is_group() && matches!(item.ether.ethertype, IPV4 | IPV6) {
                self.hear(item.vid, &beginning(&frames.get(at, item.meta)), item.ether, port, now_s);
            }
        }
    }

    #[cold]
    fn hear(&mut self, vid: u16, bytes: &[u8], ether: crate::frame::ether::Ether, port: PortId, now_s: u32) {
        let mut said = Vec::new();
        if let Some(layers) = Layers::find(bytes, ether.ethertype, ether.len_bytes.into())
            && !layers.fragment
        {
            let message = bytes.get(layers.l4_at..).unwrap_or(&[]);
            let understood = match (layers.v6, layers.protocol) {
                (false, IGMP) => igmp(message, &mut said),
                (true, ICMPV6) => mld(message, &mut said),
                _ => None,
            };
            if understood.is_none() {
                return;
            }
        }
        for said in said {
            match said {
                Said::Query => {
                    self.queries += 1;
                    let seen = Member { port, seen_s: now_s };
                    let room = self.queriers.len() < GROUPS_MAX;
                    match self.queriers.iter_mut().find(|(at, it)| *at == vid && it.port == port) {
                        Some((_, member)) => *member = seen,
                        None if room => self.queriers.push((vid, seen)),
                        None => {}
                    }
                }
                Said::Join(mac) => {
                    self.reports += 1;
                    self.join(vid, mac, port, now_s);
                }
                Said::Leave(mac) => {
                    self.reports += 1;
                    // A port is one guest: nobody else behind it is still in the group.
                    if let Some(group) = self.groups.iter_mut().find(|it| it.vid == vid && it.mac == mac) {
                        group.members.retain(|member| member.port != port);
                    }
                }
            }
        }
    }

    fn join(&mut self, vid: u16, mac: Mac, port: PortId, now_s: u32) {
        let member = Member { port, seen_s: now_s };
        if let Some(group) = self.groups.iter_mut().find(|it| it.vid == vid && it.mac == mac) {
            match group.members.iter_mut().find(|it| it.port == port) {
                Some(old) => *old = member,
                None => group.members.push(member),
            }
            return;
        }
        if self.groups.len() >= GROUPS_MAX {
            self.groups
                .retain(|group| group.members.iter().any(|it| now_s.wrapping_sub(it.seen_s) < MEMBER_S));
        }
        if self.groups.len() < GROUPS_MAX {
            self.groups.push(Group { vid, mac, members: vec![member] });
        }
    }

    /// Who wants frames for a group; `None`: everybody gets them.
    #[must_use]
    pub fn members(&self, vid: u16, mac: Mac, now_s: u32) -> Option<PortSet> {
        if self.queriers.is_empty() || mac == Mac::BROADCAST || is_always_flooded(mac) {
            return None;
        }
        let queriers: PortSet = self
            .queriers
            .iter()
            .filter(|(at, member)| *at == vid && now_s.wrapping_sub(member.seen_s) < QUERIER_S)
            .map(|(_, member)| member.port)
            .collect();
        if queriers.is_empty() {
            return None;
        }
        // A group that nobody reported may be one that is not reported at all.
        let group = self.groups.iter().find(|it| it.vid == vid && it.mac == mac)?;
        let alive = group.members.iter().filter(|it| now_s.wrapping_sub(it.seen_s) < MEMBER_S);
        let members: PortSet = alive.map(|member| member.port).collect();
        // Routers, and whatever is behind the uplink, get everything.
        Some(members.or(queriers).with(PortId::UPLINK))
    }

    /// Forgets a port.
    pub fn flush(&mut self, port: PortId) {
        self.groups.iter_mut().for_each(|group| group.members.retain(|member| member.port != port));
        self.queriers.retain(|(_, member)| member.port != port);
    }

    /// All groups that have members.
    pub fn groups(&self, now_s: u32) -> impl Iterator<Item = GroupMembers> + '_ {
        self.groups.iter().filter_map(move |group| {
            let alive = group.members.iter().filter(|it| now_s.wrapping_sub(it.seen_s) < MEMBER_S);
            let ports: Vec<PortId> = alive.map(|member| member.port).collect();
            (!ports.is_empty()).then_some(GroupMembers { vid: group.vid, mac: group.mac, ports })
        })
    }
}

/// The beginning of a frame, as far as a report goes.
fn beginning(frame: &OutFrame<'_>) -> Vec<u8> {
    let mut bytes = vec![0; frame.total_bytes().min(REPORT_BYTES)];
    frame.copy_to(0, &mut bytes);
    bytes
}

/// IGMPv1 to v3 (RFC 2236, RFC 3376).
fn igmp(message: &[u8], said: &mut Vec<Said>) -> Option<()> {
    let group = message.get(4..8)?;
    match *message.first()? {
        0x11 => said.push(Said::Query),
        0x12 | 0x16 => said.push(Said::Join(group4(group))),
        0x17 => said.push(Said::Leave(group4(group))),
        0x22 => records(message, 4, group4, said)?,
        _ => return None,
    }
    Some(())
}

/// MLDv1 and v2 (RFC 2710, RFC 3810).
fn mld(message: &[u8], said: &mut Vec<Said>) -> Option<()> {
    match *message.first()? {
        130 => said.push(Said::Query),
        131 => said.push(Said::Join(group6(message.get(8..24)?))),
        132 => said.push(Said::Leave(group6(message.get(8..24)?))),
        143 => records(message, 16, group6, said)?,
        _ => return None,
    }
    Some(())
}

/// Group records of IGMPv3 and MLDv2, which differ in the length of an address.
fn records(message: &[u8], address: usize, group: impl Fn(&[u8]) -> Mac, said: &mut Vec<Said>) -> Option<()> {
    let count = u16::from_be_bytes([*message.get(6)?, *message.get(7)?]);
    let mut rest = message.get(8..)?;
    for _ in 0..count {
        let kind = *rest.first()?;
        let (words, sources) =
            (usize::from(*rest.get(1)?), usize::from(u16::from_be_bytes([*rest.get(2)?, *rest.get(3)?])));
        let mac = group(rest.get(4..4 + address)?);
        rest = rest.get(4 + address + sources * address + 4 * words..)?;
        // MODE_IS_INCLUDE and CHANGE_TO_INCLUDE of no sources is a leave; BLOCK_OLD_SOURCES says nothing of the group.
        match kind {
            1 | 3 if sources == 0 => said.push(Said::Leave(mac)),
            1..=5 => said.push(Said::Join(mac)),
            6 => {}
            _ => return None,
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: PortId = PortId(0);
    const B: PortId = PortId(1);
    const ROUTER: PortId = PortId(2);

    fn ether(ethertype: u16) -> crate::frame::ether::Ether {
        crate::frame::ether::Ether { dst: Mac::BROADCAST, src: Mac(2), tag: None, ethertype, len_bytes: 14 }
    }

    fn ipv4(message: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 14];
        // With the router alert option.
        bytes.extend([0x46, 0, 0, 0, 0, 0, 0, 0, 1, IGMP, 0, 0, 10, 0, 0, 1, 224, 0, 0, 1, 0x94, 4, 0, 0]);
        bytes.extend(message);
        bytes
    }

    fn ipv6(message: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 14];
        bytes.extend([0x60, 0, 0, 0, 0, 0, 0, 1]);
        bytes.extend([0; 32]);
        bytes.extend([ICMPV6, 0, 5, 2, 0, 0, 1, 0]);
        bytes.extend(message);
        bytes
    }

    #[test]
    fn groups_are_filtered_while_there_is_a_querier() {
        let mut snoop = Snoop::default();
        let group = Mac(0x0100_5e01_0203);
        snoop.hear(0, &ipv4(&[0x16, 0, 0, 0, 239, 1, 2, 3]), ether(IPV4), A, 10);
        assert_eq!(snoop.members(0, group, 10), None, "nobody asks");
        snoop.hear(0, &ipv4(&[0x11, 100, 0, 0, 0, 0, 0, 0]), ether(IPV4), ROUTER, 10);
        let members = snoop.members(0, group, 11).unwrap();
        assert!(members.has(A) && members.has(ROUTER) && members.has(PortId::UPLINK) && !members.has(B));
        assert_eq!(snoop.members(0, Mac(0x0100_5e01_0204), 11), None, "nobody reported it");
        assert_eq!(snoop.members(7, group, 11), None, "nobody asks in that VLAN");
        assert_eq!(snoop.members(0, Mac(0x0100_5e00_0016), 11), None, "link local");
        // Version 3: B joins by an EXCLUDE of nobody, A leaves by an INCLUDE of nobody.
        snoop.hear(0, &ipv4(&[0x22, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0, 239, 1, 2, 3]), ether(IPV4), B, 12);
        snoop.hear(0, &ipv4(&[0x22, 0, 0, 0, 0, 0, 0, 1, 3, 0, 0, 0, 239, 1, 2, 3]), ether(IPV4), A, 12);
        let members = snoop.members(0, group, 13).unwrap();
        assert!(!members.has(A) && members.has(B));
        assert_eq!(snoop.members(0, group, 10 + QUERIER_S), None, "the querier is gone");
    }

    #[test]
    fn mld_is_heard_behind_hop_by_hop_options() {
        let mut snoop = Snoop::default();
        let mut report = vec![143, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 1];
        report.extend([0xff, 0x05, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]);
        report.extend([0xfe; 16]);
        snoop.hear(3, &ipv6(&[130, 0, 0, 0, 0, 0, 0, 0]), ether(IPV6), ROUTER, 1);
        snoop.hear(3, &ipv6(&report), ether(IPV6), A, 1);
        assert!(snoop.members(3, Mac(0x3333_0102_0304), 2).unwrap().has(A));
        assert_eq!((snoop.queries, snoop.reports), (1, 1));
    }

    #[test]
    fn broken_reports_are_not_half_believed() {
        let mut snoop = Snoop::default();
        for message in [
            &[][..],
            &[0x22],
            &[0x22, 0, 0, 0, 0, 0, 0, 2, 4, 0, 0, 0, 239, 1, 2, 3],
            &[0x22, 0, 0, 0, 0, 0, 255, 255, 4, 0, 255, 255, 239, 1, 2, 3],
            &[0x22, 0, 0, 0, 0, 0, 0, 1, 9, 0, 0, 0, 239, 1, 2, 3],
            &[0x16, 0, 0],
        ] {
            snoop.hear(0, &ipv4(message), ether(IPV4), A, 1);
        }
        assert_eq!((snoop.reports, snoop.groups(1).count()), (0, 0));
    }
}
