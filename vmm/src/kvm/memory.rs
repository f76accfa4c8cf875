//! Guest memory: one sealed memfd that the monitor, KVM and every vhost-user backend map, split around the hole for
//! devices below 4 GiB. This module owns the pieces of `unsafe` that give the mapping to KVM and to a NUMA node.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION and mbind take a raw address.

use std::fs::File;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::{Error, Result};
use crate::layout::{HIGH_RAM_START, LOW_RAM_MAX};

/// Guest memory as the rest of the monitor uses it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// The ranges that memory of this size occupies: address and length, both in bytes.
pub fn ranges(memory_bytes: u64) -> Vec<(u64, u64)> {
    let low = memory_bytes.min(LOW_RAM_MAX);
    let mut ranges = vec![(0, low)];
    if memory_bytes > low {
        ranges.push((HIGH_RAM_START, memory_bytes - low));
    }
    ranges
}

/// Creates guest memory as [`create_on`] does, on whatever node the kernel takes it from.
pub fn create(memory_bytes: u64, hugepages: bool) -> Result<Arc<GuestMemory>> {
    create_on(memory_bytes, hugepages, None)
}

/// Creates guest memory, shared and zeroed. With `hugepages` every page is taken from the pool of 2 MiB pages now, so
/// that a pool that is too small is an error here and not a SIGBUS later. Memory comes from `node` as long as that has some,
/// whoever touches it first: the guest, a VCP or the monitor.
pub fn create_on(memory_bytes: u64, hugepages: bool, node: Option<usize>) -> Result<Arc<GuestMemory>> {
    let fail = |hint: &'static str| {
        move |e: rustix::io::Errno| Error::Memory { bytes: memory_bytes, hint, source: e.into() }
    };
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if hugepages {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    const POOL: &str = "raise /proc/sys/vm/nr_hugepages or leave out --hugepages";
    let hint = if hugepages { POOL } else { "give less --memory" };
    let fd = rustix::fs::memfd_create("guest-memory", flags).map_err(fail(hint))?;
    rustix::fs::ftruncate(&fd, memory_bytes).map_err(fail(hint))?;
    // No party may change the size under another's mapping.
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(fail("the kernel does not seal memfds"))?;
    let file = Arc::new(File::from(fd));
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, len) in ranges(memory_bytes) {
        regions.push((GuestAddress(start), len as usize, Some(FileOffset::from_arc(file.clone(), offset))));
        offset += len;
    }
    let memory = GuestMemory::from_ranges_with_files(regions).map_err(|e| Error::Memory {
        bytes: memory_bytes,
        hint,
        source: std::io::Error::other(e.to_string()),
    })?;
    if let Some(node) = node {
        prefer(&memory, node)?;
    }
    if hugepages {
        rustix::fs::fallocate(&*file, rustix::fs::FallocateFlags::empty(), 0, memory_bytes)
            .map_err(fail(POOL))?;
    }
    Ok(Arc::new(memory))
}

/// Has pages that nobody has touched yet come from this node. The mapping is shared: what is said of it holds for the memfd,
/// and so for every process that maps it.
fn prefer(memory: &GuestMemory, node: usize) -> Result<()> {
    const MPOL_PREFERRED: libc::c_int = 1;
    const WORD: usize = libc::c_ulong::BITS as usize;
    let mut mask = [0 as libc::c_ulong; 16];
    if let Some(word) = mask.get_mut(node / WORD) {
        *word = 1 << (node % WORD);
    }
    for region in memory.iter() {
        // The kernel counts one bit less than it is told.
        let bits = mask.len() * WORD;
        // SAFETY: the address and length are those of a live mapping that `memory` owns, the mask is as long as said; no
        // byte of memory is changed.
        let done = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                region.as_ptr(),
                region.len() as usize,
                MPOL_PREFERRED,
                mask.as_ptr(),
                bits,
                0 as libc::c_uint,
            )
        };
        if done != 0 {
            return Err(Error::os("place guest memory on a NUMA node")(std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// Gives guest memory to KVM, one slot per range.
///
/// The caller keeps `memory` alive for as long as the VM can run: [`crate::kvm::vm::Vm`] does, by holding both.
pub(super) fn map_into(vm: &VmFd, memory: &GuestMemory) -> Result<()> {
    for (slot, region) in memory.iter().enumerate() {
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the address and length are those of a live mapping that `memory` owns; `Vm` holds `memory` next to
        // the VM's descriptor and drops it last. Guest and backends change the bytes at any time, which is why all
        // code reads them through `vm-memory`'s volatile accessors and never through references.
        unsafe { vm.set_user_memory_region(slot) }.map_err(Error::kvm("map guest memory"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn memory_is_split_around_the_hole() {
        assert_eq!(ranges(1 << 30), vec![(0, 1 << 30)]);
        assert_eq!(ranges(LOW_RAM_MAX), vec![(0, LOW_RAM_MAX)]);
        assert_eq!(ranges(4 << 30), vec![(0, LOW_RAM_MAX), (HIGH_RAM_START, 1 << 30)]);
    }

    #[test]
    fn memory_prefers_its_node() {
        let memory = create_on(4 << 20, false, Some(0)).unwrap();
        let at = memory.iter().next().unwrap().as_ptr() as usize;
        let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap_or_default();
        // A kernel without NUMA has no such file.
        let line = maps.lines().find(|line| line.starts_with(&format!("{at:x} ")));
        if let Some(line) = line {
            assert!(line.contains(" prefer:0 ") || line.contains(" prefer (many):0 "), "{line}");
        } else {
            assert!(maps.is_empty(), "guest memory is not in {maps}");
        }
        assert!(create_on(4 << 20, false, Some(900)).is_err(), "a node that is not there");
    }

    #[test]
    fn memory_is_shared_and_sealed() {
        let memory = create(4 << 20, false).unwrap();
        memory.write_obj(7u32, GuestAddress(0x1234)).unwrap();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap();
        let mut byte = [0u8; 4];
        rustix::io::pread(file.file(), &mut byte, 0x1234).unwrap();
        assert_eq!(u32::from_le_bytes(byte), 7);
        assert!(rustix::fs::ftruncate(file.file(), 0).is_err());
    }
}
