//! The initiator's side of a session in full feature phase (RFC 7143 4.2, chapter 7), one connection, error recovery
//! level 0.
//!
//! [`Session`] is a state machine without I/O, clock or allocation per command:
//!
//! - The caller names tasks by *slot*, a small index of its own choice; the initiator task tag on the wire is slot and
//!   generation, so that every PDU finds its task in constant time and a late one cannot find the wrong task.
//! - [`Session::submit`] queues a command; [`Session::next_pdu`] gives what goes out, PDU after PDU, with its data named
//!   as (slot, offset, length).
//! - [`Session::header`] takes each header that arrived and says where its data segment belongs; nothing is placed
//!   before it was checked against the command. [`Session::end`] takes the end of the PDU; [`Session::next_event`]
//!   gives what came of it.
//! - [`Session::timers`] and [`Session::deadline`] run on the caller's clock: keepalive, command time limits, the
//!   ladder ABORT TASK, LOGICAL UNIT RESET, new session.
//!
//! A command counts as done only if every byte of it is accounted for: Data-In numbers and offsets without gap or
//! overlap, residual, and all output data fetched. Anything else is an [`Outcome::Damaged`], never a success.
//!
//! [`Session::export`] and [`Session::import`] carry a session with nothing under way from one process to another.
//!
//! At level 0 a lost connection ends the session. [`Session::unanswered`] then lists, in CmdSN order, the commands to
//! repeat - on a session that reinstates this one (6.3.5), which is the caller's to ensure. Login is
//! [`crate::login::initiator`]'s, sockets and repetition are the program's.

mod config;
mod error;
mod export;
mod flow;
mod receive;
mod session;
mod task;
mod timers;
mod transmit;
mod watch;

pub use config::Config;
pub use error::{Counters, SessionError, Violation};
pub use export::{ImportError, SessionState, Underway};
pub use flow::FlowStats;
pub use receive::Place;
pub use session::{Event, Session};
pub use task::{Command, Direction, Outcome};
pub use transmit::{DataRef, TxPdu};

#[cfg(test)]
mod tests;
