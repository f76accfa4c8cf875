//! `vcp-iscsi serve`: opens the units, builds the devices, runs a server until a signal.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use vcp_core::device::RingDevice;
use vcp_core::handover::giver::Giving;
use vcp_core::http::{Endpoint, HttpServer};
use vcp_core::msgq::Listener;
use vcp_core::process::notify::Manager;
use vcp_core::process::{Signals, exit_with_parent};
use vcp_core::pulse::Pulse;
use vcp_core::uring::{self, Ring};
use vcp_core::vu::listen::SocketFile;
use vcp_core::vu::{DeviceSpec, End, ServeOptions};

use crate::blk::BlkDevice;
use crate::cli::{DiskSpec, Private, ServeArgs, ServerKind};
use crate::confine::{self, Needs};
use crate::dial::Dialer;
use crate::engine::{Engine, Lun};
use crate::handover::offer::{DiskOffer, Offer, poll_us};
use crate::handover::program;
use crate::limit::Limits;
use crate::portal::login::Negotiated;
use crate::portal::net::Network;
use crate::portal::{IscsiEngine, MAX_PATHS, Options};
use crate::recorder::StoreOptions;
use crate::url::Url;

/// Longest URL file; a URL is far shorter, and a wrong file (a disk image, say) is not read to its end.
const MAX_URL_BYTES: u64 = 8192;

/// Name of the front for msgq clients in logs and metrics.
const MSGQ_NAME: &str = "msgq0";

/// A device to be.
struct Plan {
    socket: SocketFile,
    queues: u16,
    options: Options,
    /// The target is asked for its other portals.
    all_paths: bool,
    limits: Limits,
}

/// A front for msgq clients to be.
struct MsgqPlan {
    listener: Listener,
    options: Options,
    all_paths: bool,
    limits: Limits,
}

