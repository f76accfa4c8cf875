//! The contract between the monitor and a bare-metal guest that it enters directly in ring 3.
//!
//! Shared by source: `vmm` includes this file, so that there is one definition. It holds only constants and plain
//! data; loading and page tables are the monitor's, everything after the first instruction is the guest's.
//!
//! A guest asks for ring-3 entry with an ELF note (`PT_NOTE`): name [`NOTE_NAME`], type [`NOTE_TYPE`], descriptor
//! two little-endian `u32`: [`ABI_VERSION`] and flags ([`FLAG_RING3`]). It is then entered
//! - in 64-bit mode at its ELF entry point, CPL 3, IOPL 3 (port I/O allowed), interrupts off, SSE usable;
//! - with identity page tables over the first 4 GiB (2 MiB pages, user, writable), so that RAM and the virtio-mmio
//!   windows are reached at their physical addresses;
//! - with the physical address of a [`BootInfo`] in `rdi`; no stack is set up.

/// Name of the ELF note, without its terminating NUL.
pub const NOTE_NAME: &str = "VCP";
/// Type of the ELF note.
pub const NOTE_TYPE: u32 = 0x5643_5001;
/// Version of this contract.
pub const ABI_VERSION: u32 = 1;
/// Flag in the note: enter in ring 3.
pub const FLAG_RING3: u32 = 1;
/// First field of [`BootInfo`]: "VCPBOOT1" in little-endian order.
pub const BOOT_MAGIC: u64 = u64::from_le_bytes(*b"VCPBOOT1");
/// Port for exit: a byte written here ends the guest; 0 is success, any other value makes `vcp run` exit with 1.
pub const EXIT_PORT: u16 = 0xf4;
/// Port of the first 16550 UART.
pub const SERIAL_PORT: u16 = 0x3f8;

/// What the monitor tells the guest; lies in guest memory, its physical address is in `rdi` at entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct BootInfo {
    /// [`BOOT_MAGIC`].
    pub magic: u64,
    /// [`ABI_VERSION`].
    pub version: u32,
    /// Number of vCPUs; only the first one is running.
    pub vcpus: u32,
    /// Guest memory below 3 GiB, in bytes, from address 0.
    pub mem_bytes: u64,
    /// First byte of guest memory that neither the image nor the monitor uses, page aligned.
    pub free_start: u64,
    /// Frequency of the time-stamp counter in kHz; 0 where the host does not tell.
    pub tsc_khz: u64,
    /// Address of the command line (not NUL-terminated).
    pub cmdline: u64,
    /// Length of the command line in bytes.
    pub cmdline_len: u64,
    /// Address of the first virtio-mmio window.
    pub virtio_mmio_base: u64,
    /// Distance between two virtio-mmio windows in bytes.
    pub virtio_mmio_stride: u64,
    /// Number of virtio-mmio windows.
    pub virtio_mmio_count: u64,
}
