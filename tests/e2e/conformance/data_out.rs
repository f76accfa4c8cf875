//! WRITE: data goes out as agreed, R2Ts are checked before guest memory is read, and only the target's well-formed word
//! makes a success.

use anyhow::ensure;
use vcp_tests::Result;
use vcp_tests::front::Op;
use vcp_tests::pattern;

use super::bed::{FAST, bed};

const LEN: usize = 48 << 10;
/// All data by R2T, in bursts of 8 KiB.
const BY_R2T: &str = "option initial-r2t yes
    option immediate-data no
    option max-burst 8192";

/// A WRITE whose first R2T is spoiled succeeds on a new session, and no data went out for the bad R2T (`bad-target`
/// notes every byte that does).
fn refused(rules: &str, violation: &str) -> Result<()> {
    let mut bed = bed(BY_R2T, &[])?;
    bed.target.script(rules)?;
    bed.writes(1, 0, LEN)?;
    if !violation.is_empty() {
        bed.noticed(violation)?;
    }
    bed.had_sessions(2)?;
    bed.finish()
}

/// Line 2, RFC 7143 4.2.5.3: an R2T with another LUN than its command.
#[test]
fn line_02_r2t_with_another_lun_is_refused() -> Result<()> {
    refused("write set r2t0 lun 0x0005000000000000", "another LUN")
}

/// Line 2, RFC 7143 4.2.5.3: an R2T for a READ, or for no task.
#[test]
fn line_02_r2t_for_another_task_is_refused() -> Result<()> {
    refused("write add r2t0 itt 0x10000", "does not exist")?;
    refused("write set r2t0 itt 0xffffffff", "does not exist")
}

/// Line 12, RFC 7143 7.9: a gap in R2TSN means a lost R2T.
#[test]
fn line_12_r2t_sn_gap_is_noticed() -> Result<()> {
    refused("write add r2t0 r2t-sn 1", "gap in the R2T numbers")?;
    refused("write drop r2t1", "gap in the R2T numbers")
}

/// Line 12, RFC 7143 7.9: an R2T that comes twice is answered once.
#[test]
fn line_12_duplicate_r2t_is_discarded() -> Result<()> {
    let mut bed = bed(BY_R2T, &[])?;
    bed.target.script("write repeat r2t0\nwrite repeat r2t2")?;
    bed.writes(1, 0, LEN)?;
    bed.noticed("an R2T whose number came before")?;
    bed.had_sessions(1)?;
    ensure!(bed.target.count("in", "write")? == 1);
    bed.finish()
}

/// Line 17, RFC 7143 11.8.4: an R2T of no bytes, beyond the data, over data already asked for, or longer than
/// MaxBurstLength.
#[test]
fn line_17_r2t_out_of_bounds_is_refused() -> Result<()> {
    refused("write set r2t0 length 0", "")?;
    refused("write set r2t0 length 8196", "longer than MaxBurstLength")?;
    refused("write set r2t0 length 0xffffffff", "beyond the end")?;
    refused("write set r2t3 offset 0xc000", "")?;
    refused("write set r2t0 offset 0xfffff000", "beyond the end")?;
    refused("write set r2t1 offset 0", "does not continue")?;
    refused("write set r2t0 ttt 0xffffffff", "")
}

/// Line 17, RFC 7143 11.8.4 and 4.2.5.2: each R2T within bounds is answered, with its tag and LUN, F on the last PDU.
#[test]
fn line_17_every_sound_r2t_is_answered() -> Result<()> {
    let mut bed = bed(BY_R2T, &[])?;
    // Odd sizes: bursts that are no multiple of a block or of a segment.
    bed.target.script("write#1 burst 5000\nwrite#2 burst 512\nwrite#3 burst 8192")?;
    for n in 1..=3 {
        bed.writes(n, 0, LEN)?;
    }
    let r2ts = bed.target.count("out", "R2t")?;
    ensure!(r2ts == LEN.div_ceil(5000) + LEN / 512 + LEN / 8192, "{r2ts} R2Ts");
    bed.had_sessions(1)?;
    bed.finish()
}

