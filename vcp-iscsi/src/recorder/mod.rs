//! The flight recorder: the last PDUs of a session, always at hand, written as a capture when something went wrong.
//!
//! - [`Recorder`]: a ring of fixed size in memory. To record a PDU is a copy of its 48-byte header and of at most
//!   [`DATA_BYTES`] bytes of its data; no clock is read, nothing is allocated.
//! - [`pcapng`]: the ring as a capture file that tshark and Wireshark decode.
//! - [`store`]: the files: where, how many, how often.
//!
//! Only full-feature PDUs come here. A login, and with it CHAP, is over before there is a recorder; so no secret, nor
//! anything computed from one, can be in a file.

pub mod pcapng;
pub mod store;

use std::fmt;
use std::time::Instant;

pub use store::{Store, StoreOptions};

/// PDUs kept of a session.
pub const PDUS: usize = 1024;
/// Bytes of a basic header segment.
pub const HEADER_BYTES: usize = 48;
/// Most bytes kept of a PDU's data: a CDB's worth of parameters, the sense data, the beginning of a sector.
pub const DATA_BYTES: usize = 32;

/// Who sent a PDU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// We did.
    ToTarget,
    /// The target did.
    ToInitiator,
}

/// One PDU.
#[derive(Clone, Copy)]
pub struct Entry {
    /// The pass in which it was queued or parsed.
    pub at: Instant,
    /// Who sent it.
    pub way: Way,
    /// Bytes of `data` that are kept.
    kept: u8,
    /// The basic header segment.
    pub header: [u8; HEADER_BYTES],
    data: [u8; DATA_BYTES],
}

impl Entry {
    /// The first bytes of its data, as far as they were kept.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.data[..usize::from(self.kept)]
    }

    /// Bytes of the whole PDU without digests: header, additional headers, data, padding.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        let ahs = usize::from(self.header[4]) * 4;
        HEADER_BYTES + ahs + self.data_len_bytes().next_multiple_of(4)
    }

    /// DataSegmentLength.
    #[must_use]
    pub fn data_len_bytes(&self) -> usize {
        usize::from(self.header[5]) << 16 | usize::from(self.header[6]) << 8 | usize::from(self.header[7])
    }

    /// Whether the kept data stands directly behind the header (there are no additional headers, which are not kept).
    #[must_use]
    pub fn data_follows(&self) -> bool {
        self.header[4] == 0
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the data, which is the guest's.
        write!(f, "{:?} {:#04x}", self.way, self.header[0])
    }
}

/// The last PDUs of a session; see the [module](self). The default records nothing and takes no memory.
#[derive(Default)]
pub struct Recorder {
    entries: Vec<Entry>,
    /// Where the next one goes once the ring is full.
    next: usize,
    total: u64,
    /// Whether data of the PDU received last may still come.
    wants_data: bool,
    keep_data: bool,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").field("total", &self.total).finish_non_exhaustive()
    }
}

impl Recorder {
    /// An empty one for `pdus` PDUs, with or without the first bytes of data.
    #[must_use]
    pub fn new(pdus: usize, keep_data: bool) -> Self {
        Self { entries: Vec::with_capacity(pdus), keep_data, ..Self::default() }
    }

    /// What a session records whose captures go there, if anywhere.
    #[must_use]
    pub fn of(store: Option<&StoreOptions>) -> Self {
        store.map_or_else(Self::default, |store| Self::new(PDUS, store.with_data))
    }

    /// Memory that it takes.
    #[must_use]
    pub const fn memory_bytes(pdus: usize) -> usize {
        pdus * size_of::<Entry>()
    }

    /// Whether [`sent`](Self::sent) has a use for data.
    #[inline]
    #[must_use]
    pub fn keeps_data(&self) -> bool {
        self.keep_data
    }

    /// A PDU goes out: its header (what follows the first 48 bytes, a digest, is left out) and the first bytes of its
    /// data, if at hand.
    #[inline]
    pub fn sent(&mut self, header: &[u8], data: &[u8], now: Instant) {
        self.record(Way::ToTarget, header, now);
        self.keep(data);
        self.wants_data = false;
    }

    /// The header of a PDU came in.
    #[inline]
    pub fn received(&mut self, header: &[u8], now: Instant) {
        self.record(Way::ToInitiator, header, now);
        self.wants_data = true;
    }

