//! Register state at the guest's first instruction: 64-bit mode for the Linux boot protocol, 32-bit protected mode for
//! PVH, ring 3 for bare-metal guests; with the descriptor tables and page tables that these need in guest memory.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::GuestMemory;
use crate::error::{Error, Result};
use crate::layout::{GDT_START, PML4_START, TSS_START};

/// How the first vCPU is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode, ring 0, `rsi` = `boot_params` (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
    Linux64 {
        /// First instruction.
        rip: u64,
        /// Address of `boot_params`.
        boot_params: u64,
    },
    /// 32-bit protected mode without paging, `ebx` = `hvm_start_info` (Xen's PVH direct boot).
    Pvh {
        /// First instruction.
        eip: u64,
        /// Address of `hvm_start_info`.
        start_info: u64,
    },
    /// 64-bit mode, ring 3 with I/O privilege, `rdi` = `BootInfo` (guest-images' `abi`).
    Ring3 {
        /// First instruction.
        rip: u64,
        /// Address of `BootInfo`.
        boot_info: u64,
    },
}

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_FIXED: u64 = 1 << 1;
const RFLAGS_IOPL3: u64 = 3 << 12;

/// Selectors, as the Linux boot protocol names them.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TSS: u16 = 0x20;

/// The 64-bit task state segment proper, and the bitmap of 65536 ports behind it.
const TSS_BYTES: u64 = 0x68;
const IO_BITMAP_BYTES: u64 = 8192;
const TSS_LIMIT: u32 = (TSS_BYTES + IO_BITMAP_BYTES) as u32;

const PAGE_PRESENT_WRITE: u64 = 0b11;
const PAGE_USER: u64 = 1 << 2;
const PAGE_2M: u64 = 1 << 7;

/// Sets the first vCPU's registers and writes the tables that they point to.
pub fn set_entry(vcpu: &VcpuFd, memory: &GuestMemory, entry: Entry) -> Result<()> {
    let (dpl, long) = match entry {
        Entry::Linux64 { .. } => (0, true),
        Entry::Pvh { .. } => (0, false),
        Entry::Ring3 { .. } => (3, true),
    };
    let code = segment(CODE, 0b1011, dpl, long);
    let data = segment(DATA, 0b0011, dpl, false);
    let tss = kvm_segment {
        base: TSS_START,
        limit: TSS_LIMIT,
        selector: TSS,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    if dpl == 3 {
        write_io_permissions(memory)?;
    }
    let gdt = [0, 0, descriptor(&code), descriptor(&data), descriptor(&tss), 0];
    for (i, word) in gdt.iter().enumerate() {
        put(memory, GDT_START + 8 * i as u64, *word)?;
    }
    let mut s = vcpu.get_sregs().map_err(Error::kvm("read the vCPU's system registers"))?;
    s.gdt.base = GDT_START;
    s.gdt.limit = (gdt.len() * 8 - 1) as u16;
    s.idt.base = 0;
    s.idt.limit = 0;
    s.cs = code;
    (s.ds, s.es, s.fs, s.gs, s.ss) = (data, data, data, data, data);
    s.tr = tss;
    s.cr0 = CR0_PE | CR0_ET;
    s.cr4 = 0;
    if long {
        write_page_tables(memory, dpl == 3)?;
        s.cr0 |= CR0_PG | CR0_WP | CR0_MP | CR0_NE;
        s.cr3 = PML4_START;
        s.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
        s.efer |= EFER_LME | EFER_LMA;
    }
    vcpu.set_sregs(&s).map_err(Error::kvm("set the vCPU's system registers"))?;
    let mut regs = kvm_regs { rflags: RFLAGS_FIXED, ..Default::default() };
    match entry {
        Entry::Linux64 { rip, boot_params } => (regs.rip, regs.rsi) = (rip, boot_params),
        Entry::Pvh { eip, start_info } => (regs.rip, regs.rbx) = (eip, start_info),
        Entry::Ring3 { rip, boot_info } => {
            (regs.rip, regs.rdi) = (rip, boot_info);
            regs.rflags |= RFLAGS_IOPL3;
        }
    }
    vcpu.set_regs(&regs).map_err(Error::kvm("set the vCPU's registers"))
}

/// State that every vCPU starts with besides [`set_entry`]: floating point, a few MSRs, local interrupt pins.
pub fn set_defaults(vcpu: &VcpuFd) -> Result<()> {
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(Error::kvm("set the vCPU's floating-point state"))?;
    const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
    const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
    // Fast string operations; all memory write-back.
    for (index, data) in [(MSR_IA32_MISC_ENABLE, 1), (MSR_MTRR_DEF_TYPE, 1 << 11 | 6)] {
        let msrs =
            Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]).map_err(|e| {
                Error::Os { action: "build an MSR list", source: std::io::Error::other(format!("{e:?}")) }
            })?;
        match vcpu.set_msrs(&msrs) {
            Ok(1) => {}
            other => tracing::debug!(msr = format_args!("{index:#x}"), ?other, "KVM does not take this MSR"),
        }
    }
    // LINT0 takes the legacy interrupt controller, LINT1 is NMI, as firmware leaves them.
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_EXTINT: u32 = 0x700;
    const MODE_NMI: u32 = 0x400;
    let mut lapic = vcpu.get_lapic().map_err(Error::kvm("read the local APIC"))?;
    for (offset, mode) in [(LVT_LINT0, MODE_EXTINT), (LVT_LINT1, MODE_NMI)] {
        for (register, byte) in lapic.regs[offset..offset + 4].iter_mut().zip(mode.to_le_bytes()) {
            *register = byte as _;
        }
    }
    vcpu.set_lapic(&lapic).map_err(Error::kvm("set the local APIC"))
}

