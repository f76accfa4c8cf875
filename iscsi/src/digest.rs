//! CRC32C, the header and data digest of iSCSI (RFC 7143 13.1), computed with the processor's instructions.

use crc_fast::{CrcAlgorithm, Digest};

/// Bytes that a digest takes on the wire.
pub const DIGEST_BYTES: usize = 4;

/// The CRC32C of one piece of memory.
#[inline]
#[must_use]
pub fn crc32c(data: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(data)
}

/// The digest of one piece of memory as it stands on the wire.
///
/// RFC 7143 maps the remainder's bits so that the value of common CRC libraries goes out little-endian (see the
/// vectors of its section B.4).
#[inline]
#[must_use]
pub fn digest_bytes(data: &[u8]) -> [u8; DIGEST_BYTES] {
    crc32c(data).to_le_bytes()
}

/// CRC32C over pieces, in order.
#[derive(Clone, Copy, Debug)]
pub struct Crc32c(Digest);

impl Crc32c {
    /// Nothing digested yet.
    #[must_use]
    pub fn new() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc32Iscsi))
    }

    /// To go on from where other code has got to, see [`register`](Self::register).
    #[inline]
    #[must_use]
    pub fn from_register(register: u32) -> Self {
        Self(Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, register.into()))
    }

    /// The reflected register, without the final inversion; all ones where nothing is digested yet. For code that
    /// digests data by other means, such as while it copies it.
    #[inline]
    #[must_use]
    pub fn register(&self) -> u32 {
        // A CRC-32 in the low half of the library's common type.
        self.0.get_state() as u32
    }

    /// Takes the next piece.
    #[inline]
    pub fn update(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }

    /// The CRC of all pieces so far.
    #[inline]
    #[must_use]
    pub fn value(&self) -> u32 {
        // A CRC-32 in the low half of the library's common type.
        self.0.finalize() as u32
    }

    /// The digest of all pieces so far, as it stands on the wire.
    #[inline]
    #[must_use]
    pub fn bytes(&self) -> [u8; DIGEST_BYTES] {
        self.value().to_le_bytes()
    }
}

impl Default for Crc32c {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 7143 B.4 (and RFC 3720 B.4): data and the CRC bytes in the order in which they are sent.
    #[test]
    fn rfc_vectors() {
        let increasing: Vec<u8> = (0..32).collect();
        let decreasing: Vec<u8> = (0..32).rev().collect();
        let read10: [u8; 48] = [
            0x01, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x14, 0, 0, 0, 0, 0, 0x04, 0, 0, 0, 0,
            0x14, 0, 0, 0, 0x18, 0x28, 0, 0, 0, 0, 0, 0, 0, 0x02, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(digest_bytes(&[0; 32]), [0xaa, 0x36, 0x91, 0x8a]);
        assert_eq!(digest_bytes(&[0xff; 32]), [0x43, 0xab, 0xa8, 0x62]);
        assert_eq!(digest_bytes(&increasing), [0x4e, 0x79, 0xdd, 0x46]);
        assert_eq!(digest_bytes(&decreasing), [0x5c, 0xdb, 0x3f, 0x11]);
        assert_eq!(digest_bytes(&read10), [0x56, 0x3a, 0x96, 0xd9]);
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    /// The definition, bit by bit: polynomial 0x1EDC6F41 reflected.
    fn by_definition(data: &[u8]) -> u32 {
        !data.iter().fold(!0u32, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82F6_3B78 * (crc & 1)))
        })
    }

    proptest! {
        #[test]
        fn pieces_equal_the_whole(data in proptest::collection::vec(any::<u8>(), 0..2048), cuts in proptest::collection::vec(0usize..2048, 0..6)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(data.len())).collect();
            cuts.sort_unstable();
            let mut crc = Crc32c::new();
            let mut from = 0;
            for cut in cuts.into_iter().chain([data.len()]) {
                crc.update(&data[from..cut]);
                from = cut;
            }
            prop_assert_eq!(crc.value(), by_definition(&data));
            prop_assert_eq!(crc32c(&data), by_definition(&data));
            prop_assert_eq!(crc.bytes(), digest_bytes(&data));
            let mut joined = Crc32c::from_register(Crc32c::new().register());
            let (first, second) = data.split_at(data.len() / 3);
            joined.update(first);
            let mut joined = Crc32c::from_register(joined.register());
            joined.update(second);
            prop_assert_eq!(joined.value(), crc.value());
        }
    }
}
