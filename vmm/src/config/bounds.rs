//! Bounds of a VCP as the user gives them, for disks and nets alike: its control group, its share of a hardware thread.

use super::size::Size;
use crate::vcp::cgroup::{Bounds, MIN_CPU_PERCENT};

/// Memory of a VCP's processes if nothing else was said, bytes: a second one stands by, and a third may take over.
const DEFAULT_MEMORY_BYTES: u64 = 1 << 30;
/// Less than this is not enough for a VCP to start with another one standing by.
const MIN_MEMORY_BYTES: u64 = 64 << 20;
/// Processes and threads if nothing else was said. One VCP has about eight.
const DEFAULT_TASKS: u32 = 128;
/// Least and most that make sense.
const TASKS: std::ops::RangeInclusive<u32> = 16..=4096;
/// Most percent: a hundred threads.
const MAX_CPU_PERCENT: u32 = 10_000;

/// Shares of a hardware thread, 100 if nothing was said.
const WEIGHTS: std::ops::RangeInclusive<u32> = 1..=10_000;

/// Checks the range of `weight=`.
///
/// # Errors
/// In words for the user.
pub(super) fn check_weight(given: Option<u32>) -> Result<(), String> {
    match given {
        Some(weight) if !WEIGHTS.contains(&weight) => {
            Err(format!("weight={weight} is out of range: {} to {}", WEIGHTS.start(), WEIGHTS.end()))
        }
        _ => Ok(()),
    }
}

/// What was given; `None`: the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BoundSpec {
    /// Percent of one hardware thread.
    pub cpu_max: Option<u32>,
    /// Memory besides the guest's.
    pub memory_max: Option<Size>,
    /// Processes and threads.
    pub pids_max: Option<u32>,
}

impl BoundSpec {
    /// Checks the ranges.
    ///
    /// # Errors
    /// In words for the user.
    pub fn validate(&self) -> Result<(), String> {
        if self.cpu_max.is_some_and(|percent| !(MIN_CPU_PERCENT..=MAX_CPU_PERCENT).contains(&percent)) {
            return Err(format!("cpu-max= is out of range: {MIN_CPU_PERCENT} to {MAX_CPU_PERCENT} percent"));
        }
        if self.memory_max.is_some_and(|size| size.0 < MIN_MEMORY_BYTES) {
            return Err(format!("memory-max= is too little: at least {}", Size(MIN_MEMORY_BYTES)));
        }
        if self.pids_max.is_some_and(|tasks| !TASKS.contains(&tasks)) {
            return Err(format!("pids-max= is out of range: {} to {}", TASKS.start(), TASKS.end()));
        }
        Ok(())
    }

    /// The controllers without which something that was asked for is not kept.
    pub fn controllers(&self) -> Vec<&'static str> {
        let pairs = [
            ("cpu", self.cpu_max.is_some()),
            ("memory", self.memory_max.is_some()),
            ("pids", self.pids_max.is_some()),
        ];
        pairs.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
    }

    /// Bounds of the VCP of a guest with so much memory.
    pub fn bounds(&self, guest_bytes: u64, weight: u32) -> Bounds {
        let own = self.memory_max.map_or(DEFAULT_MEMORY_BYTES, |size| size.0);
        Bounds {
            cpu_percent: self.cpu_max,
            memory_bytes: own.saturating_add(guest_bytes),
            tasks: self.pids_max.unwrap_or(DEFAULT_TASKS),
            weight,
        }
    }
}
