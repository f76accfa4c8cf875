//! NOP, Asynchronous Message, Reject, task management, logout.

use anyhow::{Context, ensure};
use vcp_tests::Result;
use vcp_tests::front::Op;
use vcp_tests::pattern;

use super::bed::{Bed, DEADLINE, FAST, bed, each};

const LEN: usize = 4096;

/// A READ whose answer is spoiled so that only a new session helps; then it is right.
fn starts_over(rules: &str, violation: &str) -> Result<()> {
    let mut bed = bed("", FAST)?;
    bed.prepare(1, LEN, rules)?;
    bed.reads(1, 0, LEN)?;
    if !violation.is_empty() {
        bed.noticed(violation)?;
    }
    bed.had_sessions(2)?;
    bed.finish()
}

/// Line 24, RFC 7143 7.7: CHECK CONDITION without sense, a NOP-In with both tags, and other headers that cannot be.
#[test]
fn line_24_format_errors_end_the_session() -> Result<()> {
    starts_over("read status 2", "")?;
    starts_over("read first nop-both", "")?;
    starts_over("read set data0 opcode 0x3e", "no place")?;
    starts_over("read set data0 opcode 0x23", "no place")?;
    starts_over("read set data0 opcode 0x01", "no place")
}

/// Line 25, RFC 7143 11.4.7.1: SenseLength is at most DataSegmentLength - 2.
#[test]
fn line_25_sense_longer_than_its_segment_ends_the_session() -> Result<()> {
    starts_over("read sense 3 0x1100\nread sense-length 19", "sense data longer")?;
    starts_over("read sense 3 0x1100\nread sense-length 0xffff", "sense data longer")
}

/// Lines 26 and 27, RFC 7143 11.18 and 11.19: every ping of the target is answered: its tag and LUN, no task tag,
/// immediate; also many at once, and under load.
#[test]
fn line_26_line_27_pings_of_the_target_are_all_answered() -> Result<()> {
    let mut bed = bed("option lun 7", &[]).or_else(|_| lun_7())?;
    let pings: String = (1..=40).map(|ttt| format!("read last nop {ttt}\n")).collect();
    bed.prepare(1, LEN, &pings)?;
    bed.reads(1, 0, LEN)?;
    bed.target.wait("in", "nop-out", 40)?;
    let answers = bed.sent("nop-out")?;
    for (n, answer) in answers.iter().enumerate() {
        let header = answer.header.context("no header")?;
        ensure!(header[0] == 0x40, "not an immediate NOP-Out: {:#x}", header[0]);
        ensure!(answer.field("itt")? == 0xffff_ffff && answer.field("ttt")? == n as u64 + 1, "{header:02x?}");
        ensure!(header[8..16] == [0, 7, 0, 0, 0, 0, 0, 0], "LUN {:02x?}", &header[8..16]);
    }
    bed.had_sessions(1)?;
    bed.target.judge()
}

fn lun_7() -> Result<Bed> {
    super::bed::bed_of(vcp_tests::bad_target::BadTarget::start("option lun 7")?, 7, &[])
}

/// Line 27: a flood of pings that nobody could answer ends the session, and is not memory without end.
#[test]
fn line_27_flood_of_pings_ends_the_session_only() -> Result<()> {
    let pings: String = (1..=300).map(|ttt| format!("read last nop {ttt}\n")).collect();
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, &pings)?;
    bed.reads(1, 0, LEN)?;
    bed.reads(1, 0, LEN)?;
    ensure!(bed.sessions()? <= 2);
    Ok(())
}

/// Line 28, RFC 7143 11.9.1, event 1: a logout within Parameter3, no new command meanwhile, then a new session.
#[test]
fn line_28_logout_on_request() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "read first async 1 0 0 5\nread slow 200")?;
    // One underway, more behind it.
    for _ in 0..4 {
        bed.driver.submit(0, &Op::Read { offset: 0, len: LEN })?;
    }
    for _ in 0..4 {
        let done = bed.driver.wait(0, DEADLINE)?;
        pattern::check(1, 0, &done.result?)?;
    }
    bed.target.wait("in", "logout", 1)?;
    bed.target.wait("event", "full-feature", 2)?;
    bed.had_sessions(2)?;
    bed.finish()
}

