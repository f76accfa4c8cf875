//! Which sessions there are: their handles (TSIH), and which one a login replaces (RFC 7143 6.3.5).

use iscsi::pdu::Isid;

use crate::device::NexusId;

/// What makes a session the same as an earlier one: initiator, ISID, target and target portal group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) initiator: String,
    pub(super) isid: Isid,
    /// None for discovery sessions, which are kept apart.
    pub(super) target: Option<usize>,
    /// Target portal group tag.
    pub(super) group: u16,
}

#[derive(Debug)]
struct Entry {
    key: Key,
    tsih: u16,
    conn: usize,
}

/// The sessions.
#[derive(Debug, Default)]
pub(super) struct Registry {
    entries: Vec<Entry>,
    last_tsih: u16,
    last_nexus: NexusId,
}

impl Registry {
    /// The connection of the session that `key` names.
    pub(super) fn find(&self, key: &Key) -> Option<usize> {
        self.entries.iter().find(|entry| entry.key == *key).map(|entry| entry.conn)
    }

    /// A handle that no session has, never 0. There are fewer connections than handles.
    pub(super) fn free_tsih(&mut self) -> u16 {
        loop {
            self.last_tsih = self.last_tsih.wrapping_add(1);
            if self.last_tsih != 0 && self.entries.iter().all(|entry| entry.tsih != self.last_tsih) {
                return self.last_tsih;
            }
        }
    }

    /// Whether there is a session of this handle.
    pub(super) fn has(&self, tsih: u16) -> bool {
        self.entries.iter().any(|entry| entry.tsih == tsih)
    }

    /// Enters a session and gives it an identity.
    pub(super) fn enter(&mut self, key: Key, tsih: u16, conn: usize) -> NexusId {
        self.entries.push(Entry { key, tsih, conn });
        self.last_nexus += 1;
        self.last_nexus
    }

    /// The session of a connection is over.
    pub(super) fn leave(&mut self, conn: usize) {
        self.entries.retain(|entry| entry.conn != conn);
    }

    /// Number of sessions.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_are_unique_and_not_zero() {
        let mut registry = Registry { last_tsih: 0xFFFD, ..Registry::default() };
        let mut seen = std::collections::HashSet::new();
        for conn in 0..100 {
            let tsih = registry.free_tsih();
            assert!(tsih != 0 && seen.insert(tsih));
            let key = Key { initiator: format!("iqn.{conn}"), isid: Isid([0; 6]), target: Some(0), group: 1 };
            assert_eq!(registry.find(&key), None);
            registry.enter(key.clone(), tsih, conn);
            assert_eq!(registry.find(&key), Some(conn));
        }
        registry.leave(7);
        assert_eq!(registry.len(), 99);
    }
}
