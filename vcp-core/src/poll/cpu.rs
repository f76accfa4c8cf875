//! Pinning to a hardware thread.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Why the data thread cannot run where it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// Outside the set this process may use.
    #[error("hardware thread {cpu} is not among those this process may use ({allowed})")]
    NotAllowed {
        /// The one asked for.
        cpu: usize,
        /// Those allowed, as ranges.
        allowed: String,
    },
    /// The system refused.
    #[error("cannot pin to hardware thread {cpu}")]
    Refused {
        /// The one asked for.
        cpu: usize,
        /// Why.
        #[source]
        source: rustix::io::Errno,
    },
}

/// Checks that this process may run on hardware thread `cpu`.
///
/// # Errors
/// [`CpuError`].
pub fn check_cpu(cpu: usize) -> Result<(), CpuError> {
    let set = sched_getaffinity(None).map_err(|source| CpuError::Refused { cpu, source })?;
    if cpu < CpuSet::MAX_CPU && set.is_set(cpu) {
        return Ok(());
    }
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect();
    Err(CpuError::NotAllowed { cpu, allowed: ranges(&cpus) })
}

/// Pins the calling thread to hardware thread `cpu`.
///
/// # Errors
/// [`CpuError`].
pub fn pin_to(cpu: usize) -> Result<(), CpuError> {
    check_cpu(cpu)?;
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).map_err(|source| CpuError::Refused { cpu, source })
}

/// `0-3,8` for `[0, 1, 2, 3, 8]`: numbers in order as the kernel writes them.
#[must_use]
pub fn ranges(cpus: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &cpu in cpus {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => parts.push((cpu, cpu)),
        }
    }
    let text = |&(first, last): &(usize, usize)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    parts.iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_that_is_not_there_is_refused_by_name() {
        let error = pin_to(CpuSet::MAX_CPU - 1).unwrap_err().to_string();
        assert!(error.contains("is not among those"), "{error}");
        assert!(matches!(check_cpu(usize::MAX), Err(CpuError::NotAllowed { .. })));
    }

    #[test]
    fn ranges_are_short() {
        assert_eq!(ranges(&[0, 1, 2, 3, 8, 10, 11]), "0-3,8,10-11");
    }
}
