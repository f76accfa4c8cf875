//! `cargo xtask soak net`: front ends are killed under traffic, reset their devices and take them away, and the switch is killed under
//! front ends that wait for it; stock guests are reset and lose their card; connections through the user-mode stack are
//! opened and ended in every order.
//!
//! As with [`kill`](super::kill), the runs themselves are tests with a larger count.

use anyhow::Result;

use crate::cmd;

/// What is done `--kills` times.
const KILLS: [&str; 5] = [
    "switch::a_killed_front_end_disturbs_nobody",
    "switch::dpdk_that_listens_survives_the_switch",
    "net_ends::kills_under_load_leave_nothing",
    "net_ends::resets_under_load_leave_nothing",
    "net_ends::unplugs_under_load_leave_nothing",
];

/// How long.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Kills of either side, resets and removals of devices: so many of each
    #[arg(long, default_value_t = 200)]
    kills: u32,
    /// Resets of a stock guest, and removals of its network card; each takes seconds
    #[arg(long, default_value_t = 5)]
    guests: u32,
    /// MiB of a file that a stock guest fetches, and fetches and sends back
    #[arg(long, default_value_t = 1024)]
    mib: u64,
    /// Connections
    #[arg(long, default_value_t = 1_000_000)]
    connections: u64,
}

/// Kills, resets and removes DPDK's front ends under vcp-net, and kills vcp-net under DPDK's front ends, `kills` times each, resets
/// stock guests, has one fetch and send a large file, and opens and ends connections. What is given as 0 is left out.
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
    let mut tests = Vec::new();
    if args.kills != 0 {
        tests.extend(KILLS);
    }
    if args.guests != 0 {
        tests.push("net_reset::guests_that_are_reset_and_lose_their_card_leave_nothing");
    }
    if args.mib != 0 {
        tests.push("net_large::a_large_file_is_whole_in_either_direction");
    }
    if tests.is_empty() {
        return Ok(());
    }
    let programs = cmd::release_programs()?;
    for test in tests {
        cmd::run(
            cmd::cargo()
                .args(["test", "-p", "vcp-tests", "--test", "e2e", "--", test, "--exact", "--nocapture"])
                .env("VCP_BIN_DIR", &programs)
                .env("VCP_SOAK_NET_KILLS", args.kills.to_string())
                .env("VCP_SOAK_NET_GUESTS", args.guests.to_string())
                .env("VCP_SOAK_NET_MIB", args.mib.to_string()),
        )?;
    }
    Ok(())
}
