//! Front ends of vhost-user devices: the transport's view of a device whose queues another process serves. The monitor
//! sets up and stops the queues and answers configuration accesses; no request passes through it.

pub mod blk;
pub mod link;
pub mod net;

use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use self::link::{END_TIMEOUT, Link, STOP_TIMEOUT};
use super::{Activation, ActiveQueue, Complaints, Interrupt, VirtioDevice};
use crate::error::{Error, Result};
use crate::kvm::GuestMemory;

/// The vhost-user bit among the virtio feature bits: the backend has protocol features.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What sets one kind of device apart from another.
#[derive(Clone, Debug)]
pub struct Kind {
    /// Virtio device type.
    pub device_type: u32,
    /// Features that may be offered if the backend has them.
    pub features: u64,
    /// Features that the monitor provides itself: offered always, and never told to a backend that does not know them.
    pub own_features: u64,
    /// Largest size of each queue.
    pub queue_max_sizes: Vec<u16>,
    /// Protocol features without which the device cannot work.
    pub needed: VhostUserProtocolFeatures,
    /// Length of the configuration space that is read from the backend, bytes.
    pub config_len: usize,
}

/// A device whose backend is another process.
#[derive(Debug)]
pub struct VhostUserDevice {
    name: String,
    kind: Kind,
    link: Link,
    backend_features: u64,
    protocol: VhostUserProtocolFeatures,
    config: Vec<u8>,
    memory_sent: bool,
    active: Vec<u16>,
    complaints: Complaints,
}

impl VhostUserDevice {
    /// Shakes hands with the backend behind `link`: features, protocol features, number of queues, configuration.
    pub fn new(name: &str, kind: Kind, link: Link) -> Result<Self> {
        let lacks = |reason: String| Error::BackendLacks { device: name.to_owned(), reason };
        link.call("SET_OWNER", |f| f.set_owner())?;
        let backend_features = link.call("GET_FEATURES", |f| f.get_features())?;
        if backend_features & super::F_VERSION_1 == 0 {
            return Err(lacks("does not offer VIRTIO_F_VERSION_1".into()));
        }
        let mut protocol = VhostUserProtocolFeatures::empty();
        if backend_features & PROTOCOL_FEATURES != 0 {
            let wanted = VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
            protocol = link.call("GET_PROTOCOL_FEATURES", Frontend::get_protocol_features)? & wanted;
            link.call("SET_PROTOCOL_FEATURES", |f| f.set_protocol_features(protocol))?;
        }
        if !protocol.contains(kind.needed) {
            return Err(lacks(format!("lacks the protocol features {:?}", kind.needed.difference(protocol))));
        }
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            link.frontend().set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let queues = kind.queue_max_sizes.len() as u64;
        if protocol.contains(VhostUserProtocolFeatures::MQ) {
            let has = link.call("GET_QUEUE_NUM", Frontend::get_queue_num)?;
            if has < queues {
                return Err(lacks(format!(
                    "has {has} queues, fewer than the {queues} asked for: lower queues="
                )));
            }
        } else if queues > 1 && kind.device_type == virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK {
            return Err(lacks(format!("has one queue only, {queues} were asked for: leave out queues=")));
        }
        let mut device = Self {
            name: name.to_owned(),
            link,
            backend_features,
            protocol,
            config: Vec::new(),
            memory_sent: false,
            active: Vec::new(),
            complaints: Complaints::default(),
            kind,
        };
        device.refresh_config()?;
        Ok(device)
    }

    /// The connection.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Configuration space as the driver sees it, for the kinds to adapt.
    pub fn config_mut(&mut self) -> &mut Vec<u8> {
        &mut self.config
    }

