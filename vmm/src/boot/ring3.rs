//! Bare-metal guests that are entered in ring 3; the contract is guest-images' `abi`, included here by source.

use std::fs::File;
use std::path::Path;

use super::{elf::ElfInfo, linux, low_ram, put, too_small, write_cmdline};
use crate::config::VmConfig;
use crate::error::{Error, Result};
use crate::kvm::GuestMemory;
use crate::kvm::regs::Entry;
use crate::layout::{CMDLINE_MAX_BYTES, CMDLINE_START, START_INFO, VIRTIO_MMIO_START, VIRTIO_MMIO_STRIDE};

#[path = "../../../guest-images/bare/src/abi.rs"]
pub mod abi;

/// Whether an ELF file asks for ring 3. An error if it asks for a version or a flag that is not known here.
pub fn wants_ring3(info: &ElfInfo) -> std::result::Result<bool, String> {
    let Some(note) =
        info.notes.iter().find(|n| n.name == abi::NOTE_NAME.as_bytes() && n.kind == abi::NOTE_TYPE)
    else {
        return Ok(false);
    };
    let word = |at: usize| note.desc.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    match (word(0), word(4)) {
        (Some(abi::ABI_VERSION), Some(abi::FLAG_RING3)) => Ok(true),
        (Some(abi::ABI_VERSION), Some(flags)) => Err(format!("its VCP note has unknown flags {flags:#x}")),
        (Some(version), _) => {
            Err(format!("its VCP note has version {version}, this monitor knows {}", abi::ABI_VERSION))
        }
        _ => Err("its VCP note is cut short".into()),
    }
}

/// Loads a bare-metal guest.
pub fn load(
    file: &mut File,
    path: &Path,
    info: &ElfInfo,
    memory: &GuestMemory,
    config: &VmConfig,
    tsc_khz: u64,
    devices: usize,
) -> Result<Entry> {
    if config.initrd.is_some() {
        return Err(Error::Usage("a bare-metal guest takes no initrd: leave out --initrd".into()));
    }
    linux::load_segments(file, path, info, memory, config)?;
    let free_start = info.end.next_multiple_of(4096);
    if free_start >= low_ram(config) {
        return Err(too_small(config, "the guest program", free_start + 4096));
    }
    write_cmdline(memory, &config.cmdline, CMDLINE_MAX_BYTES - 1)?;
    let boot_info = abi::BootInfo {
        magic: abi::BOOT_MAGIC,
        version: abi::ABI_VERSION,
        vcpus: u32::from(config.vcpus),
        mem_bytes: low_ram(config),
        free_start,
        tsc_khz,
        cmdline: CMDLINE_START,
        cmdline_len: config.cmdline.len() as u64,
        virtio_mmio_base: VIRTIO_MMIO_START,
        virtio_mmio_stride: VIRTIO_MMIO_STRIDE,
        virtio_mmio_count: devices as u64,
    };
    put(memory, START_INFO, &encode(&boot_info))?;
    Ok(Entry::Ring3 { rip: info.entry, boot_info: START_INFO })
}

/// The structure as it lies in memory. It has no padding; the test checks that nothing is forgotten.
fn encode(info: &abi::BootInfo) -> Vec<u8> {
    let mut bytes = info.magic.to_le_bytes().to_vec();
    bytes.extend(info.version.to_le_bytes());
    bytes.extend(info.vcpus.to_le_bytes());
    let rest = [
        info.mem_bytes,
        info.free_start,
        info.tsc_khz,
        info.cmdline,
        info.cmdline_len,
        info.virtio_mmio_base,
        info.virtio_mmio_stride,
        info.virtio_mmio_count,
    ];
    bytes.extend(rest.iter().flat_map(|v| v.to_le_bytes()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::elf::Note;
    use super::*;

    fn with_note(desc: Vec<u8>) -> ElfInfo {
        ElfInfo {
            notes: vec![Note { name: b"VCP".to_vec(), kind: abi::NOTE_TYPE, desc }],
            ..Default::default()
        }
    }

    #[test]
    fn note_decides() {
        assert_eq!(wants_ring3(&ElfInfo::default()), Ok(false));
        assert_eq!(wants_ring3(&with_note(vec![1, 0, 0, 0, 1, 0, 0, 0])), Ok(true));
        for bad in [vec![], vec![2, 0, 0, 0, 1, 0, 0, 0], vec![1, 0, 0, 0, 3, 0, 0, 0], vec![1, 0, 0, 0]] {
            assert!(wants_ring3(&with_note(bad)).is_err());
        }
    }

    #[test]
    fn boot_info_has_no_padding() {
        assert_eq!(encode(&abi::BootInfo::default()).len(), size_of::<abi::BootInfo>());
        assert_eq!(std::mem::offset_of!(abi::BootInfo, virtio_mmio_count), 72);
    }
}
