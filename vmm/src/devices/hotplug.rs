//! The registers by which the guest's ACPI code hears of events: the power button, and functions of the PCI bus that have
//! come or are to go. `crate::acpi` has the code.
//!
//! | offset | register (32 bits) | read | written |
//! | --- | --- | --- | --- |
//! | 0 | `PCIU` | slots whose functions have come; cleared by that | ignored |
//! | 4 | `PCID` | slots whose functions are to go; cleared by that | ignored |
//! | 8 | `B0EJ` | 0 | slots whose functions the guest has let go of |
//! | 12 | `GEVT` | events, [`EVENT_PCI`] and [`EVENT_POWER_BUTTON`]; cleared by that | ignored |

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::error::{Error, Result};

/// Bytes of registers.
pub const LEN: u64 = 16;
/// Something has come or is to go on the PCI bus.
pub const EVENT_PCI: u8 = 1;
/// The power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 2;

const UP: u64 = 0;
const DOWN: u64 = 4;
const EJECT: u64 = 8;
const EVENTS: u64 = 12;

/// The registers.
pub struct Hotplug {
    up: AtomicU32,
    down: AtomicU32,
    events: AtomicU32,
    irq: EventFd,
    eject: Box<dyn Fn(u8) + Send + Sync>,
}

impl std::fmt::Debug for Hotplug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hotplug").finish_non_exhaustive()
    }
}

impl Hotplug {
    /// `eject`: called on a vCPU's thread with a slot whose function the guest has let go of.
    pub fn new(eject: Box<dyn Fn(u8) + Send + Sync>) -> Result<Arc<Self>> {
        let irq =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::os("create an eventfd"))?;
        let zero = || AtomicU32::new(0);
        Ok(Arc::new(Self { up: zero(), down: zero(), events: zero(), irq, eject }))
    }

    /// What raises the interrupt line.
    pub fn irq(&self) -> &EventFd {
        &self.irq
    }

    /// Tells the guest that a function has come.
    pub fn announce(&self, slot: u8) {
        self.up.fetch_or(1 << slot, Ordering::AcqRel);
        self.raise(EVENT_PCI);
    }

    /// Asks the guest to let go of a function.
    pub fn ask_back(&self, slot: u8) {
        self.down.fetch_or(1 << slot, Ordering::AcqRel);
        self.raise(EVENT_PCI);
    }

    /// Presses the power button.
    pub fn press(&self) {
        self.raise(EVENT_POWER_BUTTON);
    }

    fn raise(&self, event: u8) {
        self.events.fetch_or(event.into(), Ordering::AcqRel);
        // Fails only if the counter is full, which means that an interrupt is on its way.
        let _ = self.irq.write(1);
    }

    /// What has not been read yet, for a snapshot: the registers in their order.
    pub fn save(&self) -> [u32; 3] {
        [&self.up, &self.down, &self.events].map(|register| register.load(Ordering::Acquire))
    }

    /// Brings that back.
    pub fn restore(&self, saved: [u32; 3]) {
        for (register, value) in [&self.up, &self.down, &self.events].into_iter().zip(saved) {
            register.store(value, Ordering::Release);
        }
    }
}

impl BusDevice for Hotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(word) = <&mut [u8; 4]>::try_from(&mut *data) else { return data.fill(0) };
        let value = match offset {
            UP => self.up.swap(0, Ordering::AcqRel),
            DOWN => self.down.swap(0, Ordering::AcqRel),
            EVENTS => self.events.swap(0, Ordering::AcqRel),
            _ => 0,
        };
        *word = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (EJECT, Ok(word)) = (offset, <[u8; 4]>::try_from(data)) {
            let slots = u32::from_le_bytes(word);
            (0..32).filter(|slot| slots & 1 << slot != 0).for_each(|slot| (self.eject)(slot));
        }
    }

    fn is_wide(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    type Ejected = Arc<Mutex<Vec<u8>>>;

    fn hotplug() -> (Arc<Hotplug>, Ejected) {
        let ejected = Ejected::default();
        let log = ejected.clone();
        (Hotplug::new(Box::new(move |slot| log.lock().unwrap().push(slot))).unwrap(), ejected)
    }

    fn read(hotplug: &Hotplug, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        hotplug.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn each_event_is_told_once() {
        let (hotplug, _) = hotplug();
        hotplug.announce(3);
        hotplug.ask_back(31);
        assert_eq!(hotplug.irq().read().unwrap(), 2);
        assert_eq!((read(&hotplug, EVENTS), read(&hotplug, EVENTS)), (1, 0));
        assert_eq!((read(&hotplug, UP), read(&hotplug, UP)), (8, 0));
        assert_eq!((read(&hotplug, DOWN), read(&hotplug, DOWN)), (1 << 31, 0));
        hotplug.press();
        assert_eq!(read(&hotplug, EVENTS), 2);
        assert_eq!(hotplug.irq().read().unwrap(), 1);
    }

    #[test]
    fn what_the_guest_lets_go_of_is_told() {
        let (hotplug, ejected) = hotplug();
        hotplug.write(EJECT, &(1u32 << 4 | 1 << 9).to_le_bytes());
        hotplug.write(EJECT, &[1]);
        hotplug.write(UP, &[0xff; 4]);
        assert_eq!(*ejected.lock().unwrap(), [4, 9]);
        assert_eq!(read(&hotplug, UP), 0);
    }

    proptest! {
        #[test]
        fn no_access_panics(accesses in proptest::collection::vec((any::<bool>(), 0u64..16, any::<[u8; 8]>(), 0usize..=8), 0..100)) {
            let (hotplug, _) = hotplug();
            for (write, offset, mut data, len) in accesses {
                if write { hotplug.write(offset, &data[..len]) } else { hotplug.read(offset, &mut data[..len]) }
            }
        }
    }
}
