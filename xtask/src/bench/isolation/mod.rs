//! `bench isolation`: the experiment of the 2003 paper. A guest computes, and does heavy I/O beside it: what does the I/O
//! cost the computing, depending on who carries it out and where?
//!
//! * [`native`]: the bare-metal guest on this host's KVM, its disk behind a VCP; the VCP on a hardware thread of its own or on
//!   the vCPU's, looking for work or sleeping.
//! * [`linux`]: a stock Debian guest in the helper VM, its disk behind a VCP, and the same LUN by open-iscsi and the kernel's
//!   TCP inside the guest, over virtio-net to the same target.

mod linux;
mod native;

use std::path::Path;

use anyhow::Result;

use super::goals::Goal;
use super::report::{Metric, Report, Row};
use super::stats::{Summary, ratio};

const METRICS: &[Metric] = &[
    Metric { title: "compute %", more_is_better: true, digits: 1 },
    Metric { title: "IOPS", more_is_better: true, digits: 0 },
    Metric { title: "p99 us", more_is_better: false, digits: 0 },
    Metric { title: "lost us/IO", more_is_better: false, digits: 2 },
    Metric { title: "monitor CPU %", more_is_better: false, digits: 0 },
    Metric { title: "VCP CPU %", more_is_better: false, digits: 0 },
    Metric { title: "target CPU %", more_is_better: false, digits: 0 },
];
/// Column of the computing time that one request costs the guest.
const LOST: usize = 3;

/// One contender in one window of time.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Window {
    /// Work per second beside the I/O, of that without I/O.
    compute: f64,
    iops: f64,
    p99_us: f64,
    /// CPU time of monitor (with the vCPU), VCP and target, of one CPU.
    cpu: [f64; 3],
}

impl Window {
    fn figures(self) -> [f64; 7] {
        let Self { compute, iops, p99_us, cpu: [monitor, vcp, target] } = self;
        // Noise may make it less than nothing; that is then what was measured.
        let lost_us = (1.0 - compute) * 1e6 / iops.max(1.0);
        [compute * 100.0, iops, p99_us, lost_us, monitor * 100.0, vcp * 100.0, target * 100.0]
    }
}

/// Adds a round to the row of its case and contender.
fn add(rows: &mut Vec<Row>, case: &str, contender: &str, window: Window) {
    let at = rows.iter().position(|row| row.case == case && row.contender == contender);
    let at = at.unwrap_or_else(|| {
        let (case, contender) = (case.to_owned(), contender.to_owned());
        rows.push(Row { case, contender, rounds: vec![Vec::new(); METRICS.len()], summary: Vec::new() });
        rows.len() - 1
    });
    rows[at].rounds.iter_mut().zip(window.figures()).for_each(|(all, figure)| all.push(figure));
}

/// Measures and reports.
///
/// # Errors
/// A program is missing, a guest did not do its job, or the helper VM failed.
pub(crate) fn run(bin: &Path, rounds: u32, secs: u32) -> Result<()> {
    let mut rows = Vec::new();
    let mut preface = native::run(bin, rounds, secs, &mut rows)?;
    preface.extend(linux::run(bin, rounds, secs, &mut rows)?);
    preface.push(
        "compute %: work done beside the I/O, of that without I/O; lost us/IO: computing time that one request costs the guest; \
         monitor CPU has the vCPU in it"
            .into(),
    );
    Report { name: "isolation", preface, metrics: METRICS.to_vec(), rows, goals: Vec::new() }.finish(judge)
}

/// The guest's loss with a VCP of its own thread against that with everything on its thread, in every case.
fn judge(rows: &[Row]) -> Vec<Goal> {
    let lost = |row: &Row| row.summary.get(LOST).map(|summary: &Summary| summary.median);
    let find = |case: &str, who: &str| rows.iter().find(|row| row.case == case && row.contender == who);
    let mut goals = Vec::new();
    for (case, ours, other) in linux::PAIRS.into_iter().chain([native::PAIR]) {
        let (ours_row, other_row) = (find(case, ours), find(case, other));
        // Where the other has lost nothing, there is nothing to judge.
        let lost_by = |row: Option<&Row>| row.and_then(lost).map(|lost| lost.max(0.0));
        if let (Some(ours_lost), Some(other_lost)) =
            (lost_by(ours_row), lost_by(other_row).filter(|lost| *lost > 0.0))
        {
            goals.push(Goal {
                what: format!("{case}: computing lost per request, {ours}, of {other}'s"),
                measured: ratio(ours_lost, other_lost),
                // Nobody has set another bound: it must not be worse.
                bound: 1.0,
                at_least: false,
            });
        }
    }
    goals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_request_costs_is_what_is_missing_over_how_many_there_were() {
        let window = Window { compute: 0.75, iops: 10_000.0, p99_us: 9.0, cpu: [1.0, 0.5, 0.25] };
        assert_eq!(window.figures(), [75.0, 10_000.0, 9.0, 25.0, 100.0, 50.0, 25.0]);
        let mut rows = Vec::new();
        for _ in 0..2 {
            add(&mut rows, "a", "x", window);
            add(&mut rows, "a", "y", window);
        }
        assert_eq!((rows.len(), &rows[1].rounds[0]), (2, &vec![75.0, 75.0]));
    }
}
