//! The loop's part with a [`Ring`]: what a pass brought up is given to it and carried out by one system call, if possible
//! the one that also waits.

use std::time::Instant;

use rustix::event::epoll;
use rustix::io::Errno;

use super::DataLoop;
use crate::device::{RingDevice, Wait};
use crate::fabric::Fabric;
use crate::uring::Ring;

/// Passes in which something moved before what they brought up is carried out without waiting for the first one in which
/// nothing does: two make a batch of what belongs together.
const LAG: u32 = 2;

impl<D: RingDevice, F: Fabric<D>> DataLoop<D, F> {
    /// The same loop with a ring instead of plain system calls, if there is one.
    #[must_use]
    pub fn with_ring(mut self, ring: Option<Ring>) -> Self {
        if let Some(mut ring) = ring {
            // The ring listens to the mailbox itself. Failing to take it off costs a wake-up.
            let _ = epoll::delete(&self.epoll, &*self.mailbox);
            ring.watch(self.mailbox.descriptor());
            ring.watch(&self.epoll);
            self.ports.iter_mut().for_each(|port| port.rings.leave_to_runner());
            self.ring = Some(ring);
        }
        self
    }

    /// On the data thread, before the first pass.
    pub(super) fn start_ring(&mut self) -> rustix::io::Result<()> {
        self.ring.as_mut().map_or(Ok(()), |ring| ring.enable().map_err(|error| errno(&error)))
    }

    /// Gives the ring what came up; whether a device must not wait.
    fn fill_ring(&mut self) -> bool {
        let Some(ring) = &mut self.ring else { return false };
        let mut again = false;
        for port in &mut self.ports {
            port.rings.hand_to(ring);
            again |= port.device.submit_to(ring);
        }
        for side in &mut self.sides {
            again |= side.submit_to(ring);
        }
        again
    }

    fn reap_ring(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        self.ports.iter_mut().for_each(|port| port.device.reap_from(ring));
        self.sides.iter_mut().for_each(|side| side.reap_from(ring));
        self.metrics.ring_enters.set(ring.counts().enters);
    }

    /// Carries out what came up, if it is time to, and sees what ended, without waiting.
    pub(super) fn move_ring(&mut self, moved: bool) -> rustix::io::Result<()> {
        if self.ring.is_none() {
            return Ok(());
        }
        self.lag += 1;
        if moved && self.lag < LAG {
            return Ok(());
        }
        self.lag = 0;
        self.fill_ring();
        if let Some(ring) = &mut self.ring
            && (ring.has_queued() || ring.has_news())
        {
            ring.submit().map_err(|error| errno(&error))?;
            self.reap_ring();
        }
        Ok(())
    }

    /// Carries out what came up and sleeps until something that was waited for happens.
    pub(super) fn sleep_in_ring(&mut self, now: Instant) -> rustix::io::Result<()> {
        let again = self.fill_ring();
        self.lag = 0;
        let limit = self.limit(now);
        let Some(ring) = &mut self.ring else { return Ok(()) };
        // What a device waits for by itself: sockets that are being connected, say. Level-triggered, and only for now.
        let mut waits: Vec<Wait<'_>> = Vec::new();
        if !again {
            self.fabric.waits(&mut |wait| waits.push(wait));
            waits.extend(self.ports.iter().map(|port| port.device.wait()));
            self.sides.iter().for_each(|side| side.waits(&mut waits));
            waits.retain(|wait| wait.fd.is_some());
        }
        for wait in &waits {
            let Some(fd) = wait.fd else { continue };
            let mut flags = epoll::EventFlags::IN;
            flags.set(epoll::EventFlags::OUT, wait.writable);
            epoll::add(&self.epoll, fd, epoll::EventData::new_u64(0), flags)?;
        }
        let result = if again {
            ring.submit()
        } else {
            self.metrics.sleeps.add(1);
            self.metrics.sleeping.set(1);
            let result = ring.wait(limit);
            self.metrics.sleeping.set(0);
            result
        };
        for fd in waits.iter().filter_map(|wait| wait.fd) {
            epoll::delete(&self.epoll, fd)?;
        }
        // Each side waits for its clients besides, which says nothing of a device.
        let waited = waits.len() > self.sides.len();
        drop(waits);
        result.map_err(|error| errno(&error))?;
        self.reap_ring();
        self.readiness(waited);
        Ok(())
    }

    /// The devices make their own calls from here on, until [`fill_ring`](Self::fill_ring) is called again.
    pub(super) fn leave_ring(&mut self) -> rustix::io::Result<()> {
        self.signal_by_ring()?;
        if let Some(ring) = &mut self.ring {
            ring.quiesce().map_err(|error| errno(&error))?;
        }
        self.reap_ring();
        self.ports.iter_mut().for_each(|port| port.device.leave_ring());
        self.sides.iter_mut().for_each(|side| side.leave_ring());
        Ok(())
    }

    /// Signals and kicks alone, for passes in which devices make their own calls.
    pub(super) fn signal_by_ring(&mut self) -> rustix::io::Result<()> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        self.ports.iter_mut().for_each(|port| port.rings.hand_to(ring));
        if ring.has_queued() { ring.submit().map_err(|error| errno(&error)) } else { Ok(()) }
    }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
