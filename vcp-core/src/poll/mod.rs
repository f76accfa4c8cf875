//! The data thread: one loop that runs every queue of every device to completion.
//!
//! A pass looks into the mailbox, then lets each device take, submit, reap and complete. After a pass in which nothing
//! moved the thread spins for a while ([`spin`]), then arms notifications on every ring, looks once more
//! ([`crate::queue::notify`]), and sleeps until a kick, an engine's socket, the mailbox or a deadline.
//!
//! What it does with its time is counted, and told to a supervisor through its [pulse](crate::pulse).

mod cpu;
mod handover;
mod ring;
mod side;
pub mod spin;

pub use cpu::{CpuError, check_cpu, pin_to, ranges as cpu_ranges};
pub use side::Side;
pub use spin::{Load, PollMode, Share, Spin};

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, epoll};

use crate::ask::{Ask, Told};
use crate::device::{RingDevice, Wait};
use crate::fabric::{Apart, Fabric};
use crate::mailbox::Mailbox;
use crate::metrics::{LoopMetrics, Samples};
use crate::pulse::{Field, Pulse};
use crate::uring::Ring;
use crate::vu::give::StopOrder;
use crate::vu::port::{Answer, Command, Port, What};

/// How long the loop waits at its end for requests in flight. A target that is gone must not hold up a SIGTERM.
const DRAIN_AT_EXIT: Duration = Duration::from_secs(1);
/// How long all devices together may take to end what they hold outside; with the drain under two seconds in all.
pub(crate) const CLOSE_AT_EXIT: Duration = Duration::from_millis(600);

/// Longest sleep of a supervised loop with requests under way: its pulse shows that it would wake up if there was something.
pub const MAX_SLEEP: Duration = Duration::from_millis(250);

/// Passes between two counts of requests for the pulse; a power of two.
const COUNT_EVERY: u64 = 64;

/// Commands carried out between two passes over the devices, so that no front end can keep others waiting by setting up.
const COMMANDS_PER_PASS: usize = 16;

/// The number by which the fabric is asked, in place of a device's.
pub(crate) const FABRIC: usize = usize::MAX;

/// Engine descriptors waited for without allocating; more devices than this cost an allocation per sleep.
const INLINE_FDS: usize = 16;

/// The loop and all that it owns.
pub struct DataLoop<D, F = Apart> {
    ports: Vec<Port<D>>,
    fabric: F,
    /// What else it drives. Their numbers for questions follow those of the ports.
    sides: Vec<Box<dyn Side>>,
    mailbox: Arc<Mailbox<Command>>,
    /// Kick descriptors and the mailbox, all edge-triggered; with a ring only what devices name to wait for.
    epoll: Arc<OwnedFd>,
    /// Instead of plain system calls.
    ring: Option<Ring>,
    /// Passes since something was given to the ring.
    lag: u32,
    spin: Spin,
    stop: Arc<AtomicBool>,
    metrics: Arc<LoopMetrics>,
    /// A hand-over is wanted.
    order: Option<Box<StopOrder>>,
    /// This loop goes on where another process stopped, and has completed nothing yet.
    resumed: Option<handover::Resumed>,
    /// What a supervisor reads.
    pulse: Option<Arc<Pulse>>,
}

/// What the time since the last look at the clock went into.
#[derive(Clone, Copy, Debug)]
enum Spent {
    Busy,
    Looking,
    Asleep,
}

