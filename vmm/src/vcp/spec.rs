//! What a VCP is started with: what it serves, where it runs, what bounds it, and the programs there are.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::cgroup::{Group, Groups};
use super::dialer::Dialer;
use super::spawn::Spaces;
use crate::config::{BoundSpec, SecretUrl};
use crate::error::{Error, Result};

/// What a VCP is started with.
#[derive(Clone, Debug)]
pub struct VcpSpec {
    /// Device name, e.g. `disk0`.
    pub device: String,
    /// For a network device: where its frames go, as `vcp-net --uplink` takes it, and what its one port is like. The program
    /// is a `vcp-net` then, and what belongs to a disk is not used.
    pub net: Option<NetPort>,
    /// The URL of a disk, with secrets; it never becomes an argument.
    pub url: SecretUrl,
    /// What the disk is to its target, the same for every process that serves it: a new one takes over the session of
    /// the one before, so that nothing of that one is carried out later.
    pub instance: String,
    /// Offer the disk read-only.
    pub read_only: bool,
    /// Number of virtqueues.
    pub queues: u16,
    /// Of a network device: pairs among them.
    pub pairs: u16,
    /// Hardware thread of its own.
    pub cpu: Option<usize>,
    /// NUMA node that its memory should come from.
    pub node: Option<usize>,
    /// More arguments for `serve`: polling, limits.
    pub options: Vec<String>,
    /// Namespaces that it gets.
    pub spaces: Spaces,
    /// It is not started with the host's network, whatever the kernel says.
    pub needs_net: bool,
    /// What connects for it, so that it needs no network.
    pub dialer: Option<Arc<Dialer>>,
    /// Number of the device among those of this monitor: makes its user.
    pub number: u32,
    /// Steps of priority below the monitor, 0 to 19.
    pub nice: i32,
    /// A process that is ready but for its login stands by for the case that this one dies.
    pub standby: bool,
    /// How long its data loop may stand still with work to do.
    pub patience: Duration,
    /// Control group of all its processes.
    pub cgroup: Option<Arc<Group>>,
    /// What of its confinement cannot be had whatever process it is, with the reasons.
    pub not_confined: Vec<String>,
    /// Further ways to the unit.
    pub paths: VcpPaths,
    /// Where programs of this host reach the disk beside the guest. The socket is the monitor's, and every process that
    /// serves the disk in turn is given it: a program that connects while one is started anew waits in its backlog.
    pub msgq: Option<Arc<vcp_core::msgq::Listener>>,
}

/// What the `vcp-net` of a network device is started with.
#[derive(Clone, Debug)]
pub struct NetPort {
    /// `user`, `user,hostfwd=...` or `tap=NAME`.
    pub uplink: String,
    /// The guest's address, `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
}

/// Ways to a disk's unit besides its URL.
#[derive(Clone, Debug, Default)]
pub struct VcpPaths {
    /// Further URLs, with secrets.
    pub urls: Vec<SecretUrl>,
    /// Every portal that the target names as well.
    pub all: bool,
    /// Sessions with each portal, if more than one.
    pub sessions: Option<u16>,
}

