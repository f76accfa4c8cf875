use proptest::prelude::*;

use super::*;
use crate::storage::{FileStorage, MemoryStorage};
use iscsi::scsi::{Cdb, inquiry::Inquiry, unmap, vpd};

const BLOCKS: u64 = 2048;

fn unit(options: Options) -> LogicalUnit {
    let len = BLOCKS * u64::from(options.block_bytes);
    LogicalUnit::new(Box::new(MemoryStorage::new(len)), Identity::derive("iqn.t", 0, "mem"), options)
}

/// Runs a command to its end.
fn run(lu: &mut LogicalUnit, cdb: &CdbBytes, data: &[u8]) -> Result<Vec<u8>, Sense> {
    let (mut reply, mut staged) = (Vec::new(), Vec::new());
    match lu.start(cdb, data.len() as u32, &mut reply) {
        Step::Done(_) => Ok(Vec::new()),
        Step::In { len } => {
            let data: Vec<u8> = reply.iter().flat_map(|extent| extent.as_slice().to_vec()).collect();
            assert_eq!(data.len(), len as usize);
            Ok(data)
        }
        Step::Failed(sense) => Err(sense),
        Step::Out(transfer) => {
            // In pieces of an odd size, as they may come.
            let data = &data[..data.len().min(transfer.len as usize)];
            for (index, piece) in data.chunks(1000).enumerate() {
                lu.place(&transfer, index as u32 * 1000, piece, &mut staged)?;
            }
            lu.finish(cdb, &transfer, &staged).map(|()| Vec::new())
        }
    }
}

fn code(result: Result<Vec<u8>, Sense>) -> u16 {
    result.expect_err("the command should fail").code
}

#[test]
fn data_pages_are_what_an_initiator_reads() {
    let mut lu = unit(Options::default());
    let inquiry = Inquiry::parse(&run(&mut lu, &Cdb::inquiry(255).0, &[]).unwrap()).unwrap();
    assert!(inquiry.is_disk());
    let pages = run(&mut lu, &Cdb::inquiry_vpd(vpd::SUPPORTED_PAGES, 255).0, &[]).unwrap();
    for &page in vpd::supported_pages(&pages).unwrap() {
        let data = run(&mut lu, &Cdb::inquiry_vpd(page, 255).0, &[]).unwrap();
        assert_eq!(data[1], page);
        assert_eq!(data.len(), 4 + usize::from(be16(&data, 2)));
        // Cut to the allocation length, with the length field left as it is (SPC-4 4.2.5.6).
        assert_eq!(run(&mut lu, &Cdb::inquiry_vpd(page, 6).0, &[]).unwrap(), data[..data.len().min(6)]);
    }
    assert_eq!(code(run(&mut lu, &Cdb::inquiry_vpd(0xC0, 255).0, &[])), asc::INVALID_FIELD_IN_CDB);
    let serial = run(&mut lu, &Cdb::inquiry_vpd(vpd::UNIT_SERIAL_NUMBER, 255).0, &[]).unwrap();
    assert_eq!(vpd::serial_number(&serial).unwrap(), lu.identity().serial);
    let limits = run(&mut lu, &Cdb::inquiry_vpd(vpd::BLOCK_LIMITS, 255).0, &[]).unwrap();
    vpd::BlockLimits::parse(&limits).unwrap();
}

#[test]
fn every_operation_that_is_reported_is_carried_out_and_no_other() {
    let mut lu = unit(Options::default());
    // These are the device's, above the logical unit.
    let elsewhere = [op::REQUEST_SENSE, op::RESERVE_6, op::RELEASE_6, op::REPORT_LUNS];
    for opcode in 0..=255u8 {
        let mut cdb = [0; 16];
        cdb[0] = opcode;
        let unknown = run(&mut lu, &cdb, &[]).is_err_and(|sense| sense.code == asc::INVALID_OPCODE);
        assert_eq!(unknown, !opcodes::is_known(opcode) || elsewhere.contains(&opcode), "{opcode:#04x}");
    }
    for support in opcodes::SUPPORTED {
        assert_eq!(support.usage[0], support.opcode);
        let len = match support.opcode >> 5 {
            0 => 6,
            1 | 2 => 10,
            4 => 16,
            _ => 12,
        };
        assert_eq!(support.usage.len(), len, "{:#04x}", support.opcode);
    }
}

