//! The guest: virtqueues in memory, a load of reads, writes and flushes over a small disk, and the check of every answer.
//!
//! Memory that a request has no business with any more is filled with a pattern as soon as it is answered, and looked at
//! again before it is used next: whoever writes to it is found. A write's data is overwritten in the same way: were it still
//! being sent, the disk would hold what no write wrote.

use std::collections::VecDeque;
use std::sync::Arc;

use vcp_core::device::Rings;
use vcp_core::mem::GuestMap;
use vcp_core::queue::{Chain, ChainId, RingError};
use vm_memory::{Bytes, GuestAddress};

use crate::content::{self, BLOCK, look};
use crate::oracle::{Active, Oracle};
use crate::rng::Rng;
use crate::scenario::Scenario;

/// Requests at once.
pub const SLOTS: usize = 16;
/// Most blocks of a request.
const MAX_BLOCKS: u64 = 64;
const PIECES: u64 = 4;
const PIECE_BYTES: u64 = MAX_BLOCKS * BLOCK as u64 + 64;
const DATA_AT: u64 = 64;
const STATUS_AT: u64 = 32;
const SLOT_BYTES: u64 = DATA_AT + PIECES * PIECE_BYTES;
/// An answer that nobody gives.
const NO_STATUS: u8 = 0xA5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Read { lba: u64, blocks: u64 },
    Write { lba: u64, blocks: u64 },
    Zeroes { lba: u64, blocks: u64 },
    Discard { lba: u64, blocks: u64 },
    Flush,
    Id,
}

#[derive(Debug, Default)]
struct Slot {
    op: Option<Op>,
    /// Address and length of each piece of the data.
    pieces: Vec<(u64, usize)>,
    /// What the memory was filled with after the last answer.
    poison: Option<u64>,
    since_ns: u64,
}

/// See the [module](self).
pub struct Guest {
    pub map: Arc<GuestMap>,
    slots: Vec<Slot>,
    pub active: Vec<Option<Active>>,
    /// Made available and not taken, by queue.
    avail: Vec<VecDeque<usize>>,
    pub oracle: Oracle,
    rng: Rng,
    disk_blocks: u64,
    depth: usize,
    thin: bool,
    /// Most blocks of a write of zeroes, as the device tells.
    max_zeroes: u64,
    /// Counts the fillings.
    poisons: u64,
    /// What broke a rule.
    pub violation: Option<String>,
    /// The driver kicked.
    pub kicked: bool,
    pub answered: u64,
    pub failed: u64,
    /// Requests may fail for a reason.
    pub may_fail: bool,
    pub now_ns: u64,
    pub events: Vec<String>,
    pub trace: bool,
}

thread_local! {
    /// Mapping and touching memory takes long; the pattern checks make reuse safe.
    static MEMORY: Arc<GuestMap> = Arc::new(
        GuestMap::from_ranges(&[(GuestAddress(0), (SLOT_BYTES as usize) * SLOTS)]).expect("anonymous memory"),
    );
}

impl Guest {
    pub fn new(scenario: &Scenario, max_zeroes: u64) -> Self {
        let (disk_blocks, queues) = (scenario.unit.blocks, usize::from(scenario.queues));
        Self {
            map: MEMORY.with(Arc::clone),
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
            active: (0..SLOTS).map(|_| None).collect(),
            avail: (0..queues).map(|_| VecDeque::new()).collect(),
            oracle: Oracle::new(disk_blocks),
            rng: Rng::new(scenario.seed, 3),
            disk_blocks,
            depth: scenario.depth.min(SLOTS),
            thin: scenario.unit.thin,
            max_zeroes,
            poisons: 0,
            violation: None,
            kicked: false,
            answered: 0,
            failed: 0,
            may_fail: true,
            now_ns: 0,
            events: Vec::new(),
            trace: false,
        }
    }

    pub fn in_flight(&self) -> usize {
        self.slots.iter().filter(|slot| slot.op.is_some()).count()
    }

    /// The oldest request without an answer: what, and since when.
    pub fn oldest(&self) -> Option<(Op, u64)> {
        self.slots
            .iter()
            .filter_map(|slot| slot.op.map(|op| (op, slot.since_ns)))
            .min_by_key(|(_, since)| *since)
    }

    pub fn has_room(&self) -> bool {
        self.in_flight() < self.depth
    }

