//! READ: each byte is placed exactly once, or the guest is not told that it succeeded.

use anyhow::ensure;
use vcp_tests::Result;

use super::bed::bed;

const LEN: usize = 32 << 10;

/// A READ whose first answer is spoiled by the rules must be right in the end; `violation` must have been counted, and
/// the session count tells whether the session survived.
fn cured(rules: &str, violation: &str, sessions: usize) -> Result<()> {
    let mut bed = bed("option in-segment 4096", &[])?;
    bed.prepare(1, LEN, rules)?;
    bed.reads(1, 0, LEN)?;
    if !violation.is_empty() {
        bed.noticed(violation)?;
    }
    bed.had_sessions(sessions)?;
    ensure!(bed.target.count("in", "read")? == 2, "the READ was not repeated once:\n{}", bed.story());
    bed.finish()
}

/// A READ whose answers are all spoiled must fail, and nothing else.
fn fails(rules: &str) -> Result<()> {
    let mut bed = bed("option in-segment 4096", &[])?;
    bed.prepare(1, LEN, rules)?;
    let answer = bed.try_read(0, LEN)?;
    ensure!(answer.is_err(), "a spoiled READ was answered as done\n{}", bed.story());
    let tries = bed.target.count("in", "read")?;
    ensure!((2..=5).contains(&tries), "{tries} tries");
    Ok(())
}

/// Line 12, RFC 7143 7.9: a gap in DataSN means lost data.
#[test]
fn line_12_data_sn_gap_is_noticed() -> Result<()> {
    cured("read drop data3", "Data-In numbers", 1)?;
    cured("read add data2 data-sn 1", "Data-In numbers", 1)
}

/// Line 12, RFC 7143 7.9: a Data-In whose number came before is dropped, and the rest counts.
#[test]
fn line_12_duplicate_data_in_is_discarded() -> Result<()> {
    let mut bed = bed("option in-segment 4096", &[])?;
    bed.prepare(1, LEN, "read repeat data2\nread repeat data7")?;
    bed.reads(1, 0, LEN)?;
    bed.noticed("came before")?;
    ensure!(bed.target.count("in", "read")? == 1, "a duplicate cost a repetition");
    bed.had_sessions(1)?;
    bed.finish()
}

/// Line 12, RFC 7143 11.4.8: ExpDataSN counts more PDUs than came.
#[test]
fn line_12_exp_data_sn_mismatch_is_noticed() -> Result<()> {
    cured("read apart\nread add status exp-data-sn 1", "response counts", 1)
}

/// Line 18, RFC 7143 11.7.6: offsets increase, without gap or overlap.
#[test]
fn line_18_offsets_out_of_order_are_noticed() -> Result<()> {
    cured("read add data1 offset 512", "continue", 1)?;
    cured("read add data1 offset -512", "continue", 1)?;
    cured("read swap data1", "", 1)?;
    cured("read cut data1 512", "continue", 1)
}

/// Line 18, RFC 7143 11.7.6: nothing is placed outside of the command's buffer.
#[test]
fn line_18_data_beyond_the_buffer_is_not_placed() -> Result<()> {
    for offset in ["0x8000", "0xfffffffc", "0x7ffe"] {
        cured(&format!("read set data7 offset {offset}"), "", 1)?;
    }
    Ok(())
}

/// Line 19, RFC 7143 11.7.7: a Data-In without data is accepted.
#[test]
fn line_19_empty_data_in_is_accepted() -> Result<()> {
    let mut bed = bed("option in-segment 4096", &[])?;
    bed.prepare(1, LEN, "read* empty")?;
    bed.reads(1, 0, LEN)?;
    ensure!(bed.target.count("in", "read")? == 1, "an empty Data-In cost a repetition");
    bed.finish()
}

/// Line 20, RFC 7143 11.7.2: the A bit is ignored at error recovery level 0.
#[test]
fn line_20_acknowledge_bit_is_ignored() -> Result<()> {
    let mut bed = bed("option in-segment 4096", &[])?;
    bed.prepare(1, LEN, "read* or data3 flags 0x40\nread* set data3 ttt 9\nread* or status flags 0x40")?;
    bed.reads(1, 0, LEN)?;
    ensure!(bed.target.count("in", "read")? == 1, "the A bit cost a repetition");
    bed.had_sessions(1)?;
    bed.finish()
}

/// Line 22, RFC 7143 11.4.5.1: an honest residual makes a READ short, and short is no success.
#[test]
fn line_22_short_read_is_no_success() -> Result<()> {
    fails("read* short 512")?;
    fails("read* missing 512")?;
    fails("read* short 512\nread* apart")?;
    fails("read* missing 512\nread* apart")?;
    cured("read short 2048", "bytes are missing", 1)
}

/// Line 22, RFC 7143 11.4.5.1: a residual that contradicts the bytes is no answer.
#[test]
fn line_22_residual_against_the_bytes_is_no_success() -> Result<()> {
    cured("read underflow 1024", "residual", 1)?;
    cured("read underflow 0x80000000", "residual", 1)
}

/// Line 22, RFC 7143 11.4.5.1: an overflow leaves the expected bytes whole.
#[test]
fn line_22_overflow_leaves_the_data_whole() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "read overflow 4096")?;
    bed.reads(1, 0, LEN)?;
    ensure!(bed.target.count("in", "read")? == 1);
    bed.finish()
}

/// Line 22, RFC 7143 11.4.5: both residual bits at once are a format error.
#[test]
fn line_22_both_residual_bits_end_the_session() -> Result<()> {
    cured("read or status flags 0x06", "", 2)
}

/// Line 23, RFC 7143 11.7.3: status needs F; sense data never comes with Data-In.
#[test]
fn line_23_status_in_data_in_needs_the_final_bit() -> Result<()> {
    cured("read set status flags 0x01", "", 2)?;
    cured("read set status scsi-status 2", "", 1)
}

/// Line 2, RFC 7143 4.2.5.3: data for a command that has none in this direction, or for none at all.
#[test]
fn line_02_data_for_another_task_is_refused() -> Result<()> {
    cured("read add data3 itt 1", "does not exist", 2)?;
    cured("read first stray", "does not exist", 2)?;
    cured("read set data3 itt 0xffffffff", "does not exist", 2)
}

/// Line 13, RFC 7143 13.12: a segment longer than we declared to take ends the session before a byte is placed.
#[test]
fn line_13_segment_longer_than_declared_is_refused() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "read set data0 dsl 0x100004")?;
    bed.reads(1, 0, LEN)?;
    bed.had_sessions(2)?;
    bed.finish()
}
