//! `cargo xtask soak upgrade`: live upgrades of vcp-iscsi under `vcp run` with the bare-metal guest verifying, as many as
//! wanted; prints how long each stood still, and what of it the guest saw.
//!
//! As with [`monitor`](super::monitor), the run itself is an end-to-end test with a larger count.

use anyhow::Result;

use crate::cmd;

/// How long.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Upgrades for each kind of ring
    #[arg(long, default_value_t = 20)]
    count: u32,
}

/// Upgrades `count` times with split rings, and with packed ones.
///
/// # Errors
/// A request was lost or answered twice, data differs, or the monitor leaks.
pub(crate) fn run(args: &Args) -> Result<()> {
    let programs = cmd::release_programs()?;
    cmd::run(
        cmd::cargo()
            .args(["test", "-p", "vcp-tests", "--test", "e2e", "--"])
            .args(["supervised::soak_upgrades", "--exact", "--nocapture", "--include-ignored"])
            .env("VCP_SOAK_UPGRADES", args.count.to_string())
            .env("VCP_BIN_DIR", programs),
    )
}
