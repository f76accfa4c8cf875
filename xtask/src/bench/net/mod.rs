//! `bench net`: `vcp-net` beside its peers.
//!
//! Here: beside DPDK's own vhost back end, each passing frames between two ports of one testpmd with virtio_user, which
//! sends to itself as fast as it gets rid of frames. The back end is on one hardware thread, the front end on another.
//! [`mod@rates`]: the same two under a front end that offers frames at a rate (RFC 2544). [`guests`]: the user-mode stack
//! beside passt and libslirp; [`native`]: the same behind a guest at native speed; [`datagrams`]: what of a guest's datagrams is
//! lost with each of them, and where. [`pairs`]: two guests to each other beside vhost-net, in the helper VM; only when
//! asked for. [`mod@operations`]: what each operation takes by itself.

mod datagrams;
mod guests;
mod native;
mod operations;
mod pairs;
mod rates;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vcp_tests::testpmd::{Options, Testpmd};

use super::goals::Goal;
use super::report::{Metric, Report, Row};
use crate::server::Server;

/// Frame lengths with their checksum, and what ours is to reach, in times of the peer's rate.
const CASES: &[(&str, usize, f64)] = &[("64-byte frames", 64, 1.3), ("1518-byte frames", 1518, 1.0)];

const METRICS: &[Metric] = &[
    Metric { title: "Mpps both ways", more_is_better: true, digits: 2 },
    Metric { title: "Gbit/s both ways", more_is_better: true, digits: 1 },
];

/// Who passes frames on.
const CONTENDERS: [&str; 2] = ["vcp-net", "DPDK vhost"];

/// Nanoseconds per frame by operation.
type Costs = Vec<(String, f64)>;

/// How long a testpmd may take to end.
const END: Duration = Duration::from_secs(20);
/// What it takes to start, before it sends its first frame.
const START: Duration = Duration::from_secs(2);

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    /// Frames as fast as testpmd sends them, beside DPDK's vhost
    Frames,
    /// RFC 2544: rates without a loss, and times below them, beside DPDK's vhost
    Rates,
    /// TCP and UDP of a Debian guest, beside passt and libslirp
    Guests,
    /// UDP from a Debian guest at the same offered rates, beside passt and libslirp, and where datagrams are lost
    Datagrams,
    /// TCP of a guest at native speed, beside passt
    Native,
    /// Each operation of the switch by itself, nanoseconds per frame
    Operations,
    /// TCP between two guests in the helper VM, beside vhost-net and the kernel's bridge; only when asked for
    Pairs,
}

/// Measures and reports: everything, or a part.
///
/// # Errors
/// A program is missing, or a run failed.
pub(crate) fn run(bin: &Path, part: Option<Part>, rounds: u32, secs: f64) -> Result<()> {
    let chosen = |one| part.is_none_or(|only| only == one);
    let whole = secs.ceil().max(2.0) as u32;
    if chosen(Part::Frames) {
        // It prints every other second.
        frames(bin, rounds, whole.max(6))?;
    }
    if chosen(Part::Rates) {
        rates::run(bin, rounds, Duration::from_secs_f64(secs.max(0.1) / 4.0))?;
    }
    if chosen(Part::Operations) {
        operations::run(rounds)?;
    }
    if chosen(Part::Native) {
        native::run(bin, rounds, secs / 2.0)?;
    }
    if chosen(Part::Guests) {
        guests::run(bin, rounds, whole)?;
    }
    if chosen(Part::Datagrams) {
        datagrams::run(bin, rounds, whole)?;
    }
    if part == Some(Part::Pairs) {
        pairs::run(bin, rounds, whole)?;
    }
    Ok(())
}

fn frames(bin: &Path, rounds: u32, secs: u32) -> Result<()> {
    let scratch = tempfile::tempdir().context("no directory for sockets")?;
    let (mut rows, mut operations) = (Vec::new(), Vec::new());
    for &(case, frame_bytes, _) in CASES {
        let (mut measured, mut costs) = (vec![Vec::new(); CONTENDERS.len()], Vec::new());
        for _ in 0..rounds {
            for (contender, values) in CONTENDERS.iter().zip(&mut measured) {
                let (mpps, told) = one(bin, scratch.path(), contender, frame_bytes, secs)?;
                costs.extend(told);
                values.push(vec![mpps, mpps * frame_bytes as f64 * 8.0 / 1000.0]);
            }
        }
        for (contender, rounds) in CONTENDERS.iter().zip(measured) {
            let columns = (0..METRICS.len()).map(|at| rounds.iter().map(|round| round[at]).collect());
            rows.push(Row {
                case: case.into(),
                contender: (*contender).into(),
                rounds: columns.collect(),
                summary: Vec::new(),
            });
        }
        eprintln!("measured: {case}");
        operations.push(format!("vcp-net's operations, ns per frame, {case}: {}", in_words(&costs)));
    }
    let mut preface = vec![
        format!(
            "two ports of one testpmd (flowgen, 1 queue of 1024, bursts of 32); {rounds} rounds of {secs} s"
        ),
        "back end on hardware thread 1, front end on 0; rates are those that the front end receives".into(),
    ];
    preface.extend(operations);
    Report { name: "net", preface, metrics: METRICS.to_vec(), rows, goals: Vec::new() }.finish(judge)
}

