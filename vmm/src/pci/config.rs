//! Configuration space of a function with a type 0 header (PCI 3.0, chapter 6): bytes, and which of their bits the guest
//! may change.

/// Bytes of the space that PCI devices have; the extended space beyond reads as zero.
pub const LEN: usize = 256;
/// Command register.
pub const COMMAND: u16 = 0x04;
/// Command: the function answers memory accesses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CACHE_LINE: usize = 0x0c;
/// First base address register.
pub const BAR0: u16 = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// Where capabilities begin, behind the header.
const FIRST_CAPABILITY: usize = 0x40;

/// What a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface, 24 bits.
    pub class: u32,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// The space.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    /// Where the link to the next capability is to be written, and where that may begin.
    link: usize,
    end: usize,
}

impl std::fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigSpace").field("id", &self.u32(0)).finish_non_exhaustive()
    }
}

impl ConfigSpace {
    /// A function that answers nothing yet and has no capabilities.
    pub fn new(id: Identity) -> Self {
        let mut space =
            Self { bytes: [0; LEN], writable: [0; LEN], link: CAPABILITIES, end: FIRST_CAPABILITY };
        space.put(0x00, &id.vendor.to_le_bytes());
        space.put(0x02, &id.device.to_le_bytes());
        space.put(0x08, &(id.class << 8 | u32::from(id.revision)).to_le_bytes());
        space.put(0x2c, &id.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &id.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE;
        space.allow(usize::from(COMMAND), &command.to_le_bytes());
        space.allow(CACHE_LINE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Gives the first base address register `len` bytes (a power of two, at least 16) of 32-bit memory at `address`, a
    /// multiple of that. A guest that writes ones reads the length back, because the low bits do not change.
    pub fn set_bar0(&mut self, address: u32, len: u32) {
        debug_assert!(len.is_power_of_two() && len >= 16 && address.is_multiple_of(len));
        self.put(usize::from(BAR0), &address.to_le_bytes());
        self.allow(usize::from(BAR0), &(!(len - 1)).to_le_bytes());
    }

    /// Where the first base address register points.
    pub fn bar0(&self) -> u32 {
        self.u32(usize::from(BAR0)) & !0xf
    }

    /// Whether the function answers memory accesses.
    pub fn memory_enabled(&self) -> bool {
        self.bytes[usize::from(COMMAND)] & COMMAND_MEMORY as u8 != 0
    }

    /// Adds a capability: its id, what follows id and link, and which bits of that the guest may change (as many bytes as
    /// wanted). Returns its offset; `None` if there is no room.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u16> {
        let at = self.end;
        let end = at + 2 + body.len();
        if end > LEN || writable.len() > body.len() {
            return None;
        }
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.bytes[self.link] = at as u8;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.link = at + 1;
        self.end = end.next_multiple_of(4);
        Some(at as u16)
    }

    /// Reads; what is beyond the end is zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + i).copied().unwrap_or(0);
        }
    }

    /// A write by the guest: only what it may change changes.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *old = *old & !mask | byte & mask;
            }
        }
    }

    /// Two bytes as a number.
    pub fn u16(&self, at: usize) -> u16 {
        self.bytes.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
    }

    /// Four bytes as a number.
    pub fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    /// All that the guest may have changed, for a snapshot.
    pub fn bytes(&self) -> &[u8; LEN] {
        &self.bytes
    }

    /// Brings back what the guest had changed; what it could not have changed stays as it is.
    pub fn restore(&mut self, bytes: &[u8]) {
        for at in 0..bytes.len().min(LEN) {
            self.write(at as u16, &bytes[at..=at]);
        }
    }

    /// Sets bytes, whatever the guest may do.
    fn put(&mut self, at: usize, data: &[u8]) {
        self.bytes[at..at + data.len()].copy_from_slice(data);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        space.set_bar0(0xc001_0000, 0x1_0000);
        space
    }

    #[test]
    fn header_says_what_it_is() {
        let space = space();
        assert_eq!(space.u32(0), 0x1042_1af4);
        assert_eq!(space.u32(8), 0x0100_0001);
        assert_eq!(space.u32(0x2c), 0x0040_1af4);
        assert_eq!(space.u16(6), 0, "no capabilities, none announced");
        let mut beyond = [7; 4];
        space.read(0xfe, &mut beyond);
        assert_eq!(beyond[2..], [0, 0]);
        space.read(0xffc, &mut beyond);
        assert_eq!(beyond, [0; 4]);
    }

    #[test]
    fn ones_in_a_bar_tell_its_length() {
        let mut space = space();
        assert!(!space.memory_enabled());
        space.write(BAR0, &[0xff; 4]);
        assert_eq!(space.u32(BAR0.into()), 0xffff_0000);
        space.write(BAR0, &0xc123_4567u32.to_le_bytes());
        assert_eq!(space.bar0(), 0xc123_0000);
        // The other registers are not there.
        space.write(BAR0 + 4, &[0xff; 20]);
        assert_eq!(space.u32(0x14), 0);
        space.write(COMMAND, &[0xff, 0xff]);
        assert_eq!(space.u16(4), 0x406);
        assert!(space.memory_enabled());
    }

    #[test]
    fn capabilities_are_a_list_that_ends() {
        let mut space = space();
        let first = space.add_capability(0x09, &[1; 14], &[]).unwrap();
        let second = space.add_capability(0x11, &[0; 10], &[0, 0xc0]).unwrap();
        assert_eq!((first, second), (0x40, 0x50));
        assert_eq!(space.bytes[STATUS] & STATUS_CAPABILITIES, STATUS_CAPABILITIES);
        let mut at = usize::from(space.bytes[CAPABILITIES]);
        let mut ids = Vec::new();
        while at != 0 {
            ids.push(space.bytes[at]);
            at = usize::from(space.bytes[at + 1]);
        }
        assert_eq!(ids, [0x09, 0x11]);
        space.write(second + 2, &[0xff; 10]);
        assert_eq!(space.u16(usize::from(second) + 2), 0xc000);
        assert_eq!(space.u32(usize::from(second) + 4), 0);
        assert_eq!(space.add_capability(9, &[0; 180], &[]), None, "no room");
    }

    proptest! {
        /// Whatever is written wherever, only bits that may change do.
        #[test]
        fn nothing_else_changes(writes in proptest::collection::vec((any::<u16>(), proptest::collection::vec(any::<u8>(), 0..9)), 0..60)) {
            let fresh = space();
            let mut space = fresh.clone();
            for (offset, data) in writes {
                space.write(offset, &data);
            }
            for at in 0..LEN {
                prop_assert_eq!((space.bytes[at] ^ fresh.bytes[at]) & !fresh.writable[at], 0, "byte {:#x}", at);
            }
        }
    }
}
