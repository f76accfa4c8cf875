//! [`GuestBuf`]: the data buffer of one request.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::GuestMap;

/// Why a range of guest memory cannot become part of a [`GuestBuf`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BufError {
    /// The range is not (completely) guest memory.
    #[error("guest range {addr:#x}+{len_bytes:#x} is not mapped")]
    NotMapped {
        /// First guest physical address.
        addr: u64,
        /// Length in bytes.
        len_bytes: usize,
    },
    /// The buffer already holds pieces of another mapping.
    #[error("buffer belongs to another memory mapping")]
    OtherMapping,
    /// More than `usize::MAX` bytes in all.
    #[error("buffer length overflows")]
    TooLong,
}

/// A checked, host-mapped, physically contiguous piece of guest memory.
#[derive(Clone, Copy, Debug)]
struct Piece {
    ptr: *mut u8,
    len_bytes: usize,
}

/// A request's data buffer: checked pieces of host-mapped guest memory, in order.
///
/// It keeps the mapping alive, so the memory behind it stays valid after the front end took the region away (the
/// guest merely no longer looks at it). The guest may read and write the memory at any time: nothing here hands out
/// references to it, and what is copied out once may differ when copied out again.
///
/// `clear` keeps the storage of the piece list, so a recycled buffer does not allocate. Dropping the last buffer of a
/// mapping unmaps it.
///
/// ```
/// use vcp_core::mem::GuestBuf;
///
/// let buf = GuestBuf::for_test(4096);
/// buf.copy_from(512, b"hello");
/// let mut part = [0; 5];
/// buf.slice(512, 5).copy_to(0, &mut part);
/// assert_eq!(&part, b"hello");
/// ```
#[derive(Debug, Default)]
pub struct GuestBuf {
    pieces: Vec<Piece>,
    len_bytes: usize,
    map: Option<Arc<GuestMap>>,
}

// SAFETY: the pointers refer to memory kept mapped by `map` (itself `Send + Sync`), not to anything bound to a thread.
unsafe impl Send for GuestBuf {}
// SAFETY: a shared `GuestBuf` only allows copies to and from memory that other parties write concurrently anyway;
// the copies are the volatile copies of `vm-memory`, which expect that.
unsafe impl Sync for GuestBuf {}

impl GuestBuf {
    /// An empty buffer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty buffer with room for `pieces` pieces, so that filling it does not allocate.
    #[must_use]
    pub fn with_capacity(pieces: usize) -> Self {
        Self { pieces: Vec::with_capacity(pieces), len_bytes: 0, map: None }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Whether it holds no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// Number of separate pieces (entries of an I/O vector).
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Number of pieces there is storage for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.pieces.capacity()
    }

    /// The mapping that the pieces lie in.
    pub(crate) fn map(&self) -> Option<&Arc<GuestMap>> {
        self.map.as_ref()
    }

