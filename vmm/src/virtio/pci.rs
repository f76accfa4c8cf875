//! The virtio-pci transport, modern only (virtio 1.2, section 4.1): one 32-bit memory region with all structures, and
//! MSI-X with a vector for each queue and one for the configuration. Notifications go by ioeventfd past this code, and
//! interrupts by irqfd, also where another process signals them.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::state::{self, DeviceState};
use super::{Interrupt, SavedTransport, Transport, VirtioDevice};
use crate::error::{Error, Result};
use crate::kvm::GuestMemory;
use crate::kvm::wires::Wires;
use crate::layout::{PCI_MMIO_END, PCI_MMIO_START};
use crate::pci::Function;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msix::{self, Msix};

mod common;
mod saved;
pub use saved::SavedPci;

/// Bytes of the region.
pub const REGION_LEN: u32 = 0x1_0000;
/// Where the structures lie in it, and how long they are.
mod at {
    pub(super) const COMMON: u64 = 0x0000;
    pub(super) const COMMON_LEN: u64 = 0x38;
    pub(super) const ISR: u64 = 0x1000;
    pub(super) const DEVICE: u64 = 0x2000;
    pub(super) const DEVICE_LEN: u64 = 0x1000;
    pub(super) const NOTIFY: u64 = 0x3000;
    pub(super) const NOTIFY_LEN: u64 = 0x1000;
    pub(super) const TABLE: u64 = 0x8000;
    pub(super) const PENDING: u64 = 0xc000;
}
/// Bytes between the notification addresses of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;

/// `VIRTIO_PCI_CAP_*`.
mod cap {
    pub(super) const VENDOR: u8 = 0x09;
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const PCI_CFG: u8 = 5;
}

const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// The eventfds of one device: one for each queue, then the configuration's.
pub(super) struct PciInterrupt {
    events: Arc<Vec<EventFd>>,
    isr: AtomicU8,
    generation: AtomicU32,
}

impl PciInterrupt {
    fn raise(&self, source: usize, bit: u8) {
        self.isr.fetch_or(bit, Ordering::AcqRel);
        if let Some(event) = self.events.get(source) {
            // Fails only if the counter is full, which means that an interrupt is on its way.
            let _ = event.write(1);
        }
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, index: u16) {
        if usize::from(index) + 1 < self.events.len() {
            self.raise(usize::from(index), ISR_QUEUE);
        }
    }
    fn config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(self.events.len() - 1, ISR_CONFIG);
    }
    fn call_fd(&self, index: u16) -> Option<&EventFd> {
        self.events.get(usize::from(index)).filter(|_| usize::from(index) + 1 < self.events.len())
    }
}

struct Inner {
    state: DeviceState,
    config: ConfigSpace,
    msix: Msix,
    /// Where the MSI-X capability and the window of configuration accesses are.
    msix_at: u16,
    window_at: u16,
    /// Notifications that are connected, by queue.
    notified: Vec<bool>,
}

/// A device on the bus.
pub struct VirtioPci {
    inner: Mutex<Inner>,
    interrupt: Arc<PciInterrupt>,
    kicks: Vec<Arc<EventFd>>,
    wires: Arc<dyn Wires>,
    /// Where the region answers; 0: nowhere. Changed under the lock of `inner` only.
    mapped: AtomicU64,
}

impl std::fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioPci").finish_non_exhaustive()
    }
}

/// PCI class of a device type, which tells operating systems without a driver what they miss.
fn class(device_type: u32) -> u32 {
    match device_type {
        virtio_bindings::virtio_ids::VIRTIO_ID_NET => 0x02_0000,
        virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK => 0x01_8000,
        _ => 0xff_0000,
    }
}

