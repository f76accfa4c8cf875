//! [`Memory`]: guest memory as the hot path sees it: few regions with their host addresses.

use std::sync::Arc;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::frame::Seg;
use crate::mem::GuestMap;
use crate::queue::RingError;

/// A mapped region.
#[derive(Clone, Copy, Debug)]
struct Region {
    start: u64,
    len_bytes: u64,
    host: *mut u8,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Memory {
    map: Arc<GuestMap>,
    /// The largest first: that is where buffers are.
    regions: Vec<Region>,
}

// SAFETY: the pointers lead into mappings that `map` keeps, not to anything bound to a thread.
unsafe impl Send for Memory {}

impl Memory {
    pub(super) fn new(map: &Arc<GuestMap>) -> Self {
        let region = |region: &vm_memory::GuestRegionMmap<()>| Region {
            start: region.start_addr().raw_value(),
            len_bytes: region.len(),
            host: region.as_ptr(),
        };
        let mut regions: Vec<Region> = map.iter().map(region).collect();
        regions.sort_by_key(|region| std::cmp::Reverse(region.len_bytes));
        Self { map: Arc::clone(map), regions }
    }

    pub(super) fn map(&self) -> &Arc<GuestMap> {
        &self.map
    }

    /// The host address of a range that lies in one region.
    #[inline]
    pub(super) fn host(&self, addr: u64, len_bytes: u32) -> Option<*mut u8> {
        self.regions.iter().find_map(|region| {
            let offset = addr.wrapping_sub(region.start);
            if offset >= region.len_bytes || region.len_bytes - offset < u64::from(len_bytes) {
                return None;
            }
            // SAFETY: `offset` lies inside the region, whose bytes are one mapping.
            Some(unsafe { region.host.add(offset as usize) })
        })
    }

    /// A part of a ring, aligned as the host needs it.
    pub(super) fn part(&self, addr: u64, len_bytes: u32, align: usize) -> Result<*mut u8, RingError> {
        let ptr = self.host(addr, len_bytes).ok_or(RingError::RingMemory(addr))?;
        if (ptr as usize).is_multiple_of(align) { Ok(ptr) } else { Err(RingError::RingMemory(addr)) }
    }

    /// Appends the pieces of a range to `segs`: one, unless it crosses from region to region.
    #[inline]
    pub(super) fn pieces(&self, addr: u64, len_bytes: u32, segs: &mut Vec<Seg>) -> Result<(), RingError> {
        if let Some(ptr) = self.host(addr, len_bytes) {
            segs.push(Seg::new(ptr, len_bytes));
            return Ok(());
        }
        self.pieces_across(addr, len_bytes, segs)
    }

    #[cold]
    fn pieces_across(&self, addr: u64, len_bytes: u32, segs: &mut Vec<Seg>) -> Result<(), RingError> {
        let not_mapped = crate::mem::BufError::NotMapped { addr, len_bytes: len_bytes as usize };
        let (mut at, mut left) = (addr, u64::from(len_bytes));
        while left != 0 {
            let region = self.regions.iter().find(|it| at.wrapping_sub(it.start) < it.len_bytes);
            let region = region.ok_or(not_mapped)?;
            let offset = at - region.start;
            let len = left.min(region.len_bytes - offset);
            // SAFETY: `offset` lies inside the region.
            segs.push(Seg::new(unsafe { region.host.add(offset as usize) }, len as u32));
            left -= len;
            at = at.checked_add(len).ok_or(not_mapped)?;
        }
        Ok(())
    }
}

/// Brings the line at `ptr` near for reading; never faults.
#[inline(always)]
pub(super) fn prefetch(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and cannot fault, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(ptr.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

/// As [`prefetch`], for writing.
#[inline(always)]
pub(super) fn prefetch_write(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as in `prefetch`.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) ptr, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}
