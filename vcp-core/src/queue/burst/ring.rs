//! [`BurstRing`]: a ring of either format, run in bursts.

use std::sync::Arc;

use super::Direction;
use super::batch::{Batch, MAX_BURST};
use super::frame::{Frame, Seg, copy};
use super::memory::{Memory, prefetch, prefetch_write};
use super::packed::PackedBurst;
use super::split::{Dialect, SplitBurst};
use crate::mem::GuestMap;
use crate::queue::flight::Position;
use crate::queue::{RingAddresses, RingError, StartAt};

/// Bytes of a frame that are brought near before it is looked at.
const NEAR_BYTES: usize = 128;
const LINE_BYTES: usize = 64;

#[derive(Debug)]
enum Format {
    Split(SplitBurst),
    Packed(PackedBurst),
}

/// A virtqueue of which chains are taken and given back in bursts; see [the module](super).
#[derive(Debug)]
pub struct BurstRing {
    format: Format,
    memory: Memory,
    direction: Direction,
    /// To the driver: chains that were read and not filled yet.
    ahead: Batch,
    /// The first of them.
    ahead_at: usize,
    /// Whether arming asks for notifications: see [`want`](Self::want).
    wanted: bool,
}

// SAFETY: the pointers in `format` lead into the mapping that `memory` keeps, not to anything bound to a thread.
unsafe impl Send for BurstRing {}

/// What a ring is made of.
#[derive(Clone, Copy, Debug)]
pub struct BurstSetup {
    /// Where it is.
    pub at: RingAddresses,
    /// Where it goes on, as `SET_VRING_BASE` says it.
    pub base: u32,
    /// `VIRTIO_F_RING_PACKED`.
    pub packed: bool,
    /// `VIRTIO_F_EVENT_IDX`.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub indirect: bool,
    /// `VIRTIO_F_IN_ORDER`.
    pub in_order: bool,
    /// Which way its chains go.
    pub direction: Direction,
}

/// A frame for the driver: `header`, `prefix`, and bytes of `frame`, one behind the other.
#[derive(Clone, Copy, Debug)]
pub struct Out<'a> {
    /// The device's header.
    pub header: &'a [u8],
    /// Where in it the number of chains goes, as 16 bits in little-endian order, if it is not one (which is what the header says
    /// there). Without it one chain has to do.
    pub count_at: Option<usize>,
    /// Bytes in place of the frame's first.
    pub prefix: &'a [u8],
    /// The frame.
    pub frame: Frame<'a>,
    /// How many of its bytes are left out at its beginning.
    pub skip: usize,
    /// How many of those behind are taken.
    pub len_bytes: usize,
}

/// What became of a frame for the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It is in the ring, and seen with the next publication.
    Done,
    /// There is no room now.
    Full,
    /// It would not fit if all the room were free (one chain, where only one may be used).
    TooLong,
}

/// Room for bytes in chains that were reserved.
#[derive(Clone, Copy, Debug)]
pub struct Space<'a> {
    batch: &'a Batch,
    from: usize,
    chains: usize,
}

impl Space<'_> {
    /// Calls `f(ptr, len)` for each piece of bytes `offset .. offset + len_bytes` of the room.
    pub(crate) fn for_each(&self, offset: usize, len_bytes: usize, mut f: impl FnMut(*mut u8, usize)) {
        let (mut skip, mut left) = (offset, len_bytes);
        for at in self.from..self.from + self.chains {
            let Some(chain) = self.batch.chain(at) else { return };
            for seg in self.batch.segs(chain) {
                let here = seg.len_bytes as usize;
                if skip >= here {
                    skip -= here;
                    continue;
                }
                let len = left.min(here - skip);
                if len == 0 {
                    return;
                }
                // SAFETY: `skip < here`, so the result stays inside the piece.
                f(unsafe { seg.ptr.add(skip) }, len);
                (skip, left) = (0, left - len);
            }
        }
    }
}

impl BurstRing {
    /// Starts a ring.
    pub(crate) fn start(
        start: &StartAt<'_>,
        direction: Direction,
        map: &Arc<GuestMap>,
    ) -> Result<Self, RingError> {
        let &StartAt { at, base, packed, event_idx, indirect, in_order, .. } = start;
        Self::new(&BurstSetup { at, base, packed, event_idx, indirect, in_order, direction }, map)
    }

