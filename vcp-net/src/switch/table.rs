//! [`MacTable`]: which station is behind which port. Of fixed size: a guest that makes addresses up fills its own share.

use super::work::PortId;
use crate::frame::Mac;

/// Entries; a power of two.
const SIZE: usize = 8192;
/// Entries that are looked at for an address.
const PROBES: usize = 8;
/// Entries that one port may have.
pub const SHARE: u32 = 1024;
/// How long a station is remembered that sends nothing, in seconds (802.1Q, 8.8.3).
pub const AGE_S: u32 = 300;

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// VLAN and address; [`FREE`] if there is none.
    key: u64,
    seen_s: u32,
    port: PortId,
    /// It does not age, and no other port may take the address over.
    fixed: bool,
}

const FREE: u64 = u64::MAX;

/// A station as the control socket shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Station {
    /// VLAN; 0: none.
    pub vid: u16,
    /// Address.
    pub mac: Mac,
    /// Where it is.
    pub port: PortId,
    /// Seconds since it last sent.
    pub age_s: u32,
    /// It was set, not learned.
    pub fixed: bool,
}

/// What became of an address that was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learned {
    /// It is where it was.
    Known,
    /// It is new.
    New,
    /// It was on another port.
    Moved,
    /// There is no room, or the port has its share.
    NoRoom,
    /// It belongs to another port.
    Foreign,
}

/// See the module.
#[derive(Debug)]
pub struct MacTable {
    entries: Box<[Entry]>,
    shares: Vec<u32>,
    /// Entries that are fixed.
    fixed: u32,
    /// Keys the hash, so that a guest cannot tell which addresses meet.
    secret: u64,
}

impl MacTable {
    /// An empty table whose hash is keyed by `secret`.
    #[must_use]
    pub fn new(secret: u64) -> Self {
        let free = Entry { key: FREE, seen_s: 0, port: PortId(0), fixed: false };
        Self { entries: vec![free; SIZE].into(), shares: vec![0; 256], fixed: 0, secret: secret | 1 }
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn memory_bound_bytes() -> u64 {
        (SIZE * size_of::<Entry>()) as u64
    }

    #[inline]
    fn key(vid: u16, mac: Mac) -> u64 {
        u64::from(vid) << 48 | mac.0
    }

    #[inline]
    fn slot(&self, key: u64, probe: usize) -> usize {
        let hash = (key ^ self.secret).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let hash = (hash ^ hash >> 29).wrapping_mul(self.secret);
        ((hash >> 40) as usize + probe) & (SIZE - 1)
    }

    #[inline]
    fn find(&self, key: u64) -> Option<usize> {
        (0..PROBES).map(|probe| self.slot(key, probe)).find(|&at| self.entries[at].key == key)
    }

    /// The port behind which a station is, if it was seen lately.
    #[inline]
    #[must_use]
    pub fn get(&self, vid: u16, mac: Mac, now_s: u32) -> Option<PortId> {
        let entry = self.entries[self.find(Self::key(vid, mac))?];
        (entry.fixed || now_s.wrapping_sub(entry.seen_s) < AGE_S).then_some(entry.port)
    }

    /// The port to which an address belongs, if it was set.
    #[inline]
    #[must_use]
    pub fn owner(&self, vid: u16, mac: Mac) -> Option<PortId> {
        let entry = self.entries[self.find(Self::key(vid, mac))?];
        entry.fixed.then_some(entry.port)
    }

    /// A frame from this address came from this port.
    #[inline]
    pub fn learn(&mut self, vid: u16, mac: Mac, port: PortId, now_s: u32) -> Learned {
        let key = Self::key(vid, mac);
        match self.find(key) {
            Some(at) => {
                let entry = &mut self.entries[at];
                if entry.port == port {
                    // A store only when it says something new: the line stays shared otherwise.
                    if entry.seen_s != now_s {
                        entry.seen_s = now_s;
                    }
                    return Learned::Known;
                }
                if entry.fixed {
                    return Learned::Foreign;
                }
                let old = std::mem::replace(&mut entry.port, port);
                entry.seen_s = now_s;
                self.shares[old.index()] -= 1;
                self.shares[port.index()] += 1;
                Learned::Moved
            }
            None => self.insert(key, port, now_s, false),
        }
    }

    #[cold]
    fn insert(&mut self, key: u64, port: PortId, now_s: u32, fixed: bool) -> Learned {
        let aged =
            |entry: &Entry| entry.key == FREE || !entry.fixed && now_s.wrapping_sub(entry.seen_s) >= AGE_S;
        let slots: [usize; PROBES] = std::array::from_fn(|probe| self.slot(key, probe));
        let full = self.shares[port.index()] >= SHARE;
        let free = slots.into_iter().find(|&at| aged(&self.entries[at])).filter(|_| !full || fixed);
        // Otherwise the port's own oldest: it takes nothing from others.
        let own = || {
            let own =
                slots.into_iter().filter(|&at| self.entries[at].port == port && !self.entries[at].fixed);
            own.min_by_key(|&at| self.entries[at].seen_s)
        };
        let Some(at) = free.or_else(own) else { return Learned::NoRoom };
        let old = std::mem::replace(&mut self.entries[at], Entry { key, seen_s: now_s, port, fixed });
        if old.key != FREE {
            self.shares[old.port.index()] -= 1;
        }
        self.shares[port.index()] += 1;
        Learned::New
    }

    /// Whether any address is fixed.
    #[inline]
    #[must_use]
    pub fn has_fixed(&self) -> bool {
        self.fixed != 0
    }

    /// An address belongs to this port, and to no other; false if there is no room for it.
    pub fn fix(&mut self, vid: u16, mac: Mac, port: PortId) -> bool {
        let key = Self::key(vid, mac);
        if let Some(at) = self.find(key) {
            if !self.entries[at].fixed {
                self.fixed += 1;
            }
            let old = std::mem::replace(&mut self.entries[at], Entry { key, seen_s: 0, port, fixed: true });
            self.shares[old.port.index()] -= 1;
            self.shares[port.index()] += 1;
            return true;
        }
        let there = self.insert(key, port, 0, true) == Learned::New;
        self.fixed += u32::from(there);
        there
    }

    /// Addresses of a port belong to nobody any more.
    pub fn unfix(&mut self, port: PortId) {
        for entry in &mut self.entries {
            if entry.key != FREE && entry.fixed && entry.port == port {
                entry.key = FREE;
                entry.fixed = false;
                self.fixed -= 1;
                self.shares[port.index()] -= 1;
            }
        }
    }

    /// Forgets what was learned of a port (of all, without one).
    pub fn flush(&mut self, port: Option<PortId>) {
        for entry in &mut self.entries {
            if entry.key != FREE && !entry.fixed && port.is_none_or(|port| entry.port == port) {
                entry.key = FREE;
                self.shares[entry.port.index()] -= 1;
            }
        }
    }

    /// All stations that are remembered.
    pub fn stations(&self, now_s: u32) -> impl Iterator<Item = Station> + '_ {
        let station = move |entry: &Entry| Station {
            vid: (entry.key >> 48) as u16,
            mac: Mac(entry.key & 0xffff_ffff_ffff),
            port: entry.port,
            age_s: if entry.fixed { 0 } else { now_s.wrapping_sub(entry.seen_s) },
            fixed: entry.fixed,
        };
        let known = move |entry: &&Entry| {
            entry.key != FREE && (entry.fixed || now_s.wrapping_sub(entry.seen_s) < AGE_S)
        };
        self.entries.iter().filter(known).map(station)
    }