/// Line 28, event 1: the time that the target gave is kept, even if a command hangs.
#[test]
fn line_28_logout_comes_in_time_with_a_command_that_hangs() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "read hang")?;
    bed.driver.submit(0, &Op::Read { offset: 0, len: LEN })?;
    bed.target.wait("event", "hung", 1)?;
    bed.target.now("async 1 0 0 2")?;
    let asked = bed.target.seen("out", "AsyncMessage")?.remove(0).at;
    bed.target.wait("in", "logout", 1)?;
    let came = bed.sent("logout")?.remove(0).at;
    ensure!(came - asked < std::time::Duration::from_secs(2), "after {:?}", came - asked);
    pattern::check(1, 0, &bed.driver.wait(0, DEADLINE)?.result?)?;
    bed.finish()
}

/// Line 28, events 2 and 3: the target drops the connection or session; Time2Wait is waited for.
#[test]
fn line_28_dropped_connection_is_back_after_time2wait() -> Result<()> {
    for event in [2, 3] {
        let mut bed = bed("", &[])?;
        bed.prepare(1, LEN, &format!("read first async {event} 0 1 0\nread close-after"))?;
        let mut bed2 = bed;
        bed2.target.now(&format!("async {event} 0 1 0"))?;
        bed2.reads(1, 0, LEN)?;
        let log = bed2.target.log()?;
        let dropped = log.iter().find(|e| e.label == "AsyncMessage").context("no message")?.at;
        let back = log.iter().filter(|e| e.label == "connect").nth(1).context("not back")?.at;
        ensure!(back - dropped >= std::time::Duration::from_millis(950), "back after {:?}", back - dropped);
        bed2.target.judge()?;
        bed = bed2;
        drop(bed);
    }
    Ok(())
}

/// Line 28, event 4: a request for negotiation may be answered by a logout. Event 255 (vendor) and unknown ones are
/// ignored.
#[test]
fn line_28_negotiation_request_and_vendor_events() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "")?;
    bed.target.now("async 4 0 0 5")?;
    bed.target.wait("event", "full-feature", 2)?;
    ensure!(bed.target.count("in", "logout")? == 1);
    bed.reads(1, 0, LEN)?;
    for event in [255, 248, 100] {
        bed.target.now(&format!("async {event}"))?;
        bed.reads(1, 0, LEN)?;
    }
    bed.had_sessions(2)?;
    bed.finish()
}

/// Line 28, event 5: tasks are being terminated, which only sessions with FastAbort may be told (TaskReporting is not
/// offered). Data-Out stops and the session is reinstated, so nothing of it is in doubt.
#[test]
fn line_28_task_termination_without_fast_abort_starts_over() -> Result<()> {
    let mut bed = bed("option initial-r2t yes\noption immediate-data no\noption max-burst 4096", &[])?;
    bed.target.script("write first async 5 0 0 0\nwrite drop r2t0")?;
    bed.writes(1, 0, 16384)?;
    let stopped = bed.target.seen("out", "AsyncMessage")?.remove(0);
    let late = bed.sent("data-out")?.iter().filter(|e| e.conn == stopped.conn && e.at > stopped.at).count();
    ensure!(late == 0, "{late} Data-Out after the message");
    bed.had_sessions(2)?;
    bed.finish()
}

