//! One virtio-blk request (VIRTIO 1.2, 5.2.6): header, ranges and limits, read once and checked.

use vcp_core::mem::GuestBuf;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::SECTOR_BYTES;
use super::config::{MAX_RANGES, max_discard_sectors, max_write_zeroes_sectors, sectors_per_block};
use crate::engine::Lun;

/// Bytes of `struct virtio_blk_req` before the data: type, reserved, sector.
pub const HEADER_BYTES: usize = 16;
/// Bytes of the answer to `VIRTIO_BLK_T_GET_ID`.
pub const ID_BYTES: usize = 20;
/// Bytes of `struct virtio_blk_discard_write_zeroes`.
const RANGE_BYTES: usize = 16;

/// Status byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`.
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`.
    IoError = 1,
    /// `VIRTIO_BLK_S_UNSUPP`.
    Unsupported = 2,
}

/// A range of logical blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First block.
    pub lba: u64,
    /// Number of blocks.
    pub blocks: u32,
    /// Deallocation allowed (write zeroes only).
    pub unmap: bool,
}

/// The ranges of a request, in a fixed place.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ranges {
    ranges: [Range; MAX_RANGES],
    count: usize,
}

impl Ranges {
    /// A single range.
    #[must_use]
    pub fn one(range: Range) -> Self {
        let mut ranges = Self::default();
        ranges.ranges[0] = range;
        ranges.count = 1;
        ranges
    }

    /// Range `index`, if there is one.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<Range> {
        self.ranges[..self.count].get(index).copied()
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read into the writable part.
    Read,
    /// Write the readable part after the header.
    Write,
    /// Make completed writes durable.
    Flush,
    /// Deallocate ranges.
    Discard,
    /// Zero ranges.
    WriteZeroes,
    /// Tell the serial number.
    GetId,
}

/// The header's type and first sector.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    kind: u32,
    sector: u64,
}

impl Header {
    /// Reads the header from the readable part, which has at least [`HEADER_BYTES`] bytes.
    #[must_use]
    pub fn read(readable: &GuestBuf) -> Self {
        let mut bytes = [0; HEADER_BYTES];
        readable.copy_to(0, &mut bytes);
        let (kind, sector) = (bytes[..4].try_into(), bytes[8..].try_into());
        Self {
            kind: u32::from_le_bytes(kind.unwrap_or_default()),
            sector: u64::from_le_bytes(sector.unwrap_or_default()),
        }
    }

    /// What it asks for.
    ///
    /// # Errors
    /// [`Status::Unsupported`]: no such request.
    pub fn kind(&self) -> Result<Kind, Status> {
        match self.kind {
            VIRTIO_BLK_T_IN => Ok(Kind::Read),
            VIRTIO_BLK_T_OUT => Ok(Kind::Write),
            VIRTIO_BLK_T_FLUSH => Ok(Kind::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Kind::GetId),
            VIRTIO_BLK_T_DISCARD => Ok(Kind::Discard),
            VIRTIO_BLK_T_WRITE_ZEROES => Ok(Kind::WriteZeroes),
            _ => Err(Status::Unsupported),
        }
    }

    /// The blocks that a read or write of `len_bytes` bytes covers.
    ///
    /// # Errors
    /// [`Status::IoError`]: not whole blocks, or outside the unit.
    pub fn range(&self, lun: &Lun, len_bytes: usize) -> Result<Range, Status> {
        let sectors = len_bytes as u64 / SECTOR_BYTES;
        if !(len_bytes as u64).is_multiple_of(SECTOR_BYTES) {
            return Err(Status::IoError);
        }
        blocks(lun, self.sector, sectors, false)
    }
}

/// Sectors as blocks, checked against the unit.
fn blocks(lun: &Lun, sector: u64, sectors: u64, unmap: bool) -> Result<Range, Status> {
    let per_block = sectors_per_block(lun);
    if per_block == 0 || !sector.is_multiple_of(per_block) || !sectors.is_multiple_of(per_block) {
        return Err(Status::IoError);
    }
    let lba = sector / per_block;
    let count = u32::try_from(sectors / per_block).map_err(|_| Status::IoError)?;
    let end = lba.checked_add(u64::from(count)).ok_or(Status::IoError)?;
    if end > lun.blocks {
        return Err(Status::IoError);
    }
    Ok(Range { lba, blocks: count, unmap })
}

/// The ranges of a discard or write-zeroes request from its payload (5.2.6.2).
///
/// # Errors
/// [`Status::IoError`]: payload or range not as the device's limits ask; [`Status::Unsupported`]: flags that are not
/// defined for the request.
pub fn read_ranges(lun: &Lun, kind: Kind, payload: &GuestBuf) -> Result<Ranges, Status> {
    let len = payload.len_bytes();
    let count = len / RANGE_BYTES;
    if !len.is_multiple_of(RANGE_BYTES) || count == 0 || count > MAX_RANGES {
        return Err(Status::IoError);
    }
    let max_sectors = match kind {
        Kind::Discard => max_discard_sectors(lun),
        _ => max_write_zeroes_sectors(lun),
    };
    let allowed = if kind == Kind::WriteZeroes { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
    let mut ranges = Ranges { count, ..Ranges::default() };
    let mut fits = true;
    for (index, range) in ranges.ranges[..count].iter_mut().enumerate() {
        let mut bytes = [0; RANGE_BYTES];
        payload.copy_to(index * RANGE_BYTES, &mut bytes);
        let sector = u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default());
        let sectors = u32::from_le_bytes(bytes[8..12].try_into().unwrap_or_default());
        let flags = u32::from_le_bytes(bytes[12..].try_into().unwrap_or_default());
        if flags & !allowed != 0 {
            return Err(Status::Unsupported);
        }
        // Flags in a later range come before that in the answer.
        match blocks(lun, sector, u64::from(sectors), flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0) {
            Ok(within) if sectors <= max_sectors => *range = within,
            _ => fits = false,
        }
    }
    if fits { Ok(ranges) } else { Err(Status::IoError) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lun(block_bytes: u32, blocks: u64) -> Lun {
        Lun { blocks, block_bytes, max_discard_blocks: 100, max_write_zeroes_blocks: 50, ..Lun::default() }
    }

    fn header(kind: u32, sector: u64) -> Header {
        let buf = GuestBuf::for_test(HEADER_BYTES);
        buf.copy_from(0, &kind.to_le_bytes());
        buf.copy_from(8, &sector.to_le_bytes());
        Header::read(&buf)
    }

    fn payload(ranges: &[(u64, u32, u32)]) -> GuestBuf {
        let buf = GuestBuf::for_test(ranges.len() * RANGE_BYTES);
        for (index, (sector, sectors, flags)) in ranges.iter().enumerate() {
            buf.copy_from(index * RANGE_BYTES, &sector.to_le_bytes());
            buf.copy_from(index * RANGE_BYTES + 8, &sectors.to_le_bytes());
            buf.copy_from(index * RANGE_BYTES + 12, &flags.to_le_bytes());
        }
        buf
    }

    proptest! {
        /// Whatever a guest writes, an accepted range is whole blocks inside the unit and covers what was asked.
        #[test]
        fn accepted_ranges_lie_inside(
            sector: u64, near in 0u64..3000, use_near: bool, len in 0usize..1 << 21, big_blocks: bool, blocks in 0u64..400,
        ) {
            let lun = lun(if big_blocks { 4096 } else { 512 }, blocks);
            let sector = if use_near { near } else { sector };
            if let Ok(range) = header(0, sector).range(&lun, len) {
                prop_assert!(range.lba + u64::from(range.blocks) <= lun.blocks);
                prop_assert_eq!(u64::from(range.blocks) * u64::from(lun.block_bytes), len as u64);
                prop_assert_eq!(range.lba * u64::from(lun.block_bytes), sector * SECTOR_BYTES);
            } else {
                let fits = (sector as u128 * 512 + len as u128) <= u128::from(blocks) * u128::from(lun.block_bytes);
                let aligned = (sector as u128 * 512).is_multiple_of(u128::from(lun.block_bytes)) && len.is_multiple_of(lun.block_bytes as usize);
                prop_assert!(!(fits && aligned));
            }
        }
    }

    #[test]
    fn ranges_are_checked_one_by_one() {
        let lun = lun(512, 1000);
        let ok = read_ranges(&lun, Kind::Discard, &payload(&[(0, 100, 0), (900, 100, 0)])).unwrap();
        assert_eq!(ok.get(1), Some(Range { lba: 900, blocks: 100, unmap: false }));
        assert_eq!(ok.get(2), None);
        let refused = |kind, ranges: &[_]| read_ranges(&lun, kind, &payload(ranges)).unwrap_err();
        assert_eq!(refused(Kind::Discard, &[(0, 101, 0)]), Status::IoError, "over the limit");
        assert_eq!(refused(Kind::WriteZeroes, &[(0, 51, 0)]), Status::IoError, "over the limit");
        assert_eq!(refused(Kind::Discard, &[(0, 1, 0), (950, 51, 0)]), Status::IoError, "past the end");
        assert_eq!(refused(Kind::Discard, &[(0, 1, 1)]), Status::Unsupported, "unmap flag on a discard");
        assert_eq!(refused(Kind::WriteZeroes, &[(0, 1, 2)]), Status::Unsupported, "reserved flag");
        let both = [(950, 51, 0), (0, 1, 1)];
        assert_eq!(
            refused(Kind::Discard, &both),
            Status::Unsupported,
            "any such flag, whatever else is wrong"
        );
        assert_eq!(refused(Kind::Discard, &[]), Status::IoError, "no range");
        assert_eq!(refused(Kind::Discard, &[(0, 1, 0); MAX_RANGES + 1]), Status::IoError, "too many");
        assert_eq!(
            read_ranges(&lun, Kind::Discard, &GuestBuf::for_test(RANGE_BYTES + 1)).unwrap_err(),
            Status::IoError
        );
        let unmap = read_ranges(&lun, Kind::WriteZeroes, &payload(&[(8, 8, 1)])).unwrap();
        assert!(unmap.get(0).unwrap().unmap);
    }

    #[test]
    fn unknown_types_are_unsupported() {
        for kind in [2, 3, 5, 9, 10, 12, 14, 0x8000_0000] {
            assert_eq!(header(kind, 0).kind(), Err(Status::Unsupported));
        }
    }
}
