//! `cargo xtask soak cut`: connections cut at random byte offsets, as many as wanted.
//!
//! As with [`kill`](super::kill), the run itself is an end-to-end test with a larger count.

use anyhow::Result;

use crate::cmd;

/// How long.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Cuts with the embedded target; a quarter as many with tgtd, and with two sessions
    #[arg(long, default_value_t = 10_000)]
    count: u32,
    /// All of them with this target, one session
    #[arg(long, value_parser = ["ours", "tgtd"])]
    target: Option<String>,
    /// Where the random numbers begin
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Cuts `count` connections of vcp-iscsi under a verifying load.
///
/// # Errors
/// A request was lost, or data differs.
pub(crate) fn run(args: &Args) -> Result<()> {
    let programs = cmd::release_programs()?;
    let mut test = cmd::cargo();
    test.args(["test", "-p", "vcp-tests", "--test", "e2e", "--"])
        .args(["cut::soak", "--exact", "--nocapture", "--include-ignored"])
        .env("VCP_BIN_DIR", programs)
        .env("VCP_SOAK_CUTS", args.count.to_string())
        .env("VCP_SOAK_SEED", args.seed.to_string());
    if let Some(target) = &args.target {
        test.env("VCP_SOAK_TARGET", target);
    }
    cmd::run(&mut test)
}
