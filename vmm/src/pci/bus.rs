//! The bus: 32 slots of one function each, and the three ways to them: the ports 0xcf8 and 0xcfc (PCI 3.0, 3.2.2.3.2), the
//! enhanced configuration mechanism (ECAM; PCI Express 5.0, 7.2.2), and the memory window that registers lie in.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::Function;
use super::config::{ConfigSpace, Identity};
use crate::bus::BusDevice;
use crate::layout::PCI_MMIO_START;

/// Slots of a bus.
pub const SLOTS: usize = 32;

/// The functions on the bus, by slot.
#[derive(Default)]
pub struct PciBus {
    slots: RwLock<[Option<Arc<dyn Function>>; SLOTS]>,
}

impl std::fmt::Debug for PciBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciBus").finish_non_exhaustive()
    }
}

impl PciBus {
    /// A bus with a host bridge in slot 0.
    pub fn new() -> Arc<Self> {
        let bus = Self::default();
        bus.insert(0, Arc::new(HostBridge::new()));
        Arc::new(bus)
    }

    /// The lowest slot in which nothing is.
    pub fn free_slot(&self) -> Option<u8> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().position(Option::is_none).map(|slot| slot as u8)
    }

    /// Whether nothing is in a slot that exists.
    pub fn is_free(&self, slot: u8) -> bool {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(usize::from(slot)).is_some_and(Option::is_none)
    }

    /// Puts a function into a slot.
    pub fn insert(&self, slot: u8, function: Arc<dyn Function>) {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = slots.get_mut(usize::from(slot)) {
            *place = Some(function);
        }
    }

    /// Takes what is in a slot; from now on it reads as empty.
    pub fn remove(&self, slot: u8) -> Option<Arc<dyn Function>> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let function = slots.get_mut(usize::from(slot))?.take();
        drop(slots);
        if let Some(function) = &function {
            function.unplugged();
        }
        function
    }

    /// What is in a slot.
    pub fn function(&self, slot: u8) -> Option<Arc<dyn Function>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(usize::from(slot))?.clone()
    }

    /// The function and register that an address of the configuration mechanisms names: bus, device, function, register.
    fn at(&self, bus: u32, device: u32, function: u32) -> Option<Arc<dyn Function>> {
        if bus == 0 && function == 0 { self.function(device as u8) } else { None }
    }

    fn config_read(&self, address: ConfigAddress, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(function) = self.at(address.bus, address.device, address.function) {
            function.config_read(address.register, data);
        }
    }

    fn config_write(&self, address: ConfigAddress, data: &[u8]) {
        if let Some(function) = self.at(address.bus, address.device, address.function) {
            function.config_write(address.register, data);
        }
    }

    /// Whose registers lie at an address.
    fn owner(&self, address: u64) -> Option<(u64, Arc<dyn Function>)> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().flatten().find_map(|function| {
            let (start, len) = function.registers()?;
            let offset = address.checked_sub(start)?;
            (offset < len).then(|| (offset, function.clone()))
        })
    }
}

#[derive(Clone, Copy)]
struct ConfigAddress {
    bus: u32,
    device: u32,
    function: u32,
    register: u16,
}

/// Whether an access of configuration space is one that hardware makes: 1, 2 or 4 bytes within a word.
fn is_proper(register: u16, len: usize) -> bool {
    matches!(len, 1 | 2 | 4) && usize::from(register % 4) + len <= 4
}

/// The ports 0xcf8 (address) and 0xcfc (data).
#[derive(Debug)]
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// Bytes: the address and the data.
    pub const LEN: u64 = 8;
    const ENABLE: u32 = 1 << 31;

    /// The ports of a bus.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus, address: AtomicU32::new(0) }
    }

    /// What was last written to the address port, for a snapshot.
    pub fn address(&self) -> u32 {
        self.address.load(Ordering::Relaxed)
    }

    /// Brings that back.
    pub fn set_address(&self, address: u32) {
        self.address.store(address, Ordering::Relaxed);
    }

    fn target(&self, offset: u64, len: usize) -> Option<ConfigAddress> {
        let address = self.address.load(Ordering::Relaxed);
        let within = offset.checked_sub(4)?;
        let register = (address & 0xfc) as u16 + within as u16;
        (address & Self::ENABLE != 0 && is_proper(register, len)).then_some(ConfigAddress {
            bus: address >> 16 & 0xff,
            device: address >> 11 & 0x1f,
            function: address >> 8 & 7,
            register,
        })
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(address) = self.target(offset, data.len()) {
            self.bus.config_read(address, data);
        } else if let (0, Ok(word)) = (offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            *word = self.address.load(Ordering::Relaxed).to_le_bytes();
        } else {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(address) = self.target(offset, data.len()) {
            self.bus.config_write(address, data);
        } else if let (0, Ok(word)) = (offset, <[u8; 4]>::try_from(data)) {
            self.address.store(u32::from_le_bytes(word), Ordering::Relaxed);
        }
    }

    fn is_wide(&self) -> bool {
        true
    }
}

