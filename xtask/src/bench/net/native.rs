//! User-mode TCP at native speed: `vcp-net` and passt behind the same guest ([`vcp_tests::native`]), a process with one thread
//! that looks at its end all the time and copies nothing. So the back end is what ends the rates; an emulated guest
//! ([`super::guests`]) ends them itself. libslirp has no socket by which such a guest could reach it.
//!
//! A back end gets frames as its guests would give them to it: `vcp-net` rows of segments by vhost-user, and without offloads
//! single ones; passt segments of the MTU by the stream socket of QEMU, with checksums (which cost the guest next to
//! nothing: it sends zeroes), and it is spared that the guest checks what it sends.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use vcp_tests::native::wait_for;
use vcp_tests::proc::{Cmd, Proc};

use super::super::goals::Goal;
use super::super::report::{Metric, Report, Row};
use super::super::{space, stats::ratio};
use crate::cmd;
use crate::server::Server;

/// The hardware thread of the back end; guest and server have number 0.
const THEIRS: &str = "1";
/// How long a guest may take besides its transfers.
const GUEST: Duration = Duration::from_secs(60);

const OURS_FIRST: &str = "vcp-net";
const ALWAYS: &str = "vcp-net poll=always";
const SLEEPS: &str = "vcp-net poll=0";
const PLAIN: &str = "vcp-net without offloads";
const PASST: &str = "passt";
const PASST_WIDE: &str = "passt MTU 65520";
const CONTENDERS: [&str; 6] = [OURS_FIRST, ALWAYS, SLEEPS, PLAIN, PASST, PASST_WIDE];

const FROM: &str = "TCP from the guest";
const TO: &str = "TCP to the guest";
const AT_ONCE: &str = "request and response, one after the other";
const AFTER_GAPS: &str = "request and response after 1.5 ms of nothing";

const METRICS: &[Metric] = &[
    Metric { title: "Mbit/s", more_is_better: true, digits: 0 },
    Metric { title: "CPU s per GB", more_is_better: false, digits: 3 },
];
const TIMES: &[Metric] = &[
    Metric { title: "p50 us", more_is_better: false, digits: 1 },
    Metric { title: "p99 us", more_is_better: false, digits: 1 },
];

/// The processes that serve the guest, which end with this.
enum BackEnd {
    Ours(Server),
    Theirs(Proc),
}

impl BackEnd {
    fn start(bin: &Path, socket: &Path, contender: &str) -> Result<Self> {
        let _ = std::fs::remove_file(socket);
        let path = socket.display().to_string();
        if contender.starts_with(PASST) {
            let proc = Cmd::new("taskset")
                .args(["-c", THEIRS, "passt", "-f", "-s", &path, "-a", "10.0.2.15", "-n", "24"])
                .args(["-g", "10.0.2.2", "-m", if contender == PASST_WIDE { "65520" } else { "1500" }])
                .spawn()?;
            wait_for(socket).with_context(|| format!("no passt: {}", proc.tail()))?;
            return Ok(Self::Theirs(proc));
        }
        let port = format!("socket={path}");
        let poll = match contender {
            ALWAYS => "always",
            SLEEPS => "0",
            _ => "adaptive",
        };
        let args = ["serve", "--cpu", THEIRS, "--poll-us", poll, "--port", &port, "--uplink", "user"];
        Ok(Self::Ours(Server::start(&bin.join("vcp-net"), &args)?))
    }

    fn pid(&self) -> u32 {
        match self {
            Self::Ours(server) => server.pid(),
            Self::Theirs(proc) => proc.pid(),
        }
    }
}

/// What a round of a contender gave: for each case its figures.
type Seen = Vec<(&'static str, [f64; 2])>;

/// Measures and reports.
///
/// # Errors
/// A program is missing, or a run failed.
pub(super) fn run(bin: &Path, rounds: u32, secs: f64) -> Result<()> {
    let again = ["bench", "net", "--part", "native", "--rounds", &rounds.to_string(), "--secs"];
    let mut again = again.map(str::to_owned).to_vec();
    again.push((secs * 2.0).to_string());
    if space::run_again(&again)? {
        return Ok(());
    }
    let guest = ["build", "--release", "-p", "vcp-tests", "--bin", "native-guest"];
    cmd::run(cmd::cargo().args(guest))?;
    let scratch = tempfile::tempdir().context("no directory for sockets")?;
    interface()?;
    // passt does not stay root.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(scratch.path(), open).context("cannot open the directory for passt")?;
    let mut seen: Vec<Vec<Seen>> = CONTENDERS.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for (contender, seen) in CONTENDERS.iter().zip(&mut seen) {
            let one = one(bin, scratch.path(), contender, secs);
            seen.push(one.with_context(|| format!("the guest of {contender}"))?);
        }
        eprintln!("measured: a round");
    }
    let rows = |cases: [&'static str; 2]| -> Vec<Row> {
        let mut rows = Vec::new();
        for case in cases {
            for (contender, rounds) in CONTENDERS.iter().zip(&seen) {
                let figures = |round: &Seen| round.iter().find(|(name, _)| *name == case).map(|(_, it)| *it);
                let figures: Vec<[f64; 2]> = rounds.iter().filter_map(figures).collect();
                if figures.is_empty() {
                    continue;
                }
                rows.push(Row {
                    case: case.into(),
                    contender: (*contender).into(),
                    rounds: (0..2).map(|at| figures.iter().map(|it| it[at]).collect()).collect(),
                    summary: Vec::new(),
                });
            }
        }
        rows
    };
    let preface = |what: &str| -> Result<Vec<String>> {
        Ok(vec![
            format!("{what}; MTU 1500 but where it is named; {rounds} rounds of {secs} s"),
            "guest and server: one thread that never sleeps and copies no payload, on hardware thread 0; back end on 1; CPU: \
             the back end's"
                .into(),
            space::describe()?,
        ])
    };
    let (metrics, goals) = (METRICS.to_vec(), Vec::new());
    let name = "net-native";
    let about = preface("TCP through user-mode stacks at native speed")?;
    Report { name, preface: about, metrics, rows: rows([FROM, TO]), goals }.finish(judge)?;
    let (metrics, goals) = (TIMES.to_vec(), Vec::new());
    let name = "net-native-times";
    let about = preface("requests of 64 bytes through user-mode stacks at native speed")?;
    Report { name, preface: about, metrics, rows: rows([AT_ONCE, AFTER_GAPS]), goals }.finish(judge_times)
}

