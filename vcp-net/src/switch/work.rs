//! [`Work`]: a burst of frames on its way along the line.

use vcp_core::queue::burst::{Batch, MAX_BURST};

use super::PORTS_MAX;
use super::account::Reason;
use crate::frame::ether::{Ether, Tci};
use crate::frame::{OutFrame, VnetHeader};

/// A port by its number in the process; the uplink of a switch has a number behind all ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub u8);

impl PortId {
    /// The uplink.
    pub const UPLINK: Self = Self(PORTS_MAX as u8);

    /// As an index.
    #[inline]
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// A set of ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortSet(pub u128);

impl PortSet {
    /// With this one as well.
    #[must_use]
    pub fn with(self, port: PortId) -> Self {
        Self(self.0 | 1 << port.0)
    }

    /// Without this one.
    #[must_use]
    pub fn without(self, port: PortId) -> Self {
        Self(self.0 & !(1 << port.0))
    }

    /// Whether it has this one.
    #[must_use]
    pub fn has(self, port: PortId) -> bool {
        self.0 & 1 << port.0 != 0
    }

    /// What both have.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What any has.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many it has.
    #[must_use]
    pub fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// Each of them.
    pub fn iter(self) -> impl Iterator<Item = PortId> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            let next = left.trailing_zeros();
            left &= left.wrapping_sub(1);
            (next < 128).then_some(PortId(next as u8))
        })
    }
}

impl FromIterator<PortId> for PortSet {
    fn from_iter<I: IntoIterator<Item = PortId>>(ports: I) -> Self {
        ports.into_iter().fold(Self::default(), Self::with)
    }
}

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nobody has said.
    Open,
    /// To one port.
    To(PortId),
    /// To all of these, each of which gets it or does not.
    Many(PortSet),
    /// Nowhere.
    Drop(Reason),
}

/// What is known of a frame.
#[derive(Clone, Copy, Debug)]
pub struct Item {
    /// What its sender left to do.
    pub meta: VnetHeader,
    /// Its Ethernet header.
    pub ether: Ether,
    /// Its length.
    pub len_bytes: u32,
    /// The VLAN that it is in; 0: none.
    pub vid: u16,
    /// Where it goes.
    pub fate: Fate,
}

impl Item {
    const NONE: Self = Self {
        meta: VnetHeader { flags: 0, gso_type: 0, hdr_len: 0, gso_size: 0, csum_start: 0, csum_offset: 0 },
        ether: Ether {
            dst: crate::frame::Mac(0),
            src: crate::frame::Mac(0),
            tag: None,
            ethertype: 0,
            len_bytes: 0,
        },
        len_bytes: 0,
        vid: 0,
        fate: Fate::Open,
    };

    /// The tag that the frame had, with the priority that another tag takes over.
    #[must_use]
    pub fn tci(&self) -> Tci {
        self.ether.tag.unwrap_or_default()
    }

    /// Whether an operation still has to look at it.
    #[inline]
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.fate == Fate::Open
    }
}

/// See the module.
#[derive(Debug)]
pub struct Work {
    items: [Item; MAX_BURST],
    len: usize,
}

impl Default for Work {
    fn default() -> Self {
        Self { items: [Item::NONE; MAX_BURST], len: 0 }
    }
}

impl Work {
    /// Begins a burst of `len` frames, [`MAX_BURST`] at most.
    #[inline]
    pub fn begin(&mut self, len: usize) {
        self.len = len.min(MAX_BURST);
    }

    /// The frames.
    #[inline]
    #[must_use]
    pub fn items(&self) -> &[Item] {
        &self.items[..self.len]
    }

    /// The frames.
    #[inline]
    pub fn items_mut(&mut self) -> &mut [Item] {
        &mut self.items[..self.len]
    }

    /// Those that are not decided about.
    #[inline]
    pub fn open(&mut self) -> impl Iterator<Item = &mut Item> {
        self.items[..self.len].iter_mut().filter(|item| item.is_open())
    }
}

/// Where the bytes of a burst are.
#[derive(Clone, Copy, Debug)]
pub enum Frames<'a> {
    /// In chains of a transmit queue, behind headers of so many bytes.
    Ring(&'a Batch, usize),
    /// One frame of an uplink.
    One(&'a OutFrame<'a>),
}

impl<'a> Frames<'a> {
    /// How many there are.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Ring(batch, _) => batch.len(),
            Self::One(_) => 1,
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number `at`, with `meta`.
    #[inline]
    #[must_use]
    pub fn get(&self, at: usize, meta: VnetHeader) -> OutFrame<'a> {
        match *self {
            Self::Ring(batch, header) => OutFrame::whole(meta, batch.frame(at).skip(header)),
            Self::One(frame) => OutFrame { meta, ..*frame },
        }
    }
}
