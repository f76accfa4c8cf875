//! `cargo xtask soak net`: front ends are killed under traffic, and the switch under front ends that wait for it.
//!
//! As with [`kill`](super::kill), the run itself is two end-to-end tests with a larger count.

use anyhow::Result;

use crate::cmd;

/// How long.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Kills of either side
    #[arg(long, default_value_t = 200)]
    kills: u32,
}

/// Kills DPDK's front ends under vcp-net, and vcp-net under DPDK's front ends, `kills` times each.
///
/// # Errors
/// Traffic did not come back, or the books do not balance.
pub(crate) fn run(args: &Args) -> Result<()> {
    let programs = cmd::release_programs()?;
    for test in
        ["switch::a_killed_front_end_disturbs_nobody", "switch::dpdk_that_listens_survives_the_switch"]
    {
        cmd::run(
            cmd::cargo()
                .args(["test", "-p", "vcp-tests", "--test", "e2e", "--", test, "--exact", "--nocapture"])
                .env("VCP_BIN_DIR", &programs)
                .env("VCP_SOAK_NET_KILLS", args.kills.to_string()),
        )?;
    }
    Ok(())
}
