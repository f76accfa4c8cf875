//! What a vhost-user device keeps across the connections to its backends, so that the guest sees a pause and nothing
//! else when one dies: the driver's set-up, the in-flight log, what the driver wrote into the configuration space, and
//! the configuration space as the driver knows it.
//!
//! Two threads come here: a vCPU with what its driver does, under the transport's lock, and the device's keeper
//! (`crate::vcp::keeper`) with a new connection or the loss of one. How a split ring goes on is QEMU's way: from its used
//! index, with the log telling the backend what of the rest was taken. A packed ring's position is in the log; of one that
//! rests, it is what its backend said when it was stopped.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use vhost::VhostBackend;
use vm_memory::{Bytes, GuestAddress};

use super::Kind;
use super::inflight::InflightLog;
use super::session::Session;
use crate::error::{Error, Result};
use crate::kvm::GuestMemory;
use crate::virtio::{Activation, ActiveQueue, Complaints, F_RING_PACKED};

/// Where a packed ring begins: index 0 and wrap counter 1, for what is available and for what is used.
const PACKED_START: u32 = 0x8000_8000;
/// How long a killed process may take until it is gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// What the driver set up, from `DRIVER_OK` until it resets the device.
struct Run {
    activation: Activation,
    /// Queues that the driver has not stopped since.
    running: Vec<u16>,
    /// A backend was given a queue: what comes next goes on where that one stopped.
    begun: bool,
    /// The queues rest with nothing in flight, and are not started before [`Front::go_on`].
    resting: bool,
    /// Where packed rings stand while they rest, by queue: the answers to `GET_VRING_BASE`.
    positions: BTreeMap<u16, u32>,
}

/// What a snapshot keeps of a device.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    written: BTreeMap<u32, u8>,
    running: Vec<u16>,
    /// See [`Run::positions`].
    positions: BTreeMap<u16, u32>,
}

#[derive(Default)]
struct State {
    /// The connection; `None` while there is no backend.
    session: Option<Session>,
    run: Option<Run>,
    log: Option<InflightLog>,
    /// Bytes of the configuration space that the driver has written: a backend that is new must be told.
    written: BTreeMap<u32, u8>,
    /// The backend's process, if it is ours to kill.
    process: Option<OwnedFd>,
    complaints: Complaints,
}

/// The part of a device that its transport and its keeper share.
pub struct Front {
    name: String,
    kind: Kind,
    offered: u64,
    /// A lost connection is replaced, and does not fail what the driver asks for.
    recovers: bool,
    state: Mutex<State>,
    /// Apart from the rest, so that reading it never waits for a backend.
    config: Mutex<Vec<u8>>,
    /// Changes of the configuration so far. Counted before the change, under its lock: who sees the new bytes sees the
    /// new count.
    changes: AtomicU32,
}

impl std::fmt::Debug for Front {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Front").field("name", &self.name).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Front {
    /// A device whose first backend is behind `session`.
    pub fn new(name: &str, kind: Kind, session: Session, recovers: bool) -> Self {
        let offered = session.features() & kind.features | kind.own_features;
        let config = Mutex::new(session.config().to_vec());
        let state = Mutex::new(State { session: Some(session), ..State::default() });
        Self { name: name.to_owned(), kind, offered, recovers, state, config, changes: AtomicU32::new(0) }
    }

    /// What messages call the device.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What kind of device it is.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// Whether a lost backend is replaced.
    pub fn recovers(&self) -> bool {
        self.recovers
    }

    /// Whether there is a backend now, as far as is known without asking it. Never waits for one.
    pub fn is_connected(&self) -> bool {
        // Locked means that somebody talks to it.
        self.state.try_lock().map_or(true, |state| state.session.is_some())
    }

    /// The features that the driver is offered, the same for the whole run.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Another descriptor of the connection, if there is one.
    pub fn stream(&self) -> Result<Option<std::os::unix::net::UnixStream>> {
        lock(&self.state).session.as_ref().map(|session| session.link().stream()).transpose()
    }

