//! `bench blk`: `vcp-iscsi` and qemu-storage-daemon as vhost-user-blk backends of LUNs of one target, loaded by
//! `vcp bench blk`. All backends run all the time, each on the same hardware thread when it is its turn; target and load
//! are kept off it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use vcp_tests::proc::{Cmd, Proc};
use vcp_tests::procfs;

use super::goals;
use super::matrix::{self, Case};
use super::report::{Metric, Report, Row};
use super::strace::Strace;
use crate::cmd;
use crate::server::Server;

const TARGET: &str = "iqn.2026-11.vcp:bench";
const READY_WITHIN: Duration = Duration::from_secs(20);

/// Size of each LUN: more than the processor caches hold.
const LUN_BYTES: u64 = 256 << 20;
/// Seconds of load under strace, which slows it down.
const STRACE_SECS: f64 = 0.5;
/// Seconds of each load before anything is counted: set-up, and what polling learns.
const WARM_UP_SECS: f64 = 0.2;

/// In the order that [`goals`] knows.
const METRICS: &[Metric] = &[
    Metric { title: "IOPS", more_is_better: true, digits: 0 },
    Metric { title: "MiB/s", more_is_better: true, digits: 1 },
    Metric { title: "p50 us", more_is_better: false, digits: 1 },
    Metric { title: "p99 us", more_is_better: false, digits: 1 },
    Metric { title: "CPU us/IO", more_is_better: false, digits: 2 },
    Metric { title: "target CPU us/IO", more_is_better: false, digits: 2 },
    Metric { title: "syscalls/IO", more_is_better: false, digits: 2 },
    Metric { title: "load CPU us/IO", more_is_better: false, digits: 2 },
];

/// What `vcp bench blk --json` prints, as far as it is used.
#[derive(Debug, Deserialize)]
struct Run {
    ios: u64,
    warm_up_ios: u64,
    counted_from: f64,
    counted_to: f64,
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
    /// The load comes from a program without a guest.
    msgq: bool,
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

/// How much is measured.
pub(crate) struct Extent {
    /// The whole matrix, not only the quick loads.
    pub(crate) full: bool,
    /// Rounds; the contenders take turns.
    pub(crate) rounds: u32,
    /// Seconds of load per case, contender and round.
    pub(crate) secs: f64,
}

/// Hardware threads for everybody.
struct Layout {
    /// The backend's, alone.
    backend: String,
    /// The target's.
    target: String,
    /// The load's; with only two hardware threads the target's as well.
    load: String,
}

impl Layout {
    fn choose() -> Result<Self> {
        let allowed = rustix::thread::sched_getaffinity(None)?;
        let mut cpus: Vec<usize> =
            (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).collect();
        let (Some(backend), false) = (cpus.pop(), cpus.is_empty()) else {
            bail!("this benchmark needs at least two hardware threads");
        };
        let target = cpus[0];
        let load = if cpus.len() > 1 { cpus.split_off(1) } else { cpus };
        let list = |cpus: &[usize]| cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        Ok(Self { backend: list(&[backend]), target: list(&[target]), load: list(&load) })
    }

