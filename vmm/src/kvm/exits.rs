//! Counts why vCPUs leave the guest for the monitor. Exits that KVM handles by itself (notifications by ioeventfd,
//! halts, interrupt controllers) are not among them: those cost no time here.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Counters of one vCPU; written by its thread, read by any.
#[derive(Debug, Default)]
pub struct ExitCounters {
    io_in: AtomicU64,
    io_out: AtomicU64,
    mmio_read: AtomicU64,
    mmio_write: AtomicU64,
    interrupted: AtomicU64,
    other: AtomicU64,
}

/// Why a vCPU came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// Read from a port.
    IoIn,
    /// Write to a port.
    IoOut,
    /// Read from a device's memory.
    MmioRead,
    /// Write to a device's memory.
    MmioWrite,
    /// A signal, mostly from who wants to stop it.
    Interrupted,
    /// Anything else.
    Other,
}

/// Exits by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
pub struct Exits {
    /// Reads from ports.
    pub io_in: u64,
    /// Writes to ports.
    pub io_out: u64,
    /// Reads from devices' memory.
    pub mmio_read: u64,
    /// Writes to devices' memory.
    pub mmio_write: u64,
    /// Signals.
    pub interrupted: u64,
    /// Anything else.
    pub other: u64,
}

impl Exits {
    /// All kinds together.
    pub fn total(&self) -> u64 {
        self.by_kind().into_iter().fold(0, |sum, (_, count)| sum.saturating_add(count))
    }

    /// The kinds with their names, as in JSON.
    pub fn by_kind(&self) -> [(&'static str, u64); 6] {
        [
            ("io_in", self.io_in),
            ("io_out", self.io_out),
            ("mmio_read", self.mmio_read),
            ("mmio_write", self.mmio_write),
            ("interrupted", self.interrupted),
            ("other", self.other),
        ]
    }
}

impl ExitCounters {
    /// One more of this kind.
    pub fn count(&self, kind: ExitKind) {
        let counter = match kind {
            ExitKind::IoIn => &self.io_in,
            ExitKind::IoOut => &self.io_out,
            ExitKind::MmioRead => &self.mmio_read,
            ExitKind::MmioWrite => &self.mmio_write,
            ExitKind::Interrupted => &self.interrupted,
            ExitKind::Other => &self.other,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The counts now.
    pub fn read(&self) -> Exits {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Exits {
            io_in: get(&self.io_in),
            io_out: get(&self.io_out),
            mmio_read: get(&self.mmio_read),
            mmio_write: get(&self.mmio_write),
            interrupted: get(&self.interrupted),
            other: get(&self.other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_counter() {
        let counters = ExitCounters::default();
        let kinds = [
            ExitKind::IoIn,
            ExitKind::IoOut,
            ExitKind::MmioRead,
            ExitKind::MmioWrite,
            ExitKind::Interrupted,
            ExitKind::Other,
        ];
        for (times, kind) in (1..).zip(kinds) {
            (0..times).for_each(|_| counters.count(kind));
        }
        let exits = counters.read();
        let expected = Exits { io_in: 1, io_out: 2, mmio_read: 3, mmio_write: 4, interrupted: 5, other: 6 };
        assert_eq!((exits, exits.total()), (expected, 21));
    }
}