fn judge(rows: &[Row]) -> Vec<Goal> {
    let of = |case: &str, contender: &str| {
        let row = rows.iter().find(|row| row.case == case && row.contender == contender);
        row.and_then(|row| row.summary.first()).map(|summary| summary.median)
    };
    let goal = |&(case, _, bound): &(&str, usize, f64)| {
        let measured = of(case, CONTENDERS[0])? / of(case, CONTENDERS[1])?;
        Some(Goal { what: format!("{case}: rate beside DPDK vhost's"), measured, bound, at_least: true })
    };
    CASES.iter().filter_map(goal).collect()
}

/// The control socket of a switch with a port at `socket`.
fn control(socket: &Path) -> PathBuf {
    socket.with_file_name("control")
}

/// What the operations of our switch took, nanoseconds per frame.
fn operations(socket: &Path) -> Result<Costs> {
    let told = vcp_tests::switch::ask(&control(socket), &json!({"cmd": "ports"}))?;
    let timed = told.pointer("/switches/0/operations/timed").context("the switch times nothing")?;
    let frames = timed["frames"].as_f64().filter(|frames| *frames > 0.0).context("no frame was timed")?;
    let each = timed["ns"].as_object().context("no operations")?.iter();
    Ok(each.map(|(name, ns)| (name.clone(), ns.as_f64().unwrap_or(0.0) / frames)).collect())
}

/// Medians of what [`operations()`] told in each round, in words.
fn in_words(rounds: &[Costs]) -> String {
    let names = rounds.first().into_iter().flatten().map(|(name, _)| name);
    let median = |name: &String| {
        let of = |round: &Costs| round.iter().find(|(it, _)| it == name).map(|(_, ns)| *ns);
        let mut all: Vec<f64> = rounds.iter().filter_map(of).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied().unwrap_or(0.0)
    };
    names.map(|name| format!("{name} {:.1}", median(name))).collect::<Vec<_>>().join(", ")
}

/// A back end on hardware thread 1 behind these sockets.
fn back_end(bin: &Path, contender: &str, sockets: [&Path; 2]) -> Result<(Option<Server>, Option<Testpmd>)> {
    for socket in sockets {
        let _ = std::fs::remove_file(socket);
    }
    if contender != CONTENDERS[0] {
        return Ok((None, Some(Testpmd::back_end(sockets, "0@1,1@1")?)));
    }
    let [a, b] = sockets.map(|socket| format!("socket={}", socket.display()));
    let control = control(sockets[0]).display().to_string();
    let _ = std::fs::remove_file(&control);
    let args =
        ["serve", "--cpu", "1", "--poll-us", "always", "--control", &control, "--port", &a, "--port", &b];
    Ok((Some(Server::start(&bin.join("vcp-net"), &args)?), None))
}

/// One run: frames received per second by both ports together, in millions; and what our operations took.
fn one(
    bin: &Path,
    dir: &Path,
    contender: &str,
    frame_bytes: usize,
    secs: u32,
) -> Result<(f64, Option<Costs>)> {
    let sockets = [dir.join("p0"), dir.join("p1")];
    let [a, b] = [&*sockets[0], &*sockets[1]];
    let (ours, theirs) = back_end(bin, contender, [a, b])?;
    let options = Options { frame_bytes, stats_period_s: 1, ..Options::default() };
    let front = Testpmd::start([a, b], &options)?;
    // It measures by its own clock, once a second; nothing is waited for here but time.
    std::thread::sleep(START + Duration::from_secs(secs.into()));
    let costs = ours.is_some().then(|| operations(a)).transpose()?;
    let text = front.end(END)?;
    drop(ours);
    if let Some(theirs) = theirs {
        theirs.end(END)?;
    }
    let rates = rates(&text);
    ensure!(rates.len() >= 2, "testpmd gave no rates: {text}");
    Ok((rates[rates.len() / 2] / 1e6, costs))
}

/// Frames received by both ports together in each second in which traffic ran, from the lowest to the highest.
fn rates(text: &str) -> Vec<f64> {
    let ports: Vec<f64> = text
        .lines()
        .filter_map(|line| line.split("Rx-pps:").nth(1)?.split_whitespace().next()?.parse().ok())
        .collect();
    let mut both: Vec<f64> =
        ports.chunks_exact(2).map(|pair| pair[0] + pair[1]).filter(|sum| *sum > 0.0).collect();
    both.sort_by(f64::total_cmp);
    both
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_operations_are_told_by_name() {
        let round =
            |parse: f64, enqueue: f64| vec![("parse".to_owned(), parse), ("enqueue".to_owned(), enqueue)];
        let told = in_words(&[round(1.0, 9.0), round(3.0, 7.0), round(2.0, 30.0)]);
        assert_eq!(told, "parse 2.0, enqueue 9.0");
    }

    #[test]
    fn rates_are_those_of_both_ports() {
        let text = "  Rx-pps:            0          Rx-bps:            0\n  Rx-pps:            0\n\
                    \n  Rx-pps:     10\n  Rx-pps: 20\n junk\n  Rx-pps: 5   Rx-bps: 7\n  Rx-pps: 6\n";
        assert_eq!(rates(text), [11.0, 30.0]);
    }
}
