//! [`Held`]: the peer's requests that this side has received and not completed.

use crate::region::Segment;

/// One request of the peer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Entry {
    generation: u32,
    busy: bool,
    pub(super) cookie: u64,
    pub(super) lane: u8,
    segments: u16,
}

#[derive(Debug)]
pub(super) struct Held {
    entries: Box<[Entry]>,
    chain_max: usize,
    segments: Box<[Segment]>,
    free: Vec<u32>,
}

impl Held {
    pub(super) fn new(window: u32, chain_max: u16) -> Self {
        let (window, chain_max) = (window as usize, usize::from(chain_max));
        Self {
            entries: vec![Entry::default(); window].into(),
            chain_max,
            segments: vec![Segment::default(); window * chain_max].into(),
            free: (0..window as u32).rev().collect(),
        }
    }

    /// Whether it is large enough for an epoch with these limits.
    pub(super) fn takes(&self, window: u32, chain_max: u16) -> bool {
        self.entries.len() >= window as usize && self.chain_max >= usize::from(chain_max)
    }

    /// Most that there can be.
    pub(super) fn places(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn count(&self) -> u32 {
        (self.entries.len() - self.free.len()) as u32
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.entries) + size_of_val(&*self.segments) + self.free.capacity() * 4
    }

    /// As [`insert`](Self::insert), of a request with one segment at most.
    #[inline(always)]
    pub(super) fn insert_one(
        &mut self,
        cookie: u64,
        lane: u8,
        segment: Option<Segment>,
    ) -> Option<(u32, u32)> {
        let index = self.free.pop()?;
        let entry = &mut self.entries[index as usize];
        let generation = entry.generation.wrapping_add(1);
        *entry = Entry { generation, busy: true, cookie, lane, segments: segment.is_some().into() };
        if let Some(segment) = segment {
            self.segments[index as usize * self.chain_max] = segment;
        }
        Some((index, generation))
    }

    /// Keeps a request; `None` if the peer has too many.
    #[inline(never)]
    pub(super) fn insert(&mut self, cookie: u64, lane: u8, segments: &[Segment]) -> Option<(u32, u32)> {
        let index = self.free.pop()?;
        let entry = &mut self.entries[index as usize];
        let generation = entry.generation.wrapping_add(1);
        *entry = Entry { generation, busy: true, cookie, lane, segments: segments.len() as u16 };
        let first = index as usize * self.chain_max;
        self.segments[first..first + segments.len()].copy_from_slice(segments);
        Some((index, generation))
    }

    #[inline]
    fn get(&self, index: u32, generation: u32) -> Option<&Entry> {
        let entry = self.entries.get(index as usize)?;
        (entry.busy && entry.generation == generation).then_some(entry)
    }

    /// What a request refers to.
    #[inline]
    pub(super) fn segments(&self, index: u32, generation: u32) -> Option<&[Segment]> {
        let entry = self.get(index, generation)?;
        let first = index as usize * self.chain_max;
        Some(&self.segments[first..first + usize::from(entry.segments)])
    }

    /// Cookie and lane to complete it on; `None` if nobody waits for it.
    #[inline]
    pub(super) fn answer(&self, index: u32, generation: u32) -> Option<(u64, u8)> {
        self.get(index, generation).map(|entry| (entry.cookie, entry.lane))
    }

    #[inline]
    pub(super) fn end(&mut self, index: u32) {
        self.entries[index as usize].busy = false;
        self.free.push(index);
    }

    /// Whether a request with this cookie is here: one that was sent again.
    pub(super) fn has(&self, cookie: u64) -> bool {
        self.entries.iter().any(|entry| entry.busy && entry.cookie == cookie)
    }

    /// Nobody waits for what is here any more: answers to it are refused as stale from here on.
    pub(super) fn orphan(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.busy = false);
        self.free = (0..self.entries.len() as u32).rev().collect();
    }
}
