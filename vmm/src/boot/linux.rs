//! Linux: the 64-bit boot protocol for a bzImage and for a vmlinux without PVH entry, PVH for an ELF kernel with one.
//! (Documentation/arch/x86/boot.rst; PVH: Xen's docs/misc/pvh.)

use std::fs::File;
use std::io::Read;
use std::path::Path;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::GuestAddress;

use super::{e820, elf, low_ram, open_regular, put, too_small, write_cmdline};
use crate::config::VmConfig;
use crate::error::{Error, Result};
use crate::kvm::GuestMemory;
use crate::kvm::regs::Entry;
use crate::layout::{
    CMDLINE_START, HIGH_RAM_START, KERNEL_START, PVH_MEMMAP, PVH_MODULES, START_INFO, ZERO_PAGE,
};

/// Offset of the 64-bit entry point in a bzImage's protected-mode part.
const ENTRY_64: u64 = 0x200;
/// `xloadflags`: the kernel has that entry point.
const XLF_KERNEL_64: u16 = 1;
/// Where an initrd ends at most if the kernel does not say (boot protocol before 2.03).
const DEFAULT_INITRD_MAX: u64 = 0x37ff_ffff;
/// Command line limit of kernels that do not say, and of ELF kernels (x86's COMMAND_LINE_SIZE).
const DEFAULT_CMDLINE_MAX: usize = 2047;

/// The command line that Linux gets: the user's, with the serial console if no console is named.
pub fn cmdline(user: &str) -> String {
    let has_console = user.split_whitespace().any(|word| word.starts_with("console="));
    match (has_console, user.trim()) {
        (true, user) => user.to_owned(),
        (false, "") => "console=ttyS0".to_owned(),
        (false, user) => format!("console=ttyS0 {user}"),
    }
}

/// Loads a bzImage.
pub fn load_bzimage(
    file: &mut File,
    path: &Path,
    memory: &GuestMemory,
    config: &VmConfig,
    rsdp: u64,
) -> Result<Entry> {
    let not = |reason: String| Error::NotAKernel { path: path.to_owned(), reason };
    let size = file
        .metadata()
        .map_err(|source| Error::File { action: "read the kernel", path: path.to_owned(), source })?
        .len();
    let room = low_ram(config);
    if KERNEL_START.saturating_add(size) > room {
        return Err(too_small(config, "the kernel", KERNEL_START.saturating_add(size)));
    }
    let loaded =
        BzImage::load(memory, Some(GuestAddress(KERNEL_START)), file, Some(GuestAddress(KERNEL_START)))
            .map_err(|e| not(e.to_string()))?;
    let mut header = loaded.setup_header.ok_or_else(|| not("it has no setup header".into()))?;
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(not("it has no 64-bit entry point".into()));
    }
    // The kernel unpacks itself at its preferred address, or higher up if it is loaded there.
    let unpacked = header.pref_address.max(KERNEL_START).saturating_add(header.init_size.into());
    let end = unpacked.max(loaded.kernel_end);
    if end > room {
        return Err(too_small(config, "the kernel", end));
    }
    let (initrd_start, initrd_len) = load_initrd(memory, config, end, u64::from(header.initrd_addr_max))?;
    header.ramdisk_image = initrd_start as u32;
    header.ramdisk_size = initrd_len as u32;
    let max = match header.cmdline_size as usize {
        0 => 255,
        n => n,
    };
    write_cmdline(memory, &cmdline(&config.cmdline), max)?;
    write_zero_page(memory, config, header, rsdp)?;
    Ok(Entry::Linux64 { rip: KERNEL_START + ENTRY_64, boot_params: ZERO_PAGE })
}

/// Loads an ELF kernel.
pub fn load_elf(
    file: &mut File,
    path: &Path,
    info: &elf::ElfInfo,
    memory: &GuestMemory,
    config: &VmConfig,
    rsdp: u64,
) -> Result<Entry> {
    let loaded = load_segments(file, path, info, memory, config)?;
    let (initrd_start, initrd_len) = load_initrd(memory, config, info.end, 0)?;
    write_cmdline(memory, &cmdline(&config.cmdline), DEFAULT_CMDLINE_MAX)?;
    if let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap {
        write_start_info(memory, config, (initrd_start, initrd_len), rsdp)?;
        return Ok(Entry::Pvh { eip: entry.0, start_info: START_INFO });
    }
    let header = setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        kernel_alignment: 0x100_0000,
        ramdisk_image: initrd_start as u32,
        ramdisk_size: initrd_len as u32,
        ..Default::default()
    };
    write_zero_page(memory, config, header, rsdp)?;
    Ok(Entry::Linux64 { rip: info.entry, boot_params: ZERO_PAGE })
}

/// Loads an ELF file's segments where they belong, having checked that they fit.
pub(super) fn load_segments(
    file: &mut File,
    path: &Path,
    info: &elf::ElfInfo,
    memory: &GuestMemory,
    config: &VmConfig,
) -> Result<linux_loader::loader::KernelLoaderResult> {
    let not = |reason: String| Error::NotAKernel { path: path.to_owned(), reason };
    if info.start < KERNEL_START {
        return Err(not(format!("a segment lies at {:#x}, below 1 MiB", info.start)));
    }
    if info.end > HIGH_RAM_START {
        return Err(not(format!("a segment reaches to {:#x}, above 4 GiB", info.end)));
    }
    if info.end > low_ram(config) {
        return Err(too_small(config, "the kernel", info.end));
    }
    Elf::load(memory, None, file, None).map_err(|e| not(e.to_string()))
}

