//! Cases of the UNH-IOL suite "iSCSI Initiator Full Feature Phase" by their numbers there, as far as no test of the
//! checklist is the same: commands, data, R2Ts. `docs/conformance-initiator.md` has the whole list.

use std::collections::HashSet;

use anyhow::{Context, ensure};
use vcp_tests::Result;
use vcp_tests::front::Op;
use vcp_tests::pattern;

use super::bed::{DEADLINE, FAST, bed, bed_of};

const LEN: usize = 4096;

/// FFP 3.2: a large window is used; every command in it has a number of its own (RFC 7143 4.2.2.1).
#[test]
fn ffp_3_2_large_window_is_used() -> Result<()> {
    let mut bed = bed("option window 200", &[])?;
    bed.prepare(1, LEN, "read#1-32 hang")?;
    for _ in 0..32 {
        bed.driver.submit(0, &Op::Read { offset: 0, len: LEN })?;
    }
    bed.target.wait("event", "hung", 32)?;
    let numbers: HashSet<u64> = bed.sent("read")?.iter().map(|read| read.number(24, 4)).collect();
    ensure!(numbers.len() == 32);
    bed.target.now("release")?;
    for _ in 0..32 {
        pattern::check(1, 0, &bed.driver.wait(0, DEADLINE)?.result?)?;
    }
    bed.had_sessions(1)?;
    bed.finish()
}

/// FFP 3.3: with a window of one, the next command waits for the answer to the one before (RFC 7143 4.2.2.1).
#[test]
fn ffp_3_3_window_of_one_serialises() -> Result<()> {
    let mut bed = bed("option window 1", &[])?;
    bed.prepare(1, LEN, "read window 0")?;
    for _ in 0..4 {
        bed.driver.submit(0, &Op::Read { offset: 0, len: LEN })?;
    }
    ensure!(bed.driver.wait(0, DEADLINE)?.result.is_ok());
    for n in 2..=4 {
        // Each opening lets one through.
        bed.target.now("window 1")?;
        bed.target.script("read window 0")?;
        bed.target.now("nop none")?;
        ensure!(bed.driver.wait(0, DEADLINE)?.result.is_ok());
        ensure!(bed.target.count("in", "read")? == n, "{} READs", bed.target.count("in", "read")?);
    }
    bed.target.now("window 8")?;
    bed.target.now("nop none")?;
    bed.finish()
}

/// FFP 10.1: status in the last Data-In, with S and F (RFC 7143 11.7.3).
#[test]
fn ffp_10_1_status_with_the_last_data_in() -> Result<()> {
    let mut bed = bed("option in-segment 1024", &[])?;
    bed.prepare(1, LEN, "")?;
    bed.target.forget()?;
    bed.reads(1, 0, LEN)?;
    let data_in = bed.target.seen("out", "DataIn")?;
    ensure!(data_in.len() == 4 && data_in[3].field("flags")? == 0x81, "{data_in:x?}");
    ensure!(bed.target.count("out", "ScsiResponse")? == 0);
    bed.finish()
}

/// FFP 11.4: Buffer Offset goes on where the PDU before ended, from one R2T to the next as well (RFC 7143 11.7.6).
#[test]
fn ffp_11_4_buffer_offset_is_continuous() -> Result<()> {
    let mut bed =
        bed("option segment 1024\noption max-burst 4096\noption first-burst 3072\noption max-r2t 1", &[])?;
    bed.writes(1, 0, 16384)?;
    let mut next = bed.sent("write")?.remove(0).number(5, 3);
    for out in bed.sent("data-out")? {
        ensure!(out.field("offset")? == next, "offset {} where {next} is next", out.field("offset")?);
        next += out.number(5, 3);
    }
    ensure!(next == 16384);
    bed.finish()
}

/// FFP 12.1: an R2T that one PDU can answer is answered by one (RFC 7143 11.8).
#[test]
fn ffp_12_1_r2t_answered_by_one_pdu() -> Result<()> {
    let mut bed = bed("option initial-r2t yes\noption immediate-data no", &[])?;
    bed.writes(1, 0, LEN)?;
    let (r2t, out) = (bed.target.seen("out", "R2t")?.remove(0), bed.sent("data-out")?);
    ensure!(out.len() == 1);
    ensure!(out[0].field("ttt")? == r2t.field("ttt")? && out[0].field("flags")? == 0x80);
    ensure!(out[0].field("offset")? == r2t.field("offset")? && out[0].number(5, 3) == r2t.field("length")?);
    ensure!(out[0].field("data-sn")? == 0 && out[0].field("lun")? == r2t.field("lun")?);
    bed.finish()
}

/// FFP 12.2: one that takes several PDUs: F on the last only, DataSN and offsets without gap (RFC 7143 11.8).
#[test]
fn ffp_12_2_r2t_answered_by_several_pdus() -> Result<()> {
    let mut bed = bed("option initial-r2t yes\noption immediate-data no\noption segment 1024", &[])?;
    bed.writes(1, 0, LEN)?;
    let out = bed.sent("data-out")?;
    ensure!(out.len() == 4);
    for (n, pdu) in out.iter().enumerate() {
        ensure!(pdu.field("data-sn")? == n as u64 && pdu.field("offset")? == n as u64 * 1024);
        ensure!((pdu.field("flags")? == 0x80) == (n == 3));
    }
    bed.finish()
}

