//! `cargo xtask soak`: the long runs. CI runs the same code for a short while; here it goes on until the count is reached
//! or something is lost.
//!
//! * [`cut`]: connections are cut at random bytes under a verifying load, again and again.
//! * [`kill`]: the VCP is killed under a verifying load, again and again.
//! * [`mod@msgq`]: either side of a message queue is killed, against a ledger.
//! * [`mod@net`]: front ends of a switch are killed under traffic.
//! * [`monitor`]: the same under `vcp run`, which starts it again.
//! * [`upgrade`]: under `vcp run` it is replaced by a process of its own accord, again and again.

mod cut;
mod kill;
mod monitor;
mod msgq;
mod net;
mod upgrade;

use anyhow::Result;
use clap::Subcommand;

/// What to wear out.
#[derive(Debug, Subcommand)]
pub(crate) enum Soak {
    /// Connections cut at random bytes, in either direction, under a verifying load
    Cut(cut::Args),
    /// `kill -9` of vcp-iscsi under a verifying load, restart, reconnect
    Kill(kill::Args),
    /// `kill -9` of vcp-iscsi under `vcp run` with a verifying guest
    Monitor(monitor::Args),
    /// `kill -9` of either side of a message queue, against a ledger of requests
    Msgq(msgq::Args),
    /// Live upgrades of vcp-iscsi under `vcp run` with a verifying guest
    Upgrade(upgrade::Args),
    /// `kill -9` of front ends of vcp-net under traffic
    Net(net::Args),
}

/// Runs one.
///
/// # Errors
/// Something was lost, answered twice, or did not come back.
pub(crate) fn run(soak: &Soak) -> Result<()> {
    match soak {
        Soak::Cut(args) => cut::run(args),
        Soak::Kill(args) => kill::run(args),
        Soak::Monitor(args) => monitor::run(args),
        Soak::Msgq(args) => msgq::run(args),
        Soak::Upgrade(args) => upgrade::run(args),
        Soak::Net(args) => net::run(args),
    }
}
