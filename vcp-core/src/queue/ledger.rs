//! [`Ledger`]: what a packed ring has in flight.
//!
//! A used element may overwrite a descriptor of another chain that is still in flight (2.8.6: the ring is written in the
//! order of completion), so a chain that has to be taken again cannot be read from the ring. The ledger keeps a copy of
//! every descriptor taken. Its entries and its free list are those of the in-flight log (`DescStatePacked`), which it is
//! the local original of; an entry number names a chain everywhere else in the process.

use virtio_queue::desc::packed::Descriptor;

/// A descriptor as it stood in the ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PackedDesc {
    pub(crate) addr: u64,
    pub(crate) len_bytes: u32,
    /// Buffer ID; that of a chain's last descriptor counts.
    pub(crate) id: u16,
    pub(crate) flags: u16,
}

impl From<Descriptor> for PackedDesc {
    fn from(desc: Descriptor) -> Self {
        Self { addr: desc.addr().0, len_bytes: desc.len(), id: desc.id(), flags: desc.flags() }
    }
}

/// One entry; `last` and `num` count only in the first entry of a chain.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Entry {
    /// The next entry of the chain or of the free list.
    pub(crate) next: u16,
    /// The chain's last entry.
    pub(crate) last: u16,
    /// Ring slots of the chain; 0: not the head of a chain in flight.
    pub(crate) num: u16,
    pub(crate) desc: PackedDesc,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Ledger {
    pub(crate) entries: Vec<Entry>,
    /// First free entry; the number of entries if there is none.
    pub(crate) free_head: u16,
    /// Ring slots in flight.
    pub(crate) slots: u16,
}

impl Ledger {
    /// `size` free entries.
    pub(crate) fn new(size: u16) -> Self {
        let entries = (1..=size).map(|next| Entry { next, ..Entry::default() }).collect();
        Self { entries, free_head: 0, slots: 0 }
    }

    /// The entry, if there is one of this number.
    pub(crate) fn get(&self, at: u16) -> Option<&Entry> {
        self.entries.get(usize::from(at))
    }

    /// Writes a descriptor of a chain that is being taken into the free entry `at`; returns the entry for the next one.
    pub(crate) fn fill(&mut self, at: u16, desc: PackedDesc) -> Option<u16> {
        let entry = self.entries.get_mut(usize::from(at))?;
        entry.desc = desc;
        Some(entry.next)
    }

    /// The chain from the first free entry to `last`, `num` entries, is in flight now; `free` is the first one behind it.
    pub(crate) fn commit(&mut self, last: u16, num: u16, free: u16) {
        let head = usize::from(self.free_head);
        if let Some(entry) = self.entries.get_mut(head) {
            (entry.last, entry.num) = (last, num);
        }
        self.slots += num;
        self.free_head = free;
    }

    /// The chain at `head` is free again.
    pub(crate) fn free(&mut self, head: u16) {
        let Some(entry) = self.entries.get_mut(usize::from(head)) else { return };
        self.slots = self.slots.saturating_sub(std::mem::take(&mut entry.num));
        let last = usize::from(entry.last);
        if let Some(last) = self.entries.get_mut(last) {
            last.next = self.free_head;
        }
        self.free_head = head;
    }

    /// The descriptors of the chain at `head`.
    pub(crate) fn chain(&self, head: u16) -> impl Iterator<Item = PackedDesc> + '_ {
        let num = self.get(head).map_or(0, |entry| entry.num);
        let mut at = head;
        (0..num).map_while(move |_| {
            let entry = self.get(at)?;
            at = entry.next;
            Some(entry.desc)
        })
    }

    /// Buffer ID and ring slots of the chain at `head`; `None` if none is in flight there.
    pub(crate) fn identity(&self, head: u16) -> Option<(u16, u16)> {
        let entry = self.get(head).filter(|entry| entry.num != 0)?;
        Some((self.get(entry.last)?.desc.id, entry.num))
    }
}
