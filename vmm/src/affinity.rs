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

/// Who runs where: the hardware thread of each VCP, and the CPUs of each vCPU thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// CPU of each VCP, in the order of the disks; `None`: not pinned.
    pub vcps: Vec<Option<usize>>,
    /// CPUs of each vCPU; `None`: not confined.
    pub vcpus: Vec<Option<Vec<usize>>>,
}

/// Decides who runs where. `wanted` has one entry per VCP: the CPU that the user asked for. A VCP without a wish gets
/// the last allowed CPU, as long as there is more than one. The vCPUs get what no VCP has if that is a CPU for each of
/// them; else they are not confined, since vCPUs that wait for each other on one CPU are slower than a VCP that is
/// sometimes disturbed. A list for the vCPUs overrides that, and gives each its own CPU where it has enough.
pub fn place(
    allowed: &[usize],
    wanted: &[Option<usize>],
    vcpus: u8,
    vcpu_cpus: Option<&[usize]>,
) -> std::result::Result<Placement, String> {
    let list = || allowed.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    for cpu in wanted.iter().flatten().chain(vcpu_cpus.unwrap_or(&[])) {
        if !allowed.contains(cpu) {
            return Err(format!("CPU {cpu} is not among the CPUs that this process may use: {}", list()));
        }
    }
    let last = allowed.last().filter(|_| allowed.len() > 1).copied();
    let vcps: Vec<Option<usize>> = wanted.iter().map(|cpu| cpu.or(last)).collect();
    let count = usize::from(vcpus);
    let vcpus = match vcpu_cpus {
        Some(cpus) if cpus.len() >= count => cpus[..count].iter().map(|cpu| Some(vec![*cpu])).collect(),
        Some(cpus) => vec![Some(cpus.to_vec()); count],
        None => {
            let rest: Vec<usize> =
                allowed.iter().copied().filter(|cpu| !vcps.contains(&Some(*cpu))).collect();
            let confined = (rest.len() >= count && rest.len() < allowed.len()).then_some(rest);
            vec![confined; count]
        }
    };
    Ok(Placement { vcps, vcpus })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcp_gets_the_last_cpu_and_vcpus_the_rest() {
        let p = place(&[0, 1, 2], &[None], 2, None).unwrap();
        assert_eq!(p, Placement { vcps: vec![Some(2)], vcpus: vec![Some(vec![0, 1]); 2] });
    }

    #[test]
    fn vcpus_that_would_share_a_cpu_are_not_confined() {
        let p = place(&[0, 1], &[None], 2, None).unwrap();
        assert_eq!(p, Placement { vcps: vec![Some(1)], vcpus: vec![None, None] });
    }

    #[test]
    fn one_cpu_is_shared() {
        let p = place(&[3], &[None], 1, None).unwrap();
        assert_eq!(p, Placement { vcps: vec![None], vcpus: vec![None] });
    }

    #[test]
    fn wishes_count() {
        let p = place(&[0, 1, 2, 3], &[Some(0)], 2, Some(&[2, 3])).unwrap();
        assert_eq!(p, Placement { vcps: vec![Some(0)], vcpus: vec![Some(vec![2]), Some(vec![3])] });
        assert!(place(&[0, 1], &[Some(2)], 1, None).is_err());
        assert!(place(&[0, 1], &[], 1, Some(&[5])).is_err());
    }

    #[test]
    fn without_vcps_nothing_is_confined() {
        assert_eq!(place(&[0, 1], &[], 1, None).unwrap().vcpus, vec![None]);
    }
}
