//! `cargo xtask bench`: each benchmark beside its peer, in one run, on one target, in alternating rounds.

mod blk;
mod goals;
mod isolation;
mod kernel;
mod matrix;
mod msgq;
mod net;
mod plot;
mod report;
mod space;
mod stats;
mod strace;
mod target;
mod vmm;

use anyhow::Result;
use clap::ValueEnum;

use crate::cmd;
use crate::packages::{self, Need};

/// What to measure and how long.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask bench blk\n  cargo xtask bench blk --full --rounds 5 --secs 3"
)]
pub(crate) struct Args {
    /// Which benchmark; if not given: target and blk
    name: Option<Name>,
    /// blk: a few loads, in about three minutes (the default)
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// blk: the whole matrix of sizes, kinds, depths and queues, in about half an hour
    #[arg(long)]
    full: bool,
    /// blk: with the host's TCP congestion control, even if it paces (BBR)
    #[arg(long)]
    host_network: bool,
    /// Rounds; the contenders take turns, medians are reported [default: blk 3, target 5, net 3, kernel 3, vmm 3, isolation 3, msgq 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Seconds of load per case, contender and round [default: blk 0.8, target 2, net 4, kernel 2, isolation 2]
    #[arg(long)]
    secs: Option<f64>,
    /// net: only this part
    #[arg(long)]
    part: Option<net::Part>,
}

/// The benchmarks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// `vcp-iscsi` beside qemu-storage-daemon's iSCSI export, both as vhost-user-blk backends of the same LUN
    Blk,
    /// `vcp-net` beside DPDK's vhost back end (testpmd, RFC 2544), and its user-mode stack beside passt and libslirp
    Net,
    /// `iscsi-target` beside tgtd, under libiscsi's `iscsi-perf`
    Target,
    /// `vcp-iscsi` beside the kernel's initiator, both in the helper VM
    Kernel,
    /// `vcp run` beside QEMU's microvm and q35 in the helper VM, and its exits per request there and natively
    Vmm,
    /// A guest that computes beside heavy I/O: carried out by a VCP, placed this way and that, and by the guest itself
    Isolation,
    /// The message queue beside iceoryx2, sockets, pipes and in-process queues
    Msgq,
}

/// Installs, builds for speed, measures.
///
/// # Errors
/// A program is missing or a run failed.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.name == Some(Name::Msgq) {
        return msgq::run(args.rounds.unwrap_or(3));
    }
    packages::ensure(Need::Test)?;
    let bin = cmd::release_programs()?;
    let chosen = |name| args.name.is_none_or(|only| only == name);
    if chosen(Name::Target) {
        // iscsi-perf takes whole seconds.
        let secs = args.secs.map_or(2, |secs| secs.ceil().max(1.0) as u32);
        target::run(&bin, args.rounds.unwrap_or(5), secs)?;
    }
    if args.name == Some(Name::Net) {
        packages::ensure(Need::Net)?;
        net::run(&bin, args.part, args.rounds.unwrap_or(3), args.secs.unwrap_or(4.0))?;
    }
    if args.name == Some(Name::Kernel) {
        packages::ensure(Need::Kernel)?;
        let secs = args.secs.map_or(2, |secs| secs.ceil().max(1.0) as u32);
        kernel::run(&bin, args.rounds.unwrap_or(3), secs)?;
    }
    if args.name == Some(Name::Vmm) {
        vmm::run(&bin, args.rounds.unwrap_or(3))?;
    }
    if args.name == Some(Name::Isolation) {
        packages::ensure(Need::Kernel)?;
        let secs = args.secs.map_or(2, |secs| secs.ceil().max(1.0) as u32);
        isolation::run(&bin, args.rounds.unwrap_or(3), secs)?;
    }
    if chosen(Name::Blk) {
        let (rounds, secs) = (args.rounds.unwrap_or(3), args.secs.unwrap_or(0.8).max(0.1));
        let mut again = ["bench", "blk", "--rounds", &rounds.to_string(), "--secs", &secs.to_string()]
            .map(str::to_owned)
            .to_vec();
        again.extend(args.full.then(|| "--full".to_owned()));
        if args.host_network || !space::run_again(&again)? {
            blk::run(&bin, &blk::Extent { full: args.full, rounds, secs })?;
        }
    }
    Ok(())
}
