//! The machine's virtio devices: each with its transport, its place on a bus and, if its queues are served by another
//! process, its keeper. On PCI they come and go while the guest runs.

use std::sync::Arc;

use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};

use super::backends::Backend;
use super::command::{CommandError, Reply, ReplyTo};
use super::snap::{Saved, SavedDevice, Target};
use super::status::{DeviceKind, DeviceStatus};
use crate::acpi;
use crate::bus::Bus;
use crate::devices::hotplug::Hotplug;
use crate::error::{Error, Result};
use crate::exit::ExitSignal;
use crate::kvm::Vm;
use crate::layout::{PCI_MMIO_END, PCI_MMIO_START, VIRTIO_GSIS, VIRTIO_MMIO_START, VIRTIO_MMIO_STRIDE};
use crate::pci::bus::PciBus;
use crate::vcp::{Keeper, VcpProcess};
use crate::virtio::mmio::MmioTransport;
use crate::virtio::pci::{REGION_LEN, VirtioPci};
use crate::virtio::{Transport, VirtioDevice};

/// Where devices are plugged in.
pub(super) enum Backplane {
    /// Windows with an interrupt line each, as many as there are devices.
    Mmio(Vec<acpi::Window>),
    /// The PCI bus.
    Pci(PciBackplane),
}

/// The PCI bus with what is given out on it.
pub(super) struct PciBackplane {
    bus: Arc<PciBus>,
    regions: AddressAllocator,
    hotplug: Arc<Hotplug>,
}

impl PciBackplane {
    /// A bus on which the guest is told of what comes and goes by `hotplug`.
    pub(super) fn new(bus: Arc<PciBus>, hotplug: Arc<Hotplug>) -> Result<Self> {
        let regions =
            AddressAllocator::new(PCI_MMIO_START, PCI_MMIO_END - PCI_MMIO_START).map_err(no_region)?;
        Ok(Self { bus, regions, hotplug })
    }
}

fn no_region(e: vm_allocator::Error) -> Error {
    Error::Os { action: "place a device's registers", source: std::io::Error::other(e) }
}

/// Where a device is.
enum Place {
    Mmio(u64),
    Pci { slot: u8, region: RangeInclusive },
}

/// One device.
struct Device {
    name: String,
    kind: DeviceKind,
    place: Place,
    transport: Arc<dyn Transport>,
    keeper: Option<Keeper>,
    /// Who waits until it is gone.
    removal: Vec<ReplyTo>,
}

/// All devices, in the order in which they were added.
pub(super) struct Devices {
    backplane: Backplane,
    devices: Vec<Device>,
    mmio: Arc<Bus>,
    exit: ExitSignal,
}

impl Devices {
    /// No devices yet.
    pub(super) fn new(backplane: Backplane, mmio: Arc<Bus>, exit: ExitSignal) -> Self {
        Self { backplane, devices: Vec::new(), mmio, exit }
    }

    /// Adds a device with a backend, which is kept from now on.
    pub(super) fn add_backend(&mut self, vm: &Vm, backend: Backend, place: Option<(u8, u64)>) -> Result<()> {
        let Backend { kind, mut device, source, process } = backend;
        let (front, channel) = device.keep();
        let at = self.add(vm, kind, Box::new(device), place)?;
        let keeper = Keeper::start(front, channel, source, process, self.exit.clone())?;
        if let Some(device) = self.devices.get_mut(at) {
            device.keeper = Some(keeper);
        }
        Ok(())
    }

    /// Adds a device that the monitor itself serves.
    pub(super) fn add_own(
        &mut self,
        vm: &Vm,
        kind: DeviceKind,
        device: Box<dyn VirtioDevice>,
        place: Option<(u8, u64)>,
    ) -> Result<Arc<dyn Transport>> {
        let at = self.add(vm, kind, device, place)?;
        self.devices.get(at).map(|device| device.transport.clone()).ok_or_else(too_many)
    }

