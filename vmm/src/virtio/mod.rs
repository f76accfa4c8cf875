//! Virtio devices and the seam between them and their transport. A device knows queues, features and its configuration;
//! a transport (virtio-mmio, virtio-pci) knows registers and interrupts. Neither knows the other's kind.

pub mod balloon;
pub mod mmio;
pub mod pci;
pub mod rng;
mod state;
#[cfg(test)]
pub(crate) use state::event as state_event;
pub mod vhost_user;

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};
use crate::kvm::GuestMemory;

/// `VIRTIO_F_VERSION_1`: every device here is a modern one.
pub const F_VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
/// `VIRTIO_F_RING_INDIRECT_DESC`.
pub const F_RING_INDIRECT_DESC: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
/// `VIRTIO_F_RING_EVENT_IDX`.
pub const F_RING_EVENT_IDX: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
/// `VIRTIO_F_RING_PACKED`.
pub const F_RING_PACKED: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

/// Counts what a driver does wrong and tells whether to log it: the first few times. A guest can repeat each of its
/// mistakes a million times a second, and must not fill the host's log.
#[derive(Debug, Default)]
pub struct Complaints(u32);

impl Complaints {
    const LOGGED: u32 = 8;

    /// One more; true if it is to be logged.
    pub fn add(&mut self) -> bool {
        self.0 = self.0.saturating_add(1);
        self.0 <= Self::LOGGED
    }
}

/// A queue as the driver has set it up; the transport has checked size and alignment, not that the addresses lie in
/// guest memory.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Number of the queue.
    pub index: u16,
    /// Number of descriptors, at most the device's maximum; a power of two unless the rings are packed.
    pub size: u16,
    /// Guest address of the descriptor table, or of the packed ring.
    pub desc_table: u64,
    /// Guest address of the driver area (available ring; with packed rings the driver's event suppression).
    pub avail_ring: u64,
    /// Guest address of the device area (used ring; with packed rings the device's event suppression).
    pub used_ring: u64,
    /// Signalled when the driver notifies the queue.
    pub kick: Arc<EventFd>,
}

/// A split queue that the monitor serves itself, checked to lie in memory.
fn own_queue(
    device: &str,
    setup: &ActiveQueue,
    max_size: u16,
    memory: &GuestMemory,
) -> Result<virtio_queue::Queue> {
    use virtio_queue::{Queue, QueueT};
    use vm_memory::GuestAddress;
    let wrong = |reason: &str| Error::Driver { device: device.into(), reason: reason.into() };
    let mut queue = Queue::new(max_size).map_err(|_| wrong("has no queue"))?;
    queue.try_set_size(setup.size).map_err(|_| wrong("set an impossible queue size"))?;
    let addresses = queue
        .try_set_desc_table_address(GuestAddress(setup.desc_table))
        .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(setup.avail_ring)))
        .and_then(|()| queue.try_set_used_ring_address(GuestAddress(setup.used_ring)));
    addresses.map_err(|_| wrong("set unaligned queue addresses"))?;
    queue.set_ready(true);
    if !queue.is_valid(memory) {
        return Err(wrong("set up a queue outside of memory"));
    }
    Ok(queue)
}

/// How a device interrupts the driver. Implemented by the transport.
pub trait Interrupt: Send + Sync {
    /// The device has used buffers of this queue.
    fn queue(&self, index: u16);
    /// The device's configuration has changed.
    fn config(&self);
    /// The eventfd that a process outside the monitor signals instead of calling [`Interrupt::queue`].
    fn call_fd(&self, index: u16) -> Option<&EventFd>;
}

/// All that a device needs to start.
pub struct Activation {
    /// Features that the driver has accepted, a subset of what the device offered.
    pub features: u64,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// The queues that the driver has enabled, by increasing number.
    pub queues: Vec<ActiveQueue>,
    /// The way back.
    pub interrupt: Arc<dyn Interrupt>,
}

/// A transport as the machine sees it: a device on a bus.
pub trait Transport: Send + Sync {
    /// The notification descriptor of a queue, for devices inside the monitor.
    fn kick(&self, index: usize) -> Option<&Arc<EventFd>>;
    /// Whether the driver has started the device.
    fn is_active(&self) -> bool;
    /// Stops the device for good, at the end of the run or when it is taken away.
    fn shut_down(&self);
    /// Has the queues rest, with nothing in flight, until [`Transport::go_on`]. The guest does not run.
    fn quiesce(&self) -> Result<()>;
    /// Has the queues go on.
    fn go_on(&self) -> Result<()>;
    /// What the driver has set. The queues rest.
    fn save(&self) -> SavedTransport;
    /// Brings back what [`Transport::save`] kept, and has the device go on.
    fn restore(&self, saved: &SavedTransport) -> Result<()>;
}

/// A transport in a snapshot.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SavedTransport {
    /// virtio-pci.
    Pci(Box<pci::SavedPci>),
    /// virtio-mmio.
    Mmio(Box<mmio::SavedMmio>),
}

/// A virtio device without its transport. Calls come under the transport's lock, one at a time.
pub trait VirtioDevice: Send {
    /// What messages call it, e.g. `disk0`.
    fn name(&self) -> &str;
    /// Device type (virtio 1.2, chapter 5).
    fn device_type(&self) -> u32;
    /// Largest size of each queue; the number of entries is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];
    /// Features offered.
    fn features(&self) -> u64;
    /// Reads configuration space; bytes beyond its end are left as they are (zero).
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space; what is not writable is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// How often the configuration space has changed, other than by the driver; counted before the new bytes can be read.
    fn config_generation(&self) -> u32 {
        0
    }
    /// True if another process signals [`Interrupt::call_fd`], so that the transport cannot know when.
    fn called_by_fd(&self) -> bool;
    /// Starts the device: the driver has set `DRIVER_OK`. After an error the device is as after [`VirtioDevice::reset`].
    fn activate(&mut self, activation: Activation) -> Result<()>;
    /// Stops the device and forgets all that the driver told it. When this returns, nobody touches the queues any more.
    fn reset(&mut self) -> Result<()>;
    /// Stops one queue until the next [`VirtioDevice::reset`]. When this returns, nobody touches it any more.
    fn stop_queue(&mut self, index: u16) -> Result<()>;
    /// Has the running device's queues rest, with nothing in flight, until [`VirtioDevice::go_on`].
    fn quiesce(&mut self) -> Result<()>;
    /// Has them go on.
    fn go_on(&mut self) -> Result<()>;
    /// What a snapshot keeps besides what the driver has told the transport. The queues rest.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }
    /// Starts the device as [`VirtioDevice::activate`] does, but where its rings stand: they were used before.
    fn restore(&mut self, saved: &[u8], activation: Activation) -> Result<()> {
        let _ = saved;
        self.activate(activation)
    }
    /// Stops the device because the run is over and no driver waits: as [`VirtioDevice::reset`], but without patience.
    fn shut_down(&mut self) -> Result<()> {
        self.reset()
    }
}
