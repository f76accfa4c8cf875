//! CmdSN, StatSN, the command window, task tags.

use std::collections::HashSet;

use anyhow::{Context, ensure};
use vcp_tests::Result;
use vcp_tests::bad_target::Entry;
use vcp_tests::front::Op;
use vcp_tests::load::Load;

use super::bed::{Bed, DEADLINE, FAST, bed};

/// A verifying load with `count` requests, 16 at once.
fn load(bed: &mut Bed, count: usize) -> Result<()> {
    let mut load = Load::new(1, 256);
    load.run(&mut bed.driver, 0, 16, count, |_| Ok(())).with_context(|| bed.story())
}

/// All PDUs of ours but Data-Out, of full feature phase: they have a CmdSN.
fn numbered(log: &[Entry]) -> Vec<&Entry> {
    log.iter().filter(|e| e.way == "in" && e.label != "login" && e.label != "data-out").collect()
}

fn immediate(pdu: &Entry) -> bool {
    pdu.number(0, 1) & 0x40 != 0
}

/// Line 1, RFC 7143 11.2.1.8: a tag names one live task in the session, and is never 0xffffffff.
#[test]
fn line_01_task_tags_are_unique_among_live_tasks() -> Result<()> {
    let mut bed = bed("", &[])?;
    load(&mut bed, 600)?;
    let mut live = HashSet::new();
    for pdu in bed.target.log()? {
        let Some(header) = pdu.header else { continue };
        let itt = u32::from_be_bytes([header[16], header[17], header[18], header[19]]);
        let opcode = header[0] & 0x3f;
        if pdu.way == "in" && opcode == 0x01 {
            ensure!(itt != u32::MAX, "the reserved tag");
            ensure!(live.insert(itt), "tag {itt:#x} is used while its task lives");
        } else if pdu.way == "out" && (opcode == 0x21 || (opcode == 0x25 && header[1] & 1 != 0)) {
            live.remove(&itt);
        }
    }
    bed.finish()
}

/// Lines 3 and 4, RFC 7143 4.2.2.1: CmdSN goes up by one with each command that is not immediate, in the order of
/// sending; immediate PDUs carry the current one and do not advance it.
#[test]
fn line_03_line_04_cmd_sn_counts_commands_in_order() -> Result<()> {
    let mut bed = bed("", &["--keepalive-ms", "300"])?;
    load(&mut bed, 400)?;
    bed.target.wait("in", "nop-out", 2)?;
    load(&mut bed, 100)?;
    let log = bed.target.log()?;
    let mut next: Option<u32> = None;
    for pdu in numbered(&log) {
        let cmd_sn = pdu.number(24, 4) as u32;
        ensure!(next.is_none_or(|next| next == cmd_sn), "{}: CmdSN {cmd_sn}, not {next:?}", pdu.label);
        next = Some(if immediate(pdu) { cmd_sn } else { cmd_sn.wrapping_add(1) });
    }
    bed.finish()
}

/// Line 5, RFC 7143 4.2.2.1: nothing above MaxCmdSN, but immediate PDUs.
#[test]
fn line_05_nothing_is_sent_above_max_cmd_sn() -> Result<()> {
    for window in [1, 2, 5] {
        let mut bed = bed(&format!("option window {window}"), &[])?;
        load(&mut bed, 200)?;
        bed.had_sessions(1)?;
        bed.finish()?;
    }
    Ok(())
}

/// Line 5, RFC 7143 4.2.2.1: a closed window holds commands back and pings not; it is opened by any PDU.
#[test]
fn line_05_closed_window_holds_commands_but_no_pings() -> Result<()> {
    let mut bed = bed("option window 1", &["--keepalive-ms", "300"])?;
    bed.prepare(1, 4096, "read window 0")?;
    bed.reads(1, 0, 4096)?;
    bed.target.forget()?;
    bed.driver.submit(0, &Op::Read { offset: 0, len: 4096 })?;
    bed.target.wait("in", "nop-out", 3)?;
    ensure!(bed.target.count("in", "read")? == 0, "a READ went through a closed window");
    bed.target.now("window 8")?;
    bed.target.now("nop none")?;
    ensure!(bed.driver.wait(0, DEADLINE)?.result.is_ok());
    bed.finish()
}

/// Line 6, RFC 7143 4.2.2.1: a MaxCmdSN that goes back does not count, and one below ExpCmdSN - 1 makes both void.
#[test]
fn line_06_window_never_shrinks_and_contradictions_are_ignored() -> Result<()> {
    let mut bed = bed(
        "read#3-40 add status max-cmd-sn -20
         write#3-40 add status exp-cmd-sn 100
         write#41-80 add status max-cmd-sn -1000",
        // Where no answer has opened the window, the one to a ping does.
        &["--keepalive-ms", "300"],
    )?;
    load(&mut bed, 400)?;
    bed.had_sessions(1)?;
    bed.finish()
}

