//! [`Frame`]: bytes in pieces, in guest memory or private, that are read where they lie.

use std::marker::PhantomData;

/// A piece of memory. Whoever makes one sees to it that the memory outlives its use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seg {
    pub(crate) ptr: *mut u8,
    pub(crate) len_bytes: u32,
}

impl Seg {
    pub(super) fn new(ptr: *mut u8, len_bytes: u32) -> Self {
        Self { ptr, len_bytes }
    }
}

/// Bytes in pieces. If they are a guest's, they may change at any time: what is copied out twice may differ.
///
/// ```
/// use vcp_core::queue::burst::Frame;
///
/// let frame = Frame::of(b"header and payload");
/// let mut word = [0; 7];
/// frame.skip(11).copy_to(0, &mut word);
/// assert_eq!(&word, b"payload");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// Apart from the rest: most frames have one piece.
    first: Seg,
    rest: &'a [Seg],
    len_bytes: usize,
    life: PhantomData<&'a [u8]>,
}

impl<'a> Frame<'a> {
    /// Private bytes.
    #[must_use]
    pub fn of(bytes: &'a [u8]) -> Self {
        // Longer ones than a piece can have do not occur: frames end at 64 KiB.
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let first = Seg::new(bytes.as_ptr().cast_mut(), len);
        Self { first, rest: &[], len_bytes: len as usize, life: PhantomData }
    }

    /// The pieces, which stay valid for `'a`.
    #[inline]
    pub(super) fn of_segs(segs: &'a [Seg], len_bytes: usize) -> Self {
        match segs {
            [first, rest @ ..] => Self { first: *first, rest, len_bytes, life: PhantomData },
            [] => Self::of(&[]),
        }
    }

    /// Length in bytes.
    #[inline]
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Number of pieces.
    #[must_use]
    pub fn pieces(&self) -> usize {
        1 + self.rest.len()
    }

    /// Without the first `len_bytes` bytes (all of them, if there are fewer).
    #[inline]
    #[must_use]
    pub fn skip(mut self, len_bytes: usize) -> Self {
        let mut left = len_bytes.min(self.len_bytes);
        self.len_bytes -= left;
        while left >= self.first.len_bytes as usize
            && let [next, rest @ ..] = self.rest
        {
            left -= self.first.len_bytes as usize;
            (self.first, self.rest) = (*next, rest);
        }
        let left = left.min(self.first.len_bytes as usize);
        // SAFETY: inside the piece, or at its end.
        self.first.ptr = unsafe { self.first.ptr.add(left) };
        self.first.len_bytes -= left as u32;
        self
    }

    /// Copies bytes from `offset` on into `to`; returns how many there were, up to all of it.
    #[inline]
    pub fn copy_to(&self, offset: usize, to: &mut [u8]) -> usize {
        let len = to.len().min(self.len_bytes.saturating_sub(offset));
        if offset + len <= self.first.len_bytes as usize {
            // SAFETY: the range lies in the piece, which is valid for reads; `to` is private and does not overlap it.
            unsafe { copy(self.first.ptr.add(offset), to.as_mut_ptr(), len) };
            return len;
        }
        let mut done = 0;
        self.for_each(offset, len, |ptr, piece| {
            // SAFETY: `for_each` gives pieces of the range, `len` bytes in all, which `to` has room for.
            unsafe { copy(ptr, to.as_mut_ptr().add(done), piece) };
            done += piece;
        });
        done
    }

    /// The first `N` bytes; 0 for those that are not there.
    #[inline]
    #[must_use]
    pub fn head<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.copy_to(0, &mut bytes);
        bytes
    }

    /// All of it in a vector, for what is not the hot path.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len_bytes];
        self.copy_to(0, &mut bytes);
        bytes
    }

    /// The one's complement sum (RFC 1071) of `len_bytes` bytes from `offset` on, not folded, added to `sum`. An odd
    /// length is padded with a zero byte; a range that is too long ends where the frame ends.
    #[must_use]
    pub fn sum(&self, offset: usize, len_bytes: usize, sum: u64) -> u64 {
        let mut sum = sum;
        // A piece of odd length leaves the next one shifted by a byte.
        let mut odd = false;
        self.for_each(offset, len_bytes.min(self.len_bytes.saturating_sub(offset)), |ptr, len| {
            // SAFETY: `for_each` gives ranges that are valid for reads.
            let part = fold(unsafe { sum_bytes(ptr, len) });
            sum += u64::from(if odd { part.swap_bytes() } else { part });
            odd ^= len % 2 != 0;
        });
        sum
    }

    /// Calls `f(ptr, len)` for each contiguous part of the range, which must lie inside the frame.
    #[inline]
    pub(crate) fn for_each(&self, offset: usize, len_bytes: usize, mut f: impl FnMut(*const u8, usize)) {
        let (mut skip, mut left) = (offset, len_bytes);
        for seg in std::iter::once(&self.first).chain(self.rest) {
            if left == 0 {
                break;
            }
            let here = seg.len_bytes as usize;
            if skip >= here {
                skip -= here;
                continue;
            }
            let len = left.min(here - skip);
            // SAFETY: `skip < here`, so the result stays inside the piece.
            f(unsafe { seg.ptr.add(skip) }, len);
            skip = 0;
            left -= len;
        }
    }
}

/// Copies between memory of which one side may be shared.
///
/// # Safety
/// `from` and `to` are valid for `len` bytes and do not overlap. Others may write to shared memory meanwhile: what
/// arrives is then a mixture, and no reference to such memory exists.
#[inline(always)]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
}

/// Sum of the 16-bit words of a range in network byte order.
///
/// # Safety
/// `ptr` is valid for reads of `len` bytes.
unsafe fn sum_bytes(ptr: *const u8, len: usize) -> u64 {
    let mut sum = 0u64;
    let mut at = 0;
    while at + 4 <= len {
        // SAFETY: `at + 4 <= len`. Four bytes at a time: the words of a sum may be added in any order and width.
        sum += u64::from(u32::from_be(unsafe { ptr.add(at).cast::<u32>().read_unaligned() }));
        at += 4;
    }
    if at + 2 <= len {
        // SAFETY: `at + 2 <= len`.
        sum += u64::from(u16::from_be(unsafe { ptr.add(at).cast::<u16>().read_unaligned() }));
        at += 2;
    }
    if at < len {
        // SAFETY: `at < len`.
        sum += u64::from(unsafe { ptr.add(at).read() }) << 8;
    }
    sum
}

/// Folds a sum to 16 bits.
fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
