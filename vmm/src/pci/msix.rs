//! MSI-X (PCI 3.0, 6.8.2) over eventfds. A function has *sources*, one eventfd each, which whoever serves it signals,
//! be it another process; the driver gives each source a *vector*, a line of the table.
//!
//! A source is connected to KVM's interrupt as long as its vector may be delivered: enabled, not masked, not the whole
//! function masked. While it is not, signals stay in its eventfd: that is the pending bit. When it is connected again, KVM
//! looks at the eventfd and delivers what waited. The eventfd itself never changes, so that a process that holds it needs
//! not be told of any of this.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::kvm::wires::{Msi, Wires};
use crate::virtio::Complaints;

/// Capability id.
pub const CAPABILITY: u8 = 0x11;
/// Bytes of a line of the table.
pub const ENTRY_LEN: u64 = 16;
/// No vector: the source is not delivered.
pub const NO_VECTOR: u16 = 0xffff;
/// Message control: the whole function is masked; MSI-X is in use.
const CONTROL_MASK_ALL: u16 = 1 << 14;
const CONTROL_ENABLE: u16 = 1 << 15;
/// What of message control the guest may change.
pub const CONTROL_WRITABLE: u16 = CONTROL_MASK_ALL | CONTROL_ENABLE;
/// Vector control: masked.
const ENTRY_MASKED: u32 = 1;

/// A line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    msi: Msi,
    masked: bool,
    /// KVM's number for it, once it has been used.
    gsi: Option<u32>,
}

/// Something that interrupts.
#[derive(Clone, Copy, Debug)]
struct Source {
    vector: u16,
    /// Connected to this interrupt.
    connected: Option<u32>,
}

/// The interrupts of one function.
pub struct Msix {
    name: String,
    wires: Arc<dyn Wires>,
    events: Arc<Vec<EventFd>>,
    entries: Vec<Entry>,
    sources: Vec<Source>,
    control: u16,
    complaints: Complaints,
}

impl std::fmt::Debug for Msix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Msix").field("entries", &self.entries.len()).finish_non_exhaustive()
    }
}

impl Msix {
    /// As many vectors as sources, which are `events`. All are masked and MSI-X is off, as after a reset.
    pub fn new(name: &str, events: Arc<Vec<EventFd>>, wires: Arc<dyn Wires>) -> Self {
        let entry = Entry { msi: Msi::default(), masked: true, gsi: None };
        let source = Source { vector: NO_VECTOR, connected: None };
        Self {
            name: name.to_owned(),
            wires,
            entries: vec![entry; events.len()],
            sources: vec![source; events.len()],
            events,
            control: 0,
            complaints: Complaints::default(),
        }
    }

