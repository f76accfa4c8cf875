//! Copies between private memory and memory that others access at the same time.
//!
//! Whole aligned words go as relaxed atomics, edges as volatile bytes, so that no access races in the sense of the
//! language and the compiler can neither repeat nor drop one. Long copies go as one string instruction where the
//! processor has it: the compiler does not see into it at all.

use std::sync::atomic::{AtomicU64, Ordering};

/// From so many bytes on the string instruction wins.
#[cfg(target_arch = "x86_64")]
const LONG: usize = 512;

/// Copies shared bytes into private ones.
///
/// # Safety
/// `from` is valid for reads of `to.len()` bytes.
#[inline]
pub(super) unsafe fn from_shared(from: *const u8, to: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if to.len() >= LONG {
        // SAFETY: both ranges are valid for their whole length, and do not overlap: one is private.
        unsafe { string_copy(from, to.as_mut_ptr(), to.len()) };
        return;
    }
    let head = from.align_offset(8).min(to.len());
    // SAFETY: each access is inside the source range; word accesses are aligned after `head` bytes.
    unsafe {
        let (edge, rest) = to.split_at_mut(head);
        for (at, byte) in edge.iter_mut().enumerate() {
            *byte = from.add(at).read_volatile();
        }
        let mut at = head;
        let mut words = rest.chunks_exact_mut(8);
        for word in &mut words {
            let shared = &*from.add(at).cast::<AtomicU64>();
            word.copy_from_slice(&shared.load(Ordering::Relaxed).to_ne_bytes());
            at += 8;
        }
        for byte in words.into_remainder() {
            *byte = from.add(at).read_volatile();
            at += 1;
        }
    }
}

/// Copies private bytes into shared ones.
///
/// # Safety
/// `to` is valid for writes of `from.len()` bytes.
#[inline]
pub(super) unsafe fn to_shared(to: *mut u8, from: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    if from.len() >= LONG {
        // SAFETY: both ranges are valid for their whole length, and do not overlap: one is private.
        unsafe { string_copy(from.as_ptr(), to, from.len()) };
        return;
    }
    let head = to.align_offset(8).min(from.len());
    // SAFETY: as in `from_shared`.
    unsafe {
        let (edge, rest) = from.split_at(head);
        for (at, byte) in edge.iter().enumerate() {
            to.add(at).write_volatile(*byte);
        }
        let mut at = head;
        let words = rest.chunks_exact(8);
        let tail = words.remainder();
        for word in words {
            let shared = &*to.add(at).cast::<AtomicU64>();
            shared.store(u64::from_ne_bytes(word.try_into().expect("eight bytes")), Ordering::Relaxed);
            at += 8;
        }
        for byte in tail {
            to.add(at).write_volatile(*byte);
            at += 1;
        }
    }
}

/// `rep movsb`.
///
/// # Safety
/// The ranges are valid for reads and writes of `len` bytes and do not overlap.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn string_copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: touches exactly the two ranges; the direction flag is clear by the calling convention.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Asks for the line of a word to be brought here to be written, without waiting for it. A hint: nothing is accessed.
#[inline(always)]
pub(crate) fn prefetch_write(word: &AtomicU64) {
    // The intrinsic makes this instruction only where the compiler is told of a processor that has it; others ignore it.
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch neither faults nor changes memory or flags; the address is that of a live word.
    unsafe {
        std::arch::asm!(
            "prefetchw [{}]",
            in(reg) std::ptr::from_ref(word),
            options(nostack, preserves_flags, readonly),
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = word;
}
