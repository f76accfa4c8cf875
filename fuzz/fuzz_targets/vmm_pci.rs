//! A hostile driver on the PCI bus: accesses to the configuration ports, to ECAM and to the memory window, with two
//! virtio-pci functions on the bus and wires that check what is connected.
//!
//! Holds: no panic; nothing is connected twice, or taken apart without being connected; two functions never answer with
//! less than the bus promises; what is unplugged leaves nothing connected.
#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use vmm::bus::BusDevice;
use vmm::kvm::GuestMemory;
use vmm::kvm::wires::probe::Probe;
use vmm::pci::Function;
use vmm::pci::bus::{ConfigPorts, Ecam, Memory, PciBus};
use vmm::virtio::balloon::Balloon;
use vmm::virtio::pci::VirtioPci;
use vmm::virtio::rng::Rng;

const MMIO: u32 = 0xc000_0000;

static MEMORY: LazyLock<Arc<GuestMemory>> =
    LazyLock::new(|| vmm::kvm::memory::create(4 << 20, false).expect("memory"));

fuzz_target!(|data: &[u8]| {
    let bus = PciBus::new();
    let wires = Arc::new(Probe::default());
    let rng =
        VirtioPci::new(Box::new(Rng::new().0), MEMORY.clone(), wires.clone(), MMIO).expect("a function");
    let balloon = VirtioPci::new(Box::new(Balloon::new().0), MEMORY.clone(), wires.clone(), MMIO + 0x1_0000)
        .expect("a function");
    let functions: [Arc<dyn Function>; 2] = [Arc::new(rng), Arc::new(balloon)];
    for (slot, function) in (1..).zip(&functions) {
        bus.insert(slot, function.clone());
    }
    let (ports, ecam, memory) = (ConfigPorts::new(bus.clone()), Ecam(bus.clone()), Memory(bus.clone()));
    for step in data.chunks_exact(12) {
        let [what, width, a, b, value @ ..] = step else { return };
        let (what, len) = (*what, 1usize << (width % 4));
        let offset = u64::from(u16::from_le_bytes([*a, *b]));
        // Near what is there; the rest of each space is empty.
        let (device, offset): (&dyn BusDevice, u64) = match what % 4 {
            0 => (&ports, offset % 8),
            1 => (&ecam, u64::from(what >> 2 & 3) << 15 | offset & 0xfff),
            2 => (&memory, u64::from(what >> 2 & 7) << 16 | offset),
            // The common configuration and the table, where most of it happens.
            _ => (&memory, u64::from(what >> 2 & 1) << 16 | u64::from(what >> 3 & 1) << 15 | offset & 0x3f),
        };
        if width & 0x80 == 0 {
            device.write(offset, &value[..len]);
        } else {
            let mut read = [0; 8];
            device.read(offset, &mut read[..len]);
        }
    }
    for slot in 1..=2 {
        bus.remove(slot);
    }
    let (_, _, notifies) = wires.counts();
    assert_eq!(notifies, 0, "notifications of an unplugged function");
    drop(functions);
    assert_eq!(wires.counts(), (0, 0, 0), "something is left connected");
});