/// Serves `disks` (those of [`ServeArgs::disks`]) until SIGTERM or SIGINT. `signals` were blocked before any thread was started.
///
/// # Errors
/// What failed, on what.
pub fn run(args: &ServeArgs, mut disks: Vec<DiskSpec>, log: Option<&str>, signals: &Signals) -> Result<End> {
    if args.exit_with_parent && !exit_with_parent().context("cannot watch the parent process")? {
        bail!("the parent process ended before this one was up");
    }
    if let Some(cpu) = args.cpu {
        // Before anything is opened: this is the user's to correct.
        vcp_core::poll::check_cpu(cpu).context("--cpu")?;
    }
    let mut url = args.url.as_ref().map(Private::url).transpose().map_err(anyhow::Error::msg)?;
    let mut more = Vec::new();
    if let Some(file) = &args.url_file {
        // It may be a pipe that nobody has written to yet.
        let file = file.clone();
        let Some((read, others)) = unless_signalled(signals, move || read_urls(&file))? else {
            return Ok(End::Signal);
        };
        (url, more) = (Some(read), others);
    }
    if let (Some(_), Some(url), Some((socket, fd))) = (&args.url_file, url.clone(), args.front()) {
        let mut paths = args.paths.spec().map_err(anyhow::Error::msg)?;
        paths.urls.extend(more);
        disks.push(DiskSpec { fd, paths, ..DiskSpec::new(socket, url) });
    }
    let mut plans = plans(args, disks)?;
    let mut msgq = msgq_plan(args, url)?;
    if let Some(network) = adopt_dialer(args.dial_fd)? {
        let of_msgq = msgq.iter_mut().map(|plan| &mut plan.options);
        for options in plans.iter_mut().map(|plan| &mut plan.options).chain(of_msgq) {
            options.network = network.clone();
        }
    }
    // Everything that is listened on, before the process gives up the right to.
    let control = match (&args.control, args.control_fd) {
        (Some(path), _) => Some(SocketFile::bind(path)?),
        (None, fd) => fd.map(SocketFile::adopt).transpose()?,
    };
    let pulse = adopt_pulse(args.pulse_fd)?;
    let standby = args.standby_fd.map(adopt).transpose().context("--standby-fd")?;
    let metrics = args.metrics.as_ref().map(HttpServer::bind).transpose()?;
    let manager = Manager::find();
    let ring = match args.server {
        ServerKind::Poll => uring::choose(args.io).context("--io")?,
        ServerKind::Epoll => None,
    };
    let report = confine::confine(args.confine, ring.is_some(), needs(args, &plans))?;
    if let Some(standby) = standby
        && !wait_for_go(&standby, signals)?
    {
        return Ok(End::Signal);
    }
    let mut options: Vec<_> = plans.iter().map(|plan| (plan.options.clone(), plan.all_paths)).collect();
    options.extend(msgq.iter().map(|plan| (plan.options.clone(), plan.all_paths)));
    // Takes as long as the time limits for connecting and logging in allow. The sockets stay with this thread, which
    // removes them however this ends.
    let Some(mut engines) = unless_signalled(signals, move || open(options))? else { return Ok(End::Signal) };
    // The last one, if there is a front for it.
    let msgq = msgq.and_then(|plan| Some((plan, engines.pop()?)));
    let mut ready = "ready:".to_owned();
    let mut offers = Vec::new();
    let devices: Vec<_> = plans
        .into_iter()
        .zip(engines)
        .enumerate()
        .map(|(index, (plan, engine))| {
            let engine_bytes = engine.memory_bound_bytes();
            let lun = engine.lun().clone();
            let name = format!("disk{index}");
            let path = plan.socket.path();
            offers.push(DiskOffer::of(&name, path.to_owned(), plan.queues, &engine));
            let device = BlkDevice::new(engine, plan.queues).limited(plan.limits, Instant::now());
            let bytes = engine_bytes + device.memory_bound_bytes();
            ready.push_str(&describe(path, plan.queues, &lun, bytes));
            session_line(&name, &plan.options.url, device.engine().negotiated());
            DeviceSpec { name: Arc::from(name), socket: plan.socket, device }
        })
        .collect();
    let (mut sides, mut msgq_offer) = (Vec::new(), None);
    if let Some((plan, engine)) = msgq {
        let path = plan.listener.path();
        ready.push_str(&crate::msgq::describe(path, &engine));
        session_line(MSGQ_NAME, &plan.options.url, engine.negotiated());
        msgq_offer = Some(DiskOffer::of(MSGQ_NAME, path.to_owned(), crate::msgq::CLIENTS, &engine));
        sides.push((Arc::from(MSGQ_NAME), crate::msgq::front(Some(plan.listener), engine, plan.limits)?));
    }
    // What a later process would be offered: the same filter for the log, wherever it came from.
    let log = log.map(str::to_owned).or_else(|| std::env::var("RUST_LOG").ok());
    let offer = Offer {
        cpu: args.cpu,
        poll_us: poll_us(args.poll_us),
        io: args.io,
        poll_share: args.poll_share.to_string(),
        log,
        confine: args.confine,
        disks: offers,
        msgq: msgq_offer,
    };
    let offer = serde_json::to_value(offer).context("cannot write the offer for a later process")?;
    let io = describe_io(ring.as_ref());
    let options = ServeOptions {
        ring: ring.into(),
        cpu: args.cpu,
        poll: args.poll_us,
        poll_share: args.poll_share,
        pulse,
        control,
        metrics,
        giving: Some(Giving { program: program(), offer }),
        sides: sides.into(),
    };
    let extra = confine::status(&report);
    ready.push_str(&format!(" io={io} confined={}", report.summary()));
    let ready = move || announce(&ready, &manager);
    match args.server {
        ServerKind::Poll => Ok(vcp_core::vu::serve(devices, options, signals, extra, ready)?),
        ServerKind::Epoll => {
            vcp_core::epoll::serve(devices, options, signals, extra, ready)?;
            Ok(End::Signal)
        }
    }
}

/// The page of `--pulse-fd`.
pub(crate) fn adopt_pulse(fd: Option<i32>) -> Result<Option<Arc<Pulse>>> {
    fd.map(|fd| Pulse::adopt(fd).map(Arc::new).context("--pulse-fd")).transpose()
}

/// The channel of `--dial-fd`, as the network of this process.
pub(crate) fn adopt_dialer(fd: Option<i32>) -> Result<Option<Arc<dyn Network>>> {
    let adopted = fd.map(adopt).transpose().context("--dial-fd")?;
    Ok(adopted.map(|channel| Arc::new(Dialer::new(channel)) as Arc<dyn Network>))
}

