//! iSCSI (RFC 7143) and the SCSI it carries, as pure state machines: no sockets, no clock, no allocation per command.
#![forbid(unsafe_code)]

pub mod chap;
pub mod digest;
pub mod discovery;
pub mod initiator;
pub mod login;
pub mod params;
pub mod pdu;
pub mod scsi;
pub mod serial;
pub mod target;
pub mod text;
