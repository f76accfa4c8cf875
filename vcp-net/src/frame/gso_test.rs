//! Segmentation and checksums, checked by a receiver that believes nothing.

use proptest::prelude::*;
use vcp_core::queue::burst::Frame;

use super::*;
use crate::frame::ether::{IPV4, IPV6};
use crate::frame::testing::{Check, Packet, verify};

/// What the receiver got, with what was left to it.
fn finish_all(packet: &Packet, offloads: Offloads, prefix: usize) -> (Finished, Vec<(VnetHeader, Vec<u8>)>) {
    let out = OutFrame {
        meta: packet.meta,
        prefix: &packet.bytes[..prefix],
        frame: Frame::of(&packet.bytes),
        skip: prefix,
        len_bytes: packet.bytes.len() - prefix,
    };
    let mut pieces = Vec::new();
    let finished = finish_frame(&out, packet.ethertype, 14, offloads, 0, &mut |piece| {
        pieces.push((piece.meta, piece.to_vec()));
        true
    });
    (finished, pieces)
}

proptest! {
    #[test]
    fn every_segment_is_a_good_packet_and_the_payload_is_whole(
        v6: bool, udp: bool, csum: bool, payload in 0usize..20_000, gso_size in 48u16..9000, options in 0usize..10,
        prefix in 0usize..19, seed: u8,
    ) {
        prop_assume!(payload.div_ceil(gso_size.into()) <= MAX_SEGMENTS);
        let packet = Packet::new(v6, udp, payload, if udp { 0 } else { options }, seed).gso(gso_size);
        let (finished, pieces) =
            finish_all(&packet, Offloads { csum, ..Offloads::NONE }, prefix);
        prop_assert_eq!(finished, Finished::Done);
        prop_assert_eq!(pieces.len(), payload.div_ceil(gso_size.into()).max(1));
        let mut stream = Vec::new();
        let last = pieces.len() - 1;
        for (at, (meta, bytes)) in pieces.iter().enumerate() {
            let check = verify(meta, bytes).map_err(|why| TestCaseError::fail(format!("segment {at}: {why}")))?;
            prop_assert_eq!(check.complete, !csum);
            prop_assert!(check.payload.len() <= gso_size.into());
            if !udp {
                prop_assert_eq!(check.seq, packet.seq.wrapping_add(stream.len() as u32));
                prop_assert_eq!(check.fin_psh, if at == last { packet.fin_psh } else { 0 });
            }
            stream.extend_from_slice(&check.payload);
        }
        prop_assert_eq!(stream, packet.payload());
    }

    #[test]
    fn a_missing_checksum_is_filled_in(v6: bool, udp: bool, payload in 0usize..3000, prefix in 0usize..19, seed: u8) {
        let packet = Packet::new(v6, udp, payload, 3, seed).partial();
        let (finished, pieces) = finish_all(&packet, Offloads::NONE, prefix);
        prop_assert_eq!(finished, Finished::Done);
        prop_assert_eq!(pieces.len(), 1);
        let Check { complete, payload, .. } = verify(&pieces[0].0, &pieces[0].1).map_err(TestCaseError::fail)?;
        prop_assert!(complete);
        prop_assert_eq!(payload, packet.payload());
    }

    #[test]
    fn any_bytes_and_metadata_are_survived(
        mut bytes in prop::collection::vec(any::<u8>(), 14..400),
        flags: u8, gso_type in prop::sample::select(vec![0u8, 1, 3, 4, 5, 0x81, 0x84, 7, 0xff]),
        gso_size in 0u16..3000, csum_start in 0u16..500, csum_offset in 0u16..500, v6: bool, csum: bool, prefix in 0usize..14,
    ) {
        if bytes.len() > 15 {
            bytes[14] = if v6 { 0x60 } else { 0x45 };
        }
        let packet = Packet::raw(
            VnetHeader { flags, gso_type, hdr_len: 0, gso_size, csum_start, csum_offset },
            if v6 { IPV6 } else { IPV4 },
            bytes,
        );
        let (finished, pieces) = finish_all(&packet, Offloads { csum, ..Offloads::NONE }, prefix);
        if finished == Finished::Done {
            for (meta, bytes) in pieces {
                prop_assert!(!meta.is_gso());
                prop_assert!(csum || !meta.needs_csum());
                prop_assert!(bytes.len() <= packet.bytes.len() + 256);
            }
        }
    }
}

#[test]
fn a_receiver_that_stops_goes_on_where_it_stopped() {
    let packet = Packet::new(false, false, 10_000, 0, 1).gso(1000);
    let whole = finish_all(&packet, Offloads::NONE, 0).1;
    let out = OutFrame::of(packet.meta, &packet.bytes);
    let mut got = Vec::new();
    let mut from = 0;
    loop {
        let mut room = 3;
        let finished = finish_frame(&out, IPV4, 14, Offloads::NONE, from, &mut |piece| {
            if room == 0 {
                return false;
            }
            room -= 1;
            got.push((piece.meta, piece.to_vec()));
            true
        });
        match finished {
            Finished::Stopped(at) => from = at,
            Finished::Done => break,
            Finished::Malformed(why) => panic!("{why}"),
        }
    }
    assert_eq!(got, whole);
}

#[test]
fn metadata_that_lies_is_refused() {
    let good = Packet::new(false, false, 5000, 0, 1).gso(1000);
    let refused = |change: fn(&mut Packet)| {
        let mut packet = good.clone();
        change(&mut packet);
        matches!(finish_all(&packet, Offloads::NONE, 0).0, Finished::Malformed(_))
    };
    assert!(!refused(|_| {}));
    assert!(refused(|packet| packet.meta.gso_size = 0));
    assert!(refused(|packet| packet.meta.gso_size = 1), "5000 segments");
    assert!(refused(|packet| packet.meta.csum_start += 2));
    assert!(refused(|packet| packet.meta.csum_offset = 6));
    assert!(refused(|packet| packet.meta.flags = 0));
    assert!(refused(|packet| packet.meta.gso_type = 4), "IPv6 in the metadata alone");
    assert!(refused(|packet| packet.meta.gso_type = 3), "UFO is not offered");
    assert!(refused(|packet| packet.bytes[14] = 0x4f), "options past the end of the header");
    assert!(refused(|packet| packet.bytes[14 + 6] = 0x20), "a fragment");
    assert!(refused(|packet| packet.bytes[14 + 20 + 12] = 0x10), "a data offset of 1");
}
