//! Event descriptors bound to interrupts and notifications while the guest runs: what a PCI device connects and
//! disconnects as its driver masks vectors and moves its registers. Behind a trait, so that devices can be tried without KVM.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vm_allocator::IdAllocator;
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};

/// Pins of the I/O APIC; message-signalled interrupts have numbers from here on.
const IOAPIC_PINS: u32 = 24;
/// Most routes that KVM takes (KVM_MAX_IRQ_ROUTES).
const MAX_ROUTES: u32 = 4096;

/// A message-signalled interrupt as the driver has programmed it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msi {
    /// Where it is written.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// What a device needs of the hypervisor while it runs.
pub trait Wires: Send + Sync {
    /// A number for an interrupt of one's own.
    fn allocate(&self) -> Result<u32>;
    /// Gives it back; nothing is connected to it any more.
    fn free(&self, gsi: u32);
    /// Sets what an interrupt is.
    fn route(&self, gsi: u32, msi: Msi) -> Result<()>;
    /// Every signal of `event` raises the interrupt from now on; at once if it is signalled already.
    fn connect(&self, event: &EventFd, gsi: u32) -> Result<()>;
    /// Signals stay in `event` from now on.
    fn disconnect(&self, event: &EventFd, gsi: u32) -> Result<()>;
    /// A write to the guest address signals `event`, without an exit.
    fn notify(&self, event: &EventFd, addr: u64) -> Result<()>;
    /// Takes that back.
    fn unnotify(&self, event: &EventFd, addr: u64) -> Result<()>;
}

/// [`Wires`] of a KVM virtual machine.
pub struct KvmWires {
    vm: Arc<VmFd>,
    state: Mutex<Routes>,
}

struct Routes {
    ids: IdAllocator,
    msis: BTreeMap<u32, Msi>,
}

impl std::fmt::Debug for KvmWires {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmWires").finish_non_exhaustive()
    }
}

impl KvmWires {
    pub(super) fn new(vm: Arc<VmFd>) -> Result<Self> {
        let ids = IdAllocator::new(IOAPIC_PINS, MAX_ROUTES - 1)
            .map_err(|e| Error::Os { action: "number interrupts", source: std::io::Error::other(e) })?;
        Ok(Self { vm, state: Mutex::new(Routes { ids, msis: BTreeMap::new() }) })
    }

    fn state(&self) -> MutexGuard<'_, Routes> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The routes of the legacy controllers, as KVM has them before any others are set.
fn legacy() -> Vec<kvm_irq_routing_entry> {
    let pin = |gsi: u32, irqchip: u32, pin: u32| {
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    };
    let pic = |gsi: u32| if gsi < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
    (0..16)
        .map(|gsi| pin(gsi, pic(gsi), gsi % 8))
        .chain((0..IOAPIC_PINS).map(|gsi| pin(gsi, KVM_IRQCHIP_IOAPIC, gsi)))
        .collect()
}

fn message(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: msi.address as u32,
        address_hi: (msi.address >> 32) as u32,
        data: msi.data,
        ..Default::default()
    };
    entry
}

impl Wires for KvmWires {
    fn allocate(&self) -> Result<u32> {
        self.state()
            .ids
            .allocate_id()
            .map_err(|e| Error::Os { action: "get another interrupt", source: std::io::Error::other(e) })
    }

    fn free(&self, gsi: u32) {
        let mut state = self.state();
        state.msis.remove(&gsi);
        let _ = state.ids.free_id(gsi);
    }

    fn route(&self, gsi: u32, msi: Msi) -> Result<()> {
        let mut state = self.state();
        if state.msis.insert(gsi, msi) == Some(msi) {
            return Ok(());
        }
        let mut entries = legacy();
        entries.extend(state.msis.iter().map(|(gsi, msi)| message(*gsi, *msi)));
        let table = KvmIrqRouting::from_entries(&entries).map_err(|e| Error::Os {
            action: "build the table of interrupt routes",
            source: std::io::Error::other(format!("{e:?}")),
        })?;
        self.vm.set_gsi_routing(&table).map_err(Error::kvm("route an interrupt"))
    }

