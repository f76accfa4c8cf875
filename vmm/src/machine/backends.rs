//! The backends of vhost-user devices, before their devices exist: connects to those that run already, starts the VCPs of
//! the others, waits for them, shakes hands. What becomes of a backend afterwards is its keeper's business.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vcp_core::msgq::Listener;

use super::status::DeviceKind;
use super::switch;
use crate::config::{DiskSpec, NetKind, NetSpec, NetworkAccess, PathsFrom, VmConfig};
use crate::error::{Error, Result};
use crate::placement::{DEFAULT_WEIGHT, Placement, Policy, VcpPlace, Want};
use crate::vcp::dialer::{Dialer, Reach};
use crate::vcp::process::{READY_TIMEOUT, user_of};
use crate::vcp::runtime_dir::RuntimeDir;
use crate::vcp::{First, NetPort, Programs, Source, VcpPaths, VcpProcess, VcpSpec};
use crate::virtio::vhost_user::link::Link;
use crate::virtio::vhost_user::{Kind, VhostUserDevice, blk, net};

/// A device with what its keeper needs.
pub(super) struct Backend {
    pub(super) kind: DeviceKind,
    pub(super) device: VhostUserDevice,
    pub(super) source: Source,
    pub(super) process: Option<VcpProcess>,
}

/// Connects to backends that already run, starts the others, and connects to those. Their sockets are gone when this
/// returns: a connection needs no name, and what has no name is not left behind, however the monitor ends.
pub(super) fn start_all(
    programs: &Programs,
    config: &VmConfig,
    placement: &Placement,
    interrupt: impl AsFd,
) -> Result<Vec<Backend>> {
    // A backend that is not there is told before a VCP logs in anywhere.
    let given = config.disks.iter().enumerate().map(|(i, disk)| {
        let connect = |socket: &PathBuf| connect_given_disk(&disk_name(i), disk, socket);
        disk.socket.as_ref().map(connect).transpose()
    });
    let given = given.collect::<Result<Vec<_>>>()?;
    let disk_vcps = config.disks.iter().filter(|disk| disk.url.is_some()).count();
    let mut net_places = placement.vcps.iter().copied().skip(disk_vcps);
    let nets = config.nets.iter().enumerate().map(|(i, net)| {
        let place = if has_vcp(net) { net_places.next() } else { None };
        start_net(programs, &net_name(i), i, net, place.unwrap_or_default(), interrupt.as_fd())
    });
    let nets = nets.collect::<Result<Vec<_>>>()?;
    RuntimeDir::sweep_all();
    let mut started = Vec::new();
    // All start at once, then all are waited for: logins take place side by side.
    let mut places = placement.vcps.iter().copied();
    for (i, disk) in config.disks.iter().enumerate() {
        if disk.url.is_none() {
            continue;
        }
        let place = places.next().unwrap_or_default();
        started.push((i, disk, start_disk(programs, &disk_name(i), disk, i as u32, place)?));
    }
    for (_, _, vcp) in &mut started {
        vcp.wait_ready(READY_TIMEOUT, interrupt.as_fd())?;
    }
    let mut disks = given;
    for (i, disk, vcp) in started {
        let backend = vcp.connect(&programs.iscsi, disk)?;
        if let Some(slot) = disks.get_mut(i) {
            *slot = Some(backend);
        }
    }
    Ok(disks.into_iter().flatten().chain(nets).collect())
}

/// The backend of one disk that is added while the guest runs.
pub(super) fn start_one_disk(
    programs: &Programs,
    name: &str,
    disk: &DiskSpec,
    place: VcpPlace,
    interrupt: impl AsFd,
) -> Result<Backend> {
    if let Some(socket) = &disk.socket {
        return connect_given_disk(name, disk, socket);
    }
    let number = name.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0);
    let mut vcp = start_disk(programs, name, disk, number, place)?;
    vcp.wait_ready(READY_TIMEOUT, interrupt)?;
    vcp.connect(&programs.iscsi, disk)
}