/// Line 29, RFC 7143 11.17.1: a Reject of a command that is followed by CHECK CONDITION, by its answer, or by nothing.
#[test]
fn line_29_rejected_commands() -> Result<()> {
    // Reasons: data digest, protocol, not supported, immediate, task in progress, invalid field, resources.
    for reason in [0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x09, 0x0a, 0x77] {
        let mut bed = bed("", &[])?;
        bed.prepare(1, LEN, &format!("read first reject {reason}\nread sense 11 0x4700"))?;
        bed.reads(1, 0, LEN)?;
        bed.noticed("Reject")?;
        bed.had_sessions(1)?;
        bed.finish()?;
    }
    // Nothing follows: the task is aborted, then repeated.
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "read reject 4")?;
    bed.reads(1, 0, LEN)?;
    ensure!(bed.target.count("in", "tmf")? == 1, "not aborted");
    bed.had_sessions(1)?;
    bed.finish()
}

/// Line 29: reason 0Ch wants a logout: the session starts over.
#[test]
fn line_29_reject_that_waits_for_logout_starts_over() -> Result<()> {
    starts_over("read first reject 12", "Reject")
}

/// Lines 30 and 32, RFC 7143 7.11, 11.5.1, 11.5.5: a command that takes too long is aborted, by an immediate ABORT TASK
/// with its tag, LUN and CmdSN; then it is repeated.
#[test]
fn line_30_line_32_slow_command_is_aborted() -> Result<()> {
    let mut bed = bed("", FAST)?;
    bed.prepare(1, LEN, "read hang")?;
    bed.target.forget()?;
    bed.reads(1, 0, LEN)?;
    let (read, tmf) = (bed.sent("read")?.remove(0), bed.sent("tmf")?.remove(0));
    let header = tmf.header.context("no header")?;
    ensure!(header[0] == 0x42 && header[1] == 0x81, "not an immediate ABORT TASK: {:02x?}", &header[..2]);
    ensure!(tmf.number(20, 4) == read.field("itt")?, "another tag");
    ensure!(tmf.number(32, 4) == read.number(24, 4), "RefCmdSN is not the command's CmdSN");
    ensure!(tmf.field("lun")? == read.field("lun")?);
    ensure!(bed.sent("tmf")?.len() == 1 && bed.sent("read")?.len() == 2);
    bed.had_sessions(1)?;
    bed.finish()
}

/// Line 30, RFC 7143 4.2.3.3: R2Ts are answered while a reset of the unit is underway, and no new command is sent.
#[test]
fn line_30_r2ts_are_answered_and_commands_wait_during_a_reset() -> Result<()> {
    let mut bed = bed("option initial-r2t yes\noption immediate-data no", FAST)?;
    bed.prepare(1, LEN, "read hang\ntmf#1 respond 5\ntmf#2 slow 600\nwrite slow 900")?;
    bed.driver.submit(0, &Op::Read { offset: 0, len: LEN })?;
    bed.target.wait("event", "hung", 1)?;
    bed.target.wait("in", "tmf", 2)?;
    bed.driver.submit(0, &Op::Write { offset: 0, data: pattern::make(1, 0, LEN) })?;
    for _ in 0..2 {
        ensure!(bed.driver.wait(0, DEADLINE)?.result.is_ok());
    }
    let log = bed.target.log()?;
    let reset = log.iter().filter(|e| e.label == "tmf").nth(1).context("no reset")?.at;
    let answered = log.iter().filter(|e| e.label == "TaskManagementResponse").nth(1).context("no answer")?.at;
    let between = log.iter().filter(|e| e.way == "in" && e.at > reset && e.at < answered);
    let commands = between.filter(|e| e.label == "read" || e.label == "write").count();
    ensure!(commands == 0, "{commands} commands during the reset");
    bed.target.judge()
}

/// Line 31, RFC 7143 11.6.1: 0 and, for ABORT TASK, 1 mean that the task is gone; anything else leads up the ladder.
#[test]
fn line_31_answers_to_abort_task() -> Result<()> {
    each(&[0, 1, 2, 3, 4, 5, 6, 255, 0x40], |code| {
        let mut bed = bed("", FAST)?;
        bed.prepare(1, LEN, &format!("read hang\ntmf respond {code}"))?;
        bed.reads(1, 0, LEN)?;
        let functions: Vec<u64> = bed.sent("tmf")?.iter().map(|e| e.number(1, 1) & 0x7f).collect();
        let expected: &[u64] = if *code < 2 { &[1] } else { &[1, 5] };
        ensure!(functions == expected, "{functions:?}");
        bed.had_sessions(1)?;
        bed.target.judge()
    })
}

