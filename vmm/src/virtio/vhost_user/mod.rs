//! Front ends of vhost-user devices: the transport's view of a device whose queues another process serves. The monitor
//! sets up and stops the queues and answers configuration accesses; no request passes through it.
//!
//! [`link`] is a connection, [`session`] what was agreed on it, [`front`] what the device keeps over several of them.

pub mod blk;
pub mod channel;
pub mod front;
pub mod inflight;
pub mod link;
pub mod net;
pub mod session;

use std::ops::Range;
use std::sync::Arc;

use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};

use self::channel::Channel;
use self::front::Front;
use self::link::Link;
use self::session::Session;
use super::{Activation, VirtioDevice};
use crate::error::Result;

/// The vhost-user bit among the virtio feature bits: the backend has protocol features.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What sets one kind of device apart from another.
#[derive(Clone, Debug)]
pub struct Kind {
    /// Virtio device type.
    pub device_type: u32,
    /// Features that may be offered if the backend has them.
    pub features: u64,
    /// Features that the backend must have besides `VERSION_1`.
    pub needed_features: u64,
    /// Features that the monitor provides itself: offered always, and never told to a backend that does not know them.
    pub own_features: u64,
    /// Largest size of each queue.
    pub queue_max_sizes: Vec<u16>,
    /// Protocol features without which the device cannot work.
    pub needed: VhostUserProtocolFeatures,
    /// Requests must not be lost or repeated when a backend dies: without an in-flight log it cannot be replaced while
    /// it works.
    pub needs_log: bool,
    /// Length of the configuration space that is read from the backend, bytes.
    pub config_len: usize,
    /// Whether what lies in the queue of this index waits for the backend. In a queue for receiving there are always
    /// buffers, which wait for the world.
    pub holds_requests: fn(u16) -> bool,
    /// What the driver may write in it; empty where nothing.
    pub writable: Range<usize>,
    /// Bytes of the configuration space that the monitor decides: offset and content.
    pub own_config: Vec<(usize, Vec<u8>)>,
    /// Fields that no other backend may have otherwise while the guest runs: name and place.
    pub fixed: &'static [(&'static str, Range<usize>)],
    /// Limits (32 bits, little-endian) that no other backend may have lower: name and offset.
    pub limits: &'static [(&'static str, usize)],
}

impl Kind {
    /// Puts the monitor's own bytes into a backend's configuration space.
    pub fn adapt_config(&self, config: &mut Vec<u8>) {
        for (offset, bytes) in &self.own_config {
            let end = offset + bytes.len();
            if config.len() < end {
                config.resize(end, 0);
            }
            config[*offset..end].copy_from_slice(bytes);
        }
    }

    /// Whether a driver that knows the configuration `old` can go on with `new`; if not, what is in the way.
    pub fn compare_config(&self, old: &[u8], new: &[u8]) -> std::result::Result<(), String> {
        if old.len() != new.len() {
            return Err(format!("has {} bytes of configuration, the guest knows {}", new.len(), old.len()));
        }
        let number = |config: &[u8], at: &Range<usize>| {
            let bytes = config.get(at.clone()).unwrap_or_default();
            bytes.iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
        };
        for (name, at) in self.fixed {
            let (old, new) = (number(old, at), number(new, at));
            if old != new {
                return Err(format!("has {name} {new}, the guest knows {old}"));
            }
        }
        for (name, at) in self.limits {
            let at = *at..*at + 4;
            let (old, new) = (number(old, &at), number(new, &at));
            if new < old {
                return Err(format!("has {name} {new}, less than the {old} that the guest knows"));
            }
        }
        Ok(())
    }
}

/// A device whose backend is another process.
#[derive(Debug)]
pub struct VhostUserDevice {
    front: Arc<Front>,
    channel: Option<Channel>,
}

impl VhostUserDevice {
    /// Shakes hands with the backend behind `link`. `recovers`: somebody will give the device another backend when this
    /// one is lost.
    pub fn new(name: &str, kind: Kind, link: Link, recovers: bool) -> Result<Self> {
        let (session, channel) = Session::start(name, &kind, link)?;
        Ok(Self { front: Arc::new(Front::new(name, kind, session, recovers)), channel })
    }

    /// What the device's keeper needs: the shared part, and the first backend's channel.
    pub fn keep(&mut self) -> (Arc<Front>, Option<Channel>) {
        (self.front.clone(), self.channel.take())
    }
}

impl VirtioDevice for VhostUserDevice {
    fn name(&self) -> &str {
        self.front.name()
    }
    fn device_type(&self) -> u32 {
        self.front.kind().device_type
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &self.front.kind().queue_max_sizes
    }
    fn features(&self) -> u64 {
        self.front.offered()
    }
    fn called_by_fd(&self) -> bool {
        true
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.front.read_config(offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.front.write_config(offset, data);
    }
    fn config_generation(&self) -> u32 {
        self.front.config_generation()
    }
    fn activate(&mut self, activation: Activation) -> Result<()> {
        self.front.activate(activation)
    }
    fn reset(&mut self) -> Result<()> {
        self.front.reset()
    }
    fn stop_queue(&mut self, index: u16) -> Result<()> {
        self.front.stop_queue(index)
    }
    fn shut_down(&mut self) -> Result<()> {
        self.front.shut_down()
    }
    fn quiesce(&mut self) -> Result<()> {
        self.front.quiesce()
    }
    fn go_on(&mut self) -> Result<()> {
        self.front.go_on()
    }
    fn save(&self) -> Vec<u8> {
        self.front.save()
    }
    fn restore(&mut self, saved: &[u8], activation: Activation) -> Result<()> {
        self.front.restore(saved, activation)
    }
}

#[cfg(test)]
pub(crate) mod tests;
