//! The full-feature phase of an iSCSI target (RFC 7143), for one connection per session at error recovery level 0.
//!
//! [`Session`] is told of each PDU that arrived ([`Session::receive`]) and says what it means ([`Event`]): a new
//! command, data for a command, a task management function. The caller carries commands out and reports their ends
//! ([`Session::complete`]); it takes what is to be sent one PDU at a time ([`Session::poll_transmit`]). Data is never
//! touched here: where it belongs is said as (task, offset, length).
//!
//! What the machine does by itself: the CmdSN window, StatSN and DataSN, unsolicited data and R2Ts, Data-In with the
//! status in the last one, residual counts, pings of both directions, ABORT TASK, Reject. What it leaves to others:
//! login ([`crate::login`]), framing and digests ([`crate::pdu::framing`]), text keys, the SCSI device server, and
//! which sessions there are.
//!
//! All memory is taken in [`Session::new`]: a slot for each command of the window and a few for immediate ones. A PDU
//! costs O(1); only answers with data of their own (pings with data, text) allocate, and
//! [`Session::can_receive`] bounds how many of these wait.

mod control;
mod receive;
mod session;
mod task;
mod transmit;

#[cfg(test)]
mod tests;

pub use session::{Accepted, Completion, Config, Counters, Event, Placement, Session, SessionError};
pub use task::TaskId;
pub use transmit::{Outgoing, OutgoingData};
