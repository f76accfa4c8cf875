//! The network device (virtio 1.2, section 5.1) with a vhost-user backend. Address and link state are the monitor's.

use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::virtio_net as vn;

use super::Kind;

/// Descriptors of the receive and the transmit queue at most.
const QUEUE_SIZE: u16 = 256;
/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;

const FEATURES: [u32; 13] = [
    vn::VIRTIO_NET_F_CSUM,
    vn::VIRTIO_NET_F_GUEST_CSUM,
    vn::VIRTIO_NET_F_GUEST_TSO4,
    vn::VIRTIO_NET_F_GUEST_TSO6,
    vn::VIRTIO_NET_F_GUEST_ECN,
    vn::VIRTIO_NET_F_GUEST_UFO,
    vn::VIRTIO_NET_F_HOST_TSO4,
    vn::VIRTIO_NET_F_HOST_TSO6,
    vn::VIRTIO_NET_F_HOST_ECN,
    vn::VIRTIO_NET_F_HOST_UFO,
    vn::VIRTIO_NET_F_MRG_RXBUF,
    vn::VIRTIO_NET_F_GUEST_USO4,
    vn::VIRTIO_NET_F_GUEST_USO6,
];

/// A network device; the guest gets the address `mac`.
pub fn kind(mac: [u8; 6]) -> Kind {
    let features = FEATURES.iter().fold(0, |bits, f| bits | 1u64 << f);
    Kind {
        device_type: virtio_bindings::virtio_ids::VIRTIO_ID_NET,
        features: features
            | crate::virtio::F_VERSION_1
            | crate::virtio::F_RING_INDIRECT_DESC
            | crate::virtio::F_RING_EVENT_IDX,
        needed_features: 0,
        own_features: 1 << vn::VIRTIO_NET_F_MAC | 1 << vn::VIRTIO_NET_F_STATUS,
        queue_max_sizes: vec![QUEUE_SIZE; 2],
        needed: VhostUserProtocolFeatures::empty(),
        // A network may lose and repeat packets.
        needs_log: false,
        config_len: 0,
        writable: 0..0,
        own_config: vec![(0, mac.to_vec()), (6, LINK_UP.to_le_bytes().to_vec())],
        fixed: &[],
        limits: &[],
    }
}

/// The address of network device number `index` where the user gave none: locally administered, the same every time.
pub fn default_mac(index: u8) -> [u8; 6] {
    [0x52, 0x54, 0x00, b'V', b'C', index]
}
