//! What the way a guest ended means for the user: success, or which failure.

use crate::boot::linux::resets_by_triple_fault;
use crate::config::VmConfig;
use crate::error::{Error, Result};
use crate::exit::ExitReason;

/// The result of a run. `panicked`: the guest's kernel said that it has.
pub(super) fn of(reason: ExitReason, config: &VmConfig, panicked: bool) -> Result<()> {
    match reason {
        ExitReason::PowerOff | ExitReason::Reset | ExitReason::TripleFault if panicked => {
            Err(Error::GuestFailed("the guest's kernel panicked".into()))
        }
        ExitReason::PowerOff | ExitReason::Reset | ExitReason::User | ExitReason::GuestCode(0) => Ok(()),
        ExitReason::Signal(signal) => {
            tracing::info!(signal, "ended by a signal");
            Ok(())
        }
        ExitReason::TripleFault if resets_by_triple_fault(&config.cmdline) => Ok(()),
        ExitReason::TripleFault => Err(Error::GuestFailed("the guest crashed: triple fault".into())),
        ExitReason::GuestCode(code) => Err(Error::GuestFailed(format!("the guest ended with code {code}"))),
        ExitReason::VcpuFailed(text) | ExitReason::Internal(text) => Err(Error::GuestFailed(text)),
        ExitReason::BackendGone { device, reason } => {
            Err(Error::GuestFailed(format!("{device}: {reason}; the guest was stopped")))
        }
    }
}