    /// A ring where the driver put it, in memory as mapped.
    ///
    /// # Errors
    /// It is not guest memory, not aligned, or cannot start at its base.
    pub fn new(setup: &BurstSetup, map: &Arc<GuestMap>) -> Result<Self, RingError> {
        let memory = Memory::new(map);
        let &BurstSetup { at, base, packed, event_idx, indirect, in_order, direction } = setup;
        let dialect = Dialect { event_idx, indirect, in_order };
        let format = if packed {
            Format::Packed(PackedBurst::start(at, dialect, base, &memory)?)
        } else {
            let base = u16::try_from(base).map_err(|_| RingError::Base(base))?;
            Format::Split(SplitBurst::start(at, dialect, base, &memory)?)
        };
        let wanted = direction == Direction::FromDriver;
        Ok(Self { format, memory, direction, ahead: Batch::default(), ahead_at: 0, wanted })
    }

    /// The front end changed the memory table.
    pub(crate) fn set_map(&mut self, map: &Arc<GuestMap>) -> Result<(), RingError> {
        let memory = Memory::new(map);
        match &mut self.format {
            Format::Split(ring) => ring.locate(&memory)?,
            Format::Packed(ring) => ring.locate(&memory)?,
        }
        self.memory = memory;
        // Pieces in it lead into the old mapping.
        self.ahead.release();
        self.ahead_at = 0;
        Ok(())
    }

    /// Which way its chains go.
    #[must_use]
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Takes up to `max` chains into `batch`, in place of what it has; returns how many. They stay in the ring until
    /// [`give_back`](Self::give_back); the next call takes again what was not given back.
    ///
    /// # Errors
    /// The driver broke a rule.
    #[inline]
    pub fn fetch(&mut self, batch: &mut Batch, max: usize) -> Result<usize, RingError> {
        self.rewind();
        self.fetch_more(batch, max, 0)
    }

    /// What was fetched and not given back is fetched again by the next call.
    #[inline]
    pub fn rewind(&mut self) {
        match &mut self.format {
            Format::Split(ring) => ring.rewind(),
            Format::Packed(ring) => ring.rewind(),
        }
    }

    /// As [`fetch`](Self::fetch), but goes on behind what was fetched already: several batches may be out at once. They
    /// are given back in the order in which they were fetched. The first `unread` bytes of each chain need not come near.
    ///
    /// # Errors
    /// The driver broke a rule.
    #[inline]
    pub fn fetch_more(&mut self, batch: &mut Batch, max: usize, unread: usize) -> Result<usize, RingError> {
        batch.begin(&self.memory);
        let count = match &mut self.format {
            Format::Split(ring) => ring.fetch(&self.memory, batch, max, false)?,
            Format::Packed(ring) => ring.fetch(&self.memory, batch, max, false)?,
        };
        for at in 0..count {
            near(batch, at, unread, NEAR_BYTES, prefetch);
        }
        Ok(count)
    }

    /// Gives the first `count` chains of the batch that was fetched last back to the driver.
    #[inline]
    pub fn give_back(&mut self, batch: &Batch, count: usize) {
        match &mut self.format {
            Format::Split(ring) => ring.give_back(batch, count),
            Format::Packed(ring) => ring.give_back(batch, count),
        }
    }

    /// Reads chains ahead, so that `count` frames find them read and their memory near, as far as `len_bytes` bytes with their
    /// header need it.
    ///
    /// # Errors
    /// The driver broke a rule.
    #[inline]
    pub fn look_ahead(&mut self, count: usize, len_bytes: usize) -> Result<(), RingError> {
        let have = self.ahead.len() - self.ahead_at;
        if have >= count {
            return Ok(());
        }
        if have == 0 {
            self.ahead.begin(&self.memory);
            self.ahead_at = 0;
        } else if self.ahead_at != 0 {
            self.read_again();
        }
        let before = self.ahead.len();
        let wanted = count.min(MAX_BURST).saturating_sub(before - self.ahead_at);
        let read = match &mut self.format {
            Format::Split(ring) => ring.fetch(&self.memory, &mut self.ahead, wanted, true)?,
            Format::Packed(ring) => ring.fetch(&self.memory, &mut self.ahead, wanted, true)?,
        };
        for at in before..before + read {
            near(&self.ahead, at, 0, len_bytes.min(NEAR_BYTES), prefetch_write);
        }
        Ok(())
    }

