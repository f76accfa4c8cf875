//! The API of a running machine: HTTP and JSON on a Unix socket that only its owner may use, and the page of metrics.
//! Described by `docs/openapi.json`, which is made from the same declarations as the routes.
//!
//! | module | is |
//! | --- | --- |
//! | [`types`] | bodies of requests and answers, for server and client |
//! | `routes` | which request is which command |
//! | [`server`] | sockets, limits, the thread |
//! | [`vcps`] | what the VCPs tell of themselves |
//! | [`page`] | the page of metrics |
//! | [`client`] | the other end, for `vcp ctl` and `vcp top` |
//!
//! Everything here runs on one thread of its own with a single-threaded runtime. No device, vCPU or VCP ever waits for it.

pub mod client;
pub mod page;
mod routes;
pub mod server;
pub mod types;
pub mod vcps;

#[cfg(test)]
mod openapi_tests;
#[cfg(test)]
mod tests;

pub use routes::openapi;
pub use server::Server;

/// What of the machine the API needs. A trait, so that the API can be tested and fuzzed without a guest.
pub trait Machine: Send + Sync + 'static {
    /// Sends a command; `reply` is called once with its answer, or dropped if the machine has ended. Does not block.
    fn send(&self, command: crate::machine::command::Command, reply: Reply);
}

/// Called with the answer to a command, on any thread.
pub type Reply = Box<dyn FnOnce(crate::machine::command::Answer) + Send>;

impl Machine for crate::machine::command::Control {
    fn send(&self, command: crate::machine::command::Command, reply: Reply) {
        self.send_with(command, reply);
    }
}
