//! [`Scoreboard`]: what the guest has of what it was sent, behind the first gap, as its SACK blocks say (RFC 6675, 3).

use super::before;

/// Most ranges that are remembered. Others are repeated for nothing.
const RANGES_MAX: usize = 64;

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Scoreboard {
    /// In order; none touches another.
    ranges: Vec<(u32, u32)>,
}

impl Scoreboard {
    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.ranges.clear();
    }

    /// Bytes that the guest has.
    pub(super) fn bytes(&self) -> u32 {
        self.ranges.iter().map(|&(left, right)| right.wrapping_sub(left)).sum()
    }

    /// Behind the last of them.
    pub(super) fn highest(&self) -> Option<u32> {
        self.ranges.last().map(|&(_, right)| right)
    }

    /// A block that the guest tells of; whether it says anything new. What is not between `una` and `max` says nothing, a
    /// copy that came twice included (RFC 2883).
    pub(super) fn add(&mut self, (mut left, mut right): (u32, u32), una: u32, max: u32) -> bool {
        if !before(una, left) || !before(left, right) || before(max, right) {
            return false;
        }
        let first = self.ranges.partition_point(|range| before(range.1, left));
        let behind = self.ranges.partition_point(|range| !before(right, range.0));
        let there = &self.ranges[first..behind];
        if there.first().is_some_and(|range| !before(left, range.0) && !before(range.1, right))
            || (first == behind && self.ranges.len() >= RANGES_MAX)
        {
            return false;
        }
        for range in there {
            left = if before(range.0, left) { range.0 } else { left };
            right = if before(right, range.1) { range.1 } else { right };
        }
        self.ranges.splice(first..behind, [(left, right)]);
        true
    }

    /// The guest acknowledged everything before `una`. One that does not acknowledge what follows, which it said that it
    /// had, has thrown it away (RFC 2018, 8): then all that it said counts for nothing.
    pub(super) fn advance(&mut self, una: u32) {
        let gone = self.ranges.partition_point(|range| !before(una, range.1));
        self.ranges.drain(..gone);
        if self.ranges.first().is_some_and(|range| !before(una, range.0)) {
            self.clear();
        }
    }

    /// The first gap from `from` on that has something behind it.
    pub(super) fn hole(&self, mut from: u32) -> Option<(u32, u32)> {
        for &(left, right) in &self.ranges {
            if before(from, left) {
                return Some((from, left));
            }
            if before(from, right) {
                from = right;
            }
        }
        None
    }

    /// `seq`, or what follows the range that it is in.
    pub(super) fn skip(&self, seq: u32) -> u32 {
        let range = self.ranges.iter().find(|range| !before(seq, range.0) && before(seq, range.1));
        range.map_or(seq, |range| range.1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blocks_in_any_order_are_a_set_of_numbers(
            start: u32, blocks in proptest::collection::vec((0u32..400, 0u32..60), 0..40), cut in 0u32..400,
        ) {
            let seq = |at: u32| start.wrapping_add(at);
            let (mut board, mut model) = (Scoreboard::default(), [false; 400]);
            for (left, len) in blocks {
                let right = left + len;
                let news = (left..right.min(400)).any(|at| !model[at as usize]);
                let sound = left > 0 && len > 0 && right < 400;
                prop_assert_eq!(board.add((seq(left), seq(right)), start, seq(399)), sound && news);
                if sound {
                    model[left as usize..right as usize].fill(true);
                }
            }
            prop_assert_eq!(board.bytes() as usize, model.iter().filter(|it| **it).count());
            let highest = model.iter().rposition(|it| *it).map(|at| seq(at as u32 + 1));
            prop_assert_eq!(board.highest(), highest);
            let hole = (cut..400).find(|&at| !model[at as usize]).filter(|&at| model[at as usize..].contains(&true));
            prop_assert_eq!(board.hole(seq(cut)).map(|it| it.0), hole.map(seq));
            prop_assert_eq!(board.skip(seq(cut)), seq((cut..400).find(|&at| !model[at as usize]).unwrap_or(400)));
            board.advance(seq(cut));
            let kept = model[cut as usize..].iter().filter(|it| **it).count();
            let reneged = cut < 400 && (model[cut as usize]);
            prop_assert_eq!(board.bytes() as usize, if reneged { 0 } else { kept });
        }
    }
}
