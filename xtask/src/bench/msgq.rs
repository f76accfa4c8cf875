//! `bench msgq`: the message queue beside iceoryx2, sockets, pipes and in-process queues, two sides on two hardware threads.
//!
//! The measuring program is a crate of its own outside the workspace (`msgq/bench`), because its peers would slow every
//! other build down. It prints a sample per line, each with a control before and after it: the round trip of one cache line.
//! Goals are ratios to that control, and to peers, in the same run.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::goals::Goal;
use super::report::{Metric, Report, Row};
use super::stats::Summary;
use crate::cmd;

const METRICS: &[Metric] = &[
    Metric { title: "ns", more_is_better: false, digits: 2 },
    Metric { title: "line round trips", more_is_better: false, digits: 3 },
];

/// Below so many nanoseconds for a line there and back the two processors are near; from there on far; above, something else
/// ran.
const NEAR_NS: f64 = 130.0;
const FAR_NS: f64 = 1000.0;

/// Cases, and the measurements in each, ours first.
const CASES: &[(&str, &[&str])] = &[
    (
        "stream of 32 B messages",
        &[
            "msgq one way, batch 32",
            "msgq one way, batch 8",
            "msgq one way, batch 1",
            "iceoryx2 pub-sub 32 B",
            "rtrb 32 B, threads",
            "ArrayQueue 32 B, threads",
            "crossbeam-channel 32 B, threads",
            "pipe 64 B",
            "seqpacket 64 B",
        ],
    ),
    (
        "request and completion",
        &[
            "msgq request + completion, batch 32",
            "msgq request + completion, batch 1",
            "msgq request of 64 B by reference, batch 32",
            "msgq request of 4 KiB by reference, batch 32",
            "msgq request of 64 KiB by reference, batch 32",
            "pipe 4 KiB",
            "seqpacket 4 KiB",
        ],
    ),
    (
        "round trip, busy",
        &[
            "msgq round trip, busy",
            "msgq round trip, busy, quantiles",
            "iceoryx2 round trip, busy",
            "rtrb round trip, threads",
        ],
    ),
    (
        "round trip, blocking",
        &[
            "msgq round trip, blocking (pipe)",
            "msgq round trip, blocking (eventfd)",
            "eventfd round trip, blocking",
        ],
    ),
    (
        "round trip after a gap of 30 us",
        &["msgq round trip, 30 us gaps, adaptive", "msgq round trip, 30 us gaps, no spin"],
    ),
];

/// A line of the measuring program.
#[derive(Debug, Deserialize)]
struct Line {
    name: String,
    value: f64,
    more: serde_json::Value,
    line_ns: [f64; 2],
}

/// Where the two processors were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Zone {
    Near,
    Far,
}

impl Line {
    /// `None` if the controls before and after disagree, or something else ran.
    fn zone(&self) -> Option<Zone> {
        let zone = |ns: f64| match ns {
            ns if ns < NEAR_NS => Some(Zone::Near),
            ns if ns < FAR_NS => Some(Zone::Far),
            _ => None,
        };
        zone(self.line_ns[0]).filter(|first| zone(self.line_ns[1]) == Some(*first))
    }
}

/// Builds, measures and reports.
///
/// # Errors
/// It does not build, or a measurement failed.
pub(crate) fn run(rounds: u32) -> Result<()> {
    let target = cmd::target_dir().join("msgq-bench");
    let manifest = cmd::root().join("msgq/bench/Cargo.toml");
    let mut build = cmd::cargo();
    build.args(["build", "--release", "--locked", "--manifest-path"]).arg(&manifest);
    cmd::run(build.arg("--target-dir").arg(&target))?;
    let text = cmd::output(Command::new(target.join("release/msgq-bench")).arg(rounds.to_string()))?;
    let lines = text
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("msgq-bench printed `{line}`")))
        .collect::<Result<Vec<Line>>>()?;
    let zones = Samples::by_zone(&lines)?;
    let kept: usize = zones.iter().map(Samples::count).sum();
    let mut preface = vec![
        format!("{rounds} rounds on two hardware threads, which the host puts near each other or far apart"),
        format!(
            "{} of {} samples are left out: the processors moved, or something else ran",
            lines.len() - kept,
            lines.len()
        ),
        "msgq with every check on, and looking whether the peer sleeps; two processes unless it says threads"
            .into(),
    ];
    preface.extend(zones.iter().flat_map(Samples::notes));
    let goals = zones.iter().flat_map(Samples::goals).collect();
    let rows = zones.iter().flat_map(Samples::rows).collect();
    Report { name: "msgq", preface, metrics: METRICS.to_vec(), rows, goals: Vec::new() }.finish(|_| goals)
}

