//! What an operator does to the VCPs of a running guest, and what is done about one that stands still: with a guest that
//! verifies every byte meanwhile.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use guest_images::bare;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vcp_tests::Result;
use vcp_tests::proc::{Proc, Stream};
use vcp_tests::procfs;
use vcp_tests::target::{Kind, Spec, Target};

use crate::monitor::ring3;
use crate::support::{numbers, spread, vcp};

const STEP: Duration = Duration::from_secs(60);

/// A guest that writes and reads at random, checking everything, with an API.
pub(crate) struct Bed {
    pub(crate) proc: Proc,
    api: PathBuf,
    _dir: tempfile::TempDir,
    pub(crate) target: Target,
}

impl Bed {
    pub(crate) fn start(options: &str) -> Result<Self> {
        let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
        let disk = format!("url={},cpu=1{options}", target.url(0));
        Self::with(target, &disk)
    }

    /// With this disk, which leads to `target`.
    pub(crate) fn with(target: Target, disk: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let api = dir.path().join("api");
        let proc =
            vcp(["run", "--log", "info", "--cmdline", "job=churn secs=3600 region=8M qd=32 timeout=60"])?
                .arg("--api-socket")
                .arg(&api)
                .args(["--disk", disk, "--kernel"])
                .arg(bare::build()?)
                .keep_stdin()
                .spawn()?;
        proc.wait_line(Stream::Out, "blocks of", STEP)?;
        Ok(Self { proc, api, _dir: dir, target })
    }

    pub(crate) fn ctl(&self, args: &[&str]) -> Result<String> {
        vcp(["ctl", "--api-socket"])?.arg(&self.api).args(args).output(STEP)
    }

    /// What the monitor says of the disk's VCP.
    pub(crate) fn backend(&self) -> Result<Value> {
        let status: Value = serde_json::from_str(&self.ctl(&["status", "--json"])?)?;
        let devices = status["machine"]["devices"].as_array().context("no devices")?;
        let disk = devices.iter().find(|device| device["name"] == "disk0").context("no disk0")?;
        Ok(disk["backend"].clone())
    }

    /// Waits until requests are answered that were not yet.
    pub(crate) fn moves(&self) -> Result<()> {
        let done = |backend: &Value| backend["load"]["requests"].as_u64().unwrap_or(0);
        let pid = self.backend()?["pid"].clone();
        let before = done(&self.backend()?);
        self.until("requests are answered", |backend| backend["pid"] != pid || done(backend) > before + 100)?;
        Ok(())
    }

