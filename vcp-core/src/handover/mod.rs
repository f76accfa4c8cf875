//! Hand-over: a new process takes the place of a running one, between two requests.
//!
//! ```text
//!   old process                                   new process
//!      |                                               |  connects to the control socket
//!      |<------------------------------------- Hello --|  which format it speaks
//!      |-- Offer ------------------------------------->|  what can be built before anything stops
//!      |<---------------------------------- Prepared --|
//!      | stops taking chains, waits until nothing is in flight
//!      |-- State, descriptors ------------------------>|  everything else
//!      |                                               |  builds it, touches nothing
//!      |<------------------------------------- Owned --|  *here* the owner changes
//!      | forgets everything                            |  takes chains
//! ```
//!
//! There is never more than one owner. The new process acts only after its `Owned` was *sent*, and the old one forgets
//! only after it was *received*; the kernel puts a message into the queue of a local socket or refuses it, nothing in
//! between. An old process that no longer wants to wait shuts its receiving side down first and looks into the queue
//! then: either `Owned` is there, or it can never be sent any more ([`Channel::close_door`]). Up to that moment everything that
//! fails, and either process's death, leaves the old process (or what restarts it) as if nothing had happened;
//! nothing is in flight then, and the in-flight log says so.
//!
//! - [`Channel`]: messages with descriptors over a local stream socket.
//! - [`Message`]: the messages.
//! - [`Fds`]: the descriptors of a message, by index.
//! - [`state`]: what a data thread, its devices and their front ends consist of.
//! - [`giver`] and [`taker`]: the two sides of the picture above.
//! - [`anchor`]: what is left of the old process where its number must stay.
//!
//! `docs/decisions/hand-over.md` says why it is done this way.

pub mod anchor;
mod channel;
mod fds;
pub mod giver;
mod message;
pub mod state;
pub mod taker;
pub mod upgrade;

pub use channel::{Channel, ChannelError};
pub use fds::{FdError, FdIndex, Fds};
pub use message::{FORMAT, Message};

/// Nanoseconds on the clock that all processes share (`CLOCK_MONOTONIC`); an [`Instant`](std::time::Instant) cannot be
/// handed over.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
