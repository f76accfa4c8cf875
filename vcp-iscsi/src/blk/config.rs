//! Feature bits and the configuration space (VIRTIO 1.2, 5.2.3 and 5.2.4), computed from a [`Lun`].

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::SECTOR_BYTES;
use crate::engine::Lun;

/// Bytes of the configuration space up to and with `write_zeroes_may_unmap` and its padding.
pub const CONFIG_BYTES: usize = 60;
/// Offset of the only field that a driver may write: the cache mode.
pub const WRITEBACK_OFFSET: u32 = 32;
/// Most ranges in one discard or write-zeroes request; each slot has room for so many.
pub const MAX_RANGES: usize = 16;
/// Most data segments of a request, so that header, data and status fit a queue of 128 entries (what monitors use by
/// default) even without indirect descriptors.
const MAX_SEGMENTS: u64 = 126;
/// Largest segment that is told. No driver builds larger ones, and SeaBIOS takes segments times their size, in sectors,
/// modulo 65536 as the most that it may read at once: told 126 segments of 16 MiB, that is 0, and it reads for ever.
/// With this limit, pages, and [`MAX_SEGMENTS`], it is never 0.
const MAX_SEGMENT_BYTES: u64 = 4 << 20;
/// Page size that drivers cut segments at.
const PAGE_BYTES: u64 = 4096;

/// One feature as a bit.
#[must_use]
pub const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// The features offered for `lun` with `queues` queues.
#[must_use]
pub fn features(lun: &Lun, queues: u16) -> u64 {
    let mut features = bit(VIRTIO_F_VERSION_1)
        | bit(VIRTIO_RING_F_INDIRECT_DESC)
        | bit(VIRTIO_RING_F_EVENT_IDX)
        | bit(VIRTIO_BLK_F_FLUSH)
        | bit(VIRTIO_BLK_F_CONFIG_WCE)
        | bit(VIRTIO_BLK_F_BLK_SIZE)
        | bit(VIRTIO_BLK_F_TOPOLOGY)
        | bit(VIRTIO_BLK_F_SEG_MAX)
        | bit(VIRTIO_BLK_F_SIZE_MAX);
    if queues > 1 {
        features |= bit(VIRTIO_BLK_F_MQ);
    }
    if lun.read_only {
        features |= bit(VIRTIO_BLK_F_RO);
    } else {
        if lun.max_discard_blocks != 0 {
            features |= bit(VIRTIO_BLK_F_DISCARD);
        }
        if lun.max_write_zeroes_blocks != 0 {
            features |= bit(VIRTIO_BLK_F_WRITE_ZEROES);
        }
    }
    features
}

/// Sectors in a logical block.
#[must_use]
pub fn sectors_per_block(lun: &Lun) -> u64 {
    u64::from(lun.block_bytes) / SECTOR_BYTES
}

/// A number of blocks as sectors, as large as the 32-bit field can say in whole blocks.
fn sectors(lun: &Lun, blocks: u32) -> u32 {
    let per_block = sectors_per_block(lun).max(1);
    let most = u64::from(u32::MAX) / per_block * per_block;
    (u64::from(blocks) * per_block).min(most) as u32
}

/// Largest discard of one range, in sectors.
#[must_use]
pub fn max_discard_sectors(lun: &Lun) -> u32 {
    sectors(lun, lun.max_discard_blocks)
}

/// Largest write-zeroes of one range, in sectors.
#[must_use]
pub fn max_write_zeroes_sectors(lun: &Lun) -> u32 {
    sectors(lun, lun.max_write_zeroes_blocks)
}

