//! `vcp-net take-over`: the new process of a hand-over.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use vcp_core::handover::giver::Giving;
use vcp_core::handover::taker::Taker;
use vcp_core::handover::upgrade::ask;
use vcp_core::process::{Signals, chain, exit_with_parent, set_log_level};
use vcp_core::vu::{End, ServeOptions};

use super::{Offer, program};
use crate::confine::{self, Needs};
use crate::port::NetPort;
use crate::serve::{adopt_pulse, announce, secret};
use crate::switch::SwitchFabric;
use crate::uplink::Uplink;
use crate::uplink::none::NoUplink;

/// Arguments of `take-over`.
#[derive(Args, Debug)]
#[command(
    after_help = "Example (in a monitor, which then waits for `ready:` and for the end of the old process):\n  \
    vcp-net take-over --control /run/net.ctl --exit-with-parent"
)]
pub struct TakeOverArgs {
    /// Control socket of the process to take over from
    #[arg(long, value_name = "SOCKET")]
    pub control: PathBuf,
    /// The old process stays and stands for this one to whoever started it: its signals are passed on, its end and this
    /// one's are one, and the log goes where it went
    #[arg(long)]
    pub stand_in: bool,
    /// End when the process that started this one ends
    #[arg(long, conflicts_with = "stand_in")]
    pub exit_with_parent: bool,
    /// For a supervisor: the page into which the data thread counts what it does (a sealed memfd)
    #[arg(long, value_name = "FDNUM")]
    pub pulse_fd: Option<i32>,
}

/// Takes over and serves until SIGTERM or SIGINT, or until the next hand-over.
///
/// # Errors
/// What failed, on what; unless this process was the owner already, the old one goes on.
pub fn run(args: &TakeOverArgs, log: Option<&str>, signals: &Signals) -> Result<End> {
    if args.exit_with_parent && !exit_with_parent().context("cannot watch the parent process")? {
        bail!("the parent process ended before this one was up");
    }
    let pulse = adopt_pulse(args.pulse_fd)?;
    let stream = ask(&args.control, args.stand_in)?;
    let (taker, app) = Taker::begin(stream, program()).context("cannot take over")?;
    let offer: Offer = match serde_json::from_value(app.clone()) {
        Ok(offer) => offer,
        Err(error) => {
            taker.refuse(format!("the offer is not understood: {error}"));
            return Err(error).context("the old process's offer is not understood");
        }
    };
    if let (None, Some(filter)) = (log, &offer.log)
        && let Err(error) = set_log_level(filter)
    {
        tracing::warn!(error, "the old process's log filter is not understood");
    }
    let prepared = prepare(&offer);
    let (fabric, report, poll) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            taker.refuse(chain(&*error));
            return Err(error);
        }
    };
    let devices = offer.ports.iter().map(|spec| (Arc::from(&*spec.name), NetPort::new(spec.clone())));
    let devices = devices.collect();
    let ready = format!("ready: ports={} confined={}", offer.ports.len(), report.summary());
    let options = ServeOptions {
        cpu: offer.cpu,
        poll,
        giving: Some(Giving { program: program(), offer: app }),
        pulse,
        ..ServeOptions::default()
    };
    let extra = confine::status(&report);
    let ready = move || announce(&ready);
    Ok(vcp_core::vu::take_over_joined(taker, devices, fabric, &options, signals, extra, ready)?)
}

/// What can be made before anything stops.
fn prepare(
    offer: &Offer,
) -> Result<(SwitchFabric, vcp_core::process::confine::Report, vcp_core::poll::PollMode)> {
    let needs = Needs {
        pairs: offer.ports.iter().map(|port| port.pairs).collect(),
        sockets: offer.sockets.clone(),
        dials: offer.dials,
        captures: offer.capture_dir.iter().cloned().collect(),
        listens: offer.listens,
        flows: offer.flows,
    };
    offer.ports.iter().try_for_each(crate::port::PortSpec::check).map_err(anyhow::Error::msg)?;
    let poll = offer.poll_us.parse().map_err(anyhow::Error::msg).context("--poll-us")?;
    let secret = secret()?;
    let report = confine::confine(offer.confine, needs)?;
    let uplinks = (0..offer.switches).map(|_| Box::new(NoUplink) as Box<dyn Uplink>).collect();
    let mut fabric = SwitchFabric::new(&offer.ports, uplinks, secret, Instant::now());
    if offer.second_cpu.is_some() {
        fabric.place_on_second(offer.second_cpu).context("the second thread")?;
    }
    if let Some(dir) = &offer.capture_dir {
        fabric.capture_in(dir);
    }
    Ok((fabric, report, poll))
}
