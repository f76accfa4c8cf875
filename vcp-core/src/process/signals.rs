//! SIGTERM and SIGINT as a descriptor, so that ending is an event like any other.
#![allow(unsafe_code)] // Signal masks and signalfd have no safe wrapper among our crates.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Readable when SIGTERM or SIGINT came.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks both signals for this thread and all it starts from now on, and opens the descriptor. Call before any
    /// thread is started: a thread without the mask would still be killed.
    ///
    /// # Errors
    /// The system refused.
    pub fn block() -> io::Result<Self> {
        // SAFETY: an all-zero `sigset_t` is valid storage for `sigemptyset`, which initialises it.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: `set` is a valid, exclusively borrowed signal set for each of these calls; the descriptor that
        // `signalfd` returns is new and owned by nobody else.
        unsafe {
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            libc::sigaddset(&raw mut set, libc::SIGINT);
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            let fd = libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self(OwnedFd::from_raw_fd(fd)))
        }
    }

    /// For a server inside another program (or a test): ends it when the returned stream is dropped, no signals.
    ///
    /// # Errors
    /// The system refused.
    pub fn embedded() -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((Self(ours.into()), theirs))
    }

    /// The number of the signal that came, if one did; 0 if an embedding program wants an end.
    #[must_use]
    pub fn take(&self) -> Option<u32> {
        // `struct signalfd_siginfo` is 128 bytes and starts with the signal's number.
        let mut info = [0; 128];
        match rustix::io::read(self.0.as_fd(), &mut info) {
            Ok(0) => Some(0),
            Ok(128) => Some(u32::from_ne_bytes([info[0], info[1], info[2], info[3]])),
            _ => None,
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}
