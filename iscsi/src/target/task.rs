//! Task slots, and finding a slot by initiator task tag.

use crate::pdu::Itt;
use crate::scsi::lun::Lun;
use crate::serial::Serial;

/// A task: its slot, and which use of the slot it is, so that what is said of a task that has ended never reaches the
/// slot's next one. Valid from the event that names it until the PDU that ends it is taken from
/// [`poll_transmit`](super::Session::poll_transmit) or the task is aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TaskId {
    pub(super) slot: u16,
    pub(super) generation: u32,
}

impl TaskId {
    /// Index of the slot, below [`Session::slots`](super::Session::slots).
    pub fn slot(self) -> usize {
        usize::from(self.slot)
    }
}

/// Where a task stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum State {
    #[default]
    Free,
    /// Announced to the caller, who has not answered yet.
    Started,
    /// Write data is coming.
    Receiving,
    /// All write data has come; the caller carries the command out.
    Executing,
    /// The end is known, but sequences of write data are still open: they are discarded first.
    Draining,
    /// Data or status is to be sent.
    Sending,
}

/// Sense bytes kept for a task.
pub(super) const SENSE_BYTES: usize = 32;

#[derive(Clone, Debug, Default)]
pub(super) struct Task {
    pub(super) state: State,
    /// Counts the uses of the slot, so that a late Data-Out for an earlier task is told apart.
    pub(super) generation: u32,
    pub(super) immediate: bool,
    /// The slot stands in the queue of what is to be sent.
    pub(super) queued: bool,
    pub(super) itt: u32,
    pub(super) lun: Lun,
    pub(super) cmd_sn: Serial,
    pub(super) cdb: [u8; 16],
    pub(super) read: bool,
    pub(super) write: bool,
    pub(super) edtl: u32,
    /// Immediate data of the command PDU, kept until the caller says how much it takes.
    pub(super) immediate_len: u32,

    /// Write data that the device takes; more is discarded.
    pub(super) want: u32,
    /// What the device would have transferred given room, for the residual count.
    pub(super) device_len: u32,
    /// Next offset expected: data comes in order.
    pub(super) received: u32,
    /// Unsolicited Data-Out is still to come.
    pub(super) unsolicited_open: bool,
    /// DataSN expected next in the current sequence.
    pub(super) data_sn_in: u32,
    /// Offset at which the first R2T began.
    pub(super) solicited_from: u32,
    /// Offset up to which R2Ts have been sent.
    pub(super) requested: u32,
    /// R2Ts sent, and R2Ts whose sequence has ended.
    pub(super) r2t_sn: u32,
    pub(super) r2t_done: u32,
    /// A broken rule: the task fails with this sense code once its sequences are closed.
    pub(super) failed: Option<u16>,

    pub(super) status: u8,
    /// Data to send.
    pub(super) data_len: u32,
    pub(super) sent: u32,
    pub(super) data_sn_out: u32,
    pub(super) sense: [u8; SENSE_BYTES],
    pub(super) sense_len: u8,
}

impl Task {
    /// Whether sequences of write data are open.
    pub(super) fn expects_data(&self) -> bool {
        self.unsolicited_open || self.r2t_sn != self.r2t_done
    }

    /// The tag for R2T number `r2t_sn`: slot, R2T and use of the slot, so that it is found and checked in O(1).
    pub(super) fn ttt(&self, slot: u16, r2t_sn: u32) -> u32 {
        u32::from(slot) | (r2t_sn & 0xFF) << 16 | self.generation << 24
    }
}

const EMPTY: u16 = u16::MAX;

/// Initiator task tags to slots: open addressing, at most half full, no allocation after construction. An initiator
/// that chooses colliding tags slows only itself, by no more than its own window.
#[derive(Debug)]
pub(super) struct TagTable {
    entries: Box<[(u32, u16)]>,
    mask: usize,
}

impl TagTable {
    pub(super) fn new(slots: usize) -> Self {
        let len = (2 * slots).next_power_of_two();
        Self { entries: vec![(0, EMPTY); len].into_boxed_slice(), mask: len - 1 }
    }

    fn home(&self, itt: u32) -> usize {
        // Fibonacci hashing: initiators count up or use slot numbers with generations.
        (itt.wrapping_mul(0x9E37_79B9) >> 8) as usize & self.mask
    }

    pub(super) fn find(&self, itt: Itt) -> Option<u16> {
        let mut at = self.home(itt.0);
        loop {
            match self.entries[at] {
                (_, EMPTY) => return None,
                (tag, slot) if tag == itt.0 => return Some(slot),
                _ => at = (at + 1) & self.mask,
            }
        }
    }

    /// Adds a tag that is not there yet.
    pub(super) fn insert(&mut self, itt: u32, slot: u16) {
        let mut at = self.home(itt);
        while self.entries[at].1 != EMPTY {
            at = (at + 1) & self.mask;
        }
        self.entries[at] = (itt, slot);
    }

    pub(super) fn remove(&mut self, itt: u32) {
        let mut hole = self.home(itt);
        loop {
            match self.entries[hole] {
                (_, EMPTY) => return,
                (tag, _) if tag == itt => break,
                _ => hole = (hole + 1) & self.mask,
            }
        }
        // Close the gap: move back what could not stand at its home because of it.
        let mut at = hole;
        loop {
            at = (at + 1) & self.mask;
            let (tag, slot) = self.entries[at];
            if slot == EMPTY {
                break;
            }
            let from_home = at.wrapping_sub(self.home(tag)) & self.mask;
            let from_hole = at.wrapping_sub(hole) & self.mask;
            if from_home >= from_hole {
                self.entries[hole] = (tag, slot);
                hole = at;
            }
        }
        self.entries[hole] = (0, EMPTY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn table_is_a_map(steps in proptest::collection::vec((any::<bool>(), 0u32..40), 0..400)) {
            let mut table = TagTable::new(16);
            let mut model = HashMap::new();
            for (add, tag) in steps {
                // Few tags in few homes: many collisions.
                let tag = tag << 12;
                if add && !model.contains_key(&tag) && model.len() < 16 {
                    table.insert(tag, model.len() as u16);
                    model.insert(tag, model.len() as u16);
                } else if !add {
                    table.remove(tag);
                    model.remove(&tag);
                }
                for probe in 0..40u32 {
                    prop_assert_eq!(table.find(Itt(probe << 12)), model.get(&(probe << 12)).copied());
                }
            }
        }
    }
}