/// The configuration space (`struct virtio_blk_config`, little-endian).
#[must_use]
pub fn space(lun: &Lun, queues: u16, writeback: bool) -> [u8; CONFIG_BYTES] {
    let max_transfer = u64::from(lun.max_transfer_blocks) * u64::from(lun.block_bytes);
    // A segment is at least a page for drivers, and no larger than what one command carries: larger requests work
    // (they are split), these numbers say what works best.
    let size_max = max_transfer.clamp(PAGE_BYTES, MAX_SEGMENT_BYTES) / PAGE_BYTES * PAGE_BYTES;
    let seg_max = (max_transfer / PAGE_BYTES).clamp(1, MAX_SEGMENTS);
    let mut space = Space([0; CONFIG_BYTES]);
    space.put(0, &lun.blocks.saturating_mul(sectors_per_block(lun)).to_le_bytes());
    space.put(8, &(size_max as u32).to_le_bytes());
    space.put(12, &(seg_max as u32).to_le_bytes());
    space.put(20, &lun.block_bytes.to_le_bytes());
    space.put(24, &[lun.physical_exponent, u8::try_from(lun.lowest_aligned).unwrap_or(0)]);
    space.put(26, &u16::try_from(lun.min_transfer_blocks).unwrap_or(0).to_le_bytes());
    space.put(28, &lun.opt_transfer_blocks.to_le_bytes());
    space.put(WRITEBACK_OFFSET as usize, &[writeback.into()]);
    space.put(34, &queues.to_le_bytes());
    if lun.max_discard_blocks != 0 {
        space.put(36, &max_discard_sectors(lun).to_le_bytes());
        space.put(40, &(MAX_RANGES as u32).to_le_bytes());
        space.put(44, &sectors(lun, lun.discard_granularity.max(1)).to_le_bytes());
    }
    if lun.max_write_zeroes_blocks != 0 {
        space.put(48, &max_write_zeroes_sectors(lun).to_le_bytes());
        space.put(52, &(MAX_RANGES as u32).to_le_bytes());
        space.put(56, &[lun.write_zeroes_may_unmap.into()]);
    }
    space.0
}

struct Space([u8; CONFIG_BYTES]);

impl Space {
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lun() -> Lun {
        Lun {
            blocks: 1 << 33,
            block_bytes: 4096,
            physical_exponent: 3,
            max_transfer_blocks: 256,
            opt_transfer_blocks: 128,
            min_transfer_blocks: 8,
            max_discard_blocks: u32::MAX,
            discard_granularity: 4,
            max_write_zeroes_blocks: 1024,
            write_zeroes_may_unmap: true,
            write_cache: true,
            ..Lun::default()
        }
    }

    fn u32_at(space: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(space[offset..offset + 4].try_into().unwrap())
    }

    #[test]
    fn a_4kn_lun_of_32_tib_is_told_in_sectors() {
        let space = space(&lun(), 4, true);
        assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), 1 << 36);
        assert_eq!(u32_at(&space, 20), 4096);
        assert_eq!((space[24], space[26], u32_at(&space, 28)), (3, 8, 128));
        assert_eq!((space[32], space[34]), (1, 4));
        assert_eq!(u32_at(&space, 36), u32::MAX / 8 * 8, "a multiple of a block that does not overflow");
        assert_eq!(u32_at(&space, 44), 32);
        assert_eq!((u32_at(&space, 48), space[56]), (8192, 1));
        assert_eq!((u32_at(&space, 8), u32_at(&space, 12)), (1 << 20, 126));
    }

    #[test]
    fn features_follow_the_lun() {
        let all = features(&lun(), 2);
        for feature in [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_FLUSH]
        {
            assert_ne!(all & bit(feature), 0);
        }
        assert_eq!(all & bit(VIRTIO_BLK_F_RO), 0);
        let read_only = Lun { read_only: true, ..lun() };
        let few = features(&read_only, 1);
        assert_ne!(few & bit(VIRTIO_BLK_F_RO), 0);
        assert_eq!(
            few & (bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES) | bit(VIRTIO_BLK_F_MQ)),
            0
        );
    }

    #[test]
    fn seabios_can_read_whatever_the_transfer_limit() {
        for max_transfer_blocks in
            (3..=32).map(|n| u32::MAX >> (32 - n)).flat_map(|n| [n, n - n / 2, n - n / 4])
        {
            let space = space(&Lun { block_bytes: 512, max_transfer_blocks, ..lun() }, 1, true);
            let bytes = u32_at(&space, 8).wrapping_mul(u32_at(&space, 12));
            assert_ne!((bytes / 512) as u16, 0, "{max_transfer_blocks} blocks");
        }
    }

    #[test]
    fn limits_of_a_small_transfer_stay_usable() {
        let small = Lun { block_bytes: 512, max_transfer_blocks: 1, ..lun() };
        let space = space(&small, 1, false);
        assert_eq!((u32_at(&space, 8), u32_at(&space, 12), space[32]), (4096, 1, 0));
    }
}