/// passt takes its routes from an interface; in a namespace of its own there is none yet.
fn interface() -> Result<()> {
    let ip = |words: &str| cmd::run(Command::new("ip").args(words.split(' ')));
    if cmd::output(Command::new("ip").args(["route", "show", "default"]))?.trim().is_empty() {
        ip("link add native0 type veth peer name native1")?;
        ip("address add 192.0.2.2/24 dev native0")?;
        ip("link set native0 up")?;
        ip("link set native1 up")?;
        ip("route add default via 192.0.2.1")?;
    }
    Ok(())
}

fn one(bin: &Path, dir: &Path, contender: &str, secs: f64) -> Result<Seen> {
    let socket = dir.join("p0");
    let back_end = BackEnd::start(bin, &socket, contender)?;
    let kind = match contender {
        PASST | PASST_WIDE => "stream",
        PLAIN => "plain",
        _ => "rings",
    };
    let mtu = if contender == PASST_WIDE { "65520" } else { "1500" };
    let guest = Cmd::new(bin.join("native-guest")).arg(kind).arg(&socket).arg(mtu);
    let guest = guest.arg(back_end.pid().to_string()).arg(secs.to_string());
    let told = guest.output(GUEST + Duration::from_secs_f64(4.0 * secs))?;
    let told: Value = serde_json::from_str(&told).with_context(|| format!("the guest said {told:?}"))?;
    let pair = |name: &str| -> Result<[f64; 2]> {
        let at = |at: usize| told[name][at].as_f64().with_context(|| format!("no {name} in {told}"));
        Ok([at(0)?, at(1)?])
    };
    for way in ["from", "to"] {
        if told[way][2].as_u64().is_some_and(|resent| resent != 0) {
            eprintln!("{contender}, {way} the guest: sent again {} times", told[way][2]);
        }
    }
    Ok(vec![
        (FROM, pair("from")?),
        (TO, pair("to")?),
        (AT_ONCE, pair("at_once")?),
        (AFTER_GAPS, pair("after_gaps")?),
    ])
}

fn figure(rows: &[Row], case: &str, contender: &str, at: usize) -> Option<f64> {
    let row = rows.iter().find(|row| row.case == case && row.contender == contender)?;
    row.summary.get(at).map(|summary| summary.median)
}

fn judge(rows: &[Row]) -> Vec<Goal> {
    let mut goals = Vec::new();
    for case in [FROM, TO] {
        let of = |at| Some(ratio(figure(rows, case, OURS_FIRST, at)?, figure(rows, case, PASST, at)?));
        let (Some(rate), Some(cpu)) = (of(0), of(1)) else { continue };
        let what = |what: &str| format!("{case}: {what}, of passt's at MTU 1500");
        goals.push(Goal { what: what("rate"), measured: rate, bound: 4.0, at_least: true });
        goals.push(Goal { what: what("CPU per byte"), measured: cpu, bound: 1.0 / 3.0, at_least: false });
    }
    goals
}

fn judge_times(rows: &[Row]) -> Vec<Goal> {
    let at_most = |what: &str, measured: Option<f64>, bound: f64| {
        measured.map(|measured| Goal { what: what.into(), measured, bound, at_least: false })
    };
    let sleeps = figure(rows, AFTER_GAPS, SLEEPS, 0).zip(figure(rows, AFTER_GAPS, PASST, 0));
    [
        at_most("poll=always: p50 in microseconds", figure(rows, AT_ONCE, ALWAYS, 0), 30.0),
        at_most("poll=0, after gaps: p50, of passt's", sleeps.map(|(ours, theirs)| ratio(ours, theirs)), 1.2),
    ]
    .into_iter()
    .flatten()
    .collect()
}
