//! `bench blk`: `vcp-iscsi` and qemu-storage-daemon as vhost-user-blk backends of LUNs of one target, loaded by
//! `vcp bench blk`. Both backends run all the time, each on the same hardware thread when it is its turn; the target
//! and the load share the others.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use vcp_tests::proc::{Cmd, Proc};

use super::report::{Metric, Report, Row};
use super::strace::Strace;
use crate::cmd;
use crate::server::Server;

const TARGET: &str = "iqn.2026-11.vcp:bench";
const READY_WITHIN: Duration = Duration::from_secs(20);

/// A load: name, kind, bytes per request, depth.
const CASES: &[(&str, &str, &str, u32)] = &[
    ("4k randread qd1", "randread", "4k", 1),
    ("4k randread qd32", "randread", "4k", 32),
    ("4k randwrite qd1", "randwrite", "4k", 1),
    ("4k randwrite qd32", "randwrite", "4k", 32),
    ("128k read qd8", "read", "128k", 8),
    ("128k write qd8", "write", "128k", 8),
];

const METRICS: &[Metric] = &[
    Metric { title: "IOPS", more_is_better: true, digits: 0 },
    Metric { title: "MiB/s", more_is_better: true, digits: 1 },
    Metric { title: "p50 us", more_is_better: false, digits: 1 },
    Metric { title: "p99 us", more_is_better: false, digits: 1 },
    Metric { title: "CPU us/IO", more_is_better: false, digits: 2 },
    Metric { title: "syscalls/IO", more_is_better: false, digits: 2 },
];

/// What `vcp bench blk --json` prints, as far as it is used.
#[derive(Debug, Deserialize)]
struct Run {
    ios: u64,
    iops: f64,
    mib_per_s: f64,
    latency_us: Latency,
    backend_cpu_us_per_io: f64,
}

#[derive(Debug, Deserialize)]
struct Latency {
    p50: f64,
    p99: f64,
}

/// A backend that listens.
struct Contender {
    name: String,
    socket: PathBuf,
    process: Process,
}

/// Ours tells when it is ready; the peer shows it by its socket.
enum Process {
    Ours(Server),
    Peer(Proc),
}

impl Contender {
    fn pid(&self) -> u32 {
        match &self.process {
            Process::Ours(server) => server.pid(),
            Process::Peer(proc) => proc.pid(),
        }
    }
}

/// Measures and reports.
///
/// # Errors
/// A program is missing, or a run failed.
pub(crate) fn run(bin: &Path, rounds: u32, secs: u32) -> Result<()> {
    let scratch = tempfile::tempdir().context("cannot make a scratch directory")?;
    // LUNs of their own, so that neither finds the other's data in a cache; both are memory.
    let luns = ["--lun", "mem:256M", "--lun", "mem:256M", "--lun", "mem:256M"];
    let serve = ["serve", "--listen", "127.0.0.1:0", "--target", TARGET];
    let target = Server::start(&bin.join("iscsi-target"), &[&serve[..], &luns[..]].concat())?;
    let portal = target.told("addr")?;
    let cpu = backend_cpu()?;
    let contenders = [
        ours(bin, scratch.path(), "vcp-iscsi", &format!("iscsi://{portal}/{TARGET}/0"), cpu, &[])?,
        ours(
            bin,
            scratch.path(),
            "vcp-iscsi-poll0",
            &format!("iscsi://{portal}/{TARGET}/1"),
            cpu,
            &["--poll-us", "0"],
        )?,
        peer(scratch.path(), portal, cpu)?,
    ];
    // A LUN that was never written is holes; reads would measure those.
    for contender in &contenders {
        load(bin, contender, "write", "128k", 16, 1)?;
    }
    let mut rows = Vec::new();
    for &(case, rw, bs, qd) in CASES {
        let mut measured = vec![vec![Vec::new(); METRICS.len()]; contenders.len()];
        for _ in 0..rounds {
            for (contender, values) in contenders.iter().zip(&mut measured) {
                let run = load(bin, contender, rw, bs, qd, secs)?;
                let figures = [
                    run.iops,
                    run.mib_per_s,
                    run.latency_us.p50,
                    run.latency_us.p99,
                    run.backend_cpu_us_per_io,
                ];
                values.iter_mut().zip(figures).for_each(|(all, figure)| all.push(figure));
            }
        }
        for (contender, values) in contenders.iter().zip(&mut measured) {
            // Counted in a run of its own: being traced costs time.
            let strace = Strace::attach(contender.pid())?;
            let run = load(bin, contender, rw, bs, qd, 1)?;
            values[METRICS.len() - 1].push(strace.finish()? as f64 / run.ios.max(1) as f64);
        }
        for (contender, rounds) in contenders.iter().zip(measured) {
            rows.push(Row {
                case: case.into(),
                contender: contender.name.clone(),
                rounds,
                summary: Vec::new(),
            });
        }
        eprintln!("measured: {case}");
    }
    let preface = vec![
        format!(
            "vhost-user-blk backends of memory LUNs of one embedded target; {rounds} rounds of {secs} s, taking turns"
        ),
        format!(
            "each backend on hardware thread {cpu}, target and load on the others; load: vcp bench blk, waiting for calls"
        ),
        "vcp-iscsi: default polling (adaptive); vcp-iscsi-poll0: --poll-us 0".into(),
        format!(
            "peer: {}",
            cmd::output(Command::new("qemu-storage-daemon").arg("--version"))?.lines().next().unwrap_or("")
        ),
    ];
    Report { name: "blk", preface, metrics: METRICS.to_vec(), rows }.finish()
}

