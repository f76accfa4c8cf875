//! `cargo xtask soak kill`: kills of vcp-iscsi under a verifying load, as many as wanted.
//!
//! The run itself is the end-to-end test of the same name with a larger count, so that there is one program that decides
//! what a loss is.

use anyhow::Result;

use crate::cmd;

/// How long.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Kills for each kind of ring
    #[arg(long, default_value_t = 1000)]
    count: u32,
}

/// Kills `count` times with a split ring and `count` times with a packed one.
///
/// # Errors
/// A request was lost or answered twice, or data differs.
pub(crate) fn run(args: &Args) -> Result<()> {
    cmd::run(
        cmd::cargo()
            .args(["test", "--release", "-p", "vcp-tests", "--test", "e2e", "--"])
            .args(["kill::soak", "--exact", "--nocapture", "--include-ignored"])
            .env("VCP_SOAK_KILLS", args.count.to_string()),
    )
}
