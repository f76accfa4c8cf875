//! The configuration space (VIRTIO 1.2, 5.1.4).

use super::PortSpec;

/// `VIRTIO_NET_S_LINK_UP` and `_ANNOUNCE`.
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;
/// Bytes of the part that is known here: up to `duplex`.
const BYTES: usize = 17;
/// A speed or duplex that is not known.
const UNKNOWN_SPEED: u32 = 0xffff_ffff;
const UNKNOWN_DUPLEX: u8 = 0xff;

/// Fills `out` from `offset` on; what lies behind the end is 0.
pub(super) fn read(spec: &PortSpec, announces: bool, offset: u32, out: &mut [u8]) {
    let mut space = [0; BYTES];
    space[..6].copy_from_slice(&spec.mac.unwrap_or_default().bytes());
    let status = if spec.link { LINK_UP } else { 0 } | if announces { ANNOUNCE } else { 0 };
    space[6..8].copy_from_slice(&status.to_le_bytes());
    space[8..10].copy_from_slice(&spec.pairs.to_le_bytes());
    space[10..12].copy_from_slice(&spec.mtu.unwrap_or(0).to_le_bytes());
    space[12..16].copy_from_slice(&UNKNOWN_SPEED.to_le_bytes());
    space[16] = UNKNOWN_DUPLEX;
    for (at, byte) in out.iter_mut().enumerate() {
        *byte = (offset as usize).checked_add(at).and_then(|at| space.get(at)).copied().unwrap_or(0);
    }
}