/// Where the VCPs of a machine are wanted, in the order of its disks and then of its nets.
pub(super) fn wishes(config: &VmConfig) -> Vec<Want> {
    let disks = config.disks.iter().enumerate().filter_map(|(i, disk)| disk_wish(&disk_name(i), disk));
    let nets = config.nets.iter().enumerate().filter_map(|(i, net)| net_wish(&net_name(i), net));
    disks.chain(nets).collect()
}

/// Where the VCP of a disk is wanted; none if it will not be ours.
pub(super) fn disk_wish(name: &str, disk: &DiskSpec) -> Option<Want> {
    disk.url.as_ref()?;
    Some(wish(name, disk.cpu.as_ref(), disk.weight))
}

/// Where the VCP of a network device is wanted; none if it will not be ours.
pub(super) fn net_wish(name: &str, net: &NetSpec) -> Option<Want> {
    has_vcp(net).then(|| wish(name, net.cpu.as_ref(), net.weight))
}

fn wish(name: &str, policy: Option<&Policy>, weight: Option<u32>) -> Want {
    let (policy, weight) = (policy.cloned().unwrap_or_default(), weight.unwrap_or(DEFAULT_WEIGHT));
    Want { name: name.to_owned(), policy, weight }
}

/// Whether the monitor starts a VCP for a network device.
fn has_vcp(net: &NetSpec) -> bool {
    matches!(net.kind(), Ok(NetKind::User(_) | NetKind::Tap(_)))
}

/// The name of disk number `index`.
pub(super) fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

/// The name of network device number `index`.
pub(super) fn net_name(index: usize) -> String {
    format!("net{index}")
}

/// A VCP that was started and not connected to yet.
struct Started {
    vcp: VcpSpec,
    process: VcpProcess,
}

fn start_disk(
    programs: &Programs,
    name: &str,
    disk: &DiskSpec,
    number: u32,
    place: VcpPlace,
) -> Result<Started> {
    let Some(url) = &disk.url else {
        return Err(Error::Usage(format!("{name} has neither a URL nor a socket")));
    };
    let mut vcp = VcpSpec::new(name, url.clone(), disk.queues.unwrap_or(1))?;
    (vcp.read_only, vcp.number) = (disk.read_only, number);
    (vcp.cpu, vcp.node, vcp.nice) = (place.cpu, place.node, place.nice);
    vcp.paths = VcpPaths {
        urls: disk.path.clone(),
        all: disk.paths == Some(PathsFrom::All),
        sessions: disk.sessions,
    };
    vcp.standby = disk.standby.unwrap_or(true);
    if let Some(path) = &disk.msgq {
        let listener = Listener::bind_for_owner(path).map_err(|error| Error::Vcp {
            device: name.to_owned(),
            reason: format!("cannot listen on {}: {error}", path.display()),
        })?;
        vcp.msgq = Some(Arc::new(listener));
    }
    if let Some(seconds) = disk.watchdog {
        vcp.patience = Duration::from_secs(seconds.into());
    }
    let options = [
        ("--poll-us", disk.poll_us.clone()),
        ("--poll-share", disk.poll_share.map(|share| share.to_string())),
    ];
    for (option, value) in options {
        vcp.options.extend(value.into_iter().flat_map(|value| [option.to_owned(), value]));
    }
    let weight = if place.weight == 0 { DEFAULT_WEIGHT } else { place.weight };
    programs.bound(&mut vcp, &disk.bounds(), weight)?;
    let access = disk.reach();
    if access != NetworkAccess::Host {
        let reach = Reach { portals: disk.portals(), any: access == NetworkAccess::Any };
        let group = vcp.cgroup.clone();
        let dialer = Dialer::new(&programs.iscsi, name, reach, user_of(number), vcp.patience, group);
        vcp.dialer = Some(Arc::new(dialer));
        vcp.spaces.net = true;
        // By default as much as the kernel allows; what was asked for is kept or refused.
        vcp.needs_net = disk.network.is_some();
    }
    let process = VcpProcess::start(&programs.iscsi, &vcp, First::Serve)?;
    Ok(Started { vcp, process })
}