    /// Forgets what was read ahead; it is read again.
    #[cold]
    fn read_again(&mut self) {
        self.rewind();
        self.ahead.begin(&self.memory);
        self.ahead_at = 0;
    }

    /// Puts a frame into the next chain, or into as many as it needs where `out` allows more than one.
    ///
    /// # Errors
    /// The driver broke a rule.
    #[inline]
    pub fn put(&mut self, out: &Out<'_>) -> Result<Put, RingError> {
        let len_bytes = out.header.len() + out.prefix.len() + out.len_bytes;
        let chains = match self.reserve(len_bytes, out.count_at.is_some())? {
            Ok(chains) => chains,
            Err(put) => return Ok(put),
        };
        if let Some(first) = self.ahead.chain(self.ahead_at)
            && let [seg, ..] = self.ahead.segs(first)
            && seg.len_bytes as usize >= len_bytes
        {
            // The usual case: one piece takes all.
            let mut at = seg.ptr;
            // SAFETY: the piece has room for `len_bytes` bytes, of which these are the first.
            unsafe {
                copy_header(out.header, at);
                at = at.add(out.header.len());
                if !out.prefix.is_empty() {
                    copy(out.prefix.as_ptr(), at, out.prefix.len());
                    at = at.add(out.prefix.len());
                }
            }
            out.frame.for_each(out.skip, out.len_bytes, |ptr, len| {
                // SAFETY: as above; `for_each` gives `len_bytes` bytes at most in all. A hostile driver may make source
                // and room overlap: both lie in shared memory, and `copy_across` does not mind.
                unsafe {
                    copy_across(ptr, at, len);
                    at = at.add(len);
                }
            });
        } else {
            self.scatter(out, chains);
        }
        self.fill(chains, len_bytes);
        Ok(Put::Done)
    }

    /// As in `put`, over several pieces.
    #[cold]
    fn scatter(&mut self, out: &Out<'_>, chains: usize) {
        let space = Space { batch: &self.ahead, from: self.ahead_at, chains };
        let mut offset = 0;
        for frame in [Frame::of(out.header), Frame::of(out.prefix)] {
            offset += gather_into(&space, offset, frame, 0, frame.len_bytes());
        }
        gather_into(&space, offset, out.frame, out.skip, out.len_bytes);
        if let Some(count_at) = out.count_at
            && chains != 1
        {
            self.store_count(count_at, chains);
        }
    }

    /// Writes the number of chains into the header in the room that is reserved.
    #[inline]
    fn store_count(&self, count_at: usize, chains: usize) {
        let space = Space { batch: &self.ahead, from: self.ahead_at, chains };
        let count = (chains as u16).to_le_bytes();
        let mut done = 0;
        space.for_each(count_at, 2, |ptr, len| {
            // SAFETY: pieces of the room, two bytes in all.
            unsafe { copy(count.as_ptr().add(done), ptr, len) };
            done += len;
        });
    }

    /// Reserves chains with room for `len_bytes` bytes: one, or where `merge` allows it as many as it takes. The inner
    /// error says why there are none.
    ///
    /// # Errors
    /// The driver broke a rule.
    #[inline]
    pub fn reserve(&mut self, len_bytes: usize, merge: bool) -> Result<Result<usize, Put>, RingError> {
        if self.ahead_at >= self.ahead.len() {
            self.look_ahead(1, len_bytes)?;
        }
        let Some(first) = self.ahead.chain(self.ahead_at) else { return Ok(Err(Put::Full)) };
        if first.len_bytes as usize >= len_bytes {
            return Ok(Ok(1));
        }
        if !merge {
            return Ok(Err(Put::TooLong));
        }
        self.reserve_more(len_bytes)
    }

