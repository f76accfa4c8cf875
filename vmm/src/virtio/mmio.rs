//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2): a window of registers for one device. Notifications
//! go by ioeventfd past this code, and so do interrupts of devices in other processes; `docs/decisions/mmio-irqfd.md`
//! says what `InterruptStatus` then means.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::{Activation, ActiveQueue, Complaints, Interrupt, VirtioDevice};
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

/// Device status bits (virtio 1.2, 2.1).
pub mod status {
    #![allow(missing_docs)] // named as in the specification
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const DEVICE_NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// Used-buffer notification in `InterruptStatus`.
pub const INT_VRING: u32 = 1;
/// Configuration-change notification in `InterruptStatus`.
pub const INT_CONFIG: u32 = 2;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VENDOR: u32 = u32::from_le_bytes(*b"VCP ");

#[derive(Clone, Copy, Debug, Default)]
struct QueueRegs {
    /// 0 if the driver asked for a size that cannot be: it would lay its rings out for that one.
    size: u16,
    ready: bool,
    desc: u64,
    driver: u64,
    device: u64,
}

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

struct State {
    device: Box<dyn VirtioDevice>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegs>,
    active: bool,
    complaints: Complaints,
}

/// Queues as they are after a reset.
fn fresh_queues(device: &dyn VirtioDevice) -> Vec<QueueRegs> {
    device.queue_max_sizes().iter().map(|&size| QueueRegs { size, ..Default::default() }).collect()
}

/// A device in its window.
pub struct MmioTransport {
    state: Mutex<State>,
    interrupt: Arc<MmioInterrupt>,
    kicks: Vec<Arc<EventFd>>,
    memory: Arc<GuestMemory>,
    called_by_fd: bool,
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport").finish_non_exhaustive()
    }
}

fn event() -> Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::os("create an eventfd"))
}