/// Line 7, RFC 7143 11.12.8: all PDUs of the leading login and the first command have the same CmdSN.
#[test]
fn line_07_login_and_first_command_share_cmd_sn() -> Result<()> {
    let mut bed = bed("", &[])?;
    for session in 0..2 {
        let log = bed.target.log()?;
        let of_session: Vec<&Entry> = log.iter().filter(|e| e.way == "in" && e.conn == session).collect();
        let logins: Vec<_> =
            of_session.iter().filter(|e| e.label == "login").map(|e| e.number(24, 4)).collect();
        let first = of_session.iter().find(|e| e.label != "login").context("no command")?;
        ensure!(
            logins.len() >= 2 && logins.iter().all(|n| *n == first.number(24, 4)),
            "{logins:?} {first:?}"
        );
        bed.target.now("close")?;
        bed.target.wait("event", "full-feature", session + 2)?;
        bed.writes(1, 0, 4096)?;
    }
    bed.finish()
}

/// Line 8, RFC 7143 4.2.2.2: ExpStatSN acknowledges the last status.
#[test]
fn line_08_exp_stat_sn_follows_the_last_status() -> Result<()> {
    let mut bed = bed("option apart yes", &[])?;
    for n in 0..20 {
        bed.writes(n, 0, 4096)?;
    }
    let mut expected = None;
    for pdu in bed.target.log()? {
        let Some(header) = &pdu.header else { continue };
        let takes = matches!(header[0] & 0x3f, 0x21 | 0x20 | 0x22 | 0x32)
            || header[0] & 0x3f == 0x25 && header[1] & 1 != 0;
        match pdu.way.as_str() {
            "out" if takes => expected = Some((pdu.field("stat-sn")? as u32).wrapping_add(1)),
            // One request at a time: by the next command the status was read.
            "in" if pdu.label == "write" || pdu.label == "read" => {
                let got = pdu.number(28, 4) as u32;
                ensure!(
                    expected.is_none_or(|e| e == got),
                    "{}: ExpStatSN {got}, not {expected:?}",
                    pdu.label
                );
            }
            _ => {}
        }
    }
    bed.finish()
}

/// Line 8, RFC 7143 4.2.2.2 and 7.9: a jump of StatSN means that a status was lost; the session starts over, and
/// nothing is told to the guest that is not true.
#[test]
fn line_08_stat_sn_jump_leads_to_recovery() -> Result<()> {
    for rules in
        ["read add status stat-sn 5", "read add status stat-sn -1", "read add status stat-sn 0x80000000"]
    {
        let mut bed = bed("", &[])?;
        bed.prepare(1, 4096, rules)?;
        bed.reads(1, 0, 4096)?;
        bed.noticed("status numbers")?;
        bed.had_sessions(2)?;
        bed.finish()?;
    }
    Ok(())
}

/// Line 9, RFC 7143 11.7.3 and 11.19.2: StatSN of a Data-In without S, and of a NOP-In that asks or only tells, does not
/// count.
#[test]
fn line_09_stat_sn_counts_only_where_it_is_valid() -> Result<()> {
    let mut bed = bed("option in-segment 1024", &["--keepalive-ms", "300"])?;
    bed.prepare(
        1,
        4096,
        "read* set data0 stat-sn 0x55555555\nread* first nop none\nread* first nop 0x77\nping* first nop none",
    )?;
    for _ in 0..10 {
        bed.reads(1, 0, 4096)?;
    }
    bed.target.wait("in", "nop-out", 12)?;
    bed.had_sessions(1)?;
    bed.finish()
}

/// Line 33, RFC 7143 7.2.1: a command is never sent again under its old number; repetitions are new commands.
#[test]
fn line_33_repetitions_are_new_commands() -> Result<()> {
    let mut bed = bed("", FAST)?;
    bed.prepare(1, 4096, "read#1 status 8\nread#2 response 1\nread#3 sense 6 0x2900\nread#4 missing 512")?;
    bed.reads(1, 0, 4096)?;
    let reads = bed.sent("read")?;
    ensure!(reads.len() == 5, "{} READs", reads.len());
    let (mut tags, mut numbers) = (HashSet::new(), HashSet::new());
    for read in &reads {
        ensure!(tags.insert(read.field("itt")?), "a tag came again");
        ensure!(numbers.insert(read.number(24, 4)), "a CmdSN came again");
    }
    bed.had_sessions(1)?;
    bed.finish()
}
