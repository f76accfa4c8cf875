//! [`Ring`]: a virtqueue of either format, as the poll server runs it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::burst::{BurstRing, Direction};
use super::flight::Position;
use super::log::{LogArea, LogFormat};
use super::{Chain, PackedQueue, PackedStart, RingAddresses, RingError, SplitQueue, SplitStart, VirtQueue};
use crate::mem::GuestMap;

/// A split or a packed ring, or one of either format that is run in bursts.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // One per queue, for as long as it runs.
pub(crate) enum Ring {
    Split(SplitQueue),
    Packed(PackedQueue),
    /// Of either format. It has nothing in flight, and gives its chains away by [`Ring::burst`] alone.
    Burst(BurstRing),
}

/// How and where a ring starts.
#[derive(Debug)]
pub(crate) struct StartAt<'a> {
    /// Index of the queue, which names its region in the log.
    pub(crate) queue: usize,
    pub(crate) at: RingAddresses,
    /// `SET_VRING_BASE`.
    pub(crate) base: u32,
    pub(crate) packed: bool,
    pub(crate) event_idx: bool,
    pub(crate) indirect: bool,
    pub(crate) in_order: bool,
    /// Whether it is run in bursts, and which way its chains go.
    pub(crate) burst: Option<Direction>,
    pub(crate) log: Option<&'a Arc<LogArea>>,
    /// Whether what the log says of this queue is older than what the front end says.
    pub(crate) forget: bool,
}

impl Ring {
    /// Starts a ring; also the heads in flight, newest first, if the log said what they are.
    pub(crate) fn start(
        start: &StartAt<'_>,
        map: &Arc<GuestMap>,
    ) -> Result<(Self, Option<Vec<u16>>), RingError> {
        if let Some(direction) = start.burst {
            return Ok((Self::Burst(BurstRing::start(start, direction, map)?), None));
        }
        let format = if start.packed { LogFormat::Packed } else { LogFormat::Split };
        let log = start.log.map(|area| area.queue(start.queue, start.at.size, format)).transpose()?;
        let base = start.base;
        if start.packed {
            let from = match log {
                None => PackedStart::Base(base),
                Some(log) if start.forget => PackedStart::Fresh(base, log),
                Some(log) => PackedStart::Recover(base, log),
            };
            let (ring, again) = PackedQueue::start(start.at, start.event_idx, start.indirect, from, map)?;
            return Ok((Self::Packed(ring), again));
        }
        let base = u16::try_from(base).map_err(|_| RingError::Base(base))?;
        let from = match log {
            None => SplitStart::Base(base),
            Some(log) if start.forget => SplitStart::Fresh(base, log),
            Some(log) => SplitStart::Recover(base, log),
        };
        let RingAddresses { size, desc, avail, used } = start.at;
        let misplaced = |addr| move |_| RingError::RingMemory(addr);
        let mut queue = Queue::new(size).map_err(misplaced(desc))?;
        queue.try_set_size(size).map_err(misplaced(desc))?;
        queue.try_set_desc_table_address(GuestAddress(desc)).map_err(misplaced(desc))?;
        queue.try_set_avail_ring_address(GuestAddress(avail)).map_err(misplaced(avail))?;
        queue.try_set_used_ring_address(GuestAddress(used)).map_err(misplaced(used))?;
        queue.set_event_idx(start.event_idx);
        let (ring, again) = SplitQueue::start(queue, start.indirect, from, map)?;
        Ok((Self::Split(ring), again))
    }

    /// The position that `start` describes.
    pub(crate) fn position_at(start: &StartAt<'_>, map: &GuestMap) -> Position {
        let RingAddresses { desc, used, .. } = start.at;
        if start.packed {
            return Position::new(start.base, 0, desc);
        }
        let used = GuestAddress(used.wrapping_add(2));
        Position::new(start.base, u16::from_le(map.load(used, Ordering::Acquire).unwrap_or(0)), desc)
    }

    /// The ring, if it is run in bursts.
    #[inline]
    pub(crate) fn burst(&mut self) -> Option<&mut BurstRing> {
        match self {
            Self::Burst(ring) => Some(ring),
            Self::Split(_) | Self::Packed(_) => None,
        }
    }

    /// Addresses and size.
    pub(crate) fn addresses(&self) -> RingAddresses {
        match self {
            Self::Split(ring) => ring.addresses(),
            Self::Packed(ring) => ring.addresses(),
            Self::Burst(ring) => ring.addresses(),
        }
    }

    /// Where it stands.
    pub(crate) fn position(&self) -> Position {
        match self {
            Self::Split(ring) => Position::of(ring.queue()),
            // Its base has both positions.
            Self::Packed(ring) => Position::new(ring.base(), 0, ring.addresses().desc),
            Self::Burst(ring) => ring.position(),
        }
    }
}

impl VirtQueue for Ring {
    fn take(&mut self, map: &Arc<GuestMap>, chain: &mut Chain) -> Result<bool, RingError> {
        match self {
            Self::Split(ring) => ring.take(map, chain),
            Self::Packed(ring) => ring.take(map, chain),
            Self::Burst(_) => Ok(false),
        }
    }

    fn take_again(&mut self, map: &Arc<GuestMap>, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        match self {
            Self::Split(ring) => ring.take_again(map, head, chain),
            Self::Packed(ring) => ring.take_again(map, head, chain),
            Self::Burst(_) => Err(RingError::Framing("a ring of bursts has nothing in flight")),
        }
    }

    fn put_used(&mut self, map: &GuestMap, head: u16, len_bytes: u32) -> Result<(), RingError> {
        match self {
            Self::Split(ring) => ring.put_used(map, head, len_bytes),
            Self::Packed(ring) => ring.put_used(map, head, len_bytes),
            Self::Burst(_) => Err(RingError::Framing("a ring of bursts has nothing in flight")),
        }
    }

    fn publish(&mut self, map: &GuestMap) -> Result<bool, RingError> {
        match self {
            Self::Split(ring) => ring.publish(map),
            Self::Packed(ring) => ring.publish(map),
            Self::Burst(ring) => Ok(ring.publish()),
        }
    }

    fn arm(&mut self, map: &GuestMap) -> Result<bool, RingError> {
        match self {
            Self::Split(ring) => ring.arm(map),
            Self::Packed(ring) => ring.arm(map),
            Self::Burst(ring) => ring.arm(),
        }
    }

    fn disarm(&mut self, map: &GuestMap) -> Result<(), RingError> {
        match self {
            Self::Split(ring) => ring.disarm(map),
            Self::Packed(ring) => ring.disarm(map),
            Self::Burst(ring) => {
                ring.disarm();
                Ok(())
            }
        }
    }

    fn available(&self, map: &GuestMap) -> u16 {
        match self {
            Self::Split(ring) => ring.available(map),
            Self::Packed(ring) => ring.available(map),
            Self::Burst(ring) => ring.available(),
        }
    }

    fn base(&self) -> u32 {
        match self {
            Self::Split(ring) => ring.base(),
            Self::Packed(ring) => ring.base(),
            Self::Burst(ring) => ring.base(),
        }
    }
}