/// Lines 9 and 2: an R2T carries the next StatSN, whatever it says it does not count (RFC 7143 11.8.3).
#[test]
fn line_09_stat_sn_of_an_r2t_does_not_advance() -> Result<()> {
    let mut bed = bed(BY_R2T, &[])?;
    bed.target.script("write* set r2t0 stat-sn 0x12345678")?;
    for rule in ["write#2- add r2t1 stat-sn 77", "write#3- add r2t2 stat-sn -1"] {
        bed.target.script(rule)?;
    }
    for n in 0..4 {
        bed.writes(n, 0, LEN)?;
    }
    bed.had_sessions(1)?;
    bed.finish()
}

/// Line 11, RFC 7143 11.7.5: DataSN from 0 in each sequence; the judge of `bad-target` follows every number.
#[test]
fn line_11_data_sn_counts_from_zero_in_each_sequence() -> Result<()> {
    let mut bed = bed("option segment 1024\noption max-burst 4096\noption first-burst 2048", &[])?;
    bed.writes(1, 0, LEN)?;
    let numbers: Vec<u64> =
        bed.sent("data-out")?.iter().map(|pdu| pdu.field("data-sn")).collect::<Result<_>>()?;
    ensure!(numbers.iter().filter(|n| **n == 0).count() > 5, "DataSN: {numbers:?}");
    ensure!(numbers.iter().max() == Some(&3), "four segments in a burst, so DataSN ends at 3: {numbers:?}");
    bed.finish()
}

/// Line 13, RFC 7143 13.12, 13.13, 13.14: no segment above the target's MaxRecvDataSegmentLength, no sequence above
/// MaxBurstLength or FirstBurstLength.
#[test]
fn line_13_segments_and_bursts_stay_within_what_was_agreed() -> Result<()> {
    for (segment, first, burst) in
        [(512, 512, 512), (512, 4096, 4096), (4096, 1024, 12288), (65536, 65536, 65536)]
    {
        let mut bed = bed(
            &format!("option segment {segment}\noption first-burst {first}\noption max-burst {burst}"),
            &[],
        )?;
        bed.writes(1, 0, LEN)?;
        bed.writes(2, 512, 512)?;
        let longest = bed.sent("data-out")?.iter().chain(&bed.sent("write")?).map(|p| p.number(5, 3)).max();
        ensure!(longest <= Some(segment.min(burst)), "{longest:?} bytes in a PDU");
        bed.had_sessions(1)?;
        bed.finish()?;
    }
    Ok(())
}

/// Line 14, RFC 7143 11.3.1, 11.3.4: F=0 only if unsolicited Data-Out follows, F=1 if the immediate data is all, and
/// of longer data all of FirstBurstLength goes unasked, or only what fits the command PDU.
#[test]
fn line_14_final_bit_and_amount_of_unsolicited_data() -> Result<()> {
    let mut bed = bed("option segment 4096\noption first-burst 8192", &[])?;
    // Length of the write, immediate data, F, unsolicited Data-Out in bytes.
    for (len, immediate, last, more) in [
        (512, 512, 1, 0),
        (4096, 4096, 1, 0),
        (4608, 4096, 0, 512),
        (8192, 4096, 0, 4096),
        (8704, 4096, 0, 4096),
    ] {
        bed.target.forget()?;
        bed.writes(7, 0, len)?;
        let command = bed.sent("write")?.remove(0);
        ensure!(command.number(5, 3) == immediate, "{len}: {} immediate bytes", command.number(5, 3));
        ensure!(command.field("flags")? >> 7 == last, "{len}: flags {:#x}", command.field("flags")?);
        ensure!(command.number(20, 4) == len as u64, "{len}: expected length {}", command.number(20, 4));
        let outs = bed.sent("data-out")?;
        let unasked: u64 =
            outs.iter().filter(|p| p.number(20, 4) == 0xffff_ffff).map(|p| p.number(5, 3)).sum();
        ensure!(unasked == more, "{len}: {unasked} bytes of unsolicited Data-Out");
    }
    bed.finish()
}

