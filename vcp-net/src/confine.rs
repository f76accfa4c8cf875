//! What of a `vcp-net` stays when it is confined ([`vcp_core::process::confine`]).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value};
use vcp_core::control::StatusSource;
use vcp_core::process::confine::{Confinement, Mode, Report};

/// Private memory of the process itself; ports come on top.
const OWN_BYTES: u64 = 512 << 20;
/// Private memory of a port besides its queues.
const PORT_BYTES: u64 = 4 << 20;
/// Private memory of a pair of queues.
const PAIR_BYTES: u64 = 1 << 20;
/// Private memory of a flow of the user-mode stack.
const FLOW_BYTES: u64 = 1 << 10;
/// Descriptors of the process itself: clients, threads, sockets of a hand-over.
const OWN_FDS: u64 = 512;
/// Descriptors of a port besides those of its queues: memory regions, connections.
const PORT_FDS: u64 = 64;
/// Descriptors of a pair of queues: kick, call, error.
const PAIR_FDS: u64 = 6;

/// What a process is confined to.
#[derive(Debug, Default)]
pub(crate) struct Needs {
    /// Pairs of queues of each port.
    pub(crate) pairs: Vec<u16>,
    /// Socket files, which are removed at the end.
    pub(crate) sockets: Vec<PathBuf>,
    /// A front end listens, and this process connects to it.
    pub(crate) dials: bool,
    /// Forwards can be added while it runs.
    pub(crate) listens: bool,
    /// Directories for captures.
    pub(crate) captures: Vec<PathBuf>,
    /// Sockets of flows.
    pub(crate) flows: u64,
}

impl Needs {
    fn confinement(self) -> Confinement {
        let ports = self.pairs.len() as u64;
        let pairs: u64 = self.pairs.iter().map(|&pairs| u64::from(pairs) + 1).sum();
        let parents: BTreeSet<PathBuf> = self.sockets.iter().map(|socket| parent(socket)).collect();
        Confinement {
            read: if self.listens { resolver_paths() } else { Vec::new() },
            write: self.captures,
            remove: parents.into_iter().collect(),
            local_sockets: self.dials,
            listens: self.listens,
            network: true,
            // Twice: a process that hands over holds a copy of each.
            max_fds: OWN_FDS + 2 * (ports * PORT_FDS + pairs * PAIR_FDS) + 2 * self.flows,
            max_private_bytes: OWN_BYTES + ports * PORT_BYTES + pairs * PAIR_BYTES + self.flows * FLOW_BYTES,
        }
    }
}

/// What the user-mode stack reads: the configuration of the resolver. Whoever rewrites it puts a new file in its place, so
/// that the directory has to be readable; only for root, to whom `/etc` has more to say than to others, it is the file that
/// is there now.
fn resolver_paths() -> Vec<PathBuf> {
    let file = PathBuf::from(crate::user::RESOLV_CONF);
    let target = std::fs::canonicalize(&file).unwrap_or_else(|_| file.clone());
    let root = rustix::process::geteuid().is_root();
    let paths = [file, target].map(|path| match path.parent() {
        Some(dir) if !root || dir != Path::new("/etc") => dir.into(),
        _ => path,
    });
    BTreeSet::from(paths).into_iter().collect()
}

fn parent(socket: &Path) -> PathBuf {
    match socket.parent() {
        Some(parent) if parent != Path::new("") => parent.into(),
        _ => ".".into(),
    }
}

/// Confines this process, on its only thread.
///
/// # Errors
/// `--confine require`, and something could not be done.
pub(crate) fn confine(mode: Mode, needs: Needs) -> Result<Report> {
    let report = needs.confinement().apply(mode).context("--confine")?;
    for missing in &report.missing {
        tracing::warn!("not confined: {missing}");
    }
    tracing::info!(done = report.done.join(", "), "confined");
    Ok(report)
}

/// The report as part of the control socket's `status`.
pub(crate) fn status(report: &Report) -> StatusSource {
    let report = serde_json::to_value(report).unwrap_or(Value::Null);
    Box::new(move || Map::from_iter([("confinement".to_owned(), report.clone())]))
}