fn segment(selector: u16, type_: u8, dpl: u8, long: bool) -> kvm_segment {
    let code = type_ & 8 != 0;
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: selector | u16::from(dpl),
        type_,
        present: 1,
        dpl,
        db: u8::from(!(code && long)),
        s: 1,
        l: u8::from(code && long),
        g: 1,
        ..Default::default()
    }
}

/// The descriptor that loads this segment (SDM volume 3, 3.4.5).
fn descriptor(s: &kvm_segment) -> u64 {
    let limit = if s.g == 1 { u64::from(s.limit >> 12) } else { u64::from(s.limit) };
    let access = u64::from(s.type_) | u64::from(s.s) << 4 | u64::from(s.dpl) << 5 | u64::from(s.present) << 7;
    let flags = u64::from(s.avl) | u64::from(s.l) << 1 | u64::from(s.db) << 2 | u64::from(s.g) << 3;
    (limit & 0xffff)
        | (s.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (s.base >> 24 & 0xff) << 56
}

/// Opens every port to ring 3 by the TSS' permission bitmap. The I/O privilege level alone would do on a processor, but
/// KVM for nested guests (kvm_pvm) loses it from the flags on the way through the host.
fn write_io_permissions(memory: &GuestMemory) -> Result<()> {
    const IO_MAP_BASE: u64 = 102;
    let write = |addr: u64, bytes: &[u8]| crate::boot::put(memory, addr, bytes);
    write(TSS_START + IO_MAP_BASE, &(TSS_BYTES as u16).to_le_bytes())?;
    write(TSS_START + TSS_BYTES, &[0; IO_BITMAP_BYTES as usize])?;
    // A byte of ones ends the bitmap (SDM volume 1, 19.5.2).
    write(TSS_START + TSS_BYTES + IO_BITMAP_BYTES, &[0xff])
}

/// Identity map of the first 4 GiB with 2 MiB pages.
fn write_page_tables(memory: &GuestMemory, user: bool) -> Result<()> {
    let flags = PAGE_PRESENT_WRITE | if user { PAGE_USER } else { 0 };
    let pdpt = PML4_START + 0x1000;
    put(memory, PML4_START, pdpt | flags)?;
    for gib in 0..4u64 {
        let directory = pdpt + 0x1000 * (gib + 1);
        put(memory, pdpt + 8 * gib, directory | flags)?;
        for i in 0..512u64 {
            put(memory, directory + 8 * i, (gib << 30 | i << 21) | flags | PAGE_2M)?;
        }
    }
    Ok(())
}

fn put(memory: &GuestMemory, addr: u64, value: u64) -> Result<()> {
    memory.write_obj(value, GuestAddress(addr)).map_err(|_| Error::GuestMemory { addr })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(descriptor(&segment(CODE, 0b1011, 0, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(DATA, 0b0011, 0, false)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&segment(CODE, 0b1011, 3, true)), 0x00af_fb00_0000_ffff);
    }

    #[test]
    fn page_tables_map_one_to_one() {
        let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
        write_page_tables(&memory, true).unwrap();
        let read = |a: u64| memory.read_obj::<u64>(GuestAddress(a)).unwrap();
        let pdpt = read(PML4_START) & !0xfff;
        let directory = read(pdpt + 8 * 3) & !0xfff;
        assert_eq!(read(directory + 8 * 128), 0xd000_0087);
        assert!(directory + 0x1000 <= crate::layout::PAGE_TABLES_END);
    }
}
