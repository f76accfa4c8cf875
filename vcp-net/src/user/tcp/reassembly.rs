//! [`Reassembly`]: what a guest sent behind a gap, until the gap is filled, and what it is told of that (RFC 2018, 2883).
//!
//! A byte lies in the block of its sequence number, so that pieces need no list of their own: there are blocks, and the
//! ranges of numbers that are there. What came first stays: a later copy of the same numbers changes nothing, and each number
//! goes to the socket once. All of it may be thrown away at any time (RFC 2018, 8): nothing here was acknowledged.

use super::before;
use super::pool::{BLOCK_BYTES, Pool};
use super::segment::SACK_MAX;

/// Most ranges: a guest that has more gaps than that has other worries.
const RANGES_MAX: usize = 256;

/// A block of a SACK option; (0, 0): none.
pub type Block = (u32, u32);

/// Numbers that are there. The guest's end has one, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    left: u32,
    right: u32,
    /// When something was added last.
    touched: u32,
}

/// What became of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Bytes that are kept now and were not.
    pub bytes: u32,
    /// Bytes for which there is no room.
    pub refused: u32,
    /// The first numbers that were there already (RFC 2883).
    pub again: Option<Block>,
}

/// See the module.
#[derive(Debug)]
pub struct Reassembly {
    owner: u8,
    /// The number of a block (that of its bytes, without the low bits), and which of the pool it is; in order.
    blocks: Vec<(u32, u32)>,
    /// In order; none touches another.
    ranges: Vec<Range>,
    touches: u32,
    /// The number of the guest's end.
    fin: Option<u32>,
}

fn block_of(seq: u32) -> u32 {
    seq / BLOCK_BYTES as u32
}

impl Reassembly {
    /// Nothing yet, of a connection of this guest.
    #[must_use]
    pub fn new(owner: u8) -> Self {
        Self { owner, blocks: Vec::new(), ranges: Vec::new(), touches: 0, fin: None }
    }

    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Keeps `len` bytes from `seq` on, and the guest's end behind them, if `fin`. `next` is what is expected, before which
    /// nothing may be. `fill` writes the bytes from an offset in the segment on.
    pub fn put(
        &mut self,
        pool: &mut Pool,
        next: u32,
        (seq, len, fin): (u32, u32, bool),
        mut fill: impl FnMut(u32, &mut [u8]),
    ) -> Kept {
        let mut kept = Kept::default();
        let mut end = seq.wrapping_add(len);
        if before(seq, next) {
            return kept;
        }
        // Behind its end a guest has nothing to say.
        match self.fin {
            Some(at) if !before(seq, at) => {
                kept.again = (fin && seq == at).then_some((at, at.wrapping_add(1)));
                return kept;
            }
            Some(at) if before(at, end) => end = at,
            _ => {}
        }
        let last = self.ranges.last().map_or(next, |range| range.right);
        let fin = fin && self.fin.is_none() && !before(end, last);
        // Ranges are looked at in order; those that end before are not concerned.
        let mut at = self.ranges.partition_point(|range| before(range.right, seq));
        let mut seq_now = seq;
        while before(seq_now, end) {
            let there = self.ranges.get(at).filter(|range| before(range.left, end));
            if let Some(range) = there.filter(|range| !before(seq_now, range.left)) {
                let to = if before(end, range.right) { end } else { range.right };
                if before(seq_now, to) {
                    kept.again.get_or_insert((seq_now, to));
                    seq_now = to;
                }
                at += 1;
                continue;
            }
            let to = there.map_or(end, |range| range.left);
            let placed =
                self.place(pool, next, seq_now, to, |from, bytes| fill(from.wrapping_sub(seq), bytes));
            kept.bytes += placed.wrapping_sub(seq_now);
            seq_now = placed;
            if before(placed, to) {
                break;
            }
        }
        kept.refused = end.wrapping_sub(seq_now);
        let whole = seq_now == end;
        let right = seq_now.wrapping_add(u32::from(fin && whole));
        if right != seq && !self.join(seq, right) {
            kept = Kept { refused: kept.refused + kept.bytes, bytes: 0, ..kept };
            self.trim(pool);
            return kept;
        }
        if fin && whole {
            self.fin = Some(end);
        }
        kept
    }

    /// Writes bytes `from .. to` into their blocks; returns up to where there was room.
    fn place(
        &mut self,
        pool: &mut Pool,
        next: u32,
        mut from: u32,
        to: u32,
        mut fill: impl FnMut(u32, &mut [u8]),
    ) -> u32 {
        let base = block_of(next);
        let far = |number: u32| number.wrapping_sub(base) & block_of(u32::MAX);
        while before(from, to) {
            let number = block_of(from);
            let at = self.blocks.partition_point(|&(it, _)| far(it) < far(number));
            let block = match self.blocks.get(at) {
                Some(&(it, block)) if it == number => block,
                _ => {
                    let Some(block) = pool.take(self.owner, self.blocks.len()) else { return from };
                    self.blocks.insert(at, (number, block));
                    block
                }
            };
            let offset = from as usize % BLOCK_BYTES;
            let len = (BLOCK_BYTES - offset).min(to.wrapping_sub(from) as usize);
            fill(from, &mut pool.block_mut(block)[offset..offset + len]);
            from = from.wrapping_add(len as u32);
        }
        from
    }

