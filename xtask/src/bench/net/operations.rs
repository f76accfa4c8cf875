//! What each operation of the switch takes by itself, nanoseconds per frame: the benchmarks of `vcp-net/benches`, one file
//! for each operation, gathered into one table. Everything is hot there; what lines cost on their way from processor to
//! processor is in the other parts.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::super::report::{Metric, Report, Row};
use crate::cmd;

const METRICS: &[Metric] = &[Metric { title: "ns per frame", more_is_better: false, digits: 2 }];

/// Measures and reports.
///
/// # Errors
/// The benchmarks do not build, or one of them failed.
pub(super) fn run(rounds: u32) -> Result<()> {
    let mut rows: Vec<Row> = Vec::new();
    for _ in 0..rounds {
        let begin = SystemTime::now();
        cmd::run(cmd::cargo().args(["bench", "-p", "vcp-net", "--", "--noplot", "--quiet"]))?;
        let mut found = Vec::new();
        gather(&cmd::target_dir().join("criterion"), begin, &mut found)?;
        ensure!(!found.is_empty(), "the benchmarks left no figures");
        found.sort_by_key(Figure::order);
        for Figure { operation, length, burst, ns } in found {
            let case = format!("{operation}, {length}");
            let contender = format!("bursts of {burst}");
            match rows.iter_mut().find(|row| row.case == case && row.contender == contender) {
                Some(row) => row.rounds[0].push(ns),
                None => rows.push(Row { case, contender, rounds: vec![vec![ns]], summary: Vec::new() }),
            }
        }
    }
    let preface = vec![format!(
        "the operations of the switch by themselves, over bursts that are in the cache already; {rounds} rounds of \
         `cargo bench -p vcp-net`"
    )];
    Report { name: "net-operations", preface, metrics: METRICS.to_vec(), rows, goals: Vec::new() }
        .finish(|_| Vec::new())
}

/// One case of one operation.
#[derive(Debug)]
struct Figure {
    operation: String,
    length: String,
    burst: u32,
    ns: f64,
}

impl Figure {
    /// As people read them: operations by name, short frames first, large bursts first (the usual case under load).
    fn order(&self) -> (String, u8, u32) {
        let length = match &*self.length {
            "64" => 0,
            "imix" => 1,
            _ => 2,
        };
        (self.operation.clone(), length, u32::MAX - self.burst)
    }
}

/// Finds what the benchmarks wrote below `dir` since `begin`.
fn gather(dir: &Path, begin: SystemTime, found: &mut Vec<Figure>) -> Result<()> {
    let shown = dir.display();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {shown}"))? {
        let path = entry.with_context(|| format!("cannot read {shown}"))?.path();
        if !path.is_dir() {
            continue;
        }
        let estimates = path.join("estimates.json");
        if path.file_name().is_some_and(|name| name == "new") && estimates.is_file() {
            let written = fs::metadata(&estimates).and_then(|meta| meta.modified());
            if written.is_ok_and(|at| at >= begin) {
                found.push(read(&path)?);
            }
        } else {
            gather(&path, begin, found)?;
        }
    }
    Ok(())
}

fn read(dir: &Path) -> Result<Figure> {
    let json = |name: &str| -> Result<Value> {
        let path = dir.join(name);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))
    };
    figure(&json("benchmark.json")?, &json("estimates.json")?)
        .with_context(|| format!("{} is not a benchmark of ours", dir.display()))
}

fn figure(benchmark: &Value, estimates: &Value) -> Option<Figure> {
    let text = |name: &str| Some(benchmark[name].as_str()?.to_owned());
    Some(Figure {
        operation: text("group_id")?,
        length: text("function_id")?,
        burst: text("value_str")?.parse().ok()?,
        ns: estimates["median"]["point_estimate"].as_f64()?,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn figures_are_medians_of_named_cases() {
        let benchmark = json!({"group_id": "learn", "function_id": "imix", "value_str": "32"});
        let found = figure(&benchmark, &json!({"median": {"point_estimate": 1.5}})).unwrap();
        assert_eq!((&*found.operation, &*found.length, found.burst, found.ns), ("learn", "imix", 32, 1.5));
        assert!(figure(&json!({"group_id": "learn"}), &Value::Null).is_none());
    }
}
