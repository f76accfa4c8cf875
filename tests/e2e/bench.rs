//! `vcp bench blk` as a user runs it, on our backend and on qemu-storage-daemon's.

use std::io::{BufRead, BufReader, Write};

use anyhow::{Context, ensure};
use serde_json::Value;
use vcp_tests::backend::Backend;
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, tool};

use crate::support::{COMMAND, vcp};

fn bench(backend: &Backend, rw: &str) -> Result<Value> {
    let socket = backend.socket().display().to_string();
    let args = ["bench", "blk", "--socket", &socket, "--rw", rw, "--secs", "1", "--region", "8M", "--json"];
    let text = vcp(args)?.output(COMMAND)?;
    serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
}

fn verifies(backend: &Backend) -> Result<()> {
    for rw in ["verify", "randread", "randwrite"] {
        let report = bench(backend, rw)?;
        let iops = report.get("iops").and_then(Value::as_f64);
        ensure!(iops.is_some_and(|n| n > 0.0), "{rw}: no iops in {report}");
    }
    Ok(())
}

/// With io_uring one call does all that a pass brought up and waits: at depth 1 two for a request, one for each sleep. Where
/// this machine has none, plain calls serve.
#[test]
fn a_request_costs_two_system_calls_of_the_ring() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let dir = tempfile::tempdir()?;
    let control = dir.path().join("ctl").display().to_string();
    let backend = Backend::vcp_iscsi(&target.url(0), &["--poll-us", "0", "--control", &control])?;
    let enters = || -> Result<u64> {
        let mut stream = std::os::unix::net::UnixStream::connect(&control)?;
        writeln!(stream, "{{\"cmd\":\"metrics\"}}")?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        let metrics: Value = serde_json::from_str(&line)?;
        metrics["loop"]["ring_enters"].as_u64().context("ring_enters")
    };
    let socket = backend.socket().display().to_string();
    let args =
        ["bench", "blk", "--socket", &socket, "--rw", "randread", "--qd", "1", "--secs", "1", "--json"];
    let before = enters()?;
    if before == 0 {
        return Ok(());
    }
    let report: Value = serde_json::from_str(&vcp(args)?.output(COMMAND)?)?;
    let (ios, calls) = (report["ios"].as_u64().context("ios")?, enters()? - before);
    println!("{calls} system calls of the ring for {ios} requests");
    // Some more for the set-up, the timers and the questions of this test.
    ensure!(calls <= 2 * ios + ios / 20 + 200, "{calls} calls for {ios} requests");
    Ok(())
}

#[test]
fn bench_blk_verifies_our_backend() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    verifies(&Backend::vcp_iscsi(&target.url(0), &[])?)
}

#[test]
fn bench_blk_verifies_qemu_storage_daemon() -> Result<()> {
    if !tool::have(&["qemu-storage-daemon", "tgtd", "tgtadm"]) {
        return Ok(());
    }
    let target = Target::start(Kind::Tgtd, &Spec::disk(64 << 20))?;
    verifies(&Backend::qsd(&target, 0, 1)?)
}