/// Samples that were taken in one zone, by name.
struct Samples<'a> {
    zone: Zone,
    all: BTreeMap<&'a str, Vec<&'a Line>>,
}

impl<'a> Samples<'a> {
    /// Those of each zone that there are samples of. They are never compared with each other.
    fn by_zone(lines: &'a [Line]) -> Result<Vec<Self>> {
        let mut zones: BTreeMap<Zone, Self> = BTreeMap::new();
        for line in lines {
            let Some(zone) = line.zone() else { continue };
            let samples = zones.entry(zone).or_insert_with(|| Self { zone, all: BTreeMap::new() });
            samples.all.entry(&line.name).or_default().push(line);
        }
        if zones.is_empty() {
            bail!("no sample was taken in peace; is something else running?");
        }
        Ok(zones.into_values().collect())
    }

    fn count(&self) -> usize {
        self.all.values().map(Vec::len).sum()
    }

    fn place(&self) -> &'static str {
        if self.zone == Zone::Near { "near" } else { "far" }
    }

    fn median(&self, name: &str, of: impl Fn(&Line) -> f64) -> Option<f64> {
        let lines = self.all.get(name)?;
        Some(Summary::of(lines.iter().map(|line| of(line))).median)
    }

    fn value(&self, name: &str) -> Option<f64> {
        self.median(name, |line| line.value)
    }

    /// In round trips of a line.
    fn ratio(&self, name: &str) -> Option<f64> {
        self.median(name, |line| line.value / control(line))
    }

    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for (case, names) in CASES {
            for name in *names {
                let Some(lines) = self.all.get(name) else { continue };
                let ns = lines.iter().map(|line| line.value).collect();
                let ratio = lines.iter().map(|line| line.value / control(line)).collect();
                let rounds = vec![ns, ratio];
                rows.push(Row {
                    case: format!("{}: {case}", self.place()),
                    contender: (*name).into(),
                    rounds,
                    summary: Vec::new(),
                });
            }
        }
        rows
    }

    /// What is no time.
    fn notes(&self) -> Vec<String> {
        let line = Summary::of(self.all.values().flatten().map(|line| control(line)));
        let mut notes = vec![format!(
            "{}: {} samples; a cache line there and back takes {:.0} ns ({:.0} to {:.0})",
            self.place(),
            self.count(),
            line.median,
            line.min,
            line.max
        )];
        if let Some([line, ..]) = self.all.get("msgq idle, CPU us per second").map(Vec::as_slice) {
            notes.push(format!(
                "an idle channel takes {:.0} us of processor time in a second (set-up of the wait included), and {} bytes \
                 of memory on each side",
                line.value, line.more["memory_bytes"]
            ));
        }
        if let Some([line, ..]) = self.all.get("msgq round trip, busy, quantiles").map(Vec::as_slice) {
            notes.push(format!(
                "msgq round trip, busy (clock included): p50 {} ns, p99 {} ns, p99.9 {} ns",
                line.more["p50"], line.more["p99"], line.more["p99.9"]
            ));
        }
        notes
    }

    fn goals(&self) -> Vec<Goal> {
        let by_zone = |near, far| if self.zone == Zone::Near { near } else { far };
        let over = |name, other| Some(self.value(name)? / self.value(other)?);
        let line = |name| self.ratio(name);
        let (one, many) = ("msgq one way, batch 1", "msgq one way, batch 32");
        let trip = "msgq round trip, busy";
        let iox = ("iceoryx2 pub-sub 32 B", "iceoryx2 round trip, busy");
        let gap = "msgq round trip, 30 us gaps, adaptive";
        let sizes =
            ("msgq request of 64 KiB by reference, batch 32", "msgq request of 64 B by reference, batch 32");
        let goals = [
            ("a message in a batch of 32, in line round trips", line(many), by_zone(0.12, 0.035), false),
            ("a message by itself, in line round trips", line(one), by_zone(0.4, 0.09), false),
            ("a round trip, busy, in line round trips", line(trip), 2.2, false),
            ("iceoryx2's round trip in ours", over(iox.1, trip), 4.0, true),
            ("our rate by single messages in iceoryx2's", over(iox.0, one), 10.0, true),
            ("our rate in batches of 32 in iceoryx2's", over(iox.0, many), 30.0, true),
            (
                "a blocking round trip in that of two bare eventfds",
                over("msgq round trip, blocking (pipe)", "eventfd round trip, blocking"),
                1.05,
                false,
            ),
            (
                "the same with eventfds as bells",
                over("msgq round trip, blocking (eventfd)", "eventfd round trip, blocking"),
                1.05,
                false,
            ),
            (
                "kicks per message in a saturated stream",
                self.value("msgq kicks per message, saturated"),
                0.002,
                false,
            ),
            (
                "kicks per message while the peer polls",
                self.value("msgq kicks per message, peer polls"),
                0.0,
                false,
            ),
            ("round trip after gaps of 30 us, in us", self.value(gap).map(|ns| ns / 1000.0), 0.5, false),
            ("a request of 64 KiB in one of 64 B", over(sizes.0, sizes.1), 1.1, false),
        ];
        let goals = goals.into_iter().filter_map(|(what, measured, bound, at_least)| {
            Some(Goal { what: format!("{}: {what}", self.place()), measured: measured?, bound, at_least })
        });
        goals.collect()
    }
}

