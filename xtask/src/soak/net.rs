//! `cargo xtask soak net`: front ends of a switch are killed under traffic.
//!
//! As with [`kill`](super::kill), the run itself is an end-to-end test with a larger count.

use anyhow::Result;

use crate::cmd;

/// How long.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Kills
    #[arg(long, default_value_t = 200)]
    kills: u32,
}

/// Kills DPDK's front ends under vcp-net, `kills` times.
///
/// # Errors
/// Traffic did not come back, or the books do not balance.
pub(crate) fn run(args: &Args) -> Result<()> {
    let programs = cmd::release_programs()?;
    cmd::run(
        cmd::cargo()
            .args(["test", "-p", "vcp-tests", "--test", "e2e", "--"])
            .args(["switch::a_killed_front_end_disturbs_nobody", "--exact", "--nocapture"])
            .env("VCP_BIN_DIR", programs)
            .env("VCP_SOAK_NET_KILLS", args.kills.to_string()),
    )
}
