//! Resource limits: a fault must not take the host's descriptors, memory or disk along.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{Confinement, Report};

/// Largest file it may write: a flight record is far smaller.
const MAX_FILE_BYTES: u64 = 256 << 20;

pub(super) fn apply(confinement: &Confinement, report: &mut Report) {
    report.note("no core dumps", lower(Resource::Core, 0));
    report.note("descriptors limited", lower(Resource::Nofile, confinement.max_fds));
    report.note("private memory limited", lower(Resource::Data, confinement.max_private_bytes));
    report.note("file size limited", lower(Resource::Fsize, MAX_FILE_BYTES));
}

/// Lowers both limits to `most`; what is lower already stays.
fn lower(resource: Resource, most: u64) -> rustix::io::Result<()> {
    let now = getrlimit(resource);
    let least = |limit: Option<u64>| Some(limit.map_or(most, |limit| limit.min(most)));
    setrlimit(resource, Rlimit { current: least(now.current), maximum: least(now.maximum) })
}
