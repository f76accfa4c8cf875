//! [`Flight`]: this side's requests without completion.
//!
//! It lies in a memory file of its own, which no peer ever gets but whoever keeps descriptors for this process may: after
//! a death the next incarnation finds there what was asked for and not answered ([`Flight::adopt`]).
//!
//! ```text
//! word 0         number of entries << 32 | most slots of a message
//! entry          order (0: free) | generation << 32 | lane << 8 | slots of the message | the slots, 4 words each
//! ```
//!
//! An entry is written before its message is published and cleared when its completion was dealt with. Between the two
//! it is sent again by whoever goes on. A cookie is entry number and generation: an entry's next request has another one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::layout::{Desc, SLOT_WORDS};
use crate::ring::Words;
use crate::shm::Mapping;
use crate::shm::file::{self, Access, FileError};
use crate::sync::Ordering;

const HEADER_WORDS: usize = 8;

/// A buffer that went out with a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct SentBuf {
    pub(super) region: u16,
    pub(super) index: u32,
}

#[derive(Debug)]
pub(super) struct Flight {
    file: OwnedFd,
    map: Mapping,
    chain_max: usize,
    /// Generation and whether in flight, by entry: private copies of what the log says.
    entries: Box<[Entry]>,
    /// `chain_max` places for each entry.
    bufs: Box<[SentBuf]>,
    free: Vec<u32>,
    order: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    generation: u32,
    busy: bool,
    bufs: u16,
}

impl Flight {
    pub(super) fn new(window: u32, chain_max: u16) -> Result<Self, FileError> {
        let (window, chain_max) = (window as usize, usize::from(chain_max));
        let len = (HEADER_WORDS + window * stride(chain_max)) * 8;
        let (file, map) = file::create("msgq-flight", len.next_multiple_of(4096), Access::Both)?;
        map.words()[0].store((window as u64) << 32 | chain_max as u64, Ordering::Release);
        Ok(Self::on(file, map, window, chain_max))
    }

    fn on(file: OwnedFd, map: Mapping, window: usize, chain_max: usize) -> Self {
        Self {
            file,
            map,
            chain_max,
            entries: vec![Entry::default(); window].into(),
            bufs: vec![SentBuf { region: 0, index: 0 }; window * chain_max].into(),
            free: (0..window as u32).rev().collect(),
            order: 1,
        }
    }

