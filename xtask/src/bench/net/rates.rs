//! RFC 2544: the highest rate without a loss (NDR), with less than half a percent (PDR), and how long frames take at parts
//! of the first. The front end is DPDK's virtio_user with a clock (`paced.c`), for ours and for the peer alike.
//!
//! Rates are those of both directions together. What the front end could not get rid of in time counts as lost: a back end
//! that leaves frames where they are does not take them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vcp_tests::proc::{Cmd, Proc, Stream};
use vcp_tests::testpmd::Testpmd;

use super::super::goals::Goal;
use super::super::report::{Metric, Report, Row};
use super::{CONTENDERS, END, back_end};
use crate::cmd;

const SOURCE: &str = include_str!("paced.c");
/// How long it may take to start.
const START: Duration = Duration::from_secs(30);
/// The first offer, frames per second: more than either passes.
const MOST: f64 = 30e6;
/// Loss that a partial drop rate allows.
const PARTIAL: f64 = 0.005;
/// A search ends when its bounds are so close.
const PRECISION: f64 = 0.02;
/// Parts of the NDR at which times are measured, percent.
const PARTS: [u32; 3] = [10, 50, 90];

const METRICS: &[Metric] = &[
    Metric { title: "NDR Mpps", more_is_better: true, digits: 2 },
    Metric { title: "PDR Mpps", more_is_better: true, digits: 2 },
    Metric { title: "most Mpps", more_is_better: true, digits: 2 },
    Metric { title: "p50 us at 10%", more_is_better: false, digits: 1 },
    Metric { title: "p99 us at 10%", more_is_better: false, digits: 1 },
    Metric { title: "p50 us at 50%", more_is_better: false, digits: 1 },
    Metric { title: "p99 us at 50%", more_is_better: false, digits: 1 },
    Metric { title: "p50 us at 90%", more_is_better: false, digits: 1 },
    Metric { title: "p99 us at 90%", more_is_better: false, digits: 1 },
];

/// Frame lengths with their checksum. IMIX: 28 of 64, 16 of 570, 4 of 1518, mixed.
fn cases() -> Vec<(&'static str, Vec<usize>)> {
    let imix = (0..48).map(|at| match at % 12 {
        1 | 4 | 7 | 10 => 570,
        6 => 1518,
        _ => 64,
    });
    vec![
        ("64 bytes", vec![64]),
        ("IMIX", imix.collect()),
        ("1518 bytes", vec![1518]),
        ("9000 bytes", vec![9000]),
    ]
}

/// Measures and reports.
///
/// # Errors
/// The front end does not build, a program is missing, or a run failed.
pub(super) fn run(bin: &Path, rounds: u32, trial: Duration) -> Result<()> {
    let scratch = tempfile::tempdir().context("no directory for sockets")?;
    let front_end = build(scratch.path())?;
    let mut rows = Vec::new();
    for (case, sizes) in cases() {
        for contender in CONTENDERS {
            let mut columns = vec![Vec::new(); METRICS.len()];
            for _ in 0..rounds {
                let figures = one(bin, scratch.path(), &front_end, contender, &sizes, trial)?;
                columns.iter_mut().zip(figures).for_each(|(column, figure)| column.push(figure));
            }
            rows.push(Row {
                case: case.into(),
                contender: contender.into(),
                rounds: columns,
                summary: Vec::new(),
            });
        }
        eprintln!("measured: {case}");
    }
    let preface = vec![
        format!(
            "RFC 2544 over two ports of DPDK's virtio_user, both ways together; {rounds} rounds, trials of {} ms, \
             bounds to {:.0}%",
            trial.as_millis(),
            PRECISION * 100.0
        ),
        "back end on hardware thread 1, front end on 0; the front end's own share of the way is in all times"
            .into(),
    ];
    Report { name: "net-rates", preface, metrics: METRICS.to_vec(), rows, goals: Vec::new() }.finish(judge)
}

fn judge(rows: &[Row]) -> Vec<Goal> {
    let figure = |contender: &str, at: usize| {
        let row = rows.iter().find(|row| row.case == "64 bytes" && row.contender == contender)?;
        row.summary.get(at).map(|summary| summary.median)
    };
    let goal = |ours: f64, bound: f64, of: f64, what: &str| Goal {
        what: what.into(),
        measured: super::super::stats::ratio(ours, of),
        bound,
        at_least: true,
    };
    let (Some(ndr), Some(most)) = (figure(CONTENDERS[0], 0), figure(CONTENDERS[0], 2)) else {
        return Vec::new();
    };
    let theirs = figure(CONTENDERS[1], 0).unwrap_or(0.0);
    vec![
        goal(ndr, 0.9, most, "64 bytes: rate without a loss, of the most"),
        goal(ndr, 1.3, theirs, "64 bytes: rate without a loss, beside DPDK vhost's"),
    ]
}

