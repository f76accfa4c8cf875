//! `vcp-net serve`: opens sockets and uplinks, builds the ports and their switches, runs the server until a signal.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use vcp_core::device::RingDevice;
use vcp_core::handover::giver::Giving;
use vcp_core::http::{Endpoint, HttpServer};
use vcp_core::process::notify::Manager;
use vcp_core::process::{Signals, exit_with_parent};
use vcp_core::pulse::Pulse;
use vcp_core::vu::listen::SocketFile;
use vcp_core::vu::{DeviceSpec, End, ServeOptions};

use crate::cli::{ServeArgs, UplinkArg};
use crate::confine::{self, Needs};
use crate::handover::{Offer, program};
use crate::port::{NetPort, PortSpec};
use crate::switch::SwitchFabric;
use crate::uplink::Uplink;
use crate::uplink::none::NoUplink;
use crate::uplink::packet::Packet;
use crate::uplink::tap::Tap;
use crate::user::UserStack;

/// Serves until SIGTERM or SIGINT. `signals` were blocked before any thread was started.
///
/// # Errors
/// What failed, on what.
pub fn run(args: &ServeArgs, log: Option<&str>, signals: &Signals) -> Result<End> {
    if args.exit_with_parent && !exit_with_parent().context("cannot watch the parent process")? {
        bail!("the parent process ended before this one was up");
    }
    if let Some(cpu) = args.cpu {
        vcp_core::poll::check_cpu(cpu).context("--cpu")?;
    }
    if let Some(cpu) = args.second_cpu {
        vcp_core::poll::check_cpu(cpu).context("--second-cpu")?;
    }
    if let Some(switch) = &args.switch {
        switch.create_dir()?;
    }
    // Everything that is opened, before the process gives up the right to.
    let sockets = args.port.iter().map(|port| match port.fd {
        Some(fd) => SocketFile::adopt(fd),
        None if port.connect => SocketFile::dial(&port.path),
        None => SocketFile::bind(&port.path),
    });
    let sockets = sockets.collect::<Result<Vec<_>, _>>()?;
    let mut uplinks = args.uplink.iter().map(open).collect::<Result<Vec<_>>>()?;
    if uplinks.is_empty() {
        uplinks.push(Box::new(NoUplink));
    }
    let control = match (&args.control, args.control_fd) {
        (Some(path), _) => Some(SocketFile::bind(path)?),
        (None, fd) => fd.map(SocketFile::adopt).transpose()?,
    };
    let pulse = adopt_pulse(args.pulse_fd)?;
    let metrics = args.metrics.as_ref().map(HttpServer::bind).transpose()?;
    let secret = secret()?;
    let manager = Manager::find();
    let report = confine::confine(args.confine, needs(args))?;
    let specs: Vec<PortSpec> = args.port.iter().map(|port| port.spec.clone()).collect();
    let kinds: Vec<String> = uplinks.iter().map(|uplink| uplink.kind().to_owned()).collect();
    let mut ready = "ready:".to_owned();
    let devices = specs.iter().zip(sockets).map(|(spec, socket)| {
        let device = NetPort::new(spec.clone());
        ready.push_str(&describe(spec, &socket, device.memory_bound_bytes()));
        DeviceSpec { name: Arc::from(&*spec.name), socket, device }
    });
    let devices = devices.collect();
    ready.push_str(&format!(" uplink={} confined={}", kinds.join(","), report.summary()));
    let mut fabric = SwitchFabric::new(&specs, uplinks, secret, Instant::now());
    if args.second_cpu.is_some() {
        fabric.place_on_second(args.second_cpu).context("--second-cpu")?;
    }
    if let Some(dir) = &args.capture_dir {
        fabric.capture_in(dir);
    }
    if let Some(spec) = &args.capture {
        let start = fabric.capture(spec.clone(), Instant::now()).and_then(vcp_core::ask::Rest::finish);
        let told = start.map_err(anyhow::Error::msg).context("--capture")?;
        tracing::info!(%told, "capturing");
    }
    // What a later process would be offered: the same filter for the log, wherever it came from.
    let needed = needs(args);
    let offer = Offer {
        cpu: args.cpu,
        second_cpu: args.second_cpu,
        poll_us: args.poll_us.to_string(),
        log: log.map(str::to_owned).or_else(|| std::env::var("RUST_LOG").ok()),
        confine: args.confine,
        capture_dir: args.capture_dir.clone(),
        sockets: needed.sockets,
        dials: needed.dials,
        listens: needed.listens,
        flows: needed.flows,
        ports: specs,
        switches: kinds.len(),
    };
    let offer = serde_json::to_value(offer).context("cannot write the offer for a later process")?;
    let giving = Some(Giving { program: program(), offer });
    let options = ServeOptions {
        cpu: args.cpu,
        poll: args.poll_us,
        control,
        metrics,
        giving,
        pulse,
        ..ServeOptions::default()
    };
    let extra = confine::status(&report);
    Ok(vcp_core::vu::serve_joined(devices, fabric, options, signals, extra, move || {
        announce(&ready);
        manager.notify("READY=1");
    })?)
}

