//! Time: the ladder behind a command that takes too long, keepalive, back-off; and that the memory of an answered request
//! is the guest's again.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use vcp_tests::front::{Failure, Op};
use vcp_tests::{Result, pattern, procfs};

use super::bed::{DEADLINE, FAST, bed, eventually};

const LEN: usize = 4096;

/// Line 32, RFC 7143 7.11: ABORT TASK, then LOGICAL UNIT RESET, then a new session; then the command again.
#[test]
fn line_32_ladder_abort_reset_reinstatement() -> Result<()> {
    let mut bed = bed("", FAST)?;
    bed.prepare(1, LEN, "read hang\ntmf#1-2 respond 255")?;
    bed.reads(1, 0, LEN)?;
    let functions: Vec<u64> = bed.sent("tmf")?.iter().map(|e| e.number(1, 1) & 0x7f).collect();
    ensure!(functions == [1, 5], "{functions:?}");
    bed.had_sessions(2)?;
    ensure!(bed.target.count("event", "reinstated")? == 1);
    bed.finish()
}

/// Other commands of the unit end with its reset, and are repeated as well: nothing is lost, nothing answered twice.
#[test]
fn commands_ended_by_a_reset_are_repeated() -> Result<()> {
    let mut bed = bed("", FAST)?;
    bed.prepare(1, 8 * LEN, "read#1-8 hang\ntmf respond 5")?;
    for n in 0..8 {
        bed.driver.submit(0, &Op::Read { offset: n * LEN as u64, len: LEN })?;
    }
    let mut answered = Vec::new();
    for _ in 0..8 {
        let done = bed.driver.wait(0, DEADLINE)?;
        answered.push(done.id);
        done.result?;
    }
    answered.dedup();
    ensure!(answered.len() == 8);
    ensure!(bed.driver.in_flight(0) == 0);
    bed.reads(1, 0, 8 * LEN)?;
    bed.target.judge()
}

/// A request that is answered is over: Data-In that a lying target still sends for it is placed nowhere.
#[test]
fn memory_of_an_answered_read_is_left_alone() -> Result<()> {
    let mut bed = bed("", FAST)?;
    // The target says that it aborted the READ, and did not; each try ends so until the guest is told of the failure.
    bed.prepare(1, LEN, "read* hang\ntmf* lie")?;
    bed.driver.submit(0, &Op::Read { offset: 0, len: LEN })?;
    let done = bed.driver.wait(0, DEADLINE).with_context(|| bed.story())?;
    ensure!(done.result.err() == Some(Failure::Io));
    // From here on the memory is the guest's.
    let mine = pattern::make(77, 0, LEN);
    bed.driver.set_memory(done.buffer, &mine)?;
    let hung = bed.target.count("event", "hung")?;
    bed.target.now("release")?;
    bed.target.wait("event", "released", hung)?;
    // The late data arrives on the session that the READs were sent on; it ends that session (line 2).
    bed.target.wait("event", "full-feature", 2)?;
    bed.noticed("does not exist")?;
    ensure!(bed.driver.memory(done.buffer, LEN)? == mine, "late Data-In reached memory of the guest");
    Ok(())
}

/// The same for a READ that was answered well: a second answer to it is placed nowhere.
#[test]
fn second_answer_to_a_read_is_placed_nowhere() -> Result<()> {
    let mut bed = bed("option apart yes", &[])?;
    bed.prepare(1, LEN, "")?;
    bed.reads(1, 0, LEN)?;
    let read = bed.sent("read")?.remove(0);
    bed.driver.submit(0, &Op::Read { offset: 0, len: LEN })?;
    let done = bed.driver.wait(0, DEADLINE)?;
    let mine = pattern::make(78, 0, LEN);
    bed.driver.set_memory(done.buffer, &mine)?;
    // A Data-In of 64 bytes for the first READ, by hand: DataSN 0, offset 0, window as it may be.
    let mut pdu = [0_u8; 48 + 64];
    pdu[0] = 0x25;
    pdu[7] = 64;
    pdu[16..20].copy_from_slice(&(read.field("itt")? as u32).to_be_bytes());
    pdu[20..24].fill(0xff);
    pdu[48..].fill(0xee);
    let hex: String = pdu.iter().map(|b| format!("{b:02x}")).collect();
    bed.target.now(&format!("raw {hex}"))?;
    bed.target.wait("event", "full-feature", 2)?;
    bed.noticed("does not exist")?;
    ensure!(bed.driver.memory(done.buffer, LEN)? == mine, "it reached memory of the guest");
    bed.finish()
}

