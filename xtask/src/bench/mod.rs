//! `cargo xtask bench`: each benchmark beside its peer, in one run, on one target, in alternating rounds.

mod blk;
mod report;
mod stats;
mod strace;
mod target;

use anyhow::Result;
use clap::ValueEnum;

use crate::cmd;
use crate::packages::{self, Need};

/// What to measure and how long.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: cargo xtask bench blk --rounds 5 --secs 3")]
pub(crate) struct Args {
    /// Which benchmark; all if not given
    name: Option<Name>,
    /// Rounds; the contenders take turns, medians are reported
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of load per case, contender and round
    #[arg(long, default_value_t = 2)]
    secs: u32,
}

/// The benchmarks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// `vcp-iscsi` beside qemu-storage-daemon's iSCSI export, both as vhost-user-blk backends of the same LUN
    Blk,
    /// `iscsi-target` beside tgtd, under libiscsi's `iscsi-perf`
    Target,
}

/// Installs, builds for speed, measures.
///
/// # Errors
/// A program is missing or a run failed.
pub(crate) fn run(args: &Args) -> Result<()> {
    packages::ensure(Need::Test)?;
    let bin = cmd::release_programs()?;
    let chosen = |name| args.name.is_none_or(|only| only == name);
    if chosen(Name::Target) {
        target::run(&bin, args.rounds, args.secs)?;
    }
    if chosen(Name::Blk) {
        blk::run(&bin, args.rounds, args.secs)?;
    }
    Ok(())
}
