//! Waiting: look for a while, announce the sleep, look again, sleep.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::{Channel, Error};

/// Time between two looks at the control socket of a thread that only looks.
const LINK_EVERY: Duration = Duration::from_millis(1);
/// Looks at the rings between two looks at the clock.
const LOOKS: u32 = 32;

impl Channel {
    /// Announces that this side sleeps, and looks once more: true if it must not sleep, because there is a message, or room
    /// for what was refused with [`Full`](super::SendError::Full). Then, and after the sleep, [`disarm`](Self::disarm).
    ///
    /// Sleep until [`bell`](Self::bell) or [`link`](Self::link) is readable.
    ///
    /// # Errors
    /// The peer broke a rule.
    pub fn arm(&mut self) -> Result<bool, Error> {
        // Whatever was rung so far was for messages that the last look finds.
        self.ear.hush();
        self.nothing_owed();
        self.commit();
        for lane in &mut self.lanes {
            lane.rx.announce();
        }
        let mut awake = false;
        if let Some((lane, slots)) = self.wanted {
            match self.lanes[usize::from(lane)].tx.arm(slots) {
                Ok(room) => awake |= room,
                Err(violation) => return Err(self.fail(violation)),
            }
        } else {
            super::Rx::fence();
        }
        awake |= self.has_message();
        if !awake {
            self.show();
        }
        Ok(awake)
    }

    /// Takes the announcement back: the peer need not kick.
    pub fn disarm(&mut self) {
        for lane in &mut self.lanes {
            lane.rx.disarm();
        }
        if let Some((lane, _)) = self.wanted.take() {
            self.lanes[usize::from(lane)].tx.disarm();
        }
    }

    /// Gives back all slots whose messages were taken.
    fn nothing_owed(&mut self) {
        for lane in &mut self.lanes {
            self.kick |= lane.rx.release();
        }
    }

    /// Waits for a message, for room, or for the peer's end; false if `deadline` came first. Looks for a learned time
    /// before it sleeps ([`set_spin`](Self::set_spin)).
    ///
    /// # Errors
    /// The peer broke a rule, or the system refused to wait.
    pub fn wait(&mut self, deadline: Option<Instant>) -> Result<bool, Error> {
        self.nothing_owed();
        self.commit();
        if self.has_message() {
            return Ok(true);
        }
        let began = Instant::now();
        let mut room = self.wanted;
        let mut attended = began;
        let mut now = began;
        // Without a budget the one look of `arm` has to do.
        while self.spin.looks_on(now - began) {
            for _ in 0..LOOKS {
                if self.has_message() {
                    // Not later than this by more than the looks take: whoever waits for the answer pays for a look at the
                    // clock here.
                    self.found(now - began);
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            if let Some((lane, slots)) = room {
                match self.lanes[usize::from(lane)].tx.free(slots) {
                    Ok(free) if free >= slots => {
                        self.wanted = None;
                        self.found(now - began);
                        return Ok(true);
                    }
                    Ok(_) => {}
                    Err(violation) => return Err(self.fail(violation)),
                }
                room = self.wanted;
            }
            now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                self.stats.spin_ns += (now - began).as_nanos() as u64;
                return Ok(false);
            }
            if now - attended > LINK_EVERY {
                attended = now;
                self.attend_quietly();
                if self.peer != super::PeerState::Running {
                    return Ok(true);
                }
            }
        }
        self.stats.spin_ns += (now - began).as_nanos() as u64;
        if self.arm()? {
            self.disarm();
            return Ok(true);
        }
        let woken = sleep(&[self], deadline);
        self.disarm();
        self.stats.sleeps += 1;
        self.spin.slept(began.elapsed());
        let woken = woken.map_err(Error::Wait)?;
        if woken.any {
            if woken.link {
                self.attend_quietly();
            }
            if !self.has_message() && self.peer == super::PeerState::Running {
                self.stats.spurious_wakes += u64::from(room.is_none());
            }
        }
        Ok(woken.any)
    }

    fn found(&mut self, idle: Duration) {
        self.spin.found(idle);
        self.stats.spin_ns += idle.as_nanos() as u64;
    }

    /// Deals with what came on the control socket; what is wrong there shows at the next `receive`.
    pub(super) fn attend_quietly(&mut self) {
        while let Ok(Some(_)) = self.attend() {}
    }
}

/// Waits until one of several channels has something to do; false if `deadline` came first. For a thread that looks at
/// many channels in turn; it sleeps at once.
///
/// # Errors
/// A peer broke a rule, or the system refused to wait. Which peer, its channel's next `receive` says.
pub fn wait_any(channels: &mut [&mut Channel], deadline: Option<Instant>) -> Result<bool, Error> {
    let mut awake = false;
    for channel in channels.iter_mut() {
        match channel.arm() {
            Ok(more) => awake |= more,
            Err(Error::Violation(_)) => awake = true,
            Err(error) => return Err(error),
        }
    }
    let woken = if awake {
        Ok(Woken { any: true, link: false })
    } else {
        let shared: Vec<&Channel> = channels.iter().map(|channel| &**channel).collect();
        sleep(&shared, deadline)
    };
    for channel in channels.iter_mut() {
        channel.disarm();
        if !awake {
            channel.stats.sleeps += 1;
            channel.attend_quietly();
        }
    }
    woken.map(|woken| woken.any).map_err(Error::Wait)
}

/// What ended a sleep.
struct Woken {
    /// Anything but the deadline.
    any: bool,
    /// A control socket may be readable.
    link: bool,
}

fn sleep(channels: &[&Channel], deadline: Option<Instant>) -> rustix::io::Result<Woken> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map(timespec);
        let ready = if let [channel] = channels {
            let mut fds = [
                PollFd::from_borrowed_fd(channel.bell(), PollFlags::IN),
                PollFd::from_borrowed_fd(channel.link(), PollFlags::IN),
            ];
            poll(&mut fds, timeout.as_ref()).map(|ready| (ready, !fds[1].revents().is_empty()))
        } else {
            let fds = channels.iter().flat_map(|channel| [channel.bell(), channel.link()]);
            let mut fds: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            poll(&mut fds, timeout.as_ref()).map(|ready| (ready, true))
        };
        match ready {
            Ok((ready, link)) => return Ok(Woken { any: ready != 0, link }),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}
