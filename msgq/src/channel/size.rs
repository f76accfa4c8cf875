//! The used part of a ring: fewer slots that stay in a cache, or more that take a burst. The mechanism is here; when to use
//! it is a [`Sizer`]'s business.

use super::{Channel, Error, SendError};

/// What a [`Sizer`] goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingUse {
    /// Slots in use now, as a power of two.
    pub log2: u8,
    /// Fewest possible, as a power of two.
    pub min_log2: u8,
    /// Most possible, as a power of two.
    pub max_log2: u8,
    /// Messages published and not released, as last seen.
    pub occupied: u64,
    /// Number of messages published so far.
    pub published: u64,
    /// Times the ring was full so far.
    pub full: u64,
}

/// Decides how many slots of a ring are used.
pub trait Sizer {
    /// The size to change to, as a power of two; `None` to leave it.
    fn size(&mut self, ring: &RingUse) -> Option<u8>;
}

/// Always so many slots.
#[derive(Clone, Copy, Debug)]
pub struct Fixed(
    /// As a power of two.
    pub u8,
);

impl Sizer for Fixed {
    fn size(&mut self, ring: &RingUse) -> Option<u8> {
        let wanted = self.0.clamp(ring.min_log2, ring.max_log2);
        (wanted != ring.log2).then_some(wanted)
    }
}

impl Channel {
    /// How the ring of a lane is used.
    #[must_use]
    pub fn ring_use(&self, lane: u8) -> Option<RingUse> {
        let tx = &self.lanes.get(usize::from(lane))?.tx;
        Some(RingUse {
            log2: tx.slots().trailing_zeros() as u8,
            min_log2: self.agreed.min_log2(self.agreed.window_theirs),
            max_log2: self.agreed.log2_mine,
            occupied: tx.tail() - tx.head(),
            published: tx.tail(),
            full: self.stats.full,
        })
    }

    /// Asks a policy, and changes this side's ring of a lane if it says so. True if it was changed; a ring that is too full
    /// now is left, to be asked again later.
    ///
    /// # Errors
    /// There is no such lane, or the channel does no more.
    pub fn resize(&mut self, lane: u8, policy: &mut dyn Sizer) -> Result<bool, SendError> {
        let ring = self.ring_use(lane).ok_or(SendError::Lane(lane))?;
        if let Some(violation) = self.failed {
            return Err(Error::Violation(violation).into());
        }
        let Some(log2) = policy.size(&ring) else { return Ok(false) };
        let reserve = u64::from(self.agreed.window_theirs);
        let tx = &mut self.lanes[usize::from(lane)].tx;
        // The change takes a slot, which must not be one of the completions' share.
        let result = match tx.refresh().and_then(|()| tx.free(reserve + 1)) {
            Ok(free) if free > reserve => {
                let slots = tx.slots().min(1 << log2.min(63));
                // After it, the share has to be there in the smaller ring, too.
                if tx.tail() - tx.head() + 1 + reserve > slots { Ok(false) } else { tx.resize(log2) }
            }
            Ok(_) => Ok(false),
            Err(violation) => Err(violation),
        };
        match result {
            Ok(changed) => {
                self.stats.resizes += u64::from(changed);
                Ok(changed)
            }
            Err(violation) => Err(self.fail(violation).into()),
        }
    }
}