    /// Brings a station in that another process had learned.
    pub fn restore(&mut self, station: &Station, now_s: u32) {
        if station.fixed {
            self.fix(station.vid, station.mac, station.port);
        } else {
            self.learn(station.vid, station.mac, station.port, now_s.wrapping_sub(station.age_s));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: PortId = PortId(1);
    const B: PortId = PortId(2);

    #[test]
    fn stations_are_learned_move_and_age() {
        let mut table = MacTable::new(42);
        let mac = Mac(0x0200_0000_0001);
        assert_eq!(table.get(0, mac, 0), None);
        assert_eq!(table.learn(0, mac, A, 10), Learned::New);
        assert_eq!(table.learn(0, mac, A, 11), Learned::Known);
        assert_eq!((table.get(0, mac, 310), table.get(0, mac, 311)), (Some(A), None));
        assert_eq!(table.get(7, mac, 11), None, "in another VLAN it is another station");
        assert_eq!(table.learn(0, mac, B, 12), Learned::Moved);
        assert_eq!(table.get(0, mac, 12), Some(B));
        table.flush(Some(B));
        assert_eq!(table.get(0, mac, 12), None);
    }

    #[test]
    fn a_fixed_address_stays_where_it_is() {
        let mut table = MacTable::new(42);
        let mac = Mac(0x0200_0000_0001);
        table.learn(0, mac, B, 1);
        assert!(table.fix(0, mac, A));
        assert_eq!(table.learn(0, mac, B, 2), Learned::Foreign);
        assert_eq!((table.get(0, mac, 100_000), table.owner(0, mac)), (Some(A), Some(A)));
        table.flush(None);
        assert_eq!(table.owner(0, mac), Some(A));
    }

    #[test]
    fn one_port_cannot_push_the_others_out() {
        let mut table = MacTable::new(42);
        for n in 0..500 {
            assert_eq!(table.learn(0, Mac(0x0200_0000_0000 + n), A, 1), Learned::New);
        }
        for n in 0..200_000 {
            table.learn(0, Mac(0x0600_0000_0000 + n), B, 2);
        }
        let mine = (0..500).filter(|n| table.get(0, Mac(0x0200_0000_0000 + n), 3) == Some(A)).count();
        assert_eq!(mine, 500);
        let theirs = table.stations(3).filter(|station| station.port == B).count();
        assert!(theirs <= SHARE as usize, "{theirs}");
        assert_eq!(table.shares[B.index()] as usize, theirs);
    }
}
