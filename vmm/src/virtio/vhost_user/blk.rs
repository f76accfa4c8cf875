//! The block device (virtio 1.2, section 5.2) with a vhost-user backend.

use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::virtio_blk as vb;

use super::Kind;

/// Descriptors of a request queue at most. Large enough for a deep queue with indirect descriptors, small enough for
/// every backend.
const QUEUE_SIZE: u16 = 256;
/// Configuration space up to and with the write-zeroes fields. Backends refuse more than they have, and these all have.
const CONFIG_LEN: usize = 60;
/// Offset of `num_queues` in it.
const NUM_QUEUES: usize = 34;

const FEATURES: [u32; 11] = [
    vb::VIRTIO_BLK_F_SIZE_MAX,
    vb::VIRTIO_BLK_F_SEG_MAX,
    vb::VIRTIO_BLK_F_GEOMETRY,
    vb::VIRTIO_BLK_F_RO,
    vb::VIRTIO_BLK_F_BLK_SIZE,
    vb::VIRTIO_BLK_F_FLUSH,
    vb::VIRTIO_BLK_F_TOPOLOGY,
    vb::VIRTIO_BLK_F_CONFIG_WCE,
    vb::VIRTIO_BLK_F_MQ,
    vb::VIRTIO_BLK_F_DISCARD,
    vb::VIRTIO_BLK_F_WRITE_ZEROES,
];

/// Offset and length of `writeback`, the one field that a driver may write.
const WRITEBACK: std::ops::Range<usize> = 32..33;

/// A block device with `queues` request queues, 1 to 64. `packed`: packed rings, which the backend must have.
pub fn kind(queues: u16, packed: bool) -> Kind {
    let mut features = FEATURES.iter().fold(0, |bits, f| bits | 1u64 << f);
    if queues == 1 {
        features &= !(1 << vb::VIRTIO_BLK_F_MQ);
    }
    let packed = if packed { crate::virtio::F_RING_PACKED } else { 0 };
    Kind {
        device_type: virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK,
        features: features
            | packed
            | crate::virtio::F_VERSION_1
            | crate::virtio::F_RING_INDIRECT_DESC
            | crate::virtio::F_RING_EVENT_IDX,
        needed_features: packed,
        own_features: 0,
        queue_max_sizes: vec![QUEUE_SIZE; usize::from(queues)],
        needed: VhostUserProtocolFeatures::CONFIG,
        needs_log: true,
        config_len: CONFIG_LEN,
        holds_requests: |_| true,
        writable: WRITEBACK,
        // A backend may have more queues than the user wants the guest to see.
        own_config: vec![(NUM_QUEUES, queues.to_le_bytes().to_vec())],
        fixed: &[("a block size of", 20..24)],
        limits: &[
            ("a segment size (size_max) of", 8),
            ("a number of segments (seg_max) of", 12),
            ("a discard limit of", 36),
            ("a number of discard segments of", 40),
            ("a write-zeroes limit of", 48),
            ("a number of write-zeroes segments of", 52),
        ],
    }
}