/// Loads the initrd as high as may be below the hole and `addr_max`, above `floor`. Start and length, or zeros.
fn load_initrd(memory: &GuestMemory, config: &VmConfig, floor: u64, addr_max: u64) -> Result<(u64, u64)> {
    let Some(path) = &config.initrd else { return Ok((0, 0)) };
    let fail = |action: &'static str| move |source| Error::File { action, path: path.clone(), source };
    let mut file = open_regular(path).map_err(fail("open the initrd"))?;
    let len = file.metadata().map_err(fail("read the initrd"))?.len();
    let addr_max = if addr_max == 0 { DEFAULT_INITRD_MAX } else { addr_max };
    let top = low_ram(config).min(addr_max.saturating_add(1));
    let start = top.checked_sub(len).map(|s| s & !0xfff).filter(|start| *start >= floor);
    let start = start.ok_or_else(|| {
        too_small(config, "kernel and initrd", floor.saturating_add(len).saturating_add(0xfff))
    })?;
    let mut at = start;
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(fail("read the initrd"))?;
        if n == 0 {
            break;
        }
        if at + n as u64 > start + len {
            return Err(fail("read the initrd")(std::io::Error::other("the file grew while it was read")));
        }
        put(memory, at, &buffer[..n])?;
        at += n as u64;
    }
    Ok((start, at - start))
}

fn write_zero_page(memory: &GuestMemory, config: &VmConfig, header: setup_header, rsdp: u64) -> Result<()> {
    const LOADER_UNDEFINED: u8 = 0xff;
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = CMDLINE_START as u32;
    let map = e820::map(config.memory_bytes);
    for (i, range) in map.iter().enumerate() {
        params.e820_table[i] = boot_e820_entry { addr: range.start, size: range.len, r#type: range.kind };
    }
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(ZERO_PAGE)), memory)
        .map_err(|_| Error::GuestMemory { addr: ZERO_PAGE })
}

fn write_start_info(memory: &GuestMemory, config: &VmConfig, initrd: (u64, u64), rsdp: u64) -> Result<()> {
    const MAGIC: u32 = 0x336e_c578;
    let map: Vec<_> = e820::map(config.memory_bytes)
        .iter()
        .map(|r| hvm_memmap_table_entry { addr: r.start, size: r.len, type_: r.kind, reserved: 0 })
        .collect();
    let modules = usize::from(initrd.1 > 0);
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: modules as u32,
        modlist_paddr: if modules > 0 { PVH_MODULES } else { 0 },
        cmdline_paddr: CMDLINE_START,
        rsdp_paddr: rsdp,
        memmap_paddr: PVH_MEMMAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let module = hvm_modlist_entry { paddr: initrd.0, size: initrd.1, ..Default::default() };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(PVH_MEMMAP));
    if modules > 0 {
        params.set_modules(&[module], GuestAddress(PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, memory)
        .map_err(|_| Error::GuestMemory { addr: START_INFO })
}

/// True if the command line asks Linux to reset by triple fault, so that one is no crash.
pub fn resets_by_triple_fault(cmdline: &str) -> bool {
    cmdline
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("reboot="))
        .any(|modes| modes.split(',').any(|m| m.starts_with('t')))
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn console_is_added_once() {
        assert_eq!(cmdline(""), "console=ttyS0");
        assert_eq!(cmdline("quiet"), "console=ttyS0 quiet");
        assert_eq!(cmdline("console=hvc0 quiet"), "console=hvc0 quiet");
    }

    #[test]
    fn triple_fault_reset_is_recognised() {
        assert!(resets_by_triple_fault("quiet reboot=t"));
        assert!(resets_by_triple_fault("reboot=warm,triple"));
        assert!(!resets_by_triple_fault("reboot=k root=t"));
    }

    #[test]
    fn zero_page_carries_map_and_rsdp() {
        let memory = crate::kvm::memory::create(16 << 20, false).unwrap();
        let config = crate::config::VmFile {
            kernel: Some("k".into()),
            memory: "16M".parse().ok(),
            ..Default::default()
        }
        .finish()
        .unwrap();
        write_zero_page(&memory, &config, setup_header::default(), 0xe_0000).unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
        assert_eq!(usize::from(params.e820_entries), e820::map(16 << 20).len());
    }

    #[test]
    fn initrd_goes_to_the_top_or_is_refused() {
        let memory = crate::kvm::memory::create(16 << 20, false).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7u8; 5000]).unwrap();
        let vm = crate::config::VmFile {
            kernel: Some("k".into()),
            memory: "16M".parse().ok(),
            initrd: Some(file.path().into()),
            ..Default::default()
        };
        let config = vm.finish().unwrap();
        let (start, len) = load_initrd(&memory, &config, 0x10_0000, 0).unwrap();
        assert_eq!((start, len), ((16 << 20) - 0x2000, 5000));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(start + 4999)).unwrap(), 7);
        assert!(matches!(load_initrd(&memory, &config, 16 << 20, 0), Err(Error::TooSmall { .. })));
    }
}