    fn reserve_more(&mut self, len_bytes: usize) -> Result<Result<usize, Put>, RingError> {
        loop {
            let mut room = 0;
            for at in self.ahead_at..self.ahead.len() {
                room += self.ahead.chain(at).map_or(0, |chain| chain.len_bytes as usize);
                if room >= len_bytes {
                    return Ok(Ok(at + 1 - self.ahead_at));
                }
            }
            let have = self.ahead.len() - self.ahead_at;
            if have >= MAX_BURST {
                return Ok(Err(Put::TooLong));
            }
            self.look_ahead(MAX_BURST, NEAR_BYTES)?;
            if self.ahead.len() - self.ahead_at <= have {
                // A ring that is smaller than the frame will never have the room.
                let whole = have >= usize::from(self.addresses().size);
                return Ok(Err(if whole { Put::TooLong } else { Put::Full }));
            }
        }
    }

    /// The room that [`reserve`](Self::reserve) found in so many chains.
    #[must_use]
    pub fn space(&self, chains: usize) -> Space<'_> {
        Space { batch: &self.ahead, from: self.ahead_at, chains }
    }

    /// Writes `bytes` to the room in `chains` chains from `offset` on.
    pub fn write(&mut self, chains: usize, offset: usize, bytes: &[u8]) {
        gather_into(&self.space(chains), offset, Frame::of(bytes), 0, bytes.len());
    }

    /// Gives the `chains` reserved chains to the driver, with `len_bytes` bytes in them, and their number in their header
    /// at `count_at`. Chains that are not needed for the bytes stay.
    pub fn commit(&mut self, chains: usize, count_at: Option<usize>, len_bytes: usize) {
        let (mut needed, mut room) = (0, 0);
        while needed < chains && (room < len_bytes || needed == 0) {
            room += self.ahead.chain(self.ahead_at + needed).map_or(0, |chain| chain.len_bytes as usize);
            needed += 1;
        }
        if let Some(count_at) = count_at {
            self.store_count(count_at, needed);
        }
        self.fill(needed, len_bytes);
    }

    /// Gives chains to the driver.
    #[inline]
    fn fill(&mut self, chains: usize, len_bytes: usize) {
        let mut left = len_bytes as u32;
        for at in self.ahead_at..self.ahead_at + chains {
            let Some(&chain) = self.ahead.chain(at) else { return };
            let len = left.min(chain.len_bytes);
            left -= len;
            match &mut self.format {
                Format::Split(ring) => ring.filled(chain.id, len),
                Format::Packed(ring) => ring.filled(chain.id, chain.slots, len),
            }
        }
        self.ahead_at += chains;
    }

    /// Whether the driver's notifications are wanted while the data thread sleeps: of a transmit queue yes, unless
    /// nothing would be taken from it; of a receive queue only while a frame waits for room.
    pub fn want(&mut self, wanted: bool) {
        self.wanted = wanted;
    }

    /// Whether anything was given back since the last publication.
    #[inline]
    pub(crate) fn is_unpublished(&self) -> bool {
        match &self.format {
            Format::Split(ring) => ring.is_unpublished(),
            Format::Packed(ring) => ring.is_unpublished(),
        }
    }

    /// See [`VirtQueue::publish`](crate::queue::VirtQueue::publish).
    #[inline]
    pub fn publish(&mut self) -> bool {
        match &mut self.format {
            Format::Split(ring) => ring.publish(),
            Format::Packed(ring) => ring.publish(),
        }
    }

    /// See [`VirtQueue::arm`](crate::queue::VirtQueue::arm).
    ///
    /// # Errors
    /// None today: the ring was located when it started.
    pub fn arm(&mut self) -> Result<bool, RingError> {
        if !self.wanted {
            return Ok(false);
        }
        let more = self.direction == Direction::ToDriver;
        match &mut self.format {
            Format::Split(ring) => ring.arm(more),
            Format::Packed(ring) => ring.arm(more),
        }
    }

    /// See [`VirtQueue::disarm`](crate::queue::VirtQueue::disarm).
    pub(crate) fn disarm(&mut self) {
        match &self.format {
            Format::Split(ring) => ring.disarm(),
            Format::Packed(ring) => ring.disarm(),
        }
    }

    /// Chains that the driver made available and that were not given back; 1 for any number in a packed ring.
    #[must_use]
    pub fn available(&self) -> u16 {
        match &self.format {
            Format::Split(ring) => ring.available(),
            Format::Packed(ring) => ring.available(),
        }
    }

    /// Addresses and size.
    #[must_use]
    pub fn addresses(&self) -> RingAddresses {
        match &self.format {
            Format::Split(ring) => ring.addresses(),
            Format::Packed(ring) => ring.addresses(),
        }
    }

    /// See [`VirtQueue::base`](crate::queue::VirtQueue::base).
    #[must_use]
    pub fn base(&self) -> u32 {
        match &self.format {
            Format::Split(ring) => ring.base().into(),
            Format::Packed(ring) => ring.base(),
        }
    }

    /// Whether it is where every ring begins: no process served it before this one, as far as can be told.
    pub(crate) fn is_fresh(&self) -> bool {
        self.base() == if matches!(self.format, Format::Packed(_)) { 0x8000_8000 } else { 0 }
    }

    pub(crate) fn position(&self) -> Position {
        match &self.format {
            Format::Split(ring) => {
                Position::new(ring.base().into(), ring.used_index(), ring.addresses().desc)
            }
            Format::Packed(ring) => Position::new(ring.base(), 0, ring.addresses().desc),
        }
    }
}

