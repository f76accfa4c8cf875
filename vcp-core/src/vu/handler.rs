//! [`Handler`]: the messages of one connection, turned into commands for the data thread.
//!
//! It keeps what only set-up needs (the memory table with the front end's addresses); the rest lives on the data
//! thread. Each message waits for its command to be carried out, so their order is the order of the messages.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::port::{Answer, Command, F_PROTOCOL_FEATURES, F_RING_PACKED, PortError, What};
use super::vring::{STOP_TIMEOUT, eventfd};
use crate::device::RingDevice;
use crate::mailbox::Mailbox;
use crate::mem::{MAX_REGIONS, MemTable, RegionSpec};
use crate::queue::log::{LogArea, LogError, LogFormat, LogSpec};

/// How long a message waits for the data thread, which looks into its mailbox every pass.
const ANSWER_TIMEOUT: Duration = STOP_TIMEOUT.saturating_add(Duration::from_secs(5));

/// What the front end may know before the data thread is asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    pub(crate) features: u64,
    pub(crate) queues: u16,
    /// What `GET_QUEUE_NUM` is answered with.
    pub(crate) queue_num: u16,
    pub(crate) queue_size_max: u16,
    /// Whether the in-flight log is offered.
    pub(crate) keeps_log: bool,
}

impl Facts {
    pub(crate) fn of<D: RingDevice>(device: &D) -> Self {
        Self {
            features: device.features(),
            queues: device.queues(),
            queue_num: device.queue_num(),
            queue_size_max: device.queue_size_max(),
            keeps_log: device.keeps_log(),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Handler {
    pub(crate) device: usize,
    pub(crate) facts: Facts,
    pub(crate) mailbox: Arc<Mailbox<Command>>,
    memory: MemTable,
    /// Protocol features that the front end took.
    protocol: VhostUserProtocolFeatures,
    /// Messages are noted, not carried out: they only tell the crate what was before.
    pub(super) silent: bool,
    /// The driver's status, as the front end told it last.
    pub(super) status: u8,
    /// The format of the in-flight log; it follows the rings'.
    log_format: LogFormat,
}

impl Handler {
    pub(crate) fn new(device: usize, facts: Facts, mailbox: Arc<Mailbox<Command>>) -> Self {
        Self {
            device,
            facts,
            mailbox,
            memory: MemTable::default(),
            protocol: VhostUserProtocolFeatures::empty(),
            silent: false,
            status: 0,
            log_format: LogFormat::Split,
        }
    }

    /// Goes on with the memory table of another process; its other settings come as messages.
    pub(crate) fn resume(
        device: usize,
        facts: Facts,
        mailbox: Arc<Mailbox<Command>>,
        memory: MemTable,
        status: u8,
    ) -> Self {
        Self { memory, status, ..Self::new(device, facts, mailbox) }
    }

    /// Lets go of the guest's memory.
    pub(crate) fn forget_memory(&mut self) {
        self.memory = MemTable::default();
    }

    /// The memory table.
    pub(crate) fn memory(&self) -> &MemTable {
        &self.memory
    }

    /// Protocol features that the front end took.
    pub(crate) fn protocol(&self) -> VhostUserProtocolFeatures {
        self.protocol
    }

    /// Has the data thread carry out `what`.
    pub(crate) fn ask(&self, what: What) -> std::result::Result<Answer, PortError> {
        let (reply, answer) = sync_channel(1);
        self.mailbox.send(Command { device: self.device, what, reply });
        answer.recv_timeout(ANSWER_TIMEOUT).unwrap_or(Err(PortError::NoAnswer))
    }

    fn order(&self, what: What) -> Result<()> {
        if self.silent {
            return Ok(());
        }
        self.ask(what).map(drop).map_err(failed)
    }

    fn guest_addr(&self, user_addr: u64) -> Result<u64> {
        self.memory.guest_addr(user_addr).ok_or_else(|| failed(PortError::Address(user_addr)))
    }

    /// Whether a log for so many queues and entries is one for this device.
    fn check_log(&self, queues: u16, size: u16) -> Result<()> {
        let Facts { queues: max_queues, queue_size_max: max_size, .. } = self.facts;
        if queues == 0 || queues > max_queues || size == 0 || size > max_size {
            return Err(failed(LogError::Geometry { queues, size, max_queues, max_size }));
        }
        Ok(())
    }

    /// Whether a protocol feature was negotiated.
    pub(crate) fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol.contains(feature)
    }
}

/// An error of ours as the crate wants it: the chain in one line.
fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::other(crate::process::chain(&error)))
}

fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

fn spec(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest_addr: region.guest_phys_addr,
        len_bytes: region.memory_size,
        user_addr: region.user_addr,
        offset: region.mmap_offset,
    }
}

