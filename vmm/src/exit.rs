//! Why a virtual machine ended, and the one place where every thread says so.

use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};

/// Why the run is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest switched itself off.
    PowerOff,
    /// The guest reset itself.
    Reset,
    /// A bare-metal guest ended with this code.
    GuestCode(u8),
    /// The guest crashed in a way the hardware ends in a reset: triple fault.
    TripleFault,
    /// The guest cannot go on, or KVM cannot run it.
    VcpuFailed(String),
    /// A device's backend is gone, and there will be no other.
    BackendGone {
        /// Device name.
        device: String,
        /// What was seen.
        reason: String,
    },
    /// The monitor itself cannot go on.
    Internal(String),
    /// The user asked for it with the escape key.
    User,
    /// A signal asked for it.
    Signal(i32),
}

/// Shared by everything that can end the run. The first reason given is the one that counts.
#[derive(Clone, Debug)]
pub struct ExitSignal {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    reason: Mutex<Option<ExitReason>>,
    event: EventFd,
}

impl ExitSignal {
    /// A new signal, not given yet.
    pub fn new() -> Result<Self> {
        let event =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::os("create an eventfd"))?;
        Ok(Self { inner: Arc::new(Inner { reason: Mutex::new(None), event }) })
    }

    /// Ends the run, if it has not ended yet.
    pub fn give(&self, reason: ExitReason) {
        let mut slot = self.inner.reason.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if slot.is_none() {
            tracing::debug!(?reason, "the run ends");
            *slot = Some(reason);
            // Only fails when the counter is full, and then the reader wakes anyway.
            let _ = self.inner.event.write(1);
        }
    }

    /// The reason, once there is one.
    pub fn reason(&self) -> Option<ExitReason> {
        self.inner.reason.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Readable once the run has ended.
    pub fn event(&self) -> &EventFd {
        &self.inner.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_reason_counts() {
        let exit = ExitSignal::new().unwrap();
        assert_eq!(exit.reason(), None);
        exit.give(ExitReason::Reset);
        exit.give(ExitReason::PowerOff);
        assert_eq!(exit.reason(), Some(ExitReason::Reset));
        assert_eq!(exit.event().read().unwrap(), 1);
    }
}
