//! [`Vring`]: one virtqueue of a [`RingSet`](super::RingSet), running or not.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use virtio_queue::{Queue, QueueT};

use super::port::{PortError, Reply};
use crate::mem::GuestMap;
use crate::queue::{Chain, RingError, SplitQueue, VirtQueue};

/// How long `GET_VRING_BASE` waits for requests in flight. The front end (and with it the guest) stands still
/// meanwhile, so it must be short of what a user takes for a hang; a healthy target answers in milliseconds.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// A ring that was stopped with requests in flight, as the front end was told.
///
/// The stop is either a pause, and the guest still waits for these requests, or part of a reset, and the guest must
/// not see them (or have its memory written by them) any more. Only the next start tells. So they are abandoned at
/// once, and a ring that resumes takes them again from its descriptors.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) base: u16,
    pub(super) used: u16,
    pub(super) desc_table: u64,
    /// Heads of the chains in flight, newest first.
    pub(super) heads: Vec<u16>,
}

#[derive(Debug)]
pub(super) struct Vring {
    /// Size and addresses for the next start.
    pub(super) setup: Queue,
    pub(super) addresses_set: bool,
    pub(super) base: u16,
    pub(super) ring: Option<SplitQueue>,
    pub(super) enabled: bool,
    pub(super) kick: Option<OwnedFd>,
    /// `SET_VRING_KICK` came without a descriptor: the ring has to be polled.
    pub(super) polled: bool,
    pub(super) call: Option<OwnedFd>,
    pub(super) err: Option<OwnedFd>,
    pub(super) epoch: u32,
    pub(super) inflight: u32,
    /// In flight of earlier epochs.
    pub(super) orphans: u32,
    /// When each head was taken, by a counter; 0: not in flight.
    pub(super) taken: Vec<u64>,
    pub(super) taken_count: u64,
    /// Heads to take again before anything new, newest first.
    pub(super) again: Vec<u16>,
    pub(super) unpublished: bool,
    pub(super) stopping: Option<(SyncSender<Reply>, Instant)>,
    pub(super) parked: Option<Parked>,
}

impl Vring {
    pub(super) fn new(size_max: u16) -> Self {
        Self {
            setup: Queue::new(size_max).expect("device queue size is a power of two"),
            addresses_set: false,
            base: 0,
            ring: None,
            enabled: false,
            kick: None,
            polled: false,
            call: None,
            err: None,
            epoch: 0,
            inflight: 0,
            orphans: 0,
            taken: vec![0; size_max.into()],
            taken_count: 0,
            again: Vec::new(),
            unpublished: false,
            stopping: None,
            parked: None,
        }
    }

    pub(super) fn runs(&self) -> bool {
        self.ring.is_some() && self.enabled && self.stopping.is_none() && self.orphans == 0
    }

    /// Everything in flight now belongs to the past.
    pub(super) fn orphan(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        self.orphans += self.inflight;
        self.inflight = 0;
        self.parked = None;
        self.again.clear();
        self.taken.fill(0);
    }

    /// Stops with requests in flight.
    pub(super) fn park(&mut self, ring: &SplitQueue) {
        let mut heads: Vec<(u64, u16)> =
            self.taken.iter().zip(0..).filter(|(at, _)| **at != 0).map(|(at, head)| (*at, head)).collect();
        heads.sort_unstable_by(|a, b| b.cmp(a));
        let mut heads: Vec<u16> = heads.into_iter().map(|(_, head)| head).collect();
        // What was still to be taken again is newer than what was.
        heads.splice(0..0, std::mem::take(&mut self.again));
        self.orphan();
        let queue = ring.queue();
        self.parked = Some(Parked {
            base: queue.next_avail(),
            used: queue.next_used(),
            desc_table: queue.desc_table(),
            heads,
        });
    }

    /// Takes the next chain: first those that are taken again.
    pub(super) fn take(&mut self, map: &Arc<GuestMap>, chain: &mut Chain) -> Result<bool, RingError> {
        let Some(ring) = &mut self.ring else { return Ok(false) };
        if let Some(head) = self.again.pop() {
            ring.take_again(map, head, chain)?;
        } else if !ring.take(map, chain)? {
            return Ok(false);
        }
        self.taken_count += 1;
        if let Some(at) = self.taken.get_mut(usize::from(chain.id.head)) {
            *at = self.taken_count;
        }
        self.inflight += 1;
        Ok(true)
    }
}

pub(super) fn drop_kick(epoll: &OwnedFd, vring: &mut Vring) {
    if let Some(kick) = vring.kick.take() {
        // Closing our descriptor would not end the registration while the front end holds the other one.
        let _ = epoll::delete(epoll, &kick);
    }
}

/// A descriptor that we write to must never make the data thread wait, whatever the front end does with it.
pub(super) fn nonblocking(fd: File, queue: u32) -> Result<OwnedFd, PortError> {
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(|error| PortError::Descriptor { queue, error })?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)
        .map_err(|error| PortError::Descriptor { queue, error })?;
    Ok(fd.into())
}
