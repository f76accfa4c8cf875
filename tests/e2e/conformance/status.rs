//! SCSI status and sense: what is cured unseen, what the guest is told, and how the depth adapts.

use std::time::Duration;

use anyhow::ensure;
use vcp_tests::Result;
use vcp_tests::front::{Failure, Op};
use vcp_tests::load::Load;
use vcp_tests::proc::Stream;

use super::bed::{DEADLINE, bed, eventually};

const LEN: usize = 4096;

/// Whatever the first answers are, the guest sees a READ and a WRITE that succeed, on one session.
fn cured(answer: &str, times: u32) -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, &format!("read#1-{times} {answer}\nwrite#1-{times} {answer}"))?;
    bed.reads(1, 0, LEN)?;
    bed.writes(2, 0, LEN)?;
    bed.had_sessions(1)?;
    let (reads, writes) = (bed.target.count("in", "read")?, bed.target.count("in", "write")?);
    ensure!(reads as u32 >= times + 2 && writes as u32 > times, "{answer}: {reads} READs, {writes} WRITEs");
    bed.finish()
}

/// The guest is told that a READ or WRITE failed, at once: the command is not tried again.
fn told(answer: &str, op: &Op) -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, &format!("command#1- {answer}"))?;
    let before = bed.target.count("in", "read")? + bed.target.count("in", "write")?;
    let answered = bed.driver.request(0, op)?;
    ensure!(answered.err() == Some(Failure::Io), "{answer}: not VIRTIO_BLK_S_IOERR\n{}", bed.story());
    let tries = bed.target.count("in", "read")? + bed.target.count("in", "write")? - before;
    ensure!(tries == 1, "{answer}: tried {tries} times");
    bed.had_sessions(1)
}

/// UNIT ATTENTION never reaches the guest, whatever it says: SAM-5 5.14, the command was not carried out.
#[test]
fn unit_attention_never_reaches_the_guest() -> Result<()> {
    for code in [
        0x2900, // power on, reset
        0x2907, // I_T nexus loss
        0x2A00, // parameters changed
        0x2A01, // mode parameters changed
        0x2A04, // reservations released
        0x2A06, // asymmetric access state changed
        0x2A09, // capacity changed
        0x2800, // medium may have changed
        0x2F00, // commands cleared
        0x3807, // thin provisioning soft threshold
        0x3F01, // microcode changed
        0x3F03, // inquiry data changed
        0x3F0E, // reported LUNs changed
        0x5D00, // failure prediction
        0xFFFF, // nothing that we know
    ] {
        cured(&format!("sense 6 {code:#06x}"), 1)?;
    }
    cured("sense 6 0x2900", 6)
}

/// Line 36, RFC 7143 11.14.5: 47/7F and the like are expected after a recovery, on the first commands of any kind.
#[test]
fn line_36_unit_attentions_after_recovery_stay_unseen() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "")?;
    for code in ["0x477f", "0x2907", "0x2900"] {
        let sessions = bed.sessions()?;
        // Those of the probing behind the login, then those of the guest.
        bed.target.script(&format!("command#1-2 sense 6 {code}\nread#1-2 sense 6 {code}"))?;
        bed.target.now("reset")?;
        bed.reads(1, 0, LEN)?;
        bed.had_sessions(sessions + 1)?;
    }
    bed.finish()
}

/// BUSY, TASK SET FULL, ACA ACTIVE and TASK ABORTED pass; the command is tried again later (SAM-5 5.3.1).
#[test]
fn transient_status_is_waited_out() -> Result<()> {
    for status in ["0x08", "0x28", "0x30", "0x40"] {
        cured(&format!("status {status}"), 4)?;
    }
    Ok(())
}

/// A unit that is becoming ready, moves between access states, or gave a command up for a reason of its own.
#[test]
fn transient_sense_is_waited_out() -> Result<()> {
    for sense in
        ["2 0x0401", "2 0x0400", "2 0x040a", "2 0x0414", "2 0x0407", "11 0x4705", "11 0x0000", "11 0x4401"]
    {
        cured(&format!("sense {sense}"), 2)?;
    }
    Ok(())
}