    fn refresh_config(&mut self) -> Result<()> {
        let len = self.kind.config_len;
        if len > 0 && self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            let zeros = vec![0u8; len];
            let (_, config) = self
                .link
                .call("GET_CONFIG", |f| f.get_config(0, len as u32, VhostUserConfigFlags::empty(), &zeros))?;
            self.config = config;
        }
        Ok(())
    }

    fn send_memory(&mut self, memory: &GuestMemory) -> Result<()> {
        // Memory does not change while the guest runs: once per connection is enough.
        if self.memory_sent {
            return Ok(());
        }
        let regions = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<vhost::Result<Vec<_>>>()
            .map_err(|source| Error::Backend {
                device: self.name.clone(),
                request: "SET_MEM_TABLE",
                source,
            })?;
        if self.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            let slots = self.link.call("GET_MAX_MEM_SLOTS", Frontend::get_max_mem_slots)?;
            if slots < regions.len() as u64 {
                let reason = format!("has {slots} memory slots, {} are needed", regions.len());
                return Err(Error::BackendLacks { device: self.name.clone(), reason });
            }
            for region in &regions {
                self.link.call("ADD_MEM_REG", |f| f.add_mem_region(region))?;
            }
        } else {
            self.link.call("SET_MEM_TABLE", |f| f.set_mem_table(&regions))?;
        }
        self.memory_sent = true;
        Ok(())
    }

    fn start_queue(
        &mut self,
        memory: &GuestMemory,
        queue: &ActiveQueue,
        interrupt: &Arc<dyn Interrupt>,
    ) -> Result<()> {
        let (index, n) = (usize::from(queue.index), u64::from(queue.size));
        let host = |what: &str, addr: u64, len: u64| {
            host_address(memory, addr, len).ok_or_else(|| Error::Driver {
                device: self.name.clone(),
                reason: format!("put the {what} of queue {index} outside of memory"),
            })
        };
        // Sizes: virtio 1.2, 2.7, with the event index at the end of both rings.
        let config = VringConfigData {
            queue_max_size: self.kind.queue_max_sizes.get(index).copied().unwrap_or(0),
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: host("descriptor table", queue.desc_table, 16 * n)?,
            avail_ring_addr: host("available ring", queue.avail_ring, 6 + 2 * n)?,
            used_ring_addr: host("used ring", queue.used_ring, 6 + 8 * n)?,
            log_addr: None,
        };
        let call = interrupt.call_fd(queue.index).ok_or_else(|| Error::Driver {
            device: self.name.clone(),
            reason: format!("has no interrupt for queue {index}"),
        })?;
        self.link.call("SET_VRING_NUM", |f| f.set_vring_num(index, queue.size))?;
        self.link.call("SET_VRING_BASE", |f| f.set_vring_base(index, 0))?;
        self.link.call("SET_VRING_ADDR", |f| f.set_vring_addr(index, &config))?;
        self.link.call("SET_VRING_CALL", |f| f.set_vring_call(index, call))?;
        // The kick starts the ring.
        self.link.call("SET_VRING_KICK", |f| f.set_vring_kick(index, &queue.kick))?;
        self.active.push(queue.index);
        if self.backend_features & PROTOCOL_FEATURES != 0 {
            self.link.call("SET_VRING_ENABLE", |f| f.set_vring_enable(index, true))?;
        }
        Ok(())
    }

    fn start(&mut self, activation: &Activation) -> Result<()> {
        let features =
            activation.features & self.backend_features | self.backend_features & PROTOCOL_FEATURES;
        self.link.call("SET_FEATURES", |f| f.set_features(features))?;
        self.send_memory(&activation.memory)?;
        for queue in &activation.queues {
            self.start_queue(&activation.memory, queue, &activation.interrupt)?;
        }
        Ok(())
    }
}

impl VhostUserDevice {
    /// Stops the rings: what was begun is finished, nothing more is begun (vhost-user, "Ring states").
    fn stop_queues(&mut self, timeout: Duration) -> Result<()> {
        for index in std::mem::take(&mut self.active) {
            // After an error the connection is dead: the other rings cannot be stopped either.
            self.link.call_within(timeout, "GET_VRING_BASE", |f| f.get_vring_base(usize::from(index)))?;
        }
        Ok(())
    }
}

/// Host address of a piece of guest memory that lies in one region.
fn host_address(memory: &GuestMemory, addr: u64, len: u64) -> Option<u64> {
    let region = memory.find_region(GuestAddress(addr))?;
    let offset = addr.checked_sub(region.start_addr().0)?;
    (offset.checked_add(len)? <= region.len()).then(|| region.as_ptr() as u64 + offset)
}

impl VirtioDevice for VhostUserDevice {
    fn name(&self) -> &str {
        &self.name
    }
    fn device_type(&self) -> u32 {
        self.kind.device_type
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &self.kind.queue_max_sizes
    }
    fn features(&self) -> u64 {
        self.backend_features & self.kind.features | self.kind.own_features
    }
    fn called_by_fd(&self) -> bool {
        true
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = offset.checked_add(i).and_then(|at| self.config.get(at)).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let end = offset.checked_add(data.len() as u64);
        if end.is_none_or(|end| end > self.config.len() as u64)
            || !self.protocol.contains(VhostUserProtocolFeatures::CONFIG)
        {
            return;
        }
        let sent = self
            .link
            .call("SET_CONFIG", |f| f.set_config(offset as u32, VhostUserConfigFlags::WRITABLE, data));
        match sent {
            Ok(()) => self.config[offset as usize..][..data.len()].copy_from_slice(data),
            Err(e) if self.complaints.add() => {
                tracing::warn!(device = self.name, error = %crate::chain(&e), "the backend refuses a change of configuration");
            }
            Err(_) => {}
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let result = self.start(&activation);
        if result.is_err()
            && let Err(e) = self.reset()
        {
            tracing::debug!(device = self.name, error = %crate::chain(&e), "cannot undo a failed start");
        }
        result
    }

    fn reset(&mut self) -> Result<()> {
        self.stop_queues(STOP_TIMEOUT)
    }

    fn stop_queue(&mut self, index: u16) -> Result<()> {
        let Some(at) = self.active.iter().position(|active| *active == index) else { return Ok(()) };
        self.active.remove(at);
        self.link.call_within(STOP_TIMEOUT, "GET_VRING_BASE", |f| f.get_vring_base(usize::from(index)))?;
        Ok(())
    }

    fn shut_down(&mut self) -> Result<()> {
        self.stop_queues(END_TIMEOUT)
    }
}

#[cfg(test)]
mod tests;
