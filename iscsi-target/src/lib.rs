//! The embedded iSCSI target: memory and file LUNs for demos, tests and benchmarks.
//!
//! [`storage`] keeps bytes, [`lu`] is the SCSI device server over it, [`device`] a target with its logical units.
//! The protocol machines are `iscsi::target` and `iscsi::login::target`.
#![forbid(unsafe_code)]

pub mod config;
pub mod device;
pub mod lu;
pub mod server;
pub mod storage;
