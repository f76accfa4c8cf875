//! What `cargo xtask bench isolation` measures, in short: a guest that computes beside its I/O, with the VCP on a hardware thread
//! of its own and on the vCPU's. How much is left of the computing is the benchmark's to say; here both must go on.

use std::time::Duration;

use anyhow::{Context, ensure};
use guest_images::bare;
use vcp_tests::Result;
use vcp_tests::target::{Kind, Spec, Target};

use crate::monitor::ring3;
use crate::support::{numbers, vcp};

const RUN: Duration = Duration::from_secs(60);

#[test]
fn a_guest_computes_beside_its_io_wherever_the_vcp_is() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    for place in ["cpu=1", "cpu=0,poll-us=0", "cpu=shared:a,poll-us=always"] {
        let out = vcp([
            "run",
            "--vcpu-cpus",
            "0",
            "--cmdline",
            "job=mixed rw=randread,randwrite qd=8 secs=1 region=8M",
        ])?
        .arg("--disk")
        .arg(format!("url={},{place}", target.url(0)))
        .arg("--kernel")
        .arg(bare::build()?)
        .run(RUN)?;
        ensure!(out.status.success(), "{place}: {}: {}{}", out.status, out.stdout, out.stderr);
        for load in ["none", "randread", "randwrite"] {
            let line = out.stdout.lines().find(|line| line.contains(&format!("mixed: rw={load} ")));
            let line = line.with_context(|| format!("{place}: no result with {load}: {}", out.stdout))?;
            let work = numbers(line, " mops=");
            ensure!(work.len() == 1 && work[0] > 0.0, "{place}: nothing was computed: {line}");
            let done = numbers(line, " ios=");
            ensure!(
                load == "none" || done.first().is_some_and(|ios| *ios > 0.0),
                "{place}: nothing was done: {line}"
            );
        }
    }
    Ok(())
}