#[test]
fn ranges_beyond_the_end_are_refused() {
    let mut lu = unit(Options::default());
    for (lba, blocks) in [(BLOCKS, 1), (BLOCKS - 1, 2), (u64::MAX, 1), (u64::MAX, u32::MAX)] {
        for cdb in
            [Cdb::read(lba, blocks), Cdb::write(lba, blocks, false), Cdb::write_same_16(lba, blocks, true)]
        {
            assert_eq!(code(run(&mut lu, &cdb.0, &[0; 512])), asc::LBA_OUT_OF_RANGE);
        }
    }
    let list = unmap::one_descriptor(BLOCKS - 1, 2);
    assert_eq!(code(run(&mut lu, &Cdb::unmap(24).0, &list)), asc::LBA_OUT_OF_RANGE);
}

#[test]
fn parameter_lists_that_are_wrong() {
    let mut lu = unit(Options::default());
    assert_eq!(code(run(&mut lu, &Cdb::unmap(7).0, &[0; 7])), asc::PARAMETER_LIST_LENGTH);
    assert_eq!(code(run(&mut lu, &Cdb::unmap(24).0, &[0; 8])), asc::PARAMETER_LIST_LENGTH);
    let mut select = [0; 16];
    (select[0], select[1]) = (op::MODE_SELECT_6, 0x10);
    for list in [
        &[0u8, 0, 0][..],
        &[0, 0, 0, 4, 0, 0, 0, 0],
        &[0, 0, 0, 0, 0x08],
        &[0, 0, 0, 0, 0x3E, 0],
        &[0, 0, 0, 0, 8, 200, 0],
    ] {
        select[4] = list.len() as u8;
        assert!(run(&mut lu, &select, list).is_err(), "{list:?}");
    }
}

#[test]
fn write_protection() {
    let mut lu = unit(Options { read_only: true, ..Options::default() });
    for cdb in [Cdb::write(0, 1, false), Cdb::write_same_16(0, 1, true), Cdb::unmap(24)] {
        assert_eq!(code(run(&mut lu, &cdb.0, &[0; 512])), asc::WRITE_PROTECTED);
    }
    assert_eq!(run(&mut lu, &Cdb::read(0, 1).0, &[]).unwrap(), [0; 512]);
    assert_eq!(run(&mut lu, &Cdb::mode_sense_6(0x3F, 255).0, &[]).unwrap()[2] & 0x80, 0x80);
}

#[test]
fn mode_select_turns_the_write_cache_off() {
    let mut lu = unit(Options::default());
    let sense = |lu: &mut LogicalUnit| {
        let data = run(lu, &Cdb::mode_sense_6(iscsi::scsi::mode::CACHING_PAGE, 255).0, &[]).unwrap();
        data[usize::from(data[3]) + 4..].to_vec()
    };
    let mut page = sense(&mut lu);
    assert_eq!(page[2] & 0x04, 0x04);
    page[2] &= !0x04;
    let list = [&[0; 4][..], &page].concat();
    let mut select = [0; 16];
    (select[0], select[1], select[4]) = (op::MODE_SELECT_6, 0x10, list.len() as u8);
    run(&mut lu, &select, &list).unwrap();
    assert_eq!(sense(&mut lu), page);
    // What cannot be changed is refused and changes nothing.
    let mut bad = list.clone();
    bad[4 + 2] |= 0x05;
    assert_eq!(code(run(&mut lu, &select, &bad)), asc::INVALID_FIELD_IN_PARAMETERS);
    assert_eq!(sense(&mut lu), page);
    lu.reset();
    assert_eq!(sense(&mut lu)[2] & 0x04, 0x04);
}

#[test]
fn compare_and_write_is_all_or_nothing() {
    let mut lu = unit(Options::default());
    let mut cdb = [0; 16];
    (cdb[0], cdb[13]) = (op::COMPARE_AND_WRITE, 1);
    let data = |expected: u8, new: u8| [[expected; 512], [new; 512]].concat();
    run(&mut lu, &cdb, &data(0, 7)).unwrap();
    let sense = run(&mut lu, &cdb, &data(0, 9)).unwrap_err();
    assert_eq!((sense.key, sense.information), (SenseKey::Miscompare, Some(0)));
    assert_eq!(run(&mut lu, &Cdb::read(0, 1).0, &[]).unwrap(), [7; 512]);
}

#[test]
fn data_handed_out_does_not_change_afterwards() {
    let mut lu = unit(Options::default());
    run(&mut lu, &Cdb::write(0, 1, false).0, &[1; 512]).unwrap();
    let mut reply = Vec::new();
    lu.start(&Cdb::read(0, 1).0, 0, &mut reply);
    run(&mut lu, &Cdb::write(0, 1, false).0, &[2; 512]).unwrap();
    assert_eq!(reply[0].as_slice(), [1; 512]);
    assert_eq!(run(&mut lu, &Cdb::read(0, 1).0, &[]).unwrap(), [2; 512]);
}

