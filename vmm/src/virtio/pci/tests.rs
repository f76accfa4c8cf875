//! The virtio-pci transport as a driver sees it: capabilities found by walking the list, and every structure reached
//! through what they say. No KVM: the wires only remember what is connected.

use std::os::fd::AsRawFd;

use proptest::prelude::*;

use super::common::reg;
use super::state::status;
use super::*;
use crate::kvm::wires::probe::Probe;
use crate::pci::config::{BAR0, COMMAND};
use crate::virtio::{Activation, F_VERSION_1};

const FEATURE: u64 = 1 << 5;
const BASE: u32 = PCI_MMIO_START as u32;

/// Features; index, size and used ring of each queue.
type Started = (u64, Vec<(u16, u16, u64)>);

#[derive(Default)]
struct Log {
    activations: Vec<Started>,
    resets: usize,
    interrupt: Option<Arc<dyn Interrupt>>,
}

struct Fake(Arc<Mutex<Log>>);

impl VirtioDevice for Fake {
    fn name(&self) -> &str {
        "fake"
    }
    fn device_type(&self) -> u32 {
        2
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn features(&self) -> u64 {
        F_VERSION_1 | FEATURE
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill((offset as u8).wrapping_add(0xc0));
    }
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    fn called_by_fd(&self) -> bool {
        true
    }
    fn activate(&mut self, a: Activation) -> Result<()> {
        let mut log = self.0.lock().unwrap();
        log.interrupt = Some(a.interrupt);
        log.activations.push((a.features, a.queues.iter().map(|q| (q.index, q.size, q.used_ring)).collect()));
        Ok(())
    }
    fn quiesce(&mut self) -> Result<()> {
        Ok(())
    }
    fn go_on(&mut self) -> Result<()> {
        Ok(())
    }
    fn reset(&mut self) -> Result<()> {
        self.0.lock().unwrap().resets += 1;
        Ok(())
    }
    fn stop_queue(&mut self, _index: u16) -> Result<()> {
        Ok(())
    }
}

struct Bed {
    pci: VirtioPci,
    wires: Arc<Probe>,
    log: Arc<Mutex<Log>>,
}

fn bed() -> Bed {
    let (log, wires) = (Arc::new(Mutex::new(Log::default())), Arc::new(Probe::default()));
    let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
    let pci = VirtioPci::new(Box::new(Fake(log.clone())), memory, wires.clone(), BASE).unwrap();
    Bed { pci, wires, log }
}

impl Bed {
    fn config(&self, at: u16, len: usize) -> u32 {
        let mut data = [0; 4];
        self.pci.config_read(at, &mut data[..len]);
        u32::from_le_bytes(data)
    }
    fn get(&self, at: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.pci.read(at, &mut data[..len]);
        u64::from_le_bytes(data)
    }
    fn put(&self, at: u64, len: usize, value: u64) {
        self.pci.write(at, &value.to_le_bytes()[..len]);
    }
    /// Offset in configuration space of the capability for which `is` holds.
    fn capability(&self, is: impl Fn(u16) -> bool) -> u16 {
        let mut at = self.config(0x34, 1) as u16;
        while at != 0 && !is(at) {
            at = self.config(at + 1, 1) as u16;
        }
        assert_ne!(at, 0, "no such capability");
        at
    }
    fn virtio(&self, kind: u8) -> u16 {
        self.capability(|at| {
            self.config(at, 1) == u32::from(cap::VENDOR) && self.config(at + 3, 1) == u32::from(kind)
        })
    }
    /// Where a structure lies in the region.
    fn structure(&self, kind: u8) -> u64 {
        u64::from(self.config(self.virtio(kind) + 8, 4))
    }
    fn enable(&self) {
        self.pci.config_write(COMMAND, &[6, 0]);
    }
    fn enable_msix(&self) {
        let at = self.capability(|at| self.config(at, 1) == u32::from(msix::CAPABILITY));
        self.pci.config_write(at + 2, &0x8000u16.to_le_bytes());
    }
    /// Goes through initialisation (3.1.1) with queue 0 at some place, vector 1 for it and 0 for the configuration.
    fn start(&self) {
        let status_at = reg::DEVICE_STATUS;
        self.enable();
        self.enable_msix();
        for vector in 0..2u64 {
            self.put(at::TABLE + vector * 16, 8, 0xfee0_0000);
            self.put(at::TABLE + vector * 16 + 8, 4, 0x40 + vector);
            self.put(at::TABLE + vector * 16 + 12, 4, 0);
        }
        self.put(status_at, 1, 0);
        self.put(status_at, 1, 1);
        self.put(status_at, 1, 3);
        for half in 0..2u64 {
            self.put(reg::DEVICE_FEATURE_SELECT, 4, half);
            let offered = self.get(reg::DEVICE_FEATURE, 4);
            self.put(reg::DRIVER_FEATURE_SELECT, 4, half);
            self.put(reg::DRIVER_FEATURE, 4, offered);
        }
        self.put(status_at, 1, 0xb);
        assert_eq!(self.get(status_at, 1), 0xb);
        self.put(reg::CONFIG_MSIX_VECTOR, 2, 0);
        self.put(reg::QUEUE_SELECT, 2, 0);
        self.put(reg::QUEUE_MSIX_VECTOR, 2, 1);
        assert_eq!(self.get(reg::QUEUE_MSIX_VECTOR, 2), 1);
        self.put(reg::QUEUE_SIZE, 2, 128);
        self.put(reg::QUEUE_DESC, 4, 0x1000);
        self.put(reg::QUEUE_DRIVER, 8, 0x2000);
        self.put(reg::QUEUE_DEVICE, 4, 0x3000);
        self.put(reg::QUEUE_DEVICE + 4, 4, 1);
        self.put(reg::QUEUE_ENABLE, 2, 1);
        self.put(status_at, 1, 0xf);
    }
}

#[test]
fn every_structure_is_announced_and_fits() {
    let bed = bed();
    assert_eq!(bed.config(0, 4), 0x1042_1af4);
    for kind in [cap::COMMON, cap::NOTIFY, cap::ISR, cap::DEVICE] {
        let at = bed.virtio(kind);
        let (offset, len) = (bed.config(at + 8, 4), bed.config(at + 12, 4));
        assert!(offset + len <= REGION_LEN && bed.config(at + 4, 1) == 0, "structure {kind}");
    }
    assert_eq!(bed.config(bed.virtio(cap::NOTIFY) + 16, 4), NOTIFY_MULTIPLIER);
    let msix_at = bed.capability(|at| bed.config(at, 1) == u32::from(msix::CAPABILITY));
    assert_eq!(bed.config(msix_at + 2, 2), 2, "three vectors");
    bed.virtio(cap::PCI_CFG);
    assert_eq!(bed.get(bed.structure(cap::COMMON) + reg::NUM_QUEUES, 2), 2);
    assert_eq!(bed.get(bed.structure(cap::DEVICE) + 2, 1), 0xc2);
}

#[test]
fn most_queues_fit_too() {
    struct Many(Vec<u16>);
    impl VirtioDevice for Many {
        fn name(&self) -> &str {
            "many"
        }
        fn device_type(&self) -> u32 {
            2
        }
        fn queue_max_sizes(&self) -> &[u16] {
            &self.0
        }
        fn features(&self) -> u64 {
            F_VERSION_1
        }
        fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
        fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
        fn called_by_fd(&self) -> bool {
            true
        }
        fn activate(&mut self, _activation: Activation) -> Result<()> {
            Ok(())
        }
        fn quiesce(&mut self) -> Result<()> {
            Ok(())
        }
        fn go_on(&mut self) -> Result<()> {
            Ok(())
        }
        fn reset(&mut self) -> Result<()> {
            Ok(())
        }
        fn stop_queue(&mut self, _index: u16) -> Result<()> {
            Ok(())
        }
    }
    const { assert!(at::TABLE + 256 * msix::ENTRY_LEN <= at::PENDING) };
    let (memory, wires) = (crate::kvm::memory::create(4 << 20, false).unwrap(), Arc::new(Probe::default()));
    let device = Box::new(Many(vec![2; 255]));
    let pci = VirtioPci::new(device, memory, wires.clone(), BASE).unwrap();
    pci.config_write(COMMAND, &[2, 0]);
    let notifies = wires.now().notifies.clone();
    assert_eq!(notifies.len(), 255);
    assert_eq!(*notifies.keys().last().unwrap(), u64::from(BASE) + at::NOTIFY + 254 * 4);
}

#[test]
fn two_functions_at_one_address_are_taken_apart_again() {
    let bed = bed();
    let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
    let other = VirtioPci::new(Box::new(Fake(bed.log.clone())), memory, bed.wires.clone(), BASE).unwrap();
    bed.pci.config_write(COMMAND, &[2, 0]);
    let notifies = bed.wires.now().notifies.clone();
    // The guest's doing: the second one's notifications are exits.
    other.config_write(COMMAND, &[2, 0]);
    assert_eq!(bed.wires.now().notifies, notifies);
    other.unplugged();
    assert_eq!(bed.wires.now().notifies, notifies);
    bed.pci.unplugged();
    assert!(bed.wires.now().notifies.is_empty());
}

#[test]
fn a_driver_starts_and_resets_the_device() {
    let bed = bed();
    bed.start();
    let log = &bed.log;
    assert_eq!(log.lock().unwrap().activations, [(F_VERSION_1 | FEATURE, vec![(0, 128, 0x1_0000_3000)])]);
    assert!(bed.pci.is_active());
    // Nothing about a queue changes while the device runs.
    bed.put(reg::QUEUE_DESC, 4, 0x9000);
    bed.put(reg::QUEUE_SIZE, 2, 16);
    assert_eq!((bed.get(reg::QUEUE_DESC, 8), bed.get(reg::QUEUE_SIZE, 2)), (0x1000, 128));
    bed.put(reg::DEVICE_STATUS, 1, 0);
    assert_eq!((bed.get(reg::DEVICE_STATUS, 1), log.lock().unwrap().resets), (0, 1));
    assert_eq!(bed.get(reg::QUEUE_MSIX_VECTOR, 2), u64::from(msix::NO_VECTOR));
    assert!(bed.wires.now().irqs.is_empty());
}

#[test]
fn each_queue_has_its_vector_and_the_descriptor_stays() {
    let bed = bed();
    bed.start();
    let interrupt = bed.log.lock().unwrap().interrupt.clone().unwrap();
    let call = interrupt.call_fd(0).unwrap().as_raw_fd();
    assert!(interrupt.call_fd(2).is_none(), "the configuration's is nobody's to give");
    let gsi = bed.wires.now().irqs[&call];
    assert_eq!(bed.wires.now().routes[&gsi].data, 0x41);
    // Masked, moved to another CPU, unmasked: the same descriptor all the time.
    bed.put(at::TABLE + 16 + 12, 4, 1);
    assert!(!bed.wires.now().irqs.contains_key(&call));
    interrupt.queue(0);
    assert_eq!(bed.get(at::PENDING, 8), 2);
    bed.put(at::TABLE + 16, 4, 0xfee0_1000);
    bed.put(at::TABLE + 16 + 12, 4, 0);
    assert_eq!(bed.wires.now().irqs[&call], gsi);
    assert_eq!(bed.wires.now().routes[&gsi].address, 0xfee0_1000);
    assert_eq!(interrupt.call_fd(0).unwrap().as_raw_fd(), call);
}

#[test]
fn the_configuration_interrupts_with_its_own_vector() {
    let bed = bed();
    bed.start();
    let interrupt = bed.log.lock().unwrap().interrupt.clone().unwrap();
    let before = bed.get(reg::CONFIG_GENERATION, 1);
    interrupt.config();
    assert_eq!(bed.get(reg::CONFIG_GENERATION, 1), before + 1);
    let isr = bed.structure(cap::ISR);
    assert_eq!((bed.get(isr, 1), bed.get(isr, 1)), (2, 0), "reading it clears it");
    assert_eq!(bed.pci.interrupt.events[2].read().unwrap(), 1);
}

#[test]
fn notifications_follow_the_region() {
    let bed = bed();
    let at = |base: u64, queue: u64| base + at::NOTIFY + queue * 4;
    let base = u64::from(BASE);
    assert!(bed.wires.now().notifies.is_empty() && bed.pci.registers().is_none());
    bed.enable();
    let kick = bed.pci.kick(1).unwrap().as_raw_fd();
    assert_eq!(bed.wires.now().notifies[&at(base, 1)], kick);
    assert_eq!(bed.pci.registers(), Some((base, u64::from(REGION_LEN))));
    bed.pci.config_write(BAR0, &(BASE + 0x5_0000).to_le_bytes());
    assert_eq!(bed.wires.now().notifies.len(), 2);
    assert_eq!(bed.wires.now().notifies[&at(base + 0x5_0000, 1)], kick);
    // Sizing, as firmware does it; over memory; over the local APIC.
    for wrong in [u32::MAX, 0, 0x10_0000, 0xfee0_0000, BASE - REGION_LEN, PCI_MMIO_END as u32] {
        bed.pci.config_write(BAR0, &wrong.to_le_bytes());
        assert!(bed.wires.now().notifies.is_empty() && bed.pci.registers().is_none(), "{wrong:#x}");
    }
    bed.pci.config_write(BAR0, &BASE.to_le_bytes());
    assert_eq!(bed.wires.now().notifies.len(), 2);
    bed.pci.unplugged();
    assert!(bed.wires.now().notifies.is_empty() && bed.pci.registers().is_none());
}

#[test]
fn a_notification_that_exits_kicks_too() {
    let bed = bed();
    bed.put(at::NOTIFY + 4, 2, 1);
    assert_eq!(bed.pci.kick(1).unwrap().read().unwrap(), 1);
    bed.put(at::NOTIFY + 8, 2, 1);
    assert!(bed.pci.kick(0).unwrap().read().is_err());
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let bed = bed();
    let window = bed.virtio(cap::PCI_CFG);
    let aim = |offset: u32, len: u32| {
        bed.pci.config_write(window + 8, &offset.to_le_bytes());
        bed.pci.config_write(window + 12, &len.to_le_bytes());
    };
    aim(reg::NUM_QUEUES as u32, 2);
    assert_eq!(bed.config(window + 16, 2), 2);
    aim(reg::DEVICE_STATUS as u32, 1);
    bed.pci.config_write(window + 16, &[1, 0, 0, 0]);
    assert_eq!(bed.get(reg::DEVICE_STATUS, 1), 1);
    for (offset, len) in [(REGION_LEN, 4), (1, 2), (0, 3), (u32::MAX, 4), (0, 0), (0, u32::MAX)] {
        aim(offset, len);
        bed.config(window + 16, 4);
    }
}

#[test]
fn wrong_widths_and_wrong_features_do_nothing() {
    let bed = bed();
    bed.put(reg::DEVICE_STATUS, 4, 1);
    assert_eq!(bed.get(reg::DEVICE_STATUS, 1), 0);
    bed.put(reg::DEVICE_STATUS, 1, 3);
    bed.put(reg::DRIVER_FEATURE, 4, 1 << 9);
    bed.put(reg::DEVICE_STATUS, 1, 0xb);
    assert_eq!(bed.get(reg::DEVICE_STATUS, 1), u64::from(status::ACKNOWLEDGE | status::DRIVER));
    bed.put(reg::QUEUE_SELECT, 2, 7);
    assert_eq!((bed.get(reg::QUEUE_SIZE, 2), bed.get(reg::QUEUE_MSIX_VECTOR, 2)), (0, 0xffff));
    bed.put(reg::QUEUE_SELECT, 2, 1);
    bed.put(reg::QUEUE_SIZE, 2, 128);
    assert_eq!(bed.get(reg::QUEUE_SIZE, 2), 0, "more than there can be");
}

#[test]
fn a_saved_device_goes_on() {
    let old = bed();
    old.start();
    old.pci.config_write(BAR0, &(BASE + 0x7_0000).to_le_bytes());
    let saved = old.pci.save();
    let text = serde_json::to_string(&saved).unwrap();
    let new = bed();
    new.pci.restore(&serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!(new.pci.save(), saved);
    assert_eq!(new.log.lock().unwrap().activations, old.log.lock().unwrap().activations);
    assert_eq!(new.wires.counts(), (2, 2, 2));
    assert_eq!(new.pci.registers(), old.pci.registers());
}

proptest! {
    /// Whatever is done to registers and configuration space: no panic, and afterwards nothing stays connected.
    #[test]
    fn no_access_panics(steps in proptest::collection::vec((0u8..6, any::<u16>(), any::<u64>(), 0usize..4), 0..120)) {
        let bed = bed();
        for (what, offset, value, width) in steps {
            let len = 1 << width;
            let register = u64::from(offset) & !(len as u64 - 1);
            let config = (register as u16 & 0xff, len.min(4));
            match what {
                0 => { bed.get(register, len); }
                1 => bed.put(register, len, value),
                2 => { bed.config(config.0, config.1); }
                3 => bed.pci.config_write(config.0, &value.to_le_bytes()[..config.1]),
                4 => bed.put(register % 0x38, len, value),
                _ => bed.put(at::TABLE + register % 48, len, value),
            }
        }
        bed.pci.unplugged();
        let Bed { pci, wires, .. } = bed;
        drop(pci);
        prop_assert_eq!(wires.counts(), (0, 0, 0));
    }
}
