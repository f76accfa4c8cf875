//! Where frames go, and where they do not.

use serde_json::{Map, json};
use vcp_core::device::RingDevice;
use vcp_core::fabric::Fabric;

use super::bed::{ALL_FEATURES, Bed, ether, mac, tagged};
use crate::frame::{Mac, Offloads, VnetHeader};
use crate::port::{OnFull, PortSpec, Rate, Vlan};
use crate::switch::PATIENCE;
use crate::switch::account::Reason;
use crate::switch::work::PortId;

const PLAIN: VnetHeader =
    VnetHeader { flags: 0, gso_type: 0, hdr_len: 0, gso_size: 0, csum_start: 0, csum_offset: 0 };

#[test]
pub(super) fn an_unknown_station_is_looked_for_everywhere_and_a_known_one_is_not() {
    let mut bed = Bed::plain(3);
    let hello = ether(mac(0), mac(1), b"hello");
    bed.guests[0].send(PLAIN, &hello);
    bed.run();
    for at in [1, 2] {
        assert_eq!(bed.guests[at].receive().unwrap().1, hello);
    }
    assert!(bed.guests[0].receive().is_none());
    assert_eq!(bed.guests[0].sent(), 1);
    let answer = ether(mac(1), mac(0), b"answer");
    bed.guests[1].send(PLAIN, &answer);
    bed.run();
    assert_eq!(bed.guests[0].receive().unwrap().1, answer);
    assert!(bed.guests[2].receive().is_none(), "0 is known");
    bed.guests[0].send(PLAIN, &ether(mac(0), Mac::BROADCAST, b"all"));
    bed.run();
    assert!(bed.guests[1].receive().is_some() && bed.guests[2].receive().is_some());
}

#[test]
pub(super) fn frames_arrive_in_order_once_and_whole() {
    let mut bed = Bed::plain(2);
    bed.introduce(1);
    let mut expected = 0u32;
    for round in 0..200u32 {
        for n in 0..7u32 {
            let payload: Vec<u8> = (0..(round * 7 + n) % 1400).map(|at| at as u8).collect();
            let mut frame = ether(mac(0), mac(1), &payload);
            frame.extend((round * 7 + n).to_le_bytes());
            bed.guests[0].send(PLAIN, &frame);
        }
        bed.run();
        assert_eq!(bed.guests[0].sent(), 7);
        for _ in 0..7 {
            let (_, bytes) = bed.guests[1].receive().unwrap();
            let number = u32::from_le_bytes(bytes[bytes.len() - 4..].try_into().unwrap());
            assert_eq!(number, expected);
            expected += 1;
        }
        bed.guests[1].offer(7);
    }
}

#[test]
pub(super) fn a_full_port_holds_its_senders_up_and_nothing_is_lost() {
    let mut bed = Bed::plain(3);
    bed.introduce(1);
    bed.introduce(2);
    for n in 0..30u8 {
        bed.guests[0].send(PLAIN, &ether(mac(0), mac(1), &[n; 8]));
        bed.guests[2].send(PLAIN, &ether(mac(2), mac(1), &[100 + n; 8]));
    }
    bed.run();
    // 32 buffers for 60 frames.
    let mut got = Vec::new();
    while let Some((_, bytes)) = bed.guests[1].receive() {
        got.push(bytes[14]);
    }
    assert_eq!(got.len(), 32);
    bed.guests[1].offer(32);
    bed.run();
    while let Some((_, bytes)) = bed.guests[1].receive() {
        got.push(bytes[14]);
    }
    let from = |low: u8| got.iter().copied().filter(|n| (low..low + 30).contains(n)).collect::<Vec<_>>();
    assert_eq!((from(0), from(100)), ((0..30).collect(), (100..130).collect()));
    assert_eq!(bed.drops(PortId(1), Reason::Full), 0);
}

#[test]
pub(super) fn a_port_that_stands_still_holds_nobody_up_for_long() {
    let mut bed = Bed::plain(3);
    bed.introduce(1);
    bed.introduce(2);
    for _ in 0..40 {
        bed.guests[0].send(PLAIN, &ether(mac(0), mac(1), b"x"));
    }
    bed.guests[0].send(PLAIN, &ether(mac(0), mac(2), b"for another"));
    bed.run();
    assert!(bed.guests[2].receive().is_none(), "behind those that wait");
    bed.now += PATIENCE;
    bed.run();
    assert!(bed.guests[2].receive().is_some());
    assert_eq!(bed.drops(PortId(1), Reason::Full), 8);
}

#[test]
pub(super) fn a_port_that_drops_holds_nobody_up() {
    let spec = PortSpec { on_full: OnFull::Drop, ..PortSpec::default() };
    let plain = (PortSpec::default(), ALL_FEATURES);
    let mut bed = Bed::new(&[plain, (spec, ALL_FEATURES)], None);
    bed.introduce(1);
    bed.guests[1].offer(5);
    for _ in 0..20 {
        bed.guests[0].send(PLAIN, &ether(mac(0), mac(1), b"x"));
    }
    bed.run();
    assert_eq!((bed.guests[0].sent(), bed.drops(PortId(1), Reason::Full)), (20, 15));
}