#[test]
fn unmapping_gives_memory_back() {
    let mut memory = MemoryStorage::new(4 << 40);
    memory.write(3 << 40, &[1; 300_000]).unwrap();
    assert!(memory.allocated_bytes() > 300_000);
    assert!(memory.mapped(3 << 40).unwrap().0);
    memory.unmap(0, 4 << 40).unwrap();
    assert_eq!(memory.allocated_bytes(), 0);
    assert!(!memory.mapped(3 << 40).unwrap().0);
}

/// What a scenario does.
#[derive(Clone, Debug)]
enum Op {
    Write(u64, u32, u8),
    WriteSame(u64, u32, u8, bool),
    Unmap(u64, u32),
    Flush,
    Read(u64, u32),
}

fn op_strategy() -> impl Strategy<Value = Op> {
    let range = || (0..BLOCKS, 1u32..300).prop_map(|(lba, n)| (lba, n.min((BLOCKS - lba) as u32)));
    prop_oneof![
        (range(), any::<u8>()).prop_map(|((lba, n), fill)| Op::Write(lba, n, fill)),
        (range(), 0u8..3, any::<bool>())
            .prop_map(|((lba, n), fill, unmap)| Op::WriteSame(lba, n, fill, unmap)),
        range().prop_map(|(lba, n)| Op::Unmap(lba, n)),
        Just(Op::Flush),
        range().prop_map(|(lba, n)| Op::Read(lba, n)),
    ]
}

/// Any sequence of commands leaves the medium as an array of bytes would be.
fn behaves_like_an_array(lu: &mut LogicalUnit, ops: &[Op]) {
    let mut model = vec![0u8; (BLOCKS * 512) as usize];
    let bytes = |lba: u64, n: u32| (lba * 512) as usize..(lba * 512) as usize + n as usize * 512;
    for op in ops {
        match *op {
            Op::Write(lba, n, fill) => {
                let data: Vec<u8> = (0..n as usize * 512).map(|i| fill.wrapping_add(i as u8)).collect();
                run(lu, &Cdb::write(lba, n, fill & 1 != 0).0, &data).unwrap();
                model[bytes(lba, n)].copy_from_slice(&data);
            }
            Op::WriteSame(lba, n, fill, unmap) => {
                let mut cdb = Cdb::write_same_16(lba, n, unmap).0;
                cdb[1] &= !0x01;
                run(lu, &cdb, &[fill; 512]).unwrap();
                model[bytes(lba, n)].fill(fill);
            }
            Op::Unmap(lba, n) => {
                run(lu, &Cdb::unmap(24).0, &unmap::one_descriptor(lba, n)).unwrap();
                model[bytes(lba, n)].fill(0);
            }
            Op::Flush => {
                run(lu, &Cdb::synchronize_cache_10().0, &[]).unwrap();
            }
            Op::Read(lba, n) => {
                assert_eq!(run(lu, &Cdb::read(lba, n).0, &[]).unwrap(), model[bytes(lba, n)]);
            }
        }
    }
    assert_eq!(run(lu, &Cdb::read(0, BLOCKS as u32).0, &[]).unwrap(), model);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn memory_behaves_like_an_array(ops in proptest::collection::vec(op_strategy(), 0..40)) {
        behaves_like_an_array(&mut unit(Options::default()), &ops);
    }

    #[test]
    fn file_behaves_like_an_array(ops in proptest::collection::vec(op_strategy(), 0..20)) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(BLOCKS * 512).unwrap();
        let storage = FileStorage::open(file.path(), false).unwrap();
        let identity = Identity::derive("iqn.t", 0, "file");
        let mut lu = LogicalUnit::new(Box::new(storage), identity, Options::default());
        behaves_like_an_array(&mut lu, &ops);
    }

    /// No CDB and no data makes it panic, and what it hands out is never more than it says.
    #[test]
    fn any_cdb_is_answered(
        known in any::<proptest::sample::Index>(),
        tail in any::<[u8; 15]>(),
        quiet in any::<u16>(),
        data in proptest::collection::vec(any::<u8>(), 0..2048),
        block_bytes in prop_oneof![Just(512u32), Just(4096)],
    ) {
        let mut lu = unit(Options { block_bytes, ..Options::default() });
        let mut cdb = [0; 16];
        cdb[0] = opcodes::SUPPORTED[known.index(opcodes::SUPPORTED.len())].opcode;
        // Mostly zeroes: such CDBs get further.
        for (at, byte) in tail.iter().enumerate() {
            if quiet & 1 << at != 0 {
                cdb[at + 1] = *byte;
            }
        }
        let _ = run(&mut lu, &cdb, &data);
    }
}
