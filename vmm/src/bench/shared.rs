//! Memory shared with the backend: a memfd, mapped here and there.
//!
//! The backend can write all of it at any time, so nothing in it is ever borrowed: values go in and out through
//! volatile and atomic accesses, which `vm-memory` offers without `unsafe`. Offsets are our own and inside the region.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{ByteValued, Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Guest-physical address of the region's first byte. Not 0, and not its address in either process, so that a
/// backend that confuses address spaces fails at once.
const BASE: u64 = 1 << 32;

/// The shared region.
#[derive(Debug)]
pub(super) struct Shared {
    region: MmapRegion,
    file: File,
}

impl Shared {
    /// Makes a zeroed region of this many bytes.
    pub(super) fn new(len_bytes: usize) -> Result<Self> {
        let doing = || format!("cannot get {len_bytes} bytes of shared memory");
        let file = File::from(memfd_create("vcp-bench", MemfdFlags::CLOEXEC).with_context(doing)?);
        ftruncate(&file, len_bytes as u64).with_context(doing)?;
        let mapped = file.try_clone().with_context(doing)?;
        let region = MmapRegion::from_file(FileOffset::new(mapped, 0), len_bytes).with_context(doing)?;
        Ok(Self { region, file })
    }

    /// Describes the region to the backend.
    pub(super) fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: self.region.size() as u64,
            userspace_addr: self.address(0),
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// Returns the guest-physical address of an offset: what descriptors carry.
    pub(super) fn guest(&self, offset: usize) -> u64 {
        BASE + offset as u64
    }

    /// Returns the address of an offset in this process: what SET_VRING_ADDR carries.
    pub(super) fn address(&self, offset: usize) -> u64 {
        self.region.as_ptr() as u64 + offset as u64
    }

    /// Writes a value.
    pub(super) fn put<T: ByteValued>(&self, offset: usize, value: T) {
        self.region.get_ref(offset).expect("offsets are inside the region").store(value);
    }

    /// Reads a value once.
    pub(super) fn get<T: ByteValued>(&self, offset: usize) -> T {
        self.region.get_ref(offset).expect("offsets are inside the region").load()
    }

    /// Writes bytes.
    pub(super) fn write(&self, offset: usize, bytes: &[u8]) {
        self.region.as_volatile_slice().write_slice(bytes, offset).expect("offsets are inside the region");
    }

    /// Reads bytes.
    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.region.as_volatile_slice().read_slice(bytes, offset).expect("offsets are inside the region");
    }

    /// Reads a 16-bit ring field.
    pub(super) fn load16(&self, offset: usize, order: Ordering) -> u16 {
        self.region
            .get_atomic_ref::<AtomicU16>(offset)
            .expect("ring fields are aligned and inside")
            .load(order)
    }

    /// Writes a 16-bit ring field.
    pub(super) fn store16(&self, offset: usize, value: u16, order: Ordering) {
        self.region
            .get_atomic_ref::<AtomicU16>(offset)
            .expect("ring fields are aligned and inside")
            .store(value, order);
    }

    /// Reads a 32-bit ring field.
    pub(super) fn load32(&self, offset: usize, order: Ordering) -> u32 {
        self.region
            .get_atomic_ref::<AtomicU32>(offset)
            .expect("ring fields are aligned and inside")
            .load(order)
    }
}