impl VcpSpec {
    /// A disk with everything else as it is by default.
    pub fn new(device: &str, url: SecretUrl, queues: u16) -> Result<Self> {
        let mut random = [0u8; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(Error::os("get random bytes"))?;
        let instance = format!("vcp-{}-{:016x}/{device}", std::process::id(), u64::from_ne_bytes(random));
        Ok(Self {
            device: device.to_owned(),
            net: None,
            url,
            instance,
            read_only: false,
            queues,
            pairs: 0,
            cpu: None,
            node: None,
            options: Vec::new(),
            spaces: Spaces::LOCAL,
            needs_net: false,
            dialer: None,
            number: 0,
            nice: 0,
            standby: true,
            patience: super::watchdog::PATIENCE,
            cgroup: None,
            not_confined: Vec::new(),
            paths: VcpPaths::default(),
            msgq: None,
        })
    }
}

impl VcpSpec {
    /// A network device with one port of `pairs` pairs of queues on a `vcp-net` of its own. `queues` of the front end may
    /// have one more, for control.
    pub fn net(device: &str, port: NetPort, pairs: u16, queues: u16) -> Result<Self> {
        // A TAP device is the user's or root's, which a process in a user namespace of its own is not.
        let spaces = if port.uplink.starts_with("tap=") { Spaces::NONE } else { Spaces::LOCAL };
        let mut spec = Self::new(device, SecretUrl::default(), queues)?;
        spec.net = Some(port);
        spec.pairs = pairs;
        spec.spaces = spaces;
        // It has nothing to log in to: it is there at once.
        spec.standby = false;
        Ok(spec)
    }

    /// The program's name, and the option that says where it is.
    pub(super) fn program(&self) -> (&'static str, &'static str) {
        if self.net.is_some() { ("vcp-net", "--vcp-net") } else { ("vcp-iscsi", "--vcp-iscsi") }
    }

    /// Sets one of the [options](Self::options) that have a value, or takes it away.
    pub fn set_option(&mut self, option: &str, value: Option<String>) {
        if let Some(at) = self.options.iter().position(|word| word == option) {
            self.options.drain(at..(at + 2).min(self.options.len()));
        }
        self.options.extend(value.into_iter().flat_map(|value| [option.to_owned(), value]));
    }
}

/// Finds a program: what the user names, its variable (`VCP_ISCSI`), the directory of this executable, the path.
pub fn find_program(name: &str, given: Option<&Path>) -> PathBuf {
    if let Some(path) = given {
        return path.to_owned();
    }
    let variable = name.to_uppercase().replace('-', "_");
    if let Some(path) = std::env::var_os(variable).filter(|v| !v.is_empty()) {
        return path.into();
    }
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(name)));
    beside.filter(|p| p.is_file()).unwrap_or_else(|| name.into())
}

/// The programs of VCPs, and what bounds them.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `vcp-iscsi`.
    pub iscsi: PathBuf,
    /// `vcp-net`.
    pub net: PathBuf,
    /// The control groups of this monitor, or why there are none.
    pub groups: std::result::Result<Arc<Groups>, String>,
    /// Memory of the guest, bytes.
    pub guest_bytes: u64,
}

impl Programs {
    /// Puts a VCP, which has not been started yet, into a control group of its own. What the user has asked for and cannot
    /// be kept is an error; of what is there by default, its absence is noted.
    pub fn bound(&self, vcp: &mut VcpSpec, spec: &BoundSpec, weight: u32) -> Result<()> {
        let asked = spec.controllers();
        let groups = match &self.groups {
            Ok(groups) => groups,
            Err(why) => {
                if let Some(first) = asked.first() {
                    let reason = format!("its bounds ({first}) cannot be kept: {why}");
                    return Err(Error::Vcp { device: vcp.device.clone(), reason });
                }
                vcp.not_confined.push(format!("control group: {why}"));
                return Ok(());
            }
        };
        if let Some(lacking) = asked.iter().find(|controller| !groups.has(controller)) {
            let reason =
                format!("its bounds cannot be kept: control groups have no controller {lacking} here");
            return Err(Error::Vcp { device: vcp.device.clone(), reason });
        }
        match groups.make(&vcp.device, spec.bounds(self.guest_bytes, weight)) {
            Ok(group) => {
                vcp.cgroup = Some(Arc::new(group));
                vcp.not_confined.extend(groups.missing().iter().cloned());
            }
            Err(e) if asked.is_empty() => vcp.not_confined.push(format!("control group: {e}")),
            Err(e) => {
                let reason = format!("its control group cannot be made: {e}");
                return Err(Error::Vcp { device: vcp.device.clone(), reason });
            }
        }
        Ok(())
    }
}