impl MmioTransport {
    /// Puts a device behind a window.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Arc<GuestMemory>) -> Result<Self> {
        let kicks =
            device.queue_max_sizes().iter().map(|_| event().map(Arc::new)).collect::<Result<Vec<_>>>()?;
        let interrupt =
            MmioInterrupt { pending: AtomicU32::new(0), generation: AtomicU32::new(0), line: event()? };
        let called_by_fd = device.called_by_fd();
        let state = State {
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: fresh_queues(&*device),
            active: false,
            complaints: Complaints::default(),
            device,
        };
        Ok(Self { state: Mutex::new(state), interrupt: Arc::new(interrupt), kicks, memory, called_by_fd })
    }

    /// Binds the window at `base` to KVM: its interrupt line, and one notification per queue.
    pub fn bind(&self, vm: &Vm, base: u64, gsi: u32) -> Result<()> {
        vm.irqfd(&self.interrupt.line, gsi)?;
        for (index, kick) in self.kicks.iter().enumerate() {
            vm.ioeventfd(kick, base + reg::QUEUE_NOTIFY, index as u32)?;
        }
        Ok(())
    }

    /// The notification descriptor of a queue, for devices inside the monitor.
    pub fn kick(&self, index: usize) -> Option<&Arc<EventFd>> {
        self.kicks.get(index)
    }

    /// Whether the driver has started the device.
    pub fn is_active(&self) -> bool {
        self.lock().active
    }

    /// Stops the device for good, at the end of the run.
    pub fn shut_down(&self) {
        let mut s = self.lock();
        if std::mem::take(&mut s.active)
            && let Err(e) = s.device.shut_down()
        {
            tracing::warn!(device = s.device.name(), error = %crate::chain(&e), "the device did not stop cleanly");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reset(&self, s: &mut State) {
        if std::mem::take(&mut s.active)
            && let Err(e) = s.device.reset()
        {
            tracing::error!(device = s.device.name(), error = %crate::chain(&e), "the device did not stop cleanly");
        }
        (s.status, s.driver_features, s.queue_sel) = (0, 0, 0);
        (s.device_features_sel, s.driver_features_sel) = (0, 0);
        s.queues = fresh_queues(&*s.device);
        self.interrupt.pending.store(0, Ordering::Release);
    }

    fn needs_reset(&self, s: &mut State, error: &Error) {
        if s.complaints.add() {
            tracing::error!(device = s.device.name(), error = %crate::chain(error), "the device needs a reset");
        }
        s.status |= status::DEVICE_NEEDS_RESET;
        self.interrupt.config();
    }

    fn read_register(&self, s: &State, offset: u64) -> u32 {
        let queue = s.queues.get(s.queue_sel as usize);
        let max = s.device.queue_max_sizes().get(s.queue_sel as usize).copied().unwrap_or(0);
        match offset {
            reg::MAGIC_VALUE => MAGIC,
            reg::VERSION => 2,
            reg::DEVICE_ID => s.device.device_type(),
            reg::VENDOR_ID => VENDOR,
            reg::DEVICE_FEATURES => half(s.device.features(), s.device_features_sel),
            reg::QUEUE_NUM_MAX => u32::from(max),
            reg::QUEUE_READY => u32::from(queue.is_some_and(|q| q.ready)),
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
    fn interrupt_status(&self, s: &State) -> u32 {
        let pending = self.interrupt.pending.load(Ordering::Acquire);
        if self.called_by_fd && s.active { pending | INT_VRING } else { pending }
    }

    fn write_register(&self, s: &mut State, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURES_SEL => s.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => s.driver_features_sel = value,
            // After FEATURES_OK the set is final (3.1.1).
            reg::DRIVER_FEATURES if s.status & status::FEATURES_OK == 0 => {
                set_half(&mut s.driver_features, s.driver_features_sel, value);
            }
            reg::QUEUE_SEL => s.queue_sel = value,
            reg::QUEUE_NOTIFY => {
                if let Some(kick) = self.kicks.get(value as usize) {
                    let _ = kick.write(1);
                }
            }
            reg::INTERRUPT_ACK => {
                self.interrupt.pending.fetch_and(!value, Ordering::AcqRel);
            }
            reg::STATUS => self.set_status(s, value),
            _ => self.write_queue_register(s, offset, value),
        }
    }

    fn write_queue_register(&self, s: &mut State, offset: u64, value: u32) {
        if s.active {
            // A running queue's layout does not change, but the driver may stop it (4.2.2.2).
            if offset == reg::QUEUE_READY && value & 1 == 0 {
                self.stop_queue(s);
            }
            return;
        }
        let max = s.device.queue_max_sizes().get(s.queue_sel as usize).copied().unwrap_or(0);
        let packed = s.driver_features & super::F_RING_PACKED != 0;
        let Some(queue) = s.queues.get_mut(s.queue_sel as usize) else { return };
        match offset {
            reg::QUEUE_READY => queue.ready = value & 1 == 1,
            _ if queue.ready => {}
            reg::QUEUE_NUM => {
                // A packed ring need not be a power of two (2.8.10.1).
                let fits = |size: &u16| (packed && *size > 0 || size.is_power_of_two()) && *size <= max;
                let size = u16::try_from(value).ok().filter(fits);
                queue.size = size.unwrap_or(0);
            }
            reg::QUEUE_DESC_LOW => set_half(&mut queue.desc, 0, value),
            reg::QUEUE_DESC_HIGH => set_half(&mut queue.desc, 1, value),
            reg::QUEUE_DRIVER_LOW => set_half(&mut queue.driver, 0, value),
            reg::QUEUE_DRIVER_HIGH => set_half(&mut queue.driver, 1, value),
            reg::QUEUE_DEVICE_LOW => set_half(&mut queue.device, 0, value),
            reg::QUEUE_DEVICE_HIGH => set_half(&mut queue.device, 1, value),
            _ => {}
        }
    }

    fn stop_queue(&self, s: &mut State) {
        let index = s.queue_sel as usize;
        if s.queues.get_mut(index).is_some_and(|queue| std::mem::take(&mut queue.ready))
            && let Err(e) = s.device.stop_queue(index as u16)
        {
            self.needs_reset(s, &e);
        }
    }

    fn set_status(&self, s: &mut State, value: u32) {
        if value == 0 {
            return self.reset(s);
        }
        let new = value & !s.status;
        s.status |= value & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED);
        if new & status::FEATURES_OK != 0 {
            // Only accepted if the driver took nothing that was not offered, and the modern layout (6.1).
            let offered = s.device.features();
            if s.driver_features & !offered == 0 && s.driver_features & super::F_VERSION_1 != 0 {
                s.status |= status::FEATURES_OK;
            } else if s.complaints.add() {
                tracing::warn!(
                    device = s.device.name(),
                    driver = format_args!("{:#x}", s.driver_features),
                    offered = format_args!("{offered:#x}"),
                    "the driver's features are refused"
                );
            }
        }
        if new & status::DRIVER_OK != 0 && s.status & status::FEATURES_OK != 0 && !s.active {
            s.status |= status::DRIVER_OK;
            match self.activate(s) {
                Ok(()) => s.active = true,
                Err(e) => self.needs_reset(s, &e),
            }
        }
    }

    fn activate(&self, s: &mut State) -> Result<()> {
        let mut queues = Vec::new();
        for (index, (regs, kick)) in
            s.queues.iter().zip(&self.kicks).enumerate().filter(|(_, (q, _))| q.ready)
        {
            let wrong = |reason: String| Error::Driver { device: s.device.name().to_owned(), reason };
            if regs.size == 0 {
                return Err(wrong(format!("set an impossible size of queue {index}")));
            }
            // Alignment: descriptors 16, driver area 2 (4 with packed rings), device area 4 (2.7 and 2.8.10.1).
            let driver_align = if s.driver_features & super::F_RING_PACKED != 0 { 4 } else { 2 };
            if regs.desc % 16 != 0 || regs.driver % driver_align != 0 || regs.device % 4 != 0 {
                return Err(wrong(format!("set up queue {index} at unaligned addresses")));
            }
            queues.push(ActiveQueue {
                index: index as u16,
                size: regs.size,
                desc_table: regs.desc,
                avail_ring: regs.driver,
                used_ring: regs.device,
                kick: kick.clone(),
            });
        }
        s.device.activate(Activation {
            features: s.driver_features,
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
        })
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

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(target: &mut u64, select: u32, value: u32) {
    match select {
        0 => *target = *target & !0xffff_ffff | u64::from(value),
        1 => *target = *target & 0xffff_ffff | u64::from(value) << 32,
        _ => {}
    }
}

#[cfg(test)]
mod tests;