    /// `place`: slot and address on PCI, if it must be there.
    fn add(
        &mut self,
        vm: &Vm,
        kind: DeviceKind,
        device: Box<dyn VirtioDevice>,
        place: Option<(u8, u64)>,
    ) -> Result<usize> {
        let at = self.devices.len();
        let name = device.name().to_owned();
        let (place, transport): (_, Arc<dyn Transport>) = match &mut self.backplane {
            Backplane::Mmio(windows) => {
                let window = windows.get(at).ok_or_else(too_many)?;
                let transport = Arc::new(MmioTransport::new(device, vm.memory().clone())?);
                transport.bind(vm, window.base, window.gsi)?;
                self.mmio.insert(window.base, VIRTIO_MMIO_STRIDE, transport.clone());
                (Place::Mmio(window.base), transport)
            }
            Backplane::Pci(PciBackplane { bus, regions, .. }) => {
                let len = u64::from(REGION_LEN);
                let (slot, policy) = match place {
                    Some((slot, address)) if bus.is_free(slot) => (slot, AllocPolicy::ExactMatch(address)),
                    Some((slot, _)) => {
                        return Err(Error::Snapshot(format!("{name}: slot {slot} of the bus is taken")));
                    }
                    None => (bus.free_slot().ok_or_else(too_many)?, AllocPolicy::FirstMatch),
                };
                let region = regions.allocate(len, len, policy).map_err(no_region)?;
                let address = region.start() as u32;
                let function = Arc::new(VirtioPci::new(device, vm.memory().clone(), vm.wires(), address)?);
                bus.insert(slot, function.clone());
                (Place::Pci { slot, region }, function)
            }
        };
        self.devices.push(Device { name, kind, place, transport, keeper: None, removal: Vec::new() });
        Ok(at)
    }

    /// Tells the guest that the device of this name has come.
    pub(super) fn announce(&self, name: &str) {
        let device = self.devices.iter().find(|device| device.name == name);
        if let (Some(Place::Pci { slot, .. }), Backplane::Pci(pci)) =
            (device.map(|device| &device.place), &self.backplane)
        {
            pci.hotplug.announce(*slot);
        }
    }

    /// Why no device can be added now, if so.
    pub(super) fn cannot_add(&self) -> Option<CommandError> {
        match &self.backplane {
            Backplane::Mmio(_) => Some(fixed_devices()),
            Backplane::Pci(pci) if pci.bus.free_slot().is_none() => {
                Some(CommandError::Conflict("every slot of the PCI bus is taken: remove a device".into()))
            }
            Backplane::Pci(_) => None,
        }
    }

    /// Asks the guest to let go of a device; who asked is answered when it has, by [`Devices::ejected`].
    pub(super) fn ask_back(&mut self, name: &str, kind: DeviceKind, reply: ReplyTo) {
        let device = self.devices.iter_mut().find(|device| device.name == name && device.kind == kind);
        let Some(device) = device else {
            return reply.give(Err(CommandError::NotFound(format!("device {name} of that kind"))));
        };
        match (&device.place, &self.backplane) {
            (Place::Pci { slot, .. }, Backplane::Pci(pci)) => {
                device.removal.push(reply);
                pci.hotplug.ask_back(*slot);
            }
            _ => reply.give(Err(fixed_devices())),
        }
    }

    /// The guest has let go of what was in a slot, which is off the bus. What is left of it ends on a thread of its own:
    /// queues that still run are stopped, the keeper and the process end, and who waits is answered.
    pub(super) fn ejected(&mut self, slot: u8) {
        let is_there = |device: &Device| matches!(device.place, Place::Pci { slot: at, .. } if at == slot);
        let Some(at) = self.devices.iter().position(is_there) else { return };
        let Device { name, place, transport, keeper, removal, .. } = self.devices.remove(at);
        if let (Place::Pci { region, .. }, Backplane::Pci(pci)) = (place, &mut self.backplane)
            && let Err(e) = pci.regions.free(&region)
        {
            tracing::error!(device = name, error = %e, "the place of the device's registers is lost");
        }
        tracing::info!(device = name, "the guest has let go of the device");
        let end = move || {
            let process = keeper.and_then(Keeper::stop);
            transport.shut_down();
            drop((transport, process));
            removal.into_iter().for_each(|reply| reply.give(Ok(Reply::Done)));
        };
        if let Err(e) = std::thread::Builder::new().name(format!("{name}-removal")).spawn(end) {
            tracing::error!(device = name, error = %e, "cannot take the device apart in good order");
        }
    }

