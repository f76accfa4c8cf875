//! The network device (virtio 1.2, section 5.1) with a vhost-user backend. Address and link state are the monitor's.

use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::virtio_net as vn;

use super::Kind;

/// Descriptors of the receive and the transmit queue at most.
const QUEUE_SIZE: u16 = 256;
/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;

const FEATURES: [u32; 14] = [
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
    vn::VIRTIO_NET_F_HOST_USO,
];

/// What several queue pairs need besides `MQ`: a control queue, by which the driver says how many it uses.
const MQ: u64 = 1 << vn::VIRTIO_NET_F_MQ | 1 << vn::VIRTIO_NET_F_CTRL_VQ;
/// What else the control queue is good for.
const CONTROL: [u32; 4] = [
    vn::VIRTIO_NET_F_CTRL_RX,
    vn::VIRTIO_NET_F_CTRL_VLAN,
    vn::VIRTIO_NET_F_CTRL_MAC_ADDR,
    vn::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
];
/// Offset of `max_virtqueue_pairs` in the configuration space.
const MAX_PAIRS: usize = 8;

/// A network device with `pairs` pairs of a receive and a transmit queue, and with more than one a control queue after
/// them, which is the backend's too; the guest gets the address `mac`. `packed`: packed rings, which the backend must have.
pub fn kind(mac: [u8; 6], pairs: u16, packed: bool) -> Kind {
    let several = pairs > 1;
    let mut features = FEATURES.iter().fold(0, |bits, f| bits | 1u64 << f);
    let mut own_config = vec![(0, mac.to_vec()), (6, LINK_UP.to_le_bytes().to_vec())];
    if several {
        features |= CONTROL.iter().fold(MQ, |bits, f| bits | 1u64 << f);
        own_config.push((MAX_PAIRS, pairs.to_le_bytes().to_vec()));
    }
    let packed = if packed { crate::virtio::F_RING_PACKED } else { 0 };
    Kind {
        device_type: virtio_bindings::virtio_ids::VIRTIO_ID_NET,
        features: features
            | packed
            | crate::virtio::F_VERSION_1
            | crate::virtio::F_RING_INDIRECT_DESC
            | crate::virtio::F_RING_EVENT_IDX,
        needed_features: packed | if several { MQ } else { 0 },
        own_features: 1 << vn::VIRTIO_NET_F_MAC | 1 << vn::VIRTIO_NET_F_STATUS,
        queue_max_sizes: vec![QUEUE_SIZE; usize::from(pairs) * 2 + usize::from(several)],
        needed: VhostUserProtocolFeatures::empty(),
        // A network may lose and repeat packets.
        needs_log: false,
        config_len: 0,
        // Receive and transmit queue in turn; the control queue behind them is not what a guest stands still for.
        holds_requests: |queue| queue % 2 == 1,
        writable: 0..0,
        own_config,
        fixed: &[],
        limits: &[],
    }
}

/// The address of network device number `index` where the user gave none: locally administered, the same every time.
pub fn default_mac(index: u8) -> [u8; 6] {
    [0x52, 0x54, 0x00, b'V', b'C', index]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_datagrams_may_go_both_ways() {
        // VIRTIO_NET_F_GUEST_USO4, GUEST_USO6, HOST_USO (virtio 1.2, 5.1.3).
        let both = 0b111 << 54;
        assert_eq!(kind(default_mac(0), 1, false).features & both, both);
    }

    #[test]
    fn a_net_that_waits_for_frames_has_nothing_to_do() {
        let kind = kind(default_mac(0), 2, false);
        let holds: Vec<u16> = (0..5).filter(|queue| (kind.holds_requests)(*queue)).collect();
        assert_eq!(holds, [1, 3], "the transmit queues");
    }
}
