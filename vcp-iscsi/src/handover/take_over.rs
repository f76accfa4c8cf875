//! `vcp-iscsi take-over`: the new process of a hand-over.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use vcp_core::device::RingDevice;
use vcp_core::handover::giver::Giving;
use vcp_core::handover::taker::Taker;
use vcp_core::handover::upgrade::ask;
use vcp_core::process::confine::Report;
use vcp_core::process::notify::Manager;
use vcp_core::process::{Signals, exit_with_parent, set_log_level};
use vcp_core::uring::{self, Ring};
use vcp_core::vu::{End, ServeOptions};

use super::offer::{DiskOffer, Offer};
use super::program;
use crate::blk::BlkDevice;
use crate::confine::{self, Needs};
use crate::engine::Engine;
use crate::limit::Limits;
use crate::portal::IscsiEngine;
use crate::portal::net::Network;
use crate::serve::{adopt_dialer, adopt_pulse, announce, describe, describe_io};

/// Arguments of `take-over`.
#[derive(Args, Debug)]
#[command(
    after_help = "Example (in a monitor, which then waits for `ready:` and for the end of the old process):\n  \
    vcp-iscsi take-over --control /run/disk0.ctl --exit-with-parent"
)]
pub struct TakeOverArgs {
    /// Control socket of the process to take over from
    #[arg(long, value_name = "SOCKET")]
    pub control: PathBuf,
    /// The old process stays and stands for this one to whoever started it: its signals are passed on, its end and this
    /// one's are one, and the log goes where it went
    #[arg(long)]
    pub stand_in: bool,
    /// For a supervisor: the page into which the data thread counts what it does (a sealed memfd)
    #[arg(long, value_name = "FDNUM")]
    pub pulse_fd: Option<i32>,
    /// For a supervisor: this process has no network, and whoever has the other end of this channel connects for it
    #[arg(long, value_name = "FDNUM")]
    pub dial_fd: Option<i32>,
    /// End when the process that started this one ends
    #[arg(long, conflicts_with = "stand_in")]
    pub exit_with_parent: bool,
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
    let network = adopt_dialer(args.dial_fd)?;
    let stream = ask(&args.control, args.stand_in)?;
    let (taker, app) = Taker::begin(stream, program()).context("cannot take over")?;
    let offer: Result<Offer, _> = serde_json::from_value(app.clone());
    let offer = match offer {
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
    let manager = Manager::find();
    let all = || offer.disks.iter().chain(&offer.msgq);
    let sockets = all().map(|disk| disk.socket.clone()).chain([args.control.clone()]);
    let needs = Needs {
        queues: all().map(|disk| disk.queues).collect(),
        sockets: sockets.collect(),
        captures: offer.disks.iter().filter_map(DiskOffer::capture_dir).collect(),
        network: network.is_none(),
    };
    let ring = uring::choose(offer.io);
    let confined = ring.map_err(anyhow::Error::from).and_then(|ring| {
        let report = confine::confine(offer.confine, ring.is_some(), needs)?;
        Ok((build(offer, ring, network.as_ref(), &report)?, report))
    });
    match confined {
        Ok((Built { devices, options, ready }, report)) => {
            let giving = Some(Giving { program: program(), offer: app });
            let options = ServeOptions { giving, pulse, ..options };
            let extra = confine::status(&report);
            let ready = move || announce(&ready, &manager);
            Ok(vcp_core::vu::take_over(taker, devices, &options, signals, extra, ready)?)
        }
        Err(error) => {
            taker.refuse(vcp_core::process::chain(&*error));
            Err(error)
        }
    }
}

/// What is made of an offer.
struct Built {
    devices: Vec<(Arc<str>, BlkDevice<IscsiEngine>)>,
    options: ServeOptions,
    ready: String,
}

fn build(
    offer: Offer,
    ring: Option<Ring>,
    network: Option<&Arc<dyn Network>>,
    confined: &Report,
) -> Result<Built> {
    let now = Instant::now();
    let poll = offer.poll_us.parse().map_err(anyhow::Error::msg).context("--poll-us")?;
    let io = describe_io(ring.as_ref());
    let poll_share = offer.poll_share.parse().map_err(anyhow::Error::msg).context("--poll-share")?;
    let options =
        ServeOptions { cpu: offer.cpu, poll, poll_share, ring: ring.into(), ..ServeOptions::default() };
    let mut ready = "ready:".to_owned();
    let mut devices = Vec::new();
    let engine = |disk: DiskOffer| -> Result<IscsiEngine> {
        let lun = disk.lun();
        let mut options = disk.options.options().map_err(anyhow::Error::msg)?;
        if let Some(network) = network {
            options.network = network.clone();
        }
        Ok(IscsiEngine::detached(Arc::new(options), lun, disk.found, now))
    };
    for disk in offer.disks {
        let (name, socket, queues) = (Arc::<str>::from(disk.name.as_str()), disk.socket.clone(), disk.queues);
        let engine = engine(disk)?;
        let (engine_bytes, lun) = (engine.memory_bound_bytes(), engine.lun().clone());
        let device = BlkDevice::new(engine, queues);
        let bytes = engine_bytes + device.memory_bound_bytes();
        ready.push_str(&describe(&socket, queues, &lun, bytes));
        devices.push((name, device));
    }
    let mut sides: Vec<(Arc<str>, _)> = Vec::new();
    if let Some(disk) = offer.msgq {
        let (name, socket) = (Arc::from(disk.name.as_str()), disk.socket.clone());
        let engine = engine(disk)?;
        ready.push_str(&crate::msgq::describe(&socket, &engine));
        sides.push((name, crate::msgq::front(None, engine, Limits::default())?));
    }
    let options = ServeOptions { sides: sides.into(), ..options };
    ready.push_str(&format!(" io={io} confined={}", confined.summary()));
    Ok(Built { devices, options, ready })
}