    /// Forgets the pieces and the mapping, keeps the storage.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.len_bytes = 0;
        self.map = None;
    }

    /// Appends guest memory `addr .. addr + len_bytes`. A range across two regions becomes two pieces; a range that
    /// follows the last piece directly in host memory extends it.
    ///
    /// # Errors
    /// [`BufError`]; the buffer is then as before.
    pub fn push(
        &mut self,
        map: &Arc<GuestMap>,
        addr: GuestAddress,
        len_bytes: usize,
    ) -> Result<(), BufError> {
        if len_bytes == 0 {
            return Ok(());
        }
        match &self.map {
            Some(own) if !Arc::ptr_eq(own, map) => return Err(BufError::OtherMapping),
            _ => {}
        }
        let total = self.len_bytes.checked_add(len_bytes).ok_or(BufError::TooLong)?;
        let not_mapped = BufError::NotMapped { addr: addr.0, len_bytes };
        // Checked as a whole before anything is changed.
        let last = addr.0.checked_add(len_bytes as u64 - 1).ok_or(not_mapped)?;
        // The usual case first: the whole range lies in one region.
        match map.get_slice(addr, len_bytes) {
            Ok(slice) => self.append(slice.ptr_guard_mut().as_ptr(), len_bytes),
            Err(_) => {
                if !map.address_in_range(addr) || !map.check_range(addr, len_bytes) {
                    return Err(not_mapped);
                }
                debug_assert!(last >= addr.0);
                for slice in map.get_slices(addr, len_bytes).map_while(Result::ok) {
                    self.append(slice.ptr_guard_mut().as_ptr(), slice.len());
                }
                if self.len_bytes != total {
                    // Cannot happen after `check_range` on an immutable map; do not lie about the length if it does.
                    self.truncate(total - len_bytes);
                    return Err(not_mapped);
                }
            }
        }
        if self.map.is_none() {
            self.map = Some(Arc::clone(map));
        }
        Ok(())
    }

    /// Bytes `offset .. offset + len_bytes` as a buffer of their own.
    ///
    /// # Panics
    /// If the range is not inside the buffer: callers compute it from `len_bytes`, never from a peer's numbers
    /// unchecked.
    #[must_use]
    pub fn slice(&self, offset: usize, len_bytes: usize) -> GuestBuf {
        let mut out = GuestBuf::new();
        self.slice_into(offset, len_bytes, &mut out);
        out
    }

    /// As [`slice`](Self::slice), into a recycled buffer whose storage is reused.
    ///
    /// # Panics
    /// As [`slice`](Self::slice).
    pub fn slice_into(&self, offset: usize, len_bytes: usize, out: &mut GuestBuf) {
        out.clear();
        self.for_each(offset, len_bytes, |ptr, len, _| out.append(ptr, len));
        if len_bytes != 0 {
            out.map.clone_from(&self.map);
        }
    }

    /// Drops the first `len_bytes` bytes.
    ///
    /// # Panics
    /// If the buffer is shorter.
    pub fn advance(&mut self, len_bytes: usize) {
        assert!(
            len_bytes <= self.len_bytes,
            "advance by {len_bytes} in a buffer of {} bytes",
            self.len_bytes
        );
        let (mut left, mut whole) = (len_bytes, 0);
        for piece in &mut self.pieces {
            if left < piece.len_bytes {
                piece.ptr = piece.ptr.wrapping_add(left);
                piece.len_bytes -= left;
                break;
            }
            left -= piece.len_bytes;
            whole += 1;
        }
        self.pieces.drain(..whole);
        self.len_bytes -= len_bytes;
    }

    /// Moves the bytes from `at` on into `tail` (whose storage is reused); keeps those before.
    ///
    /// # Panics
    /// If the buffer is shorter than `at`.
    pub fn split_off_into(&mut self, at: usize, tail: &mut GuestBuf) {
        self.slice_into(at, self.len_bytes - at, tail);
        self.truncate(at);
    }

    /// Copies bytes from `offset` on into `to`, all of it.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn copy_to(&self, offset: usize, to: &mut [u8]) {
        self.for_each(offset, to.len(), |ptr, len, at| {
            // SAFETY: `for_each` gives pieces inside the mapping that `self.map` keeps alive.
            let slice = unsafe { VolatileSlice::new(ptr, len) };
            slice.copy_to(&mut to[at..at + len]);
        });
    }

    /// Appends `len_bytes` bytes from `offset` on to `to`: what [`copy_to`](Self::copy_to) does, without writing zeroes first.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn append_to(&self, offset: usize, len_bytes: usize, to: &mut Vec<u8>) {
        to.reserve(len_bytes);
        let room = to.spare_capacity_mut().as_mut_ptr().cast::<u8>();
        self.for_each(offset, len_bytes, |ptr, len, at| {
            // SAFETY: the source is as in `copy_to`; other parties may write it meanwhile, so it is copied by the raw
            // pointers, as `VolatileSlice` does for anything longer than a register. The target are `len` of the
            // `len_bytes` bytes reserved above: `at + len` is within the range, which `for_each` checked first.
            unsafe { ptr.cast_const().copy_to_nonoverlapping(room.add(at), len) };
        });
        // SAFETY: `for_each` gave every byte of the range (it is inside the buffer, whose pieces add up to its length), so
        // `len_bytes` bytes behind the old end are initialised, and reserved.
        unsafe { to.set_len(to.len() + len_bytes) };
    }

    /// Copies all of `from` into the buffer from `offset` on.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn copy_from(&self, offset: usize, from: &[u8]) {
        self.for_each(offset, from.len(), |ptr, len, at| {
            // SAFETY: as in `copy_to`.
            let slice = unsafe { VolatileSlice::new(ptr, len) };
            slice.copy_from(&from[at..at + len]);
        });
    }

    /// Writes zeroes to `len_bytes` bytes from `offset` on.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn fill_zero(&self, offset: usize, len_bytes: usize) {
        self.for_each(offset, len_bytes, |ptr, len, _| {
            // SAFETY: as in `copy_to`; `write_bytes` through a raw pointer makes no reference to shared memory.
            unsafe { ptr.write_bytes(0, len) };
        });
    }

    /// A buffer of `len_bytes` bytes of anonymous zeroed memory, for tests and tools without a guest.
    ///
    /// # Panics
    /// If the memory cannot be had.
    #[must_use]
    pub fn for_test(len_bytes: usize) -> GuestBuf {
        Self::for_test_pieces(&[len_bytes])
    }

    /// As [`for_test`](Self::for_test), made of pieces of the given lengths that do not touch in host memory.
    ///
    /// # Panics
    /// If the memory cannot be had.
    #[must_use]
    pub fn for_test_pieces(lens_bytes: &[usize]) -> GuestBuf {
        let mut buf = GuestBuf::new();
        let total: usize = lens_bytes.iter().map(|len| len + 1).sum();
        let map = GuestMap::from_ranges(&[(GuestAddress(0), total.max(1))]).expect("anonymous memory");
        let map = Arc::new(map);
        let mut at = 0;
        for &len in lens_bytes {
            buf.push(&map, GuestAddress(at), len).expect("inside the region");
            at += len as u64 + 1;
        }
        buf
    }

    /// Calls `f(ptr, len, offset within the range)` for each contiguous part of the range.
    pub(crate) fn for_each(&self, offset: usize, len_bytes: usize, mut f: impl FnMut(*mut u8, usize, usize)) {
        let end = offset.checked_add(len_bytes).expect("range overflows");
        assert!(
            end <= self.len_bytes,
            "range {offset}+{len_bytes} is outside a buffer of {} bytes",
            self.len_bytes
        );
        let (mut skip, mut left, mut done) = (offset, len_bytes, 0);
        for piece in &self.pieces {
            if left == 0 {
                break;
            }
            if skip >= piece.len_bytes {
                skip -= piece.len_bytes;
                continue;
            }
            let len = left.min(piece.len_bytes - skip);
            // SAFETY: `skip < piece.len_bytes`, so the result stays inside the piece.
            f(unsafe { piece.ptr.add(skip) }, len, done);
            skip = 0;
            left -= len;
            done += len;
        }
    }

    fn append(&mut self, ptr: *mut u8, len_bytes: usize) {
        self.len_bytes += len_bytes;
        if let Some(last) = self.pieces.last_mut()
            && last.ptr.wrapping_add(last.len_bytes) == ptr
        {
            last.len_bytes += len_bytes;
            return;
        }
        self.pieces.push(Piece { ptr, len_bytes });
    }

    fn truncate(&mut self, len_bytes: usize) {
        while self.len_bytes > len_bytes {
            let excess = self.len_bytes - len_bytes;
            let last = self.pieces.last_mut().expect("pieces add up to the length");
            let cut = excess.min(last.len_bytes);
            last.len_bytes -= cut;
            self.len_bytes -= cut;
            if last.len_bytes == 0 {
                self.pieces.pop();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_regions() -> Arc<GuestMap> {
        Arc::new(GuestMap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)]).unwrap())
    }

    #[test]
    fn push_across_regions_keeps_the_order_of_bytes() {
        let map = two_regions();
        let mut buf = GuestBuf::new();
        buf.push(&map, GuestAddress(0xff0), 0x20).unwrap();
        assert_eq!(buf.len_bytes(), 0x20);
        let data: Vec<u8> = (0..0x20).collect();
        buf.copy_from(0, &data);
        let mut back = [0; 0x20];
        buf.copy_to(0, &mut back);
        assert_eq!(&back[..], &data[..]);
        let mut part = [0; 4];
        buf.slice(14, 4).copy_to(0, &mut part);
        assert_eq!(part, [14, 15, 16, 17]);
        let mut more = vec![1, 2];
        buf.append_to(14, 4, &mut more);
        buf.append_to(0x20, 0, &mut more);
        assert_eq!(more, [1, 2, 14, 15, 16, 17]);
        buf.fill_zero(15, 2);
        buf.copy_to(14, &mut part);
        assert_eq!(part, [14, 0, 0, 17]);
    }

    #[test]
    fn push_refuses_what_is_not_guest_memory_and_stays_as_it_was() {
        let map = two_regions();
        let mut buf = GuestBuf::new();
        buf.push(&map, GuestAddress(0), 16).unwrap();
        for (addr, len) in [(0x2000, 1), (0x1fff, 2), (u64::MAX, 1), (u64::MAX, 2), (0, usize::MAX)] {
            assert!(buf.push(&map, GuestAddress(addr), len).is_err(), "{addr:#x}+{len:#x}");
            assert_eq!((buf.len_bytes(), buf.pieces()), (16, 1));
        }
        assert_eq!(buf.push(&two_regions(), GuestAddress(0), 1), Err(BufError::OtherMapping));
    }

    #[test]
    fn adjacent_ranges_become_one_piece() {
        let map = two_regions();
        let mut buf = GuestBuf::new();
        buf.push(&map, GuestAddress(0), 512).unwrap();
        buf.push(&map, GuestAddress(512), 512).unwrap();
        assert_eq!((buf.pieces(), buf.len_bytes()), (1, 1024));
    }

    #[test]
    fn the_buffer_keeps_the_mapping_alive() {
        let map = two_regions();
        let weak = Arc::downgrade(&map);
        let mut buf = GuestBuf::new();
        buf.push(&map, GuestAddress(8), 8).unwrap();
        drop(map);
        buf.copy_from(0, b"stillok!");
        assert!(weak.upgrade().is_some());
        buf.clear();
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn head_and_tail_come_off_piece_by_piece() {
        let mut buf = GuestBuf::for_test_pieces(&[4, 4, 4]);
        buf.copy_from(0, b"abcdefghijkl");
        let mut tail = GuestBuf::new();
        buf.split_off_into(7, &mut tail);
        buf.advance(4);
        let (mut head, mut rest) = ([0; 3], [0; 5]);
        buf.copy_to(0, &mut head);
        tail.copy_to(0, &mut rest);
        assert_eq!((&head, &rest), (b"efg", b"hijkl"));
        buf.advance(3);
        assert!(buf.is_empty());
    }

    #[test]
    #[should_panic(expected = "outside a buffer")]
    fn a_slice_outside_panics() {
        let _ = GuestBuf::for_test(8).slice(4, 5);
    }
}