impl<D: RingDevice, F: Fabric<D>> DataLoop<D, F> {
    /// A loop over `ports`, which `fabric` joins, commanded through `mailbox`, that ends when `stop` is set (and the mailbox woken).
    ///
    /// # Errors
    /// No epoll instance could be had.
    pub fn new(
        ports: Vec<Port<D>>,
        fabric: F,
        mailbox: Arc<Mailbox<Command>>,
        mode: PollMode,
        stop: Arc<AtomicBool>,
        metrics: Arc<LoopMetrics>,
    ) -> rustix::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &*mailbox, epoll::EventData::new_u64(1), flags)?;
        let (spin, epoll) = (Spin::new(mode), Arc::new(epoll));
        Ok(Self {
            ports,
            fabric,
            sides: Vec::new(),
            mailbox,
            epoll,
            ring: None,
            lag: 0,
            spin,
            stop,
            metrics,
            order: None,
            resumed: None,
            pulse: None,
        })
    }

    /// The same with a page for its supervisor, and with at most `share` percent of its time spent looking for work.
    #[must_use]
    pub fn supervised(mut self, pulse: Option<Arc<Pulse>>, share: Share) -> Self {
        self.pulse = pulse;
        self.spin.limit(share);
        self
    }

    /// The same loop, driving these as well.
    #[must_use]
    pub fn with_sides(mut self, sides: Vec<Box<dyn Side>>) -> Self {
        self.sides = sides;
        self
    }

    /// Runs until told to stop, then gives what is in flight a moment to end.
    ///
    /// # Errors
    /// Waiting failed, which it does only when the system is out of memory.
    pub fn run(&mut self) -> rustix::io::Result<()> {
        let mut idle_since: Option<Instant> = None;
        self.start_ring()?;
        self.first_look();
        let (mut last, mut spent) = (Instant::now(), Spent::Busy);
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            self.account(now.saturating_duration_since(std::mem::replace(&mut last, now)), spent);
            let moved = self.pass(now);
            if let Some(order) = self.order.take()
                && self.hand_over(&order)?
            {
                // Another process is the owner: nothing is drained, closed or logged out.
                return Ok(());
            }
            if moved {
                if self.resumed.is_some() {
                    self.look_for_completion();
                }
                idle_since = None;
                self.metrics.busy_passes.add(1);
                spent = Spent::Busy;
                self.move_ring(true)?;
                continue;
            }
            let since = *idle_since.get_or_insert(now);
            let load = self.load();
            if self.spin.keeps_looking(now - since, load)
                || self.ports.iter().any(|port| port.rings.must_poll())
            {
                std::hint::spin_loop();
                self.readiness(true);
                spent = Spent::Looking;
                self.move_ring(false)?;
                continue;
            }
            if self.arm() || self.mailbox.has_mail() {
                self.disarm();
                idle_since = None;
                spent = Spent::Looking;
                continue;
            }
            if self.ring.is_some() {
                self.sleep_in_ring(now)?;
            } else {
                self.sleep(now)?;
            }
            spent = Spent::Asleep;
            self.disarm();
            self.spin.slept(since.elapsed(), load);
            self.metrics.spin_ns.set(self.spin.budget().as_nanos() as u64);
            idle_since = None;
        }
        let result = self.drain();
        let holders = self.ports.len() + self.sides.len();
        let share = CLOSE_AT_EXIT / u32::try_from(holders.max(1)).unwrap_or(u32::MAX);
        self.ports.iter_mut().for_each(|port| port.device.close(share));
        self.fabric.close(share);
        self.sides.iter_mut().for_each(|side| side.close(share));
        result
    }

    /// Counts what was done with some time, and lets the supervisor see it.
    fn account(&mut self, took: Duration, spent: Spent) {
        let counter = match spent {
            Spent::Busy => &self.metrics.busy_ns,
            Spent::Looking => &self.metrics.look_ns,
            Spent::Asleep => &self.metrics.sleep_ns,
        };
        counter.add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        self.spin.spent(took, matches!(spent, Spent::Looking));
        let Some(pulse) = &self.pulse else { return };
        let metrics = &self.metrics;
        pulse.set(Field::Passes, metrics.passes.get());
        pulse.set(Field::BusyNs, metrics.busy_ns.get());
        pulse.set(Field::LookNs, metrics.look_ns.get());
        pulse.set(Field::SleepNs, metrics.sleep_ns.get());
        if metrics.passes.get() & (COUNT_EVERY - 1) == 0 {
            self.count(pulse);
        }
    }

    /// Lets the supervisor see what costs a look at every ring.
    fn count(&self, pulse: &Pulse) {
        pulse.set(Field::InFlight, self.inflight().into());
        pulse.set(Field::Completed, self.completions());
        pulse.set(Field::StoppedNs, self.metrics.take_over_stopped_ns.get());
    }

    /// How long a sleep may last at most: a loop whose pulse counts shows that it lives as long as it has something to do.
    fn longest_sleep(&self) -> Option<Duration> {
        self.pulse.as_ref()?;
        let busy = |port: &Port<D>| port.rings.inflight() != 0 || !port.device.has_room();
        self.ports.iter().any(busy).then_some(MAX_SLEEP)
    }

    /// What ends the loop once it is set (and the mailbox woken).
    pub(crate) fn stop_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }

    /// Requests under way in all devices.
    fn inflight(&self) -> u32 {
        let sides: u32 = self.sides.iter().map(|side| side.inflight()).sum();
        self.ports.iter().map(|port| port.rings.inflight()).sum::<u32>() + sides
    }

    /// What the decision between looking on and sleeping goes by.
    fn load(&self) -> Load {
        let moves_long = self.ports.iter().any(|port| port.rings.inflight() != 0 && port.device.moves_long())
            || self.sides.iter().any(|side| side.moves_long());
        Load { inflight: self.inflight(), moves_long }
    }

    /// Tells all devices whether their descriptors may be readable.
    fn readiness(&mut self, ready: bool) {
        self.ports.iter_mut().for_each(|port| port.device.readiness(ready));
        self.sides.iter_mut().for_each(|side| side.readiness(ready));
    }

    /// One pass over mailbox and devices; whether anything moved.
    fn pass(&mut self, now: Instant) -> bool {
        let mut moved = false;
        if self.mailbox.has_mail() {
            moved = true;
            for _ in 0..COMMANDS_PER_PASS {
                let Some(command) = self.mailbox.take() else { break };
                if let What::Stop(order) = command.what {
                    self.order = Some(order);
                    continue;
                }
                if command.device == FABRIC {
                    let What::Ask(ask) = command.what else { continue };
                    let _ = command.reply.try_send(Ok(Answer::Told(self.tell(ask, now))));
                    continue;
                }
                let side = command.device.checked_sub(self.ports.len());
                if let (Some(side), What::Ask(_)) = (side.and_then(|n| self.sides.get_mut(n)), &command.what)
                {
                    let What::Ask(ask) = command.what else { continue };
                    // The asker may have given up; then nobody wants the answer.
                    let _ = command.reply.try_send(Ok(Answer::Told(side.tell(ask, now))));
                    continue;
                }
                match self.ports.get_mut(command.device) {
                    Some(port) => port.command(&self.epoll, command.what, command.reply, now),
                    None => {
                        tracing::error!(device = command.device, "command for a device that is not there");
                    }
                }
            }
        }
        moved |= self.move_ports(now);
        for side in &mut self.sides {
            moved |= side.pass(now);
        }
        self.metrics.passes.add(1);
        moved
    }

    /// One pass over the devices; whether anything moved.
    fn move_ports(&mut self, now: Instant) -> bool {
        let moved = self.fabric.poll(&mut self.ports, now);
        self.ports.iter_mut().for_each(|port| port.settle(&self.epoll, now));
        moved
    }

    /// What the set-up thread asks the fabric.
    fn tell(&mut self, ask: Ask, now: Instant) -> Told {
        match ask {
            Ask::Status => Told::Status(self.fabric.status(&self.ports)),
            Ask::Samples => {
                let mut samples = Samples::default();
                self.fabric.collect(&mut samples);
                Told::Samples(samples)
            }
            Ask::Command { name, args } => {
                self.fabric.command(&mut self.ports, &name, &args, now).map_or(Told::Unknown, Told::Command)
            }
        }
    }

    fn arm(&mut self) -> bool {
        // Every ring is armed even if an early one has work: all of them are disarmed together.
        // A device without room takes nothing before its engine moved, so a full ring is no reason to stay awake.
        let with_room = self.ports.iter_mut().filter(|port| port.device.has_room());
        let more = with_room.fold(false, |more, port| port.rings.arm() | more);
        self.sides.iter_mut().fold(more, |more, side| side.arm() | more)
    }

    fn disarm(&mut self) {
        self.ports.iter_mut().for_each(|port| port.rings.disarm());
        self.sides.iter_mut().for_each(|side| side.disarm());
    }

    /// How long it may sleep.
    fn limit(&self, now: Instant) -> Option<Duration> {
        let deadlines = self.ports.iter().filter_map(|port| port.device.wait().deadline);
        let mut deadline = deadlines.chain(self.ports.iter().filter_map(Port::deadline)).min();
        self.fabric.waits(&mut |wait| deadline = [deadline, wait.deadline].into_iter().flatten().min());
        let sides = self.sides.iter().filter_map(|side| side.deadline());
        let deadline = sides.chain(deadline).min();
        if let Some(pulse) = &self.pulse {
            self.count(pulse);
        }
        let limit = deadline.map(|deadline| deadline.saturating_duration_since(now));
        limit.into_iter().chain(self.longest_sleep()).min()
    }

    /// Sleeps until something that was waited for happens.
    fn sleep(&mut self, now: Instant) -> rustix::io::Result<()> {
        let mut joint: Vec<Wait<'_>> = Vec::new();
        self.fabric.waits(&mut |wait| joint.push(wait));
        let waits = || self.ports.iter().map(|port| port.device.wait()).chain(joint.iter().map(Wait::again));
        let timeout = self.limit(now).map(timespec);
        self.metrics.sleeps.add(1);
        self.metrics.sleeping.set(1);
        if let Some(pulse) = &self.pulse {
            pulse.set(Field::Sleeping, 1);
        }
        let fds = waits().filter_map(|wait| poll_fd(&wait));
        let own = || PollFd::new(&self.epoll, PollFlags::IN);
        let (result, ready) = if self.ports.len() + joint.len() <= INLINE_FDS && self.sides.is_empty() {
            let mut inline: [PollFd<'_>; INLINE_FDS + 1] = std::array::from_fn(|_| own());
            let used = 1 + inline[1..].iter_mut().zip(fds).map(|(place, fd)| *place = fd).count();
            wait_for(&mut inline[..used], timeout.as_ref())
        } else {
            let mut all: Vec<PollFd<'_>> = std::iter::once(own()).chain(fds).collect();
            let mut waits = Vec::new();
            self.sides.iter().for_each(|side| side.waits(&mut waits));
            all.extend(waits.iter().filter_map(poll_fd));
            wait_for(&mut all, timeout.as_ref())
        };
        self.metrics.sleeping.set(0);
        if let Some(pulse) = &self.pulse {
            pulse.set(Field::Sleeping, 0);
        }
        self.readiness(ready);
        let woken = result?;
        if woken {
            // Takes the edges; which ring it was does not matter, all of them are looked at.
            let mut events =
                [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 32];
            match epoll::wait(&self.epoll, &mut events[..], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Lets what is in flight end, within [`DRAIN_AT_EXIT`].
    fn drain(&mut self) -> rustix::io::Result<()> {
        let deadline = Instant::now() + DRAIN_AT_EXIT;
        self.ports.iter_mut().for_each(|port| port.rings.close());
        self.leave_ring()?;
        self.sides.iter_mut().for_each(|side| side.hold(true));
        loop {
            let now = Instant::now();
            self.readiness(true);
            let moved = self.pass(now);
            self.signal_by_ring()?;
            let inflight = self.inflight();
            if inflight == 0 {
                return Ok(());
            }
            if now >= deadline {
                tracing::warn!(
                    inflight,
                    "ending with requests in flight; the front end repeats them after a reconnect"
                );
                return Ok(());
            }
            if !moved {
                let timeout = timespec(Duration::from_millis(10).min(deadline - now));
                let fds = self.ports.iter().filter_map(|port| port.device.wait().fd);
                let mut fds: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
                let mut waits = Vec::new();
                self.sides.iter().for_each(|side| side.waits(&mut waits));
                fds.extend(waits.iter().filter_map(poll_fd));
                wait_for(&mut fds, Some(&timeout)).0?;
            }
        }
    }
}

fn poll_fd<'a>(wait: &Wait<'a>) -> Option<PollFd<'a>> {
    let writable = if wait.writable { PollFlags::OUT } else { PollFlags::empty() };
    wait.fd.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN | writable))
}

/// Polls; whether the first descriptor is ready, and whether any other is.
fn wait_for(fds: &mut [PollFd<'_>], timeout: Option<&Timespec>) -> (rustix::io::Result<bool>, bool) {
    match rustix::event::poll(fds, timeout) {
        Ok(_) => {
            let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
            (Ok(ready.next().unwrap_or(false)), ready.any(|ready| ready))
        }
        Err(rustix::io::Errno::INTR) => (Ok(false), true),
        Err(error) => (Err(error), true),
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}
