//! The vhost-user side: connects, negotiates, hands memory and rings over, and stops them in the end.

use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::args::BlkArgs;
use super::disk::Queue;
use super::shared::Shared;

/// The part of `struct virtio_blk_config` that every backend has: up to and with `num_queues`.
const CONFIG_BYTES: usize = 36;

/// What the backend said about its device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Device {
    /// Size in bytes.
    pub(super) len_bytes: u64,
    /// Logical block size in bytes.
    pub(super) block_bytes: u32,
    /// Largest segment in bytes; none where there is no limit.
    pub(super) size_max: Option<u32>,
    /// Features in use.
    pub(super) features: u64,
}

impl Device {
    /// Whether a feature is in use.
    pub(super) fn has(&self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }
}

/// A connection to a backend.
pub(super) struct Front {
    frontend: Frontend,
    socket: UnixStream,
    timeout: Duration,
    /// What the backend is.
    pub(super) device: Device,
}

impl Front {
    /// Connects and negotiates what `args` allow.
    pub(super) fn connect(args: &BlkArgs) -> Result<Self> {
        let path = args.socket.display();
        let socket = UnixStream::connect(&args.socket)
            .with_context(|| format!("cannot connect to {path}; does a backend listen there?"))?;
        let own = socket.try_clone().context("cannot duplicate the socket")?;
        let frontend = Frontend::from_stream(own, u64::from(args.queues));
        let device = Device { len_bytes: 0, block_bytes: 512, size_max: None, features: 0 };
        let timeout = Duration::from_secs_f64(args.timeout);
        let mut this = Self { frontend, socket, timeout, device };
        this.negotiate(args)?;
        Ok(this)
    }

    fn negotiate(&mut self, args: &BlkArgs) -> Result<()> {
        let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.ask("SET_OWNER", |f| f.set_owner())?;
        let offered = self.ask("GET_FEATURES", |f| f.get_features())?;
        if offered & protocol_bit == 0 || offered >> VIRTIO_F_VERSION_1 & 1 == 0 {
            bail!("the backend offers features {offered:#x}, without VERSION_1 or protocol features");
        }
        let known = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK;
        let protocol = self.ask("GET_PROTOCOL_FEATURES", VhostUserFrontend::get_protocol_features)? & known;
        if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            bail!("the backend has no configuration space to ask for its capacity; is it a block device?");
        }
        self.ask("SET_PROTOCOL_FEATURES", |f| f.set_protocol_features(protocol))?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let queues = match protocol.contains(VhostUserProtocolFeatures::MQ) {
            true => self.ask("GET_QUEUE_NUM", VhostUserFrontend::get_queue_num)?,
            false => 1,
        };
        if u64::from(args.queues) > queues {
            bail!("the backend has {queues} queues, not --queues {}", args.queues);
        }
        let mut wanted = protocol_bit | 1 << VIRTIO_F_VERSION_1;
        for bit in [VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX] {
            wanted |= 1 << bit;
        }
        for (bit, want) in [
            (VIRTIO_BLK_F_SIZE_MAX, true),
            (VIRTIO_BLK_F_MQ, args.queues > 1),
            (VIRTIO_RING_F_EVENT_IDX, !args.no_event_idx),
            (VIRTIO_RING_F_INDIRECT_DESC, !args.no_indirect),
        ] {
            wanted |= u64::from(want) << bit;
        }
        let features = offered & wanted;
        let config = self.config()?;
        let number = |at: usize, len: usize| {
            config[at..at + len].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b))
        };
        let has = |bit: u32| features >> bit & 1 == 1;
        self.device = Device {
            len_bytes: number(0, 8).checked_mul(512).context("the backend's capacity is not possible")?,
            block_bytes: if has(VIRTIO_BLK_F_BLK_SIZE) { number(20, 4) as u32 } else { 512 },
            size_max: has(VIRTIO_BLK_F_SIZE_MAX).then(|| number(8, 4) as u32),
            features,
        };
        if !self.device.block_bytes.is_power_of_two() || self.device.block_bytes < 512 {
            bail!("the backend's block size of {} bytes is not possible", self.device.block_bytes);
        }
        self.ask("SET_FEATURES", |f| f.set_features(features))
    }

    fn config(&mut self) -> Result<Vec<u8>> {
        let len = CONFIG_BYTES as u32;
        let flags = VhostUserConfigFlags::empty();
        let (_, config) = self.ask("GET_CONFIG", |f| f.get_config(0, len, flags, &[0; CONFIG_BYTES]))?;
        if config.len() != CONFIG_BYTES {
            bail!("the backend answered GET_CONFIG with {} bytes instead of {CONFIG_BYTES}", config.len());
        }
        Ok(config)
    }

    /// Hands over the memory and starts the queues.
    pub(super) fn start(&mut self, memory: &Shared, queues: &[Queue]) -> Result<()> {
        self.ask("SET_MEM_TABLE", |f| f.set_mem_table(&[memory.info()]))?;
        for (n, queue) in queues.iter().enumerate() {
            let ring = queue.ring();
            self.ask("SET_VRING_NUM", |f| f.set_vring_num(n, ring.size()))
                .with_context(|| format!("no ring of {} entries; try a lower --qd", ring.size()))?;
            self.ask("SET_VRING_BASE", |f| f.set_vring_base(n, 0))?;
            self.ask("SET_VRING_ADDR", |f| f.set_vring_addr(n, &ring.config()))?;
            self.ask("SET_VRING_ERR", |f| f.set_vring_err(n, &queue.error))?;
            self.ask("SET_VRING_CALL", |f| f.set_vring_call(n, &queue.call))?;
            self.ask("SET_VRING_KICK", |f| f.set_vring_kick(n, &queue.kick))?;
            self.ask("SET_VRING_ENABLE", |f| f.set_vring_enable(n, true))?;
        }
        Ok(())
    }

    /// Stops the queues; the backend has nothing in flight afterwards.
    pub(super) fn stop(&mut self, queues: usize) -> Result<()> {
        for n in 0..queues {
            self.ask("SET_VRING_ENABLE", |f| f.set_vring_enable(n, false))?;
            self.ask("GET_VRING_BASE", |f| f.get_vring_base(n))?;
        }
        Ok(())
    }

    /// Returns the socket, for watching whether the backend is still there.
    pub(super) fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Sends a message and waits for what answers it. A time limit on the socket would not do: the `vhost` crate
    /// repeats a receive that ran into one. So the socket is shut down when the time is over.
    fn ask<T>(&self, name: &'static str, f: impl FnOnce(&mut Frontend) -> vhost::Result<T>) -> Result<T> {
        let mut frontend = self.frontend.clone();
        let (done, watch) = channel::<()>();
        let (result, late) = thread::scope(|scope| {
            let guard = scope.spawn(move || {
                let late = watch.recv_timeout(self.timeout) == Err(RecvTimeoutError::Timeout);
                if late {
                    let _ = self.socket.shutdown(Shutdown::Both);
                }
                late
            });
            let result = f(&mut frontend);
            drop(done);
            (result, guard.join().unwrap_or(false))
        });
        match result {
            Ok(value) => Ok(value),
            Err(_) if late => {
                bail!("the backend did not answer {name} within {} s", self.timeout.as_secs_f32())
            }
            Err(e) => Err(anyhow!(e).context(format!("the backend refused {name} or closed the connection"))),
        }
    }
}