#[test]
pub(super) fn a_frame_that_is_too_long_for_a_port_is_dropped_there_alone() {
    let spec = PortSpec { mtu: Some(1000), ..PortSpec::default() };
    let plain = (PortSpec::default(), ALL_FEATURES);
    let mut bed = Bed::new(&[plain.clone(), (spec, ALL_FEATURES), plain], None);
    bed.guests[1].offer(4);
    bed.guests[2].offer(4);
    for (len, arrives) in [(1000, true), (1001, false)] {
        let frame = ether(mac(0), Mac::BROADCAST, &vec![7; len]);
        bed.guests[0].send(PLAIN, &frame);
        bed.run();
        assert_eq!(bed.guests[1].receive().is_some(), arrives, "{len} bytes");
        assert_eq!(bed.guests[2].receive().map(|(_, bytes)| bytes), Some(frame));
    }
    assert_eq!((bed.drops(PortId(1), Reason::Mtu), bed.drops(PortId(2), Reason::Mtu)), (1, 0));
}

#[test]
pub(super) fn vlans_are_apart_and_trunks_carry_tags() {
    let port = |vlan| (PortSpec { vlan, ..PortSpec::default() }, ALL_FEATURES);
    let trunk = Vlan::Trunk { native: None, allowed: vec![5, 6] };
    let mut bed =
        Bed::new(&[port(Vlan::Access(5)), port(Vlan::Access(5)), port(Vlan::Access(6)), port(trunk)], None);
    bed.guests.iter_mut().for_each(|guest| guest.offer(16));
    bed.guests[0].send(PLAIN, &ether(mac(0), Mac::BROADCAST, b"five"));
    bed.run();
    assert_eq!(bed.guests[1].receive().unwrap().1, ether(mac(0), Mac::BROADCAST, b"five"));
    assert!(bed.guests[2].receive().is_none());
    assert_eq!(bed.guests[3].receive().unwrap().1, tagged(mac(0), Mac::BROADCAST, 5, b"five"));
    // With a priority, which other trunks would see.
    bed.guests[3].send(PLAIN, &tagged(mac(3), mac(0), 0x6005, b"back"));
    bed.run();
    assert_eq!(bed.guests[0].receive().unwrap().1, ether(mac(3), mac(0), b"back"));
    assert!(bed.guests[1].receive().is_none() && bed.guests[2].receive().is_none());
    for (from, frame) in [
        (0, tagged(mac(0), Mac::BROADCAST, 6, b"not mine")),
        (3, tagged(mac(3), Mac::BROADCAST, 7, b"not allowed")),
        (3, ether(mac(3), Mac::BROADCAST, b"no native VLAN")),
    ] {
        bed.guests[from].send(PLAIN, &frame);
        bed.run();
        assert!((0..4).all(|at| bed.guests[at].receive().is_none()));
    }
    assert_eq!((bed.drops(PortId(0), Reason::Vlan), bed.drops(PortId(3), Reason::Vlan)), (1, 2));
}

#[test]
pub(super) fn an_address_is_its_owners_alone() {
    let own = PortSpec { mac: Some(mac(0)), protect: true, ..PortSpec::default() };
    let plain = PortSpec::default();
    let mut bed = Bed::new(&[(own, ALL_FEATURES), (plain, ALL_FEATURES)], Some(Offloads::ALL));
    bed.guests.iter_mut().for_each(|guest| guest.offer(16));
    bed.guests[0].send(PLAIN, &ether(mac(7), mac(1), b"as another"));
    bed.guests[1].send(PLAIN, &ether(mac(0), mac(7), b"as the owner"));
    bed.wire.lock().unwrap().bring.push_back((PLAIN, ether(mac(0), mac(1), b"from outside")));
    bed.run();
    assert!(bed.guests[0].receive().is_none() && bed.guests[1].receive().is_none());
    assert!(bed.wire.lock().unwrap().got.is_empty());
    for port in [PortId(0), PortId(1), PortId::UPLINK] {
        assert_eq!(bed.drops(port, Reason::Spoofed), 1, "{port:?}");
    }
    bed.guests[1].send(PLAIN, &ether(mac(1), mac(0), b"to the owner"));
    bed.run();
    assert!(bed.guests[0].receive().is_some());
    assert!(bed.wire.lock().unwrap().got.is_empty(), "it is known where it is before it says a word");
}