impl Started {
    fn wait_ready(&mut self, timeout: Duration, interrupt: impl AsFd) -> Result<()> {
        self.process.wait_ready(timeout, interrupt)?;
        tracing::info!(device = self.vcp.device, pid = self.process.pid(), "vcp-iscsi is ready");
        Ok(())
    }

    fn connect(self, program: &Path, disk: &DiskSpec) -> Result<Backend> {
        let Self { vcp, process } = self;
        let (name, link) = (vcp.device.clone(), process.connect(vcp.queues)?);
        let source = Source::Process(program.to_owned(), Box::new(vcp));
        disk_behind(&name, disk, link, source, Some(process))
    }
}

fn connect_given_disk(name: &str, disk: &DiskSpec, socket: &Path) -> Result<Backend> {
    let link = Link::connect(name, socket, disk.queues.unwrap_or(1))?;
    disk_behind(name, disk, link, Source::Socket(socket.to_owned()), None)
}

/// Shakes hands with the backend of a disk.
fn disk_behind(
    name: &str,
    disk: &DiskSpec,
    link: Link,
    source: Source,
    process: Option<VcpProcess>,
) -> Result<Backend> {
    let queues = disk.queues.unwrap_or(1);
    let recovers = disk.reconnect.unwrap_or(true);
    let device = VhostUserDevice::new(name, blk::kind(queues, disk.packed), link, recovers)?;
    Ok(Backend { kind: DeviceKind::Disk, device, source, process })
}

/// The backend of a network device, whose number makes its address if it was given none: one that runs already, or a
/// `vcp-net` with a port and an uplink for it.
pub(super) fn start_net(
    programs: &Programs,
    name: &str,
    index: usize,
    spec: &NetSpec,
    place: VcpPlace,
    interrupt: impl AsFd,
) -> Result<Backend> {
    let mac = spec.mac_bytes().map_err(Error::Usage)?.unwrap_or_else(|| net::default_mac(index as u8));
    let pairs = spec.queues.unwrap_or(1);
    let kind = net::kind(mac, pairs, spec.packed);
    let queues = kind.queue_max_sizes.len() as u16;
    let uplink = match spec.kind().map_err(Error::Usage)? {
        NetKind::Socket(socket) => {
            let link = Link::connect(name, socket, queues)?;
            return net_behind(name, spec, kind, link, Source::Socket(socket.to_owned()), None);
        }
        NetKind::Tap(tap) => format!("tap={tap}"),
        NetKind::User(forwards) => {
            let forwards = forwards.iter().map(|forward| format!(",hostfwd={forward}"));
            std::iter::once("user".to_owned()).chain(forwards).collect()
        }
        NetKind::Switch(switch) => return switch::join(name, spec, switch),
    };
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    let mut vcp = VcpSpec::net(name, NetPort { uplink, mac }, pairs, queues)?;
    // Users of their own begin behind those of the disks.
    (vcp.cpu, vcp.node, vcp.nice) = (place.cpu, place.node, place.nice);
    vcp.number = 16 + index as u32;
    programs.bound(&mut vcp, &spec.bounds(), spec.weight.unwrap_or(DEFAULT_WEIGHT))?;
    let mut process = VcpProcess::start(&programs.net, &vcp, First::Serve)?;
    process.wait_ready(READY_TIMEOUT, interrupt)?;
    tracing::info!(device = name, pid = process.pid(), "vcp-net is ready");
    let link = process.connect(queues)?;
    let source = Source::Process(programs.net.clone(), Box::new(vcp));
    net_behind(name, spec, kind, link, source, Some(process))
}

/// Shakes hands with the backend of a network device.
pub(super) fn net_behind(
    name: &str,
    spec: &NetSpec,
    kind: Kind,
    link: Link,
    source: Source,
    process: Option<VcpProcess>,
) -> Result<Backend> {
    let device = VhostUserDevice::new(name, kind, link, spec.reconnect.unwrap_or(true))?;
    Ok(Backend { kind: DeviceKind::Net, device, source, process })
}
