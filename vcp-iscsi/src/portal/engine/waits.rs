//! One descriptor for the sockets of all paths: an epoll instance, kept up to date with as few calls as possible.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use super::path::MAX_PATHS;

/// What is waited for on behalf of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    fd: i32,
    /// Which of the sockets that had this number.
    serial: u64,
    writable: bool,
}

/// See the [module](self). Keys are small numbers of the caller's.
#[derive(Debug)]
pub(super) struct Waits {
    epoll: OwnedFd,
    entries: [Option<Entry>; 2 * MAX_PATHS],
}

impl Waits {
    pub(super) fn new() -> Option<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .inspect_err(|error| tracing::error!(%error, "no epoll instance: sockets are looked at in turn"))
            .ok()?;
        Some(Self { epoll, entries: [None; 2 * MAX_PATHS] })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Whether there is nothing to wait for.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.iter().all(Option::is_none)
    }

    /// No longer waits for `fd`, which stays open, under `key`.
    pub(super) fn remove(&mut self, key: usize, fd: BorrowedFd<'_>) {
        if let Some(entry) = self.entries.get_mut(key)
            && entry.take().is_some_and(|entry| entry.fd == fd.as_raw_fd())
        {
            // If it was not there, it is not waited for either.
            let _ = epoll::delete(&self.epoll, fd);
        }
    }

    /// Waits for `fd` (or nothing) under `key` from now on. `serial` differs between sockets; one that was closed is
    /// no longer waited for by itself.
    pub(super) fn set(&mut self, key: usize, wanted: Option<(BorrowedFd<'_>, u64, bool)>) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let new = wanted.map(|(fd, serial, writable)| Entry { fd: fd.as_raw_fd(), serial, writable });
        if *entry == new {
            return;
        }
        let old = std::mem::replace(entry, new);
        let Some((fd, serial, writable)) = wanted else {
            // Its socket is closed, or was handed to another key, which changes the registration.
            return;
        };
        let mut flags = epoll::EventFlags::IN;
        if writable {
            flags |= epoll::EventFlags::OUT;
        }
        let data = epoll::EventData::new_u64(key as u64);
        let same = old.is_some_and(|old| old.fd == fd.as_raw_fd() && old.serial == serial);
        let done = if same {
            epoll::modify(&self.epoll, fd, data, flags)
        } else {
            match epoll::add(&self.epoll, fd, data, flags) {
                // The same socket under another key: a dialled one that became a session.
                Err(Errno::EXIST) => epoll::modify(&self.epoll, fd, data, flags),
                other => other,
            }
        };
        if let Err(error) = done {
            tracing::error!(%error, "cannot wait for a socket");
            self.entries[key] = None;
        }
    }

    /// Keys whose sockets are ready, as a bit set; all of them if that cannot be found out.
    pub(super) fn ready(&self) -> u32 {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
                2 * MAX_PATHS];
        match epoll::wait(&self.epoll, &mut events[..], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(count) => events[..count].iter().fold(0, |set, event| set | 1 << (event.data.u64() % 32)),
            Err(_) => u32::MAX,
        }
    }
}
