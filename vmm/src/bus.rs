//! Two flat address spaces, ports and memory, and the devices in them. An access that no device claims reads as ones
//! and is ignored on write, as on real hardware; no access of any size anywhere is an error.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

/// A device as a bus sees it. Calls come from vCPU threads, several at a time: a device locks for itself.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes (1 to 8) at `offset` from the device's start.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` (1 to 8 bytes) at `offset` from the device's start.
    fn write(&self, offset: u64, data: &[u8]);
    /// True if its ports are wider than a byte: it gets an access of 2 or 4 bytes as one.
    fn is_wide(&self) -> bool {
        false
    }
}

/// Start address to length and device.
type Ranges = BTreeMap<u64, (u64, Arc<dyn BusDevice>)>;

/// Ranges of addresses and who answers there. Devices come and go while the guest runs.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<Ranges>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.ranges().iter().map(|(start, (len, _))| (start, len))).finish()
    }
}

impl Bus {
    /// Puts a device at `start`. Ranges are set up by the monitor and do not overlap; an overlap is refused.
    pub fn insert(&self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> bool {
        let Some(end) = start.checked_add(len).filter(|_| len > 0) else { return false };
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let clash = ranges.range(..end).next_back().is_some_and(|(s, (l, _))| s + l > start);
        if !clash {
            ranges.insert(start, (len, device));
        }
        !clash
    }

    /// Takes the device that begins at `start` away. An access that is under way still ends in it.
    pub fn remove(&self, start: u64) -> bool {
        self.ranges.write().unwrap_or_else(PoisonError::into_inner).remove(&start).is_some()
    }

    fn ranges(&self) -> std::sync::RwLockReadGuard<'_, Ranges> {
        self.ranges.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device at an address. The lock is not held while it answers, for it may change the bus.
    fn find(&self, addr: u64) -> Option<(u64, Arc<dyn BusDevice>)> {
        let ranges = self.ranges();
        let (start, (len, device)) = ranges.range(..=addr).next_back()?;
        let offset = addr - start;
        (offset < *len).then(|| (offset, device.clone()))
    }

    /// A read by the guest.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(addr) {
            device.read(offset, data);
        }
    }

    /// A read from ports. KVM tells the bytes of a repeated string instruction in one go, and not how wide each access was.
    /// Most ports are byte registers, where a wider access has no meaning but the same; what has wide ones says so.
    pub fn read_ports(&self, port: u64, data: &mut [u8]) {
        if self.is_wide(port, data.len()) {
            return self.read(port, data);
        }
        for byte in data.chunks_mut(1) {
            self.read(port, byte);
        }
    }

    /// A write to ports; false if nobody is there.
    pub fn write_ports(&self, port: u64, data: &[u8]) -> bool {
        if self.is_wide(port, data.len()) {
            return self.write(port, data);
        }
        data.chunks(1).all(|byte| self.write(port, byte))
    }

    fn is_wide(&self, port: u64, len: usize) -> bool {
        matches!(len, 2 | 4) && self.find(port).is_some_and(|(_, device)| device.is_wide())
    }

    /// A write by the guest; false if nobody is there.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        match self.find(addr) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Probe(Mutex<Vec<(u64, usize)>>);
    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
        }
    }

    #[test]
    fn accesses_go_to_the_device_or_nowhere() {
        let bus = Bus::default();
        let probe = Arc::new(Probe::default());
        assert!(bus.insert(0x100, 0x10, probe.clone()));
        assert!(!bus.insert(0x10f, 1, probe.clone()));
        assert!(!bus.insert(0xf8, 9, probe.clone()));
        assert!(!bus.insert(u64::MAX, 2, probe.clone()));
        assert!(bus.insert(0x110, 1, probe.clone()));
        let mut data = [0u8; 4];
        bus.read(0x103, &mut data);
        assert_eq!(data, [3; 4]);
        bus.read(0xff, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert!(bus.write(0x10f, &[1, 2]) && !bus.write(0x111, &[1]) && !bus.write(u64::MAX, &[1; 8]));
        assert_eq!(*probe.0.lock().unwrap(), vec![(0xf, 2)]);
        assert!(bus.remove(0x100) && !bus.remove(0x101) && !bus.write(0x103, &[1]));
    }
}
