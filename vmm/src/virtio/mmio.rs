//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2): a window of registers for one device. Notifications
//! go by ioeventfd past this code, and so do interrupts of devices in other processes; `docs/decisions/mmio-irqfd.md`
//! says what `InterruptStatus` then means.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

pub use super::state::status;
use super::state::{self, DeviceState, set_half};
use super::{Interrupt, SavedTransport, Transport, VirtioDevice};
use crate::bus::BusDevice;
use crate::error::{Error, Result};
use crate::kvm::{GuestMemory, Vm};

/// Register offsets.
pub mod reg {
    #![allow(missing_docs)] // named as in the specification's table 4.2.2
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_LEN_HIGH: u64 = 0x0b4;
    pub const SHM_BASE_LOW: u64 = 0x0b8;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Used-buffer notification in `InterruptStatus`.
pub const INT_VRING: u32 = 1;
/// Configuration-change notification in `InterruptStatus`.
pub const INT_CONFIG: u32 = 2;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VENDOR: u32 = u32::from_le_bytes(*b"VCP ");

/// The interrupt of one window: one line for all queues and the configuration.
#[derive(Debug)]
pub struct MmioInterrupt {
    pending: AtomicU32,
    generation: AtomicU32,
    line: EventFd,
}

impl MmioInterrupt {
    fn raise(&self, bit: u32) {
        self.pending.fetch_or(bit, Ordering::AcqRel);
        // Fails only if the counter is full, which means that an interrupt is on its way.
        let _ = self.line.write(1);
    }
}

impl Interrupt for MmioInterrupt {
    fn queue(&self, _index: u16) {
        self.raise(INT_VRING);
    }
    fn config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(INT_CONFIG);
    }
    fn call_fd(&self, _index: u16) -> Option<&EventFd> {
        Some(&self.line)
    }
}

/// A device on virtio-mmio in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SavedMmio {
    pending: u32,
    generation: u32,
    state: state::SavedState,
}