/// A WRITE that hangs and is carried out late, after the target said that it had aborted it, is the target's lie; but
/// one that was really aborted must not act later.
#[test]
fn aborted_write_does_not_act_later() -> Result<()> {
    let mut bed = bed("", FAST)?;
    bed.prepare(1, LEN, "write hang")?;
    bed.writes(2, 0, LEN)?;
    bed.writes(3, 0, LEN)?;
    bed.target.now("release")?;
    bed.reads(3, 0, LEN)?;
    bed.had_sessions(1)?;
    bed.finish()
}

/// NOP keepalive: the round trip is measured, smoothed, and told in the status.
#[test]
fn round_trip_of_pings_is_measured() -> Result<()> {
    let bed = bed("ping* slow 30", &["--keepalive-ms", "300"])?;
    bed.target.wait("in", "nop-out", 4)?;
    let rtt = || -> Result<Option<u64>> { Ok(bed.status()?["paths"][0]["round_trip_us"].as_u64()) };
    eventually("a round trip in the status", || Ok(rtt()?.is_some()))?;
    let us = rtt()?.context("none")?;
    ensure!((25_000..2_000_000).contains(&us), "{us} us");
    bed.finish()
}

/// A target that answers nothing at all any more, with the connection open: found by pings, within their time.
#[test]
fn silent_target_is_found_by_pings() -> Result<()> {
    let mut bed = bed("", FAST)?;
    bed.prepare(1, LEN, "read stall")?;
    let start = Instant::now();
    bed.reads(1, 0, LEN)?;
    ensure!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    bed.had_sessions(2)?;
    bed.finish()
}

/// A ping that stays unanswered while everything else is answered is no reason to drop the session.
#[test]
fn unanswered_ping_beside_answered_commands_is_no_silence() -> Result<()> {
    let mut bed = bed("ping* hang", &["--keepalive-ms", "300"])?;
    bed.prepare(1, LEN, "")?;
    let end = Instant::now() + Duration::from_millis(1500);
    while Instant::now() < end {
        bed.reads(1, 0, LEN)?;
    }
    bed.had_sessions(1)
}

/// A portal that takes connections and closes them at once is asked less and less often, with jitter.
#[test]
fn reconnection_backs_off_with_jitter() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "")?;
    bed.target.script("login* refuse 3 1")?;
    bed.target.now("reset")?;
    bed.target.wait("event", "refused", 7)?;
    let at: Vec<Duration> = bed.target.seen("event", "refused")?.iter().map(|e| e.at).collect();
    let gaps: Vec<u128> = at.windows(2).map(|w| (w[1] - w[0]).as_millis()).collect();
    ensure!(gaps[4] > 2 * gaps[0].max(10), "pauses in ms: {gaps:?}");
    ensure!(at[6] - at[0] > Duration::from_millis(700), "seven tries within {:?}", at[6] - at[0]);
    // No storm of processor time either.
    let used = procfs::cpu_time(bed.backend.proc().pid())?;
    ensure!(used < Duration::from_secs(3), "{used:?} of processor time");
    Ok(())
}

/// Requests wait while the target is away, and succeed when it is back.
#[test]
fn requests_wait_for_a_target_that_is_away() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, 4 * LEN, "connect#1-3 close\nlogin#1-2 refuse 3 1")?;
    bed.target.now("reset")?;
    for n in 0..4 {
        bed.driver.submit(0, &Op::Read { offset: n * LEN as u64, len: LEN })?;
    }
    for _ in 0..4 {
        ensure!(bed.driver.wait(0, DEADLINE)?.result.is_ok());
    }
    bed.had_sessions(2)?;
    bed.finish()
}
