//! The log of a packed ring: `QueueRegionPacked`.
//!
//! ```text
//! 0 features u64 | 8 version u16 | 10 desc_num u16 | 12 free_head u16 | 14 old_free_head u16
//! 16 used_idx u16 | 18 old_used_idx u16 | 20 used_wrap u8 | 21 old_used_wrap u8 | 32 entries
//! entry: 0 inflight u8 | 2 next u16 | 4 last u16 | 6 num u16 | 8 counter u64 | 16 id u16 | 18 flags u16 | 20 len u32 | 24 addr u64
//! ```
//!
//! The pairs of a value and its old one are what makes a step complete: a chain is taken with the store of `free_head`
//! and `old_free_head`, a batch is given back with the store of the ring's flags. Both heads are one aligned 32-bit
//! store, both positions with their wrap counters one of 64 bits, so that none of them is ever found half written.
//!
//! Beyond the specification's text: a batch of exactly one lap leaves `used_idx` as it was and only turns the wrap
//! counter, so that both are compared; and the place where the available descriptors go on is the used position plus the
//! slots in flight, because no front end knows it after a crash.

use super::super::ledger::{Entry, Ledger, PackedDesc};
use super::super::packed::Place;
use super::{LogError, QueueLog};
use crate::queue::RingError;

pub(super) const HEADER: usize = 32;
pub(super) const ENTRY: usize = 32;
const FREE_HEAD: usize = 12;
const FREE_HEADS: usize = 12;
const POSITIONS: usize = 16;
const INFLIGHT: usize = 0;
const NEXT: usize = 2;
const LAST: usize = 4;
const NUM: usize = 6;
const COUNTER: usize = 8;
/// `id`, `flags` and `len` as one word.
const ID_FLAGS_LEN: usize = 16;
const ADDR: usize = 24;

fn entry(at: u16, field: usize) -> usize {
    HEADER + ENTRY * usize::from(at) + field
}

/// Two neighbouring 16-bit fields as one store.
fn pair(first: u16, second: u16) -> u32 {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// `used_idx`, `old_used_idx` and their wrap counters as one store.
fn positions(used: Place, old: Place) -> u64 {
    let ([a, b], [c, d]) = (used.index.to_ne_bytes(), old.index.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, used.wrap.into(), old.wrap.into(), 0, 0])
}

/// What a log said of the ring it belongs to.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) log: PackedLog,
    pub(crate) ledger: Ledger,
    pub(crate) used: Place,
    /// Heads in flight, newest first.
    pub(crate) heads: Vec<u16>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct PackedLog {
    log: QueueLog,
    counter: u64,
    /// Where the used position was at the last publication.
    old: Place,
}

impl PackedLog {
    /// A region without anything in flight, for a ring that goes on at `used`; and its ledger.
    pub(crate) fn fresh(log: QueueLog, used: Place) -> (Self, Ledger) {
        let ledger = Ledger::new(log.desc_num);
        log.initialise(|log| {
            for (at, state) in (0..log.desc_num).zip(&ledger.entries) {
                log.put(entry(at, INFLIGHT), 0u8);
                log.put(entry(at, NEXT), state.next);
            }
            log.put(FREE_HEADS, pair(0, 0));
            log.put(POSITIONS, positions(used, used));
        });
        (Self { log, counter: 0, old: used }, ledger)
    }

    /// Goes on where another process stopped; the region itself if it is not in use. `flags` reads the flags in a slot
    /// of the ring, which has `size` slots.
    pub(crate) fn recover(
        log: QueueLog,
        size: u16,
        flags: impl Fn(u16) -> Result<u16, RingError>,
    ) -> Result<Result<Found, QueueLog>, RingError> {
        if !log.in_use()? {
            return Ok(Err(log));
        }
        let raw: [u8; 8] = log.get::<u64>(POSITIONS).to_ne_bytes();
        let place = |index: [u8; 2], wrap: u8| {
            let place = Place { index: u16::from_ne_bytes(index), wrap: wrap == 1 };
            let valid = place.index < size && wrap <= 1;
            if valid { Ok(place) } else { Err(LogError::Contradiction("the size of the ring")) }
        };
        let (new, old) = (place([raw[0], raw[1]], raw[4])?, place([raw[2], raw[3]], raw[5])?);
        let raw: [u8; 4] = log.get::<u32>(FREE_HEADS).to_ne_bytes();
        let (free, old_free) = (u16::from_ne_bytes([raw[0], raw[1]]), u16::from_ne_bytes([raw[2], raw[3]]));
        // The batch was published if its first slot is not the driver's any more.
        let published = new != old && !old.is_available(flags(old.index)?);
        let (free, used) = if published { (free, new) } else { (old_free, old) };
        let (ledger, mut inflight) = read(&log, free, size)?;
        // The heads first: with the new positions alone a second crash would find the old heads.
        log.put(FREE_HEADS, pair(free, free));
        log.put(POSITIONS, positions(used, used));
        inflight.sort_unstable_by(|a, b| b.cmp(a));
        let counter = inflight.first().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let heads = inflight.into_iter().map(|(_, head)| head).collect();
        Ok(Ok(Found { log: Self { log, counter, old: used }, ledger, used, heads }))
    }

