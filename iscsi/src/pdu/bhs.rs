//! The basic header segment (RFC 7143 11.2.1): 48 bytes at the start of every PDU, and the fields common to all.

use std::fmt;

use super::{Itt, Opcode};
use crate::scsi::lun::Lun;
use crate::serial::Serial;

/// Length of a basic header segment.
pub const BHS_BYTES: usize = 48;

/// Largest data segment that the 24-bit length field can say.
pub const MAX_DATA_SEGMENT_BYTES: u32 = 0xFF_FFFF;

/// A basic header segment as it stands on the wire.
///
/// The typed structs of this module decode from it and encode to it; the accessors here are for what must be known
/// before the opcode is looked at (lengths) and for what every PDU has.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bhs(pub [u8; BHS_BYTES]);

impl Bhs {
    /// A header of zeroes but for the opcode.
    #[inline]
    #[must_use]
    pub const fn new(opcode: Opcode) -> Self {
        let mut bytes = [0; BHS_BYTES];
        bytes[0] = opcode as u8;
        Self(bytes)
    }

    /// The opcode's six bits as they came; [`opcode`](Self::opcode) gives them a name.
    #[inline]
    #[must_use]
    pub const fn opcode_bits(&self) -> u8 {
        self.0[0] & 0x3F
    }

    /// The opcode, if RFC 7143 defines it.
    #[inline]
    #[must_use]
    pub const fn opcode(&self) -> Option<Opcode> {
        Opcode::from_bits(self.opcode_bits())
    }

    /// The I bit: a request marked for immediate delivery (11.2.1.1). Meaningless in what targets send.
    #[inline]
    #[must_use]
    pub const fn immediate(&self) -> bool {
        self.0[0] & 0x40 != 0
    }

    /// Bytes of additional header segments, a multiple of four up to 1020 (11.2.1.5).
    #[inline]
    #[must_use]
    pub const fn ahs_len_bytes(&self) -> usize {
        self.0[4] as usize * 4
    }

    /// Bytes in the data segment, without padding and digest (11.2.1.6).
    #[inline]
    #[must_use]
    pub const fn data_len_bytes(&self) -> u32 {
        u32::from_be_bytes([0, self.0[5], self.0[6], self.0[7]])
    }

    /// The initiator task tag, in the same place in all PDUs (11.2.1.8); reserved in SNACK replies of none.
    #[inline]
    #[must_use]
    pub const fn itt(&self) -> Itt {
        Itt(self.u32_at(16))
    }

    /// Sets the I bit.
    #[inline]
    pub const fn set_immediate(&mut self, immediate: bool) {
        self.0[0] = (self.0[0] & !0x40) | if immediate { 0x40 } else { 0 };
    }

    /// Sets TotalAHSLength. `len_bytes` is a multiple of four up to 1020.
    #[inline]
    pub const fn set_ahs_len(&mut self, len_bytes: usize) {
        debug_assert!(len_bytes.is_multiple_of(4) && len_bytes <= 1020);
        self.0[4] = (len_bytes / 4) as u8;
    }

    /// Sets DataSegmentLength. `len_bytes` is at most [`MAX_DATA_SEGMENT_BYTES`], which every negotiated limit
    /// ensures.
    #[inline]
    pub const fn set_data_len(&mut self, len_bytes: u32) {
        debug_assert!(len_bytes <= MAX_DATA_SEGMENT_BYTES);
        let bytes = len_bytes.to_be_bytes();
        self.0[5] = bytes[1];
        self.0[6] = bytes[2];
        self.0[7] = bytes[3];
    }

    #[inline]
    pub(super) const fn u16_at(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.0[at], self.0[at + 1]])
    }

    #[inline]
    pub(super) const fn u32_at(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    #[inline]
    pub(super) const fn sn_at(&self, at: usize) -> Serial {
        Serial(self.u32_at(at))
    }

    #[inline]
    pub(super) fn array_at<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&self.0[at..at + N]);
        out
    }

    #[inline]
    pub(super) fn lun(&self) -> Lun {
        Lun(self.array_at(8))
    }

    #[inline]
    pub(super) const fn flag(&self, bit: u8) -> bool {
        self.0[1] & bit != 0
    }

    #[inline]
    pub(super) fn put<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        self.0[at..at + N].copy_from_slice(&bytes);
    }

    #[inline]
    pub(super) fn put_u16(&mut self, at: usize, value: u16) {
        self.put(at, value.to_be_bytes());
    }

    #[inline]
    pub(super) fn put_u32(&mut self, at: usize, value: u32) {
        self.put(at, value.to_be_bytes());
    }

    #[inline]
    pub(super) fn put_sn(&mut self, at: usize, value: Serial) {
        self.put_u32(at, value.0);
    }

    #[inline]
    pub(super) fn put_lun(&mut self, lun: Lun) {
        self.put(8, lun.0);
    }

    #[inline]
    pub(super) const fn set_flag(&mut self, bit: u8, on: bool) {
        if on {
            self.0[1] |= bit;
        }
    }
}

impl fmt::Debug for Bhs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bhs(")?;
        for word in self.0.chunks_exact(4) {
            write!(f, " {:02x}{:02x}{:02x}{:02x}", word[0], word[1], word[2], word[3])?;
        }
        f.write_str(")")
    }
}
