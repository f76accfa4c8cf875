//! Target port groups as initiators see them.

use super::*;
use crate::lu::{Identity, Options};
use crate::storage::MemoryStorage;

fn device(states: &[(u16, AccessState)]) -> Device {
    let mut device = Device::new("iqn.2026-01.org.vcp:test");
    let identity = Identity::of_naa(0x3000_0000_0000_0001);
    let unit = LogicalUnit::new(Box::new(MemoryStorage::new(1 << 20)), identity, Options::default());
    assert!(device.add(Lun::ZERO, unit));
    device.set_groups(&groups(states));
    device
}

fn groups(states: &[(u16, AccessState)]) -> Vec<TargetPortGroup> {
    let group =
        |&(id, state): &(u16, AccessState)| TargetPortGroup { id, state, preferred: false, ports: vec![id] };
    states.iter().map(group).collect()
}

fn run(device: &mut Device, attentions: &mut Attentions, cdb: &[u8]) -> Result<Vec<u8>, Sense> {
    let mut bytes = [0; 16];
    bytes[..cdb.len()].copy_from_slice(cdb);
    let mut reply = Vec::new();
    match device.start(1, attentions, Lun::ZERO, &bytes, 0, &mut reply).0 {
        Step::Failed(sense) => Err(sense),
        _ => Ok(reply.iter().flat_map(|extent| extent.as_slice().to_vec()).collect()),
    }
}

#[test]
fn a_port_without_access_tells_of_itself_and_refuses_the_rest() {
    let states = [(1, AccessState::Optimized), (2, AccessState::Standby), (3, AccessState::Transitioning)];
    let mut device = device(&states);
    let read = [op::READ_10, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    let rtpg = [op::MAINTENANCE_IN, op::SA_REPORT_TARGET_PORT_GROUPS, 0, 0, 0, 0, 0, 0, 1, 0];
    for (id, code) in [(1, None), (2, Some(asc::ALUA_STANDBY)), (3, Some(asc::ALUA_TRANSITION))] {
        let mut nexus = Attentions::new(id);
        let inquiry = run(&mut device, &mut nexus, &[op::INQUIRY, 0, 0, 0, 96]).unwrap();
        assert_eq!(inquiry[5] & 0x30, 0x10, "TPGS");
        let page = run(&mut device, &mut nexus, &[op::INQUIRY, 1, 0x83, 0, 255]).unwrap();
        let names = iscsi::scsi::vpd::Designators::parse(&page).unwrap();
        assert_eq!((names.port_group, names.relative_port), (Some(id), Some(id)));
        let told = run(&mut device, &mut nexus, &rtpg).unwrap();
        assert_eq!(iscsi::scsi::alua::parse_groups(&told).unwrap(), groups(&states));
        let done = run(&mut device, &mut nexus, &read);
        assert_eq!(done.err(), code.map(|code| Sense::new(SenseKey::NotReady, code)), "group {id}");
        let ready = run(&mut device, &mut nexus, &[op::TEST_UNIT_READY, 0, 0, 0, 0, 0]);
        assert_eq!(ready.is_ok(), code.is_none(), "group {id}");
    }
}

#[test]
fn a_change_of_state_is_told_once_by_a_unit_attention() {
    let mut device = device(&[(1, AccessState::Optimized), (2, AccessState::Optimized)]);
    let mut nexus = Attentions::new(1);
    device.set_groups(&groups(&[(1, AccessState::NonOptimized), (2, AccessState::Optimized)]));
    device.note_access_change(&mut nexus);
    let ready = [op::TEST_UNIT_READY, 0, 0, 0, 0, 0];
    assert_eq!(run(&mut device, &mut nexus, &ready).err(), Some(attention(asc::ALUA_STATE_CHANGED)));
    assert!(run(&mut device, &mut nexus, &ready).is_ok());
}

#[test]
fn with_one_group_nothing_is_asymmetric() {
    let mut device = device(&[(1, AccessState::Optimized)]);
    let inquiry = run(&mut device, &mut Attentions::new(1), &[op::INQUIRY, 0, 0, 0, 96]).unwrap();
    assert_eq!(inquiry[5] & 0x30, 0);
}
