//! Test beds: the real peers that the end-to-end tests of VCP run against, each started on free loopback ports and
//! ended with its test.
//!
//! - [`proc`]: child processes with captured output, deadlines and a sure end.
//! - [`target`]: iSCSI targets: tgtd, istgt and our own.
//! - [`bad_target`]: a target that misbehaves by a script, as a process.
//! - [`backend`]: vhost-user-blk backends: `vcp-iscsi serve` and, for comparison, qemu-storage-daemon.
//! - [`front`]: the third-party `virtio-driver` front end, without a virtual machine.
//! - [`guest`]: stock QEMU with a stock Debian kernel on a vhost-user socket.
//! - [`proxy`]: a TCP proxy that cuts, refuses and records connections; [`pcap`] shows a recording to tshark.
//! - [`load`] and [`pattern`]: verified data.
//! - [`switch`]: `vcp-net`; [`testpmd`]: DPDK's virtio_user front ends and its vhost back end.
//!
//! The tests themselves are in `tests/e2e`. Nothing here builds the programs under test; see [`tool`].

pub mod backend;
pub mod bad_target;
pub mod front;
pub mod guest;
pub mod load;
pub mod native;
pub mod pattern;
pub mod pcap;
pub mod port;
pub mod proc;
pub mod procfs;
pub mod proxy;
pub mod screen;
pub mod survivor;
pub mod switch;
pub mod target;
pub mod testpmd;
pub mod tool;

/// Result of this crate; the chain says which peer failed at what, with the end of its output.
pub type Result<T> = anyhow::Result<T>;