/// The content of a virtio capability behind id and link (4.1.4).
fn capability(kind: u8, offset: u64, len: u64, more: &[u8]) -> Vec<u8> {
    let mut body = vec![(16 + more.len()) as u8, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((len as u32).to_le_bytes());
    body.extend(more);
    body
}

impl VirtioPci {
    /// Puts a device behind a region at `address`, a multiple of [`REGION_LEN`]. It answers there when the guest has
    /// switched it on.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        wires: Arc<dyn Wires>,
        address: u32,
    ) -> Result<Self> {
        let kicks = state::kicks(&*device)?;
        let events = Arc::new((0..=kicks.len()).map(|_| state::event()).collect::<Result<Vec<_>>>()?);
        let interrupt = Arc::new(PciInterrupt {
            events: events.clone(),
            isr: AtomicU8::new(0),
            generation: AtomicU32::new(0),
        });
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE + device.device_type() as u16,
            revision: 1,
            class: class(device.device_type()),
            subsystem_vendor: VENDOR,
            subsystem: FIRST_DEVICE,
        });
        config.set_bar0(address, REGION_LEN);
        let (msix_at, window_at) = add_capabilities(&mut config, kicks.len() as u16);
        let msix = Msix::new(device.name(), events, wires.clone());
        let notified = vec![false; kicks.len()];
        let state = DeviceState::new(device, kicks.clone(), memory, interrupt.clone());
        let inner = Inner { state, config, msix, msix_at, window_at, notified };
        Ok(Self { inner: Mutex::new(inner), interrupt, kicks, wires, mapped: AtomicU64::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the region answer where the configuration space says, or nowhere.
    fn relocate(&self, inner: &mut Inner) {
        let start = u64::from(inner.config.bar0());
        let end = start + u64::from(REGION_LEN);
        let inside = start >= PCI_MMIO_START && end <= PCI_MMIO_END;
        self.map(inner, if inner.config.memory_enabled() && inside { start } else { 0 });
    }

    fn map(&self, inner: &mut Inner, wanted: u64) {
        let old = self.mapped.swap(wanted, Ordering::AcqRel);
        if old == wanted {
            return;
        }
        let address =
            |start: u64, queue: usize| start + at::NOTIFY + queue as u64 * u64::from(NOTIFY_MULTIPLIER);
        for (queue, kick) in self.kicks.iter().enumerate() {
            if std::mem::take(&mut inner.notified[queue])
                && let Err(e) = self.wires.unnotify(kick, address(old, queue))
            {
                tracing::error!(queue, error = %crate::chain(&e), "a notification stays connected");
            }
        }
        if wanted == 0 {
            return;
        }
        for (queue, kick) in self.kicks.iter().enumerate() {
            match self.wires.notify(kick, address(wanted, queue)) {
                Ok(()) => inner.notified[queue] = true,
                // Two devices at one address, e.g.: the guest's doing. Notifications go by way of exits then.
                Err(e) => tracing::debug!(queue, error = %crate::chain(&e), "no direct notification"),
            }
        }
    }

    fn read_region(&self, inner: &mut Inner, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            at::COMMON..at::ISR => inner.read_common(&self.interrupt, offset - at::COMMON, data),
            at::ISR => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.interrupt.isr.swap(0, Ordering::AcqRel);
                }
            }
            at::DEVICE..at::NOTIFY => inner.state.device.read_config(offset - at::DEVICE, data),
            at::TABLE..at::PENDING => inner.msix.read_table(offset - at::TABLE, data),
            at::PENDING.. => inner.msix.read_pending(offset - at::PENDING, data),
            _ => {}
        }
    }

    fn write_region(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        match offset {
            at::COMMON..at::ISR => {
                let was_reset = inner.write_common(offset - at::COMMON, data);
                if was_reset {
                    inner.msix.reset();
                    self.interrupt.isr.store(0, Ordering::Release);
                }
            }
            at::DEVICE..at::NOTIFY => inner.state.device.write_config(offset - at::DEVICE, data),
            at::NOTIFY..at::TABLE => {
                let queue = (offset - at::NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
                if let Some(kick) = self.kicks.get(queue as usize) {
                    let _ = kick.write(1);
                }
            }
            at::TABLE..at::PENDING => inner.msix.write_table(offset - at::TABLE, data),
            _ => {}
        }
    }

    /// What the window for configuration accesses (4.1.4.9) points at: an offset in the region and a length.
    fn window(inner: &Inner) -> Option<(u64, usize)> {
        let at = usize::from(inner.window_at);
        let (offset, len) = (inner.config.u32(at + 8), inner.config.u32(at + 12));
        let bar = inner.config.u16(at + 4) & 0xff;
        let fits = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len) && offset <= REGION_LEN - len;
        (bar == 0 && fits).then_some((u64::from(offset), len as usize))
    }
}