/// Brings the first `bytes` bytes of a chain near, but for the `skip` before them: a line that nobody looks at is not worth
/// its way from another processor.
#[inline]
fn near(batch: &Batch, at: usize, skip: usize, bytes: usize, fetch: impl Fn(*const u8)) {
    let Some(chain) = batch.chain(at) else { return };
    let [Seg { ptr, len_bytes }, ..] = *batch.segs(chain) else { return };
    let ptr = ptr.wrapping_add(skip);
    let len = (len_bytes as usize).saturating_sub(skip).min(bytes);
    let first = ptr as usize % LINE_BYTES;
    let mut line = 0;
    while line < first + len {
        fetch(ptr.wrapping_sub(first).wrapping_add(line));
        line += LINE_BYTES;
    }
}

/// Copies `len_bytes` bytes of `frame` from `skip` on into the room from `offset` on; returns how many.
fn gather_into(space: &Space<'_>, offset: usize, frame: Frame<'_>, skip: usize, len_bytes: usize) -> usize {
    let mut done = 0;
    frame.for_each(skip, len_bytes, |from, len| {
        let mut copied = 0;
        space.for_each(offset + done, len, |to, part| {
            // SAFETY: both are pieces of checked ranges of at least `part` bytes.
            unsafe { copy_across(from.add(copied), to, part) };
            copied += part;
        });
        done += copied;
    });
    done
}

/// Copies the header in front of a frame: 12 bytes or 10, without a call.
///
/// # Safety
/// `to` is valid for writes of `from.len()` bytes. Others may write to it meanwhile.
#[inline(always)]
unsafe fn copy_header(from: &[u8], to: *mut u8) {
    // SAFETY: the caller's promise; each store is as long as what was taken from the slice.
    unsafe {
        if let Some((&word, rest)) = from.split_first_chunk::<8>() {
            to.cast::<[u8; 8]>().write_unaligned(word);
            let to = to.add(8);
            match *rest {
                [a, b, c, d] => return to.cast::<[u8; 4]>().write_unaligned([a, b, c, d]),
                [a, b] => return to.cast::<[u8; 2]>().write_unaligned([a, b]),
                _ => {}
            }
        }
        copy(from.as_ptr(), to, from.len());
    }
}

/// Copies from one piece of memory to another, which may overlap where a hostile driver arranged that.
///
/// # Safety
/// `from` is valid for reads and `to` for writes of `len` bytes. Others may write to either meanwhile.
#[inline(always)]
unsafe fn copy_across(from: *const u8, to: *mut u8, len: usize) {
    if !(16..=256).contains(&len) {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy(from, to, len) };
        return;
    }
    // Short frames: 16 bytes at a time without a call, the last 16 overlapping those before.
    let mut at = 0;
    while at + 16 <= len {
        // SAFETY: `at + 16 <= len`.
        unsafe {
            let word = from.add(at).cast::<[u8; 16]>().read_unaligned();
            to.add(at).cast::<[u8; 16]>().write_unaligned(word);
        }
        at += 16;
    }
    if at < len {
        // SAFETY: `len >= 16`.
        unsafe {
            let word = from.add(len - 16).cast::<[u8; 16]>().read_unaligned();
            to.add(len - 16).cast::<[u8; 16]>().write_unaligned(word);
        }
    }
}
