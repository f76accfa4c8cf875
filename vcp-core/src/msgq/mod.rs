//! What a VCP offers to those that are no guest: programs on this host and other VCPs reach its device by `msgq`.
//!
//! * [`listen`]: a socket where programs connect; peer credentials, set-up against a deadline, on threads of its own.
//! * [`broker`]: seats that a monitor gives to two VCPs, and the connections between them.
//! * [`front`]: the clients on the data thread: each request becomes a chain for a device model, which cannot tell it from
//!   a guest's ([`Rings`](crate::device::Rings)).
//! * `client`: one client.
//!
//! The device model's own rules for requests are a [`Protocol`].

pub mod broker;
mod client;
pub mod front;
pub mod listen;
mod metrics;

pub use broker::{Broker, Role, Seat};
pub use front::{Front, Plan, Protocol};
pub use listen::{Listener, ListenerOptions};
