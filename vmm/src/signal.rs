//! Signals: the no-op that makes `KVM_RUN` return, and SIGTERM, SIGINT and SIGHUP turned into an event for the event
//! loop. Handlers are used and not a blocked mask with a signalfd, because a child process inherits a mask but not a
//! handler.
#![allow(unsafe_code)] // A signal handler may only make async-signal-safe calls: write(2) on a raw descriptor.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::error::{Error, Result};

static EVENT_FD: AtomicI32 = AtomicI32::new(-1);
static RECEIVED: AtomicI32 = AtomicI32::new(0);

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

extern "C" fn on_end(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // The first signal is the one reported.
    let _ = RECEIVED.compare_exchange(0, signal, Ordering::AcqRel, Ordering::Acquire);
    let fd = EVENT_FD.load(Ordering::Acquire);
    if fd >= 0 {
        let one = 1u64;
        // SAFETY: write(2) is async-signal-safe; the buffer is 8 bytes on this stack; `fd` is an eventfd that is never
        // closed once it is stored here. An error (counter full) needs no handling: the reader is awake then.
        // errno may change here, which code that was interrupted could see: write(2) on an eventfd only fails with
        // EAGAIN on a full counter, that is never.
        unsafe { libc::write(fd, (&raw const one).cast(), size_of::<u64>()) };
    }
}

/// Makes the kick signal harmless; what matters is that a system call returns with EINTR.
pub fn install_kick_handler() -> Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(|e| Error::Os {
        action: "install a signal handler",
        source: std::io::Error::from_raw_os_error(e.errno()),
    })
}

/// Turns SIGTERM, SIGINT and SIGHUP into an event. The descriptor lives as long as the process.
pub fn install_end_handlers() -> Result<OwnedFd> {
    let event =
        eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(Error::os("create an eventfd"))?;
    let handlers_own = event.try_clone().map_err(Error::os("duplicate an eventfd"))?;
    EVENT_FD.store(handlers_own.as_raw_fd(), Ordering::Release);
    // Not closed: a handler may use it until the very end.
    std::mem::forget(handlers_own);
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        register_signal_handler(signal, on_end).map_err(|e| Error::Os {
            action: "install a signal handler",
            source: std::io::Error::from_raw_os_error(e.errno()),
        })?;
    }
    Ok(event)
}

/// Waits for a signal to end, at most for `limit`; whether one arrived. `event` is that of [`install_end_handlers`].
pub fn wait(event: &OwnedFd, limit: std::time::Duration) -> Result<bool> {
    let deadline = std::time::Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        let timeout =
            rustix::event::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut fds = [rustix::event::PollFd::new(event, rustix::event::PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(ready) => return Ok(ready != 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::os("wait")(e)),
        }
    }
}

/// The first ending signal that arrived, if one did.
pub fn received() -> Option<i32> {
    match RECEIVED.load(Ordering::Acquire) {
        0 => None,
        signal => Some(signal),
    }
}
