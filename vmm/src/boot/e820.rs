//! The memory map that the guest is told, in the form of BIOS call e820.

use crate::kvm::memory;
use crate::layout::{
    ACPI_END, ACPI_START, EBDA_START, HIGH_RAM_START, KERNEL_START, PCI_ECAM_LEN, PCI_ECAM_START,
};

/// Usable memory.
pub const RAM: u32 = 1;
/// Not to be touched.
pub const RESERVED: u32 = 2;
/// ACPI tables.
pub const ACPI: u32 = 3;

/// One range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// [`RAM`], [`RESERVED`] or [`ACPI`].
    pub kind: u32,
}

/// Told so that Linux takes PCI's configuration space from its first access on.
const ECAM: Range = Range { start: PCI_ECAM_START, len: PCI_ECAM_LEN, kind: RESERVED };

/// The map for guest memory of this size, by increasing address, without overlap.
pub fn map(memory_bytes: u64) -> Vec<Range> {
    let mut map = vec![
        Range { start: 0, len: EBDA_START, kind: RAM },
        Range { start: EBDA_START, len: ACPI_START - EBDA_START, kind: RESERVED },
        Range { start: ACPI_START, len: ACPI_END - ACPI_START, kind: ACPI },
        Range { start: ACPI_END, len: KERNEL_START - ACPI_END, kind: RESERVED },
    ];
    for (start, len) in memory::ranges(memory_bytes) {
        let start_ram = start.max(KERNEL_START);
        if start >= HIGH_RAM_START {
            map.push(ECAM);
        }
        if start + len > start_ram {
            map.push(Range { start: start_ram, len: start + len - start_ram, kind: RAM });
        }
    }
    if map.last().is_some_and(|last| last.start < PCI_ECAM_START) {
        map.push(ECAM);
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_ordered_and_sum_up() {
        for memory in [4 << 20, 512 << 20, 3 << 30, 8u64 << 30] {
            let map = map(memory);
            assert!(map.windows(2).all(|w| w[0].start + w[0].len <= w[1].start), "{map:?}");
            let ram: u64 = map.iter().filter(|r| r.kind == RAM).map(|r| r.len).sum();
            assert_eq!(ram, memory - (KERNEL_START - EBDA_START));
        }
    }

    #[test]
    fn the_hole_is_not_ram() {
        assert!(
            map(8 << 30)
                .iter()
                .filter(|r| r.kind == RAM)
                .all(|r| r.start + r.len <= 3 << 30 || r.start >= 4 << 30)
        );
    }
}
