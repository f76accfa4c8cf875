//! `cargo xtask sim`: many seeds of the simulation (`vcp-iscsi/tests/sim`), or one with its trace. CI runs some of them as
//! a test.

use anyhow::Result;

use crate::cmd;

/// Which seeds.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: cargo xtask sim --seeds 100000 --from 5000")]
pub(crate) struct Args {
    /// How many seeds
    #[arg(long, default_value_t = 20_000)]
    seeds: u64,
    /// The first one
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Only this one, with its trace if it fails
    #[arg(long)]
    seed: Option<u64>,
}

/// Runs them in a release build.
///
/// # Errors
/// A run broke a rule; the output ends with the line that repeats it, made smaller.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut cargo = cmd::cargo();
    cargo.args(["test", "--release", "-p", "vcp-iscsi", "--test", "sim", "--"]);
    cargo.args(["--exact", "--nocapture", "--include-ignored"]);
    match args.seed {
        Some(seed) => cargo.arg("replay").env("VCP_SIM_SEED", seed.to_string()),
        None => cargo
            .arg("seeds")
            .env("VCP_SIM_FROM", args.from.to_string())
            .env("VCP_SIM_SEEDS", args.seeds.to_string()),
    };
    cmd::run(&mut cargo)
}