/// The last hardware thread that we may use; the load and the target are kept off it.
fn backend_cpu() -> Result<usize> {
    let allowed = rustix::thread::sched_getaffinity(None)?;
    let last = (0..rustix::thread::CpuSet::MAX_CPU).rev().find(|&cpu| allowed.is_set(cpu));
    let Some(last) = last.filter(|_| allowed.count() > 1) else {
        bail!("this benchmark needs at least two hardware threads");
    };
    Ok(last)
}

fn ours(bin: &Path, scratch: &Path, name: &str, url: &str, cpu: usize, more: &[&str]) -> Result<Contender> {
    let socket = scratch.join(format!("{name}.sock"));
    let (cpu, path) = (cpu.to_string(), socket.display().to_string());
    let serve = ["serve", "--cpu", &cpu, "--socket-path", &path, url];
    let server = Server::start(&bin.join("vcp-iscsi"), &[&serve[..], more].concat())?;
    Ok(Contender { name: name.into(), process: Process::Ours(server), socket })
}

fn peer(scratch: &Path, portal: &str, cpu: usize) -> Result<Contender> {
    let socket = scratch.join("peer.sock");
    let proc = Cmd::new("taskset")
        .args(["-c", &cpu.to_string(), "qemu-storage-daemon", "--blockdev"])
        .arg(format!("driver=iscsi,node-name=disk,transport=tcp,portal={portal},target={TARGET},lun=2"))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=disk,node-name=disk,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        ))
        // taskset becomes the daemon, so the process id is the daemon's.
        .spawn()?;
    let deadline = Instant::now() + READY_WITHIN;
    while !socket.exists() {
        if !proc.is_running() || Instant::now() > deadline {
            bail!("qemu-storage-daemon does not listen: {}", proc.tail());
        }
        std::thread::yield_now();
    }
    Ok(Contender { name: "qemu-storage-daemon".into(), process: Process::Peer(proc), socket })
}

fn load(bin: &Path, contender: &Contender, rw: &str, bs: &str, qd: u32, secs: u32) -> Result<Run> {
    let mut command = Command::new(bin.join("vcp"));
    command.args(["bench", "blk", "--json", "--rw", rw, "--bs", bs, "--socket"]).arg(&contender.socket);
    command.args(["--qd", &qd.to_string(), "--secs", &secs.to_string()]);
    command.args(["--pid", &contender.pid().to_string()]);
    let text = cmd::output(&mut command).with_context(|| format!("load on {}", contender.name))?;
    serde_json::from_str(&text).with_context(|| format!("`vcp bench blk` printed `{text}`"))
}
