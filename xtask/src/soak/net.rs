//! `cargo xtask soak net`: front ends are killed under traffic, and the switch under front ends that wait for it;
//! connections through the user-mode stack are opened and ended in every order.
//!
//! As with [`kill`](super::kill), the runs themselves are tests with a larger count.

use anyhow::Result;

use crate::cmd;

/// How long.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Kills of either side
    #[arg(long, default_value_t = 200)]
    kills: u32,
    /// Connections
    #[arg(long, default_value_t = 1_000_000)]
    connections: u64,
}

/// Kills DPDK's front ends under vcp-net, and vcp-net under DPDK's front ends, `kills` times each, and opens and ends
/// connections. With 0 of either the other alone.
///
/// # Errors
/// Traffic did not come back, the books do not balance, or a connection left something.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.connections != 0 {
        cmd::run(
            cmd::cargo()
                .args(["test", "--release", "-p", "vcp-net", "--test", "churn", "--", "--nocapture"])
                .env("VCP_SOAK_NET_CONNECTIONS", args.connections.to_string()),
        )?;
    }
    if args.kills == 0 {
        return Ok(());
    }
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
