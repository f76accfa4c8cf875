//! Where a packed ring stands, from what lies in it: after a crash nobody else knows. It has no index, and a front end
//! that keeps no in-flight log for its network devices (QEMU keeps none) says where the ring stood when it was stopped in
//! good order last, or began.
//!
//! Two bits of each slot tell whose it is and in which lap. A device that uses chains in their order leaves behind: slots
//! used in this lap, then what is available, then slots used in the lap before. So a position is one from which a
//! whole lap shows no slot that was used in *its* lap, and the slot before it was.
//!
//! Where chains have several slots in the ring only the first of them tells, and the others look like chains that wait. So a
//! front end that names a place is believed unless that place cannot be. One that names the beginning is believed
//! only if the ring looks like one at its beginning: this is what is said after a crash, and then chains are taken to be of
//! one slot each, as they are in indirect tables (Linux, wherever that is negotiated).

use super::super::packed::Place;

/// Where every ring begins.
const BEGINNING: Place = Place { index: 0, wrap: true };

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
    /// A used element that was held back and never published: those behind it are in the ring, and the driver waits for it.
    pub(super) held_back: Option<Place>,
}

/// Where a ring with these flags goes on, if its front end says `base`.
pub(super) fn position(flags: &[u16], base: Place) -> Found {
    let slots: Vec<Slot> = flags.iter().map(|flags| slot(*flags)).collect();
    let next = match full(&slots) {
        Some(next) => next,
        None if is_possible(&slots, base) && (base != BEGINNING || is_tidy(&slots, base)) => base,
        None => search(&slots).unwrap_or(base),
    };
    Found { next, held_back: held_back(&slots, next) }
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

/// Behind the slot that was used last.
fn search(slots: &[Slot]) -> Option<Place> {
    let size = slots.len() as u16;
    // Behind the last slot that was used in its lap.
    for wrap in [true, false] {
        if let Some((_, last)) = used_in(slots, wrap) {
            let next = Place { index: last as u16, wrap }.advanced(1, size);
            if is_possible(slots, next) {
                return Some(next);
            }
        }
    }
    None
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

/// The available slot in front of those that were used last before `next`.
fn held_back(slots: &[Slot], next: Place) -> Option<Place> {
    let size = slots.len();
    let mut at = next;
    for back in 0..size {
        at = if at.index == 0 {
            Place { index: size as u16 - 1, wrap: !at.wrap }
        } else {
            Place { index: at.index - 1, ..at }
        };
        match slots[usize::from(at.index)] {
            Slot::Used(wrap) if wrap == at.wrap => {}
            Slot::Available(wrap) if wrap == at.wrap && back > 0 => return Some(at),
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const AVAIL: u16 = 1 << 7;
    const USED: u16 = 1 << 15;

    /// A ring of chains of one slot each, and where its two sides are.
    struct Ring {
        flags: Vec<u16>,
        driver: Place,
        device: Place,
    }

    impl Ring {
        fn new(size: u16) -> Self {
            Self { flags: vec![0; size.into()], driver: BEGINNING, device: BEGINNING }
        }

        fn size(&self) -> u16 {
            self.flags.len() as u16
        }

        /// Chains between the two sides.
        fn waiting(&self) -> u16 {
            let lap = if self.driver.wrap == self.device.wrap { 0 } else { self.size() };
            self.driver.index + lap - self.device.index
        }

        fn offer(&mut self) {
            self.flags[usize::from(self.driver.index)] = if self.driver.wrap { AVAIL } else { USED };
            self.driver = self.driver.advanced(1, self.size());
        }

        fn give_back(&mut self) {
            self.flags[usize::from(self.device.index)] = self.device.used_flags();
            self.device = self.device.advanced(1, self.size());
        }
    }

    #[test]
    fn the_position_is_found_wherever_the_ring_stands() {
        for size in [1, 2, 3, 4, 7] {
            for steps in 0..5 * size {
                for waiting in 0..=size {
                    let mut ring = Ring::new(size);
                    for _ in 0..steps {
                        ring.offer();
                        ring.give_back();
                    }
                    (0..waiting).for_each(|_| ring.offer());
                    assert_eq!(ring.waiting(), waiting);
                    // What the front end knows: the beginning, or the truth.
                    for told in [BEGINNING, ring.device] {
                        let found = position(&ring.flags, told);
                        let expected = Found { next: ring.device, held_back: None };
                        let text = format!("size {size}, {steps} used, {waiting} waiting, told {told:?}");
                        assert_eq!(found, expected, "{text}: {:x?}", ring.flags);
                    }
                }
            }
        }
    }

    #[test]
    fn an_element_that_was_held_back_is_found() {
        for size in [3u16, 4, 8] {
            for steps in 0..3 * size {
                for burst in 2..=size {
                    let mut ring = Ring::new(size);
                    for _ in 0..steps {
                        ring.offer();
                        ring.give_back();
                    }
                    let first = ring.device;
                    (0..burst).for_each(|_| ring.offer());
                    (0..burst).for_each(|_| ring.give_back());
                    // All but the first element of the burst, which was not published.
                    ring.flags[usize::from(first.index)] = if first.wrap { AVAIL } else { USED };
                    let found = position(&ring.flags, BEGINNING);
                    let expected = Found { next: ring.device, held_back: Some(first) };
                    assert_eq!(
                        found, expected,
                        "size {size}, {steps} used, {burst} at once: {:x?}",
                        ring.flags
                    );
                }
            }
        }
    }

    #[test]
    fn tails_of_chains_do_not_move_a_position_that_is_right() {
        // A chain of three slots was used, one of two waits.
        let flags = [AVAIL | USED, AVAIL, AVAIL, AVAIL, AVAIL, 0, 0, 0];
        let base = Place { index: 3, wrap: true };
        assert_eq!(position(&flags, base), Found { next: base, held_back: None });
    }
}
