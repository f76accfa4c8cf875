//! `bench target`: `iscsi-target` beside tgtd, each serving a file in memory, under libiscsi's `iscsi-perf` with 32
//! random reads in flight. What counts is reads per CPU second of the target's process.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use vcp_tests::proc::Cmd;
use vcp_tests::procfs;
use vcp_tests::target::{Kind, LunSpec, Spec, Target, sparse};

use super::report::{Metric, Report, Row};
use crate::cmd;
use crate::server::Server;

const TARGET: &str = "iqn.2026-11.vcp:bench";
const LUN_BYTES: u64 = 256 << 20;
const MEMORY_FILES: &str = "/dev/shm";

const CASES: &[(&str, u32)] = &[("4k randread qd32", 8), ("64k randread qd32", 128)];

const METRICS: &[Metric] = &[
    Metric { title: "IOPS", more_is_better: true, digits: 0 },
    Metric { title: "IOPS per CPU second", more_is_better: true, digits: 0 },
];

struct Contender {
    name: &'static str,
    pid: u32,
    url: String,
}

/// Measures and reports.
///
/// # Errors
/// A program is missing, or a run failed.
pub(crate) fn run(bin: &Path, rounds: u32, secs: u32) -> Result<()> {
    let scratch = tempfile::tempdir_in(MEMORY_FILES).context("no memory file system at /dev/shm")?;
    let image = |name: &str| -> Result<_> {
        let path = sparse(&scratch.path().join(name), LUN_BYTES)?;
        // Holes are read from nowhere; both targets shall read pages.
        cmd::output(
            Command::new("dd")
                .args(["if=/dev/urandom", "bs=1M", "conv=notrunc", "status=none"])
                .args([format!("of={}", path.display()), format!("count={}", LUN_BYTES >> 20)]),
        )?;
        Ok(path)
    };
    let file = format!("file:{}", image("ours")?.display());
    let serve = ["serve", "--listen", "127.0.0.1:0", "--target", TARGET, "--lun", &file, "--lun", "mem:256M"];
    let ours = Server::start(&bin.join("iscsi-target"), &serve)?;
    let spec = LunSpec { image: Some(image("tgtd")?), ..LunSpec::new(LUN_BYTES) };
    let tgtd = Target::start(Kind::Tgtd, &Spec::luns([spec]))?;
    let portal = ours.told("addr")?;
    let contenders = [
        Contender { name: "iscsi-target file", pid: ours.pid(), url: format!("iscsi://{portal}/{TARGET}/0") },
        Contender { name: "iscsi-target mem", pid: ours.pid(), url: format!("iscsi://{portal}/{TARGET}/1") },
        Contender { name: "tgtd file", pid: tgtd.proc().pid(), url: tgtd.url(0) },
    ];
    let mut rows = Vec::new();
    for &(case, blocks) in CASES {
        let mut measured = vec![vec![Vec::new(); METRICS.len()]; contenders.len()];
        for _ in 0..rounds {
            for (contender, values) in contenders.iter().zip(&mut measured) {
                let (iops, cpu_s) = perf(contender, blocks, secs)?;
                values[0].push(iops);
                values[1].push(iops * f64::from(secs) / cpu_s);
            }
        }
        for (contender, rounds) in contenders.iter().zip(measured) {
            rows.push(Row {
                case: case.into(),
                contender: contender.name.into(),
                rounds,
                summary: Vec::new(),
            });
        }
        eprintln!("measured: {case}");
    }
    let preface = vec![
        format!(
            "iSCSI targets on files in memory ({MEMORY_FILES}); {rounds} rounds of {secs} s, taking turns"
        ),
        "load: iscsi-perf -m 32 -r (libiscsi); CPU seconds are the target's, user and system".into(),
    ];
    Report { name: "target", preface, metrics: METRICS.to_vec(), rows, goals: Vec::new() }
        .finish(|_| Vec::new())
}

/// One run of `iscsi-perf`: mean IOPS, and CPU seconds of the target.
fn perf(contender: &Contender, blocks: u32, secs: u32) -> Result<(f64, f64)> {
    let before = procfs::cpu_time(contender.pid)?;
    let text = Cmd::new(Path::new("iscsi-perf"))
        .args(["-m", "32", "-r", "-b", &blocks.to_string(), "-t", &secs.to_string(), &contender.url])
        .output(Duration::from_secs(u64::from(secs) + 30))?;
    let cpu = procfs::cpu_time(contender.pid)?.saturating_sub(before);
    Ok((iops(&text).with_context(|| format!("no figure in iscsi-perf's output: {text}"))?, cpu.as_secs_f64()))
}

/// The last `iops average N` that it printed; the line is rewritten with carriage returns.
pub(super) fn iops(text: &str) -> Option<f64> {
    let tail = &text[text.rfind("iops average ")? + "iops average ".len()..];
    tail.split_whitespace().next()?.parse().ok()
}
