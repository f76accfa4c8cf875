//! The command line of `vcp`.

mod run;

use clap::{Args, Parser, Subcommand};

pub use self::run::RunArgs;
use crate::bench;
use crate::ctl::CtlArgs;
use crate::top::TopArgs;

/// Virtual machines whose I/O runs on virtual channel processors.
#[derive(Debug, Parser)]
#[command(name = "vcp", version, about)]
pub struct Cli {
    /// What to log on standard error: error, warn, info, debug, trace, or a filter as in RUST_LOG
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log: Option<String>,
    /// Log JSON objects, one a line
    #[arg(long, global = true)]
    pub log_json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a guest and be its serial console until it ends
    Run(Box<RunArgs>),
    /// Act on a running guest through its API socket
    Ctl(CtlArgs),
    /// Show what running guests and their VCPs do, live
    Top(TopArgs),
    /// Tell what this host can do, and what to do about what it cannot
    Check(CheckArgs),
    /// Load a vhost-user backend and measure it
    Bench(bench::BenchArgs),
}

/// `vcp check`.
#[derive(Clone, Debug, Default, Args)]
#[command(after_help = "Example: vcp check --json | jq .linux_guest")]
pub struct CheckArgs {
    /// Print one JSON object instead of lines
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }
}