fn open(arg: &UplinkArg) -> Result<Box<dyn Uplink>> {
    Ok(match arg {
        UplinkArg::None => Box::new(NoUplink),
        UplinkArg::Packet(name) => {
            let packet = Packet::open(name);
            Box::new(packet.with_context(|| {
                format!("cannot use the network interface {name} (this needs CAP_NET_RAW)")
            })?)
        }
        UplinkArg::User(config) => {
            Box::new(UserStack::open((**config).clone()).context("cannot set up the user-mode stack")?)
        }
        UplinkArg::Tap(name) => {
            let tap = Tap::open(name).with_context(|| {
                format!(
                    "cannot use the TAP device {name} (`ip tuntap add {name} mode tap vnet_hdr user USER` makes one \
                     for an ordinary user)"
                )
            });
            Box::new(tap?)
        }
    })
}

/// The page of `--pulse-fd`.
pub(crate) fn adopt_pulse(fd: Option<i32>) -> Result<Option<Arc<Pulse>>> {
    fd.map(|fd| Pulse::adopt(fd).map(Arc::new).context("--pulse-fd")).transpose()
}

/// What keys the tables of stations.
pub(crate) fn secret() -> Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context("no random numbers")?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Says that front ends can connect.
pub(crate) fn announce(ready: &str) {
    // A reader that went away is no reason to end.
    let _ = writeln!(std::io::stdout(), "{ready}").and_then(|()| std::io::stdout().flush());
}

/// What the ready line says of one port.
pub(crate) fn describe(spec: &PortSpec, socket: &SocketFile, memory_bound_bytes: u64) -> String {
    format!(
        " port={} socket={} queues={} memory_bound_bytes={memory_bound_bytes}",
        spec.name,
        socket.path().display(),
        spec.pairs
    )
}

/// What the process needs from here on.
fn needs(args: &ServeArgs) -> Needs {
    let mut sockets: Vec<PathBuf> =
        args.port.iter().filter(|port| port.fd.is_none()).map(|port| port.path.clone()).collect();
    sockets.extend(args.control.clone());
    if let Some(Endpoint::Unix(path)) = &args.metrics {
        sockets.push(path.clone());
    }
    Needs {
        pairs: args.port.iter().map(|port| port.spec.pairs).collect(),
        sockets,
        listens: args.uplink.iter().any(|uplink| matches!(uplink, UplinkArg::User(_))),
        dials: args.port.iter().any(|port| port.connect),
        captures: args.capture_dir.iter().cloned().collect(),
        flows: args.uplink.iter().map(flows).sum(),
    }
}

/// Sockets that an uplink may have at once.
fn flows(uplink: &UplinkArg) -> u64 {
    match uplink {
        UplinkArg::User(config) => config.flows_max(),
        _ => 0,
    }
}
