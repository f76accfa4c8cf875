//! `vcp-iscsi serve`: opens the units, builds the devices, runs a server until a signal.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags};
use vcp_core::device::RingDevice;
use vcp_core::process::{Signals, exit_with_parent};
use vcp_core::vu::listen::SocketFile;
use vcp_core::vu::{DeviceSpec, ServeOptions};

use crate::blk::BlkDevice;
use crate::cli::{DiskSpec, ServeArgs, ServerKind};
use crate::engine::{Engine, Lun};
use crate::portal::{IscsiEngine, Options};
use crate::url::Url;

/// Longest URL file; a URL is far shorter, and a wrong file (a disk image, say) is not read to its end.
const MAX_URL_BYTES: u64 = 8192;

/// A device to be.
struct Plan {
    socket: SocketFile,
    queues: u16,
    options: Options,
}

/// Serves `disks` (those of [`ServeArgs::disks`]) until SIGTERM or SIGINT. `signals` were blocked before any thread was started.
///
/// # Errors
/// What failed, on what.
pub fn run(args: &ServeArgs, disks: Vec<DiskSpec>, signals: &Signals) -> Result<()> {
    if args.exit_with_parent && !exit_with_parent().context("cannot watch the parent process")? {
        bail!("the parent process ended before this one was up");
    }
    if let Some(cpu) = args.cpu {
        // Before anything is opened: this is the user's to correct.
        vcp_core::poll::check_cpu(cpu).context("--cpu")?;
    }
    let plans = plans(args, disks)?;
    let Some(opened) = open(plans, signals)? else { return Ok(()) };
    let mut ready = "ready:".to_owned();
    let devices = opened
        .into_iter()
        .enumerate()
        .map(|(index, (plan, engine))| {
            let engine_bytes = engine.memory_bound_bytes();
            let lun = engine.lun().clone();
            let device = BlkDevice::new(engine, plan.queues);
            ready.push_str(&describe(&plan, &lun, engine_bytes + device.memory_bound_bytes()));
            DeviceSpec { name: Arc::from(format!("disk{index}")), socket: plan.socket, device }
        })
        .collect();
    let options = ServeOptions { cpu: args.cpu, poll: args.poll_us, control: args.control.clone() };
    let extra = Box::new(serde_json::Map::new);
    let announce = move || {
        // A reader that went away is no reason to end.
        let _ = writeln!(std::io::stdout(), "{ready}").and_then(|()| std::io::stdout().flush());
    };
    match args.server {
        ServerKind::Poll => vcp_core::vu::serve(devices, &options, signals, extra, announce)?,
        ServerKind::Epoll => vcp_core::epoll::serve(devices, &options, signals, extra, announce)?,
    }
    Ok(())
}

/// What the ready line says of one device.
fn describe(plan: &Plan, lun: &Lun, memory_bound_bytes: u64) -> String {
    format!(
        " socket={} size_bytes={} block_bytes={} queues={} memory_bound_bytes={memory_bound_bytes}",
        plan.socket.path().display(),
        lun.blocks.saturating_mul(lun.block_bytes.into()),
        lun.block_bytes,
        plan.queues,
    )
}

fn plans(args: &ServeArgs, mut disks: Vec<DiskSpec>) -> Result<Vec<Plan>> {
    if let (Some(file), Some(socket)) = (&args.url_file, &args.socket_path) {
        disks.push(DiskSpec { socket: socket.clone(), url: read_url(file)?, read_only: false, queues: None });
    }
    let mut plans: Vec<Plan> = Vec::with_capacity(disks.len());
    for disk in disks {
        if plans.iter().any(|plan| plan.socket.path() == disk.socket) {
            bail!("socket {} is given for two devices", disk.socket.display());
        }
        // Before the unit is opened: a second process for the same socket must fail without taking the session of the
        // first one over. A front end that connects early waits.
        let socket = SocketFile::bind(&disk.socket)?;
        let mut options = args.session.options(disk.url)?;
        options.read_only = args.read_only || disk.read_only;
        // Two devices on the same unit (here or in another process) are two initiator ports; a restarted device with
        // the same socket is the same one and takes its old session over.
        options.instance = disk.socket.display().to_string();
        plans.push(Plan { socket, queues: disk.queues.unwrap_or(args.queues), options });
    }
    Ok(plans)
}

fn read_url(file: &Path) -> Result<Url> {
    use std::io::Read;
    let failed = || format!("cannot read the URL file {}", file.display());
    let mut text = String::new();
    std::fs::File::open(file)
        .with_context(failed)?
        .take(MAX_URL_BYTES)
        .read_to_string(&mut text)
        .with_context(failed)?;
    text.trim().parse().with_context(|| format!("URL file {}", file.display()))
}

/// Opens all units, which may take as long as the time limits for connecting and logging in allow; `None` if a signal
/// came first.
fn open(plans: Vec<Plan>, signals: &Signals) -> Result<Option<Vec<(Plan, IscsiEngine)>>> {
    let (done, guard) = UnixStream::pair().context("cannot create a socket pair")?;
    let opening = std::thread::Builder::new()
        .name("open".into())
        .spawn(move || {
            let _guard = guard;
            let open = |plan: Plan| {
                let url = plan.options.url.clone();
                let engine =
                    IscsiEngine::open(plan.options.clone()).with_context(|| format!("cannot open {url}"))?;
                Ok((plan, engine))
            };
            plans.into_iter().map(open).collect::<Result<Vec<_>>>()
        })
        .context("cannot start a thread")?;
    loop {
        let mut fds = [PollFd::new(signals, PollFlags::IN), PollFd::new(&done, PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait"),
        }
        let [signal, opened] = fds.map(|fd| !fd.revents().is_empty());
        if signal && let Some(signal) = signals.take() {
            // The thread ends with the process.
            tracing::info!(signal, "ending before anything was served");
            return Ok(None);
        }
        if opened {
            return opening.join().map_err(|_| anyhow!("opening the units panicked"))?.map(Some);
        }
    }
}