    /// What happened to the connection, if that is known; does not wait for anybody who uses it.
    pub fn failure(&self) -> Option<String> {
        self.state.try_lock().ok()?.session.as_ref().and_then(|session| session.link().failure())
    }

    /// Whether a split ring holds requests that were not answered; does not wait for anybody. A packed ring does not tell:
    /// for it, and where the device is being set up, the answer is no.
    pub fn holds_work(&self) -> bool {
        let Ok(state) = self.state.try_lock() else { return false };
        let Some(run) = &state.run else { return false };
        let Activation { features, memory, queues, .. } = &run.activation;
        if *features & F_RING_PACKED != 0 {
            return false;
        }
        let mut waiting = queues
            .iter()
            .filter(|queue| run.running.contains(&queue.index) && (self.kind.holds_requests)(queue.index));
        waiting.any(|queue| {
            let read = |ring| index(memory, ring, &self.name).ok();
            read(queue.avail_ring) != read(queue.used_ring)
        })
    }

    /// Reads the configuration space; what is beyond its end is left as it is.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        let config = lock(&self.config);
        for (i, byte) in data.iter_mut().enumerate() {
            if let Some(value) = offset.checked_add(i).and_then(|at| config.get(at)) {
                *byte = *value;
            }
        }
    }

    /// How often the configuration space has changed by itself.
    pub fn config_generation(&self) -> u32 {
        self.changes.load(Ordering::Acquire)
    }

    /// A driver's write to the configuration space; what it may not write is left as it is.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        let Kind { writable, .. } = &self.kind;
        let Ok(offset) = usize::try_from(offset) else { return };
        let (from, to) = (offset.max(writable.start), offset.saturating_add(data.len()).min(writable.end));
        let Some(data) =
            from.checked_sub(offset).zip(to.checked_sub(offset)).and_then(|(a, b)| data.get(a..b))
        else {
            return;
        };
        if data.is_empty() {
            return;
        }
        let mut state = lock(&self.state);
        let sent = match &state.session {
            Some(session) => session.write_config(from as u32, data),
            None => Ok(true),
        };
        let taken = match sent {
            Ok(taken) => taken,
            // The next backend is told.
            Err(_) if self.lost(&state) => true,
            Err(e) => {
                if state.complaints.add() {
                    tracing::warn!(device = self.name, error = %crate::chain(&e), "the backend refuses a change of configuration");
                }
                false
            }
        };
        if taken {
            state.written.extend((from as u32..).zip(data.iter().copied()));
            overlay(&mut lock(&self.config), &state.written);
        }
    }

    /// Whether there is no backend now, and another one will come.
    fn lost(&self, state: &State) -> bool {
        self.recovers && state.session.as_ref().is_none_or(|session| session.link().failure().is_some())
    }

    /// The driver has set `DRIVER_OK`.
    pub fn activate(&self, activation: Activation) -> Result<()> {
        let mut state = lock(&self.state);
        let running = activation.queues.iter().map(|queue| queue.index).collect();
        state.run =
            Some(Run { activation, running, begun: false, resting: false, positions: BTreeMap::new() });
        let Some(mut session) = state.session.take() else { return Ok(()) };
        let result = self.start(&mut state, &mut session);
        state.session = Some(session);
        if result.is_ok() || self.lost(&state) {
            return Ok(());
        }
        if let Err(e) = self.stop(&mut state, super::link::STOP_TIMEOUT) {
            tracing::debug!(device = self.name, error = %crate::chain(&e), "cannot undo a failed start");
        }
        result
    }

    /// Tells the backend behind `session` all that it needs, and starts the queues.
    fn start(&self, state: &mut State, session: &mut Session) -> Result<()> {
        let Some(run) = &mut state.run else { return Ok(()) };
        let Activation { features, memory, queues, interrupt } = &run.activation;
        let queues: Vec<_> = queues.iter().filter(|queue| run.running.contains(&queue.index)).collect();
        session.set_features(*features)?;
        for (offset, byte) in &state.written {
            session.write_config(*offset, &[*byte])?;
        }
        let goes_on = run.begun;
        if goes_on && run.resting {
            tracing::debug!(device = self.name, "goes on with nothing in flight");
        } else if goes_on {
            self.can_go_on(session, state.log.is_some(), *features, memory, &queues)?;
        } else {
            state.log = None;
        }
        let sizes = &self.kind.queue_max_sizes;
        session.set_log(&mut state.log, sizes.len() as u16, sizes.iter().copied().max().unwrap_or(0))?;
        session.set_memory(memory)?;
        // From the first queue on there may be requests that only the log knows of, even if this start fails.
        run.begun = true;
        for queue in queues {
            let base = match (*features & F_RING_PACKED != 0, goes_on) {
                // Without a log this is where it goes on; one that is in use says the same.
                (true, true) if run.resting => position(&self.name, run, queue)?,
                (true, _) => PACKED_START,
                (false, false) => 0,
                (false, true) => u32::from(index(memory, queue.used_ring, &self.name)?),
            };
            let call = interrupt.call_fd(queue.index).ok_or_else(|| Error::Driver {
                device: self.name.clone(),
                reason: format!("has no interrupt for queue {}", queue.index),
            })?;
            let max_size = sizes.get(usize::from(queue.index)).copied().unwrap_or(0);
            session.start_queue(memory, queue, base, *features, max_size, call)?;
        }
        Ok(())
    }

    /// Whether a backend can go on where another one has stopped, without losing or repeating what it must not.
    fn can_go_on(
        &self,
        session: &Session,
        have_log: bool,
        features: u64,
        memory: &GuestMemory,
        queues: &[&ActiveQueue],
    ) -> Result<()> {
        if have_log && session.keeps_log() || !self.kind.needs_log {
            return Ok(());
        }
        if have_log {
            let reason = "keeps no in-flight log, and the one before it did".into();
            return Err(Error::BackendLacks { device: self.name.clone(), reason });
        }
        // Without a log nobody knows which requests were taken: to repeat one that was answered could undo a later write.
        for queue in queues {
            let idle = features & F_RING_PACKED == 0
                && index(memory, queue.used_ring, &self.name)?
                    == index(memory, queue.avail_ring, &self.name)?;
            if !idle {
                let reason = "ended with requests in flight and kept no log of them \
                              (VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD)";
                return Err(Error::Unrecoverable { device: self.name.clone(), reason: reason.into() });
            }
        }
        Ok(())
    }

    /// Stops the queues. When this returns without an error, nobody touches them any more.
    fn stop(&self, state: &mut State, timeout: Duration) -> Result<()> {
        let begun = state.run.take();
        state.log = None;
        let (Some(run), Some(session)) = (begun, &state.session) else { return Ok(()) };
        let stopped = run.running.iter().try_for_each(|queue| {
            let queue = usize::from(*queue);
            session.link().call_within(timeout, "GET_VRING_BASE", |f| f.get_vring_base(queue)).map(drop)
        });
        self.or_dead(state, stopped)
    }

    /// A queue that could not be stopped is stopped all the same if the connection is gone, and the process with it.
    fn or_dead(&self, state: &State, stopped: Result<()>) -> Result<()> {
        if stopped.is_ok() || !self.lost(state) {
            return stopped;
        }
        match &state.process {
            Some(pidfd) => make_sure_dead(&self.name, pidfd),
            None => {
                // Somebody else's process cannot be killed; one that closed its connection has no reason to go on.
                tracing::warn!(
                    device = self.name,
                    "the backend is lost and cannot be stopped for a reset of the device"
                );
                Ok(())
            }
        }
    }

    /// Has the queues rest, with nothing in flight, until [`Front::go_on`].
    pub fn quiesce(&self) -> Result<()> {
        let refuse = |reason: &str| Err(Error::Snapshot(format!("{}: {reason}", self.name)));
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let Some(run) = &mut state.run else { return Ok(()) };
        let Some(session) = &state.session else {
            return refuse("it has no backend now, and requests may be in flight: wait until it is back");
        };
        for queue in &run.running {
            let position = session.link().call_within(super::link::STOP_TIMEOUT, "GET_VRING_BASE", |f| {
                f.get_vring_base(usize::from(*queue))
            })?;
            let (avail, used) = (position & 0xffff, position >> 16);
            // Backends that know one half only leave the other 0.
            if run.activation.features & F_RING_PACKED != 0 && used != 0 && used != avail {
                return refuse("its backend stopped a ring with requests in flight");
            }
            run.positions.insert(*queue, position);
        }
        run.resting = true;
        Ok(())
    }

    /// Has the queues go on after [`Front::quiesce`].
    pub fn go_on(&self) -> Result<()> {
        let mut state = lock(&self.state);
        if !state.run.as_ref().is_some_and(|run| run.resting) {
            return Ok(());
        }
        let started = match state.session.take() {
            // The next backend starts them.
            None => Ok(()),
            Some(mut session) => {
                let started = self.start(&mut state, &mut session);
                state.session = Some(session);
                started
            }
        };
        if let Some(run) = &mut state.run {
            run.resting = false;
            run.positions.clear();
        }
        wake_both(&state);
        if self.lost(&state) { Ok(()) } else { started }
    }

    /// What a snapshot keeps: what the driver has written to the configuration space, and the queues that it has stopped.
    pub fn save(&self) -> Vec<u8> {
        let state = lock(&self.state);
        let (running, positions) = match &state.run {
            Some(run) => (run.running.clone(), run.positions.clone()),
            None => Default::default(),
        };
        // Integers and lists of them are always serialised.
        serde_json::to_vec(&Saved { written: state.written.clone(), running, positions }).unwrap_or_default()
    }

    /// Starts the queues where they were saved, with nothing in flight.
    pub fn restore(&self, saved: &[u8], activation: Activation) -> Result<()> {
        let Saved { written, running, positions } = serde_json::from_slice(saved)
            .map_err(|e| Error::Snapshot(format!("{}: its state is not understood: {e}", self.name)))?;
        let mut state = lock(&self.state);
        state.written = written;
        overlay(&mut lock(&self.config), &state.written);
        state.run = Some(Run { activation, running, begun: true, resting: true, positions });
        drop(state);
        self.go_on()
    }

    /// The driver has reset the device.
    pub fn reset(&self) -> Result<()> {
        self.stop(&mut lock(&self.state), super::link::STOP_TIMEOUT)
    }

    /// The run is over.
    pub fn shut_down(&self) -> Result<()> {
        self.stop(&mut lock(&self.state), super::link::END_TIMEOUT)
    }

    /// The driver has stopped one queue.
    pub fn stop_queue(&self, index: u16) -> Result<()> {
        let mut state = lock(&self.state);
        let Some(run) = &mut state.run else { return Ok(()) };
        let Some(at) = run.running.iter().position(|running| *running == index) else { return Ok(()) };
        run.running.remove(at);
        let Some(session) = &state.session else { return Ok(()) };
        let stopped = session
            .link()
            .call_within(super::link::STOP_TIMEOUT, "GET_VRING_BASE", |f| {
                f.get_vring_base(usize::from(index))
            })
            .map(drop);
        self.or_dead(&state, stopped)
    }

    /// Says which process the backend is, so that it can be killed where it must not touch the guest any more.
    pub fn set_process(&self, pidfd: Option<OwnedFd>) {
        lock(&self.state).process = pidfd;
    }

    /// The connection is lost; returns what is known of the reason. The backend's process, if it is ours, has ended.
    pub fn detach(&self) -> Option<String> {
        let mut state = lock(&self.state);
        state.process = None;
        state.session.take().and_then(|session| session.link().failure())
    }

    /// A backend is there again: it goes on where the last one stopped.
    pub fn attach(&self, mut session: Session) -> Result<()> {
        let mut state = lock(&self.state);
        let needed = match &state.run {
            Some(run) => run.activation.features & !self.kind.own_features,
            None => self.offered & !self.kind.own_features,
        };
        let missing = needed & !session.features();
        if missing != 0 {
            let reason = format!("does not offer the features {missing:#x}, which the guest uses");
            return Err(Error::BackendLacks { device: self.name.clone(), reason });
        }
        self.fits(&session)?;
        if !state.run.as_ref().is_some_and(|run| run.resting) {
            self.start(&mut state, &mut session)?;
        }
        // A kick that the last backend took and did not act on, an interrupt that it owed: both are made up for here, and
        // neither hurts where nothing was owed.
        wake_both(&state);
        self.take_config(&state, session.config());
        state.session = Some(session);
        Ok(())
    }

    /// The backend says that its configuration has changed.
    pub fn refresh_config(&self) -> Result<()> {
        let mut state = lock(&self.state);
        let Some(mut session) = state.session.take() else { return Ok(()) };
        let result = session.read_config(&self.kind).and_then(|()| self.fits(&session));
        if result.is_ok() {
            self.take_config(&state, session.config());
        }
        state.session = Some(session);
        result
    }

    /// Checks that a guest that knows the configuration as it is can live with what a backend has.
    fn fits(&self, session: &Session) -> Result<()> {
        self.kind
            .compare_config(&lock(&self.config), session.config())
            .map_err(|reason| Error::BackendLacks { device: self.name.clone(), reason })
    }

    /// Makes a backend's configuration the one that the driver sees, and tells the driver if it is another.
    fn take_config(&self, state: &State, new: &[u8]) {
        let mut new = new.to_vec();
        overlay(&mut new, &state.written);
        let mut config = lock(&self.config);
        if *config == new {
            return;
        }
        self.changes.fetch_add(1, Ordering::AcqRel);
        *config = new;
        drop(config);
        tracing::info!(device = self.name, "the configuration has changed");
        if let Some(run) = &state.run {
            run.activation.interrupt.config();
        }
    }
}

