//! The block device (virtio 1.2, section 5.2) with a vhost-user backend.

use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::virtio_blk as vb;

use super::link::Link;
use super::{Kind, VhostUserDevice};
use crate::error::Result;

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

/// Shakes hands with a block backend; the device has `queues` request queues.
pub fn new(name: &str, link: Link, queues: u16) -> Result<VhostUserDevice> {
    let mut features = FEATURES.iter().fold(0, |bits, f| bits | 1u64 << f);
    if queues == 1 {
        features &= !(1 << vb::VIRTIO_BLK_F_MQ);
    }
    let kind = Kind {
        device_type: virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK,
        features: features
            | crate::virtio::F_VERSION_1
            | crate::virtio::F_RING_INDIRECT_DESC
            | crate::virtio::F_RING_EVENT_IDX,
        own_features: 0,
        queue_max_sizes: vec![QUEUE_SIZE; usize::from(queues)],
        needed: VhostUserProtocolFeatures::CONFIG,
        config_len: CONFIG_LEN,
    };
    let mut device = VhostUserDevice::new(name, kind, link)?;
    // A backend may have more queues than the user wants the guest to see.
    if let Some(field) = device.config_mut().get_mut(NUM_QUEUES..NUM_QUEUES + 2) {
        field.copy_from_slice(&queues.to_le_bytes());
    }
    Ok(device)
}
