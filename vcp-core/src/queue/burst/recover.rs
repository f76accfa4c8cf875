//! Where a packed ring stands, from what lies in it: after a crash nobody else knows. It has no index, and a front end
//! that keeps no in-flight log for its network devices (QEMU keeps none) says where the ring stood when it was stopped in
//! good order last, or began.
//!
//! Two bits of each slot tell whose it is and in which lap. A device that uses chains in their order leaves behind: slots
//! used in this lap, then what is available, then slots used in the lap before. So the position is behind the last slot that
//! was used in this lap.
//!
//! Where chains have several slots in the ring (no indirect tables) only the first of them tells, and the others look like
//! chains that wait. So all slots of such a chain get a *mark* when it is given back, in the field for the address, which is unused
//! in a used descriptor (2.8.6) and which no driver reads: how many slots it has, or that it is one of the others. A back end
//! that left no marks may have been another one: a front end that names a place is believed unless that place cannot be, and
//! one that names the beginning (this is what is said after a crash) only if the ring looks like one at its beginning.
//!
//! Where one used element stands for many chains (`VIRTIO_F_IN_ORDER`) there are no marks, and the front end is believed.

use super::super::packed::Place;
use super::split::F_NEXT;

/// Where every ring begins.
const BEGINNING: Place = Place { index: 0, wrap: true };
/// The upper half of a mark: no address, which ends at bit 52 (bit 57 with five levels of page tables).
const MARK: u64 = 0xc4a1_4e53_0000_0000;
/// In it: the wrap counter of the slot's lap. A driver may write a slot's flags before its address.
const WRAP: u64 = 1 << 16;

/// The mark of a chain's slots: of the first one, with their number, which is more than one, or of another one, with 0.
#[inline]
pub(super) fn mark(at: Place, slots: u16) -> u64 {
    MARK | if at.wrap { WRAP } else { 0 } | u64::from(slots)
}

/// What a slot of the ring holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// The field for the address.
    pub(super) addr: u64,
    /// Length, buffer ID and flags.
    pub(super) half: u64,
}

impl Seen {
    pub(super) fn flags(self) -> u16 {
        (self.half >> 48) as u16
    }

    /// Slots of the chain that was used here.
    pub(super) fn slots(self) -> u16 {
        let used = slot(self.flags()) == Slot::Used(self.addr & WRAP != 0);
        if self.is_marked() && used { (self.addr as u16).max(1) } else { 1 }
    }

    fn is_marked(self) -> bool {
        self.addr & !0xffff & !WRAP == MARK
    }

    /// Whether its mark is as old as what the driver wrote.
    fn is_given_back(self) -> bool {
        self.is_marked() && slot(self.flags()) == Slot::Available(self.addr & WRAP != 0)
    }

    /// Where the process died while it gave a chain back: its marks are there and the used element is not. With the slots.
    pub(super) fn cut_in(self, index: u16) -> Option<(Place, u16)> {
        let slots = self.addr as u16;
        (slots != 0 && self.is_given_back()).then_some((Place { index, wrap: self.addr & WRAP != 0 }, slots))
    }
}

/// What a slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// The driver made it available in the lap of this wrap counter.
    Available(bool),
    /// The device used it.
    Used(bool),
}

/// Where a ring goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// The first chain that the device has not used.
    pub(super) next: Place,
    /// A used element that was held back and never published, and the slots of its chain: those behind it are in the ring,
    /// and the driver waits for it.
    pub(super) held_back: Option<(Place, u16)>,
    /// A ring looks so between two steps of its driver; otherwise the driver is in the middle of one.
    pub(super) is_tidy: bool,
}

/// Where a ring with these slots goes on, if its front end says `base`.
pub(super) fn position(seen: &[Seen], base: Place) -> Found {
    let state = |seen: &Seen| match slot(seen.flags()) {
        Slot::Available(wrap) if seen.is_given_back() => Slot::Used(wrap),
        other => other,
    };
    let mut slots: Vec<Slot> = seen.iter().map(state).collect();
    let next = match full(&slots) {
        Some(next) => next,
        None if is_possible(&slots, base) && (base != BEGINNING || is_tidy(&slots, base)) => base,
        None => search(&slots).unwrap_or(base),
    };
    let held_back = held_back(&slots, seen, next);
    if let Some((first, count)) = held_back {
        let size = slots.len() as u16;
        for place in (0..count).map(|n| first.advanced(n, size)) {
            slots[usize::from(place.index)] = Slot::Used(place.wrap);
        }
    }
    let is_tidy = is_possible(&slots, next) && is_tidy(&slots, next);
    Found { next, held_back, is_tidy }
}

fn slot(flags: u16) -> Slot {
    let lap = |wrap| Place { index: 0, wrap };
    for wrap in [false, true] {
        if lap(wrap).is_available(flags) {
            return Slot::Available(wrap);
        }
    }
    Slot::Used(lap(true).is_used(flags))
}