/// What repetition will not cure is told at once, in the one way that virtio-blk has.
#[test]
fn permanent_errors_are_told_once() -> Result<()> {
    let read = Op::Read { offset: 0, len: LEN };
    let write = Op::Write { offset: 0, data: vec![7; LEN] };
    for (answer, op) in [
        ("sense 3 0x1100", &read),   // unrecovered read error
        ("sense 4 0x4400", &read),   // internal target failure
        ("sense 5 0x2100", &read),   // LBA out of range
        ("sense 7 0x2700", &write),  // write protected
        ("sense 3 0x0c00", &write),  // write error
        ("sense 14 0x1d00", &write), // miscompare
        ("sense 2 0x0403", &read),   // not ready, manual intervention required
        ("sense 2 0x3a00", &read),   // medium not present
    ] {
        told(answer, op)?;
    }
    Ok(())
}

/// RESERVATION CONFLICT is somebody else's right to the unit: told, not fought. A later request is a new try.
#[test]
fn reservation_conflict_is_told_and_over_when_it_is() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "write#1-2 status 0x18")?;
    for _ in 0..2 {
        ensure!(bed.try_write(2, 0, LEN)?.err() == Some(Failure::Io));
    }
    bed.writes(3, 0, LEN)?;
    bed.had_sessions(1)?;
    bed.finish()
}

/// SPACE ALLOCATION FAILED of a thin unit (SBC-3 4.7.3.6) is no transient: virtio-blk has only S_IOERR for it, and a
/// storm of repetitions helps nobody.
#[test]
fn out_of_space_is_told_without_a_storm() -> Result<()> {
    let mut bed = bed("option thin yes", &[])?;
    bed.prepare(1, LEN, "write* sense 7 0x2707")?;
    for n in 0..5 {
        ensure!(bed.try_write(n, 0, LEN)?.err() == Some(Failure::Io));
    }
    // One WRITE for each request, and those before.
    let writes = bed.target.count("in", "write")?;
    ensure!(writes == 6, "{writes} WRITEs");
    // Reading goes on, and so does giving space back.
    bed.reads(1, 0, LEN)?;
    bed.driver.discard(1 << 19, 4096)?;
    bed.had_sessions(1)?;
    bed.backend.proc().wait_line(Stream::Err, "out of space", DEADLINE)?;
    Ok(())
}

/// A deferred error is about an earlier command; this one was not carried out (SPC-4 4.5.7) and is tried again.
#[test]
fn deferred_error_is_not_this_commands() -> Result<()> {
    cured("deferred 3 0x0c00", 1)
}

/// RECOVERED ERROR: done, with a remark (SPC-4 table 27). Data that is whole is good.
#[test]
fn recovered_error_with_all_data_written_is_done() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "write sense 1 0x1700")?;
    // The WRITE's data was transferred before the status, so the remark is one.
    ensure!(bed.try_write(1, 0, LEN)?.is_ok());
    bed.had_sessions(1)?;
    bed.finish()
}

/// TASK SET FULL halves the depth, success grows it again (AIMD): a target that takes four at once is soon sent about four at
/// once, and nothing is lost on the way.
#[test]
fn task_set_full_adapts_the_depth() -> Result<()> {
    let mut bed = bed("option window 128", &[])?;
    bed.target.script("option depth 4\nread* slow 2\nwrite* slow 2")?;
    let mut load = Load::new(1, 256);
    load.run(&mut bed.driver, 0, 32, 800, |_| Ok(()))?;
    load.verify_all(&mut bed.driver)?;
    let (busy, completed) = (bed.stat("busy")?, bed.stat("completed")?);
    // Unlimited, 28 of 32 would be turned away again and again.
    ensure!(busy > 0 && busy < completed, "{busy} times TASK SET FULL for {completed} requests");
    bed.had_sessions(1)?;
    bed.target.script("option depth 0")?;
    bed.finish()
}

/// Repetitions wait longer and longer: a unit that stays BUSY is not asked in a storm.
#[test]
fn busy_backs_off() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "read#1-9 status 8")?;
    bed.target.forget()?;
    bed.reads(1, 0, LEN)?;
    let at: Vec<Duration> = bed.sent("read")?.iter().map(|e| e.at).collect();
    ensure!(at.len() == 10, "{} READs", at.len());
    let total = at[9] - at[0];
    // 5 ms doubled each time, jittered by half at most.
    ensure!(total > Duration::from_millis(800), "ten tries within {total:?}");
    bed.finish()
}

