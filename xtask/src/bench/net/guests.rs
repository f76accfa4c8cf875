//! The user-mode stack beside passt and QEMU's own (libslirp): the same stock Debian guest under the same emulation, the
//! same servers on the host's loopback. TCP and UDP either way, requests and responses, and what it costs to do nothing.
//!
//! Processor time is that of the back end and of QEMU's first thread together: libslirp is a part of that thread, and for
//! the others it carries the interrupts. The virtual CPUs are emulated, which is what everybody's rates end at.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vcp_tests::guest::{Outcome, QemuGuest, Running};
use vcp_tests::proc::{Cmd, Proc};
use vcp_tests::procfs::{cpu_time, cpu_time_of_first};

use super::super::goals::Goal;
use super::super::report::{Metric, Report, Row};
use super::super::stats::ratio;
use crate::server::Server;

const MAC: &str = "52:54:00:00:00:01";
pub(super) const IPERF: &str = "/usr/bin/iperf3";
const SOCKPERF: &str = "/usr/bin/sockperf";
/// How long something that starts may take.
const START: Duration = Duration::from_secs(20);

/// Who serves the guest. Ours first: others are compared with it.
pub(super) const CONTENDERS: [&str; 4] = ["vcp-net", "vcp-net poll=always", "passt", "libslirp"];

/// A load: its name, and the arguments of iperf3.
const LOADS: [(&str, &str); 8] = [
    ("TCP from the guest", ""),
    ("TCP to the guest", "-R"),
    ("TCP from the guest, 4 connections", "-P 4"),
    ("TCP to the guest, 4 connections", "-P 4 -R"),
    ("TCP both ways", "--bidir"),
    ("UDP from the guest, 1400 bytes", "-u -b 0 -l 1400"),
    ("UDP to the guest, 1400 bytes, 50 Mbit/s", "-u -b 50M -l 1400 -R"),
    ("UDP to the guest, 1400 bytes, 400 Mbit/s", "-u -b 400M -l 1400 -R"),
];

const METRICS: &[Metric] = &[
    Metric { title: "Mbit/s", more_is_better: true, digits: 0 },
    Metric { title: "CPU s per GB", more_is_better: false, digits: 2 },
    Metric { title: "% lost", more_is_better: false, digits: 2 },
];
const TIMES: &[Metric] = &[
    Metric { title: "p50 us", more_is_better: false, digits: 1 },
    Metric { title: "p99 us", more_is_better: false, digits: 1 },
    Metric { title: "idle CPU %", more_is_better: false, digits: 2 },
];
const PING_PONG: &str = "TCP request and response, 64 bytes";

/// Shell: `load NUMBER ARGS` runs iperf3, and tells of the rate and the loss at the receiver.
pub(super) const LOAD: &str = r#"lease guest1; value LEASE $(cat /tmp/lease)
load() {
    at=$1; shift; n=20; value START$at now
    until iperf3 -c 10.0.2.2 -f m "$@" >/tmp/iperf 2>&1; do
        n=$((n - 1)); [ $n -gt 0 ] || { cat /tmp/iperf; die iperf3 $at; }
        sleep 0.2
        value START$at again
    done
    value RATE$at $(grep receiver /tmp/iperf | grep -v SUM | awk '{ for (i = 1; i <= NF; i++) if ($i ~ /bits.sec/) sum += $(i - 1) } END { printf "%.1f", sum }')
    value LOST$at $(grep receiver /tmp/iperf | grep -o '([0-9.e+-]*%)' | tr -d '(%)')
    value SENT$at $(grep receiver /tmp/iperf | grep -o '/[0-9]* ' | tr -d '/ ')
    value DONE$at now
}
"#;

/// What the guest does. The host looks at clocks where it says START and DONE.
fn job(iperf: u16, sockperf: u16, secs: u32) -> String {
    let mut job = LOAD.to_owned();
    for (at, (_, args)) in LOADS.iter().enumerate() {
        job.push_str(&format!("load {at} -p {iperf} -t {secs} {args}\n"));
    }
    job.push_str(&format!(
        "sockperf pp --tcp --full-rtt -i 10.0.2.2 -p {sockperf} -m 64 -t {secs} >/tmp/pp 2>&1 || {{ cat /tmp/pp; die sockperf; }}\n\
         value P50 $(grep 'percentile 50.000' /tmp/pp | grep -o '[0-9.]*$')\n\
         value P99 $(grep 'percentile 99.000' /tmp/pp | grep -o '[0-9.]*$')\n\
         sleep 1; value STARTIDLE now; sleep {secs}; value DONEIDLE now\n"
    ));
    job
}