/// The descriptor of a kick, call or error message, if it brought one.
fn event(queue: u8, fd: Option<File>) -> Result<Option<File>> {
    fd.map(|fd| eventfd(fd, queue.into())).transpose().map_err(failed)
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.order(What::Reset)
    }

    fn reset_device(&mut self) -> Result<()> {
        self.order(What::Reset)
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.facts.features | F_PROTOCOL_FEATURES | F_RING_PACKED)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.order(What::SetFeatures(features))?;
        self.log_format = if features & F_RING_PACKED != 0 { LogFormat::Packed } else { LogFormat::Split };
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        // The crate made sure that there are as many files as regions.
        self.memory = MemTable::new(regions.iter().map(spec).zip(files)).map_err(failed)?;
        self.order(What::SetMemory(self.memory.map()))?;
        Ok(None)
    }

    fn set_vring_num(&mut self, queue: u32, size: u32) -> Result<()> {
        self.order(What::SetVringNum { queue, size })
    }

    fn set_vring_addr(
        &mut self,
        queue: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        if flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG) {
            return unsupported("dirty page logging was not offered");
        }
        let (desc, avail, used) =
            (self.guest_addr(descriptor)?, self.guest_addr(available)?, self.guest_addr(used)?);
        self.order(What::SetVringAddr { queue, desc, avail, used })
    }

    fn set_vring_base(&mut self, queue: u32, base: u32) -> Result<()> {
        self.order(What::SetVringBase { queue, base })
    }

    fn get_vring_base(&mut self, queue: u32) -> Result<VhostUserVringState> {
        match self.ask(What::GetVringBase { queue }).map_err(failed)? {
            Answer::Base(base) => Ok(VhostUserVringState::new(queue, base)),
            _ => Err(Error::BackendInternalError),
        }
    }

    fn set_vring_kick(&mut self, queue: u8, fd: Option<File>) -> Result<()> {
        let fd = event(queue, fd)?;
        self.order(What::SetVringKick { queue: queue.into(), fd })
    }

    fn set_vring_call(&mut self, queue: u8, fd: Option<File>) -> Result<()> {
        let fd = event(queue, fd)?;
        self.order(What::SetVringCall { queue: queue.into(), fd })
    }

    fn set_vring_err(&mut self, queue: u8, fd: Option<File>) -> Result<()> {
        let fd = event(queue, fd)?;
        self.order(What::SetVringErr { queue: queue.into(), fd })
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(protocol_features(self.facts.keeps_log))
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let taken = VhostUserProtocolFeatures::from_bits_truncate(features);
        let refused = features & !protocol_features(self.facts.keeps_log).bits();
        if refused != 0 {
            return Err(failed(PortError::Features(refused)));
        }
        self.protocol = taken;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.facts.queue_num.into())
    }

    fn set_vring_enable(&mut self, queue: u32, enable: bool) -> Result<()> {
        self.order(What::SetVringEnable { queue, enable })
    }

    fn get_config(&mut self, offset: u32, len_bytes: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        match self.ask(What::GetConfig { offset, len_bytes }).map_err(failed)? {
            Answer::Config(bytes) => Ok(bytes),
            _ => Err(Error::BackendInternalError),
        }
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.order(What::SetConfig { offset, data: data.to_vec() })
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        unsupported("no gpu here")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported("shared objects were not offered")
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        self.check_log(inflight.num_queues, inflight.queue_size)?;
        // With room for either format: a front end may ask before it sets features.
        let (spec, file) =
            LogArea::create(inflight.num_queues, inflight.queue_size, LogFormat::Packed).map_err(failed)?;
        Ok((VhostUserInflight::new(spec.len_bytes, spec.offset, spec.queues, spec.queue_size), file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        self.check_log(inflight.num_queues, inflight.queue_size)?;
        let spec = LogSpec {
            len_bytes: inflight.mmap_size,
            offset: inflight.mmap_offset,
            queues: inflight.num_queues,
            queue_size: inflight.queue_size,
        };
        let log = LogArea::map(spec, file, self.log_format).map_err(failed)?;
        self.order(What::SetInflight(Arc::new(log)))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.memory.add(spec(region), fd).map_err(failed)?;
        self.order(What::SetMemory(self.memory.map()))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.memory.remove(region.guest_phys_addr, region.memory_size, region.user_addr).map_err(failed)?;
        self.order(What::SetMemory(self.memory.map()))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        unsupported("device state transfer was not offered")
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported("device state transfer was not offered")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported("shared memory regions were not offered")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported("dirty page logging was not offered")
    }
}

/// The protocol features offered. `REPLY_ACK` is the crate's own work. `STATUS` tells a device with a log nothing that it
/// needs, so only the others offer it.
pub(crate) fn protocol_features(keeps_log: bool) -> VhostUserProtocolFeatures {
    let log =
        if keeps_log { VhostUserProtocolFeatures::INFLIGHT_SHMFD } else { VhostUserProtocolFeatures::STATUS };
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::BACKEND_REQ
        | log
}
