//! Datagrams of a stock Debian guest to a server on the host, at the same offered rates through each user-mode stack: how
//! many arrive, and where the others are lost. Nothing slows their sender down, so the rates are asked for, not found.
//!
//! The host counts what has no room in a receiver's socket (`/proc/net/snmp`, all sockets of the host's namespace: nothing
//! else should use UDP meanwhile); our stack counts what it drops itself.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;
use vcp_tests::proc::Cmd;

use super::super::report::{Metric, Report, Row};
use super::guests::{BackEnd, CONTENDERS, IPERF, LOAD, number, scratch};

/// Offered rates.
const LOADS: [(&str, &str); 4] = [
    ("200 Mbit/s", "-b 200M"),
    ("300 Mbit/s", "-b 300M"),
    ("400 Mbit/s", "-b 400M"),
    ("as fast as it goes", "-b 0"),
];

const METRICS: &[Metric] = &[
    Metric { title: "Mbit/s received", more_is_better: true, digits: 0 },
    Metric { title: "% lost", more_is_better: false, digits: 2 },
    Metric { title: "% in the receiver's socket", more_is_better: false, digits: 2 },
    Metric { title: "% in our stack", more_is_better: false, digits: 2 },
];

/// Measures and reports.
///
/// # Errors
/// A program is missing, or a run failed.
pub(super) fn run(bin: &Path, rounds: u32, secs: u32) -> Result<()> {
    let scratch = scratch()?;
    let who = [CONTENDERS[0], CONTENDERS[2], CONTENDERS[3]];
    let mut seen: Vec<Vec<Vec<[f64; 4]>>> = who.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for (contender, seen) in who.iter().zip(&mut seen) {
            let one = one(bin, scratch.path(), contender, secs);
            seen.push(one.with_context(|| format!("the guest of {contender}"))?);
            eprintln!("measured: {contender}");
        }
    }
    let mut rows = Vec::new();
    for (at, (case, _)) in LOADS.iter().enumerate() {
        for (contender, seen) in who.iter().zip(&seen) {
            let rounds =
                (0..METRICS.len()).map(|column| seen.iter().map(|round| round[at][column]).collect());
            let (case, contender) = ((*case).into(), (*contender).into());
            rows.push(Row { case, contender, rounds: rounds.collect(), summary: Vec::new() });
        }
    }
    let preface = vec![
        format!(
            "UDP from the guest, 1400 bytes, through user-mode stacks (iperf3); {rounds} rounds of {secs} s"
        ),
        "a stock Debian guest in QEMU (TCG, 2 CPUs), the server on the host's loopback".into(),
    ];
    Report { name: "net-datagrams", preface, metrics: METRICS.to_vec(), rows, goals: Vec::new() }
        .finish(|_| Vec::new())
}

/// Datagrams so far that had no room in a socket of the host.
fn no_room() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/net/snmp").context("no counters of the host's network")?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp: ")).map(str::split_whitespace);
    let (names, values) = lines.next().zip(lines.next()).context("no counters of UDP")?;
    let found = names.zip(values).find(|(name, _)| *name == "RcvbufErrors");
    found.and_then(|(_, value)| value.parse().ok()).context("the host does not count what has no room")
}

/// Datagrams so far that our stack had, and did not send.
fn not_sent(dir: &Path) -> Result<u64> {
    let told = vcp_tests::switch::ask(&dir.join("control"), &json!({"cmd": "ports"}))?;
    let drops = told.pointer("/switches/0/uplink/counters/drops").and_then(|it| it.as_object());
    Ok(drops.context("the stack counts nothing")?.values().filter_map(serde_json::Value::as_u64).sum())
}

/// One guest of one contender.
fn one(bin: &Path, dir: &Path, contender: &str, secs: u32) -> Result<Vec<[f64; 4]>> {
    let port = vcp_tests::port::free()?.to_string();
    let _iperf = Cmd::new(IPERF).args(["-s", "-B", "127.0.0.1", "-p", &port]).spawn()?;
    let (back_end, guest) = BackEnd::start(bin, dir, contender)?;
    let mut job = LOAD.to_owned();
    for (at, (_, args)) in LOADS.iter().enumerate() {
        job.push_str(&format!("load {at} -p {port} -t {secs} -u -l 1400 {args}\n"));
    }
    let guest = guest.program(IPERF).deadline(Duration::from_secs(120 + 10 * u64::from(secs)));
    let mut running = guest.start(&job)?;
    let mut lost = Vec::new();
    for at in 0..LOADS.len() {
        let mut count = |name: &str| -> Result<(u64, u64)> {
            running.wait_value(&format!("{name}{at}"))?;
            let ours = matches!(back_end, BackEnd::Ours(_)).then(|| not_sent(dir)).transpose()?;
            Ok((no_room()?, ours.unwrap_or(0)))
        };
        let (before, after) = (count("START")?, count("DONE")?);
        lost.push((after.0 - before.0, after.1 - before.1));
    }
    let done = running.wait()?;
    if done.status != 0 {
        bail!("the guest's job failed:\n{}", done.console);
    }
    let row = |(at, (socket, stack)): (usize, (u64, u64))| {
        let sent = number(&done, &format!("SENT{at}"))?.max(1.0);
        let (rate, lost) = (number(&done, &format!("RATE{at}"))?, number(&done, &format!("LOST{at}"))?);
        Ok([rate, lost, 100.0 * socket as f64 / sent, 100.0 * stack as f64 / sent])
    };
    lost.into_iter().enumerate().map(row).collect()
}
