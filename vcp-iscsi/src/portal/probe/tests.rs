//! Probes of units that answer from a table.

use iscsi::scsi::sense::asc;

use super::*;

/// A unit that answers each command from a table; commands that are not in it are not known to it.
fn probe(table: &[(&str, Vec<u8>)], mut attentions: usize) -> Result<Found, ProbeError> {
    let mut probe = Probe::new(scsi::Lun::ZERO);
    for _ in 0..100 {
        let command = probe.next();
        let key = match (command.cdb.name(), command.cdb.0[1]) {
            ("INQUIRY", 1) => format!("VPD {:02X}", command.cdb.0[2]),
            (name, _) => name.to_owned(),
        };
        let found = table.iter().find(|(name, _)| *name == key);
        let (status, sense, data) = if attentions > 0 && key != "INQUIRY" {
            attentions -= 1;
            let sense = Sense::new(SenseKey::UnitAttention, asc::POWER_ON_OR_RESET);
            (Status::CHECK_CONDITION, Some(sense), &[][..])
        } else if let Some((_, data)) = found {
            (Status::GOOD, None, &data[..data.len().min(command.len_bytes as usize)])
        } else {
            let sense = Sense::new(SenseKey::IllegalRequest, asc::INVALID_OPCODE);
            (Status::CHECK_CONDITION, Some(sense), &[][..])
        };
        if probe.answer(Reply { status, sense, data })? == Next::Done {
            return probe.finish();
        }
    }
    panic!("the probe does not end");
}

fn inquiry(first: u8) -> (&'static str, Vec<u8>) {
    let mut data = vec![first, 0, 6, 2, 31, 0, 0, 2];
    data.extend_from_slice(b"VENDOR  PRODUCT         REV ");
    ("INQUIRY", data)
}

fn capacity_16(last: u64, block_bytes: u32) -> (&'static str, Vec<u8>) {
    let mut data = last.to_be_bytes().to_vec();
    data.extend_from_slice(&block_bytes.to_be_bytes());
    data.resize(32, 0);
    ("READ CAPACITY(16)", data)
}

fn ready() -> (&'static str, Vec<u8>) {
    ("TEST UNIT READY", Vec::new())
}

#[test]
fn an_old_disk_that_knows_almost_nothing() {
    let capacity_10 = ("READ CAPACITY(10)", vec![0, 0, 0x0F, 0xFF, 0, 0, 2, 0]);
    let found = probe(&[inquiry(0), ready(), capacity_10], 3).unwrap();
    let lun = found.lun(false);
    assert_eq!((lun.blocks, lun.block_bytes), (4096, 512));
    assert_eq!((lun.max_discard_blocks, lun.max_write_zeroes_blocks), (0, 0));
    assert!(!lun.write_cache && !lun.fua && !lun.read_only);
    assert_eq!((lun.max_transfer_blocks, lun.serial.as_str()), (32768, ""));
}

#[test]
fn limits_of_a_thin_disk_of_more_than_2_tib() {
    let mut limits = vec![0; 64];
    limits[1] = vpd::BLOCK_LIMITS;
    limits[3] = 60;
    limits[8..12].copy_from_slice(&2048u32.to_be_bytes());
    limits[20..24].copy_from_slice(&0x1000u32.to_be_bytes());
    limits[24..28].copy_from_slice(&1u32.to_be_bytes());
    limits[28..32].copy_from_slice(&128u32.to_be_bytes());
    limits[36..44].copy_from_slice(&0x8000u64.to_be_bytes());
    let table = [
        inquiry(0),
        ready(),
        capacity_16(0x3_0000_0000, 4096),
        ("VPD 00", vec![0, 0, 0, 4, 0, 0x80, 0xB0, 0xB2]),
        ("VPD 80", b"\0\x80\0\x04SN-1".to_vec()),
        ("VPD B0", limits),
        ("VPD B2", vec![0, 0xB2, 0, 4, 0, 0xC0, 2, 0]),
        ("MODE SENSE(6)", vec![7, 0, 0x90, 0, 0x08, 2, 0x04, 0]),
    ];
    let found = probe(&table, 0).unwrap();
    let lun = found.lun(false);
    assert_eq!((lun.blocks, lun.block_bytes, lun.max_transfer_blocks), (0x3_0000_0001, 4096, 2048));
    assert!(lun.write_cache && lun.fua, "caching page and DPOFUA");
    // Write protected: no discard, whatever the pages say.
    assert!(lun.read_only);
    assert_eq!((lun.max_discard_blocks, lun.max_write_zeroes_blocks), (0, 0));
    assert_eq!(lun.serial, "SN-1");
    let mut writable = found.clone();
    writable.mode.write_protected = false;
    let lun = writable.lun(false);
    assert_eq!((lun.max_discard_blocks, lun.discard_granularity), (0x1000, 128));
    assert_eq!((lun.max_write_zeroes_blocks, lun.write_zeroes_may_unmap), (0x8000, true));
    assert!(writable.lun(true).read_only);
    assert!(found.is_same_unit(&writable));
    writable.serial = Some("SN-2".into());
    assert!(!found.is_same_unit(&writable));
}

#[test]
fn what_is_no_disk_is_told() {
    let fails = |table: &[_], attentions| probe(table, attentions).unwrap_err();
    assert_eq!(fails(&[inquiry(0x7F)], 0), ProbeError::NoLun);
    assert_eq!(fails(&[inquiry(0x0C)], 0), ProbeError::NotADisk("array controller"));
    assert_eq!(fails(&[inquiry(0), ready(), capacity_16(9, 8192)], 0), ProbeError::BlockSize(8192));
    assert!(matches!(fails(&[inquiry(0), ready(), capacity_16(9, 520)], 0), ProbeError::Data { .. }));
    assert!(matches!(fails(&[inquiry(0), ready()], 0), ProbeError::Command { .. }));
    assert!(
        matches!(fails(&[inquiry(0), ready()], 99), ProbeError::Command { .. }),
        "attentions without end"
    );
}
