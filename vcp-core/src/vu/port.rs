//! [`Port`]: one device on the data thread, and the commands by which the set-up thread changes it.

mod export;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use super::RingSet;
use super::channel::notify_config_change;
use super::give::StopOrder;
use super::rings::Dialect;
use super::vring::STOP_TIMEOUT;
use crate::ask::{Ask, Told, tell};
use crate::device::RingDevice;
use crate::mem::GuestMap;
use crate::queue::RingError;
use crate::queue::log::{LogArea, LogError};

/// `VIRTIO_RING_F_INDIRECT_DESC` and `VIRTIO_RING_F_EVENT_IDX`.
pub(crate) const F_INDIRECT: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_IN_ORDER`; only devices whose queues are run in bursts offer it.
const F_IN_ORDER: u64 = 1 << 35;
/// `VIRTIO_F_RING_PACKED`: offered for every device by this server, and taken from the driver's bits before the device
/// sees them.
pub(crate) const F_RING_PACKED: u64 = 1 << 34;
/// `VHOST_USER_F_PROTOCOL_FEATURES`, taken from the driver's bits before the device sees them.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// A set-up message that cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// Queue index out of range.
    #[error("queue {queue} of a device with {queues}")]
    NoSuchQueue {
        /// The index.
        queue: u32,
        /// Queues of the device.
        queues: usize,
    },
    /// Queue size zero, no power of two, or too large.
    #[error("queue {queue}: size {size} is not a power of two up to {max}")]
    Size {
        /// The queue.
        queue: u32,
        /// The size asked for.
        size: u32,
        /// Largest size.
        max: u16,
    },
    /// Ring addresses not aligned as VIRTIO 1.2, 2.7 asks.
    #[error("queue {queue}: misaligned ring: descriptors {desc:#x}, available {avail:#x}, used {used:#x}")]
    Alignment {
        /// The queue.
        queue: u32,
        /// Descriptor table.
        desc: u64,
        /// Available ring.
        avail: u64,
        /// Used ring.
        used: u64,
    },
    /// A base that is no 16-bit index.
    #[error("queue {queue}: base {base:#x} is not a split ring index")]
    Base {
        /// The queue.
        queue: u32,
        /// The base.
        base: u32,
    },
    /// Size, base or addresses changed while the ring runs.
    #[error("queue {queue} is running")]
    Running {
        /// The queue.
        queue: u32,
    },
    /// The ring cannot start where it was told to.
    #[error("queue {queue} cannot start")]
    Ring {
        /// The queue.
        queue: u32,
        /// Why.
        #[source]
        source: RingError,
    },
    /// A kick, call or error descriptor that the system does not let us use.
    #[error("queue {queue}: descriptor cannot be used: {error}")]
    Descriptor {
        /// The queue.
        queue: u32,
        /// Why.
        error: rustix::io::Errno,
    },
    /// A kick, call or error descriptor of another kind.
    #[error("queue {queue}: descriptor is not an eventfd")]
    NotAnEventfd {
        /// The queue.
        queue: u32,
    },
    /// Feature bits that were not offered.
    #[error("features {0:#x} were not offered")]
    Features(u64),
    /// A ring address that the memory table does not have.
    #[error("front-end address {0:#x} is not in the memory table")]
    Address(u64),
    /// The in-flight log cannot be used.
    #[error("in-flight log")]
    Log(#[from] LogError),
    /// The data thread ended or hangs.
    #[error("the data thread does not answer")]
    NoAnswer,
}

/// What a command gives back.
#[derive(Debug)]
pub enum Answer {
    /// Nothing.
    Done,
    /// `GET_VRING_BASE`.
    Base(u32),
    /// `GET_CONFIG`.
    Config(Vec<u8>),
    /// What the device was asked.
    Told(Told),
}

/// The reply to a command.
pub type Reply = Result<Answer, PortError>;

/// What to change; the names are those of the vhost-user messages.
#[derive(Debug)]
#[allow(missing_docs)] // One per vhost-user message, and `Ask` for the control socket.
pub enum What {
    Attach,
    Detach,
    Reset,
    SetFeatures(u64),
    SetMemory(Arc<GuestMap>),
    SetVringNum {
        queue: u32,
        size: u32,
    },
    SetVringAddr {
        queue: u32,
        desc: u64,
        avail: u64,
        used: u64,
    },
    SetVringBase {
        queue: u32,
        base: u32,
    },
    GetVringBase {
        queue: u32,
    },
    SetVringKick {
        queue: u32,
        fd: Option<File>,
    },
    SetVringCall {
        queue: u32,
        fd: Option<File>,
    },
    SetVringErr {
        queue: u32,
        fd: Option<File>,
    },
    SetVringEnable {
        queue: u32,
        enable: bool,
    },
    GetConfig {
        offset: u32,
        len_bytes: u32,
    },
    SetConfig {
        offset: u32,
        data: Vec<u8>,
    },
    SetChannel(UnixStream),
    /// For the data thread as a whole, not for the device.
    Stop(Box<StopOrder>),
    SetInflight(Arc<LogArea>),
    Ask(Ask),
}

/// A message for the data thread.
#[derive(Debug)]
pub struct Command {
    /// Index of the device.
    pub device: usize,
    /// What to do.
    pub what: What,
    /// Where the answer goes; has room for one.
    pub reply: SyncSender<Reply>,
}

/// See the module.
#[derive(Debug)]
pub struct Port<D> {
    pub(crate) device: D,
    pub(crate) rings: RingSet,
    /// Features as the front end acknowledged them.
    acked: u64,
    /// The back-end channel, for configuration changes.
    channel: Option<UnixStream>,
    /// The configuration changed and the front end does not know yet.
    changed: bool,
    /// A stop left requests in flight behind. Once the driver waits for none at all, the device may abandon them.
    left_behind: bool,
    /// A reset that is answered when nothing is in flight any more, or then.
    resetting: Option<(SyncSender<Reply>, Instant)>,
    /// Something moved since the rings were published.
    moved: bool,
}

impl<D: RingDevice> Port<D> {
    /// A device without a front end.
    pub fn new(name: Arc<str>, device: D) -> Self {
        let metrics = Arc::clone(device.metrics());
        let mut rings = RingSet::new(name, device.queues(), device.queue_size_max(), metrics);
        rings.set_bursts((0..device.queues()).map(|queue| device.burst(queue)));
        Self {
            device,
            rings,
            acked: 0,
            channel: None,
            changed: false,
            left_behind: false,
            resetting: None,
            moved: false,
        }
    }

    /// As a front end would set it up: features, memory, and rings by their queues, which run at once. For tests and tools
    /// without a front end.
    ///
    /// # Errors
    /// As a front end would be told.
    pub fn start_for_test(
        &mut self,
        features: u64,
        map: Arc<GuestMap>,
        rings: &[(u32, crate::queue::RingAddresses, u32)],
    ) -> Result<(), PortError> {
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)
            .map_err(|error| PortError::Descriptor { queue: 0, error })?;
        let now = Instant::now();
        self.carry_out(&epoll, What::Attach, now)?;
        self.carry_out(&epoll, What::SetFeatures(features | F_PROTOCOL_FEATURES), now)?;
        self.carry_out(&epoll, What::SetMemory(map), now)?;
        for &(queue, at, base) in rings {
            self.carry_out(&epoll, What::SetVringNum { queue, size: at.size.into() }, now)?;
            let (desc, avail, used) = (at.desc, at.avail, at.used);
            self.carry_out(&epoll, What::SetVringAddr { queue, desc, avail, used }, now)?;
            self.carry_out(&epoll, What::SetVringBase { queue, base }, now)?;
            self.carry_out(&epoll, What::SetVringKick { queue, fd: None }, now)?;
            self.carry_out(&epoll, What::SetVringEnable { queue, enable: true }, now)?;
        }
        Ok(())
    }

    /// The end of a pass of a test: what was given to the rings is published.
    pub fn settle_for_test(&mut self) {
        self.rings.publish_all();
    }

    /// Lets the device move; returns whether anything did. See [`Fabric::poll`](crate::fabric::Fabric::poll).
    pub fn poll(&mut self, now: Instant) -> bool {
        let moved = self.device.poll(&mut self.rings, now);
        self.moved |= moved;
        moved
    }

    /// The device and its rings. Whoever gives something to the rings [touches](Self::touch) the port.
    #[inline]
    pub fn parts(&mut self) -> (&mut D, &mut RingSet) {
        (&mut self.device, &mut self.rings)
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The rings were given something, which is published at the end of the pass.
    #[inline]
    pub fn touch(&mut self) {
        self.moved = true;
    }

    /// The rest of a pass: used rings, notifications, stops.
    pub(crate) fn settle(&mut self, epoll: &OwnedFd, now: Instant) {
        if std::mem::take(&mut self.moved) {
            self.rings.publish_all();
        }
        if self.rings.deadline().is_some() {
            self.left_behind |= self.rings.finish_stops(epoll, now);
        }
        if self.left_behind && !self.rings.any_wanted() {
            self.left_behind = false;
            self.device.abandon();
        }
        if self.resetting.as_ref().is_some_and(|(_, deadline)| self.rings.inflight() == 0 || now >= *deadline)
            && let Some((reply, _)) = self.resetting.take()
        {
            let _ = reply.try_send(Ok(Answer::Done));
        }
        self.changed |= self.device.take_config_change();
        if self.changed
            && let Some(channel) = &self.channel
        {
            self.changed = false;
            if let Err(error) = notify_config_change(channel) {
                tracing::warn!(%error, "cannot tell the front end of a configuration change");
                self.channel = None;
            }
        }
    }

    /// When [`pass`](Self::pass) has to be called again at the latest, besides what the device waits for.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let reset = self.resetting.as_ref().map(|(_, deadline)| *deadline);
        self.rings.deadline().into_iter().chain(reset).min()
    }

    /// Carries out a command and answers it (a stop and a reset answer later).
    pub(crate) fn command(&mut self, epoll: &OwnedFd, what: What, reply: SyncSender<Reply>, now: Instant) {
        let answer = match what {
            What::GetVringBase { queue } => return self.rings.stop(queue, reply, now),
            What::Reset => {
                // After a reset the guest uses the memory for something else.
                self.rings.forget_log();
                self.reset(epoll);
                self.resetting = Some((reply, now + STOP_TIMEOUT));
                return;
            }
            what => self.carry_out(epoll, what, now),
        };
        // The asker may have given up; then nobody wants the answer.
        let _ = reply.try_send(answer);
    }

    fn carry_out(&mut self, epoll: &OwnedFd, what: What, now: Instant) -> Reply {
        match what {
            // A new front end reads the configuration as it is.
            What::Attach => {
                self.changed = false;
                self.device.attached(true);
            }
            What::Detach => {
                self.reset(epoll);
                self.device.attached(false);
                self.channel = None;
                self.rings.set_map(Arc::default());
            }
            What::SetFeatures(acked) => {
                let device_bits = acked & !(F_PROTOCOL_FEATURES | F_RING_PACKED);
                if device_bits & !self.device.features() != 0 {
                    return Err(PortError::Features(device_bits & !self.device.features()));
                }
                self.device.set_features(device_bits);
                self.acked = acked;
                let enable_all = acked & F_PROTOCOL_FEATURES == 0;
                let has = |feature| acked & feature != 0;
                let dialect = Dialect {
                    packed: has(F_RING_PACKED),
                    event_idx: has(F_EVENT_IDX),
                    indirect: has(F_INDIRECT),
                    in_order: has(F_IN_ORDER),
                };
                self.rings.set_features(dialect, enable_all);
            }
            What::SetMemory(map) => self.rings.set_map(map),
            What::SetVringNum { queue, size } => self.rings.set_size(queue, size)?,
            What::SetVringAddr { queue, desc, avail, used } => {
                self.rings.set_addresses(queue, desc, avail, used)?;
            }
            What::SetVringBase { queue, base } => self.rings.set_base(queue, base)?,
            What::Reset | What::GetVringBase { .. } | What::Stop(_) => unreachable!("answered elsewhere"),
            What::SetVringKick { queue, fd } => self.rings.set_kick(epoll, queue, fd)?,
            What::SetVringCall { queue, fd } => self.rings.set_call(queue, fd)?,
            What::SetVringErr { queue, fd } => self.rings.set_err(queue, fd)?,
            What::SetVringEnable { queue, enable } => self.rings.set_enabled(queue, enable)?,
            What::GetConfig { offset, len_bytes } => {
                // The message bounds the length to its own maximum size.
                let mut bytes = vec![0; len_bytes as usize];
                self.device.read_config(offset, &mut bytes);
                return Ok(Answer::Config(bytes));
            }
            What::SetConfig { offset, data } => self.device.write_config(offset, &data),
            What::SetInflight(log) => self.rings.set_log(log)?,
            What::SetChannel(stream) => self.channel = Some(stream),
            What::Ask(ask) => return Ok(Answer::Told(tell(&mut self.device, ask, now))),
        }
        Ok(Answer::Done)
    }

    fn reset(&mut self, epoll: &OwnedFd) {
        self.rings.reset(epoll);
        self.left_behind = false;
        if self.rings.inflight() != 0 {
            // Its answers go nowhere. A front end that reconnects repeats it.
            self.device.abandon();
        }
        self.device.set_features(0);
        self.acked = 0;
    }
}