/// Line 15, RFC 7143 4.2.5.2: the unsolicited data of a command comes before that of the next.
#[test]
fn line_15_unsolicited_data_goes_in_the_order_of_commands() -> Result<()> {
    let mut bed = bed("option segment 1024\noption first-burst 4096", &[])?;
    let len = 6144;
    for n in 0..24 {
        let offset = n * len as u64;
        bed.driver.submit(0, &Op::Write { offset, data: pattern::make(n, offset, len) })?;
    }
    for _ in 0..24 {
        ensure!(bed.driver.wait(0, super::bed::DEADLINE)?.result.is_ok());
    }
    // On the wire: behind each command its three unsolicited PDUs, before any other command's.
    let mut open: Option<(u64, u64)> = None;
    for pdu in bed.target.log()?.iter().filter(|e| e.way == "in" && matches!(&*e.label, "write" | "data-out"))
    {
        let (itt, len) = (pdu.field("itt")?, pdu.number(5, 3));
        match (pdu.label.as_str(), open) {
            ("write", None) => open = Some((itt, len)),
            ("write", Some(other)) => anyhow::bail!("command {itt:#x} within the data of {other:x?}"),
            (_, Some((task, sent))) if pdu.number(20, 4) == 0xffff_ffff => {
                ensure!(itt == task, "data of {itt:#x} within that of {task:#x}");
                open = (pdu.field("flags")? & 0x80 == 0).then_some((task, sent + len));
            }
            _ => {}
        }
    }
    for n in 0..24 {
        bed.reads(n, n * len as u64, len)?;
    }
    bed.finish()
}

/// Line 16, RFC 7143 13.11: the four cases of InitialR2T and ImmediateData.
#[test]
fn line_16_four_cases_of_unsolicited_data() -> Result<()> {
    for (initial_r2t, immediate, in_command, unasked) in
        [("no", "yes", 4096, 4096), ("no", "no", 0, 8192), ("yes", "yes", 4096, 0), ("yes", "no", 0, 0)]
    {
        let mut bed = bed(
            &format!(
                "option initial-r2t {initial_r2t}\noption immediate-data {immediate}
                 option segment 4096\noption first-burst 8192"
            ),
            &[],
        )?;
        bed.writes(1, 0, LEN)?;
        let command = bed.sent("write")?.remove(0);
        ensure!(
            command.number(5, 3) == in_command,
            "{initial_r2t}/{immediate}: {} bytes",
            command.number(5, 3)
        );
        let outs = bed.sent("data-out")?;
        let sum: u64 = outs.iter().filter(|p| p.number(20, 4) == 0xffff_ffff).map(|p| p.number(5, 3)).sum();
        ensure!(sum == unasked, "{initial_r2t}/{immediate}: {sum} bytes unasked");
        bed.finish()?;
    }
    Ok(())
}

/// Line 21, RFC 7143 11.4.3, and line 22: GOOD for a WRITE whose data was not fetched, or with a residual, is none.
#[test]
fn line_22_write_with_missing_bytes_is_no_success() -> Result<()> {
    for rules in ["write* early", "write* underflow 512"] {
        let mut bed = bed(BY_R2T, FAST)?;
        bed.target.script(rules)?;
        let answer = bed.try_write(1, 0, LEN)?;
        ensure!(answer.is_err(), "{rules}: answered as done\n{}", bed.story());
        let mut bed = super::bed::bed(BY_R2T, FAST)?;
        bed.target.script(&rules.replace('*', ""))?;
        bed.writes(1, 0, LEN)?;
        ensure!(bed.target.count("in", "write")? == 2, "{rules}: not repeated once");
        bed.finish()?;
    }
    Ok(())
}
