//! What a device takes in memory is told at its start, is little, and holds under load.

use std::fs;

use anyhow::{Context, ensure};
use vcp_tests::backend::Backend;
use vcp_tests::front::Driver;
use vcp_tests::load::Load;
use vcp_tests::proc::Stream;
use vcp_tests::target::{self, Kind, Spec, Target};
use vcp_tests::{Result, pattern};

/// The goal for a device with default settings.
const MOST_BYTES: u64 = 64 << 20;
/// The process itself: program data, threads, what is needed for set-up.
const PROCESS_BYTES: u64 = 16 << 20;
const LONG: usize = 512 << 10;

/// Private memory of a process that is resident.
fn private_bytes(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}

fn keeps_to_its_bound(args: &[&str]) -> Result<()> {
    if !target::have(Kind::Ours) {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(32 << 20).digests(true))?;
    let backend = Backend::vcp_iscsi(&target.url(0), args)?;
    let ready = backend.proc().stream(Stream::Out);
    let told = ready.split_whitespace().find_map(|word| word.strip_prefix("memory_bound_bytes="));
    let bound: u64 = told.with_context(|| format!("no memory_bound_bytes in: {ready}"))?.parse()?;
    ensure!(bound < MOST_BYTES, "{args:?}: a device may take {bound} bytes");
    let mut driver = Driver::connect(backend.socket(), 1)?;
    Load::new(21, 1024).run(&mut driver, 0, 16, 2000, |_| Ok(()))?;
    for n in 0..16 {
        let at = (8 << 20) + n * LONG as u64;
        let data = pattern::make(n, at, LONG);
        driver.write(at, &data)?;
        ensure!(driver.read(at, LONG)? == data, "not what was written");
    }
    let taken = private_bytes(backend.proc().pid())?;
    println!("{args:?}: {bound} bytes told, {taken} taken by the process");
    ensure!(taken < bound + PROCESS_BYTES, "{args:?}: {taken} bytes resident, {bound} told");
    Ok(())
}

#[test]
fn memory_keeps_to_what_is_told() -> Result<()> {
    keeps_to_its_bound(&[])
}

#[test]
fn memory_keeps_to_what_is_told_with_digests_and_several_sessions() -> Result<()> {
    keeps_to_its_bound(&["--header-digest", "crc32c", "--data-digest", "crc32c", "--sessions", "2"])
}
