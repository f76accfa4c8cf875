//! Feature bits of a network device (VIRTIO 1.2, 5.1.3), and what they mean for frames.

use super::PortSpec;
use crate::frame::Offloads;

const fn bit(n: u32) -> u64 {
    1 << n
}

const CSUM: u64 = bit(0);
const GUEST_CSUM: u64 = bit(1);
const CTRL_GUEST_OFFLOADS: u64 = bit(2);
const MTU: u64 = bit(3);
const MAC: u64 = bit(5);
const GUEST_TSO4: u64 = bit(7);
const GUEST_TSO6: u64 = bit(8);
const GUEST_ECN: u64 = bit(9);
const HOST_TSO4: u64 = bit(11);
const HOST_TSO6: u64 = bit(12);
const HOST_ECN: u64 = bit(13);
/// `VIRTIO_NET_F_MRG_RXBUF`.
pub const MRG_RXBUF: u64 = bit(15);
const STATUS: u64 = bit(16);
/// `VIRTIO_NET_F_CTRL_VQ`.
pub const CTRL_VQ: u64 = bit(17);
const CTRL_RX: u64 = bit(18);
const CTRL_VLAN: u64 = bit(19);
const GUEST_ANNOUNCE: u64 = bit(21);
/// `VIRTIO_NET_F_MQ`.
pub const MQ: u64 = bit(22);
const CTRL_MAC_ADDR: u64 = bit(23);
const INDIRECT_DESC: u64 = bit(28);
const EVENT_IDX: u64 = bit(29);
/// `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = bit(32);
const IN_ORDER: u64 = bit(35);
const GUEST_USO4: u64 = bit(54);
const GUEST_USO6: u64 = bit(55);
const HOST_USO: u64 = bit(56);

/// Bits with any of which the driver may leave something to the device.
pub const HOST_OFFLOADS: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO;

const OFFLOADS: u64 =
    HOST_OFFLOADS | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;

/// What a port offers. Packed rings are the server's to offer.
#[must_use]
pub fn offered(spec: &PortSpec) -> u64 {
    let mut bits = VERSION_1
        | IN_ORDER
        | INDIRECT_DESC
        | EVENT_IDX
        | MRG_RXBUF
        | STATUS
        | CTRL_VQ
        | CTRL_RX
        | CTRL_VLAN
        | CTRL_MAC_ADDR
        | CTRL_GUEST_OFFLOADS
        | GUEST_ANNOUNCE;
    if spec.offloads {
        bits |= OFFLOADS;
    }
    if spec.mac.is_some() {
        bits |= MAC;
    }
    if spec.mtu.is_some() {
        bits |= MTU;
    }
    if spec.pairs > 1 {
        bits |= MQ;
    }
    bits
}

/// Whether the driver says where it is when it is asked to, and says that it did so (5.1.6.5.4).
#[must_use]
pub fn announces(acked: u64) -> bool {
    acked & (GUEST_ANNOUNCE | STATUS | CTRL_VQ) == GUEST_ANNOUNCE | STATUS | CTRL_VQ
}

/// What the driver takes unfinished. Segmentation needs the checksum to be left to it as well (5.1.3.1).
#[must_use]
pub fn guest(acked: u64) -> Offloads {
    let csum = acked & GUEST_CSUM != 0;
    let has = |bit| csum && acked & bit != 0;
    Offloads {
        csum,
        tso4: has(GUEST_TSO4),
        tso6: has(GUEST_TSO6),
        ecn: has(GUEST_ECN),
        uso4: has(GUEST_USO4),
        uso6: has(GUEST_USO6),
    }
}

/// What the driver may leave to the device.
#[must_use]
pub fn host(acked: u64) -> Offloads {
    let csum = acked & CSUM != 0;
    let has = |bit| csum && acked & bit != 0;
    Offloads {
        csum,
        tso4: has(HOST_TSO4),
        tso6: has(HOST_TSO6),
        ecn: has(HOST_ECN),
        uso4: has(HOST_USO),
        uso6: has(HOST_USO),
    }
}

/// What `bits` of `VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET` name: the bits are those of the features.
#[must_use]
pub fn chosen(bits: u64) -> Offloads {
    guest(bits)
}

/// What both have.
#[must_use]
pub fn both(a: Offloads, b: Offloads) -> Offloads {
    Offloads {
        csum: a.csum && b.csum,
        tso4: a.tso4 && b.tso4,
        tso6: a.tso6 && b.tso6,
        ecn: a.ecn && b.ecn,
        uso4: a.uso4 && b.uso4,
        uso6: a.uso6 && b.uso6,
    }
}
