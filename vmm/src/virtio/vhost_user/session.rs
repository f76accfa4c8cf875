//! One connection to a backend from the handshake on: what was negotiated on it and what the backend was told so far.
//! What outlives a connection is [`super::front`]'s.

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::channel::Channel;
use super::inflight::InflightLog;
use super::link::Link;
use super::{Kind, PROTOCOL_FEATURES};
use crate::error::{Error, Result};
use crate::kvm::GuestMemory;
use crate::virtio::{ActiveQueue, F_RING_PACKED, F_VERSION_1};

/// A connection on which both sides know each other's features.
#[derive(Debug)]
pub struct Session {
    device: String,
    link: Link,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    config: Vec<u8>,
    memory_sent: bool,
}

impl Session {
    /// Shakes hands: features, protocol features, number of queues, configuration, and the backend's own channel if it
    /// uses one.
    pub fn start(device: &str, kind: &Kind, link: Link) -> Result<(Self, Option<Channel>)> {
        let lacks = |reason: String| Error::BackendLacks { device: device.to_owned(), reason };
        link.call("SET_OWNER", |f| f.set_owner())?;
        let features = link.call("GET_FEATURES", |f| f.get_features())?;
        if features & F_VERSION_1 == 0 {
            return Err(lacks("does not offer VIRTIO_F_VERSION_1".into()));
        }
        if features & kind.needed_features != kind.needed_features {
            let packed = kind.needed_features & !features & F_RING_PACKED != 0;
            let (what, hint) = if packed {
                ("packed rings (VIRTIO_F_RING_PACKED)", "packed=on")
            } else {
                ("several queues (VIRTIO_NET_F_MQ with VIRTIO_NET_F_CTRL_VQ)", "queues=")
            };
            return Err(lacks(format!("does not offer {what}: leave out {hint}")));
        }
        let mut protocol = VhostUserProtocolFeatures::empty();
        if features & PROTOCOL_FEATURES != 0 {
            let wanted = VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                | VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
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
        // Network back ends answer with queues or with pairs of them, and the crate would hold us to the smaller number:
        // what they do not have they refuse when it is set up.
        let counts_queues = kind.device_type != virtio_bindings::virtio_ids::VIRTIO_ID_NET;
        if protocol.contains(VhostUserProtocolFeatures::MQ) && counts_queues {
            let has = link.call("GET_QUEUE_NUM", Frontend::get_queue_num)?;
            if has < queues {
                return Err(lacks(format!(
                    "has {has} queues, fewer than the {queues} asked for: lower queues="
                )));
            }
        } else if queues > 1 && kind.device_type == virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK {
            return Err(lacks(format!("has one queue only, {queues} were asked for: leave out queues=")));
        }
        let channel = protocol
            .contains(VhostUserProtocolFeatures::BACKEND_REQ)
            .then(|| {
                let (ours, theirs) = Channel::pair()?;
                link.call("SET_BACKEND_REQ_FD", |f| f.set_backend_request_fd(&theirs))?;
                Ok(ours)
            })
            .transpose()?;
        let mut session = Self {
            device: device.to_owned(),
            link,
            features,
            protocol,
            config: Vec::new(),
            memory_sent: false,
        };
        session.read_config(kind)?;
        Ok((session, channel))
    }

    /// The connection.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// The virtio features that the backend offers.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The configuration space as the backend last told it, made the monitor's by `kind`.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// Whether the backend keeps a log of what is in flight.
    pub fn keeps_log(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }

    /// Reads the configuration space (again).
    pub fn read_config(&mut self, kind: &Kind) -> Result<()> {
        if kind.config_len > 0 && self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            let (len, zeros) = (kind.config_len as u32, vec![0u8; kind.config_len]);
            let flags = VhostUserConfigFlags::empty();
            let (_, config) = self.link.call("GET_CONFIG", |f| f.get_config(0, len, flags, &zeros))?;
            self.config = config;
        } else {
            self.config.clear();
        }
        kind.adapt_config(&mut self.config);
        Ok(())
    }