/// The descriptor with this number, under a number that nothing else owns.
pub(crate) fn adopt(fd: i32) -> Result<OwnedFd> {
    if fd < 0 {
        bail!("descriptors start at 0");
    }
    let this = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(&this, fd, PidfdGetfdFlags::empty())?)
}

/// Waits until this process, which stood by, is to take its place; false if it is to end.
fn wait_for_go(go: &OwnedFd, signals: &Signals) -> Result<bool> {
    let _ = writeln!(std::io::stdout(), "standby: pid={}", std::process::id());
    loop {
        let mut fds = [PollFd::new(signals, PollFlags::IN), PollFd::new(go, PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait"),
        }
        let [signal, told] = fds.map(|fd| !fd.revents().is_empty());
        if signal && signals.take().is_some() {
            return Ok(false);
        }
        if told {
            return Ok(rustix::io::read(go, &mut [0; 1]).context("--standby-fd")? == 1);
        }
    }
}

/// Says once what was negotiated with the target, on a line of its own before the one that says `ready`.
fn session_line(device: &str, url: &Url, session: &Negotiated) {
    let _ = writeln!(std::io::stdout(), "session: {device} {url}: {session}");
}

/// Says that front ends can connect.
pub(crate) fn announce(ready: &str, manager: &Manager) {
    // A reader that went away is no reason to end.
    let _ = writeln!(std::io::stdout(), "{ready}").and_then(|()| std::io::stdout().flush());
    manager.notify("READY=1");
}

/// What the process needs from here on.
fn needs(args: &ServeArgs, plans: &[Plan]) -> Needs {
    let mut sockets: Vec<PathBuf> = plans.iter().map(|plan| plan.socket.path().to_owned()).collect();
    sockets.extend(args.control.clone());
    if let Some(Endpoint::Unix(path)) = &args.metrics {
        sockets.push(path.clone());
    }
    let captures = args.recorder_dir.iter().cloned().collect();
    let mut queues: Vec<u16> = plans.iter().map(|plan| plan.queues).collect();
    sockets.extend(args.msgq_path.clone());
    if args.msgq_path.is_some() || args.msgq_fd.is_some() {
        // As many descriptors as a device with a queue for each client.
        queues.push(crate::msgq::CLIENTS);
    }
    Needs { queues, sockets, captures, network: args.dial_fd.is_none() }
}

/// What the ready line says of one device.
pub(crate) fn describe(socket: &Path, queues: u16, lun: &Lun, memory_bound_bytes: u64) -> String {
    format!(
        " socket={} size_bytes={} block_bytes={} queues={queues} memory_bound_bytes={memory_bound_bytes}",
        socket.display(),
        lun.blocks.saturating_mul(lun.block_bytes.into()),
        lun.block_bytes,
    )
}

/// How the data thread does its calls, for the ready line.
pub(crate) fn describe_io(ring: Option<&Ring>) -> &'static str {
    if ring.is_some() { "uring" } else { "plain" }
}

fn plans(args: &ServeArgs, disks: Vec<DiskSpec>) -> Result<Vec<Plan>> {
    let mut plans: Vec<Plan> = Vec::with_capacity(disks.len());
    for disk in disks {
        if plans.iter().any(|plan| plan.socket.path() == disk.socket) {
            bail!("socket {} is given for two devices", disk.socket.display());
        }
        // Before the unit is opened: a second process for the same socket must fail without taking the session of the
        // first one over. A front end that connects early waits.
        let socket = match disk.fd {
            Some(fd) => SocketFile::adopt(fd)?,
            None => SocketFile::bind(&disk.socket)?,
        };
        if socket.is_one_connection() && args.server == ServerKind::Epoll {
            bail!("--fd with a connected socket needs --server poll");
        }
        let mut options = args.session.options(disk.url)?;
        options.timeouts.give_up = args.give_up_s.map(std::time::Duration::from_secs);
        options.read_only = args.read_only || disk.read_only;
        // Two devices on the same unit (here or in another process) are two initiator ports; a restarted device with
        // the same socket is the same one and takes its old session over.
        options.instance = args.instance.clone().unwrap_or_else(|| socket.path().display().to_string());
        let all_paths = args.paths.apply(disk.paths, &mut options);
        options.recorder = recorder(args, plans.len(), socket.path())?;
        let limits =
            Limits { iops: disk.limits.iops.or(args.limit_iops), bps: disk.limits.bps.or(args.limit_bps) };
        plans.push(Plan { socket, queues: disk.queues.unwrap_or(args.queues), options, all_paths, limits });
    }
    Ok(plans)
}

