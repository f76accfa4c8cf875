//! What of a `vcp-iscsi` stays when it is confined ([`vcp_core::process::confine`]).

use std::collections::BTreeSet;
use std::net::ToSocketAddrs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value};
use vcp_core::control::StatusSource;
use vcp_core::process::confine::{Confinement, Mode, Report};

/// Private memory of the process itself; devices come on top.
const OWN_BYTES: u64 = 512 << 20;
/// Private memory of a device at most, with room for a second set of buffers during a hand-over.
const DEVICE_BYTES: u64 = 128 << 20;
/// Descriptors of the process itself: clients, threads, sockets of a hand-over.
const OWN_FDS: u64 = 512;
/// Descriptors of a device besides those of its queues: memory regions, paths.
const DEVICE_FDS: u64 = 128;
/// Private memory and descriptors of a process that only connects.
const DIALER_BYTES: u64 = 256 << 20;
const DIALER_FDS: u64 = 128;
/// Descriptors of a queue: kick, call, error.
const QUEUE_FDS: u64 = 3;

/// What a process is confined to.
#[derive(Debug, Default)]
pub(crate) struct Needs {
    /// Queues of each device.
    pub(crate) queues: Vec<u16>,
    /// Socket files, which are removed at the end.
    pub(crate) sockets: Vec<PathBuf>,
    /// Directories for captures.
    pub(crate) captures: Vec<PathBuf>,
    /// It connects to targets itself.
    pub(crate) network: bool,
}

impl Needs {
    fn confinement(self) -> Confinement {
        let devices = self.queues.len() as u64;
        // Twice: a process that hands over holds a copy of each.
        let device_fds: u64 = self.queues.iter().map(|&n| 2 * (QUEUE_FDS * u64::from(n) + DEVICE_FDS)).sum();
        let parents: BTreeSet<PathBuf> = self.sockets.iter().map(|socket| parent(socket)).collect();
        Confinement {
            read: if self.network { Confinement::resolver_files() } else { Vec::new() },
            write: self.captures,
            remove: parents.into_iter().collect(),
            local_sockets: false,
            listens: false,
            network: self.network,
            max_fds: OWN_FDS + device_fds,
            max_private_bytes: OWN_BYTES + devices * DEVICE_BYTES,
        }
    }
}

fn parent(socket: &Path) -> PathBuf {
    match socket.parent() {
        Some(parent) if parent != Path::new("") => parent.into(),
        _ => ".".into(),
    }
}

/// Confines this process, on its only thread. `ring`: it has an io_uring instance.
///
/// # Errors
/// `--confine require`, and something could not be done.
pub(crate) fn confine(mode: Mode, ring: bool, needs: Needs) -> Result<Report> {
    if mode != Mode::Off && needs.network {
        // The resolver loads its modules with its first question, which it cannot do later.
        let _ = ("localhost", 0).to_socket_addrs();
    }
    let report = needs.confinement().apply_with(mode, ring).context("--confine")?;
    for missing in &report.missing {
        tracing::warn!("not confined: {missing}");
    }
    tracing::info!(done = report.done.join(", "), "confined");
    Ok(report)
}

/// Confines a `vcp-iscsi dial`, on its only thread.
///
/// # Errors
/// `--confine require`, and something could not be done.
pub(crate) fn confine_dialer(mode: Mode) -> Result<Report> {
    if mode != Mode::Off {
        let _ = ("localhost", 0).to_socket_addrs();
    }
    let confinement = Confinement {
        read: Confinement::resolver_files(),
        write: Vec::new(),
        remove: Vec::new(),
        local_sockets: false,
        listens: false,
        network: true,
        max_fds: DIALER_FDS,
        max_private_bytes: DIALER_BYTES,
    };
    let report = confinement.apply(mode).context("--confine")?;
    for missing in &report.missing {
        tracing::warn!("not confined: {missing}");
    }
    Ok(report)
}

/// The report as part of the control socket's `status`.
pub(crate) fn status(report: &Report) -> StatusSource {
    let report = serde_json::to_value(report).unwrap_or(Value::Null);
    Box::new(move || Map::from_iter([("confinement".to_owned(), report.clone())]))
}
