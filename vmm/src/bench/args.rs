//! The command line of `vcp bench`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use crate::config::size;

/// Arguments of `vcp bench`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Example:\n  vcp bench blk --socket /run/disk0.sock --rw randread --bs 4k --qd 32 --secs 5"
)]
pub struct BenchArgs {
    /// What to load.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// What `vcp bench` can load.
#[derive(Clone, Debug, Subcommand)]
pub enum BenchCommand {
    /// Loads a vhost-user-blk backend (ours, qemu-storage-daemon's, SPDK's) as its only front end
    Blk(BlkArgs),
}

const EXAMPLES: &str = "Examples:
  vcp bench blk --socket /run/disk0.sock --rw randread --bs 4k --qd 32 --secs 5
  vcp bench blk --socket /run/disk0.sock --rw verify --region 256M --pid $(pidof vcp-iscsi) --json

randwrite, randrw, write and verify destroy what is on the disk.";

/// Arguments of `vcp bench blk`.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct BlkArgs {
    /// Socket that the backend listens on
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// The socket is that of `vcp-iscsi serve --msgq-path`: the load comes from a program without a guest, not from a
    /// vhost-user front end
    #[arg(long, conflicts_with_all = ["no_indirect", "no_event_idx"])]
    pub msgq: bool,
    /// Kind of load; verify writes a pattern, flushes, reads it back and compares
    #[arg(long, value_enum, default_value_t = Rw::Randread)]
    pub rw: Rw,
    /// Bytes per request (K, M: powers of 1024)
    #[arg(long, default_value = "4k", value_name = "SIZE", value_parser = size::parse)]
    pub bs: u64,
    /// Requests in flight on each queue
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub qd: u16,
    /// Length of the load in seconds; verify ends with the first round after it
    #[arg(long, default_value_t = 5.0, value_name = "SECONDS", value_parser = seconds)]
    pub secs: f64,
    /// Seconds of the same load before that, of which nothing is counted
    #[arg(long, default_value_t = 0.0, value_name = "SECONDS", value_parser = some_seconds)]
    pub warm_up: f64,
    /// Queues, each with a thread of its own
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,
    /// Bytes at the start of the disk that are used [default: all of it; verify: 64M at most]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub region: Option<u64>,
    /// How completions are waited for: by call (eventfd), or by polling, which takes a hardware thread per queue
    #[arg(long, value_enum, default_value_t = WaitMode::Event)]
    pub wait: WaitMode,
    /// Process id of the backend: reports the CPU time that it took
    #[arg(long, value_name = "PID")]
    pub pid: Option<u32>,
    /// Seed of addresses and pattern
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
    /// Seconds to wait for an answer to a vhost-user message and, under load, for any completion
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: f64,
    /// Do not negotiate indirect descriptors
    #[arg(long)]
    pub no_indirect: bool,
    /// Do not negotiate EVENT_IDX
    #[arg(long)]
    pub no_event_idx: bool,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Kinds of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Rw {
    /// Reads at random addresses.
    Randread,
    /// Writes at random addresses.
    Randwrite,
    /// Reads and writes at random addresses, seven reads to three writes.
    Randrw,
    /// Reads one block after the other.
    Read,
    /// Writes one block after the other.
    Write,
    /// Writes patterns and checks them.
    Verify,
}

impl Rw {
    /// Whether addresses are random.
    pub fn is_random(self) -> bool {
        matches!(self, Self::Randread | Self::Randwrite | Self::Randrw | Self::Verify)
    }

    /// Whether the disk is written.
    pub fn writes(self) -> bool {
        matches!(self, Self::Randwrite | Self::Randrw | Self::Write | Self::Verify)
    }

    /// Share of reads in percent.
    pub fn reads_percent(self) -> u64 {
        match self {
            Self::Randread | Self::Read => 100,
            Self::Randrw => 70,
            Self::Randwrite | Self::Write | Self::Verify => 0,
        }
    }
}

/// How completions are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WaitMode {
    /// Asks for a call and sleeps until it comes.
    Event,
    /// Asks for no calls and looks at the used ring all the time.
    Poll,
}

fn some_seconds(text: &str) -> Result<f64, String> {
    if text.parse() == Ok(0.0) { Ok(0.0) } else { seconds(text) }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(secs) if secs > 0.0 && secs <= 86_400.0 => Ok(secs),
        _ => Err(format!("{text:?} is not a number of seconds above 0, e.g. 0.5")),
    }
}
