//! READ CAPACITY parameter data (SBC-3 5.15, 5.16).

use super::{DataError, be16, be32, be64, need};

/// Size and layout of a direct-access logical unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Capacity {
    /// Number of logical blocks.
    pub blocks: u64,
    /// Bytes in a logical block.
    pub block_bytes: u32,
    /// Logical blocks per physical block as a power of two.
    pub physical_exponent: u8,
    /// First logical block that begins a physical block.
    pub lowest_aligned: u16,
    /// Logical block provisioning management is enabled: the unit is thin (LBPME).
    pub thin: bool,
    /// Unmapped blocks read as zeroes (LBPRZ).
    pub unmapped_reads_zero: bool,
}

/// Bytes of READ CAPACITY(16) parameter data.
pub const CAPACITY_16_BYTES: u32 = 32;

impl Capacity {
    /// Decodes READ CAPACITY(16) parameter data; the fields behind byte 12 may be missing.
    pub fn parse_16(data: &[u8]) -> Result<Self, DataError> {
        const WHAT: &str = "READ CAPACITY(16) data";
        need(WHAT, data, 12)?;
        let last = be64(data, 0);
        let blocks = last.checked_add(1).ok_or(DataError::Field {
            what: WHAT,
            field: "returned logical block address",
            value: last,
        })?;
        let flags = be16(data, 14);
        Ok(Self {
            blocks,
            block_bytes: block_bytes(WHAT, be32(data, 8))?,
            physical_exponent: data.get(13).copied().unwrap_or(0) & 0x0F,
            lowest_aligned: flags & 0x3FFF,
            thin: flags & 0x8000 != 0,
            unmapped_reads_zero: flags & 0x4000 != 0,
        })
    }

    /// Decodes READ CAPACITY(10) parameter data; `None` if the unit is too large for it and must be asked with
    /// READ CAPACITY(16).
    pub fn parse_10(data: &[u8]) -> Result<Option<Self>, DataError> {
        const WHAT: &str = "READ CAPACITY(10) data";
        need(WHAT, data, 8)?;
        let last = be32(data, 0);
        if last == u32::MAX {
            return Ok(None);
        }
        Ok(Some(Self {
            blocks: u64::from(last) + 1,
            block_bytes: block_bytes(WHAT, be32(data, 4))?,
            physical_exponent: 0,
            lowest_aligned: 0,
            thin: false,
            unmapped_reads_zero: false,
        }))
    }

    /// Size of the unit in bytes; saturates.
    pub fn bytes(&self) -> u64 {
        self.blocks.saturating_mul(u64::from(self.block_bytes))
    }
}

/// Powers of two from 512 to 1 MiB; anything else cannot be offered as a disk.
fn block_bytes(what: &'static str, value: u32) -> Result<u32, DataError> {
    if value.is_power_of_two() && (512..=1 << 20).contains(&value) {
        return Ok(value);
    }
    Err(DataError::Field { what, field: "logical block length", value: u64::from(value) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen() {
        let mut data = [0; 32];
        data[..8].copy_from_slice(&0x1_FFFF_FFFFu64.to_be_bytes());
        data[8..12].copy_from_slice(&512u32.to_be_bytes());
        data[13] = 3;
        data[14] = 0xC0;
        data[15] = 7;
        let capacity = Capacity::parse_16(&data).unwrap();
        assert_eq!(capacity.blocks, 0x2_0000_0000);
        assert_eq!((capacity.physical_exponent, capacity.lowest_aligned), (3, 7));
        assert!(capacity.thin && capacity.unmapped_reads_zero);
        assert!(Capacity::parse_16(&data[..12]).is_ok());
        assert!(Capacity::parse_16(&data[..11]).is_err());
    }

    #[test]
    fn impossible_values() {
        let mut data = [0xFF; 32];
        assert!(Capacity::parse_16(&data).is_err());
        data = [0; 32];
        assert!(Capacity::parse_16(&data).is_err(), "blocks of no bytes");
        data[8..12].copy_from_slice(&520u32.to_be_bytes());
        assert!(Capacity::parse_16(&data).is_err(), "520-byte blocks");
    }

    #[test]
    fn ten() {
        let data = [0, 0, 0x7F, 0xFF, 0, 0, 0x10, 0];
        let capacity = Capacity::parse_10(&data).unwrap().unwrap();
        assert_eq!((capacity.blocks, capacity.block_bytes), (0x8000, 4096));
        assert_eq!(Capacity::parse_10(&[0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 2, 0]), Ok(None));
    }
}