    /// The chain at `head` of the ledger was taken and is about to be submitted.
    pub(crate) fn taken(&mut self, ledger: &Ledger, head: u16) {
        let (log, Some(first)) = (&self.log, ledger.get(head)) else { return };
        log.put(entry(head, NUM), first.num);
        log.put(entry(head, LAST), first.last);
        log.put(entry(head, COUNTER), self.counter);
        self.counter = self.counter.wrapping_add(1);
        log.put(entry(head, INFLIGHT), 1u8);
        let mut at = head;
        for desc in ledger.chain(head) {
            let ([a, b], [c, d]) = (desc.id.to_ne_bytes(), desc.flags.to_ne_bytes());
            let [e, f, g, h] = desc.len_bytes.to_ne_bytes();
            log.put(entry(at, ADDR), desc.addr);
            log.put(entry(at, ID_FLAGS_LEN), u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
            at = ledger.get(at).map_or(at, |state| state.next);
        }
        // From here on it is in flight.
        log.put(FREE_HEADS, pair(ledger.free_head, ledger.free_head));
    }

    /// The chains of `batch`, free in the ledger already, will be published next; the used position is `used` then.
    pub(crate) fn completing(&mut self, ledger: &Ledger, batch: &[u16], used: Place) {
        for last in batch.iter().filter_map(|&head| Some(ledger.get(head)?.last)) {
            let Some(state) = ledger.get(last) else { continue };
            self.log.put(entry(last, NEXT), state.next);
        }
        self.log.put(FREE_HEAD, ledger.free_head);
        self.log.put(POSITIONS, positions(used, self.old));
    }

    /// They are published. A full fence stands between that store and this call.
    pub(crate) fn completed(&mut self, ledger: &Ledger, batch: &[u16], used: Place) {
        for &head in batch {
            self.log.put(entry(head, INFLIGHT), 0u8);
        }
        self.log.put(FREE_HEADS, pair(ledger.free_head, ledger.free_head));
        self.log.put(POSITIONS, positions(used, used));
        self.old = used;
    }
}

/// The ledger that a region describes, and its chains in flight with their counters. Every entry must be either in the
/// free list or in exactly one chain, and no more slots in flight than the ring has.
fn read(log: &QueueLog, free_head: u16, size: u16) -> Result<(Ledger, Vec<(u64, u16)>), LogError> {
    let entries = (0..log.desc_num).map(|at| {
        let [a, b, c, d, e, f, g, h] = log.get::<u64>(entry(at, ID_FLAGS_LEN)).to_ne_bytes();
        let desc = PackedDesc {
            addr: log.get(entry(at, ADDR)),
            len_bytes: u32::from_ne_bytes([e, f, g, h]),
            id: u16::from_ne_bytes([a, b]),
            flags: u16::from_ne_bytes([c, d]),
        };
        let (next, last) = (log.get(entry(at, NEXT)), log.get(entry(at, LAST)));
        Entry { next, last, num: 0, desc }
    });
    let mut ledger = Ledger { entries: entries.collect(), free_head, slots: 0 };
    let mut seen = vec![false; log.desc_num.into()];
    let mut see = |at: u16| match seen.get_mut(usize::from(at)) {
        Some(seen) if !*seen => {
            *seen = true;
            Ok(())
        }
        _ => Err(LogError::Contradiction("its own lists of descriptors")),
    };
    let mut at = free_head;
    while at != log.desc_num {
        see(at)?;
        if log.get::<u8>(entry(at, INFLIGHT)) != 0 {
            log.put(entry(at, INFLIGHT), 0u8);
        }
        at = ledger.entries[usize::from(at)].next;
    }
    let mut inflight = Vec::new();
    let mut slots = 0u32;
    for head in 0..log.desc_num {
        match log.get::<u8>(entry(head, INFLIGHT)) {
            0 => continue,
            1 => {}
            _ => return Err(LogError::Contradiction("its format: in flight or not")),
        }
        let num: u16 = log.get(entry(head, NUM));
        let mut at = head;
        for left in (0..num).rev() {
            see(at)?;
            if left != 0 {
                at = ledger.entries[usize::from(at)].next;
            }
        }
        let state = &mut ledger.entries[usize::from(head)];
        state.num = num;
        if num == 0 || at != state.last {
            return Err(LogError::Contradiction("its own chain lengths"));
        }
        slots += u32::from(num);
        inflight.push((log.get(entry(head, COUNTER)), head));
    }
    if !seen.iter().all(|seen| *seen) || slots > u32::from(size) {
        return Err(LogError::Contradiction("its own number of descriptors"));
    }
    ledger.slots = slots as u16;
    Ok((ledger, inflight))
}
