//! Shared memory: files that can be neither resized nor written by the wrong side ([`mod@file`]), and mappings of them.
//!
//! Rules of this module, which owns all `unsafe` of the crate: memory that somebody else may write is reached only through
//! atomic words and raw copies, never through `&[u8]`; every range is checked against the mapping before a pointer to it
//! exists; a mapping lives as long as anything that points into it. The one exceptions in form are `Mapping::owned` and
//! `Mapping::owned_ref`, whose safety is argued there.
#![allow(unsafe_code)] // Mapping memory, and pointers into it, have no safe form.

mod copy;
pub mod file;

pub(crate) use copy::prefetch_write;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::ring::Words;
use crate::sync::AtomicU64;

/// A range outside a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("range {offset:#x}+{len:#x} is outside a mapping of {size:#x} bytes")]
pub struct Outside {
    /// First byte.
    pub offset: usize,
    /// Number of bytes.
    pub len: usize,
    /// Bytes of the mapping.
    pub size: usize,
}

impl Outside {
    /// Whether `len` bytes from `offset` lie in `size` bytes.
    #[inline]
    pub(crate) fn check(offset: usize, len: usize, size: usize) -> Result<(), Self> {
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Self { offset, len, size }),
        }
    }
}

/// Shared memory mapped into this process, whole pages from the start of a file.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
    writable: bool,
}

// SAFETY: the memory is not bound to a thread, and a shared `Mapping` only allows atomic accesses and raw copies that
// expect others to access the memory at the same time (`owned` is the exception, and says what its caller owes).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of a file, to be read and written.
    ///
    /// # Errors
    /// What `mmap` reports; `EPERM` where a seal forbids writing.
    pub fn read_write(file: impl AsFd, len: usize) -> rustix::io::Result<Self> {
        Self::map(file, len, true)
    }

    /// Maps the first `len` bytes of a file, to be read.
    ///
    /// # Errors
    /// What `mmap` reports.
    pub fn read_only(file: impl AsFd, len: usize) -> rustix::io::Result<Self> {
        Self::map(file, len, false)
    }

    fn map(file: impl AsFd, len: usize, writable: bool) -> rustix::io::Result<Self> {
        let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: no address is asked for, so no existing mapping changes. The file cannot shrink (callers have checked
        // its seals), so no access inside `len` faults for want of a page.
        let start = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, file, 0)? };
        let start = NonNull::new(start.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { start, len, writable })
    }

    /// Bytes of it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes; the system maps no such thing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it may be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    fn check(&self, offset: usize, len: usize) -> Result<NonNull<u8>, Outside> {
        Outside::check(offset, len, self.len)?;
        // SAFETY: the offset is inside the mapping or one past its end.
        Ok(unsafe { self.start.add(offset) })
    }

    /// Copies bytes out. They are a snapshot of memory that may change meanwhile: check the copy, not the memory.
    ///
    /// # Errors
    /// The range is not inside the mapping.
    #[inline]
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), Outside> {
        let from = self.check(offset, to.len())?;
        // SAFETY: the source range is inside the mapping, which `self` keeps; the target is private.
        unsafe { copy::from_shared(from.as_ptr(), to) };
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// The range is not inside the mapping.
    ///
    /// # Panics
    /// If the mapping is read-only: which one is written is never a peer's choice.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), Outside> {
        assert!(self.writable, "write to a mapping that is read-only");
        let to = self.check(offset, from.len())?;
        // SAFETY: the target range is inside the mapping, which is writable and kept by `self`.
        unsafe { copy::to_shared(to.as_ptr(), from) };
        Ok(())
    }

    /// Where a range lies, for system calls (an I/O vector entry). The memory must not be turned into a slice.
    ///
    /// # Errors
    /// The range is not inside the mapping.
    pub fn pointer(&self, offset: usize, len: usize) -> Result<*mut u8, Outside> {
        self.check(offset, len).map(NonNull::as_ptr)
    }

    /// A range as an ordinary slice.
    ///
    /// # Safety
    /// The file must be sealed so that nobody but this process can write it, this must be its only writable mapping, and
    /// the caller must own the range: no writable slice of it and no [`write`](Self::write) to it while this one lives. Other
    /// processes may read it meanwhile; what they see then is their problem, not this program's.
    ///
    /// # Panics
    /// If the range is not inside the mapping.
    pub(crate) unsafe fn owned_ref(&self, offset: usize, len: usize) -> &[u8] {
        let start = self.check(offset, len).expect("own ranges are inside");
        // SAFETY: as in `owned`; nobody writes the range while it is borrowed.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), len) }
    }

    /// As [`owned_ref`](Self::owned_ref), to be written.
    ///
    /// # Safety
    /// As there, and no other slice of the range exists.
    ///
    /// # Panics
    /// If the range is not inside the mapping, or that is read-only.
    #[expect(clippy::mut_from_ref, reason = "exclusive use of the range is the caller's to show")]
    pub(crate) unsafe fn owned(&self, offset: usize, len: usize) -> &mut [u8] {
        assert!(self.writable, "a slice of a mapping that is read-only");
        let start = self.check(offset, len).expect("own ranges are inside");
        // SAFETY: inside the mapping, which outlives the borrow of `self`; initialised (files read as zeroes); nobody else
        // writes the range, as the caller has promised.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len) }
    }
}

impl Words for Mapping {
    #[inline]
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned and `len / 8` words long, valid as long as `self`; atomics may be accessed by
        // others at any time. On a read-only mapping callers only load, which for 64-bit words of this architecture's
        // native width does not write.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len / 8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nothing borrows from it any more.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(not(target_has_atomic = "64"))]
compile_error!("msgq needs 64-bit atomics");

#[cfg(test)]
mod tests;
