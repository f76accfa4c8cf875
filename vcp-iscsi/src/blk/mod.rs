//! The virtio-blk device model (VIRTIO 1.2, 5.2) above an [`Engine`](crate::engine::Engine).
//!
//! * [`config`]: features and the configuration space, all of it derived from the logical unit.
//! * [`request`]: the framing of one request, checked.
//! * [`device`]: slots, splitting, completion, back-pressure.

mod backlog;
pub mod config;
pub mod device;
mod numbers;
pub mod request;
mod slot;

pub use device::BlkDevice;

/// A virtio-blk sector, whatever the logical block size (5.2.4): all positions on the wire are in these.
pub const SECTOR_BYTES: u64 = 512;
