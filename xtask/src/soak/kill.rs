//! `cargo xtask soak kill`: kills of vcp-iscsi under a verifying load, as many as wanted.
//!
//! The run itself is the end-to-end test of the same name with a larger count, so that there is one program that decides
//! what a loss is. The programs under test are those that users run.

use anyhow::Result;

use crate::cmd;

/// How long.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Kills for each kind of ring with the embedded target; a quarter as many with tgtd
    #[arg(long, default_value_t = 1000)]
    count: u32,
}

/// Kills `count` times with a split ring and `count` times with a packed one.
///
/// # Errors
/// A request was lost or answered twice, or data differs.
pub(crate) fn run(args: &Args) -> Result<()> {
    let programs = cmd::release_programs()?;
    cmd::run(
        cmd::cargo()
            .args(["test", "-p", "vcp-tests", "--test", "e2e", "--"])
            .args(["kill::soak", "--exact", "--nocapture", "--include-ignored"])
            .env("VCP_BIN_DIR", programs)
            .env("VCP_SOAK_KILLS", args.count.to_string()),
    )
}
