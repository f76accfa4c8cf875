//! Every subset of offloads that two ports can agree on with their drivers: what one leaves undone the other gets either
//! whole or done, and every checksum is right.

use super::bed::{ALL_FEATURES, Bed, mac};
use crate::frame::testing::{Packet, verify};
use crate::frame::{Offloads, VnetHeader};
use crate::port::{PortSpec, features};
use crate::switch::account::Reason;
use crate::switch::work::PortId;

const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const HOST_BITS: [u64; 4] = [1 << 11, 1 << 12, 1 << 13, 1 << 56];
const GUEST_BITS: [u64; 5] = [1 << 7, 1 << 8, 1 << 9, 1 << 54, 1 << 55];

/// All sums of some of these bits.
fn subsets(bits: &[u64]) -> impl Iterator<Item = u64> + '_ {
    (0..1u32 << bits.len()).map(|chosen| {
        bits.iter().enumerate().filter(|(at, _)| chosen & 1 << at != 0).map(|(_, bit)| bit).sum()
    })
}

/// What a driver with these features may send.
fn packets(acked: u64) -> Vec<Packet> {
    let host = features::host(acked);
    let mut all = Vec::new();
    for v6 in [false, true] {
        for udp in [false, true] {
            let packet = |payload| Packet::new(v6, udp, payload, 3, 1).between(mac(0), mac(1));
            all.push(packet(700).complete());
            if host.csum {
                all.push(packet(701).partial());
            }
            let gso = packet(6001).gso(1400);
            if host.take(&gso.meta, v6) {
                let mut ecn = gso.clone();
                ecn.meta.gso_type |= 0x80;
                if !udp && host.ecn {
                    all.push(ecn);
                }
                all.push(gso);
            }
        }
    }
    all
}

fn check(bed: &mut Bed, receiver: u64, packet: &Packet) {
    bed.guests[0].send(packet.meta, &packet.bytes);
    bed.run();
    assert_eq!(bed.guests[0].sent(), 1);
    let offloads = features::guest(receiver);
    let mut stream = Vec::new();
    let mut frames = 0;
    while let Some((meta, bytes)) = bed.guests[1].receive() {
        let v6 = packet.ethertype == 0x86dd;
        assert!(offloads.take(&meta, v6), "{receiver:#x} gets {meta:?}");
        let check = verify(&meta, &bytes).unwrap_or_else(|why| panic!("{receiver:#x}: {why}: {meta:?}"));
        stream.extend(check.payload);
        frames += 1;
    }
    assert_eq!(stream, packet.payload(), "{receiver:#x} {:?}", packet.meta);
    if offloads.take(&packet.meta, packet.ethertype == 0x86dd) {
        assert_eq!(frames, 1, "it could have had it whole");
    }
    // As many buffers as it took, whatever it was.
    let room = 32 - i32::from(bed.guests[1].rx.avail_idx.wrapping_sub(bed.guests[1].rx.used_seen));
    bed.guests[1].offer(room.max(0) as usize);
}

#[test]
pub(super) fn every_pair_of_subsets_understands_each_other() {
    let senders: Vec<u64> = std::iter::once(0).chain(subsets(&HOST_BITS).map(|bits| bits | CSUM)).collect();
    let receivers: Vec<u64> =
        std::iter::once(0).chain(subsets(&GUEST_BITS).map(|bits| bits | GUEST_CSUM)).collect();
    for &sender in &senders {
        for &receiver in &receivers {
            for base in [ALL_FEATURES, features::VERSION_1] {
                let spec = PortSpec::default();
                let mut bed = Bed::new(&[(spec.clone(), sender | base), (spec, receiver | base)], None);
                bed.guests[1].offer(32);
                bed.introduce(1);
                for packet in packets(sender) {
                    // Without mergeable buffers a whole row of segments has no room in one.
                    let whole = features::guest(receiver).take(&packet.meta, packet.ethertype == 0x86dd);
                    if base & features::MRG_RXBUF == 0 && whole && packet.bytes.len() > 4000 {
                        continue;
                    }
                    check(&mut bed, receiver, &packet);
                }
                assert_eq!(bed.fabric.switches[0].account.total().drops_to(), 0);
            }
        }
    }
}