/// The first and the last slot that was used in a lap.
fn used_in(slots: &[Slot], wrap: bool) -> Option<(usize, usize)> {
    let is_it = |slot: &Slot| *slot == Slot::Used(wrap);
    slots.iter().position(is_it).zip(slots.iter().rposition(is_it))
}

/// Whether a device can be at `at`: nothing from there on was used in its lap, and what is available in its lap has no gap
/// before it.
fn is_possible(slots: &[Slot], at: Place) -> bool {
    let index = usize::from(at.index);
    let fresh = used_in(slots, at.wrap).is_none_or(|(_, last)| last < index)
        && used_in(slots, !at.wrap).is_none_or(|(first, _)| first >= index);
    let (before, from) = slots.split_at(index);
    let offered = from.iter().map(|slot| *slot == Slot::Available(at.wrap));
    let mut offered = offered.chain(before.iter().map(|slot| *slot == Slot::Available(!at.wrap)));
    // The iterator goes on behind the first that is not.
    let _ = offered.by_ref().take_while(|it| *it).count();
    fresh && !offered.any(|it| it)
}

/// Whether all that is available is so in the lap that begins at `at`.
fn is_tidy(slots: &[Slot], at: Place) -> bool {
    let (before, from) = slots.split_at(at.index.into());
    !from.contains(&Slot::Available(!at.wrap)) && !before.contains(&Slot::Available(at.wrap))
}

/// Behind the last slot that was used in this lap: all that were used in the other one lie behind it. Slots that are
/// available need not be without gaps: the driver may be putting a chain of several there, the first of them last.
fn search(slots: &[Slot]) -> Option<Place> {
    let size = slots.len() as u16;
    [true, false].into_iter().find_map(|wrap| {
        let (_, last) = used_in(slots, wrap)?;
        let is_this_lap = used_in(slots, !wrap).is_none_or(|(first, _)| first > last);
        is_this_lap.then(|| Place { index: last as u16, wrap }.advanced(1, size))
    })
}

/// Where the laps of a ring meet that the driver has filled.
fn full(slots: &[Slot]) -> Option<Place> {
    let lap = |slot: &Slot| match slot {
        Slot::Available(wrap) | Slot::Used(wrap) => *wrap,
    };
    let first = lap(slots.first()?);
    let meet = slots.iter().position(|slot| lap(slot) != first);
    let all = slots.iter().all(|slot| matches!(slot, Slot::Available(_)));
    let once = meet.is_none_or(|at| slots[at..].iter().all(|slot| lap(slot) != first));
    (all && once).then_some(match meet {
        Some(at) => Place { index: at as u16, wrap: !first },
        None => Place { index: 0, wrap: first },
    })
}