/// Builds the front end as DPDK's own package says.
fn build(dir: &Path) -> Result<PathBuf> {
    let (source, program) = (dir.join("paced.c"), dir.join("paced"));
    std::fs::write(&source, SOURCE).context("cannot write the front end's source")?;
    let flags = |what: &str| -> Result<Vec<String>> {
        let text = cmd::output(Command::new("pkg-config").args([what, "libdpdk"]))?;
        Ok(text.split_whitespace().map(str::to_owned).collect())
    };
    cmd::run(
        Command::new("cc")
            .args(["-O3", "-Wall", "-o"])
            .arg(&program)
            .args(flags("--cflags")?)
            .arg(&source)
            .args(flags("--libs")?),
    )?;
    Ok(program)
}

/// What came of an offer.
#[derive(Clone, Copy, Debug)]
struct Trial {
    rate: f64,
    offered: f64,
    received: f64,
    p50_us: f64,
    p99_us: f64,
}

impl Trial {
    fn loss(&self) -> f64 {
        1.0 - self.received / self.offered
    }
}

/// A front end that is asked for one trial after the other.
struct Asked<'a> {
    proc: Proc,
    sizes: &'a str,
    trial: Duration,
    number: u64,
}

impl Asked<'_> {
    fn offer(&mut self, rate: f64) -> Result<Trial> {
        self.number += 1;
        let (number, ms) = (self.number, self.trial.as_millis());
        self.proc.say(format!("{number} {rate:.0} {ms} {}\n", self.sizes).as_bytes())?;
        let line = self.proc.wait_line(Stream::Out, &format!("result {number} "), self.trial + END)?;
        let figures: Vec<f64> =
            line.split_whitespace().skip(2).filter_map(|word| word.parse().ok()).collect();
        let [offered, _, received, p50, p99, _] = figures[..] else {
            anyhow::bail!("not a result: {line}");
        };
        ensure!(offered > 0.0, "nothing was offered: {line}");
        Ok(Trial { rate, offered, received, p50_us: p50 / 1000.0, p99_us: p99 / 1000.0 })
    }

    /// The highest rate between the bounds at which no more than `loss` is lost.
    fn search(&mut self, loss: f64, most: f64) -> Result<f64> {
        let (mut good, mut bad) = (0.0, most);
        let mut rate = most * 0.9;
        while bad - good > most * PRECISION {
            // One loss in a short trial may be somebody else's: it counts if it comes again.
            let lost = self.offer(rate)?.loss() > loss && self.offer(rate)?.loss() > loss;
            if lost {
                bad = rate;
            } else {
                good = rate;
            }
            rate = (good + bad) / 2.0;
        }
        Ok(good)
    }
}

/// One round of one contender: a value for each metric.
fn one(
    bin: &Path,
    dir: &Path,
    front_end: &Path,
    contender: &str,
    sizes: &[usize],
    trial: Duration,
) -> Result<Vec<f64>> {
    let sockets = [dir.join("p0"), dir.join("p1")];
    let (ours, theirs) = back_end(bin, contender, [&sockets[0], &sockets[1]])?;
    let mut command = Cmd::new(front_end)
        .args(["--lcores", "0@0", "--no-huge", "-m", "512", "--no-pci", "--no-telemetry"])
        .arg(format!("--file-prefix=paced{}", std::process::id()));
    for (at, socket) in sockets.iter().enumerate() {
        command = command.arg(format!(
            "--vdev=net_virtio_user{at},path={},mac=02:00:00:00:00:0{},queues=1,queue_size=1024",
            socket.display(),
            at + 1
        ));
    }
    let proc = command.keep_stdin().spawn()?;
    proc.wait_line(Stream::Out, "started", START)?;
    let sizes: Vec<String> = sizes.iter().map(ToString::to_string).collect();
    let mut asked = Asked { proc, sizes: &sizes.join(" "), trial, number: 0 };
    // The first brings both sides to their speed, and the switch to know both stations.
    asked.offer(1e5)?;
    let full = asked.offer(MOST)?;
    let most = full.rate * full.received / full.offered;
    let ndr = asked.search(0.0, most)?;
    let pdr = asked.search(PARTIAL, most)?.max(ndr);
    let mut figures = vec![ndr / 1e6, pdr / 1e6, most / 1e6];
    for part in PARTS {
        let at = asked.offer((ndr * f64::from(part) / 100.0).max(1000.0))?;
        figures.extend([at.p50_us, at.p99_us]);
    }
    asked.proc.close_stdin();
    asked.proc.wait(END)?;
    drop(ours);
    theirs.map(|theirs: Testpmd| theirs.end(END)).transpose()?;
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imix_is_what_it_is() {
        let cases = cases();
        let imix = &cases[1].1;
        let count = |len| imix.iter().filter(|it| **it == len).count();
        assert_eq!((count(64), count(570), count(1518)), (28, 16, 4));
    }
}
