//! Which host CPUs this process may use, and confining threads to some of them.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::config::size::MAX_CPU;
use crate::error::{Error, Result};

/// CPUs that the calling thread may run on, in order.
pub fn allowed() -> Result<Vec<usize>> {
    let set = sched_getaffinity(None).map_err(Error::os("read the allowed CPUs"))?;
    Ok((0..MAX_CPU.min(CpuSet::MAX_CPU)).filter(|cpu| set.is_set(*cpu)).collect())
}

/// Confines the calling thread to these CPUs.
pub fn confine_thread(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU) {
        set.set(*cpu);
    }
    sched_setaffinity(None, &set).map_err(Error::os("pin a thread"))
}

/// Confines another thread of this host to these CPUs.
pub fn confine(thread: i32, cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU) {
        set.set(*cpu);
    }
    sched_setaffinity(rustix::process::Pid::from_raw(thread), &set).map_err(Error::os("pin a thread"))
}
