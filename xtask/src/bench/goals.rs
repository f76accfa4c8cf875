//! What the project set out to reach against qemu-storage-daemon, and whether a run reached it.

use serde::Serialize;

use super::report::Row;
use super::stats::ratio;

/// The contenders of `bench blk`.
pub(super) const DEFAULT: &str = "vcp-iscsi";
pub(super) const POLL_0: &str = "vcp-iscsi poll=0";
pub(super) const POLL_100: &str = "vcp-iscsi poll=100";
pub(super) const DIGESTS: &str = "vcp-iscsi poll=0 crc32c";
pub(super) const MSGQ: &str = "vcp-iscsi msgq";
pub(super) const LIBRARY: &str = "libiscsi iscsi-perf";
pub(super) const PEER: &str = "qemu-storage-daemon";

/// Columns of the rows, in the order of `blk`'s metrics.
pub(super) const IOPS: usize = 0;
pub(super) const P50: usize = 2;
pub(super) const CPU: usize = 4;
pub(super) const SYSCALLS: usize = 6;
pub(super) const LOAD: usize = 7;

/// One goal and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Goal {
    /// What is compared.
    pub(crate) what: String,
    /// The figure.
    pub(crate) measured: f64,
    /// Its bound.
    pub(crate) bound: f64,
    /// Whether the figure has to be at least the bound (else at most).
    pub(crate) at_least: bool,
}

impl Goal {
    fn reached(&self) -> bool {
        if self.at_least { self.measured >= self.bound } else { self.measured <= self.bound }
    }
}

impl std::fmt::Display for Goal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sign = if self.at_least { ">=" } else { "<=" };
        let verdict = if self.reached() { "reached" } else { "MISSED" };
        write!(f, "{verdict:<8} {:.2} ({sign} {})  {}", self.measured, self.bound, self.what)
    }
}

/// Judges the rows whose summaries are there. Goals without rows are left out.
pub(super) fn judge(rows: &[Row]) -> Vec<Goal> {
    let figure = |case: &str, contender: &str, metric: usize| {
        let row = rows.iter().find(|row| row.case == case && row.contender == contender)?;
        Some(row.summary.get(metric)?.median)
    };
    let against = |case: &str, ours: &str, theirs: &str, metric: usize| {
        Some(ratio(figure(case, ours, metric)?, figure(case, theirs, metric)?))
    };
    let (one, deep) = ("4k randread qd1", "4k randread qd32");
    let (read, write) = ("128k read qd8", "128k write qd8");
    let at_most = |what: &str, measured: Option<f64>, bound: f64| {
        measured.map(|measured| Goal { what: what.into(), measured, bound, at_least: false })
    };
    let at_least = |what: &str, measured: Option<f64>, bound: f64| {
        measured.map(|measured| Goal { what: what.into(), measured, bound, at_least: true })
    };
    // Throughput per CPU second is the inverse of CPU time per request.
    let per_cpu = |case| against(case, PEER, POLL_0, CPU);
    [
        at_most(
            "4k randread qd32: CPU per I/O, poll=0, of the peer's",
            against(deep, POLL_0, PEER, CPU),
            0.25,
        ),
        at_least(
            "4k randread qd32: IOPS, default polling, of the peer's",
            against(deep, DEFAULT, PEER, IOPS),
            3.0,
        ),
        at_most("4k randread qd1: p50, poll=100, of the peer's", against(one, POLL_100, PEER, P50), 0.5),
        at_most("4k randread qd1: p50, poll=0, of the peer's", against(one, POLL_0, PEER, P50), 1.0),
        at_least("128k read qd8: throughput per CPU second, poll=0, of the peer's", per_cpu(read), 1.5),
        at_least("128k write qd8: throughput per CPU second, poll=0, of the peer's", per_cpu(write), 1.5),
        at_most("4k randread qd32: system calls per I/O, poll=0", figure(deep, POLL_0, SYSCALLS), 0.2),
        at_most("4k randread qd1: system calls per I/O, poll=0", figure(one, POLL_0, SYSCALLS), 2.0),
        at_most(
            "128k read qd8: CPU per I/O with digests, of that without",
            against(read, DIGESTS, POLL_0, CPU),
            1.1,
        ),
        at_most(
            "128k write qd8: CPU per I/O with digests, of that without",
            against(write, DIGESTS, POLL_0, CPU),
            1.1,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::stats::Summary;

    fn row(case: &str, contender: &str, figures: [f64; 7]) -> Row {
        let rounds = figures.iter().map(|&figure| vec![figure]).collect();
        let summary = figures.iter().map(|&figure| Summary::of([figure])).collect();
        Row { case: case.into(), contender: contender.into(), rounds, summary }
    }

    #[test]
    fn figures_are_compared_the_right_way_round() {
        let rows = [
            row("128k read qd8", POLL_0, [100.0, 0.0, 0.0, 0.0, 10.0, 0.0, 0.0]),
            row("128k read qd8", PEER, [100.0, 0.0, 0.0, 0.0, 20.0, 0.0, 0.0]),
            row("4k randread qd32", DEFAULT, [200.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]),
            row("4k randread qd32", PEER, [100.0, 0.0, 0.0, 0.0, 4.0, 0.0, 0.0]),
        ];
        let goals = judge(&rows);
        assert_eq!(goals.len(), 2);
        assert!(!goals[0].reached() && (goals[0].measured - 2.0).abs() < 1e-9, "{}", goals[0]);
        assert!(goals[1].reached() && (goals[1].measured - 2.0).abs() < 1e-9, "{}", goals[1]);
    }
}