    fn describe(&self) -> String {
        let shared = if self.load == self.target {
            "; these two share it, so IOPS end where that thread is busy (target CPU us/IO and the load's), \
             whatever the backend could do"
        } else {
            ""
        };
        format!(
            "hardware threads: backend {}, target {}, load {}{shared}",
            self.backend, self.target, self.load
        )
    }
}

/// Measures and reports.
///
/// # Errors
/// A program is missing, or a run failed.
pub(crate) fn run(bin: &Path, extent: &Extent) -> Result<()> {
    let started = Instant::now();
    let scratch = tempfile::tempdir().context("cannot make a scratch directory")?;
    let layout = Layout::choose()?;
    // LUNs of their own, so that nobody finds another's data in a cache; all are memory.
    let lun = format!("mem:{LUN_BYTES}");
    let mut serve: Vec<&str> = vec!["-c", &layout.target];
    let program = bin.join("iscsi-target");
    serve.push(program.to_str().context("the path of the programs is not UTF-8")?);
    serve.extend(["serve", "--listen", "127.0.0.1:0", "--target", TARGET]);
    serve.extend(["--lun", lun.as_str()].repeat(6));
    let target = Server::start(Path::new("taskset"), &serve)?;
    let portal = target.told("addr")?;
    let url = |lun: u32| format!("iscsi://{portal}/{TARGET}/{lun}");
    let digests = ["--poll-us", "0", "--header-digest", "crc32c", "--data-digest", "crc32c"];
    let contenders = [
        ours(bin, scratch.path(), goals::DEFAULT, &url(0), &layout, &[])?,
        ours(bin, scratch.path(), goals::POLL_0, &url(1), &layout, &["--poll-us", "0"])?,
        ours(bin, scratch.path(), goals::POLL_100, &url(2), &layout, &["--poll-us", "100"])?,
        ours(bin, scratch.path(), goals::DIGESTS, &url(3), &layout, &digests)?,
        without_guest(bin, scratch.path(), &url(5), &layout)?,
        peer(scratch.path(), portal, 4, &layout)?,
    ];
    let bench = Bench { bin, layout: &layout, target: target.pid(), library: url(5) };
    // A block that was never written is a hole; reads would measure those.
    let fill = Case { rw: "write", kib: 128, depth: 16, queues: 1 };
    for contender in &contenders {
        // It begins at the start of the disk each time, so one run has to get around.
        let mut secs = 0.5;
        loop {
            let run = bench.load(contender, &fill, secs)?;
            if run.warm_up_ios + run.ios >= LUN_BYTES >> 17 {
                break;
            }
            secs *= 2.0;
        }
    }
    let cases = if extent.full { matrix::full() } else { matrix::quick() };
    let mut rows = Vec::new();
    for case in &cases {
        let (measured, library) = bench.case(&contenders, case, extent)?;
        let names = contenders.iter().map(|contender| contender.name.clone());
        let library = library.map(|rounds| (goals::LIBRARY.to_owned(), rounds));
        for (contender, rounds) in names.zip(measured).chain(library) {
            rows.push(Row { case: case.name(), contender, rounds, summary: Vec::new() });
        }
        eprintln!("measured after {} s: {}", started.elapsed().as_secs(), case.name());
    }
    let preface = vec![
        format!(
            "vhost-user-blk backends of memory LUNs of one embedded target; {} rounds of {} s, taking turns",
            extent.rounds, extent.secs
        ),
        layout.describe(),
        super::space::describe()?,
        "vcp-iscsi: default polling; poll=N: --poll-us N; crc32c: header and data digests; \
         msgq: default polling, loaded by a program without a guest"
            .into(),
        "libiscsi: its iscsi-perf, load and initiator in one process on the backend's hardware thread, reading only; \
         CPU us/IO is all that this process takes; of the others it is the backend's, to which the load's comes (that of a \
         program without a guest is the program's own part of each request)"
            .into(),
        "load: vcp bench blk, waiting for calls; qdN: requests in flight on each queue, xN: queues".into(),
        format!(
            "peer: {}",
            cmd::output(Command::new("qemu-storage-daemon").arg("--version"))?.lines().next().unwrap_or("")
        ),
    ];
    Report { name: "blk", preface, metrics: METRICS.to_vec(), rows, goals: Vec::new() }.finish(goals::judge)
}

/// What all loads need.
struct Bench<'a> {
    bin: &'a Path,
    layout: &'a Layout,
    target: u32,
    /// The URL for the library's own program, which only reads: the unit of a contender, which is larger than any cache.
    library: String,
}

/// For each metric, the values of all rounds.
type Rounds = Vec<Vec<f64>>;

