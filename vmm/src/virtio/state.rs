//! What every transport keeps of its device: status, features and queues as the driver has set them (virtio 1.2, chapters
//! 2 and 3). A transport maps its registers to this and adds nothing to the rules.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::{Activation, ActiveQueue, Complaints, F_RING_PACKED, F_VERSION_1, Interrupt, VirtioDevice};
use crate::error::{Error, Result};
use crate::kvm::GuestMemory;

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

/// One queue's registers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct QueueRegs {
    /// 0 if the driver asked for a size that cannot be: it would lay its rings out for that one.
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) desc: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

/// A device and all that its driver has set.
pub(super) struct DeviceState {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) status: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
    pub(super) queues: Vec<QueueRegs>,
    /// The device runs.
    pub(super) active: bool,
    complaints: Complaints,
    kicks: Vec<Arc<EventFd>>,
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
}

/// Queues as they are after a reset.
fn fresh_queues(device: &dyn VirtioDevice) -> Vec<QueueRegs> {
    device.queue_max_sizes().iter().map(|&size| QueueRegs { size, ..Default::default() }).collect()
}

/// A new eventfd, as transports use them.
pub(crate) fn event() -> Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::os("create an eventfd"))
}

/// A notification descriptor for each queue of a device.
pub(super) fn kicks(device: &dyn VirtioDevice) -> Result<Vec<Arc<EventFd>>> {
    device.queue_max_sizes().iter().map(|_| event().map(Arc::new)).collect()
}

impl DeviceState {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        kicks: Vec<Arc<EventFd>>,
        memory: Arc<GuestMemory>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: fresh_queues(&*device),
            active: false,
            complaints: Complaints::default(),
            device,
            kicks,
            memory,
            interrupt,
        }
    }

    /// Stops the device, and forgets all that the driver has set.
    pub(super) fn reset(&mut self) {
        if std::mem::take(&mut self.active)
            && let Err(e) = self.device.reset()
        {
            tracing::error!(device = self.device.name(), error = %crate::chain(&e), "the device did not stop cleanly");
        }
        (self.status, self.driver_features, self.queue_sel) = (0, 0, 0);
        (self.device_features_sel, self.driver_features_sel) = (0, 0);
        self.queues = fresh_queues(&*self.device);
    }

    /// Stops the device for good, at the end of the run.
    pub(super) fn shut_down(&mut self) {
        if std::mem::take(&mut self.active)
            && let Err(e) = self.device.shut_down()
        {
            tracing::warn!(device = self.device.name(), error = %crate::chain(&e), "the device did not stop cleanly");
        }
    }

    fn needs_reset(&mut self, error: &Error) {
        if self.complaints.add() {
            tracing::error!(device = self.device.name(), error = %crate::chain(error), "the device needs a reset");
        }
        self.status |= status::DEVICE_NEEDS_RESET;
        self.interrupt.config();
    }

    /// The selected half of the offered features.
    pub(super) fn device_features(&self) -> u32 {
        half(self.device.features(), self.device_features_sel)
    }

    /// The selected half of the accepted features.
    pub(super) fn selected_driver_features(&self) -> u32 {
        half(self.driver_features, self.driver_features_sel)
    }

    /// Sets the selected half of the accepted features. After FEATURES_OK the set is final (3.1.1).
    pub(super) fn set_driver_features(&mut self, value: u32) {
        if self.status & status::FEATURES_OK == 0 {
            set_half(&mut self.driver_features, self.driver_features_sel, value);
        }
    }

    /// The registers of the selected queue.
    pub(super) fn queue(&self) -> Option<&QueueRegs> {
        self.queues.get(self.queue_sel as usize)
    }

    /// Largest size of the selected queue; 0 if there is none.
    pub(super) fn queue_max(&self) -> u16 {
        self.device.queue_max_sizes().get(self.queue_sel as usize).copied().unwrap_or(0)
    }

    /// The registers of the selected queue as long as they may be changed: until it is enabled, or the device runs.
    pub(super) fn open_queue(&mut self) -> Option<&mut QueueRegs> {
        if self.active {
            return None;
        }
        self.queues.get_mut(self.queue_sel as usize).filter(|queue| !queue.ready)
    }

    /// Sets the selected queue's size.
    pub(super) fn set_queue_size(&mut self, value: u32) {
        let max = self.queue_max();
        let packed = self.driver_features & F_RING_PACKED != 0;
        // A packed ring need not be a power of two (2.8.10.1).
        let fits = |size: &u16| (packed && *size > 0 || size.is_power_of_two()) && *size <= max;
        let size = u16::try_from(value).ok().filter(fits).unwrap_or(0);
        if let Some(queue) = self.open_queue() {
            queue.size = size;
        }
    }

    /// Enables the selected queue, or disables it before the device runs.
    pub(super) fn set_queue_ready(&mut self, ready: bool) {
        if !self.active
            && let Some(queue) = self.queues.get_mut(self.queue_sel as usize)
        {
            queue.ready = ready;
        }
    }

    /// Stops the selected queue of a running device.
    pub(super) fn stop_queue(&mut self) {
        let index = self.queue_sel as usize;
        if self.queues.get_mut(index).is_some_and(|queue| std::mem::take(&mut queue.ready))
            && let Err(e) = self.device.stop_queue(index as u16)
        {
            self.needs_reset(&e);
        }
    }

    /// A write to the status register. True: it was a reset.
    pub(super) fn set_status(&mut self, value: u32) -> bool {
        if value == 0 {
            self.reset();
            return true;
        }
        let new = value & !self.status;
        self.status |= value & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED);
        if new & status::FEATURES_OK != 0 {
            // Only accepted if the driver took nothing that was not offered, and the modern layout (6.1).
            let offered = self.device.features();
            if self.driver_features & !offered == 0 && self.driver_features & F_VERSION_1 != 0 {
                self.status |= status::FEATURES_OK;
            } else if self.complaints.add() {
                tracing::warn!(
                    device = self.device.name(),
                    driver = format_args!("{:#x}", self.driver_features),
                    offered = format_args!("{offered:#x}"),
                    "the driver's features are refused"
                );
            }
        }
        if new & status::DRIVER_OK != 0 && self.status & status::FEATURES_OK != 0 && !self.active {
            self.status |= status::DRIVER_OK;
            match self.activate() {
                Ok(()) => self.active = true,
                Err(e) => self.needs_reset(&e),
            }
        }
        false
    }

    fn activate(&mut self) -> Result<()> {
        let activation = self.activation()?;
        self.device.activate(activation)
    }

    fn activation(&self) -> Result<Activation> {
        let mut queues = Vec::new();
        for (index, (regs, kick)) in
            self.queues.iter().zip(&self.kicks).enumerate().filter(|(_, (q, _))| q.ready)
        {
            let wrong = |reason: String| Error::Driver { device: self.device.name().to_owned(), reason };
            if regs.size == 0 {
                return Err(wrong(format!("set an impossible size of queue {index}")));
            }
            // Alignment: descriptors 16, driver area 2 (4 with packed rings), device area 4 (2.7 and 2.8.10.1).
            let driver_align = if self.driver_features & F_RING_PACKED != 0 { 4 } else { 2 };
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
        Ok(Activation {
            features: self.driver_features,
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
        })
    }
}

