//! `vcp bench blk` as a user runs it, on our backend and on qemu-storage-daemon's.

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