/// Waits until the device is told as having `bytes`.
fn grows_to(bed: &mut super::bed::Bed, bytes: u64) -> Result<()> {
    eventually("the new size", || Ok(bed.driver.config()?.size_bytes == bytes))
}

/// Capacity change told by UNIT ATTENTION 2A/09: the guest's request succeeds, the device has the new size.
#[test]
fn capacity_change_by_unit_attention_reaches_the_device() -> Result<()> {
    let mut bed = bed("option blocks 2048", &[])?;
    bed.prepare(1, LEN, "read#1 resize 4096\nread#1 sense 6 0x2a09")?;
    ensure!(bed.driver.config()?.size_bytes == 1 << 20);
    bed.reads(1, 0, LEN)?;
    grows_to(&mut bed, 2 << 20)?;
    bed.writes(2, (2 << 20) - LEN as u64, LEN)?;
    bed.had_sessions(1)?;
    bed.finish()
}

/// Capacity change told by an Asynchronous Message with event 0 (RFC 7143 11.9.1), while nothing is asked.
#[test]
fn capacity_change_by_asynchronous_message_reaches_the_device() -> Result<()> {
    let mut bed = bed("option blocks 2048", &[])?;
    let mut messages = bed.driver.backend_messages()?;
    bed.target.now("resize 3072")?;
    bed.target.now("async-sense 6 0x2a09")?;
    messages.wait_config_change(DEADLINE)?;
    grows_to(&mut bed, 3 << 19)?;
    bed.writes(2, (3 << 19) - LEN as u64, LEN)?;
    bed.had_sessions(1)?;
    bed.finish()
}

/// Capacity change that the target tells nobody of: found by asking now and then, beside the requests.
#[test]
fn capacity_change_that_is_not_told_is_found() -> Result<()> {
    let mut bed = bed("option blocks 2048", &["--size-check-s", "1"])?;
    let mut messages = bed.driver.backend_messages()?;
    bed.target.now("resize 8192")?;
    messages.wait_config_change(DEADLINE)?;
    grows_to(&mut bed, 4 << 20)?;
    bed.writes(2, (4 << 20) - LEN as u64, LEN)?;
    // From now on it is asked again and again, and nothing comes of it.
    bed.target.forget()?;
    bed.target.wait("in", "capacity", 2)?;
    ensure!(bed.target.count("in", "inquiry")? == 0, "looked at again without need");
    bed.had_sessions(1)?;
    bed.finish()
}

/// A unit that shrank: what lies behind its end fails, what is before works.
#[test]
fn unit_that_shrank_fails_what_is_behind_its_end() -> Result<()> {
    let mut bed = bed("option blocks 2048", &[])?;
    bed.target.now("resize 1024")?;
    bed.target.now("async-sense 6 0x2a09")?;
    grows_to(&mut bed, 1 << 19)?;
    ensure!(bed.driver.request(0, &Op::Read { offset: (1 << 20) - 4096, len: 4096 })?.is_err());
    bed.had_sessions(1)?;
    bed.finish()
}

/// A status that no standard knows is no success.
#[test]
fn unknown_status_is_no_success() -> Result<()> {
    for status in ["0x04", "0x10", "0x22", "0x7f", "0xff"] {
        let mut bed = bed("", &[])?;
        bed.prepare(1, LEN, &format!("write* status {status}\nread* status {status}"))?;
        ensure!(bed.try_write(2, 0, LEN)?.is_err(), "WRITE with status {status} was answered as done");
        ensure!(bed.try_read(0, LEN)?.is_err(), "READ with status {status} was answered as done");
    }
    Ok(())
}

/// Sense data that says nothing: too short, an unknown format, none at all in a PDU that may have none.
#[test]
fn sense_without_meaning_is_no_success() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "write* sense 3 0x0c00\nwrite* sense-length 0")?;
    ensure!(bed.try_write(2, 0, LEN)?.is_err());
    ensure!(bed.driver.wait(0, DEADLINE).is_err(), "answered twice");
    Ok(())
}
