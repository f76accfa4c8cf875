//! The iSCSI initiator as a virtual channel processor: each LUN is one vhost-user-blk device.
//!
//! `blk` is the device model (virtio semantics), `portal` the engine (iSCSI sessions on real sockets); they meet at
//! [`engine`] and know nothing else of each other. `serve` joins them to the poll loop of `vcp-core`.
#![forbid(unsafe_code)]

pub mod blk;
pub mod capabilities;
pub mod cli;
mod confine;
pub mod dial;
pub mod discover;
pub mod engine;
pub mod handover;
pub mod info;
pub mod limit;
pub mod msgq;
pub mod paths;
pub mod portal;
pub mod recorder;
pub mod serve;
pub mod url;
