//! `vcp bench`: load generators for the virtual channel processors.
//!
//! `vcp bench blk` is a vhost-user-blk front end without a guest: `front` speaks vhost-user with any backend (ours,
//! qemu-storage-daemon's, SPDK's), `ring` drives a split virtqueue in `shared` memory, `load` measures,
//! `verify` checks data, `report` prints. Nothing here knows how a monitor works, and nothing needs KVM.

mod args;
mod cpu;
mod disk;
mod front;
mod load;
mod msgq;
mod pattern;
mod report;
mod ring;
mod shared;
mod verify;

pub use args::{BenchArgs, BenchCommand, BlkArgs, Rw, WaitMode};

use std::io::Write;

use anyhow::{Context, Result};

/// Runs what the command line asks for and prints the result on standard output. An error is a backend that cannot be
/// used, one that breaks the rules or stops, a request that fails, or (`--rw verify`) data that is not what was
/// written.
pub fn run(args: BenchArgs) -> Result<()> {
    match args.command {
        BenchCommand::Blk(args) => blk(&args),
    }
}

fn blk(args: &BlkArgs) -> Result<()> {
    let on = || format!("bench blk on {}", args.socket.display());
    let report = report::measure(args).with_context(on)?;
    let text = if args.json { serde_json::to_string(&report)? + "\n" } else { report.to_string() };
    std::io::stdout().lock().write_all(text.as_bytes()).context("cannot print the result")
}

#[cfg(test)]
mod backend_tests;
