//! `cargo xtask`: set-up, demo, tests, benchmarks and fuzzing, one command each.
//!
//! Everything a newcomer types is here; what a task needs and the machine lacks, it installs from Debian by name.
#![forbid(unsafe_code)]

mod bench;
mod cmd;
mod demo;
mod fuzz;
mod packages;
mod server;
mod sim;
mod soak;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Set-up, demo, tests, benchmarks and fuzzing of VCP.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = "Example: cargo xtask demo")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Boot a guest whose disk is an iSCSI LUN behind a VCP, write, flush, read back, verify
    Demo,
    /// Install what is missing, then run every test
    Test {
        /// Only end-to-end tests whose name contains one of these (`cargo test -- FILTER`)
        filter: Vec<String>,
    },
    /// Measure beside the peers: `blk`, `target`, or all
    Bench(bench::Args),
    /// Run the fuzz targets for a bounded time
    Fuzz {
        /// One target; all if not given
        name: Option<String>,
        /// Seconds for each
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// The long runs: `kill`
    #[command(subcommand)]
    Soak(soak::Soak),
    /// Simulate session, recovery and multipath from seeds, in virtual time
    Sim(sim::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Demo => demo::run(),
        Task::Test { filter } => test::run(&filter),
        Task::Bench(args) => bench::run(&args),
        Task::Fuzz { name, seconds } => fuzz::run(name.as_deref(), seconds),
        Task::Soak(soak) => soak::run(&soak),
        Task::Sim(args) => sim::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
