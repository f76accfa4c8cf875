//! [`Vring`]: one virtqueue of a [`RingSet`](super::RingSet), running or not.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::fs::FileType;

use super::port::{PortError, Reply};
use crate::mem::GuestMap;
use crate::queue::flight::{Flight, Position};
use crate::queue::{Chain, Ring, RingAddresses, RingError, VirtQueue};

/// How long `GET_VRING_BASE` waits for requests in flight. The front end (and with it the guest) stands still
/// meanwhile, so it must be short of what a user takes for a hang; a healthy target answers in milliseconds.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// What a runner with a ring of its own does for the virtqueues.
#[derive(Debug, Default)]
pub(super) struct Later {
    /// Drivers to interrupt.
    pub(super) signals: Vec<Arc<OwnedFd>>,
    /// Kicks to listen to.
    pub(super) watches: Vec<Arc<OwnedFd>>,
}

#[derive(Debug)]
pub(super) struct Vring {
    /// Size and addresses for the next start.
    pub(super) setup: RingAddresses,
    pub(super) addresses_set: bool,
    pub(super) base: u32,
    pub(super) ring: Option<Ring>,
    /// The ring that was stopped last, and where.
    pub(super) kept: Option<(Position, Ring)>,
    /// It went on, perhaps after a crash: the driver may never have been told of what was published last.
    pub(super) recovered: bool,
    pub(super) enabled: bool,
    pub(super) kick: Option<Arc<OwnedFd>>,
    /// `SET_VRING_KICK` came without a descriptor: the ring has to be polled.
    pub(super) polled: bool,
    pub(super) call: Option<Arc<OwnedFd>>,
    pub(super) err: Option<OwnedFd>,
    pub(super) flight: Flight,
    pub(super) unpublished: bool,
    pub(super) stopping: Option<(SyncSender<Reply>, Instant)>,
}

impl Vring {
    pub(super) fn new(size_max: u16) -> Self {
        Self {
            setup: RingAddresses { size: size_max, ..RingAddresses::default() },
            addresses_set: false,
            base: 0,
            ring: None,
            kept: None,
            recovered: false,
            enabled: false,
            kick: None,
            polled: false,
            call: None,
            err: None,
            flight: Flight::new(size_max),
            unpublished: false,
            stopping: None,
        }
    }

    pub(super) fn runs(&self) -> bool {
        self.ring.is_some() && self.enabled && self.stopping.is_none() && self.flight.orphans() == 0
    }

    /// Takes the next chain of queue `queue` (this one): first those that are taken again.
    pub(super) fn take(
        &mut self,
        queue: u16,
        map: &Arc<GuestMap>,
        chain: &mut Chain,
    ) -> Result<bool, RingError> {
        let Some(ring) = &mut self.ring else { return Ok(false) };
        if let Some(head) = self.flight.next_again() {
            ring.take_again(map, head, chain)?;
        } else if !ring.take(map, chain)? {
            return Ok(false);
        }
        self.flight.took(queue, chain)?;
        Ok(true)
    }

    /// Interrupts the driver, at once or when the runner carries `later` out.
    pub(super) fn notify(&self, later: Option<&mut Later>) -> bool {
        let Some(call) = &self.call else { return false };
        match later {
            Some(later) => later.signals.push(Arc::clone(call)),
            None => return rustix::io::write(call, &1u64.to_ne_bytes()).is_ok(),
        }
        true
    }
}

pub(super) fn drop_kick(epoll: &OwnedFd, vring: &mut Vring) {
    if let Some(kick) = vring.kick.take() {
        // Closing our descriptor would not end the registration while the front end holds the other one.
        let _ = epoll::delete(epoll, &kick);
    }
}

/// A kick, call or error descriptor, which must be an eventfd: to look at or write to anything else (a file of a FUSE
/// server, say) could make the data thread wait for whoever is behind it, whatever its flags. Called on the thread of
/// the connection.
pub(super) fn eventfd(fd: File, queue: u32) -> Result<File, PortError> {
    let is_eventfd = match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(name) => name.as_os_str() == "anon_inode:[eventfd]",
        // Without /proc only its kind is known: none that has a file behind it.
        Err(_) => rustix::fs::fstat(&fd)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Unknown),
    };
    if is_eventfd { Ok(fd) } else { Err(PortError::NotAnEventfd { queue }) }
}

/// A descriptor that we write to must not make the data thread wait. A front end that means harm can make it blocking
/// again and fill it; `docs/threat-model.md` says what that does, and why it is left at that.
pub(super) fn nonblocking(fd: File, queue: u32) -> Result<OwnedFd, PortError> {
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(|error| PortError::Descriptor { queue, error })?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)
        .map_err(|error| PortError::Descriptor { queue, error })?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_eventfd_is_a_notification_descriptor() {
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
        eventfd(event.into(), 0).unwrap();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let file = tempfile::tempfile().unwrap();
        for other in [epoll.into(), reader.into(), writer.into(), file] {
            let error = eventfd(other, 3).unwrap_err();
            assert!(matches!(error, PortError::NotAnEventfd { queue: 3 }), "{error}");
        }
    }
}