    /// Data of the PDU received last. Only its first piece is kept.
    #[inline]
    pub fn received_data(&mut self, data: &[u8]) {
        if std::mem::take(&mut self.wants_data) {
            self.keep(data);
        }
    }

    #[inline]
    fn record(&mut self, way: Way, header: &[u8], now: Instant) {
        if self.entries.capacity() == 0 {
            return;
        }
        let mut entry = Entry { at: now, way, kept: 0, header: [0; HEADER_BYTES], data: [0; DATA_BYTES] };
        let len = header.len().min(HEADER_BYTES);
        entry.header[..len].copy_from_slice(&header[..len]);
        self.total += 1;
        if self.entries.len() < self.entries.capacity() {
            self.entries.push(entry);
            self.next = 0;
        } else if let Some(place) = self.entries.get_mut(self.next) {
            *place = entry;
            self.next = if self.next + 1 == self.entries.len() { 0 } else { self.next + 1 };
        }
    }

    /// Keeps the first bytes for the entry recorded last.
    #[inline]
    fn keep(&mut self, data: &[u8]) {
        if !self.keep_data {
            return;
        }
        let last = self.next.checked_sub(1).unwrap_or(self.entries.len().saturating_sub(1));
        if let Some(entry) = self.entries.get_mut(last) {
            let len = data.len().min(DATA_BYTES);
            entry.data[..len].copy_from_slice(&data[..len]);
            entry.kept = len as u8;
        }
    }

    /// PDUs recorded since the beginning, also those that were overwritten.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// What is there, oldest first.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        let (newer, older) = self.entries.split_at(self.next.min(self.entries.len()));
        older.iter().chain(newer)
    }

    /// A copy of what is there, oldest first.
    #[must_use]
    pub fn snapshot(&self) -> Vec<Entry> {
        self.entries().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(n: u32, data_len: u8) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[7] = data_len;
        header[16..20].copy_from_slice(&n.to_be_bytes());
        header
    }

    proptest! {
        /// Whatever goes in, the last ones come out in order, each with its own data.
        #[test]
        fn the_last_pdus_are_kept_in_order(capacity in 1usize..20, pdus in prop::collection::vec((any::<bool>(), 0u8..80), 0..60)) {
            let mut recorder = Recorder::new(capacity, true);
            let now = Instant::now();
            for (n, &(received, len)) in pdus.iter().enumerate() {
                let bytes = vec![n as u8; usize::from(len)];
                if received {
                    recorder.received(&header(n as u32, len), now);
                    for piece in bytes.chunks(7) {
                        recorder.received_data(piece);
                    }
                } else {
                    recorder.sent(&header(n as u32, len), &bytes, now);
                }
            }
            let seen = recorder.snapshot();
            let capacity = recorder.entries.capacity();
            let first = pdus.len().saturating_sub(capacity);
            prop_assert_eq!(seen.len(), pdus.len() - first);
            for (entry, (n, &(received, len))) in seen.iter().zip(pdus.iter().enumerate().skip(first)) {
                prop_assert_eq!(&entry.header, &header(n as u32, len));
                prop_assert_eq!(entry.way == Way::ToInitiator, received);
                let most = if received { 7 } else { DATA_BYTES };
                prop_assert_eq!(entry.data(), &vec![n as u8; usize::from(len).min(most)][..]);
            }
            prop_assert_eq!(recorder.total(), pdus.len() as u64);
        }
    }

    #[test]
    fn without_data_only_headers_are_kept() {
        let mut recorder = Recorder::new(4, false);
        recorder.sent(&header(1, 9), &[7; 9], Instant::now());
        recorder.received(&header(2, 9), Instant::now());
        recorder.received_data(&[7; 9]);
        assert!(recorder.entries().all(|entry| entry.data().is_empty() && entry.len_bytes() == 60));
        assert!(!recorder.keeps_data());
    }

    #[test]
    fn a_short_or_long_header_is_no_trouble() {
        let mut recorder = Recorder::new(4, true);
        recorder.sent(&[1; 3], &[], Instant::now());
        recorder.sent(&[2; 60], &[], Instant::now());
        let headers: Vec<_> = recorder.entries().map(|entry| entry.header[47]).collect();
        assert_eq!(headers, [0, 2]);
    }
}
