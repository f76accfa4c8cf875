//! Block requests in messages: the virtio-blk requests (VIRTIO 1.2, 5.2.6) without their descriptors for header and status.
//!
//! | opcode | value | data | direction |
//! | --- | --- | --- | --- |
//! | [`CONFIG`] | 0 | one segment | to the client: features (8 bytes), then the configuration space |
//! | [`READ`] | first sector | any segments the client lets the VCP write, whole blocks | to the client |
//! | [`WRITE`] | first sector | any segments, whole blocks | from the client |
//! | [`FLUSH`] | 0 | none | |
//! | [`DISCARD`], [`WRITE_ZEROES`] | 0 | ranges of 16 bytes: sector u64, sectors u32, flags u32 (1: may unmap) | from the client |
//!
//! Sectors have 512 bytes whatever the block size. A completion's code is one of the constants below, its length the bytes
//! transferred to the client. A completed write is in the unit's cache ([`Info::write_cache`]) until a flush completes.

/// Feature bit of this protocol in the set-up.
pub const FEATURE: u64 = 1 << 32;

/// Tells features and configuration.
pub const CONFIG: u16 = 0;
/// Reads.
pub const READ: u16 = 1;
/// Writes.
pub const WRITE: u16 = 2;
/// Makes completed writes durable.
pub const FLUSH: u16 = 3;
/// The ranges are no longer needed.
pub const DISCARD: u16 = 4;
/// The ranges read as zeroes.
pub const WRITE_ZEROES: u16 = 5;

/// Done.
pub const OK: u16 = 0;
/// Failed.
pub const IO_ERROR: u16 = 1;
/// The unit or this server cannot do it.
pub const UNSUPPORTED: u16 = 2;
/// The request breaks the rules above.
pub const INVALID: u16 = 3;

/// Bytes of a sector.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of a range of a discard.
pub const RANGE_BYTES: usize = 16;
/// Bytes of what [`CONFIG`] is worth asking for.
pub const CONFIG_BYTES: usize = 256;

/// A request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The disk could not do it, and will not by trying again.
    #[error("I/O error")]
    Io,
    /// The disk cannot do this at all.
    #[error("not supported")]
    Unsupported,
    /// It breaks the rules of the protocol.
    #[error("invalid request")]
    Invalid,
    /// A code that does not exist, or fewer bytes than asked for.
    #[error("the answer makes no sense: code {code}, {len} bytes")]
    Answer {
        /// The code.
        code: u16,
        /// The length.
        len: u32,
    },
}

impl IoError {
    /// The result that a code stands for.
    ///
    /// # Errors
    /// All but [`OK`].
    pub fn of(code: u16, len: u32) -> Result<(), Self> {
        match code {
            OK => Ok(()),
            IO_ERROR => Err(Self::Io),
            UNSUPPORTED => Err(Self::Unsupported),
            INVALID => Err(Self::Invalid),
            code => Err(Self::Answer { code, len }),
        }
    }
}

/// The disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Bytes of a logical block: what requests are multiples of.
    pub block_bytes: u32,
    /// It cannot be written.
    pub read_only: bool,
    /// Completed writes need a flush to be durable.
    pub write_cache: bool,
    /// Most sectors of a discard; 0: it cannot.
    pub discard_sectors: u32,
    /// Most sectors of a write-zeroes; 0: it cannot.
    pub write_zeroes_sectors: u32,
}

/// `VIRTIO_BLK_F_*`.
mod bits {
    pub(super) const RO: u64 = 5;
    pub(super) const BLK_SIZE: u64 = 6;
    pub(super) const FLUSH: u64 = 9;
    pub(super) const DISCARD: u64 = 13;
    pub(super) const WRITE_ZEROES: u64 = 14;
}

impl Info {
    /// Reads the answer to [`CONFIG`]; `None` if it makes no sense. The configuration space's layout is VIRTIO 1.2, 5.2.4.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let features = u64_at(0)?;
        let has = |bit: u64| features & 1 << bit != 0;
        let config = 8;
        let block_bytes = if has(bits::BLK_SIZE) { u32_at(config + 20)? } else { 512 };
        if block_bytes < 512 || !block_bytes.is_power_of_two() {
            return None;
        }
        Some(Self {
            sectors: u64_at(config)?,
            block_bytes,
            read_only: has(bits::RO),
            write_cache: has(bits::FLUSH),
            discard_sectors: if has(bits::DISCARD) { u32_at(config + 36)? } else { 0 },
            write_zeroes_sectors: if has(bits::WRITE_ZEROES) { u32_at(config + 48)? } else { 0 },
        })
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.sectors.saturating_mul(SECTOR_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_read_as_virtio_lays_it_out() {
        let mut bytes = [0; CONFIG_BYTES];
        let features: u64 = 1 << 6 | 1 << 9 | 1 << 13 | 1 << 14;
        bytes[..8].copy_from_slice(&features.to_le_bytes());
        bytes[8..16].copy_from_slice(&2048u64.to_le_bytes());
        bytes[28..32].copy_from_slice(&4096u32.to_le_bytes());
        bytes[44..48].copy_from_slice(&77u32.to_le_bytes());
        bytes[56..60].copy_from_slice(&88u32.to_le_bytes());
        let info = Info::read(&bytes).unwrap();
        let wanted = Info {
            sectors: 2048,
            block_bytes: 4096,
            read_only: false,
            write_cache: true,
            discard_sectors: 77,
            write_zeroes_sectors: 88,
        };
        assert_eq!(info, wanted);
        assert_eq!(info.bytes(), 1 << 20);
        bytes[28] = 1;
        assert_eq!(Info::read(&bytes), None);
        assert_eq!(Info::read(&bytes[..20]), None);
    }
}