    /// The capability's content behind id and link: message control, table, pending bits, both in the first base address
    /// register at these offsets.
    pub fn capability(vectors: u16, table: u32, pending: u32) -> [u8; 10] {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&table.to_le_bytes());
        body[6..].copy_from_slice(&pending.to_le_bytes());
        body
    }

    /// The guest has written message control.
    pub fn set_control(&mut self, control: u16) {
        self.control = control & CONTROL_WRITABLE;
        self.refresh();
    }

    /// The vector of a source.
    pub fn vector(&self, source: usize) -> u16 {
        self.sources.get(source).map_or(NO_VECTOR, |source| source.vector)
    }

    /// Gives a source a vector; one that does not exist is none, and the driver reads that back.
    pub fn set_vector(&mut self, source: usize, vector: u16) {
        let vector = if usize::from(vector) < self.entries.len() { vector } else { NO_VECTOR };
        if let Some(source) = self.sources.get_mut(source) {
            source.vector = vector;
            self.refresh();
        }
    }

    /// The device was reset: no source has a vector, and nothing is pending. The table is the bus', and stays.
    pub fn reset(&mut self) {
        for source in &mut self.sources {
            source.vector = NO_VECTOR;
        }
        self.refresh();
        for event in &*self.events {
            let _ = event.read();
        }
    }

    /// Reads the table. Only whole words of 4 or 8 bytes are defined; others read as zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (words, len) = (self.words(offset / ENTRY_LEN), data.len() as u64);
        if !matches!(len, 4 | 8) || !offset.is_multiple_of(len) {
            return;
        }
        let at = (offset % ENTRY_LEN) as usize;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        data.copy_from_slice(&bytes[at..at + data.len()]);
    }

    fn words(&self, index: u64) -> [u32; 4] {
        let Some(entry) = self.entries.get(index as usize) else { return [0; 4] };
        let Msi { address, data } = entry.msi;
        [address as u32, (address >> 32) as u32, data, u32::from(entry.masked)]
    }

    /// Writes the table.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let len = data.len() as u64;
        if !matches!(len, 4 | 8) || !offset.is_multiple_of(len) {
            return;
        }
        let index = offset / ENTRY_LEN;
        let mut words = self.words(index);
        let first = (offset % ENTRY_LEN / 4) as usize;
        for (word, bytes) in words[first..].iter_mut().zip(data.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        let Some(entry) = self.entries.get_mut(index as usize) else { return };
        // The two lowest bits of the address are reserved.
        let address = u64::from(words[0] & !3) | u64::from(words[1]) << 32;
        entry.msi = Msi { address, data: words[2] };
        entry.masked = words[3] & ENTRY_MASKED != 0;
        self.refresh();
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let first = (offset + i as u64).saturating_mul(8);
            *byte = (0..8).fold(0, |bits, bit| bits | u8::from(self.is_pending(first + bit)) << bit);
        }
    }

    fn is_pending(&self, vector: u64) -> bool {
        (vector < self.entries.len() as u64)
            && self.sources.iter().zip(&*self.events).any(|(source, event)| {
                u64::from(source.vector) == vector && source.connected.is_none() && is_signalled(event)
            })
    }

    /// Whether a source with this vector is to be delivered.
    fn delivers(&self, vector: u16) -> bool {
        self.control & (CONTROL_ENABLE | CONTROL_MASK_ALL) == CONTROL_ENABLE
            && self.entries.get(usize::from(vector)).is_some_and(|entry| !entry.masked)
    }

    /// Connects and disconnects sources as table, control and vectors want it.
    fn refresh(&mut self) {
        for source in 0..self.sources.len() {
            let Source { vector, connected } = self.sources[source];
            let wanted = if self.delivers(vector) { self.gsi(vector) } else { None };
            if let Some(gsi) = wanted {
                let msi = self.entries[usize::from(vector)].msi;
                // Does nothing where it is the same.
                let routed = self.wires.route(gsi, msi);
                self.note(routed);
            }
            if wanted == connected {
                continue;
            }
            let Some(event) = self.events.get(source) else { continue };
            if let Some(gsi) = connected {
                let done = self.wires.disconnect(event, gsi);
                self.note(done);
            }
            let Some(event) = self.events.get(source) else { continue };
            let done = wanted.map_or(Ok(()), |gsi| self.wires.connect(event, gsi));
            self.sources[source].connected = wanted.filter(|_| done.is_ok());
            self.note(done);
        }
    }

    /// KVM's number for a vector, which it gets now if it has none.
    fn gsi(&mut self, vector: u16) -> Option<u32> {
        let entry = self.entries.get(usize::from(vector))?;
        if entry.gsi.is_some() {
            return entry.gsi;
        }
        let gsi = self.wires.allocate();
        match gsi {
            Ok(gsi) => {
                self.entries[usize::from(vector)].gsi = Some(gsi);
                Some(gsi)
            }
            Err(e) => {
                self.note(Err(e));
                None
            }
        }
    }

    fn note(&mut self, result: crate::error::Result<()>) {
        if let Err(e) = result
            && self.complaints.add()
        {
            tracing::error!(device = self.name, error = %crate::chain(&e), "an interrupt is not delivered");
        }
    }

    /// Lines of the table as words, control, and vectors: what a snapshot keeps.
    pub fn save(&self) -> SavedMsix {
        SavedMsix {
            control: self.control,
            table: (0..self.entries.len() as u64).map(|index| self.words(index)).collect(),
            vectors: self.sources.iter().map(|source| source.vector).collect(),
            pending: self
                .sources
                .iter()
                .zip(&*self.events)
                .map(|(source, event)| source.connected.is_none() && is_signalled(event))
                .collect(),
        }
    }

    /// Brings back what [`Msix::save`] kept. False if it is for another number of vectors.
    pub fn restore(&mut self, saved: &SavedMsix) -> bool {
        let count = self.entries.len();
        if [saved.table.len(), saved.vectors.len(), saved.pending.len()] != [count; 3] {
            return false;
        }
        for (source, event) in saved.pending.iter().zip(&*self.events).filter(|(pending, _)| **pending) {
            let _ = (source, event.write(1));
        }
        for (entry, words) in self.entries.iter_mut().zip(&saved.table) {
            let address = u64::from(words[0] & !3) | u64::from(words[1]) << 32;
            entry.msi = Msi { address, data: words[2] };
            entry.masked = words[3] & ENTRY_MASKED != 0;
        }
        for (source, vector) in self.sources.iter_mut().zip(&saved.vectors) {
            source.vector = if usize::from(*vector) < count { *vector } else { NO_VECTOR };
        }
        self.set_control(saved.control);
        true
    }
}

/// The interrupts of a function in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SavedMsix {
    control: u16,
    table: Vec<[u32; 4]>,
    vectors: Vec<u16>,
    pending: Vec<bool>,
}

/// Whether an eventfd is signalled. Nobody else reads it: it is not connected.
fn is_signalled(event: &EventFd) -> bool {
    match event.read() {
        Ok(count) => {
            let _ = event.write(count);
            true
        }
        Err(_) => false,
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        self.control = 0;
        self.refresh();
        for gsi in self.entries.iter().filter_map(|entry| entry.gsi) {
            self.wires.free(gsi);
        }
    }
}

#[cfg(test)]
#[path = "msix_tests.rs"]
mod tests;
