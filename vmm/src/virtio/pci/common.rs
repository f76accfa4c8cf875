//! The common configuration structure (virtio 1.2, 4.1.4.3).

use std::sync::atomic::Ordering;

use super::{Inner, PciInterrupt, at};
use crate::virtio::state::set_half;

/// Offsets of its fields.
pub(super) mod reg {
    pub(in crate::virtio::pci) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(in crate::virtio::pci) const DEVICE_FEATURE: u64 = 0x04;
    pub(in crate::virtio::pci) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(in crate::virtio::pci) const DRIVER_FEATURE: u64 = 0x0c;
    pub(in crate::virtio::pci) const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub(in crate::virtio::pci) const NUM_QUEUES: u64 = 0x12;
    pub(in crate::virtio::pci) const DEVICE_STATUS: u64 = 0x14;
    pub(in crate::virtio::pci) const CONFIG_GENERATION: u64 = 0x15;
    pub(in crate::virtio::pci) const QUEUE_SELECT: u64 = 0x16;
    pub(in crate::virtio::pci) const QUEUE_SIZE: u64 = 0x18;
    pub(in crate::virtio::pci) const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub(in crate::virtio::pci) const QUEUE_ENABLE: u64 = 0x1c;
    pub(in crate::virtio::pci) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(in crate::virtio::pci) const QUEUE_DESC: u64 = 0x20;
    pub(in crate::virtio::pci) const QUEUE_DRIVER: u64 = 0x28;
    pub(in crate::virtio::pci) const QUEUE_DEVICE: u64 = 0x30;
}

impl Inner {
    /// The source of configuration changes: after the queues.
    fn config_source(&self) -> usize {
        self.state.queues.len()
    }

    /// Reads; what is beyond the end is zero.
    pub(super) fn read_common(&self, interrupt: &PciInterrupt, offset: u64, data: &mut [u8]) {
        let s = &self.state;
        let queue = s.queue().copied().unwrap_or_default();
        let exists = s.queue().is_some();
        // As told while it was not running, a queue of no size is one that is not there.
        let size = if exists { queue.size } else { 0 };
        let vector =
            if exists { self.msix.vector(s.queue_sel as usize) } else { crate::pci::msix::NO_VECTOR };
        let notify_off = if exists { s.queue_sel as u16 } else { 0 };
        let told = interrupt.generation.load(Ordering::Acquire);
        let generation = told.wrapping_add(s.device.config_generation()) as u8;
        let mut bytes = [0; at::COMMON_LEN as usize];
        let mut put = |at: u64, value: &[u8]| bytes[at as usize..][..value.len()].copy_from_slice(value);
        put(reg::DEVICE_FEATURE_SELECT, &s.device_features_sel.to_le_bytes());
        put(reg::DEVICE_FEATURE, &s.device_features().to_le_bytes());
        put(reg::DRIVER_FEATURE_SELECT, &s.driver_features_sel.to_le_bytes());
        put(reg::DRIVER_FEATURE, &s.selected_driver_features().to_le_bytes());
        put(reg::CONFIG_MSIX_VECTOR, &self.msix.vector(self.config_source()).to_le_bytes());
        put(reg::NUM_QUEUES, &(s.queues.len() as u16).to_le_bytes());
        put(reg::DEVICE_STATUS, &[s.status as u8]);
        put(reg::CONFIG_GENERATION, &[generation]);
        put(reg::QUEUE_SELECT, &(s.queue_sel as u16).to_le_bytes());
        put(reg::QUEUE_SIZE, &size.to_le_bytes());
        put(reg::QUEUE_MSIX_VECTOR, &vector.to_le_bytes());
        put(reg::QUEUE_ENABLE, &u16::from(queue.ready).to_le_bytes());
        put(reg::QUEUE_NOTIFY_OFF, &notify_off.to_le_bytes());
        put(reg::QUEUE_DESC, &queue.desc.to_le_bytes());
        put(reg::QUEUE_DRIVER, &queue.driver.to_le_bytes());
        put(reg::QUEUE_DEVICE, &queue.device.to_le_bytes());
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = usize::try_from(offset).ok().and_then(|at| bytes.get(at + i)).copied().unwrap_or(0);
        }
    }

    /// Writes one field in its own width, or half of a 64-bit field (4.1.3.1); other accesses do nothing. True: the device
    /// was reset.
    pub(super) fn write_common(&mut self, offset: u64, data: &[u8]) -> bool {
        let value = data.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        let s = &mut self.state;
        match (offset, data.len()) {
            (reg::DEVICE_FEATURE_SELECT, 4) => s.device_features_sel = value as u32,
            (reg::DRIVER_FEATURE_SELECT, 4) => s.driver_features_sel = value as u32,
            (reg::DRIVER_FEATURE, 4) => s.set_driver_features(value as u32),
            (reg::CONFIG_MSIX_VECTOR, 2) => {
                let source = self.config_source();
                self.msix.set_vector(source, value as u16);
            }
            (reg::DEVICE_STATUS, 1) => return s.set_status(value as u32),
            (reg::QUEUE_SELECT, 2) => s.queue_sel = value as u32,
            (reg::QUEUE_SIZE, 2) => s.set_queue_size(value as u32),
            (reg::QUEUE_MSIX_VECTOR, 2) => {
                let queue = s.queue_sel as usize;
                if queue < s.queues.len() {
                    self.msix.set_vector(queue, value as u16);
                }
            }
            // The driver must not write 0 (4.1.4.3.2): it has the reset for that.
            (reg::QUEUE_ENABLE, 2) if value == 1 => s.set_queue_ready(true),
            (reg::QUEUE_DESC..at::COMMON_LEN, 4 | 8) if offset.is_multiple_of(data.len() as u64) => {
                self.write_address(offset, value, data.len());
            }
            _ => {}
        }
        false
    }

    fn write_address(&mut self, offset: u64, value: u64, len: usize) {
        let Some(queue) = self.state.open_queue() else { return };
        let target = match offset & !7 {
            reg::QUEUE_DESC => &mut queue.desc,
            reg::QUEUE_DRIVER => &mut queue.driver,
            reg::QUEUE_DEVICE => &mut queue.device,
            _ => return,
        };
        if len == 8 {
            *target = value;
        } else {
            set_half(target, (offset / 4 % 2) as u32, value as u32);
        }
    }
}