/// Adds all capabilities; returns where MSI-X and the window are.
fn add_capabilities(config: &mut ConfigSpace, queues: u16) -> (u16, u16) {
    let vectors = queues + 1;
    let msix_body = Msix::capability(vectors, at::TABLE as u32, at::PENDING as u32);
    let msix_at = config.add_capability(msix::CAPABILITY, &msix_body, &msix::CONTROL_WRITABLE.to_le_bytes());
    let notify = NOTIFY_MULTIPLIER.to_le_bytes();
    for (kind, offset, len, more) in [
        (cap::COMMON, at::COMMON, at::COMMON_LEN, &[][..]),
        (cap::ISR, at::ISR, 1, &[]),
        (cap::DEVICE, at::DEVICE, at::DEVICE_LEN, &[]),
        (cap::NOTIFY, at::NOTIFY, at::NOTIFY_LEN, &notify),
    ] {
        config.add_capability(cap::VENDOR, &capability(kind, offset, len, more), &[]);
    }
    // Its region, offset, length and data are the guest's to write.
    let body = capability(cap::PCI_CFG, 0, 0, &[0; 4]);
    let mut writable = vec![0xff; body.len()];
    writable[..2].fill(0);
    writable[3..6].fill(0);
    let window_at = config.add_capability(cap::VENDOR, &body, &writable);
    // 0xdc bytes in all.
    (msix_at.unwrap_or(0), window_at.unwrap_or(0))
}

impl Function for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut inner = self.lock();
        let window_data = inner.window_at + 16;
        if offset == window_data
            && let Some((at, len)) = Self::window(&inner)
        {
            let mut value = [0; 4];
            self.read_region(&mut inner, at, &mut value[..len]);
            inner.config.write(window_data, &value);
        }
        inner.config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut inner = self.lock();
        inner.config.write(offset, data);
        let control_at = inner.msix_at + 2;
        if (inner.msix_at..inner.msix_at + 4).contains(&offset) {
            let control = inner.config.u16(usize::from(control_at));
            inner.msix.set_control(control);
        }
        if offset == inner.window_at + 16
            && let Some((at, len)) = Self::window(&inner)
        {
            let value = inner.config.u32(usize::from(offset)).to_le_bytes();
            self.write_region(&mut inner, at, &value[..len]);
        }
        self.relocate(&mut inner);
    }

    fn registers(&self) -> Option<(u64, u64)> {
        let start = self.mapped.load(Ordering::Acquire);
        (start != 0).then_some((start, u64::from(REGION_LEN)))
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        self.read_region(&mut self.lock(), offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.write_region(&mut self.lock(), offset, data);
    }

    fn unplugged(&self) {
        self.map(&mut self.lock(), 0);
    }
}

impl Transport for VirtioPci {
    fn kick(&self, index: usize) -> Option<&Arc<EventFd>> {
        self.kicks.get(index)
    }

    fn is_active(&self) -> bool {
        self.lock().state.active
    }

    fn shut_down(&self) {
        self.lock().state.shut_down();
    }

    fn quiesce(&self) -> Result<()> {
        self.lock().state.quiesce()
    }

    fn go_on(&self) -> Result<()> {
        self.lock().state.go_on()
    }

    fn save(&self) -> SavedTransport {
        SavedTransport::Pci(Box::new(VirtioPci::save(self)))
    }

    fn restore(&self, saved: &SavedTransport) -> Result<()> {
        match saved {
            SavedTransport::Pci(saved) => VirtioPci::restore(self, saved),
            SavedTransport::Mmio(_) => {
                Err(Error::Snapshot("a device on PCI was on virtio-mmio when it was saved".into()))
            }
        }
    }
}

#[cfg(test)]
mod tests;
