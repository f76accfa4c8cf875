//! Lost connections, targets and front ends: nothing is lost, nobody notices, everything ends.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use vcp_tests::backend::Backend;
use vcp_tests::front::{Driver, Op, REQUEST};
use vcp_tests::load::Load;
use vcp_tests::proxy::{Proxy, Way};
use vcp_tests::target::{self, Kind, Spec, Target};
use vcp_tests::{Result, pattern, procfs};

const SIZE: u64 = 16 << 20;
/// A lost connection is back within this, whatever pauses were made before.
const BACK: Duration = Duration::from_secs(30);
/// SIGTERM is obeyed within this, whatever the target does.
const STOP: Duration = Duration::from_secs(2);

struct Bed {
    target: Target,
    proxy: Proxy,
    backend: Backend,
}

fn bed(kind: Kind, args: &[&str]) -> Result<Option<Bed>> {
    if !target::have(kind) {
        return Ok(None);
    }
    let target = Target::start(kind, &Spec::disk(SIZE))?;
    let proxy = Proxy::start(target.portal())?;
    proxy.record();
    let backend = Backend::vcp_iscsi(&target.url_at(proxy.addr(), 0), args)?;
    Ok(Some(Bed { target, proxy, backend }))
}

/// Cuts the connection again and again under a verifying load; then looks at how the sessions were opened.
fn survives_cuts(kind: Kind) -> Result<()> {
    let Some(Bed { target, proxy, backend }) = bed(kind, &[])? else { return Ok(()) };
    let mut driver = Driver::connect(backend.socket(), 1)?;
    let mut load = Load::new(1, 1024);
    let mut cuts = 0;
    load.run(&mut driver, 0, 16, 2000, |done| {
        if done % 250 == 100 {
            cuts += 1;
            proxy.cut_now(cuts % 2 == 0);
        }
        Ok(())
    })?;
    load.verify_all(&mut driver)?;
    ensure!(cuts >= 7, "only {cuts} cuts");
    proxy.wait_open(1, BACK)?;
    same_isid(&proxy, cuts)?;
    if kind == Kind::Tgtd {
        let show = target.show()?;
        let nexuses = show.matches("I_T nexus: ").count();
        ensure!(nexuses == 1, "{nexuses} sessions at the target:\n{show}");
    }
    Ok(())
}

/// RFC 7143 6.3.5: a session that was lost is reinstated, which takes the same ISID and TSIH 0. Only then is the old
/// one gone for sure.
fn same_isid(proxy: &Proxy, cuts: usize) -> Result<()> {
    let logins: Vec<_> = proxy.records().iter().filter_map(vcp_tests::proxy::Record::login).collect();
    ensure!(logins.len() > cuts, "{} logins after {cuts} cuts", logins.len());
    // A connection that only asks (discovery, probe) may have its own; the device's is the last one.
    let (isid, _) = *logins.last().context("no login")?;
    let reinstated = logins.iter().filter(|(other, tsih)| *other == isid && *tsih == 0).count();
    ensure!(reinstated > cuts, "{reinstated} of {} logins with the same ISID: {logins:x?}", logins.len());
    Ok(())
}

#[test]
fn cut_connections_to_tgtd_lose_nothing() -> Result<()> {
    survives_cuts(Kind::Tgtd)
}

#[test]
fn cut_connections_to_istgt_lose_nothing() -> Result<()> {
    survives_cuts(Kind::Istgt)
}

#[test]
fn cut_connections_to_our_target_lose_nothing() -> Result<()> {
    survives_cuts(Kind::Ours)
}

