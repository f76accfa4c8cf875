//! Logical unit numbers (SAM-5 4.7) and REPORT LUNS parameter data (SPC-4 6.33).

use std::fmt;

use super::{DataError, be32, need};

/// An eight-byte logical unit number as it stands in PDUs (RFC 7143 11.2.1.7) and in REPORT LUNS data.
///
/// The bytes that REPORT LUNS gave are used as they came; [`Lun::from_number`] is for the time before.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Lun(pub [u8; 8]);

/// First byte of extended flat space addressing with three bytes of number: address method 11b, length 01b, extended
/// address method 2.
const EXTENDED_FLAT: u32 = 0xD2;

impl Lun {
    /// LUN 0.
    pub const ZERO: Lun = Lun([0; 8]);

    /// The address for a number as people write it: peripheral device addressing up to 255, flat space addressing
    /// up to 16383, extended flat space addressing up to 2^24-1 (SAM-5 4.7.5 to 4.7.7); a larger number is taken as
    /// all eight bytes.
    pub fn from_number(number: u64) -> Self {
        let mut out = [0; 8];
        match number {
            0..=0xFF => out[1] = number as u8,
            0x100..=0x3FFF => {
                out[0] = 0x40 | (number >> 8) as u8;
                out[1] = number as u8;
            }
            0x4000..=0xFF_FFFF => {
                out[..4].copy_from_slice(&(EXTENDED_FLAT << 24 | number as u32).to_be_bytes());
            }
            _ => out = number.to_be_bytes(),
        }
        Self(out)
    }

    /// The number as people write it: the inverse of [`from_number`](Self::from_number) for single-level addresses
    /// (peripheral on bus 0, or flat), the eight bytes as one number for all others.
    pub fn number(self) -> u64 {
        let b = self.0;
        if b[2..].iter().all(|&x| x == 0) {
            match b[0] >> 6 {
                0 if b[0] == 0 => return u64::from(b[1]),
                1 => return u64::from(b[0] & 0x3F) << 8 | u64::from(b[1]),
                _ => {}
            }
        }
        if b[4..] == [0; 4] && u32::from(b[0]) == EXTENDED_FLAT {
            let number = u32::from_be_bytes([0, b[1], b[2], b[3]]);
            // A target may give small numbers this way, too; they stay apart from the shorter forms.
            if number > 0x3FFF {
                return u64::from(number);
            }
        }
        u64::from_be_bytes(b)
    }

    /// Parses a number in decimal or, with `0x`, hexadecimal.
    pub fn parse(text: &str) -> Option<Self> {
        let number = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(hex) => u64::from_str_radix(hex, 16).ok()?,
            None if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => text.parse().ok()?,
            None => return None,
        };
        Some(Self::from_number(number))
    }
}

impl fmt::Display for Lun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number() {
            number if number <= 0xFF_FFFF => write!(f, "{number}"),
            number => write!(f, "{number:#018x}"),
        }
    }
}

impl fmt::Debug for Lun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lun({self})")
    }
}

/// What REPORT LUNS returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportLuns {
    /// The logical units in the data that came.
    pub luns: Vec<Lun>,
    /// Bytes that the whole list takes with its header; more than came means: ask again with this much.
    pub total_bytes: u64,
}

impl ReportLuns {
    /// Decodes REPORT LUNS parameter data.
    pub fn parse(data: &[u8]) -> Result<Self, DataError> {
        need("REPORT LUNS data", data, 8)?;
        let list_bytes = be32(data, 0);
        if !list_bytes.is_multiple_of(8) {
            return Err(DataError::Field {
                what: "REPORT LUNS data",
                field: "LUN list length",
                value: u64::from(list_bytes),
            });
        }
        let luns = data[8..]
            .chunks_exact(8)
            .take(list_bytes as usize / 8)
            .map(|chunk| {
                let mut bytes = [0; 8];
                bytes.copy_from_slice(chunk);
                Lun(bytes)
            })
            .collect();
        Ok(Self { luns, total_bytes: u64::from(list_bytes) + 8 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_above_255_use_flat_space_addressing() {
        assert_eq!(Lun::from_number(0), Lun::ZERO);
        assert_eq!(Lun::from_number(255).0, [0, 255, 0, 0, 0, 0, 0, 0]);
        // Defect H of the field: 300 sent as 01 2C would be bus 1, LUN 44.
        assert_eq!(Lun::from_number(300).0, [0x41, 0x2C, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Lun::from_number(0x4000).0, [0xD2, 0x00, 0x40, 0x00, 0, 0, 0, 0]);
        for number in [0, 1, 255, 256, 300, 0x3FFF, 0x4000, 0xFF_FFFF, 0x0102_0000_0000_0000, u64::MAX] {
            assert_eq!(Lun::from_number(number).number(), number);
        }
    }

    #[test]
    fn text() {
        assert_eq!(Lun::parse("300"), Some(Lun::from_number(300)));
        assert_eq!(Lun::parse("0x12c"), Some(Lun::from_number(300)));
        assert_eq!(Lun::from_number(300).to_string(), "300");
        for bad in ["", "-1", "+1", "0x", "1 ", "lun", "99999999999999999999"] {
            assert_eq!(Lun::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn list_longer_than_what_came() {
        let mut data = vec![0, 0, 0, 24, 0, 0, 0, 0];
        data.extend_from_slice(&Lun::from_number(0).0);
        data.extend_from_slice(&Lun::from_number(300).0);
        let report = ReportLuns::parse(&data).unwrap();
        assert_eq!(report.luns, [Lun::ZERO, Lun::from_number(300)]);
        assert_eq!(report.total_bytes, 32);
        assert!(ReportLuns::parse(&[0, 0, 0, 7, 0, 0, 0, 0]).is_err());
        assert!(ReportLuns::parse(&[0; 4]).is_err());
    }
}