/// FFP 12.4: R2Ts of several commands at once, each answered in full, those of one command in order (RFC 7143 11.8).
#[test]
fn ffp_12_4_r2ts_of_parallel_commands() -> Result<()> {
    let mut bed = bed("option initial-r2t yes\noption immediate-data no\noption max-burst 2048", &[])?;
    for n in 0..8 {
        let offset = n * 16384;
        bed.driver.submit(0, &Op::Write { offset, data: pattern::make(n, offset, 16384) })?;
    }
    for _ in 0..8 {
        ensure!(bed.driver.wait(0, DEADLINE)?.result.is_ok());
    }
    for n in 0..8 {
        bed.reads(n, n * 16384, 16384)?;
    }
    ensure!(bed.target.count("out", "R2t")? == 64);
    bed.finish()
}

/// FFP 16.1.1, 16.1.2: the fields of a SCSI Command (RFC 7143 11.3), with immediate data and without.
#[test]
fn ffp_16_1_fields_of_a_command() -> Result<()> {
    for (immediate, expected) in [("yes", LEN as u64), ("no", 0)] {
        let mut bed = bed(&format!("option immediate-data {immediate}"), &[])?;
        bed.writes(1, 8192, LEN)?;
        let write = bed.sent("write")?.remove(0);
        let header = write.header.context("no header")?;
        ensure!(header[0] == 0x01, "opcode and I: {:#x}", header[0]);
        // F by the data that follows, R clear, W set, attribute simple.
        ensure!(header[1] & 0x7f == 0x21, "flags {:#x}", header[1]);
        ensure!(header[2..5] == [0, 0, 0], "reserved bytes and TotalAHSLength: {:?}", &header[2..5]);
        ensure!(write.number(5, 3) == expected, "DataSegmentLength {}", write.number(5, 3));
        ensure!(write.number(20, 4) == LEN as u64, "expected data transfer length {}", write.number(20, 4));
        // WRITE(10) of eight blocks at block 16.
        ensure!(
            header[32..42] == [0x2a, 0, 0, 0, 0, 16, 0, 0, 8, 0] && header[42..48] == [0; 6],
            "{header:02x?}"
        );
        let read = bed.sent("read")?.remove(0);
        let header = read.header.context("no header")?;
        ensure!(header[1] == 0xc1 && read.number(5, 3) == 0, "READ: {:02x?}", &header[..8]);
        bed.finish()?;
    }
    Ok(())
}

/// FFP 16.4.3, 16.4.4: ABORTED COMMAND with "unexpected unsolicited data" or "not enough unsolicited data" (RFC 7143
/// 11.4.7.2): the command is tried again.
#[test]
fn ffp_16_4_errors_of_unsolicited_data_are_tried_again() -> Result<()> {
    for code in ["0x0c0c", "0x0c0d", "0x4705"] {
        let mut bed = bed("", &[])?;
        bed.target.script(&format!("write sense 11 {code}\nwrite#2 refuse-early 11 {code}"))?;
        bed.writes(1, 0, 32768)?;
        ensure!(bed.target.count("in", "write")? == 3, "{code}");
        bed.had_sessions(1)?;
        bed.finish()?;
    }
    Ok(())
}

/// FFP 16.6: the expected data transfer length is that of the CDB (RFC 7143 11.3.4).
#[test]
fn ffp_16_6_expected_length_fits_the_cdb() -> Result<()> {
    let mut bed = bed("option thin yes", &[])?;
    for len in [512, 1536, 4096, 65536, 1 << 19] {
        bed.writes(1, 0, len)?;
    }
    bed.driver.discard(0, 4096)?;
    bed.driver.write_zeroes(0, 8192, false)?;
    bed.driver.flush()?;
    for pdu in bed.sent("read")?.iter().chain(&bed.sent("write")?) {
        ensure!(pdu.number(20, 4) == 512 * pdu.number(39, 2), "{:02x?}", pdu.header);
    }
    ensure!(bed.sent("unmap")?[0].number(20, 4) == 24 && bed.sent("unmap")?[0].number(39, 2) == 24);
    ensure!(bed.sent("same")?[0].number(20, 4) == 512, "one block of zeroes");
    ensure!(bed.sent("sync")?[0].number(20, 4) == 0);
    bed.finish()
}

/// FFP 19.2: task management carries the LUN of the command, in its addressing (RFC 7143 11.5.3).
#[test]
fn ffp_19_2_lun_of_task_management() -> Result<()> {
    let target = vcp_tests::bad_target::BadTarget::start("option lun 300")?;
    let mut bed = bed_of(target, 300, FAST)?;
    bed.prepare(1, LEN, "read hang\ntmf#1 respond 5")?;
    bed.reads(1, 0, LEN)?;
    for tmf in bed.sent("tmf")? {
        let header = tmf.header.context("no header")?;
        ensure!(header[8..16] == [0x41, 0x2c, 0, 0, 0, 0, 0, 0], "LUN {:02x?}", &header[8..16]);
    }
    bed.finish()
}
