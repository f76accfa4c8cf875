//! Copies into and out of a [`GuestBuf`] with a CRC32C of what was copied, in one pass: for protocols with data digests.
//! The guest may write its memory at any time, so what is digested has to be what was copied, byte by byte.
//!
//! The CRC is given and returned as the reflected register without the final inversion, all ones at the start.

use super::{GuestBuf, crc32c};

impl GuestBuf {
    /// As [`append_to`](Self::append_to); returns the CRC register that follows from `crc` and the bytes that were appended.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    #[must_use]
    pub fn append_to_digested(&self, offset: usize, len_bytes: usize, to: &mut Vec<u8>, crc: u32) -> u32 {
        to.reserve(len_bytes);
        let room = to.spare_capacity_mut().as_mut_ptr().cast::<u8>();
        let mut crc = crc;
        self.for_each(offset, len_bytes, |ptr, len, at| {
            // SAFETY: `for_each` gives pieces inside the mapping that this buffer keeps alive. The target are `len` of the
            // `len_bytes` bytes reserved above: `at + len` is within the range, which `for_each` checked first. It is
            // private memory, so they do not overlap.
            crc = unsafe { crc32c::copy(ptr, room.add(at), len, crc) };
        });
        // SAFETY: `for_each` gave every byte of the range (it is inside the buffer, whose pieces add up to its length), so
        // `len_bytes` bytes behind the old end are initialised, and reserved.
        unsafe { to.set_len(to.len() + len_bytes) };
        crc
    }

    /// As [`copy_from`](Self::copy_from); returns the CRC register that follows from `crc` and `from`.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    #[must_use]
    pub fn copy_from_digested(&self, offset: usize, from: &[u8], crc: u32) -> u32 {
        let mut crc = crc;
        self.for_each(offset, from.len(), |ptr, len, at| {
            // SAFETY: as before for guest memory, now the target; `at + len` is within `from`, a borrowed slice of private
            // memory, so nobody writes it and they do not overlap.
            crc = unsafe { crc32c::copy(from[at..at + len].as_ptr(), ptr, len, crc) };
        });
        crc
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_digested_in_their_order() {
        let lens = [1, 700, 64, 15, 3000, 16, 2];
        let len: usize = lens.iter().sum();
        let data: Vec<u8> = (0..len).map(|i| (i * 7 + i / 251) as u8).collect();
        let buf = GuestBuf::for_test_pieces(&lens);
        let crc = buf.copy_from_digested(0, &data[..1000], !0);
        let crc = buf.copy_from_digested(1000, &data[1000..], crc);
        assert_eq!(!crc, crc_fast::crc32_iscsi(&data));
        let mut back = vec![9];
        let crc = buf.append_to_digested(3, len - 5, &mut back, !0);
        assert_eq!(&back[1..], &data[3..len - 2]);
        assert_eq!(!crc, crc_fast::crc32_iscsi(&back[1..]));
        assert_eq!(buf.append_to_digested(len, 0, &mut back, 5), 5);
        assert_eq!(back.len(), 1 + len - 5);
    }

    #[test]
    #[should_panic(expected = "outside a buffer")]
    fn a_range_outside_panics() {
        let _ = GuestBuf::for_test(8).copy_from_digested(4, &[0; 5], 0);
    }
}
