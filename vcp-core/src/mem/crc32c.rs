//! Copying memory and computing its CRC32C in one pass, with the processor's vector instructions.
//!
//! Every byte is loaded once; what was loaded is stored, and the same register goes into the digest. So the digest is of
//! what was stored, even if another party writes the source meanwhile, and the copy costs little more than the digest.
//! [`copy`] chooses at run time: vectors of 64 bytes (AVX-512, VPCLMULQDQ), of 16 bytes (PCLMULQDQ, SSE 4.2), or, on other
//! machines, small pieces that are copied to private memory and digested there by `crc-fast`. Whose memory it is, and
//! which ranges there are, is the callers' business.

#[cfg(target_arch = "x86_64")]
mod x86;

use crc_fast::{CrcAlgorithm, Digest};

/// Copied to the stack, digested, and copied on, where there are no instructions for one pass.
const PIECE_BYTES: usize = 2 << 10;

/// A way to copy `len_bytes` bytes and go on with a CRC over them.
type Kernel = unsafe fn(src: *const u8, dst: *mut u8, len_bytes: usize, crc: u32) -> u32;

/// Copies `len_bytes` bytes, and returns the CRC register that follows from `crc` and the bytes that were stored: the
/// reflected register without the final inversion, all ones at the start.
///
/// # Safety
/// `src` is valid for reads and `dst` for writes of `len_bytes` bytes, and they do not overlap. Other parties may write
/// the source, and read and write the target, as long as no reference to either is used for it in this process.
#[inline]
pub(super) unsafe fn copy(src: *const u8, dst: *mut u8, len_bytes: usize, crc: u32) -> u32 {
    // SAFETY: as promised by the caller; `choose` returns only what this processor can do.
    unsafe { choose()(src, dst, len_bytes, crc) }
}

/// The fastest way that this processor has. What it can do is looked up once in the life of a process.
#[cfg(target_arch = "x86_64")]
fn choose() -> Kernel {
    if x86::has_wide() {
        x86::wide
    } else if x86::has_narrow() {
        x86::narrow
    } else {
        library
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn choose() -> Kernel {
    library
}

/// See [`copy`].
unsafe fn library(src: *const u8, dst: *mut u8, len_bytes: usize, crc: u32) -> u32 {
    let mut private = [0; PIECE_BYTES];
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, crc.into());
    for at in (0..len_bytes).step_by(PIECE_BYTES) {
        let len = PIECE_BYTES.min(len_bytes - at);
        // SAFETY: `at + len` is within `len_bytes`, for which the caller promised this; `private` is longer than `len`.
        unsafe { src.add(at).copy_to_nonoverlapping(private.as_mut_ptr(), len) };
        digest.update(&private[..len]);
        // SAFETY: as before, for the target.
        unsafe { dst.add(at).copy_from_nonoverlapping(private.as_ptr(), len) };
    }
    // A CRC-32 in the low half of the library's common type.
    digest.get_state() as u32
}

#[cfg(test)]
mod tests;
