//! Puts a guest's first program into its memory and says how to enter it: Linux as bzImage or ELF, or a bare-metal
//! guest that asks for ring 3 with an ELF note.

pub mod e820;
pub mod elf;
pub mod linux;
pub mod ring3;

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use crate::config::VmConfig;
use crate::error::{Error, Result};
use crate::kvm::GuestMemory;
use crate::kvm::regs::Entry;
use crate::layout::{CMDLINE_MAX_BYTES, CMDLINE_START, LOW_RAM_MAX, RESET_VECTOR};

/// What kind of program the kernel file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Format {
    /// A Linux bzImage.
    BzImage,
    /// An ELF file that is entered in ring 0: Linux' vmlinux, or another kernel with a PVH note.
    Elf(elf::ElfInfo),
    /// A bare-metal guest that is entered in ring 3.
    Ring3(elf::ElfInfo),
}

/// An opened and recognised kernel file.
#[derive(Debug)]
pub struct Kernel {
    path: std::path::PathBuf,
    file: File,
    format: Format,
}

impl Kernel {
    /// Opens a kernel file and finds out what it is.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |action: &'static str| move |source| Error::File { action, path: path.to_owned(), source };
        let not = |reason: String| Error::NotAKernel { path: path.to_owned(), reason };
        let mut file = open_regular(path).map_err(fail("open the kernel"))?;
        // A bzImage has its magic at 0x202.
        let mut head = Vec::new();
        (&mut file).take(0x206).read_to_end(&mut head).map_err(fail("read the kernel"))?;
        let format = if head.starts_with(b"\x7fELF") {
            let info = elf::read(&mut file).map_err(not)?;
            if ring3::wants_ring3(&info).map_err(not)? { Format::Ring3(info) } else { Format::Elf(info) }
        } else if head.get(0x202..0x206) == Some(b"HdrS") {
            Format::BzImage
        } else {
            return Err(not("neither an ELF file nor a bzImage".into()));
        };
        file.rewind().map_err(fail("read the kernel"))?;
        Ok(Self { path: path.to_owned(), file, format })
    }

    /// What it is.
    pub fn format(&self) -> &Format {
        &self.format
    }

    /// True for a guest that is entered in ring 3.
    pub fn is_ring3(&self) -> bool {
        matches!(self.format, Format::Ring3(_))
    }

    /// Loads the kernel with all it needs. `tsc_khz`: frequency of the time-stamp counter, 0 if unknown; `rsdp`: where
    /// the ACPI tables are; `devices`: number of virtio-mmio windows.
    pub fn load(
        mut self,
        memory: &GuestMemory,
        config: &VmConfig,
        tsc_khz: u64,
        rsdp: u64,
        devices: usize,
    ) -> Result<Entry> {
        if !self.is_ring3() {
            write_reset_stub(memory)?;
        }
        match &self.format {
            Format::BzImage => linux::load_bzimage(&mut self.file, &self.path, memory, config, rsdp),
            Format::Elf(info) => linux::load_elf(&mut self.file, &self.path, info, memory, config, rsdp),
            Format::Ring3(info) => {
                ring3::load(&mut self.file, &self.path, info, memory, config, tsc_khz, devices)
            }
        }
    }
}

/// Opens a regular file. Nothing else is waited for: a pipe that nobody writes to would hold up the start for ever.
pub(crate) fn open_regular(path: &Path) -> std::io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("it is not a regular file"));
    }
    Ok(file)
}

/// Memory below the hole, in bytes.
pub(crate) fn low_ram(config: &VmConfig) -> u64 {
    config.memory_bytes.min(LOW_RAM_MAX)
}

/// Says that something does not fit below `needed`, an address.
pub(crate) fn too_small(config: &VmConfig, what: &'static str, needed: u64) -> Error {
    Error::TooSmall { memory_mib: low_ram(config) >> 20, what, needed_mib: needed.div_ceil(1 << 20) }
}

/// Writes the command line with its terminating NUL; `max_bytes` is the kernel's limit without it.
pub(crate) fn write_cmdline(memory: &GuestMemory, cmdline: &str, max_bytes: usize) -> Result<()> {
    let max_bytes = max_bytes.min(CMDLINE_MAX_BYTES - 1);
    if cmdline.len() > max_bytes {
        return Err(Error::CmdlineTooLong { len_bytes: cmdline.len(), max_bytes });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    put(memory, CMDLINE_START, &bytes)
}

/// Puts code at the reset vector that resets by the keyboard controller, which is all that is left of a BIOS. Linux jumps
/// there on a hardware-reduced ACPI platform without EFI, unless `reboot=` says otherwise.
fn write_reset_stub(memory: &GuestMemory) -> Result<()> {
    // mov al, 0xfe; out 0x64, al; again: hlt; jmp again
    put(memory, RESET_VECTOR, &[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd])
}

pub(crate) fn put(memory: &GuestMemory, addr: u64, bytes: &[u8]) -> Result<()> {
    memory.write_slice(bytes, GuestAddress(addr)).map_err(|_| Error::GuestMemory { addr })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut f = tempfile::NamedTempFile::new().unwrap();
        f.write_all(bytes).unwrap();
        f
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 4096], b"\x7fELF", b"\x7fELF\x01\x01"] {
            let f = file(bytes);
            assert!(matches!(Kernel::open(f.path()), Err(Error::NotAKernel { .. })));
        }
        assert!(matches!(Kernel::open(Path::new("/nonexistent")), Err(Error::File { .. })));
        assert!(matches!(Kernel::open(Path::new("/tmp")), Err(Error::File { .. })));
    }

    #[test]
    fn a_pipe_is_refused_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
        let error = Kernel::open(&pipe).unwrap_err();
        assert!(crate::chain(&error).contains("pipe: it is not a regular file"), "{}", crate::chain(&error));
    }

    #[test]
    fn a_broken_bzimage_is_an_error() {
        let memory = crate::kvm::memory::create(64 << 20, false).unwrap();
        let config = crate::config::VmFile {
            kernel: Some("k".into()),
            memory: "64M".parse().ok(),
            ..Default::default()
        }
        .finish()
        .unwrap();
        for fill in [0u8, 0xff, 0x55] {
            let mut bytes = vec![fill; 0x300];
            bytes[0x202..0x206].copy_from_slice(b"HdrS");
            let f = file(&bytes);
            let kernel = Kernel::open(f.path()).unwrap();
            assert!(kernel.load(&memory, &config, 0, 0, 0).is_err());
        }
    }
}