#[test]
pub(super) fn a_rate_is_kept_over_time() {
    let rate = Rate { bytes: None, frames: Some(10_000) };
    let limited = PortSpec { rate, ..PortSpec::default() };
    let drop = PortSpec { on_full: OnFull::Drop, ..PortSpec::default() };
    let mut bed = Bed::new(&[(limited, ALL_FEATURES), (drop, ALL_FEATURES)], None);
    bed.introduce(1);
    bed.guests[1].offer(30);
    let mut passed = 0;
    // A second, in which it wants to send three times as much.
    for _ in 0..1000 {
        bed.now += std::time::Duration::from_micros(970);
        for _ in 0..30 {
            bed.guests[0].send(PLAIN, &ether(mac(0), mac(1), b"x"));
        }
        bed.run();
        bed.guests[0].sent();
        while bed.guests[1].receive().is_some() {
            passed += 1;
            bed.guests[1].offer(1);
        }
    }
    // What the bucket had in the beginning comes on top.
    let burst = 2048;
    assert!((9_500..=10_500 + burst).contains(&passed), "{passed}");
    assert!(bed.drops(PortId(0), Reason::RateLimit) > 15_000);
}

#[test]
pub(super) fn a_broken_ring_stops_its_port_and_no_other() {
    let mut bed = Bed::plain(3);
    bed.introduce(1);
    bed.introduce(2);
    // A descriptor outside of memory, and an index that ran away.
    let bad = super::ring::Desc { addr: 1 << 40, len: 100, flags: 0, next: 0 };
    let table = bed.guests[0].tx.desc;
    (0..super::bed::RING_SIZE).for_each(|at| bed.guests[0].tx.write_desc(table, at, bad));
    bed.guests[0].tx.offer(0);
    bed.guests[1].send(PLAIN, &ether(mac(1), mac(2), b"goes on"));
    bed.run();
    assert!(bed.guests[2].receive().is_some());
    assert_eq!(bed.ports[0].device().metrics().broken_queues.get(), 1);
    // A receive ring that breaks is the receiver's trouble.
    let index = bed.guests[2].rx.avail_idx.wrapping_add(1000);
    bed.guests[2].rx.set_avail_idx(index);
    (0..40).for_each(|_| bed.guests[1].send(PLAIN, &ether(mac(1), mac(2), b"x")));
    bed.run();
    assert_eq!(bed.guests[1].sent(), 42);
    assert_eq!(bed.ports[2].device().metrics().broken_queues.get(), 1);
    assert!(bed.drops(PortId(2), Reason::Broken) + bed.drops(PortId(2), Reason::Down) > 0);
}

#[test]
pub(super) fn an_uplink_that_is_full_holds_frames_back() {
    let plain = (PortSpec::default(), ALL_FEATURES);
    let mut bed = Bed::new(&[plain], Some(Offloads::ALL));
    bed.wire.lock().unwrap().bring.push_back((PLAIN, ether(mac(9), Mac::BROADCAST, b"I am outside")));
    bed.guests[0].offer(4);
    bed.run();
    assert!(bed.guests[0].receive().is_some());
    bed.wire.lock().unwrap().full = true;
    (0..5).for_each(|_| bed.guests[0].send(PLAIN, &ether(mac(0), mac(9), b"out")));
    bed.run();
    assert_eq!(bed.guests[0].sent(), 0);
    bed.wire.lock().unwrap().full = false;
    bed.run();
    assert_eq!((bed.guests[0].sent(), bed.wire.lock().unwrap().got.len()), (5, 5));
    assert_eq!(bed.wire.lock().unwrap().got[0].0, PortId(0));
}

#[test]
pub(super) fn ports_are_changed_while_they_run() {
    let mut bed = Bed::plain(2);
    let mut set = |args: serde_json::Value| {
        let args: Map<_, _> = args.as_object().unwrap().clone();
        let now = bed.now;
        let answer = bed.fabric.command(&mut bed.ports, "set", &args, now).unwrap();
        answer.and_then(vcp_core::ask::Rest::finish)
    };
    assert!(set(json!({"port": "p0", "vlan": {"access": 5}})).is_ok());
    for bad in [
        json!({"port": "p7", "link": false}),
        json!({"port": "p0", "vlan": {"access": 5000}}),
        json!({"port": "p0", "pairs": 3}),
        json!({"port": "p0", "protect": true}),
    ] {
        assert!(set(bad.clone()).is_err(), "{bad}");
    }
    bed.guests[0].send(PLAIN, &ether(mac(0), Mac::BROADCAST, b"in VLAN 5"));
    bed.run();
    assert_eq!(bed.guests[1].receive().unwrap().1, tagged(mac(0), Mac::BROADCAST, 5, b"in VLAN 5"));
    let args = json!({"port": "p0", "link": false}).as_object().unwrap().clone();
    assert!(bed.fabric.command(&mut bed.ports, "set", &args, bed.now).unwrap().is_ok());
    bed.guests[0].send(PLAIN, &ether(mac(0), Mac::BROADCAST, b"down"));
    bed.run();
    assert!(bed.guests[1].receive().is_none());
    assert_eq!(bed.drops(PortId(0), Reason::LinkDown), 1);
}
