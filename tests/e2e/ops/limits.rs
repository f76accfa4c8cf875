//! Rate limits and resizing of a running disk.

use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::json;
use vcp_tests::bad_target::BadTarget;
use vcp_tests::front::{Op, REQUEST};
use vcp_tests::load::Load;
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, pattern, procfs};

use super::Server;

/// Behind what the load verifies.
const ELSEWHERE: u64 = 1 << 20;

/// A limited disk takes the time that it must, sleeps meanwhile, and loses nothing; a changed limit holds at once.
#[test]
fn a_limit_holds_and_changes_at_run_time() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(8 << 20))?;
    let server = Server::start(&target.url(0), &["--limit-iops", "200,burst=10", "--poll-us", "0"])?;
    let mut driver = server.driver()?;
    let mut load = Load::new(7, 64);
    let (start, cpu) = (Instant::now(), procfs::cpu_time(server.proc.pid())?);
    load.run(&mut driver, 0, 16, 300, |_| Ok(()))?;
    let (took, cpu) = (start.elapsed(), procfs::cpu_time(server.proc.pid())? - cpu);
    // Never faster than that, however loaded the machine is.
    ensure!(took >= Duration::from_millis(1400), "300 requests at 200/s with a burst of 10 took {took:?}");
    ensure!(cpu < took / 4, "{cpu:?} of CPU time in {took:?} of waiting");
    let page = server.page()?;
    ensure!(page.disk("vcp_disk_limit_iops", "")? == 200.0 && page.disk("vcp_disk_limited_total", "")? > 0.0);
    let waited = page.disk("vcp_request_stage_seconds_sum", "op=\"read\",stage=\"ring\"")?;
    ensure!(waited > 0.5, "reads waited for {waited} s in the ring");
    // Off: much faster than the limit was.
    let answer = server.ask(&json!({"cmd": "limit", "device": "disk0", "iops": null}))?;
    ensure!(answer["devices"][0]["limits"] == json!({"iops": null, "bps": null}), "{answer}");
    load.run(&mut driver, 0, 16, 300, |_| Ok(()))?;
    // Bytes: one request of 64 KiB leaves a debt of most of a second.
    server.ask(&json!({"cmd": "limit", "bps": "64K", "bps_burst": "4K"}))?;
    let start = Instant::now();
    for n in 0..2 {
        driver.write(ELSEWHERE, &pattern::make(n, ELSEWHERE, 64 << 10))?;
    }
    let took = start.elapsed();
    ensure!(took >= Duration::from_millis(900), "64 KiB behind 64 KiB at 64K/s took {took:?}");
    // A request that is held back by a limit goes on when the limit goes.
    server.ask(&json!({"cmd": "limit", "bps": 1, "bps_burst": 1}))?;
    driver.write(ELSEWHERE, &pattern::make(3, ELSEWHERE, 4096))?;
    driver.submit(0, &Op::Read { offset: ELSEWHERE, len: 4096 })?;
    ensure!(driver.in_flight(0) == 1);
    server.ask(&json!({"cmd": "limit", "bps": null}))?;
    let done = driver.wait(0, REQUEST)?;
    let Ok(data) = done.result else { anyhow::bail!("the read failed") };
    pattern::check(3, ELSEWHERE, &data)?;
    for wrong in [json!({"iops": "much"}), json!({"speed": 1}), json!({"device": "disk9", "iops": 1})] {
        let mut request = json!({"cmd": "limit"});
        request
            .as_object_mut()
            .into_iter()
            .for_each(|r| r.extend(wrong.as_object().cloned().unwrap_or_default()));
        ensure!(server.try_ask(&request)?["ok"] == false, "{request}");
    }
    load.run(&mut driver, 0, 16, 100, |_| Ok(()))
}

/// The other server keeps to limits, too, and hears of a change while it sleeps.
#[test]
fn limits_hold_with_the_epoll_server() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(8 << 20))?;
    let server = Server::start(&target.url(0), &["--limit-iops", "100,burst=1", "--server", "epoll"])?;
    let mut driver = server.driver()?;
    let mut load = Load::new(8, 64);
    let start = Instant::now();
    load.run(&mut driver, 0, 8, 50, |_| Ok(()))?;
    ensure!(start.elapsed() >= Duration::from_millis(450), "took {:?}", start.elapsed());
    server.ask(&json!({"cmd": "limit", "iops": 1, "iops_burst": 1}))?;
    driver.read(0, 4096)?;
    driver.submit(0, &Op::Read { offset: 0, len: 4096 })?;
    server.ask(&json!({"cmd": "limit", "iops": 0}))?;
    ensure!(driver.wait(0, REQUEST)?.result.is_ok());
    load.run(&mut driver, 0, 8, 300, |_| Ok(()))
}

/// The unit grows and shrinks: `rescan` finds it, the guest is told, and nothing behind the end reaches the target.
#[test]
fn a_unit_is_resized_while_it_is_used() -> Result<()> {
    let target = BadTarget::start("option blocks 2048")?;
    let server = Server::start(&target.url(), &[])?;
    let mut driver = server.driver()?;
    let size = |blocks: u64| blocks * 512;
    ensure!(driver.config()?.size_bytes == size(2048));
    driver.write(0, &pattern::make(1, 0, 4096))?;
    target.now("resize 4096")?;
    let answer = server.ask(&json!({"cmd": "rescan"}))?;
    ensure!(answer["devices"][0]["size_bytes_before"] == size(2048), "{answer}");
    let page = server.page_that("the new size", |page| {
        page.disk("vcp_disk_size_bytes", "").is_ok_and(|bytes| bytes == size(4096) as f64)
    })?;
    ensure!(
        page.disk("vcp_disk_changes_total", "")? == 1.0 && page.disk("vcp_disk_shrunk_total", "")? == 0.0
    );
    ensure!(driver.config()?.size_bytes == size(4096), "the configuration space follows");
    driver.write(size(4088), &pattern::make(2, 0, 4096))?;
    target.now("resize 1024")?;
    server.ask(&json!({"cmd": "rescan"}))?;
    server.page_that("the smaller size", |page| {
        page.disk("vcp_disk_shrunk_total", "").is_ok_and(|times| times == 1.0)
    })?;
    ensure!(server.status()?["shrunk"] == 1);
    ensure!(driver.config()?.size_bytes == size(1024));
    target.now("forget").ok();
    ensure!(driver.read(size(1024), 512).is_err(), "a read behind the new end");
    ensure!(driver.write(size(4088), &[1; 4096]).is_err(), "a write behind the new end");
    pattern::check(1, 0, &driver.read(0, 4096)?)?;
    ensure!(server.proc.text().contains("shrank"), "it is flagged in the log:\n{}", server.proc.tail());
    Ok(())
}
