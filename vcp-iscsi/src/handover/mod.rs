//! Hand-over of a running `vcp-iscsi` to a new one: what of it is this program's and not `vcp_core::handover`'s.
//!
//! - [`offer`]: what the devices were made with, as the old process tells the new one before anything stops. It holds
//!   secrets (for the logins to come); it is told over a local socket to root or the same user only, and never written.
//! - [`take_over`]: the new process.
//! - `upgrade`, the user's command that starts it, is that of every VCP ([`vcp_core::handover::upgrade`]).
//!
//! The sessions and the unit's facts are in the engine's own state (`portal/engine/export.rs`).

pub mod offer;
pub mod take_over;

/// How this program calls itself to the other side.
#[must_use]
pub fn program() -> String {
    format!("vcp-iscsi {}", env!("CARGO_PKG_VERSION"))
}