    /// Goes on with the log that a dead incarnation of this very side left with its keeper.
    pub(super) fn adopt(file: OwnedFd) -> Result<Self, FileError> {
        let size = file::size(&file)?;
        file::check(&file, size, Access::Both)?;
        let len = usize::try_from(size).map_err(|_| FileError::Kind(0))?;
        let map = Mapping::read_write(&file, len)
            .map_err(|error| FileError::System { what: "map the flight log", error })?;
        let first = map.words()[0].load(Ordering::Acquire);
        let (window, chain_max) = ((first >> 32) as usize, (first & 0xffff_ffff) as usize);
        let needed =
            window.checked_mul(stride(chain_max)).and_then(|words| (words + HEADER_WORDS).checked_mul(8));
        if window == 0 || chain_max == 0 || chain_max > 0xff || needed.is_none_or(|needed| needed > len) {
            return Err(FileError::Size { found: size, announced: needed.unwrap_or(0) as u64 });
        }
        let mut this = Self::on(file, map, window, chain_max);
        for index in 0..window {
            let at = HEADER_WORDS + index * stride(chain_max);
            let order = this.map.words()[at].load(Ordering::Acquire);
            let meta = this.map.words()[at + 1].load(Ordering::Relaxed);
            this.entries[index] = Entry { generation: (meta >> 32) as u32, busy: order != 0, bufs: 0 };
            this.order = this.order.max(order + 1);
        }
        let entries = &this.entries;
        this.free.retain(|index| !entries[*index as usize].busy);
        Ok(this)
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn window(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn chain_max(&self) -> usize {
        self.chain_max
    }

    #[inline]
    pub(super) fn in_flight(&self) -> u32 {
        (self.entries.len() - self.free.len()) as u32
    }

    pub(super) fn bytes(&self) -> usize {
        self.map.len()
    }

    /// A free entry and its cookie, without taking it.
    #[inline]
    pub(super) fn next(&self) -> Option<(u32, u64)> {
        let index = *self.free.last()?;
        let generation = self.entries[index as usize].generation.wrapping_add(1);
        Some((index, cookie(index, generation)))
    }

    /// Takes the entry that [`next`](Self::next) told, for a message of `count` slots about to be published.
    #[inline]
    pub(super) fn begin(&mut self, lane: u8, count: usize, slot: impl Fn(usize) -> Desc) {
        let index = self.free.pop().expect("next told one") as usize;
        let entry = &mut self.entries[index];
        *entry = Entry { generation: entry.generation.wrapping_add(1), busy: true, bufs: 0 };
        let at = HEADER_WORDS + index * stride(self.chain_max);
        let words = &self.map.words()[at..at + stride(self.chain_max)];
        let meta = u64::from(entry.generation) << 32 | u64::from(lane) << 8 | count as u64;
        words[1].store(meta, Ordering::Relaxed);
        for number in 0..count {
            let first = 2 + number * SLOT_WORDS;
            for (word, value) in words[first..first + SLOT_WORDS].iter().zip(slot(number).to_words(0)) {
                word.store(value, Ordering::Relaxed);
            }
        }
        // Whoever finds the entry after a death finds all of it.
        words[0].store(self.order, Ordering::Release);
        self.order += 1;
    }

    /// Notes a buffer that the message of this entry refers to.
    #[inline]
    pub(super) fn add_buf(&mut self, index: u32, buf: SentBuf) {
        let entry = &mut self.entries[index as usize];
        self.bufs[index as usize * self.chain_max + usize::from(entry.bufs)] = buf;
        entry.bufs += 1;
    }

    /// The entry that a completion is for, if there is one.
    #[inline]
    pub(super) fn find(&self, cookie: u64) -> Option<u32> {
        let index = cookie as u32;
        let entry = self.entries.get(index as usize)?;
        (entry.busy && entry.generation == (cookie >> 32) as u32).then_some(index)
    }

    /// The buffers of an entry.
    #[inline]
    pub(super) fn bufs(&self, index: u32) -> &[SentBuf] {
        let first = index as usize * self.chain_max;
        &self.bufs[first..first + usize::from(self.entries[index as usize].bufs)]
    }

    /// Forgets one buffer of an entry, whose owner goes on using it.
    pub(super) fn take_buf(&mut self, index: u32, which: usize) -> Option<SentBuf> {
        let count = self.bufs(index).len();
        if which >= count {
            return None;
        }
        let first = index as usize * self.chain_max;
        let buf = self.bufs[first + which];
        self.bufs.copy_within(first + which + 1..first + count, first + which);
        self.entries[index as usize].bufs -= 1;
        Some(buf)
    }

    /// The request is over.
    #[inline]
    pub(super) fn end(&mut self, index: u32) {
        let at = HEADER_WORDS + index as usize * stride(self.chain_max);
        self.map.words()[at].store(0, Ordering::Release);
        self.entries[index as usize].busy = false;
        self.free.push(index);
    }

    /// Everything in flight, oldest first: lane and slots.
    pub(super) fn unanswered(&self) -> Vec<(u8, Vec<Desc>)> {
        let mut all = Vec::new();
        for index in 0..self.entries.len() {
            let at = HEADER_WORDS + index * stride(self.chain_max);
            let words = &self.map.words()[at..at + stride(self.chain_max)];
            let order = words[0].load(Ordering::Acquire);
            if order == 0 {
                continue;
            }
            let meta = words[1].load(Ordering::Relaxed);
            let count = ((meta & 0xff) as usize).clamp(1, self.chain_max);
            let slots = (0..count).map(|slot| {
                let load = |word: usize| words[2 + slot * SLOT_WORDS + word].load(Ordering::Relaxed);
                Desc::from_words([load(0), load(1), load(2), load(3)])
            });
            all.push((order, (meta >> 8) as u8, slots.collect::<Vec<_>>()));
        }
        all.sort_by_key(|(order, ..)| *order);
        all.into_iter().map(|(_, lane, slots)| (lane, slots)).collect()
    }
}

const fn stride(chain_max: usize) -> usize {
    2 + chain_max * SLOT_WORDS
}

const fn cookie(index: u32, generation: u32) -> u64 {
    (generation as u64) << 32 | index as u64
}
