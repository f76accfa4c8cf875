//! What the user-mode stack reads besides frames: messages of DHCP, DHCPv6, DNS and neighbour discovery, TCP headers, and
//! the options of ports, forwards and the stack itself.
//!
//! Holds: no panic; answers are not longer than a packet, and what is answered is what was asked; what was read is written
//! as it was read.
#![no_main]

use std::net::Ipv4Addr;

use libfuzzer_sys::fuzz_target;
use vcp_net::cli::PortArg;
use vcp_net::frame::Mac;
use vcp_net::user::config::{Forward, UserConfig};
use vcp_net::user::leases::Leases;
use vcp_net::user::packet::{Arp, Link};
use vcp_net::user::tcp::segment::{HEADER_MAX, Segment};
use vcp_net::user::{dhcp4, dhcp6, dns, icmp, ndp};

const LINK: Link = Link { mac: Mac(0x5254_0000_0001), vid: 0 };

fn search() -> Vec<String> {
    vec!["example.org".to_owned(), "a.b.c".to_owned()]
}

/// A BOOTP header from Ethernet with the options of the input behind it.
fn bootp(options: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 236];
    bytes[..3].copy_from_slice(&[1, 1, 6]);
    bytes[28..34].copy_from_slice(&LINK.mac.bytes());
    bytes.extend([99, 130, 83, 99]);
    bytes.extend_from_slice(options);
    bytes
}

fn dhcp(bytes: &[u8], config: &UserConfig, leases: &mut Leases) {
    let Some(answer) = dhcp4::answer(bytes, LINK, config, &search(), leases) else { return };
    assert!(answer.bytes.len() <= 1400, "an answer of {} bytes", answer.bytes.len());
    assert_eq!((answer.bytes[0], &answer.bytes[4..8]), (2, &bytes[4..8]), "an answer to another one");
    let offered = Ipv4Addr::new(answer.bytes[16], answer.bytes[17], answer.bytes[18], answer.bytes[19]);
    assert!(
        offered.is_unspecified() || (config.is_inside(offered.into()) && !config.is_ours(offered.into()))
    );
}

fn run(kind: u8, bytes: &[u8]) {
    let config = UserConfig::default();
    let mut leases = Leases::default();
    match kind % 10 {
        0 => dhcp(bytes, &config, &mut leases),
        1 => {
            // Several from one client: the address stays.
            for part in bytes.chunks(64) {
                dhcp(&bootp(part), &config, &mut leases);
            }
            assert!(leases.iter().count() <= 1);
        }
        2 => {
            if let Some(answer) = dhcp6::answer(bytes, LINK, &config, &search(), &mut leases) {
                assert!(answer.len() <= 1400 && answer[1..4] == bytes[1..4], "an answer to another one");
            }
        }
        3 => {
            let Some(question) = dns::parse(bytes) else { return };
            for answer in
                [dns::answer(bytes, &question, &config, &leases), Some(dns::failure(bytes, &question))]
                    .into_iter()
                    .flatten()
            {
                assert!(
                    answer.len() <= bytes.len() + 512 && answer[..2] == bytes[..2] && answer[2] & 0x80 != 0
                );
            }
        }
        4 => {
            let Some(segment) = Segment::parse(bytes) else { return };
            assert!((20..=HEADER_MAX).contains(&usize::from(segment.header_bytes)));
            let mut out = [0; HEADER_MAX];
            let len = segment.emit(&mut out);
            let again = Segment::parse(&out[..len]).expect("what was written");
            // More blocks than there is room for beside the other options are left out.
            let same = |it: Segment| Segment { header_bytes: 0, sack: [(0, 0); 3], ..it };
            assert_eq!(same(segment), same(again));
        }
        5 => {
            let _ = icmp::echo(bytes, kind & 16 != 0);
            let _ = ndp::parse(bytes);
            if let Some(arp) = Arp::parse(bytes) {
                assert_eq!(Arp::parse(&arp.emit(LINK)[14..]), Some(arp));
            }
        }
        _ => {
            let Ok(text) = std::str::from_utf8(bytes) else { return };
            if let Ok(forward) = text.parse::<Forward>() {
                assert_eq!(forward.to_string().parse(), Ok(forward));
            }
            if let Ok(port) = text.parse::<PortArg>() {
                port.spec.check().expect("one that was checked");
            }
            if let Ok(config) = text.parse::<UserConfig>() {
                let first = config.guest4(0).expect("a network has room for a guest");
                assert!(config.is_inside(first.into()) && !config.is_ours(first.into()));
                assert!(config.is_ours(config.gateway4.into()) && config.flows_max() != 0);
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    if let Some((&kind, bytes)) = data.split_first() {
        run(kind, bytes);
    }
});
