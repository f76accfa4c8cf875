//! Captures: what is in the file is what passed.

use serde_json::json;
use vcp_core::ask::Rest;
use vcp_core::fabric::Fabric;
use vcp_core::pcapng::ENHANCED_PACKET;

use super::bed::{ALL_FEATURES, Bed, ether, mac};
use crate::frame::VnetHeader;
use crate::frame::testing::Packet;
use crate::port::{PortSpec, Vlan};

#[allow(clippy::needless_pass_by_value)] // Made for the call.
fn command(bed: &mut Bed, name: &str, args: serde_json::Value) -> Result<serde_json::Value, String> {
    let args = args.as_object().cloned().unwrap_or_default();
    let rest = bed.fabric.command(&mut bed.ports, name, &args, bed.now).expect("a known command");
    rest.and_then(Rest::finish)
}

/// Interface, length before it was cut, bytes that are there, and the rest of each packet's block.
fn packets(file: &serde_json::Value) -> Vec<(u32, usize, Vec<u8>, String)> {
    let bytes = std::fs::read(file.as_str().unwrap()).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let (mut at, mut found) = (0, Vec::new());
    while at < bytes.len() {
        let len = word(at + 4) as usize;
        if word(at) == ENHANCED_PACKET {
            let there = word(at + 20) as usize;
            let (data, rest) = bytes[at + 28..at + len - 4].split_at(there);
            found.push((
                word(at + 8),
                word(at + 24) as usize,
                data.to_vec(),
                String::from_utf8_lossy(rest).into_owned(),
            ));
        }
        at += len;
    }
    found
}

#[test]
pub(super) fn a_port_is_seen_in_both_directions_with_what_was_left_undone() {
    let dir = tempfile::tempdir().unwrap();
    // The second port has a VLAN of its own: what it is given has no tag any more.
    let access = PortSpec { vlan: Vlan::Access(5), ..PortSpec::default() };
    let trunk =
        PortSpec { vlan: Vlan::Trunk { native: Some(5), allowed: Vec::new() }, ..PortSpec::default() };
    let mut bed = Bed::new(&[(trunk, ALL_FEATURES), (access, ALL_FEATURES)], None);
    assert!(command(&mut bed, "capture", json!({})).unwrap_err().contains("--capture-dir"));
    bed.fabric.capture_in(dir.path());
    bed.guests.iter_mut().for_each(|guest| guest.offer(32));
    bed.introduce(1);
    for bad in [json!({"port": "p9"}), json!({"operation": "fly"}), json!({"snap": 3}), json!({"x": 1})] {
        assert!(command(&mut bed, "capture", bad).is_err());
    }
    command(&mut bed, "capture", json!({"port": "p1", "snap": 60})).unwrap();
    assert!(command(&mut bed, "capture", json!({})).unwrap_err().contains("runs already"));
    let frame = ether(mac(0), mac(1), &[7; 200]);
    bed.guests[0].send(VnetHeader::default(), &frame);
    bed.run();
    let answer = ether(mac(1), mac(0), b"answer");
    bed.guests[1].send(VnetHeader::default(), &answer);
    bed.run();
    let told = command(&mut bed, "capture-stop", json!({})).unwrap();
    assert_eq!((&told["frames"], &told["lost"]), (&json!(2), &json!(0)));
    let seen = packets(&told["file"]);
    assert_eq!((seen[0].0, seen[0].1, &seen[0].2[..]), (1, frame.len(), &frame[..60]));
    assert_eq!((seen[1].0, &seen[1].2[..]), (1, &answer[..]));
    assert!(seen[1].3.contains("to port number 0"), "{:?}", seen[1].3);
    assert!(command(&mut bed, "capture-stop", json!({})).is_err());
}

#[test]
pub(super) fn an_operation_is_seen_with_what_it_decided() {
    let dir = tempfile::tempdir().unwrap();
    let protected = PortSpec { protect: true, mac: Some(mac(0)), ..PortSpec::default() };
    let features = ALL_FEATURES | crate::port::features::HOST_OFFLOADS;
    let mut bed = Bed::new(&[(protected, features), (PortSpec::default(), ALL_FEATURES)], None);
    bed.fabric.capture_in(dir.path());
    bed.guests.iter_mut().for_each(|guest| guest.offer(32));
    command(&mut bed, "capture", json!({"operation": "police"})).unwrap();
    bed.guests[0].send(VnetHeader::default(), &ether(mac(7), mac(1), b"not mine"));
    let row = Packet::new(false, false, 3000, 0, 1).gso(1448).between(mac(0), mac(1));
    bed.guests[0].send(row.meta, &row.bytes);
    bed.run();
    let told = command(&mut bed, "capture-stop", json!({})).unwrap();
    let seen = packets(&told["file"]);
    assert_eq!(seen.len(), 2);
    assert!(seen[0].3.contains("dropped by police: spoofed"), "{:?}", seen[0].3);
    assert!(seen[1].3.contains("gso=tcp4 gso_size=1448"), "{:?}", seen[1].3);
    // Whom an earlier operation dropped, a later one does not see.
    command(&mut bed, "capture", json!({"operation": "lookup"})).unwrap();
    bed.guests[0].send(VnetHeader::default(), &ether(mac(7), mac(1), b"not mine"));
    bed.run();
    assert_eq!(command(&mut bed, "capture-stop", json!({})).unwrap()["frames"], 0);
}
