//! How long chains waited in their ring before they were taken.
//!
//! A driver does not tell when it made a chain available, and to look at the clock for each would cost more than it
//! tells. So once per pass, where something stays behind in a ring, the number of chains there is noted with the time of
//! the pass; a chain that is taken later has waited since the first note that counted it. One that is taken in the pass
//! that finds it has waited for 0 ns. A note can be late by a pass, never early: what is told is a lower bound.

use std::time::Instant;

/// Notes kept of a queue. While there are none to spare, new arrivals are counted with a later note.
const NOTES: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Note {
    /// Chains up to this number (counted from the first one ever taken) were there.
    up_to: u64,
    at: Instant,
}

/// Of one queue.
#[derive(Clone, Debug, Default)]
struct Backlog {
    taken: u64,
    /// Oldest first.
    notes: [Option<Note>; NOTES],
    used: usize,
}

/// Of all queues of a device.
#[derive(Debug)]
pub(super) struct Backlogs(Vec<Backlog>);

impl Backlogs {
    pub(super) fn new(queues: u16) -> Self {
        Self(vec![Backlog::default(); queues.into()])
    }

    /// All rings start anew.
    pub(super) fn clear(&mut self) {
        self.0.iter_mut().for_each(|backlog| backlog.used = 0);
    }

    /// A chain was taken; returns how long it waited, in nanoseconds.
    pub(super) fn took(&mut self, queue: u16, now: Instant) -> u64 {
        let Some(backlog) = self.0.get_mut(usize::from(queue)) else { return 0 };
        backlog.taken += 1;
        let old =
            backlog.notes[..backlog.used].iter().flatten().take_while(|n| n.up_to < backlog.taken).count();
        if old > 0 {
            backlog.notes.copy_within(old..backlog.used, 0);
            backlog.used -= old;
        }
        match backlog.notes[..backlog.used].first() {
            Some(Some(note)) => {
                u64::try_from(now.saturating_duration_since(note.at).as_nanos()).unwrap_or(u64::MAX)
            }
            _ => 0,
        }
    }

    /// So many chains stay behind in this pass.
    pub(super) fn left(&mut self, queue: u16, chains: u16, now: Instant) {
        let Some(backlog) = self.0.get_mut(usize::from(queue)) else { return };
        if chains == 0 {
            backlog.used = 0;
            return;
        }
        let up_to = backlog.taken + u64::from(chains);
        let known = match backlog.notes[..backlog.used].last() {
            Some(Some(note)) => note.up_to,
            _ => 0,
        };
        if up_to > known && backlog.used < NOTES {
            backlog.notes[backlog.used] = Some(Note { up_to, at: now });
            backlog.used += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_chain_has_waited_since_it_was_first_seen() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut backlogs = Backlogs::new(2);
        assert_eq!(backlogs.took(0, at(0)), 0, "taken as soon as seen");
        backlogs.left(0, 2, at(1));
        backlogs.left(0, 3, at(2));
        backlogs.left(0, 3, at(3));
        backlogs.left(1, 1, at(3));
        let waits: Vec<_> = (0..4).map(|_| backlogs.took(0, at(10)) / 1_000_000).collect();
        assert_eq!(waits, [9, 9, 8, 0]);
        assert_eq!(backlogs.took(1, at(10)) / 1_000_000, 7);
        backlogs.left(0, 5, at(11));
        backlogs.left(0, 0, at(12));
        assert_eq!(backlogs.took(0, at(13)), 0, "the ring was empty in between");
        backlogs.left(0, 5, at(11));
        backlogs.clear();
        assert_eq!(backlogs.took(0, at(13)), 0);
    }

    #[test]
    fn a_long_queue_costs_no_more_than_its_notes() {
        let start = Instant::now();
        let mut backlogs = Backlogs::new(1);
        for ms in 0..100 {
            backlogs.left(0, ms + 1, start + Duration::from_millis(ms.into()));
        }
        let now = start + Duration::from_millis(100);
        let waits: Vec<_> = (0..100).map(|_| backlogs.took(0, now) / 1_000_000).collect();
        assert_eq!(waits[..8], [100, 99, 98, 97, 96, 95, 94, 93]);
        assert!(waits[8..].iter().all(|&wait| wait == 0));
    }
}