/// A device in its window.
pub struct MmioTransport {
    state: Mutex<DeviceState>,
    interrupt: Arc<MmioInterrupt>,
    kicks: Vec<Arc<EventFd>>,
    called_by_fd: bool,
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport").finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// Puts a device behind a window.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Arc<GuestMemory>) -> Result<Self> {
        let kicks = state::kicks(&*device)?;
        let line = state::event()?;
        let interrupt = MmioInterrupt { pending: AtomicU32::new(0), generation: AtomicU32::new(0), line };
        let (interrupt, called_by_fd) = (Arc::new(interrupt), device.called_by_fd());
        let state = DeviceState::new(device, kicks.clone(), memory, interrupt.clone());
        Ok(Self { state: Mutex::new(state), interrupt, kicks, called_by_fd })
    }

    /// Binds the window at `base` to KVM: its interrupt line, and one notification per queue.
    pub fn bind(&self, vm: &Vm, base: u64, gsi: u32) -> Result<()> {
        vm.irqfd(&self.interrupt.line, gsi)?;
        for (index, kick) in self.kicks.iter().enumerate() {
            vm.ioeventfd(kick, base + reg::QUEUE_NOTIFY, index as u32)?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, DeviceState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, s: &DeviceState, offset: u64) -> u32 {
        match offset {
            reg::MAGIC_VALUE => MAGIC,
            reg::VERSION => 2,
            reg::DEVICE_ID => s.device.device_type(),
            reg::VENDOR_ID => VENDOR,
            reg::DEVICE_FEATURES => s.device_features(),
            reg::QUEUE_NUM_MAX => u32::from(s.queue_max()),
            reg::QUEUE_READY => u32::from(s.queue().is_some_and(|q| q.ready)),
            reg::INTERRUPT_STATUS => self.interrupt_status(s),
            reg::STATUS => s.status,
            reg::CONFIG_GENERATION => {
                let told = self.interrupt.generation.load(Ordering::Acquire);
                told.wrapping_add(s.device.config_generation())
            }
            // No shared memory regions: length and base are all ones (4.2.2).
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// A backend in another process signals the line itself and cannot set a bit here. While the device runs, used
    /// buffers are therefore always reported as possible: the driver then looks at its queues, which is what tells.
    fn interrupt_status(&self, s: &DeviceState) -> u32 {
        let pending = self.interrupt.pending.load(Ordering::Acquire);
        if self.called_by_fd && s.active { pending | INT_VRING } else { pending }
    }

    fn write_register(&self, s: &mut DeviceState, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURES_SEL => s.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => s.driver_features_sel = value,
            reg::DRIVER_FEATURES => s.set_driver_features(value),
            reg::QUEUE_SEL => s.queue_sel = value,
            reg::QUEUE_NOTIFY => {
                if let Some(kick) = self.kicks.get(value as usize) {
                    let _ = kick.write(1);
                }
            }
            reg::INTERRUPT_ACK => {
                self.interrupt.pending.fetch_and(!value, Ordering::AcqRel);
            }
            reg::STATUS => {
                if s.set_status(value) {
                    self.interrupt.pending.store(0, Ordering::Release);
                }
            }
            // A running queue's layout does not change, but the driver may stop it (4.2.2.2).
            reg::QUEUE_READY if s.active && value & 1 == 0 => s.stop_queue(),
            reg::QUEUE_READY => s.set_queue_ready(value & 1 == 1),
            reg::QUEUE_NUM => s.set_queue_size(value),
            _ => write_queue_address(s, offset, value),
        }
    }
}

fn write_queue_address(s: &mut DeviceState, offset: u64, value: u32) {
    let Some(queue) = s.open_queue() else { return };
    match offset {
        reg::QUEUE_DESC_LOW => set_half(&mut queue.desc, 0, value),
        reg::QUEUE_DESC_HIGH => set_half(&mut queue.desc, 1, value),
        reg::QUEUE_DRIVER_LOW => set_half(&mut queue.driver, 0, value),
        reg::QUEUE_DRIVER_HIGH => set_half(&mut queue.driver, 1, value),
        reg::QUEUE_DEVICE_LOW => set_half(&mut queue.device, 0, value),
        reg::QUEUE_DEVICE_HIGH => set_half(&mut queue.device, 1, value),
        _ => {}
    }
}

impl Transport for MmioTransport {
    fn kick(&self, index: usize) -> Option<&Arc<EventFd>> {
        self.kicks.get(index)
    }

    fn is_active(&self) -> bool {
        self.lock().active
    }

    fn shut_down(&self) {
        self.lock().shut_down();
    }

    fn quiesce(&self) -> Result<()> {
        self.lock().quiesce()
    }

    fn go_on(&self) -> Result<()> {
        self.lock().go_on()
    }

    fn save(&self) -> SavedTransport {
        let pending = self.interrupt.pending.load(Ordering::Acquire);
        let generation = self.interrupt.generation.load(Ordering::Acquire);
        SavedTransport::Mmio(Box::new(SavedMmio { pending, generation, state: self.lock().save() }))
    }

    fn restore(&self, saved: &SavedTransport) -> Result<()> {
        let SavedTransport::Mmio(saved) = saved else {
            return Err(Error::Snapshot("a device on virtio-mmio was on PCI when it was saved".into()));
        };
        self.interrupt.pending.store(saved.pending, Ordering::Release);
        self.interrupt.generation.store(saved.generation, Ordering::Release);
        self.lock().restore(&saved.state)
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let s = self.lock();
        if let Some(config) = offset.checked_sub(reg::CONFIG) {
            s.device.read_config(config, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            // Registers are 32 bits wide and aligned (4.2.2.2); other accesses read as zero.
            data.copy_from_slice(&self.read_register(&s, offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut s = self.lock();
        if let Some(config) = offset.checked_sub(reg::CONFIG) {
            s.device.write_config(config, data);
        } else if let (Ok(bytes), true) = (<[u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            self.write_register(&mut s, offset, u32::from_le_bytes(bytes));
        }
    }
}

#[cfg(test)]
mod tests;
