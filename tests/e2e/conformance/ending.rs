//! SIGTERM ends the process within seconds, whatever the target does and whichever phase it is in; and waiting costs no
//! processor time.

use std::time::{Duration, Instant};

use anyhow::ensure;
use vcp_tests::backend::serve;
use vcp_tests::bad_target::BadTarget;
use vcp_tests::front::Op;
use vcp_tests::proc::Proc;
use vcp_tests::{Result, procfs};

use super::bed::{Bed, DEADLINE, bed, each};

/// SIGTERM is obeyed within this.
const STOP: Duration = Duration::from_secs(5);

fn ends(proc: &Proc, what: &str) -> Result<()> {
    let (_, took) = proc.terminate(DEADLINE)?;
    ensure!(took < STOP, "{what}: the end took {took:?}");
    Ok(())
}

/// At most a tenth of the time is spent on the processor while it waits.
fn waits_idly(pid: u32, what: &str) -> Result<()> {
    let (start, before) = (Instant::now(), procfs::cpu_time(pid)?);
    // What is measured is the time itself.
    std::thread::sleep(Duration::from_millis(1500));
    let (took, used) = (start.elapsed(), procfs::cpu_time(pid)? - before);
    ensure!(used * 10 < took, "{what}: {used:?} of processor time in {took:?}");
    Ok(())
}

/// Defect F: the target is gone or stalls, a request hangs; the process waits idly and ends at once.
fn stuck(rules: &str, now: &str) -> Result<()> {
    let Bed { target, backend, mut driver, .. } = {
        let mut bed = bed("", &[])?;
        bed.prepare(1, 4096, rules)?;
        bed
    };
    driver.submit(0, &Op::Read { offset: 0, len: 4096 })?;
    if !now.is_empty() {
        target.now(now)?;
    }
    let what = format!("{rules:?} {now:?}");
    waits_idly(backend.proc().pid(), &what)?;
    ends(backend.proc(), &what)
}

/// With a command that hangs, a connection that stalls, a logout that is never answered.
#[test]
fn sigterm_with_a_target_that_hangs() -> Result<()> {
    each(&["read hang", "read stall", "read hang\nlogout hang", "read hang\nlogout stall"], |rules| {
        stuck(rules, "")
    })
}

/// With a connection lost, and each attempt to get it back stuck in another way.
#[test]
fn sigterm_while_the_session_is_not_to_be_had() -> Result<()> {
    let ways = [
        "connect* close",
        "connect* reset",
        "connect* stall",
        "login* stall",
        "login* close",
        "login#2- stall",
        "login* refuse 3 1",
        "login* refuse 2 3",
        "luns* hang",
        "inquiry* hang",
        "ready* stall",
        "capacity* status 8",
    ];
    each(&ways, |how| stuck(&format!("{how}\nread reset"), ""))
}

/// With the whole target process gone: nothing listens any more.
#[test]
fn sigterm_with_the_target_gone() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, 4096, "")?;
    bed.target.proc().kill()?;
    bed.driver.submit(0, &Op::Read { offset: 0, len: 4096 })?;
    waits_idly(bed.backend.proc().pid(), "the target is gone")?;
    ends(bed.backend.proc(), "the target is gone")
}

/// With a target that is stopped: the kernel takes connections and bytes for it.
#[test]
fn sigterm_with_the_target_stopped() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, 4096, "")?;
    bed.target.proc().signal(rustix::process::Signal::STOP)?;
    bed.driver.submit(0, &Op::Write { offset: 0, data: vec![1; 1 << 19] })?;
    waits_idly(bed.backend.proc().pid(), "the target is stopped")?;
    ends(bed.backend.proc(), "the target is stopped")
}

/// Before it serves: in the first connection, login or probing.
#[test]
fn sigterm_during_the_start() -> Result<()> {
    let ways =
        ["connect* stall", "login* stall", "login#2- stall", "luns* hang", "inquiry* stall", "mode* hang"];
    each(&ways, |how| {
        let target = BadTarget::start(how)?;
        let dir = tempfile::tempdir()?;
        let proc = serve(&dir.path().join("s"))?.arg(target.url()).spawn()?;
        target.wait("event", "connect", 1)?;
        waits_idly(proc.pid(), how)?;
        ends(&proc, how)?;
        ensure!(!dir.path().join("s").exists(), "{how}: the socket file stays behind");
        Ok(())
    })
}