/// The processes that serve a guest besides QEMU, which end with this.
pub(super) enum BackEnd {
    Ours(Server),
    Theirs(Proc),
    Inside,
}

impl BackEnd {
    pub(super) fn start(bin: &Path, dir: &Path, contender: &str) -> Result<(Self, QemuGuest)> {
        let socket = dir.join("p0");
        let _ = std::fs::remove_file(&socket);
        let guest = QemuGuest::new();
        Ok(match contender {
            "libslirp" => (Self::Inside, guest.netdev("user", MAC)),
            "passt" => {
                let path = socket.display().to_string();
                // Where it maps the gateway to the host's loopback, as the others do.
                let args = ["-f", "-s", &path, "-a", "10.0.2.15", "-n", "24", "-g", "10.0.2.2"];
                let proc = Cmd::new("passt").args(args).spawn()?;
                let end = Instant::now() + START;
                while !socket.exists() {
                    ensure!(proc.is_running() && Instant::now() < end, "no passt: {}", proc.tail());
                    std::thread::sleep(Duration::from_millis(5));
                }
                let netdev = format!("stream,server=off,addr.type=unix,addr.path={path}");
                (Self::Theirs(proc), guest.netdev(&netdev, MAC))
            }
            _ => {
                let port = format!("socket={}", socket.display());
                let control = super::control(&socket).display().to_string();
                let _ = std::fs::remove_file(&control);
                let mut args = vec!["serve", "--control", &control, "--port", &port, "--uplink", "user"];
                if contender != CONTENDERS[0] {
                    args.extend(["--poll-us", "always"]);
                }
                let server = Server::start(&bin.join("vcp-net"), &args)?;
                (Self::Ours(server), guest.net(&socket, MAC, ""))
            }
        })
    }

    /// Processor time so far, with that of QEMU's first thread.
    fn cpu(&self, guest: &Running) -> Result<Duration> {
        let own = match self {
            Self::Ours(server) => cpu_time(server.pid())?,
            Self::Theirs(proc) => cpu_time(proc.pid())?,
            Self::Inside => Duration::ZERO,
        };
        Ok(own + cpu_time_of_first(guest.pid())?)
    }
}

/// What a guest saw.
struct Seen {
    /// For each load: rate, processor time, loss.
    loads: Vec<[f64; 3]>,
    times: [f64; 3],
}

/// A directory for sockets. passt does not stay root.
pub(super) fn scratch() -> Result<tempfile::TempDir> {
    let scratch = tempfile::tempdir().context("no directory for sockets")?;
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(scratch.path(), open).context("cannot open the directory for passt")?;
    Ok(scratch)
}

/// Measures and reports.
///
/// # Errors
/// A program is missing, or a run failed.
pub(super) fn run(bin: &Path, rounds: u32, secs: u32) -> Result<()> {
    let scratch = scratch()?;
    let mut seen: Vec<Vec<Seen>> = CONTENDERS.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for (contender, seen) in CONTENDERS.iter().zip(&mut seen) {
            let one = one(bin, scratch.path(), contender, secs);
            seen.push(one.with_context(|| format!("the guest of {contender}"))?);
            eprintln!("measured: {contender}");
        }
    }
    let row = |case: &str, contender: &str, rounds: Vec<[f64; 3]>| Row {
        case: case.into(),
        contender: contender.into(),
        rounds: (0..3).map(|at| rounds.iter().map(|round| round[at]).collect()).collect(),
        summary: Vec::new(),
    };
    let mut rows = Vec::new();
    for (at, (case, _)) in LOADS.iter().enumerate() {
        for (contender, seen) in CONTENDERS.iter().zip(&seen) {
            rows.push(row(case, contender, seen.iter().map(|seen| seen.loads[at]).collect()));
        }
    }
    let times = CONTENDERS.iter().zip(&seen);
    let times = times.map(|(who, seen)| row(PING_PONG, who, seen.iter().map(|it| it.times).collect()));
    let times = times.collect();
    let preface = |what: &str| {
        vec![
            format!("{what}; {rounds} rounds of {secs} s"),
            "a stock Debian guest in QEMU (TCG, 2 CPUs, MTU 1500), servers on the host's loopback; CPU: back end and \
             QEMU's first thread"
                .into(),
        ]
    };
    let preface_loads = preface("TCP and UDP through user-mode stacks (iperf3)");
    let loads = Report {
        name: "net-guest",
        preface: preface_loads,
        metrics: METRICS.to_vec(),
        rows,
        goals: Vec::new(),
    };
    loads.finish(judge_loads)?;
    let preface = preface("requests and responses through user-mode stacks (sockperf), and doing nothing");
    Report { name: "net-times", preface, metrics: TIMES.to_vec(), rows: times, goals: Vec::new() }
        .finish(judge_times)
}