/// A device in a snapshot, as its driver has set it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct SavedState {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    /// Size, enabled, addresses of descriptors, driver area and device area.
    queues: Vec<(u16, bool, u64, u64, u64)>,
    active: bool,
    /// What the device itself keeps.
    device: Vec<u8>,
}

impl DeviceState {
    /// Has a running device's queues rest.
    pub(super) fn quiesce(&mut self) -> Result<()> {
        if self.active { self.device.quiesce() } else { Ok(()) }
    }

    /// Has them go on.
    pub(super) fn go_on(&mut self) -> Result<()> {
        if self.active { self.device.go_on() } else { Ok(()) }
    }

    /// What a snapshot keeps.
    pub(super) fn save(&self) -> SavedState {
        let queue = |q: &QueueRegs| (q.size, q.ready, q.desc, q.driver, q.device);
        SavedState {
            status: self.status,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            queues: self.queues.iter().map(queue).collect(),
            active: self.active,
            device: self.device.save(),
        }
    }

    /// Brings that back; a device that ran goes on where its rings stand.
    pub(super) fn restore(&mut self, saved: &SavedState) -> Result<()> {
        let wrong = |reason: String| Error::Snapshot(format!("{}: {reason}", self.device.name()));
        if saved.queues.len() != self.queues.len() {
            return Err(wrong(format!("it has {} queues, had {}", self.queues.len(), saved.queues.len())));
        }
        let missing = saved.driver_features & !self.device.features();
        if missing != 0 {
            return Err(wrong(format!("it lacks the features {missing:#x} that the guest uses")));
        }
        self.status = saved.status;
        self.device_features_sel = saved.device_features_sel;
        self.driver_features_sel = saved.driver_features_sel;
        self.driver_features = saved.driver_features;
        self.queue_sel = saved.queue_sel;
        for (queue, saved) in self.queues.iter_mut().zip(&saved.queues) {
            let &(size, ready, desc, driver, device) = saved;
            *queue = QueueRegs { size, ready, desc, driver, device };
        }
        if saved.active {
            let activation = self.activation()?;
            self.device.restore(&saved.device, activation)?;
            self.active = true;
        }
        Ok(())
    }
}

/// Half of a 64-bit value; 0 where `select` is neither 0 nor 1.
pub(super) fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

/// Sets half of a 64-bit value; nothing where `select` is neither 0 nor 1.
pub(super) fn set_half(target: &mut u64, select: u32, value: u32) {
    match select {
        0 => *target = *target & !0xffff_ffff | u64::from(value),
        1 => *target = *target & 0xffff_ffff | u64::from(value) << 32,
        _ => {}
    }
}
