//! `cargo xtask soak monitor`: kills of vcp-iscsi under `vcp run` with the bare-metal guest verifying, or with a stock Debian
//! guest in the helper VM, as many as wanted.
//!
//! The run itself is the end-to-end test of the same name with a larger count, so that there is one program that decides
//! what a loss is. It reports how long the guest waited, and fails if the monitor keeps descriptors, threads or memory of
//! the dead.

use anyhow::Result;

use crate::cmd;

/// How long.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Kills
    #[arg(long, visible_alias = "count", default_value_t = 100)]
    kills: u32,
    /// With a stock Debian guest in the helper VM (slow: everything in it is emulated)
    #[arg(long)]
    linux: bool,
}

/// Kills `kills` times.
///
/// # Errors
/// A request was lost or answered twice, data differs, or the monitor leaks.
pub(crate) fn run(args: &Args) -> Result<()> {
    let programs = cmd::release_programs()?;
    let test = if args.linux { "monitor_kill::soak_linux" } else { "monitor_kill::soak" };
    cmd::run(
        cmd::cargo()
            .args(["test", "-p", "vcp-tests", "--test", "e2e", "--"])
            .args([test, "--exact", "--nocapture", "--include-ignored"])
            .env("VCP_SOAK_KILLS", args.kills.to_string())
            .env("VCP_BIN_DIR", programs),
    )
}