    /// Whether a name is taken.
    pub(super) fn has(&self, name: &str) -> bool {
        self.devices.iter().any(|device| device.name == name)
    }

    /// The keeper of a device.
    pub(super) fn keeper(&self, name: &str) -> Option<&Keeper> {
        self.devices.iter().find(|device| device.name == name)?.keeper.as_ref()
    }

    /// What a snapshot is to be made of.
    pub(super) fn targets(&self) -> Vec<Target> {
        let target = |device: &Device| Target {
            saved: SavedDevice {
                name: device.name.clone(),
                kind: device.kind,
                slot: match &device.place {
                    Place::Mmio(_) => None,
                    Place::Pci { slot, region } => Some((*slot, region.start())),
                },
                transport: None,
            },
            transport: device.transport.clone(),
        };
        self.devices.iter().map(target).collect()
    }

    /// Brings all to where they were in a snapshot: the devices of each kind in their order.
    pub(super) fn restore(&self, saved: &Saved) -> Result<()> {
        for kind in [DeviceKind::Disk, DeviceKind::Net, DeviceKind::Rng, DeviceKind::Balloon] {
            let old = saved.devices.iter().filter(|device| device.kind == kind);
            let new = self.devices.iter().filter(|device| device.kind == kind);
            for (old, new) in old.zip(new) {
                let state = old.transport.as_ref().ok_or_else(|| {
                    Error::Snapshot(format!("{}: it was saved without its state", old.name))
                })?;
                new.transport.restore(state)?;
            }
        }
        Ok(())
    }

    /// What each is and does.
    pub(super) fn status(&self) -> Vec<DeviceStatus> {
        let status = |device: &Device| DeviceStatus {
            name: device.name.clone(),
            kind: device.kind,
            address: match device.place {
                Place::Mmio(base) => format!("mmio {base:#x}"),
                Place::Pci { slot, .. } => format!("pci 00:{slot:02x}.0"),
            },
            active: device.transport.is_active(),
            backend: device.keeper.as_ref().map(Keeper::status),
        };
        self.devices.iter().map(status).collect()
    }

    /// From here on nobody is started again. The processes are given back, for they end last.
    pub(super) fn stop_keepers(&mut self) -> Vec<VcpProcess> {
        self.devices.iter_mut().filter_map(|device| device.keeper.take()).filter_map(Keeper::stop).collect()
    }

    /// Stops all queues, at the end of the run.
    pub(super) fn shut_down(&self) {
        for device in &self.devices {
            device.transport.shut_down();
        }
    }
}

/// Where devices were in a snapshot, by kind.
pub(super) struct Places(Vec<(DeviceKind, Option<(u8, u64)>)>);

impl Places {
    pub(super) fn of(saved: Option<&Saved>) -> Self {
        let places = saved.into_iter().flat_map(|saved| &saved.devices);
        Self(places.map(|device| (device.kind, device.slot)).collect())
    }

    /// Where the next device of this kind was.
    pub(super) fn next(&mut self, kind: DeviceKind) -> Option<(u8, u64)> {
        let at = self.0.iter().position(|(k, _)| *k == kind)?;
        self.0.remove(at).1
    }
}

fn fixed_devices() -> CommandError {
    let reason = "devices on virtio-mmio are there for the whole run: start the guest with --transport pci";
    CommandError::Conflict(reason.into())
}

fn too_many() -> Error {
    Error::Usage("more disks and nets than the machine has places for: 15 on virtio-mmio, 28 on PCI".into())
}

/// The windows of that many virtio devices.
pub(super) fn windows(count: usize) -> Result<Vec<acpi::Window>> {
    let gsis = VIRTIO_GSIS.get(..count).ok_or_else(too_many)?;
    let bases = (0..).map(|i| VIRTIO_MMIO_START + VIRTIO_MMIO_STRIDE * i);
    Ok(bases.zip(gsis).map(|(base, &gsi)| acpi::Window { base, gsi }).collect())
}