    fn connect(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.vm.register_irqfd(event, gsi).map_err(Error::kvm("bind an interrupt to an eventfd"))
    }

    fn disconnect(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.vm.unregister_irqfd(event, gsi).map_err(Error::kvm("take an interrupt from an eventfd"))
    }

    fn notify(&self, event: &EventFd, addr: u64) -> Result<()> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(addr), NoDatamatch)
            .map_err(Error::kvm("bind a notification to an eventfd"))
    }

    fn unnotify(&self, event: &EventFd, addr: u64) -> Result<()> {
        self.vm
            .unregister_ioevent(event, &IoEventAddress::Mmio(addr), NoDatamatch)
            .map_err(Error::kvm("take a notification from an eventfd"))
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub mod probe {
    //! [`Wires`] that only remember what is connected, and check that nothing is connected twice.

    use super::*;

    /// What is connected.
    #[derive(Debug, Default)]
    pub struct Probe(pub Mutex<Connected>);

    /// By descriptor number.
    #[derive(Debug, Default)]
    pub struct Connected {
        next: u32,
        /// Interrupts in use.
        pub gsis: Vec<u32>,
        /// What they are.
        pub routes: BTreeMap<u32, Msi>,
        /// Descriptors that raise them.
        pub irqs: BTreeMap<i32, u32>,
        /// Addresses that signal descriptors.
        pub notifies: BTreeMap<u64, i32>,
    }

    impl Probe {
        /// How many interrupts are in use, connected descriptors, and connected notifications.
        pub fn counts(&self) -> (usize, usize, usize) {
            let now = self.now();
            (now.gsis.len(), now.irqs.len(), now.notifies.len())
        }

        /// What is connected now. Locked as long as the answer lives.
        pub fn now(&self) -> MutexGuard<'_, Connected> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl Wires for Probe {
        fn allocate(&self) -> Result<u32> {
            let mut now = self.now();
            now.next += 1;
            let gsi = now.next;
            now.gsis.push(gsi);
            Ok(gsi)
        }
        fn free(&self, gsi: u32) {
            let mut now = self.now();
            assert!(!now.irqs.values().any(|used| *used == gsi), "a connected interrupt is freed");
            now.gsis.retain(|used| *used != gsi);
            now.routes.remove(&gsi);
        }
        fn route(&self, gsi: u32, msi: Msi) -> Result<()> {
            self.now().routes.insert(gsi, msi);
            Ok(())
        }
        fn connect(&self, event: &EventFd, gsi: u32) -> Result<()> {
            use std::os::fd::AsRawFd;
            let old = self.now().irqs.insert(event.as_raw_fd(), gsi);
            assert_eq!(old, None, "connected twice");
            Ok(())
        }
        fn disconnect(&self, event: &EventFd, gsi: u32) -> Result<()> {
            use std::os::fd::AsRawFd;
            let old = self.now().irqs.remove(&event.as_raw_fd());
            assert_eq!(old, Some(gsi), "disconnected without being connected");
            Ok(())
        }
        fn notify(&self, event: &EventFd, addr: u64) -> Result<()> {
            use std::os::fd::AsRawFd;
            let mut now = self.now();
            if now.notifies.contains_key(&addr) {
                // As KVM does, and the guest can bring it about.
                let taken = kvm_ioctls::Error::new(libc::EEXIST);
                return Err(Error::kvm("bind a notification to an eventfd")(taken));
            }
            now.notifies.insert(addr, event.as_raw_fd());
            Ok(())
        }
        fn unnotify(&self, event: &EventFd, addr: u64) -> Result<()> {
            use std::os::fd::AsRawFd;
            let old = self.now().notifies.remove(&addr);
            assert_eq!(old, Some(event.as_raw_fd()), "no such notification");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legacy_routes_are_kvms_own() {
        let entries = legacy();
        assert_eq!(entries.len(), 16 + 24);
        assert!(entries.iter().all(|e| e.type_ == KVM_IRQ_ROUTING_IRQCHIP && e.gsi < 24));
    }
}