/// Line 37, RFC 7143 11.14: behind a Logout nothing is sent, its answer is waited for, then the FIN; the connection is
/// closed by FIN as well.
#[test]
fn line_37_orderly_logout_waits_for_answer_and_fin() -> Result<()> {
    for rule in ["", "logout slow 300", "logout keep-open", "logout first nop 5"] {
        let mut bed = bed(rule, &["--keepalive-ms", "300"])?;
        bed.writes(1, 0, LEN)?;
        let (status, _) = bed.backend.proc().terminate(DEADLINE)?;
        ensure!(status.success());
        bed.target.wait("event", "fin", 1)?;
        let log = bed.target.log()?;
        let at = |label: &str| {
            log.iter()
                .rev()
                .find(|e| e.label == label)
                .map(|e| e.at)
                .with_context(|| format!("no {label}: {rule}\n{}", bed.story()))
        };
        let (logout, answer, fin) = (at("logout")?, at("LogoutResponse")?, at("fin")?);
        ensure!(logout < answer && answer < fin, "{rule}: {logout:?} {answer:?} {fin:?}");
        let after = log.iter().filter(|e| e.way == "in" && e.at > logout).count();
        ensure!(after == 0, "{rule}: {after} PDUs behind the Logout");
        if rule == "logout keep-open" {
            // The FIN that never came was waited for, though not for long.
            ensure!((300..2000).contains(&(fin - answer).as_millis()), "closed after {:?}", fin - answer);
        }
        bed.target.judge()?;
    }
    Ok(())
}

/// Line 37, RFC 7143 11.15.3: the new session comes after Time2Wait.
#[test]
fn line_37_time2wait_of_a_logout_is_kept() -> Result<()> {
    let mut bed = bed("option time2wait 1", &[])?;
    bed.prepare(1, LEN, "")?;
    bed.target.now("async 1 0 0 5")?;
    bed.target.wait("event", "full-feature", 2)?;
    bed.reads(1, 0, LEN)?;
    let log = bed.target.log()?;
    let out = log.iter().find(|e| e.label == "LogoutResponse").context("no logout")?.at;
    let back = log.iter().filter(|e| e.label == "connect").nth(1).context("not back")?.at;
    ensure!(back - out >= std::time::Duration::from_millis(950), "back after {:?}", back - out);
    bed.finish()
}

/// Line 41, RFC 7143 7.8 and 13.1: a wrong header digest ends the connection; a wrong data digest of a Data-In has the
/// command repeated, of anything else the session.
#[test]
fn line_41_digest_errors() -> Result<()> {
    let digests = ["--header-digest", "crc32c", "--data-digest", "crc32c"];
    for (rules, sessions, words) in [
        ("read spoil-header data0", 2, "header digest"),
        ("read apart\nread spoil-header status", 2, "header digest"),
        ("read spoil-data data0", 1, "data digest"),
        ("read#1-3 spoil-data data0", 1, "data digest"),
        ("read sense 11 0x4705\nread spoil-data status", 2, "data digest"),
    ] {
        let mut bed = bed("option in-segment 1024", &digests)?;
        bed.prepare(1, LEN, rules)?;
        bed.reads(1, 0, LEN)?;
        bed.noticed(words)?;
        bed.had_sessions(sessions)?;
        bed.finish()?;
    }
    // One that is always wrong is no loop without end.
    let mut bed = bed("", &digests)?;
    bed.prepare(1, LEN, "read* spoil-data data0")?;
    ensure!(bed.try_read(0, LEN)?.is_err());
    ensure!(bed.target.count("in", "read")? <= 6);
    Ok(())
}