    fn violate(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    fn log(&mut self, what: impl FnOnce() -> String) {
        if self.trace {
            self.events.push(what());
        }
    }

    /// What to do next.
    pub fn choose(&mut self) -> Op {
        let blocks = self.rng.spread(1, MAX_BLOCKS.min(self.disk_blocks));
        let lba = self.rng.below(self.disk_blocks - blocks + 1);
        match self.rng.below(100) {
            0..44 => Op::Read { lba, blocks },
            44..86 => Op::Write { lba, blocks },
            86..94 => Op::Flush,
            94..97 if self.thin => Op::Zeroes { lba, blocks: blocks.min(self.max_zeroes) },
            97..98 if self.thin => Op::Discard { lba, blocks },
            94..98 => Op::Write { lba, blocks },
            98 => Op::Id,
            _ => Op::Read { lba, blocks },
        }
    }

    fn address(slot: usize) -> u64 {
        slot as u64 * SLOT_BYTES
    }

    fn write_memory(&self, at: u64, bytes: &[u8]) {
        self.map.write_slice(bytes, GuestAddress(at)).expect("own memory");
    }

    fn read_memory(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.map.read_slice(&mut bytes, GuestAddress(at)).expect("own memory");
        bytes
    }

    /// Looks whether the memory of a slot is as it was left.
    fn check_untouched(&mut self, index: usize) {
        let Some(poison) = self.slots[index].poison else { return };
        let mut wrong = None;
        for &(at, len) in &self.slots[index].pieces {
            if let Some(offset) = content::touched(poison, &self.read_memory(at, len)) {
                wrong = Some(format!(
                    "guest memory at {:#x} was written after the request was answered",
                    at + offset as u64
                ));
            }
        }
        let status = self.read_memory(Self::address(index) + STATUS_AT, 1)[0];
        if status != NO_STATUS {
            wrong = Some(format!("the status byte of slot {index} was written after the answer"));
        }
        if let Some(wrong) = wrong {
            self.violate(wrong);
        }
    }

    /// Looks at all memory that nobody may use now.
    pub fn check_idle(&mut self) {
        for index in 0..SLOTS {
            if self.slots[index].op.is_none() {
                self.check_untouched(index);
            }
        }
    }

    fn poison(&mut self, index: usize) {
        self.poisons += 1;
        let poison = self.poisons;
        self.slots[index].poison = Some(poison);
        for &(at, len) in &self.slots[index].pieces.clone() {
            let mut bytes = vec![0; len];
            content::poison(poison, &mut bytes);
            self.write_memory(at, &bytes);
        }
        self.write_memory(Self::address(index) + STATUS_AT, &[NO_STATUS]);
    }

    /// Makes a request available to the device.
    pub fn submit(&mut self, op: Op) {
        let Some(index) = self.slots.iter().position(|slot| slot.op.is_none()) else { return };
        self.check_untouched(index);
        let base = Self::address(index);
        let data_bytes = match op {
            Op::Read { blocks, .. } | Op::Write { blocks, .. } => blocks as usize * BLOCK,
            Op::Zeroes { .. } | Op::Discard { .. } => 16,
            Op::Id => 20,
            Op::Flush => 0,
        };
        // Cut anywhere: pieces need not be whole blocks.
        let mut pieces = Vec::new();
        let (count, mut left) = (self.rng.range(1, PIECES), data_bytes);
        for n in 0..count {
            let len = if n + 1 == count { left } else { self.rng.below(left as u64 + 1) as usize };
            if len > 0 {
                pieces.push((base + DATA_AT + n * PIECE_BYTES + self.rng.below(16), len));
            }
            left -= len;
        }
        self.slots[index].pieces = pieces;
        self.poison(index);
        self.slots[index].poison = None;
        let (kind, sector) = match op {
            Op::Read { lba, .. } => (0u32, lba),
            Op::Write { lba, .. } => (1, lba),
            Op::Flush => (4, 0),
            Op::Id => (8, 0),
            Op::Discard { .. } => (11, 0),
            Op::Zeroes { .. } => (13, 0),
        };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.write_memory(base, &header);
        let mut others = std::mem::take(&mut self.active);
        let active = match op {
            Op::Read { lba, blocks } => Some(self.oracle.read(lba, blocks)),
            Op::Write { lba, blocks } => Some(self.oracle.write(lba, blocks, false, &mut others)),
            Op::Zeroes { lba, blocks } | Op::Discard { lba, blocks } => {
                Some(self.oracle.write(lba, blocks, true, &mut others))
            }
            Op::Flush => Some(self.oracle.flush()),
            Op::Id => None,
        };
        self.active = others;
        let mut data = vec![0; data_bytes];
        match op {
            Op::Write { lba, .. } => {
                let Some(Active::Write { id, .. }) = active else { return };
                for (at, block) in (lba..).zip(data.chunks_exact_mut(BLOCK)) {
                    content::fill(id, at, block);
                }
                self.scatter(index, &data);
            }
            Op::Zeroes { lba, blocks } | Op::Discard { lba, blocks } => {
                data[..8].copy_from_slice(&lba.to_le_bytes());
                data[8..12].copy_from_slice(&(blocks as u32).to_le_bytes());
                self.scatter(index, &data);
            }
            _ => {}
        }
        self.log(|| format!("guest: slot {index} {op:?} {}", active.as_ref().map_or(String::new(), name)));
        self.active[index] = active;
        let slot = &mut self.slots[index];
        slot.op = Some(op);
        slot.since_ns = self.now_ns;
        let queue = self.rng.below(self.avail.len() as u64) as usize;
        self.avail[queue].push_back(index);
        self.kicked = true;
    }

    fn scatter(&self, index: usize, data: &[u8]) {
        let mut at = 0;
        for &(address, len) in &self.slots[index].pieces {
            self.write_memory(address, &data[at..at + len]);
            at += len;
        }
    }

    fn gather(&self, index: usize) -> Vec<u8> {
        self.slots[index].pieces.iter().flat_map(|&(at, len)| self.read_memory(at, len)).collect()
    }

    fn answer(&mut self, index: usize) {
        let Some(op) = self.slots.get_mut(index).and_then(|slot| slot.op.take()) else {
            return self.violate(format!("slot {index} was answered, but it has no request: answered twice"));
        };
        self.answered += 1;
        let status = self.read_memory(Self::address(index) + STATUS_AT, 1)[0];
        let active = self.active[index].take();
        self.log(|| {
            format!(
                "guest: slot {index} {op:?} answered with {status} {}",
                active.as_ref().map_or(String::new(), name)
            )
        });
        match (status, &active) {
            (0, Some(active)) => match op {
                Op::Read { lba, .. } => {
                    let data = self.gather(index);
                    let seen: Vec<_> =
                        (lba..).zip(data.chunks_exact(BLOCK)).map(|(at, b)| look(at, b)).collect();
                    if let Err(wrong) = self.oracle.was_read(active, &seen) {
                        self.violate(format!("{op:?} answered in slot {index}: {wrong}"));
                    }
                }
                Op::Flush => self.oracle.flushed(active),
                _ => self.oracle.written(active, !matches!(op, Op::Discard { .. })),
            },
            (0, None) => {}
            (1 | 2, active) => {
                self.failed += 1;
                if !self.may_fail {
                    self.violate(format!(
                        "{op:?} failed with status {status}, but nothing happened that cannot be cured"
                    ));
                }
                if let Some(active) = active {
                    self.oracle.failed(active);
                }
            }
            (status, _) => self.violate(format!("{op:?} was answered with status {status:#04x}")),
        }
        self.poison(index);
    }
}

fn name(active: &Active) -> String {
    match active {
        Active::Write { id, .. } => format!("(write {id})"),
        _ => String::new(),
    }
}

impl Rings for Guest {
    fn take(&mut self, queue: u16, chain: &mut Chain) -> bool {
        let Some(index) = self.avail[usize::from(queue)].pop_front() else { return false };
        let (slot, base) = (&self.slots[index], Self::address(index));
        chain.id = ChainId { queue, head: index as u16, ..ChainId::default() };
        chain.readable.clear();
        chain.writable.clear();
        chain.readable.push(&self.map, GuestAddress(base), 16).expect("own memory");
        let to_guest = matches!(slot.op, Some(Op::Read { .. } | Op::Id));
        for &(at, len) in &slot.pieces {
            let part = if to_guest { &mut chain.writable } else { &mut chain.readable };
            part.push(&self.map, GuestAddress(at), len).expect("own memory");
        }
        chain.writable.push(&self.map, GuestAddress(base + STATUS_AT), 1).expect("own memory");
        true
    }

    fn complete(&mut self, id: ChainId, _len_bytes: u32) {
        self.answer(usize::from(id.head));
    }

    fn wanted(&self, _id: ChainId) -> bool {
        true
    }

    fn fail(&mut self, id: ChainId, error: RingError) {
        self.violate(format!("the device refused the chain in slot {}: {error}", id.head));
    }
}