/// Where a packed ring that rests goes on. A position that cannot be is a backend's lie or a damaged snapshot.
fn position(device: &str, run: &Run, queue: &ActiveQueue) -> Result<u32> {
    let refuse =
        |why: String| Err(Error::Snapshot(format!("{device}: its packed ring {} {why}", queue.index)));
    let Some(&position) = run.positions.get(&queue.index) else {
        return refuse("has no position to go on at".into());
    };
    // An index and, in bit 15, a wrap counter each of what is available and of what is used.
    let fits = |half: u32| half & 0x7fff < u32::from(queue.size);
    if fits(position & 0xffff) && fits(position >> 16) {
        Ok(position)
    } else {
        refuse(format!("cannot go on at {position:#x}, which is beyond its {} descriptors", queue.size))
    }
}

/// Signals the running queues to both sides: who owes nothing is not harmed.
fn wake_both(state: &State) {
    let Some(run) = &state.run else { return };
    for queue in run.activation.queues.iter().filter(|queue| run.running.contains(&queue.index)) {
        let call = run.activation.interrupt.call_fd(queue.index);
        for event in [Some(&*queue.kick), call].into_iter().flatten() {
            // Fails only if the counter is full, and then it is signalled.
            let _ = event.write(1);
        }
    }
}

/// Puts what the driver has written over a configuration space.
fn overlay(config: &mut [u8], written: &BTreeMap<u32, u8>) {
    for (offset, byte) in written {
        if let Some(at) = config.get_mut(*offset as usize) {
            *at = *byte;
        }
    }
}

/// The index field of a split ring's available or used ring.
fn index(memory: &GuestMemory, ring: u64, device: &str) -> Result<u16> {
    let outside =
        || Error::Driver { device: device.to_owned(), reason: "put a ring outside of memory".into() };
    let at = ring.checked_add(2).ok_or_else(outside)?;
    memory.read_obj::<u16>(GuestAddress(at)).map(u16::from_le).map_err(|_| outside())
}

/// Kills a process and waits until it is gone, with all that it could still have written.
pub fn make_sure_dead(device: &str, pidfd: &OwnedFd) -> Result<()> {
    let _ = pidfd_send_signal(pidfd, Signal::KILL);
    let deadline = Instant::now() + KILL_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&left)) {
            Ok(1..) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            _ => {
                let reason = format!("its vcp-iscsi does not end within {KILL_TIMEOUT:?} after being killed");
                return Err(Error::Vcp { device: device.to_owned(), reason });
            }
        }
    }
}
