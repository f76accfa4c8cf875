//! The bare-metal guest on this host: `job=mixed` under `vcp run` with the placement policies, the target on the last thread.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guest_images::bare;
use vcp_tests::proc::{Cmd, Proc, Stream};
use vcp_tests::procfs;

use super::{Window, add};
use crate::bench::report::Row;
use crate::cmd;
use crate::server::Server;

const CASE: &str = "bare-metal guest, 4k randread qd32";
const OWN: &str = "VCP, own thread";
const SHARED: &str = "VCP, vCPU's thread, poll=0";
/// Who is judged against whom.
pub(super) const PAIR: (&str, &str, &str) = (CASE, OWN, SHARED);
/// Contender, whether its VCP has the vCPU's thread, and how it looks for work.
const PLACES: [(&str, bool, &str); 5] = [
    (OWN, false, ""),
    ("VCP, own thread, poll=always", false, ",poll-us=always"),
    ("VCP, own thread, poll=0", false, ",poll-us=0"),
    ("VCP, vCPU's thread", true, ""),
    (SHARED, true, ",poll-us=0"),
];
const TARGET: &str = "iqn.2026-11.vcp:bench";
/// How long the guest may take beside its loads.
const STEP: Duration = Duration::from_secs(60);

/// Measures; returns lines for the reader.
pub(super) fn run(bin: &Path, rounds: u32, secs: u32, rows: &mut Vec<Row>) -> Result<Vec<String>> {
    let check = cmd::output(std::process::Command::new(bin.join("vcp")).args(["check", "--json"]));
    let check: serde_json::Value = serde_json::from_str(&check?).context("vcp check --json")?;
    let cpus = allowed()?;
    let ([vcpu, vcp, ..], true) = (&cpus[..], check["ring3_guest"] == true) else {
        return Ok(vec![
            "natively: this host runs no bare-metal guest, or has one hardware thread only".into(),
        ]);
    };
    let last = cpus.last().unwrap_or(vcp);
    let (last_word, vcpu_word) = (last.to_string(), vcpu.to_string());
    let words =
        ["serve", "--listen", "127.0.0.1:0", "--target", TARGET, "--lun", "mem:64M", "--cpu", &last_word];
    let target = Server::start(&bin.join("iscsi-target"), &words)?;
    let url = format!("iscsi://{}/{TARGET}/0", target.told("addr")?);
    let kernel = bare::build()?;
    for _ in 0..rounds {
        for (name, shares, options) in PLACES {
            let cpu = if shares { vcpu } else { vcp };
            let guest = Cmd::new(bin.join("vcp"))
                .args(["run", "--vcpu-cpus", &vcpu_word, "--cmdline"])
                .arg(format!("job=mixed hold=1 rw=randread qd=32 secs={secs}"))
                .arg("--disk")
                .arg(format!("url={url},cpu={cpu}{options}"))
                .arg("--kernel")
                .arg(&kernel)
                .keep_stdin()
                .spawn()?;
            let Seen { alone_mops, mops, iops, p99_us, cpu } = watch(&guest, target.pid())?;
            // What it computed just before, with its VCP asleep: what else goes on on the host weighs on both.
            add(rows, CASE, name, Window { compute: mops / alone_mops, iops, p99_us, cpu });
        }
    }
    Ok(vec![format!(
        "natively: vCPU on thread {vcpu}, a VCP of its own thread on {vcp}, the target on {last} of {} threads; the guest looks at its \
         ring every 50 us; {rounds} rounds of {secs} s",
        cpus.len()
    )])
}

fn allowed() -> Result<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None).context("cannot read the allowed CPUs")?;
    Ok((0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect())
}

/// What one guest said, and what its processes used meanwhile.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Seen {
    alone_mops: f64,
    mops: f64,
    iops: f64,
    p99_us: f64,
    cpu: [f64; 3],
}

/// Follows a guest to its end.
fn watch(guest: &Proc, target: u32) -> Result<Seen> {
    guest.wait_line(Stream::Out, "mixed: with randread", STEP)?;
    let vcp = *procfs::vcps(guest.pid())?.first().context("there is no VCP")?;
    let used = || -> Result<[Duration; 3]> {
        Ok([procfs::cpu_time(guest.pid())?, procfs::cpu_time(vcp)?, procfs::cpu_time(target)?])
    };
    let (begun, before) = (Instant::now(), used()?);
    guest.wait_line(Stream::Out, "mixed: rw=randread", STEP)?;
    let (elapsed, after) = (begun.elapsed(), used()?);
    guest.say(b"q")?;
    let status = guest.wait(STEP)?;
    let said = guest.stream(Stream::Out);
    ensure!(status.success(), "the guest ended with {status}: {}", guest.tail());
    let mut cpu = [0.0; 3];
    for (part, (after, before)) in cpu.iter_mut().zip(after.iter().zip(before)) {
        *part = after.saturating_sub(before).as_secs_f64() / elapsed.as_secs_f64();
    }
    figures(&said, cpu).with_context(|| format!("not as expected: {said}"))
}

fn figures(said: &str, cpu: [f64; 3]) -> Option<Seen> {
    let value = |line: &str, key: &str| {
        line.split_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse::<f64>().ok())
    };
    let line = |start: &str| said.lines().find(|line| line.contains(start));
    let (alone, load) = (line("mixed: rw=none")?, line("mixed: rw=randread")?);
    let (mops, iops) = (value(load, "mops")?, value(load, "iops")?);
    Some(Seen { alone_mops: value(alone, "mops")?, mops, iops, p99_us: value(load, "p99_us")?, cpu })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_figures_are_understood() {
        let said = "mixed: alone\nmixed: rw=none secs=2 mops=800.00\nmixed: with randread\n\
                    mixed: rw=randread bs=4096 qd=32 secs=2.00 mops=600.00 ios=9 iops=4500 p50_us=1.0 p99_us=7.5 max_us=9 kicks=0\n";
        let seen = figures(said, [1.0, 0.5, 0.25]).unwrap();
        assert_eq!((seen.alone_mops, seen.mops, seen.iops, seen.p99_us), (800.0, 600.0, 4500.0, 7.5));
        assert_eq!(figures("mixed: rw=none mops=1", [0.0; 3]), None);
    }
}