/// Each new connection lives a little longer: the cuts fall into the login, the probing and the data.
#[test]
fn connections_cut_at_growing_byte_offsets_lose_nothing() -> Result<()> {
    let Some(Bed { target: _target, proxy, backend }) = bed(Kind::Ours, &[])? else { return Ok(()) };
    let mut driver = Driver::connect(backend.socket(), 1)?;
    let mut load = Load::new(3, 512);
    for way in [Way::ToTarget, Way::ToInitiator] {
        // Within the login and the probing nothing gets through; two connections at least live and die there.
        for after in [0, 1, 47, 48, 200, 500, 1200] {
            let before = proxy.accepted();
            proxy.cut_after(Some((way, after)));
            proxy.cut_now(false);
            load.fill(&mut driver, 0, 8)?;
            proxy.wait_accepted(before + 2, BACK).with_context(|| format!("{way:?} after {after}"))?;
            proxy.cut_after(None);
            load.run(&mut driver, 0, 8, 30, |_| Ok(())).with_context(|| format!("{way:?} after {after}"))?;
        }
        // Later, each connection brings some requests further: it carries more than the eight in flight.
        for after in [60_001, 150_002] {
            let before = proxy.accepted();
            proxy.cut_after(Some((way, after)));
            proxy.cut_now(true);
            load.run(&mut driver, 0, 8, 300, |_| Ok(())).with_context(|| format!("{way:?} after {after}"))?;
            ensure!(proxy.accepted() > before + 2, "{way:?} after {after}: no cut");
            proxy.cut_after(None);
        }
    }
    load.verify_all(&mut driver)
}

/// Defect D of qemu-storage-daemon: a write is under way when the link stops carrying. It is repeated on a new
/// connection and answered; a newer write is answered too. Then the old link delivers the old write, late. It must find
/// its session gone (RFC 7143 7.15), or it overwrites the newer data.
fn late_write_is_void(kind: Kind) -> Result<()> {
    let Some(Bed { target: _target, proxy, backend }) = bed(kind, &["--keepalive-ms", "1000"])? else {
        return Ok(());
    };
    let mut driver = Driver::connect(backend.socket(), 1)?;
    driver.write(0, &pattern::make(1, 0, 4096))?;
    let connections = proxy.accepted();
    proxy.hold(true);
    driver.submit(0, &Op::Write { offset: 0, data: pattern::make(2, 0, 4096) })?;
    // Pings find out that nothing comes any more.
    proxy.wait_accepted(connections + 1, BACK)?;
    driver.wait(0, REQUEST)?.result.context("the repeated write")?;
    driver.write(0, &pattern::make(3, 0, 4096))?;
    pattern::check(3, 0, &driver.read(0, 4096)?)?;
    proxy.hold(false);
    proxy.wait_finished(connections, BACK).context("the old connections")?;
    driver.flush()?;
    pattern::check(3, 0, &driver.read(0, 4096)?)
        .context("an old write came after a newer one was answered")?;
    Ok(())
}

#[test]
fn late_write_on_a_half_open_link_to_tgtd_is_void() -> Result<()> {
    late_write_is_void(Kind::Tgtd)
}

#[test]
fn late_write_on_a_half_open_link_to_istgt_is_void() -> Result<()> {
    late_write_is_void(Kind::Istgt)
}

#[test]
fn late_write_on_a_half_open_link_to_our_target_is_void() -> Result<()> {
    late_write_is_void(Kind::Ours)
}

fn survives_target_restart(kind: Kind) -> Result<()> {
    if !target::have(kind) {
        return Ok(());
    }
    let mut target = Target::start(kind, &Spec::disk(SIZE))?;
    let backend = Backend::vcp_iscsi(&target.url(0), &[])?;
    let mut driver = Driver::connect(backend.socket(), 1)?;
    let mut load = Load::new(5, 1024);
    load.run(&mut driver, 0, 16, 500, |_| Ok(()))?;
    for _ in 0..2 {
        target.kill()?;
        load.fill(&mut driver, 0, 16)?;
        target.start_again()?;
        load.run(&mut driver, 0, 16, 300, |_| Ok(()))?;
    }
    load.verify_all(&mut driver)
}

#[test]
fn restarted_tgtd_is_found_again() -> Result<()> {
    survives_target_restart(Kind::Tgtd)
}

#[test]
fn restarted_istgt_is_found_again() -> Result<()> {
    survives_target_restart(Kind::Istgt)
}

#[test]
fn restarted_our_target_is_found_again() -> Result<()> {
    survives_target_restart(Kind::Ours)
}

/// Defect I of qemu-storage-daemon: the front end goes away while its requests are with the target.
fn survives_lost_front_ends(server: &str) -> Result<()> {
    let Some(Bed { target: _target, proxy, backend }) = bed(Kind::Ours, &["--server", server])? else {
        return Ok(());
    };
    let mut load = Load::new(9, 512);
    for round in 0..5 {
        let mut driver = Driver::connect(backend.socket(), 1).with_context(|| format!("round {round}"))?;
        load.run(&mut driver, 0, 16, 200, |_| Ok(()))?;
        proxy.stall(true);
        load.fill(&mut driver, 0, 32)?;
        drop(driver);
        load.abandon();
        proxy.stall(false);
    }
    let mut driver = Driver::connect(backend.socket(), 1)?;
    load.run(&mut driver, 0, 16, 200, |_| Ok(()))?;
    load.verify_all(&mut driver)?;
    ensure!(backend.proc().is_running(), "the backend died");
    ensure!(proxy.records().len() <= 3, "the session did not outlive its front ends");
    Ok(())
}