/// The front for msgq clients, if one is wanted. As with a device, the socket comes before the session.
fn msgq_plan(args: &ServeArgs, url: Option<Url>) -> Result<Option<MsgqPlan>> {
    let listener = match (&args.msgq_path, args.msgq_fd) {
        (Some(path), _) => {
            Listener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?
        }
        (None, Some(fd)) => Listener::adopt(fd).context("--msgq-fd")?,
        (None, None) => return Ok(None),
    };
    let Some(url) = url else { return Ok(None) };
    if args.server == ServerKind::Epoll {
        bail!("clients by msgq need --server poll");
    }
    let mut options = args.session.options(url)?;
    options.timeouts.give_up = args.give_up_s.map(std::time::Duration::from_secs);
    options.read_only = args.read_only;
    options.instance = match &args.instance {
        Some(instance) => format!("{instance}-msgq"),
        None => listener.path().display().to_string(),
    };
    let all_paths = args.paths.apply(args.paths.spec().map_err(anyhow::Error::msg)?, &mut options);
    let limits = Limits { iops: args.limit_iops, bps: args.limit_bps };
    Ok(Some(MsgqPlan { listener, options, all_paths, limits }))
}

/// Where the last PDUs of a device are written, if anywhere.
fn recorder(args: &ServeArgs, index: usize, socket: &Path) -> Result<Option<StoreOptions>> {
    let Some(dir) = &args.recorder_dir else { return Ok(None) };
    let stem = socket.file_stem().unwrap_or_default().to_string_lossy();
    let mut store = StoreOptions::new(dir.clone(), format!("disk{index}_{stem}"));
    store.with_data = !args.recorder_headers_only;
    store.prepare().with_context(|| format!("--recorder-dir {}", dir.display()))?;
    Ok(Some(store))
}

/// The URL of the unit, and further ways to it, one a line.
fn read_urls(file: &Path) -> Result<(Url, Vec<Url>)> {
    use std::io::Read;
    let failed = || format!("cannot read the URL file {}", file.display());
    let mut text = String::new();
    std::fs::File::open(file)
        .with_context(failed)?
        .take(MAX_URL_BYTES + 1)
        .read_to_string(&mut text)
        .with_context(failed)?;
    if text.len() as u64 > MAX_URL_BYTES {
        bail!("URL file {}: more than {MAX_URL_BYTES} bytes", file.display());
    }
    let mut urls = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let parse = |url: &str| url.parse().with_context(|| format!("URL file {}", file.display()));
    let first = parse(urls.next().unwrap_or_default())?;
    let more: Vec<Url> = urls.map(parse).collect::<Result<_>>()?;
    if more.len() >= MAX_PATHS {
        bail!("URL file {}: {} URLs, at most {MAX_PATHS}", file.display(), more.len() + 1);
    }
    Ok((first, more))
}

fn open(options: Vec<(Options, bool)>) -> Result<Vec<IscsiEngine>> {
    let open = |(mut options, all_paths): (Options, bool)| {
        if all_paths {
            crate::paths::add_all(&mut options);
        }
        let url = options.url.clone();
        IscsiEngine::open(options).with_context(|| format!("cannot open {url}"))
    };
    options.into_iter().map(open).collect()
}

/// Does on a thread of its own what may take long; `None` if a signal came first.
fn unless_signalled<T: Send + 'static>(
    signals: &Signals,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<Option<T>> {
    let (done, guard) = UnixStream::pair().context("cannot create a socket pair")?;
    let thread = std::thread::Builder::new()
        .name("start".into())
        .spawn(move || {
            let _guard = guard;
            work()
        })
        .context("cannot start a thread")?;
    loop {
        let mut fds = [PollFd::new(signals, PollFlags::IN), PollFd::new(&done, PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait"),
        }
        let [signal, ended] = fds.map(|fd| !fd.revents().is_empty());
        if signal && let Some(signal) = signals.take() {
            // The thread ends with the process.
            tracing::info!(signal, "ending before anything was served");
            return Ok(None);
        }
        if ended {
            return thread.join().map_err(|_| anyhow!("the start panicked"))?.map(Some);
        }
    }
}
