//! Additional header segments (RFC 7143 11.2.2): extended CDBs and the read length of bidirectional commands.

use thiserror::Error;

/// Most bytes that all additional header segments of a PDU can take.
pub const MAX_AHS_BYTES: usize = 1020;

const TYPE_EXTENDED_CDB: u8 = 1;
const TYPE_BIDI_READ_LENGTH: u8 = 2;

/// One additional header segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ahs<'a> {
    /// The bytes of a CDB behind the first 16 (11.2.2.3).
    ExtendedCdb(&'a [u8]),
    /// Expected read data length of a bidirectional command, in bytes (11.2.2.4).
    BidiReadLength(u32),
    /// A type that this crate has no name for.
    Other {
        /// AHSType.
        kind: u8,
        /// Its bytes behind the type.
        body: &'a [u8],
    },
}

/// Why additional header segments cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AhsError {
    /// A segment says that it is longer than what is there.
    #[error("additional header segment of {len_bytes} bytes exceeds the {left_bytes} that are left")]
    Truncated {
        /// What it says, with its head and padding.
        len_bytes: usize,
        /// What is left.
        left_bytes: usize,
    },
    /// A segment's length does not fit its type.
    #[error("additional header segment of type {kind} has AHSLength {len_bytes}")]
    Length {
        /// AHSType.
        kind: u8,
        /// AHSLength.
        len_bytes: u16,
    },
}

/// Walks the additional header segments of a PDU; ends after the first error.
#[derive(Clone, Debug)]
pub struct AhsIter<'a> {
    left: &'a [u8],
}

impl<'a> AhsIter<'a> {
    /// Over the bytes between the basic header segment and the header digest.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }
}

impl<'a> Iterator for AhsIter<'a> {
    type Item = Result<Ahs<'a>, AhsError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left.is_empty() {
            return None;
        }
        let left = std::mem::take(&mut self.left);
        let truncated = |len_bytes| Some(Err(AhsError::Truncated { len_bytes, left_bytes: left.len() }));
        let Some((&[high, low, kind], body)) = left.split_first_chunk::<3>() else {
            return truncated(4);
        };
        let len_bytes = u16::from_be_bytes([high, low]);
        let total_bytes = (3 + usize::from(len_bytes)).next_multiple_of(4);
        let (Some(body), Some(rest)) = (body.get(..usize::from(len_bytes)), left.get(total_bytes..)) else {
            return truncated(total_bytes);
        };
        // Both known types start with a reserved byte, which AHSLength counts.
        let ahs = match (kind, body) {
            (TYPE_EXTENDED_CDB, [_, cdb @ ..]) if !cdb.is_empty() => Ahs::ExtendedCdb(cdb),
            (TYPE_BIDI_READ_LENGTH, &[_, a, b, c, d]) => {
                Ahs::BidiReadLength(u32::from_be_bytes([a, b, c, d]))
            }
            (TYPE_EXTENDED_CDB | TYPE_BIDI_READ_LENGTH, _) => {
                return Some(Err(AhsError::Length { kind, len_bytes }));
            }
            (kind, body) => Ahs::Other { kind, body },
        };
        self.left = rest;
        Some(Ok(ahs))
    }
}

impl Ahs<'_> {
    /// Bytes that it takes in a header, with padding.
    #[must_use]
    pub const fn encoded_len_bytes(&self) -> usize {
        let body = match self {
            Self::ExtendedCdb(cdb) => 1 + cdb.len(),
            Self::BidiReadLength(_) => 5,
            Self::Other { body, .. } => body.len(),
        };
        (3 + body).next_multiple_of(4)
    }

    /// Writes it to the start of `out` and returns the bytes taken; `None` if it does not fit.
    pub fn encode(&self, out: &mut [u8]) -> Option<usize> {
        let total_bytes = self.encoded_len_bytes();
        if total_bytes > MAX_AHS_BYTES {
            return None;
        }
        let out = out.get_mut(..total_bytes)?;
        out.fill(0);
        let mut set = |kind: u8, reserved_bytes: usize, body: &[u8]| {
            let len_bytes = (reserved_bytes + body.len()) as u16;
            out[..2].copy_from_slice(&len_bytes.to_be_bytes());
            out[2] = kind;
            out[3 + reserved_bytes..][..body.len()].copy_from_slice(body);
        };
        match self {
            Self::ExtendedCdb(cdb) => set(TYPE_EXTENDED_CDB, 1, cdb),
            Self::BidiReadLength(len_bytes) => set(TYPE_BIDI_READ_LENGTH, 1, &len_bytes.to_be_bytes()),
            Self::Other { kind, body } => set(*kind, 0, body),
        }
        Some(total_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn extended_cdb_of_32_bytes() {
        let tail: Vec<u8> = (16..32).collect();
        let mut out = [0xEE; 24];
        assert_eq!(Ahs::ExtendedCdb(&tail).encode(&mut out), Some(20));
        // AHSLength is the CDB's length less 15 (11.2.2.3).
        assert_eq!(out[..4], [0, 32 - 15, 1, 0]);
        assert_eq!(out[4..20], tail);
        assert_eq!(AhsIter::new(&out[..20]).collect::<Vec<_>>(), [Ok(Ahs::ExtendedCdb(&tail))]);
    }

    #[test]
    fn bad_lengths() {
        let read = |bytes: &[u8]| AhsIter::new(bytes).map(|ahs| ahs.is_ok()).collect::<Vec<_>>();
        assert_eq!(read(&[0, 5, 2, 0, 0, 0, 2, 0]), [true]);
        assert_eq!(read(&[0, 4, 2, 0, 0, 0, 2, 0]), [false]);
        assert_eq!(read(&[0, 1, 1, 0]), [false]);
        assert_eq!(read(&[0, 5, 2, 0]), [false]);
        assert_eq!(read(&[0xFF, 0xFF, 9, 0]), [false]);
        assert_eq!(read(&[0, 0]), [false]);
    }

    proptest! {
        #[test]
        fn round_trip(tail in proptest::collection::vec(any::<u8>(), 1..240), read_len in any::<u32>(), kind in 3u8.., body in proptest::collection::vec(any::<u8>(), 0..64)) {
            let segments = [Ahs::ExtendedCdb(&tail), Ahs::BidiReadLength(read_len), Ahs::Other { kind, body: &body }];
            let mut out = [0; MAX_AHS_BYTES];
            let mut used = 0;
            for ahs in segments {
                used += ahs.encode(&mut out[used..]).unwrap();
            }
            let back: Result<Vec<_>, _> = AhsIter::new(&out[..used]).collect();
            prop_assert_eq!(back.unwrap(), segments);
        }

        #[test]
        fn arbitrary_bytes_end(bytes in proptest::collection::vec(any::<u8>(), 0..MAX_AHS_BYTES)) {
            prop_assert!(AhsIter::new(&bytes).count() <= bytes.len());
        }
    }
}