/// The available chain in front of those that were used last before `next`.
fn held_back(slots: &[Slot], seen: &[Seen], next: Place) -> Option<(Place, u16)> {
    let size = slots.len() as u16;
    let back = |at: Place| match at.index.checked_sub(1) {
        Some(index) => Place { index, ..at },
        None => Place { index: size - 1, wrap: !at.wrap },
    };
    let is = |at: Place, slot: fn(bool) -> Slot| slots[usize::from(at.index)] == slot(at.wrap);
    let mut at = back(next);
    let mut used = 0;
    while used < size && is(at, Slot::Used) {
        (at, used) = (back(at), used + 1);
    }
    if used == 0 || used == size || !is(at, Slot::Available) {
        return None;
    }
    let mut count = 1;
    while used + count < size {
        let before = back(at);
        let goes_on = seen[usize::from(before.index)].flags() & F_NEXT != 0;
        if !(goes_on && is(before, Slot::Available)) {
            break;
        }
        (at, count) = (before, count + 1);
    }
    Some((at, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    const AVAIL: u16 = 1 << 7;
    const USED: u16 = 1 << 15;

    /// A ring, the chains in it, and where its two sides are.
    struct Ring {
        seen: Vec<Seen>,
        driver: Place,
        device: Place,
        /// Slots of the chains that wait.
        chains: std::collections::VecDeque<u16>,
    }

    impl Ring {
        fn new(size: u16) -> Self {
            let seen = vec![Seen::default(); size.into()];
            Self { seen, driver: BEGINNING, device: BEGINNING, chains: Default::default() }
        }

        fn size(&self) -> u16 {
            self.seen.len() as u16
        }

        /// Whether a chain of so many slots has room.
        fn fits(&self, slots: u16) -> bool {
            self.chains.iter().sum::<u16>() + slots <= self.size()
        }

        fn set(&mut self, at: Place, addr: u64, flags: u16) {
            self.seen[usize::from(at.index)] = Seen { addr, half: u64::from(flags) << 48 };
        }

        /// All slots of a chain but the first `without`.
        fn write(&mut self, slots: u16, without: u16) {
            for n in without..slots {
                let at = self.driver.advanced(n, self.size());
                let next = if n + 1 < slots { F_NEXT } else { 0 };
                self.set(at, 0x1000, if at.wrap { AVAIL } else { USED } | next);
            }
        }

        fn offer(&mut self, slots: u16) {
            self.write(slots, 0);
            self.driver = self.driver.advanced(slots, self.size());
            self.chains.push_back(slots);
        }

        fn give_back(&mut self) {
            let slots = self.chains.pop_front().unwrap();
            for n in (0..slots).filter(|_| slots > 1) {
                let at = self.device.advanced(n, self.size());
                self.seen[usize::from(at.index)].addr = mark(at, if n == 0 { slots } else { 0 });
            }
            self.seen[usize::from(self.device.index)].half = u64::from(self.device.used_flags()) << 48;
            self.device = self.device.advanced(slots, self.size());
        }
    }

    /// Slots of the `n`-th chain: of one, of several, of both.
    fn of(kind: u16, n: u16) -> u16 {
        match kind {
            0 => 1,
            1 => 3,
            _ => 1 + n * n % 3,
        }
    }

    #[test]
    fn the_position_is_found_wherever_the_ring_stands() {
        for (size, kind) in [1, 2, 3, 4, 7].into_iter().flat_map(|size| [(size, 0), (size, 1), (size, 2)]) {
            for steps in 0..5 * size {
                for waiting in 0..=size {
                    let mut ring = Ring::new(size);
                    for n in 0..steps {
                        let slots = of(kind, n).min(size);
                        ring.offer(slots);
                        ring.give_back();
                    }
                    for n in 0..waiting {
                        let slots = of(kind, n + 1).min(size);
                        if ring.fits(slots) {
                            ring.offer(slots);
                        }
                    }
                    // What the front end knows: the beginning, or the truth.
                    for told in [BEGINNING, ring.device] {
                        let found = position(&ring.seen, told);
                        let expected = Found { next: ring.device, held_back: None, is_tidy: true };
                        let text = format!("size {size}, {steps} used, {waiting} waiting, told {told:?}");
                        assert_eq!(found, expected, "{text}: {:x?}", ring.seen);
                    }
                }
            }
        }
    }

    /// The driver goes on while nobody serves it: its chain is there but for the first slot, which comes last. Either that does
    /// not matter, or it is told that the driver is to be waited for.
    #[test]
    fn a_chain_that_is_just_being_written_does_not_mislead() {
        let mut found_at_once = 0;
        for (size, slots) in [(4, 3), (7, 3), (8, 2), (16, 3)] {
            for steps in 1..4 * size {
                let mut ring = Ring::new(size);
                for n in 0..steps {
                    ring.offer(of(2, n));
                    ring.give_back();
                }
                ring.write(slots, 1);
                let found = position(&ring.seen, BEGINNING);
                let right = found.next == ring.device;
                assert!(right || !found.is_tidy, "size {size}, {steps} used: {:x?}", ring.seen);
                found_at_once += u32::from(right);
            }
        }
        assert!(found_at_once > 100, "{found_at_once}");
    }

    #[test]
    fn an_element_that_was_held_back_is_found() {
        for (size, kind) in [3u16, 4, 8, 12].into_iter().flat_map(|size| [(size, 0), (size, 1), (size, 2)]) {
            for steps in 0..3 * size {
                for burst in 2..=size {
                    let mut ring = Ring::new(size);
                    for n in 0..steps {
                        ring.offer(of(kind, n));
                        ring.give_back();
                    }
                    let mut in_burst = 0;
                    while in_burst < burst && ring.fits(of(kind, in_burst)) {
                        ring.offer(of(kind, in_burst));
                        in_burst += 1;
                    }
                    if in_burst < 2 {
                        continue;
                    }
                    let (first, slots) = (ring.device, ring.chains[0]);
                    let as_it_was = ring.seen.clone();
                    (0..in_burst).for_each(|_| ring.give_back());
                    // All but the first element of the burst, which was not published.
                    for n in 0..slots {
                        let at = usize::from(first.advanced(n, size).index);
                        ring.seen[at] = as_it_was[at];
                    }
                    let found = position(&ring.seen, BEGINNING);
                    let held_back = Some((first, slots));
                    let expected = Found { next: ring.device, held_back, is_tidy: true };
                    let text = format!("size {size}, kind {kind}, {steps} used, {in_burst} at once");
                    assert_eq!(found, expected, "{text}: {:x?}", ring.seen);
                }
            }
        }
    }

    /// Of one that left no records: the front end is believed.
    #[test]
    fn tails_of_chains_do_not_move_a_position_that_is_right() {
        // A chain of three slots was used, one of two waits.
        let flags = [AVAIL | USED, AVAIL, AVAIL, AVAIL, AVAIL, 0, 0, 0];
        let seen = flags.map(|flags: u16| Seen { addr: 0, half: u64::from(flags) << 48 });
        let base = Place { index: 3, wrap: true };
        let expected = Found { next: base, held_back: None, is_tidy: false };
        assert_eq!(position(&seen, base), expected);
    }
}
