//! `bench net`: `vcp-net` beside its peers.
//!
//! Here: beside DPDK's own vhost back end, each passing frames between two ports of one testpmd with virtio_user, which
//! sends to itself as fast as it gets rid of frames. The back end is on one hardware thread, the front end on another.
//! [`mod@rates`]: the same two under a front end that offers frames at a rate (RFC 2544). [`guests`]: the user-mode stack
//! beside passt and libslirp.

mod guests;
mod rates;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
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
}

/// Measures and reports: everything, or a part.
///
/// # Errors
/// A program is missing, or a run failed.
pub(crate) fn run(bin: &Path, part: Option<Part>, rounds: u32, secs: f64) -> Result<()> {
    let chosen = |one| part.is_none_or(|only| only == one);
    let whole = secs.ceil().max(2.0) as u32;
    if chosen(Part::Frames) {
        frames(bin, rounds, whole)?;
    }
    if chosen(Part::Rates) {
        rates::run(bin, rounds, Duration::from_secs_f64(secs.max(0.1) / 4.0))?;
    }
    if chosen(Part::Guests) {
        guests::run(bin, rounds, whole)?;
    }
    Ok(())
}

fn frames(bin: &Path, rounds: u32, secs: u32) -> Result<()> {
    let scratch = tempfile::tempdir().context("no directory for sockets")?;
    let mut rows = Vec::new();
    for &(case, frame_bytes, _) in CASES {
        let mut measured = vec![Vec::new(); CONTENDERS.len()];
        for _ in 0..rounds {
            for (contender, values) in CONTENDERS.iter().zip(&mut measured) {
                let mpps = one(bin, scratch.path(), contender, frame_bytes, secs)?;
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
    }
    let preface = vec![
        format!(
            "two ports of one testpmd (flowgen, 1 queue of 1024, bursts of 32); {rounds} rounds of {secs} s"
        ),
        "back end on hardware thread 1, front end on 0; rates are those that the front end receives".into(),
    ];
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

/// A back end on hardware thread 1 behind these sockets.
fn back_end(bin: &Path, contender: &str, sockets: [&Path; 2]) -> Result<(Option<Server>, Option<Testpmd>)> {
    for socket in sockets {
        let _ = std::fs::remove_file(socket);
    }
    if contender != CONTENDERS[0] {
        return Ok((None, Some(Testpmd::back_end(sockets, "0@1,1@1")?)));
    }
    let [a, b] = sockets.map(|socket| format!("socket={}", socket.display()));
    let args = ["serve", "--cpu", "1", "--poll-us", "always", "--port", &a, "--port", &b];
    Ok((Some(Server::start(&bin.join("vcp-net"), &args)?), None))
}

/// One run: frames received per second by both ports together, in millions.
fn one(bin: &Path, dir: &Path, contender: &str, frame_bytes: usize, secs: u32) -> Result<f64> {
    let sockets = [dir.join("p0"), dir.join("p1")];
    let [a, b] = [&*sockets[0], &*sockets[1]];
    let (ours, theirs) = back_end(bin, contender, [a, b])?;
    let options = Options { frame_bytes, stats_period_s: 1, ..Options::default() };
    let front = Testpmd::start([a, b], &options)?;
    // It measures by its own clock, once a second; nothing is waited for here but time.
    std::thread::sleep(START + Duration::from_secs(secs.into()));
    let text = front.end(END)?;
    drop(ours);
    if let Some(theirs) = theirs {
        theirs.end(END)?;
    }
    let rates = rates(&text);
    ensure!(rates.len() >= 2, "testpmd gave no rates: {text}");
    Ok(rates[rates.len() / 2] / 1e6)
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
    fn rates_are_those_of_both_ports() {
        let text = "  Rx-pps:            0          Rx-bps:            0\n  Rx-pps:            0\n\
                    \n  Rx-pps:     10\n  Rx-pps: 20\n junk\n  Rx-pps: 5   Rx-bps: 7\n  Rx-pps: 6\n";
        assert_eq!(rates(text), [11.0, 30.0]);
    }
}
