//! What `cargo xtask bench isolation` measures, in short: a guest that computes beside its I/O, with the VCP on a hardware thread
//! of its own and on the vCPU's. How much is left of the computing is the benchmark's to say; here both must go on. And what two
//! VCPs get of a thread that they share.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use guest_images::bare;
use serde_json::Value;
use vcp_tests::proc::{Cmd, Stream};
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, procfs, tool};

use crate::monitor::ring3;
use crate::support::{numbers, vcp};

const RUN: Duration = Duration::from_secs(60);

#[test]
fn a_guest_computes_beside_its_io_wherever_the_vcp_is() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    for place in ["cpu=1", "cpu=0,poll-us=0", "cpu=shared:a,poll-us=always"] {
        let out = vcp([
            "run",
            "--vcpu-cpus",
            "0",
            "--cmdline",
            "job=mixed rw=randread,randwrite qd=8 secs=1 region=8M",
        ])?
        .arg("--disk")
        .arg(format!("url={},{place}", target.url(0)))
        .arg("--kernel")
        .arg(bare::build()?)
        .run(RUN)?;
        ensure!(out.status.success(), "{place}: {}: {}{}", out.status, out.stdout, out.stderr);
        for load in ["none", "randread", "randwrite"] {
            let line = out.stdout.lines().find(|line| line.contains(&format!("mixed: rw={load} ")));
            let line = line.with_context(|| format!("{place}: no result with {load}: {}", out.stdout))?;
            let work = numbers(line, " mops=");
            ensure!(work.len() == 1 && work[0] > 0.0, "{place}: nothing was computed: {line}");
            let done = numbers(line, " ios=");
            ensure!(
                load == "none" || done.first().is_some_and(|ios| *ios > 0.0),
                "{place}: nothing was done: {line}"
            );
        }
    }
    Ok(())
}

/// Two VCPs that both want all of one hardware thread: the scheduler gives them what their weights say, a step of a priority
/// (a factor of 1.25) more or less. What else runs on that thread takes from both.
#[test]
fn a_shared_thread_is_divided_by_weight() -> Result<()> {
    const MEASURED: Duration = Duration::from_secs(2);
    if !ring3()? {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let dir = tempfile::tempdir()?;
    let api = dir.path().join("api");
    let disk = |weight: u32| format!("url={},cpu=shared:a,poll-us=always,weight={weight}", target.url(0));
    // As a service with a priority of its own may be started: the shares are those of its VCPs among each other.
    let monitor = Cmd::new("nice")
        .args(["-n", "4"])
        .arg(tool::ours("vcp")?)
        .args(["run", "--vcpu-cpus", "0", "--cmdline", "job=bench rw=randread secs=3600 region=8M qd=1"])
        .args(["--disk", &disk(400), "--disk", &disk(100), "--kernel"])
        .arg(bare::build()?)
        .arg("--api-socket")
        .arg(&api)
        .keep_stdin()
        .spawn()?;
    monitor.wait_line(Stream::Out, "ready:", RUN)?;
    let status: Value =
        serde_json::from_str(&vcp(["ctl", "-S"])?.arg(&api).args(["status", "--json"]).output(RUN)?)?;
    let devices = status["machine"]["devices"].as_array().context("no devices")?;
    let pid = |name: &str| {
        let device = devices.iter().find(|device| device["name"] == name);
        let pid = device.and_then(|device| device["backend"]["pid"].as_u64());
        pid.and_then(|pid| u32::try_from(pid).ok()).with_context(|| format!("no process of {name}: {status}"))
    };
    let (much, little) = (pid("disk0")?, pid("disk1")?);
    let used = || Ok::<_, anyhow::Error>((procfs::cpu_time(much)?, procfs::cpu_time(little)?));
    let (before, end) = (used()?, Instant::now() + RUN);
    let ratio = loop {
        let now = used()?;
        let (a, b) = (now.0 - before.0, now.1 - before.1);
        if a + b >= MEASURED {
            break a.as_secs_f64() / b.as_secs_f64().max(0.001);
        }
        ensure!(Instant::now() < end, "two VCPs that never sleep used {a:?} and {b:?} in {RUN:?}");
        std::thread::sleep(Duration::from_millis(20));
    };
    ensure!((2.5..6.0).contains(&ratio), "weights of 400 and 100 gave {ratio:.2} to 1");
    Ok(())
}
