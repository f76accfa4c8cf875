//! What the stack answers itself: addresses, echo, names.

use smoltcp::socket::{dhcpv4, tcp};

use super::bed::{Bed, MAC, Stage};
use crate::frame::ether::{ARP, IPV4};
use crate::frame::{Mac, OutFrame, VnetHeader};
use crate::switch::work::PortId;
use crate::uplink::{Sender, Sent, Uplink};
use crate::user::packet::{Arp, Link, Packet, ether, finished, udp};
use crate::user::{UserConfig, dns, icmp};

fn ours() -> Link {
    Link { mac: UserConfig::default().mac, vid: 0 }
}

#[test]
fn the_gateway_says_who_it_is_and_answers_echo() {
    let mut bed = Bed::new("", Stage::default());
    let guest = (MAC, super::GUEST);
    let config = UserConfig::default();
    let asks = Arp { asks: true, from: guest, to: (Mac(0), config.gateway4) };
    bed.give(&asks.emit(Link { mac: Mac::BROADCAST, vid: 0 }));
    let answer = bed.take().unwrap();
    assert_eq!(u16::from_be_bytes([answer[12], answer[13]]), ARP);
    assert_eq!(Arp::parse(&answer[14..]).unwrap().from, (config.mac, config.gateway4));
    // Of other addresses it says nothing.
    bed.give(
        &Arp { to: (Mac(0), config.guest4(7).unwrap()), ..asks }.emit(Link { mac: Mac::BROADCAST, vid: 0 }),
    );
    let ends = (super::GUEST.into(), config.gateway4.into());
    bed.give(&finished(MAC, ours(), ends, 1, &[8, 0, 0, 0, 1, 2, 3, 4, 5], 2));
    let answer = std::iter::from_fn(|| bed.take()).find(|it| it[12..14] == IPV4.to_be_bytes()).unwrap();
    assert!(icmp::is_sound(&answer[34..], (ends.1, ends.0)));
    assert_eq!(&answer[34..36], &[0, 0]);
}

#[test]
fn a_guest_gets_a_lease() {
    let mut bed = Bed::new("", Stage::default());
    let handle = bed.sockets.add(dhcpv4::Socket::new());
    let mut lease = None;
    bed.until("lease", |bed| {
        if let Some(dhcpv4::Event::Configured(config)) =
            bed.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll()
        {
            lease = Some((config.address.address(), config.router, config.dns_servers.first().copied()));
        }
        lease.is_some()
    });
    let config = UserConfig::default();
    assert_eq!(lease.unwrap(), (super::GUEST, Some(config.gateway4), Some(config.dns4())));
    assert_eq!(bed.stack.shared.leases.iter().filter(|(_, it)| it.bound4).count(), 1);
}

/// A name server of the host that knows one answer.
fn query(name: &str) -> Vec<u8> {
    let mut out = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    dns::push_name(&mut out, name);
    out.extend([0, 1, 0, 1]);
    out
}

#[test]
fn names_are_answered_here_or_asked_for_elsewhere() {
    // There is nobody at the documentation network's address: what is asked elsewhere leaves as a query.
    let mut bed = Bed::new("dns=127.0.0.1", Stage::default());
    let config = UserConfig::default();
    let to = (config.dns4().into(), 53);
    bed.give(&udp(MAC, ours(), (super::GUEST.into(), 4000), to, &query("gateway.internal")));
    let answer = std::iter::from_fn(|| bed.take()).find(|it| it[12..14] == IPV4.to_be_bytes()).unwrap();
    let packet = Packet::parse(&answer, IPV4, 14, answer.len()).unwrap();
    assert_eq!((packet.src, &answer[answer.len() - 4..]), (to.0, &config.gateway4.octets()[..]));
    bed.give(&udp(MAC, ours(), (super::GUEST.into(), 4000), to, &query("example.org")));
    assert_eq!((bed.counter("/dns/0"), bed.counter("/dns/1")), (1, 1));
}

#[test]
fn nonsense_is_dropped_and_counted() {
    let mut bed = Bed::new("", Stage::default());
    let config = UserConfig::default();
    let good = udp(MAC, ours(), (super::GUEST.into(), 1), (config.gateway4.into(), 9), b"x");
    for len in 0..good.len() {
        bed.give(&good[..len]);
    }
    let frames = bed.counter("/frames");
    assert_eq!(frames, good.len() as u64);
    assert_eq!(bed.counter("/drops/malformed") + bed.counter("/drops/not_ours"), frames);
    let spoofed = udp(MAC, ours(), ("192.0.2.1".parse().unwrap(), 1), (config.gateway4.into(), 9), b"x");
    bed.give(&spoofed);
    assert_eq!(bed.counter("/drops/bad_source"), 1);
    let mut wrong = good.clone();
    wrong[40] ^= 1;
    bed.give(&wrong);
    assert_eq!(bed.counter("/drops/checksum"), 1);
    let mut other = Vec::new();
    ether(&mut other, MAC, ours(), 0x88cc);
    other.extend([0; 50]);
    bed.give(&other);
    assert_eq!(bed.counter("/drops/not_ours"), 1);
}

#[test]
fn a_guest_has_its_quota_of_flows() {
    let mut bed = Bed::new("flows=2", Stage::default());
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let to = (super::GATEWAY, listener.local_addr().unwrap().port());
    let handles: Vec<_> = (0..3).map(|_| bed.connect(to, 4096)).collect();
    bed.until("refusal", |bed| bed.counter("/drops/no_flow") == 1);
    let mut open = 0;
    bed.until("others", |bed| {
        open = handles.iter().filter(|it| bed.sockets.get::<tcp::Socket<'_>>(**it).may_send()).count();
        open == 2
    });
    assert_eq!(bed.stack.flows().0, 2);
}

#[test]
fn a_row_of_datagrams_that_nobody_takes_is_not_answered_one_by_one() {
    let mut bed = Bed::new("", Stage::default());
    let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let payload = vec![7; 2000];
    let bytes = udp(MAC, ours(), (super::GUEST.into(), 5000), (super::GATEWAY, free), &payload);
    let frame = OutFrame::of(VnetHeader::udp(34, 1), &bytes);
    let from = Sender { port: PortId(0), vid: 0, now: std::time::Instant::now() };
    assert_eq!(bed.stack.send(&frame, from), Sent::Done);
    bed.until("limit", |bed| bed.counter("/unreachable_limited") != 0);
    let told = bed.counter("/unreachable");
    assert!((1..=2 * 32).contains(&told), "{told}");
}
