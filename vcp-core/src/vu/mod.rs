//! The vhost-user server: set-up messages on a thread per connection, rings on the data thread.
//!
//! * [`port`]: the data thread's side of one device, and the commands that change it.
//! * [`RingSet`]: its rings, and the lives they go through.
//! * `handler`: the connection's side: the messages of the `vhost` crate turned into commands.
//! * [`listen`]: the socket file.
//! * `connection`: one front end and its thread; `gate` and `resume` let it change processes.
//! * [`mod@give`] and [`take_over`]: all of it goes to a new process, or comes from an old one ([`crate::handover`]).
//! * [`server`]: accepts, refuses, reconnects; puts it all together.
//!
//! `docs/decisions/vhost-user-server.md` says why this is not `vhost-user-backend`'s daemon.

pub(crate) mod channel;
mod connection;
mod gate;
pub mod give;
mod handler;
pub mod listen;
pub mod port;
mod resume;
mod rings;
pub mod server;
mod status;
mod take;
mod vring;

pub use rings::RingSet;
pub use server::{DeviceSpec, End, ServeError, ServeOptions, serve, serve_joined};
pub use take::{take_over, take_over_joined};
pub(crate) use vring::STOP_TIMEOUT;