/// The control of a sample: the mean of the one before and the one after.
fn control(line: &Line) -> f64 {
    (line.line_ns[0] + line.line_ns[1]) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, value: f64, line_ns: [f64; 2]) -> Line {
        Line { name: name.into(), value, more: serde_json::Value::Null, line_ns }
    }

    #[test]
    fn samples_between_two_places_are_left_out() {
        let lines = [
            line("msgq one way, batch 1", 10.0, [50.0, 50.0]),
            line("msgq one way, batch 1", 12.0, [50.0, 60.0]),
            line("msgq one way, batch 1", 99.0, [50.0, 380.0]),
            line("msgq one way, batch 1", 20.0, [380.0, 380.0]),
            line("iceoryx2 pub-sub 32 B", 220.0, [50.0, 50.0]),
            line("iceoryx2 pub-sub 32 B", 900.0, [5000.0, 50.0]),
        ];
        let zones = Samples::by_zone(&lines).unwrap();
        let [near, far] = &zones[..] else { panic!("{} zones", zones.len()) };
        assert_eq!((near.zone, near.count(), far.zone, far.count()), (Zone::Near, 3, Zone::Far, 1));
        let goals = near.goals();
        let rate = goals.iter().find(|goal| goal.what.contains("single messages")).unwrap();
        assert_eq!((rate.measured, rate.bound), (20.0, 10.0));
        assert_eq!(goals.len(), 2, "goals without samples are left out");
        assert_eq!(near.rows().len(), 2);
        // What was measured far is held against what is to be reached far, and against nothing near.
        let goals = far.goals();
        assert_eq!((goals.len(), goals[0].measured, goals[0].bound), (1, 20.0 / 380.0, 0.09));
        assert!(goals[0].what.starts_with("far: "));
    }
}