impl Bench<'_> {
    /// All rounds of a case: of each contender, and of libiscsi's program if it knows this load.
    fn case(
        &self,
        contenders: &[Contender],
        case: &Case,
        extent: &Extent,
    ) -> Result<(Vec<Rounds>, Option<Rounds>)> {
        let mut library =
            (case.rw == "randread" && case.queues == 1).then(|| vec![Vec::new(); METRICS.len()]);
        let mut measured = vec![vec![Vec::new(); METRICS.len()]; contenders.len()];
        for _ in 0..extent.rounds {
            for (contender, values) in contenders.iter().zip(&mut measured) {
                let (before, own) = (procfs::cpu_time(self.target)?, children_cpu());
                let run = self.load(contender, case, extent.secs)?;
                let own = children_cpu().saturating_sub(own);
                let all = (run.warm_up_ios + run.ios).max(1) as f64;
                values[goals::LOAD].push(own.as_secs_f64() * 1e6 / all);
                let target = procfs::cpu_time(self.target)?.saturating_sub(before);
                let figures = [
                    run.iops,
                    run.mib_per_s,
                    run.latency_us.p50,
                    run.latency_us.p99,
                    run.backend_cpu_us_per_io,
                    target.as_secs_f64() * 1e6 / all,
                ];
                values.iter_mut().zip(figures).for_each(|(all, figure)| all.push(figure));
            }
            if let Some(values) = &mut library {
                let (iops, cpu_us) = self.perf(case, extent.secs.ceil() as u32)?;
                values[goals::IOPS].push(iops);
                values[goals::CPU].push(cpu_us);
            }
        }
        for (contender, values) in contenders.iter().zip(&mut measured) {
            // Counted in a run of its own: being traced costs time.
            let strace = Strace::attach(contender.pid())?;
            let run = self.load(contender, case, STRACE_SECS)?;
            let calls = strace.finish(&(run.counted_from..run.counted_to))?;
            values[goals::SYSCALLS].push(calls as f64 / run.ios.max(1) as f64);
        }
        Ok((measured, library))
    }

    /// libiscsi's `iscsi-perf`: mean IOPS, and its processor time for each request.
    fn perf(&self, case: &Case, secs: u32) -> Result<(f64, f64)> {
        let (depth, blocks) = (case.depth.to_string(), (case.kib * 2).to_string());
        let before = children_cpu();
        let text = Cmd::new("taskset")
            .args(["-c", &self.layout.backend, "iscsi-perf", "-m", &depth, "-r", "-b", &blocks])
            .args(["-t", &secs.to_string(), &self.library])
            .output(Duration::from_secs(u64::from(secs) + 30))?;
        let cpu = children_cpu().saturating_sub(before);
        let iops = super::target::iops(&text)
            .with_context(|| format!("no figure in iscsi-perf's output: {text}"))?;
        Ok((iops, cpu.as_secs_f64() * 1e6 / (iops * f64::from(secs)).max(1.0)))
    }

    fn load(&self, contender: &Contender, case: &Case, secs: f64) -> Result<Run> {
        let mut command = Command::new("taskset");
        command.args(["-c", &self.layout.load]).arg(self.bin.join("vcp"));
        command.args(["bench", "blk", "--json", "--rw", case.rw, "--socket"]).arg(&contender.socket);
        command.args(["--bs", &format!("{}k", case.kib), "--qd", &case.depth.to_string()]);
        command.args(["--queues", &case.queues.to_string(), "--secs", &secs.to_string()]);
        command.args(["--warm-up", &WARM_UP_SECS.to_string()]);
        command.args(["--pid", &contender.pid().to_string()]);
        if contender.msgq {
            command.arg("--msgq");
        }
        let text = cmd::output(&mut command)
            .with_context(|| format!("load {} on {}", case.name(), contender.name))?;
        serde_json::from_str(&text).with_context(|| format!("`vcp bench blk` printed `{text}`"))
    }
}

/// Processor time of all programs that were started here and have ended. Those that are still there do not count.
fn children_cpu() -> Duration {
    let ticks = rustix::param::clock_ticks_per_second();
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name: state is field 3; cutime and cstime are fields 16 and 17.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let spent: u64 = fields.skip(13).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_nanos(spent * 1_000_000_000 / ticks.max(1))
}

fn ours(
    bin: &Path,
    scratch: &Path,
    name: &str,
    url: &str,
    layout: &Layout,
    more: &[&str],
) -> Result<Contender> {
    let socket = scratch.join(format!("{}.sock", name.replace(' ', "-")));
    let path = socket.display().to_string();
    let serve = ["serve", "--cpu", &layout.backend, "--queues", "4", "--socket-path", &path, url];
    let server = Server::start(&bin.join("vcp-iscsi"), &[&serve[..], more].concat())?;
    Ok(Contender { name: name.into(), process: Process::Ours(server), socket, msgq: false })
}

/// Ours, for a program without a guest.
fn without_guest(bin: &Path, scratch: &Path, url: &str, layout: &Layout) -> Result<Contender> {
    let socket = scratch.join("msgq.sock");
    let path = socket.display().to_string();
    let serve = ["serve", "--cpu", &layout.backend, "--msgq-path", &path, url];
    let server = Server::start(&bin.join("vcp-iscsi"), &serve)?;
    Ok(Contender { name: goals::MSGQ.into(), process: Process::Ours(server), socket, msgq: true })
}

fn peer(scratch: &Path, portal: &str, lun: u32, layout: &Layout) -> Result<Contender> {
    let socket = scratch.join("peer.sock");
    let proc = Cmd::new("taskset")
        .args(["-c", &layout.backend, "qemu-storage-daemon", "--blockdev"])
        .arg(format!("driver=iscsi,node-name=disk,transport=tcp,portal={portal},target={TARGET},lun={lun}"))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=disk,node-name=disk,writable=on,num-queues=4,addr.type=unix,addr.path={}",
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
    Ok(Contender { name: goals::PEER.into(), process: Process::Peer(proc), socket, msgq: false })
}
