//! The guest's physical address map. One place for every address that boot code, ACPI and devices must agree on.

/// First byte after memory below the hole; memory beyond continues at [`HIGH_RAM_START`].
pub const LOW_RAM_MAX: u64 = 3 << 30;
/// Where memory goes on above the hole for devices.
pub const HIGH_RAM_START: u64 = 4 << 30;
/// Start of the legacy area (EBDA, video, option ROMs) that is not given to the guest as memory.
pub const EBDA_START: u64 = 0x9_fc00;
/// Where an operating system's memory proper begins, and where a bzImage is put.
pub const KERNEL_START: u64 = 0x10_0000;

/// Global descriptor table at entry.
pub const GDT_START: u64 = 0x500;
/// Task state segment at entry, with the port bitmap behind it: a bit more than 8 KiB.
pub const TSS_START: u64 = 0x800;
/// PVH `hvm_start_info`, or the bare-metal guest's `BootInfo`.
pub const START_INFO: u64 = 0x6000;
/// PVH module list.
pub const PVH_MODULES: u64 = 0x6100;
/// PVH memory map.
pub const PVH_MEMMAP: u64 = 0x6200;
/// Linux `boot_params`, the "zero page".
pub const ZERO_PAGE: u64 = 0x7000;
/// Top-level page table at entry; the tables below it follow, to [`PAGE_TABLES_END`].
pub const PML4_START: u64 = 0x9000;
/// First byte after the page tables: PML4, one PDPT, four page directories.
pub const PAGE_TABLES_END: u64 = PML4_START + 6 * 0x1000;
/// Kernel command line.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Room for the command line, with its terminating NUL.
pub const CMDLINE_MAX_BYTES: usize = 0x1_0000;
/// RSDP; the other ACPI tables follow it.
pub const ACPI_START: u64 = 0xe_0000;
/// First byte after the ACPI tables' area.
pub const ACPI_END: u64 = 0xf_0000;
/// Where a processor begins after a reset, as real-mode code reaches it (ffff:0000).
pub const RESET_VECTOR: u64 = 0xf_fff0;

/// First virtio-mmio window.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// Distance of two windows, and the size that each is described with.
pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
/// Interrupt lines (GSIs of the I/O APIC) for virtio-mmio devices, in the order they are given out: first those that
/// no legacy device ever had, then free legacy ones.
pub const VIRTIO_GSIS: [u32; 17] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 12, 13, 14, 15];

/// First byte of the window that registers of PCI functions lie in.
pub const PCI_MMIO_START: u64 = 0xc000_0000;
/// First byte after it.
pub const PCI_MMIO_END: u64 = 0xd000_0000;
/// PCI's enhanced configuration mechanism, one bus: 1 MiB.
pub const PCI_ECAM_START: u64 = 0xe000_0000;
/// Its length.
pub const PCI_ECAM_LEN: u64 = 1 << 20;
/// PCI's configuration ports.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Ports by which ACPI hears of devices that come and go, and of the power button.
pub const HOTPLUG_PORT: u16 = 0x620;
/// Interrupt line of those.
pub const HOTPLUG_GSI: u32 = 9;
/// Port of the panic notifier.
pub const PVPANIC_PORT: u16 = 0x505;

/// Local APIC registers.
pub const LAPIC_START: u32 = 0xfee0_0000;
/// I/O APIC registers.
pub const IOAPIC_START: u32 = 0xfec0_0000;
/// Page that Intel KVM needs for the identity map of real mode.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that Intel KVM needs for its task state segment.
pub const KVM_TSS: usize = 0xfffb_d000;

/// First 16550.
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt line of the first 16550.
pub const COM1_GSI: u32 = 4;
/// Ports of the keyboard controller that the guest may reset itself by.
pub const I8042_PORT: u16 = 0x60;
/// ACPI registers: sleep control, sleep status, reset (one byte each).
pub const ACPI_PM_PORT: u16 = 0x600;
/// What a guest writes to the reset register.
pub const ACPI_RESET_VALUE: u8 = 1;