fn figure(rows: &[Row], case: &str, contender: &str, at: usize) -> Option<f64> {
    let row = rows.iter().find(|row| row.case == case && row.contender == contender)?;
    row.summary.get(at).map(|summary| summary.median)
}

fn judge_loads(rows: &[Row]) -> Vec<Goal> {
    let mut goals = Vec::new();
    for (case, _) in &LOADS[..2] {
        for peer in &CONTENDERS[2..] {
            let of = |at: usize| {
                Some(ratio(figure(rows, case, CONTENDERS[0], at)?, figure(rows, case, peer, at)?))
            };
            let (Some(rate), Some(cpu)) = (of(0), of(1)) else { continue };
            let what = |what: &str| format!("{case}: {what}, of {peer}'s");
            goals.push(Goal { what: what("rate"), measured: rate, bound: 4.0, at_least: true });
            goals.push(Goal { what: what("CPU per byte"), measured: cpu, bound: 1.0 / 3.0, at_least: false });
        }
    }
    goals
}

fn judge_times(rows: &[Row]) -> Vec<Goal> {
    let of = |contender: &str, at: usize| figure(rows, PING_PONG, contender, at);
    let at_most = |what: &str, measured: Option<f64>, bound: f64| {
        measured.map(|measured| Goal { what: what.into(), measured, bound, at_least: false })
    };
    let beside = of(CONTENDERS[0], 0).zip(of("passt", 0)).map(|(ours, theirs)| ratio(ours, theirs));
    [
        at_most("request and response, p50, where it may sleep: of passt's", beside, 1.2),
        at_most("idle CPU, percent", of(CONTENDERS[0], 2), 1.0),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// One guest of one contender.
fn one(bin: &Path, dir: &Path, contender: &str, secs: u32) -> Result<Seen> {
    let (iperf_port, sockperf_port) = (vcp_tests::port::free()?, vcp_tests::port::free()?);
    let port = iperf_port.to_string();
    let _iperf = Cmd::new(IPERF).args(["-s", "-B", "127.0.0.1", "-p", &port]).spawn()?;
    let port = sockperf_port.to_string();
    let _sockperf = Cmd::new(SOCKPERF).args(["sr", "--tcp", "-i", "127.0.0.1", "-p", &port]).spawn()?;
    let (back_end, guest) = BackEnd::start(bin, dir, contender)?;
    let guest =
        guest.program(IPERF).program(SOCKPERF).deadline(Duration::from_secs(120 + 30 * u64::from(secs)));
    let mut running = guest.start(&job(iperf_port, sockperf_port, secs))?;
    let mut cpu = Vec::new();
    let mut between = |running: &mut Running, name: &str| -> Result<()> {
        running.wait_value(&format!("START{name}"))?;
        let (before, begin) = (back_end.cpu(running)?, Instant::now());
        running.wait_value(&format!("DONE{name}"))?;
        cpu.push(((back_end.cpu(running)? - before).as_secs_f64(), begin.elapsed().as_secs_f64()));
        Ok(())
    };
    for at in 0..LOADS.len() {
        between(&mut running, &at.to_string())?;
    }
    between(&mut running, "IDLE")?;
    let done = running.wait()?;
    if done.status != 0 {
        bail!("the guest's job failed:\n{}", done.console);
    }
    let mut loads = Vec::new();
    for (at, (used, _)) in cpu.iter().take(LOADS.len()).enumerate() {
        let rate = number(&done, &format!("RATE{at}"))?;
        let lost = number(&done, &format!("LOST{at}")).unwrap_or(0.0);
        let gigabytes = rate * f64::from(secs) / 8000.0;
        loads.push([rate, ratio(*used, gigabytes), lost]);
    }
    let (used, took) = cpu[LOADS.len()];
    let times = [number(&done, "P50")?, number(&done, "P99")?, 100.0 * used / took];
    Ok(Seen { loads, times })
}

pub(super) fn number(done: &Outcome, name: &str) -> Result<f64> {
    let value = done.value(name)?;
    value
        .split_whitespace()
        .next()
        .and_then(|it| it.parse().ok())
        .with_context(|| format!("{name} is {value:?}"))
}