#[test]
pub(super) fn an_uplink_gets_what_it_takes_and_its_frames_are_finished_for_guests() {
    for offloads in [Offloads::NONE, Offloads { csum: true, ..Offloads::NONE }, Offloads::ALL] {
        let all = CSUM | HOST_BITS.iter().sum::<u64>() | ALL_FEATURES;
        let mut bed = Bed::new(&[(PortSpec::default(), all)], Some(offloads));
        bed.guests[0].offer(32);
        for packet in packets(all) {
            bed.guests[0].send(packet.meta, &packet.bytes);
            bed.run();
            let got = std::mem::take(&mut bed.wire.lock().unwrap().got);
            let mut stream = Vec::new();
            for (_, meta, bytes) in got {
                assert!(offloads.take(&meta, packet.ethertype == 0x86dd));
                stream.extend(verify(&meta, &bytes).unwrap().payload);
            }
            assert_eq!(stream, packet.payload());
            bed.guests[0].sent();
            // The same from outside, for a guest that takes nothing unfinished.
            let back = packet.clone().between(mac(1), mac(0));
            bed.wire.lock().unwrap().bring.push_back((back.meta, back.bytes.clone()));
            bed.run();
            let mut stream = Vec::new();
            while let Some((meta, bytes)) = bed.guests[0].receive() {
                assert!(meta.is_plain());
                stream.extend(verify(&meta, &bytes).unwrap().payload);
                bed.guests[0].offer(1);
            }
            assert_eq!(stream, packet.payload());
        }
    }
}

#[test]
pub(super) fn metadata_that_lies_is_dropped_at_the_sender() {
    let all = CSUM | HOST_BITS.iter().sum::<u64>() | ALL_FEATURES;
    let mut bed = Bed::new(&[(PortSpec::default(), all), (PortSpec::default(), ALL_FEATURES)], None);
    bed.guests[1].offer(32);
    bed.introduce(1);
    let good = Packet::new(false, false, 5000, 0, 1).gso(1000).between(mac(0), mac(1));
    let lies: [fn(&mut VnetHeader); 6] = [
        |meta| meta.csum_start = 9000,
        |meta| meta.csum_offset = 65_000,
        |meta| meta.gso_size = 0,
        |meta| meta.gso_type = 4,
        |meta| meta.gso_type = 0x7f,
        |meta| meta.flags = 0,
    ];
    for lie in lies {
        let mut meta = good.meta;
        lie(&mut meta);
        bed.guests[0].send(meta, &good.bytes);
    }
    bed.run();
    assert!(bed.guests[1].receive().is_none());
    assert_eq!((bed.guests[0].sent(), bed.drops(PortId(0), Reason::BadHeader)), (6, 6));
}

#[test]
pub(super) fn a_sender_that_may_leave_nothing_undone_is_not_believed_to_have() {
    let plain = (PortSpec::default(), ALL_FEATURES);
    let mut bed = Bed::new(&[plain.clone(), plain], None);
    bed.guests[1].offer(4);
    bed.introduce(1);
    let packet = Packet::new(false, false, 500, 0, 1).complete().between(mac(0), mac(1));
    // Its header is not looked at.
    bed.guests[0].send(VnetHeader { flags: 1, gso_type: 1, csum_start: 9, ..packet.meta }, &packet.bytes);
    bed.run();
    let (meta, bytes) = bed.guests[1].receive().unwrap();
    assert!(meta.is_plain() && verify(&meta, &bytes).unwrap().complete);
}

#[test]
pub(super) fn a_row_of_segments_that_meets_a_full_port_goes_on_where_it_stopped() {
    let all = CSUM | HOST_BITS.iter().sum::<u64>() | ALL_FEATURES;
    let mut bed = Bed::new(&[(PortSpec::default(), all), (PortSpec::default(), ALL_FEATURES)], None);
    bed.introduce(1);
    let packet = Packet::new(true, false, 30_000, 2, 1).gso(1000).between(mac(0), mac(1));
    bed.guests[0].send(packet.meta, &packet.bytes);
    let mut stream = Vec::new();
    for _ in 0..8 {
        bed.run();
        while let Some((meta, bytes)) = bed.guests[1].receive() {
            stream.extend(verify(&meta, &bytes).unwrap().payload);
        }
        bed.guests[1].offer(5);
    }
    assert_eq!((stream, bed.guests[0].sent()), (packet.payload().to_vec(), 1));
    assert_eq!(bed.drops(PortId(1), Reason::Full), 0);
}
