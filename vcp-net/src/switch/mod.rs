//! The switch: a line of operations over bursts of frames, from where they come to where they go.
//!
//! ```text
//! transmit queue ─┐                                                                     ┌─ receive queue
//!                 ├─► parse ─► police ─► learn ─► snoop ─► look up ─► (rewrite ─) enqueue ┤
//! uplink ─────────┘                                                                     └─ uplink
//! ```
//!
//! One file per operation, each with its own state, counters and benchmark (`vcp-net/benches`); [`mod@line`] is what decides, in
//! their order, [`back`] what carries out. The first half ([`front`]) can be placed on a hardware thread of its own
//! (`second`); otherwise everything runs to completion on the data thread. An operation looks at a whole
//! burst ([`work::Work`]) before the next one does, and decides about frames by their [`work::Fate`]; nothing is copied
//! before `enqueue`, which copies once, from the sender's memory to the receiver's. What a receiver does not take
//! unfinished is finished there, for it alone ([`crate::frame::gso`]).
//!
//! [`fabric`] gives every port its turn (deficit round robin, [`drr`]) and is what the data thread of `vcp-core` calls.
//! [`account`] counts: what came in equals what went out and what was dropped, by port, queue, operation and reason.

pub mod account;
pub mod back;
mod command;
pub mod cost;
pub mod drr;
pub mod enqueue;
pub mod fabric;
pub mod front;
mod inlet;
pub mod learn;
pub mod line;
pub mod lookup;
pub mod parse;
pub mod police;
pub mod rewrite;
mod second;
pub mod snoop;
pub mod steer;
pub mod table;
#[cfg(test)]
mod tests;
mod watch;
pub mod work;

pub use fabric::SwitchFabric;

use std::time::Duration;

/// How long a port that waits for its driver may hold up those that send to it, without taking anything.
pub const PATIENCE: Duration = Duration::from_millis(20);

/// Ports of a process at most.
pub const PORTS_MAX: usize = 120;
