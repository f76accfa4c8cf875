//! The nine defects of the direct peer (qemu-storage-daemon with libiscsi), each provoked in our program from end to end.
//! A test of each stands here, so that the list can be read in one place; related ones are in the other files.

use anyhow::ensure;
use vcp_tests::Result;
use vcp_tests::front::{Failure, Op};
use vcp_tests::pattern;

use super::bed::{DEADLINE, FAST, bed, bed_of, next_driver};

const LEN: usize = 4096;

/// Defect A, line 21, RFC 7143 11.4.3: Response other than 00h means that the command was not carried out, whatever the
/// status says.
#[test]
fn defect_a_line_21_response_code_overrides_status() -> Result<()> {
    for code in [0x01, 0x02, 0x80, 0xff] {
        let mut bed = bed("", &[])?;
        bed.prepare(1, LEN, &format!("write* response {code}"))?;
        ensure!(bed.try_write(2, 0, LEN)?.err() == Some(Failure::Io), "response {code:#x}: told as done");
        bed.reads(1, 0, LEN)?;
        bed.target.judge()?;
    }
    // Once is cured by repetition: the guest's data is on the disk then.
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "write response 1\nread response 1")?;
    bed.writes(2, 0, LEN)?;
    bed.had_sessions(1)?;
    bed.finish()
}

/// Defect B: half of the data, GOOD, and a residual that says so.
#[test]
fn defect_b_short_read_is_no_success() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "read* short 2048")?;
    ensure!(bed.try_read(0, LEN)?.err() == Some(Failure::Io));
    bed.had_sessions(1)
}

/// Defect C: half of the data, GOOD, and nothing that says so; or a hole in the numbers.
#[test]
fn defect_c_hole_is_no_success() -> Result<()> {
    for rules in [
        "read* missing 2048",
        "read* segment 1024\nread* drop data1",
        "read* segment 1024\nread* cut data1 1024",
    ] {
        let mut bed = bed("", &[])?;
        bed.prepare(1, LEN, rules)?;
        ensure!(bed.try_read(0, LEN)?.err() == Some(Failure::Io), "{rules}");
        bed.had_sessions(1)?;
    }
    Ok(())
}

/// Defect D, RFC 7143 7.15: a WRITE hangs in the target, the link goes dead, the device reconnects, repeats it, and the
/// guest writes something newer. When the target gets around to the old WRITE, the session that it belongs to must be
/// gone.
#[test]
fn defect_d_old_write_never_overwrites_a_newer_one() -> Result<()> {
    let mut bed = bed("", FAST)?;
    bed.prepare(1, LEN, "write hang\nwrite stall")?;
    bed.driver.submit(0, &Op::Write { offset: 0, data: pattern::make(0x11, 0, LEN) })?;
    ensure!(bed.driver.wait(0, DEADLINE)?.result.is_ok(), "the repeated write");
    bed.writes(0x22, 0, LEN)?;
    // Any WRITE that hangs acts now, of whatever session is still there.
    bed.target.now("release")?;
    bed.reads(0x22, 0, LEN)?;
    ensure!(bed.target.count("event", "reinstated")? == 1, "the old session was not ended");
    bed.finish()
}

/// Defect D where the same login cannot end the old session, as another portal group answers: the unit is reset before
/// anything is repeated.
#[test]
fn defect_d_in_another_portal_group_the_unit_is_reset() -> Result<()> {
    let mut bed = bed("option group 1", FAST)?;
    bed.prepare(1, LEN, "write hang\nwrite stall\noption group 2")?;
    bed.driver.submit(0, &Op::Write { offset: 0, data: pattern::make(0x11, 0, LEN) })?;
    ensure!(bed.driver.wait(0, DEADLINE)?.result.is_ok(), "the repeated write");
    let log = bed.target.log()?;
    let of_second: Vec<_> = log.iter().filter(|e| e.way == "in" && e.conn > 0).collect();
    let place = |label: &str| of_second.iter().position(|e| e.label == label);
    let (reset, write) = (place("tmf"), place("write"));
    ensure!(reset.is_some() && reset < write, "reset {reset:?}, write {write:?}\n{}", bed.story());
    ensure!(of_second[reset.unwrap_or_default()].number(1, 1) & 0x7f == 5, "not LOGICAL UNIT RESET");
    bed.writes(0x22, 0, LEN)?;
    bed.target.now("release")?;
    bed.reads(0x22, 0, LEN)?;
    bed.target.judge()
}

/// Defect E is in [`super::durable`]: a FLUSH of the guest reaches a unit with a cache.
#[test]
fn defect_e_flush_reaches_the_wire() -> Result<()> {
    let mut bed = bed("option wce yes", &[])?;
    ensure!(bed.driver.config()?.write_cache, "the cache is not told to the guest");
    bed.driver.write(0, &pattern::make(1, 0, LEN))?;
    bed.driver.flush()?;
    ensure!(bed.target.count("in", "sync")? == 1);
    bed.finish()
}

/// Defect F: the target is killed, then the device told to end; it waits idly and ends.
#[test]
fn defect_f_no_spinning_without_a_target() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "")?;
    bed.target.proc().kill()?;
    bed.driver.submit(0, &Op::Read { offset: 0, len: LEN })?;
    let pid = bed.backend.proc().pid();
    let before = vcp_tests::procfs::cpu_time(pid)?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    let used = vcp_tests::procfs::cpu_time(pid)? - before;
    ensure!(used.as_millis() < 200, "{used:?} of processor time in a second");
    let (_, took) = bed.backend.proc().terminate(DEADLINE)?;
    ensure!(took.as_secs() < 5, "the end took {took:?}");
    Ok(())
}

/// Defect G, line 20, RFC 7143 11.7.2: the A bit at error recovery level 0.
#[test]
fn defect_g_acknowledge_bit_is_no_error() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, LEN, "read* or data0 flags 0x40\nread* set data0 ttt 5")?;
    bed.reads(1, 0, LEN)?;
    bed.had_sessions(1)?;
    bed.finish()
}

/// Defect H, RFC 7143 11.2.1.7 and SAM-5 4.7: LUN 300 in flat addressing, 16383 and beyond in theirs.
#[test]
fn defect_h_large_luns() -> Result<()> {
    for lun in [255, 256, 300, 16383, 16384, 1_000_000] {
        let target = vcp_tests::bad_target::BadTarget::start(&format!("option lun {lun}"))?;
        let mut bed = bed_of(target, lun, &[])?;
        bed.writes(1, 0, LEN)?;
        bed.finish()?;
    }
    Ok(())
}

/// Defect I: the front end drops its socket while requests are underway, another one comes; the process lives, and the
/// old requests touch nothing.
#[test]
fn defect_i_front_end_that_goes_with_requests_underway() -> Result<()> {
    let mut bed = bed("", FAST)?;
    bed.prepare(1, LEN, "read#1-4 hang\nwrite#1-2 hang")?;
    let super::bed::Bed { target, backend, mut driver, .. } = bed;
    for round in 0..3 {
        driver.submit(0, &Op::Read { offset: 0, len: LEN })?;
        driver.submit(0, &Op::Write { offset: 8192, data: pattern::make(round, 8192, LEN) })?;
        // A kick right before the socket closes.
        driver.submit(0, &Op::Flush)?;
        drop(driver);
        driver = next_driver(&backend)?;
        ensure!(backend.proc().is_running());
    }
    pattern::check(1, 0, &driver.read(0, LEN)?)?;
    target.judge()
}