/// The enhanced configuration mechanism, for one bus.
#[derive(Debug)]
pub struct Ecam(pub Arc<PciBus>);

impl Ecam {
    fn target(offset: u64, len: usize) -> Option<ConfigAddress> {
        let register = (offset & 0xfff) as u16;
        is_proper(register, len).then_some(ConfigAddress {
            bus: (offset >> 20) as u32,
            device: (offset >> 15 & 0x1f) as u32,
            function: (offset >> 12 & 7) as u32,
            register,
        })
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::target(offset, data.len()) {
            Some(address) => self.0.config_read(address, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(address) = Self::target(offset, data.len()) {
            self.0.config_write(address, data);
        }
    }
}

/// The memory window of the bus.
#[derive(Debug)]
pub struct Memory(pub Arc<PciBus>);

impl BusDevice for Memory {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, function)) = self.0.owner(PCI_MMIO_START + offset) {
            function.read(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((offset, function)) = self.0.owner(PCI_MMIO_START + offset) {
            function.write(offset, data);
        }
    }
}

/// The bridge between processors and bus: there to be found, with nothing to set.
struct HostBridge(ConfigSpace);

impl HostBridge {
    fn new() -> Self {
        // Red Hat's generic PCI Express host bridge, which operating systems know to need nothing.
        Self(ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        }))
    }
}

impl Function for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn config_write(&self, _offset: u16, _data: &[u8]) {}
    fn registers(&self) -> Option<(u64, u64)> {
        None
    }
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    /// Remembers accesses; its registers lie where it is told.
    #[derive(Default)]
    struct Probe(Mutex<Vec<(u16, usize)>>, u64);

    impl Function for Probe {
        fn config_read(&self, offset: u16, data: &mut [u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
            data.fill(offset as u8);
        }
        fn config_write(&self, offset: u16, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
        }
        fn registers(&self) -> Option<(u64, u64)> {
            (self.1 > 0).then_some((self.1, 0x1000))
        }
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, _offset: u64, _data: &[u8]) {}
    }

    fn get(device: &dyn BusDevice, offset: u64, len: usize) -> u32 {
        let mut data = [0; 4];
        device.read(offset, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    #[test]
    fn both_ways_lead_to_the_same_register() {
        let bus = PciBus::new();
        assert_eq!(bus.free_slot(), Some(1));
        let probe = Arc::new(Probe::default());
        bus.insert(3, probe.clone());
        let (ports, ecam) = (ConfigPorts::new(bus.clone()), Ecam(bus.clone()));
        ports.write(0, &(1u32 << 31 | 3 << 11 | 0x40).to_le_bytes());
        assert_eq!(get(&ports, 0, 4), 1u32 << 31 | 3 << 11 | 0x40);
        assert_eq!(get(&ports, 6, 2), 0x4242);
        assert_eq!(get(&ecam, 3 << 15 | 0x42, 2), 0x4242);
        ecam.write(3 << 15 | 0x100, &[0; 4]);
        assert_eq!(*probe.0.lock().unwrap(), [(0x42, 2), (0x42, 2), (0x100, 4)]);
        // Linux probes: nothing there, the other functions, the other buses, accesses across words.
        for offset in [4 << 15, 3 << 15 | 1 << 12, 1 << 20 | 3 << 15] {
            assert_eq!(get(&ecam, offset, 4), u32::MAX);
        }
        assert_eq!(get(&ecam, 3 << 15 | 2, 4), u32::MAX);
        ports.write(0, &(3u32 << 11).to_le_bytes());
        assert_eq!(get(&ports, 4, 4), u32::MAX, "not enabled");
        assert_eq!(get(&ecam, 0, 4), 0x0008_1b36);
        bus.remove(3).unwrap();
        assert_eq!(get(&ecam, 3 << 15, 4), u32::MAX);
    }

    #[test]
    fn the_window_finds_the_owner() {
        let bus = PciBus::new();
        bus.insert(1, Arc::new(Probe(Mutex::default(), PCI_MMIO_START + 0x1000)));
        let memory = Memory(bus);
        assert_eq!(get(&memory, 0x1004, 4), 0x0404_0404);
        assert_eq!(get(&memory, 0x2000, 4), u32::MAX);
        assert_eq!(get(&memory, 0xfff, 4), u32::MAX);
    }

    proptest! {
        #[test]
        fn no_access_panics(accesses in proptest::collection::vec((0u8..3, any::<bool>(), any::<u64>(), any::<[u8; 8]>(), 1usize..=8), 0..100)) {
            let bus = PciBus::new();
            let (ports, ecam, memory) = (ConfigPorts::new(bus.clone()), Ecam(bus.clone()), Memory(bus));
            for (which, write, offset, mut data, len) in accesses {
                let (device, offset): (&dyn BusDevice, u64) = match which {
                    0 => (&ports, offset % 8),
                    1 => (&ecam, offset % (1 << 20)),
                    _ => (&memory, offset % (1 << 28)),
                };
                if write { device.write(offset, &data[..len]) } else { device.read(offset, &mut data[..len]) }
            }
        }
    }
}