    pub(crate) fn until(&self, what: &str, mut is: impl FnMut(&Value) -> bool) -> Result<Value> {
        let end = Instant::now() + STEP;
        loop {
            let backend = self.backend()?;
            if is(&backend) {
                return Ok(backend);
            }
            ensure!(Instant::now() < end, "not within {STEP:?}: {what}: {backend}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The guest compares everything, and all is right; what it said last.
    pub(crate) fn finish(self) -> Result<String> {
        self.proc.say(b"q")?;
        let status = self.proc.wait(STEP)?;
        ensure!(status.success(), "{status}: {}", self.proc.tail());
        let out = self.proc.stream(Stream::Out);
        let line = out.lines().find(|line| line.starts_with("churn: ok"));
        Ok(line.with_context(|| format!("no result: {out}"))?.to_owned())
    }
}

#[test]
fn upgrades_restarts_and_moves_are_not_seen_by_the_guest() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let bed = Bed::start("")?;
    let mut pid = bed.backend()?["pid"].as_u64().context("no pid")?;
    for n in 1..=3 {
        bed.ctl(&["restart-vcp", "disk0", "--upgrade"])?;
        let backend = bed.backend()?;
        println!("upgrade {n}: pause {} us", backend["upgrade_pause_us"]);
        ensure!(backend["upgrades"] == n && backend["restarts"] == 0, "{backend}");
        ensure!(backend["pid"].as_u64() != Some(pid), "the old process is still there: {backend}");
        pid = backend["pid"].as_u64().context("no pid")?;
    }
    // The thread that serves is moved while it does.
    let held_to = |thread: &Value| -> Result<String> {
        let thread = thread.as_u64().context("no thread")?;
        let status = std::fs::read_to_string(format!("/proc/{thread}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        Ok(line.context("no list of CPUs")?.trim().to_owned())
    };
    let before = bed.backend()?;
    ensure!(held_to(&before["thread_id"])? == "1", "{before}");
    bed.ctl(&["pin", "disk0", "0"])?;
    let moved = bed.backend()?;
    ensure!(moved["thread_id"] == before["thread_id"] && held_to(&moved["thread_id"])? == "0", "{moved}");
    let status: Value = serde_json::from_str(&bed.ctl(&["status", "--json"])?)?;
    let vcpu = &status["machine"]["vcpus"][0]["thread_id"];
    for cpu in ["1", "0"] {
        bed.ctl(&["pin", "vcpu0", cpu])?;
        ensure!(held_to(vcpu)? == cpu, "the vCPU is on {}, not on {cpu}", held_to(vcpu)?);
    }
    // Kept to by the next process as well.
    bed.ctl(&["restart-vcp", "disk0"])?;
    let backend = bed.backend()?;
    ensure!(backend["restarts"] == 1 && backend["state"] == "serving" && backend["cpu"] == 0, "{backend}");
    ensure!(held_to(&backend["thread_id"])? == "0", "{backend}");
    bed.finish()?;
    Ok(())
}

/// Upgrades the VCP under load so many times; returns a report of the pauses, as the VCP counts them (nothing was taken from
/// the rings) and as the guest sees them.
fn upgraded_under_load(count: u64, options: &str) -> Result<String> {
    let bed = Bed::start(options)?;
    let (mut stops, mut early) = (Vec::new(), None::<usize>);
    let pid = |backend: &Value| backend["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    for n in 1..=count {
        let old = pid(&bed.backend()?).context("no pid")?;
        bed.ctl(&["restart-vcp", "disk0", "--upgrade"])?;
        let backend = bed.backend()?;
        ensure!(backend["upgrades"] == n && backend["restarts"] == 0, "{backend}");
        stops.push(backend["upgrade_pause_us"].as_f64().context("no pause")? / 1000.0);
        // What the monitor holds is the same each time when the old one is gone and another one stands by; while that is
        // being started it holds what is the child's as well.
        bed.until("the old one is gone, another one stands by, and nothing is held for the dead", |_| {
            let settled = procfs::children(bed.proc.pid())
                .is_ok_and(|children| children.len() == 2 && !children.contains(&old));
            let Ok(held) = procfs::descriptors(bed.proc.pid()) else { return false };
            settled && held <= *early.get_or_insert(held)
        })?;
    }
    let pauses = numbers(&bed.proc.stream(Stream::Out), " ms=");
    let result = bed.finish()?;
    Ok(format!(
        "{count} upgrades\nVCP stands still: {}\nguest, pauses of 20 ms and more: {}\n{result}",
        spread(stops),
        spread(pauses)
    ))
}

/// `cargo xtask soak upgrade`.
#[test]
#[ignore = "long: cargo xtask soak upgrade"]
fn soak_upgrades() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let count = std::env::var("VCP_SOAK_UPGRADES").ok().and_then(|n| n.parse().ok()).unwrap_or(20);
    for (name, options) in [("split", ""), ("packed", ",packed=on")] {
        println!("{name} rings: {}", upgraded_under_load(count, options)?);
    }
    Ok(())
}

#[test]
fn vcp_that_stands_still_is_killed_and_replaced() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    // Of a packed ring the monitor cannot tell that it holds work: there only what the VCP has taken counts.
    let bed = Bed::start(",watchdog=2")?;
    let pid = bed.backend()?["pid"].as_i64().context("no pid")?;
    kill_process(Pid::from_raw(pid as i32).context("no pid")?, Signal::STOP)?;
    let backend = bed.until("it is replaced", |backend| backend["restarts"] == 1)?;
    ensure!(backend["stalls"] == 1, "{backend}");
    let why = backend["last_death"].as_str().unwrap_or_default();
    ensure!(why.contains("stood still"), "{why}");
    bed.finish()?;
    Ok(())
}

#[test]
fn vcp_has_namespaces_of_its_own_and_nothing_of_the_host() -> Result<()> {
    if !ring3()? || !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let bed = Bed::start("")?;
    let pid = procfs::vcps(bed.proc.pid())?.first().copied().context("no VCP")?;
    for name in ["user", "mnt", "pid", "ipc", "uts"] {
        let of = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/{name}"));
        ensure!(of(pid)? != of(std::process::id())?, "it shares the {name} namespace");
    }
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    ensure!(
        field("Uid:").iter().all(|uid| uid.parse::<u32>().is_ok_and(|uid| uid >= 0x7000_0000)),
        "{status}"
    );
    ensure!(field("CapPrm:") == ["0000000000000000"] && field("NoNewPrivs:") == ["1"], "{status}");
    ensure!(field("Seccomp:") == ["2"], "{status}");
    // Its root directory: what a resolver needs.
    let root = std::fs::read_dir(format!("/proc/{pid}/root"))?;
    let names: Vec<String> =
        root.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    ensure!(names.iter().all(|name| name == "etc"), "{names:?}");
    // The monitor's threads.
    let tasks = std::fs::read_dir(format!("/proc/{}/task", bed.proc.pid()))?;
    for task in tasks.flatten() {
        let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let name = read("comm");
        let confined = read("status").lines().any(|line| line.split_whitespace().eq(["Seccomp:", "2"]));
        let may = name.trim_end() == "vcp-spawn";
        ensure!(confined != may, "thread {name}: confined {confined}");
    }
    bed.finish()?;
    Ok(())
}