#[test]
fn front_end_lost_with_requests_in_flight_can_come_back() -> Result<()> {
    survives_lost_front_ends("poll")
}

#[test]
fn front_end_lost_with_requests_in_flight_can_come_back_to_the_epoll_server() -> Result<()> {
    survives_lost_front_ends("epoll")
}

/// Defect F of qemu-storage-daemon: it spins for ever when it is told to end while the target is away.
#[test]
fn sigterm_with_the_target_gone_ends_in_2_s() -> Result<()> {
    for (server, stall) in [("poll", false), ("poll", true), ("epoll", false)] {
        let Some(Bed { target: _target, proxy, backend }) = bed(Kind::Ours, &["--server", server])? else {
            return Ok(());
        };
        let mut driver = Driver::connect(backend.socket(), 1)?;
        let mut load = Load::new(11, 512);
        load.run(&mut driver, 0, 8, 50, |_| Ok(()))?;
        if stall {
            proxy.stall(true);
        } else {
            let seen = proxy.accepted();
            proxy.refuse(true);
            proxy.cut_now(false);
            proxy.wait_accepted(seen + 1, BACK)?;
        }
        load.fill(&mut driver, 0, 8)?;
        let (status, took) = backend.proc().terminate(Duration::from_secs(10))?;
        ensure!(status.code() == Some(0), "{server}, stalled {stall}: {status}");
        ensure!(took < STOP, "{server}, stalled {stall}: took {took:?}");
        ensure!(!backend.socket().exists(), "{server}: the socket file is left behind");
    }
    Ok(())
}

#[test]
fn idle_backend_takes_no_cpu() -> Result<()> {
    for server in ["poll", "epoll"] {
        let Some(Bed { target: _target, proxy, backend }) = bed(Kind::Ours, &["--server", server])? else {
            return Ok(());
        };
        let mut driver = Driver::connect(backend.socket(), 1)?;
        Load::new(13, 512).run(&mut driver, 0, 16, 500, |_| Ok(()))?;
        let before = procfs::cpu_time(backend.proc().pid())?;
        let start = Instant::now();
        // Nothing is asked for, so no connection may come: the wait must run out.
        ensure!(proxy.wait_accepted(proxy.accepted() + 1, Duration::from_secs(2)).is_err(), "it reconnected");
        let used = procfs::cpu_time(backend.proc().pid())? - before;
        let share = used.as_secs_f64() / start.elapsed().as_secs_f64();
        // 10 ms is one tick of the clock that CPU time is counted with.
        ensure!(share < 0.02, "{server}: idle, but {:.1} % of a CPU", share * 100.0);
    }
    Ok(())
}

#[test]
fn idle_backend_without_its_target_takes_little_cpu() -> Result<()> {
    let Some(Bed { target: _target, proxy, backend }) = bed(Kind::Ours, &[])? else { return Ok(()) };
    let mut driver = Driver::connect(backend.socket(), 1)?;
    proxy.refuse(true);
    proxy.cut_now(false);
    let mut load = Load::new(15, 512);
    load.fill(&mut driver, 0, 8)?;
    let before = procfs::cpu_time(backend.proc().pid())?;
    let (start, seen) = (Instant::now(), proxy.accepted());
    // Attempts get rarer, and each costs little.
    let many = proxy.wait_accepted(seen + 100, Duration::from_secs(2)).is_ok();
    ensure!(!many, "100 attempts to reconnect in 2 s");
    let used = procfs::cpu_time(backend.proc().pid())? - before;
    let share = used.as_secs_f64() / start.elapsed().as_secs_f64();
    ensure!(share < 0.05, "without its target it takes {:.1} % of a CPU", share * 100.0);
    proxy.refuse(false);
    load.run(&mut driver, 0, 8, 100, |_| Ok(()))?;
    load.verify_all(&mut driver)
}
