//! A network namespace for benchmarks over loopback. Where the host's congestion control paces (BBR does, by timers, on
//! loopback too), its timers are what is measured, with peers as with us; see `docs/decisions/data-path.md`. In a namespace of its
//! own this program may choose another, and changes nothing for others.

use std::process::Command;

use anyhow::{Context, Result};

use crate::cmd;

/// Says to the program that is started in the namespace what the host has.
const HOST: &str = "VCP_BENCH_HOST_CONGESTION";
const CONGESTION: &str = "/proc/sys/net/ipv4/tcp_congestion_control";
/// Does not pace, and every kernel has it and lets a namespace have it.
const WITHOUT_PACING: &str = "reno";
const DO_NOT_PACE: [&str; 2] = ["cubic", WITHOUT_PACING];

fn congestion() -> Result<String> {
    let text = std::fs::read_to_string(CONGESTION).with_context(|| format!("cannot read {CONGESTION}"))?;
    Ok(text.trim().to_owned())
}

/// Runs this program with `args` in a namespace, if the host's congestion control paces and there may be one. Returns
/// whether it did; else the caller measures where it is.
///
/// # Errors
/// The run in the namespace failed.
pub(super) fn run_again(args: &[String]) -> Result<bool> {
    if std::env::var_os(HOST).is_some() {
        cmd::run(Command::new("ip").args(["link", "set", "lo", "up"]))?;
        std::fs::write(CONGESTION, WITHOUT_PACING).context("cannot choose the congestion control")?;
        return Ok(false);
    }
    let host = congestion()?;
    if DO_NOT_PACE.contains(&host.as_str())
        || cmd::output(Command::new("unshare").args(["--net", "true"])).is_err()
    {
        return Ok(false);
    }
    let program = std::env::current_exe().context("cannot find this program")?;
    cmd::run(Command::new("unshare").args(["--net", "--"]).arg(program).args(args).env(HOST, host))?;
    Ok(true)
}

/// For the report: what is in force, and why.
///
/// # Errors
/// The kernel does not tell.
pub(super) fn describe() -> Result<String> {
    let now = congestion()?;
    Ok(match std::env::var(HOST) {
        Ok(host) => format!(
            "TCP congestion control: {now}, in a network namespace of its own (the host's is {host}, which paces)"
        ),
        Err(_) => format!("TCP congestion control: {now}, the host's"),
    })
}
