//! The machine's virtio devices: each with its transport and, if its queues are served by another process, its keeper.

use std::sync::Arc;

use super::backends::Backend;
use super::status::{DeviceKind, DeviceStatus};
use crate::acpi;
use crate::bus::Bus;
use crate::config::MAX_DEVICES;
use crate::error::{Error, Result};
use crate::exit::ExitSignal;
use crate::kvm::Vm;
use crate::layout::{VIRTIO_GSIS, VIRTIO_MMIO_START, VIRTIO_MMIO_STRIDE};
use crate::vcp::{Keeper, VcpProcess};
use crate::virtio::VirtioDevice;
use crate::virtio::mmio::MmioTransport;

/// One device.
struct Device {
    name: String,
    kind: DeviceKind,
    address: String,
    transport: Arc<MmioTransport>,
    keeper: Option<Keeper>,
}

/// All devices, in the order in which they were added.
pub(super) struct Devices {
    windows: Vec<acpi::Window>,
    devices: Vec<Device>,
    mmio: Arc<Bus>,
    exit: ExitSignal,
}

impl Devices {
    /// No devices yet, and room for as many as there are windows.
    pub(super) fn new(windows: Vec<acpi::Window>, mmio: Arc<Bus>, exit: ExitSignal) -> Self {
        Self { windows, devices: Vec::new(), mmio, exit }
    }

    /// Adds a device with a backend, which is kept from now on.
    pub(super) fn add_backend(&mut self, vm: &Vm, backend: Backend) -> Result<()> {
        let Backend { kind, mut device, source, process } = backend;
        let (front, channel) = device.keep();
        let at = self.add(vm, kind, Box::new(device))?;
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
    ) -> Result<Arc<MmioTransport>> {
        let at = self.add(vm, kind, device)?;
        self.devices.get(at).map(|device| device.transport.clone()).ok_or_else(too_many)
    }

    fn add(&mut self, vm: &Vm, kind: DeviceKind, device: Box<dyn VirtioDevice>) -> Result<usize> {
        let at = self.devices.len();
        let window = self.windows.get(at).ok_or_else(too_many)?;
        let name = device.name().to_owned();
        let transport = Arc::new(MmioTransport::new(device, vm.memory().clone())?);
        transport.bind(vm, window.base, window.gsi)?;
        self.mmio.insert(window.base, VIRTIO_MMIO_STRIDE, transport.clone());
        let address = format!("mmio {:#x}", window.base);
        self.devices.push(Device { name, kind, address, transport, keeper: None });
        Ok(at)
    }

    /// The keeper of a device.
    pub(super) fn keeper(&self, name: &str) -> Option<&Keeper> {
        self.devices.iter().find(|device| device.name == name)?.keeper.as_ref()
    }

    /// What each is and does.
    pub(super) fn status(&self) -> Vec<DeviceStatus> {
        let status = |device: &Device| DeviceStatus {
            name: device.name.clone(),
            kind: device.kind,
            address: device.address.clone(),
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

fn too_many() -> Error {
    Error::Usage(format!("more than {MAX_DEVICES} disks and nets"))
}

/// The windows of that many virtio devices.
pub(super) fn windows(count: usize) -> Result<Vec<acpi::Window>> {
    let gsis = VIRTIO_GSIS.get(..count).ok_or_else(too_many)?;
    let bases = (0..).map(|i| VIRTIO_MMIO_START + VIRTIO_MMIO_STRIDE * i);
    Ok(bases.zip(gsis).map(|(base, &gsi)| acpi::Window { base, gsi }).collect())
}
