//! Frames as bytes and metadata: Ethernet, the virtio-net header, IP and TCP/UDP as far as checksums and segmentation
//! need them. Nothing in here knows ports, rings or tables.

pub mod checksum;
pub mod ether;
pub mod gso;
pub mod layers;
#[cfg(any(test, feature = "fuzzing"))]
pub mod testing;
pub mod vnet;

pub use ether::{Mac, Tci};
pub use vnet::{Gso, Offloads, VnetHeader};

use vcp_core::queue::burst::Frame;

/// Longest frame: the longest IP packet behind an Ethernet header with a VLAN tag.
pub const MAX_FRAME_BYTES: usize = 65535 + 18;

/// A frame on its way out: `prefix`, then `len_bytes` bytes of `frame` behind its first `skip`. The memory is valid
/// during the call that it is given to, no longer.
#[derive(Clone, Copy, Debug)]
pub struct OutFrame<'a> {
    /// What the sender left to do: checksum and segmentation. Offsets count from the first byte of `prefix`.
    pub meta: VnetHeader,
    /// Bytes in place of the frame's first `skip`.
    pub prefix: &'a [u8],
    /// The frame as its sender wrote it.
    pub frame: Frame<'a>,
    /// Bytes of it that `prefix` stands for.
    pub skip: usize,
    /// Bytes of it behind those.
    pub len_bytes: usize,
}

impl<'a> OutFrame<'a> {
    /// A frame as it is.
    #[must_use]
    pub fn whole(meta: VnetHeader, frame: Frame<'a>) -> Self {
        Self { meta, prefix: &[], frame, skip: 0, len_bytes: frame.len_bytes() }
    }

    /// Private bytes.
    #[must_use]
    pub fn of(meta: VnetHeader, bytes: &'a [u8]) -> Self {
        Self::whole(meta, Frame::of(bytes))
    }

    /// All bytes of it, prefix included.
    #[must_use]
    pub fn total_bytes(&self) -> usize {
        self.prefix.len() + self.len_bytes
    }

    /// Copies bytes from `offset` on into `to`; returns how many there were.
    pub fn copy_to(&self, offset: usize, to: &mut [u8]) -> usize {
        let from_prefix = self.prefix.get(offset..).unwrap_or(&[]);
        let first = from_prefix.len().min(to.len());
        to[..first].copy_from_slice(&from_prefix[..first]);
        let at = (offset + first).saturating_sub(self.prefix.len());
        let len = (to.len() - first).min(self.len_bytes.saturating_sub(at));
        first + self.frame.copy_to(self.skip + at, &mut to[first..first + len])
    }

    /// All of it in a vector, for what is not the hot path.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.total_bytes()];
        self.copy_to(0, &mut bytes);
        bytes
    }
}