    /// Passes on a driver's write to the configuration space. False: this backend has none to write.
    pub fn write_config(&self, offset: u32, data: &[u8]) -> Result<bool> {
        if !self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Ok(false);
        }
        self.link.call("SET_CONFIG", |f| f.set_config(offset, VhostUserConfigFlags::WRITABLE, data))?;
        Ok(true)
    }

    /// Tells the backend what the driver has accepted.
    pub fn set_features(&self, accepted: u64) -> Result<()> {
        let features = accepted & self.features | self.features & PROTOCOL_FEATURES;
        self.link.call("SET_FEATURES", |f| f.set_features(features))
    }

    /// Gives the backend a log, or has it make one.
    pub fn set_log(&self, log: &mut Option<InflightLog>, queues: u16, size: u16) -> Result<()> {
        if !self.keeps_log() {
            return Ok(());
        }
        if log.is_none() {
            *log = Some(InflightLog::get(&self.device, &self.link, queues, size)?);
        }
        log.as_ref().map_or(Ok(()), |log| log.set(&self.link))
    }

    /// Gives the backend guest memory, once per connection: it does not change while the guest runs.
    pub fn set_memory(&mut self, memory: &GuestMemory) -> Result<()> {
        if self.memory_sent {
            return Ok(());
        }
        let regions = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<vhost::Result<Vec<_>>>()
            .map_err(|source| Error::Backend {
                device: self.device.clone(),
                request: "SET_MEM_TABLE",
                source,
            })?;
        if self.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            let slots = self.link.call("GET_MAX_MEM_SLOTS", Frontend::get_max_mem_slots)?;
            if slots < regions.len() as u64 {
                let reason = format!("has {slots} memory slots, {} are needed", regions.len());
                return Err(Error::BackendLacks { device: self.device.clone(), reason });
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

    /// Describes a queue and starts it at `base` (vhost-user, "Vring descriptor indices").
    pub fn start_queue(
        &self,
        memory: &GuestMemory,
        queue: &ActiveQueue,
        base: u32,
        accepted: u64,
        max_size: u16,
        call: &EventFd,
    ) -> Result<()> {
        let (index, n) = (usize::from(queue.index), u64::from(queue.size));
        let host = |what: &str, addr: u64, len: u64| {
            host_address(memory, addr, len).ok_or_else(|| Error::Driver {
                device: self.device.clone(),
                reason: format!("put the {what} of queue {index} outside of memory"),
            })
        };
        // Sizes: virtio 1.2, 2.7 (with the event index at the end of both rings) and 2.8.
        let (desc_len, avail_len, used_len) =
            if accepted & F_RING_PACKED != 0 { (16 * n, 4, 4) } else { (16 * n, 6 + 2 * n, 6 + 8 * n) };
        let config = VringConfigData {
            queue_max_size: max_size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: host("descriptor table", queue.desc_table, desc_len)?,
            avail_ring_addr: host("driver area", queue.avail_ring, avail_len)?,
            used_ring_addr: host("device area", queue.used_ring, used_len)?,
            log_addr: None,
        };
        let link = &self.link;
        link.call("SET_VRING_NUM", |f| f.set_vring_num(index, queue.size))?;
        let acked = self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        link.set_vring_base(queue.index, base, acked)?;
        link.call("SET_VRING_ADDR", |f| f.set_vring_addr(index, &config))?;
        link.call("SET_VRING_CALL", |f| f.set_vring_call(index, call))?;
        // The kick starts the ring.
        link.call("SET_VRING_KICK", |f| f.set_vring_kick(index, &queue.kick))?;
        if self.features & PROTOCOL_FEATURES != 0 {
            link.call("SET_VRING_ENABLE", |f| f.set_vring_enable(index, true))?;
        }
        Ok(())
    }
}

/// Host address of a piece of guest memory that lies in one region.
pub(super) fn host_address(memory: &GuestMemory, addr: u64, len: u64) -> Option<u64> {
    let region = memory.find_region(GuestAddress(addr))?;
    let offset = addr.checked_sub(region.start_addr().0)?;
    (offset.checked_add(len)? <= region.len()).then(|| region.as_ptr() as u64 + offset)
}