    /// Notes that `left .. right` is there; false: there are too many ranges.
    fn join(&mut self, mut left: u32, mut right: u32) -> bool {
        let first = self.ranges.partition_point(|range| before(range.right, left));
        let behind = self.ranges.partition_point(|range| !before(right, range.left));
        if first == behind && self.ranges.len() >= RANGES_MAX {
            return false;
        }
        for range in &self.ranges[first..behind] {
            left = if before(range.left, left) { range.left } else { left };
            right = if before(right, range.right) { range.right } else { right };
        }
        self.touches = self.touches.wrapping_add(1);
        let range = Range { left, right, touched: self.touches };
        self.ranges.splice(first..behind, [range]);
        true
    }

    /// Gives back blocks of which no number is there.
    fn trim(&mut self, pool: &mut Pool) {
        let (ranges, owner) = (&self.ranges, self.owner);
        self.blocks.retain(|&(number, block)| {
            let (left, right) = (number * BLOCK_BYTES as u32, (number + 1).wrapping_mul(BLOCK_BYTES as u32));
            let used = ranges.iter().any(|range| before(range.left, right) && before(left, range.right));
            if !used {
                pool.give(owner, block);
            }
            used
        });
    }

    /// Everything before `next` is done with.
    pub fn advance(&mut self, pool: &mut Pool, next: u32) {
        let gone = self.ranges.partition_point(|range| !before(next, range.right));
        self.ranges.drain(..gone);
        if let Some(range) = self.ranges.first_mut().filter(|range| before(range.left, next)) {
            range.left = next;
        }
        let end = block_of(next);
        let half = block_of(u32::MAX) / 2;
        let gone = self.blocks.partition_point(|&(number, _)| {
            number != end && end.wrapping_sub(number) & block_of(u32::MAX) <= half
        });
        for (_, block) in self.blocks.drain(..gone) {
            pool.give(self.owner, block);
        }
        if self.ranges.is_empty() {
            self.clear(pool);
        }
    }

    /// Bytes that can go to the socket.
    #[must_use]
    pub fn ready(&self, next: u32) -> u32 {
        let Some(range) = self.ranges.first().filter(|range| range.left == next) else { return 0 };
        let len = range.right.wrapping_sub(next);
        self.fin.map_or(len, |fin| len.min(fin.wrapping_sub(next)))
    }

    /// Whether the guest's end is what comes next.
    #[must_use]
    pub fn ends(&self, next: u32) -> bool {
        self.fin == Some(next)
    }

    /// Calls `take` with the bytes that can go to the socket, piece by piece, until it says that it has enough.
    pub fn each<'a>(&self, pool: &'a Pool, next: u32, mut take: impl FnMut(&'a [u8]) -> bool) {
        let (mut seq, mut left) = (next, self.ready(next));
        for &(number, block) in &self.blocks {
            if left == 0 || number != block_of(seq) {
                return;
            }
            let offset = seq as usize % BLOCK_BYTES;
            let len = (BLOCK_BYTES - offset).min(left as usize);
            if !take(&pool.block(block)[offset..offset + len]) {
                return;
            }
            seq = seq.wrapping_add(len as u32);
            left -= len as u32;
        }
    }

    /// Behind the last that is there.
    #[must_use]
    pub fn end(&self) -> Option<u32> {
        self.ranges.last().map(|range| range.right)
    }

    /// What the guest is told: what changed last comes first (RFC 2018, 4).
    #[must_use]
    pub fn told(&self, next: u32) -> [Block; SACK_MAX] {
        let mut told = [(0, 0); SACK_MAX];
        let mut ages = [u32::MAX; SACK_MAX];
        for range in self.ranges.iter().filter(|range| before(next, range.left)) {
            let age = self.touches.wrapping_sub(range.touched);
            let Some(at) = ages.iter().position(|&it| age < it) else { continue };
            told[at..].rotate_right(1);
            ages[at..].rotate_right(1);
            (told[at], ages[at]) = ((range.left, range.right), age);
        }
        told
    }

    /// Throws everything away.
    pub fn clear(&mut self, pool: &mut Pool) {
        for (_, block) in self.blocks.drain(..) {
            pool.give(self.owner, block);
        }
        self.ranges.clear();
        self.fin = None;
    }
}

#[cfg(test)]
#[path = "reassembly_test.rs"]
mod tests;
