//! The world: virtual time, what happens in it, and the rules that hold throughout. `network` carries what is sent, `disturb`
//! makes the faults, `stage` knows the course of a run.

mod disturb;
mod network;
mod stage;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vcp_core::device::RingDevice;
use vcp_core::uring::{self, IoMode, Ring};
use vcp_iscsi::blk::BlkDevice;
use vcp_iscsi::portal::IscsiEngine;

use crate::faults::{Faults, Happened};
use crate::guest::Guest;
use crate::net::{Conn, ConnId, Item, SimNetwork};
use crate::peer::{Action, Context, Target};
use crate::rng::{Rng, mix};
use crate::scenario::Scenario;
use crate::trace::{Trace, trace};

pub const US: u64 = 1_000;
pub const MS: u64 = 1_000_000;
pub const S: u64 = 1_000_000_000;

/// After the faults have stopped, every request is answered within this.
const ANSWERED_WITHIN: u64 = 200 * S;
/// What an aborted connection still delivers, it delivers within this; only held where sessions of different portal groups
/// make it matter (`docs/decisions/multipath.md`, "what is left").
const NETWORK: u64 = 150 * MS;
/// Turns at one moment of virtual time after which the engine is running in circles.
const MAX_TURNS: u32 = 2000;
/// Turns in a run; a run of waiting has some thousands.
const MAX_ALL_TURNS: u64 = 400_000;

/// Something due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Connect(ConnId),
    ToTarget(ConnId),
    ToEngine(ConnId),
    Execute(ConnId, u64),
    ReadAgain(ConnId),
    Faults,
    PowerUp,
    OpenWindows,
    /// The target notices that a connection ended.
    Noticed(ConnId),
    /// The state that a group had before.
    Access(usize, u8),
    Issue,
    Destage,
}

/// How a run ended.
#[derive(Debug)]
pub struct Report {
    pub answered: u64,
    pub failed: u64,
    pub virtual_ns: u64,
    pub turns: u64,
    pub sessions_lost: u64,
    pub happened: Vec<Happened>,
    pub trace: Vec<String>,
    /// Of everything that passed, so that two runs of a seed can be compared.
    pub hash: u64,
}

/// A run that broke a rule.
#[derive(Debug)]
pub struct Failure {
    pub what: String,
    pub at_ns: u64,
    pub happened: Vec<Happened>,
    pub trace: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Requests and faults.
    Load,
    /// No more of either; what is underway is answered.
    Quiet,
    /// A flush, a power loss, and everything read.
    Proof { next: u64 },
}

/// Runs a scenario. A panic is a failure like any other, but for its trace.
pub fn run(scenario: &Scenario, skip: &BTreeSet<usize>, with_trace: bool) -> Result<Report, Box<Failure>> {
    let run = || World::new(scenario.clone(), skip, with_trace).run();
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_or_else(|cause| {
        let text = cause.downcast_ref::<String>().cloned();
        let text = text.or_else(|| cause.downcast_ref::<&str>().map(|&text| text.to_owned()));
        Err(Box::new(Failure {
            what: format!("panicked: {}", text.unwrap_or_default()),
            at_ns: 0,
            happened: Vec::new(),
            trace: Vec::new(),
        }))
    })
}

pub struct World {
    scenario: Scenario,
    base: Instant,
    now: u64,
    seq: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    rng: Rng,
    net: SimNetwork,
    conns: BTreeMap<ConnId, Conn>,
    target: Target,
    target_up: bool,
    /// Not all portals are of one group.
    two_groups: bool,
    /// The machine answers for a target that is down.
    host_up: bool,
    refuse_until: u64,
    dead: BTreeMap<usize, u64>,
    faults: Faults,
    guest: Guest,
    device: BlkDevice<IscsiEngine>,
    ring: Option<Ring>,
    stage: Stage,
    stage_since: u64,
    issued: u64,
    issue_due: bool,
    trace: Trace,
    hash: u64,
    turns: u64,
    buffer: Vec<u8>,
}

/// A ring for this thread, if there can be one.
fn ring() -> Option<Ring> {
    let mut ring = uring::choose(IoMode::Auto).ok()??;
    ring.enable().ok()?;
    Some(ring)
}

impl World {
    fn new(scenario: Scenario, skip: &BTreeSet<usize>, with_trace: bool) -> Self {
        let base = Instant::now();
        let seed = scenario.seed;
        let net = SimNetwork::new(scenario.send_buffer_bytes);
        let portals = &scenario.settings.portals;
        let two_groups = portals.iter().any(|portal| portal.group != portals[0].group);
        let target = Target::new(scenario.settings.clone(), scenario.unit.clone(), seed);
        let (engine, found) = scenario.engine(&net, &target, base);
        let mut device = BlkDevice::new(engine, scenario.queues);
        let mut told = [0; 4];
        // max_write_zeroes_sectors
        device.read_config(48, &mut told);
        let mut guest = Guest::new(&scenario, u64::from(u32::from_le_bytes(told)).max(1));
        scenario.negotiate(&mut device);
        guest.oracle.write_through = scenario.write_through || !found;
        let mut faults = scenario.faults(skip);
        faults.active = true;
        guest.may_fail = faults.may_fail() || scenario.give_up;
        guest.trace = with_trace;
        let mut world = Self {
            rng: Rng::new(seed, 4),
            base,
            now: 0,
            seq: 0,
            events: BinaryHeap::new(),
            net,
            conns: BTreeMap::new(),
            target,
            target_up: true,
            two_groups,
            host_up: true,
            refuse_until: 0,
            dead: BTreeMap::new(),
            faults,
            guest,
            device,
            ring: scenario.ring.then(ring).flatten(),
            stage: Stage::Load,
            stage_since: 0,
            issued: 0,
            issue_due: false,
            trace: Trace {
                on: with_trace,
                live: std::env::var_os("VCP_SIM_LIVE").is_some(),
                lines: Vec::new(),
            },
            hash: 0,
            turns: 0,
            buffer: vec![0; 65536],
            scenario,
        };
        world.think();
        world.at(world.scenario.fault_tick_ns, Event::Faults);
        world.at(MS, Event::Destage);
        world
    }

    fn run(mut self) -> Result<Report, Box<Failure>> {
        match self.go() {
            Ok(()) => Ok(Report {
                answered: self.guest.answered,
                failed: self.guest.failed,
                virtual_ns: self.now,
                turns: self.turns,
                sessions_lost: self.device.engine().stats().sessions_lost,
                happened: self.faults.log,
                trace: self.trace.lines,
                hash: self.hash,
            }),
            Err(what) => Err(Box::new(Failure {
                what,
                at_ns: self.now,
                happened: self.faults.log,
                trace: self.trace.lines,
            })),
        }
    }

    fn at(&mut self, at: u64, event: Event) {
        self.seq += 1;
        self.events.push(Reverse((at, self.seq, event)));
    }

    fn instant(&self) -> Instant {
        self.base + Duration::from_nanos(self.now)
    }

    fn note(&mut self, what: u64) {
        self.hash = mix(self.hash ^ what.wrapping_add(self.now));
    }

    fn go(&mut self) -> Result<(), String> {
        let mut stuck = 0;
        loop {
            let moved = self.settle()?;
            if let Some(what) = self.guest.violation.take() {
                return Err(what);
            }
            if self.advance_stage()? {
                return Ok(());
            }
            let deadline = self.device.wait().deadline;
            let deadline = deadline.map(|at| at.saturating_duration_since(self.base).as_nanos() as u64);
            let event = self.events.peek().map(|Reverse((at, ..))| *at);
            let Some(next) = [deadline, event].into_iter().flatten().min() else {
                return Err(format!("nothing is due any more, but requests wait: {:?}", self.guest.oldest()));
            };
            if next <= self.now && !moved {
                stuck += 1;
                if stuck > 100 {
                    return Err(format!(
                        "the engine wants to run at once, again and again, and does nothing: {:?}",
                        self.device.engine()
                    ));
                }
            } else {
                stuck = 0;
            }
            self.now = self.now.max(next);
            self.guest.now_ns = self.now;
            while let Some(&Reverse((at, _, event))) = self.events.peek() {
                if at > self.now {
                    break;
                }
                self.events.pop();
                self.happen(event);
            }
        }
    }

    /// Lets the engine run until it has nothing to do; whether it did anything.
    fn settle(&mut self) -> Result<bool, String> {
        let mut any = false;
        for _ in 0..MAX_TURNS {
            let mut moved = self.take_sent();
            let stuck: Vec<_> =
                self.conns.iter().filter(|(_, c)| !c.stuck.is_empty()).map(|(id, _)| *id).collect();
            for id in stuck {
                if self.conns.get_mut(&id).is_some_and(Conn::give_stuck) {
                    moved = true;
                    self.deliver_to_engine(id);
                }
            }
            if self.is_woken() {
                self.turns += 1;
                self.guest.kicked = false;
                let now = self.instant();
                self.reap_ring();
                moved |= self.device.poll(&mut self.guest, now);
                moved |= self.move_ring()?;
                if self.trace.on {
                    for line in std::mem::take(&mut self.guest.events) {
                        self.trace.line(self.now, &line);
                    }
                }
                if self.guest.violation.is_some() {
                    return Ok(true);
                }
                moved |= self.connect_begun();
                // A login sends without saying that something moved.
                moved |= self.take_sent();
                // The driver sees answers and goes on.
                if moved {
                    if self.scenario.think_ns < S {
                        self.issue();
                    }
                    self.think();
                }
            }
            if self.turns > MAX_ALL_TURNS {
                return Err(format!("the engine ran {MAX_ALL_TURNS} times in this run"));
            }
            if !moved {
                return Ok(any);
            }
            any = true;
        }
        Err(format!("the engine ran {MAX_TURNS} times at one moment"))
    }

    /// Carries out what the device gives the ring, as the loop does before it sleeps; whether there is more to do at once.
    fn move_ring(&mut self) -> Result<bool, String> {
        let Some(ring) = &mut self.ring else { return Ok(false) };
        let again = self.device.submit_to(ring);
        ring.submit().map_err(|error| format!("the ring: {error}"))?;
        Ok(again)
    }

    fn reap_ring(&mut self) {
        if let Some(ring) = &mut self.ring {
            // Fails only without memory.
            let _ = ring.submit();
            self.device.reap_from(ring);
        }
    }

    /// Whether the data thread would run the device now: by a kick, a deadline, or what the socket or the ring says.
    fn is_woken(&mut self) -> bool {
        if self.ring.as_mut().is_some_and(|ring| ring.has_news() || ring.has_results()) {
            return true;
        }
        let wait = self.device.wait();
        if self.guest.kicked || wait.deadline.is_some_and(|at| at <= self.instant()) {
            return true;
        }
        let Some(fd) = wait.fd.filter(|fd| !self.net.is_pending(fd)) else { return false };
        let mut events = PollFlags::IN;
        if wait.writable {
            events |= PollFlags::OUT;
        }
        poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&Timespec::default())).is_ok_and(|n| n > 0)
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send(id, bytes) => {
                    self.note(bytes.len() as u64 ^ 0xFFFF);
                    self.send_bytes(id, false, &bytes);
                }
                Action::Close(id) => {
                    trace!(self.trace, self.now, "target: closes conn {id}");
                    self.send(id, false, Item::End);
                    if let Some(conn) = self.conns.get_mut(&id) {
                        conn.at_target = false;
                    }
                }
                Action::Timer { at, conn, serial } => self.at(at, Event::Execute(conn, serial)),
            }
        }
    }

    /// Calls the target.
    fn target(&mut self, call: impl FnOnce(&mut Target, &mut Context<'_>)) {
        let mut actions = Vec::new();
        let mut cx = Context {
            now: self.now,
            faults: &mut self.faults,
            trace: &mut self.trace,
            actions: &mut actions,
        };
        call(&mut self.target, &mut cx);
        self.act(actions);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Connect(id) => self.connect(id),
            Event::ToTarget(id) => self.deliver_to_target(id),
            Event::ToEngine(id) => self.deliver_to_engine(id),
            Event::Execute(id, serial) => {
                if self.target_up {
                    self.target(|target, cx| target.execute(id, serial, cx));
                }
            }
            Event::ReadAgain(_) => {}
            Event::Faults => {
                if self.faults.active {
                    self.disturb();
                    let pause = self.rng.range(1, 2 * self.scenario.fault_tick_ns);
                    self.at(self.now + pause, Event::Faults);
                }
            }
            Event::PowerUp => self.power_up(),
            Event::Noticed(id) => {
                trace!(self.trace, self.now, "target: conn {id} ended");
                self.target.closed(id);
            }
            Event::Access(group, state) => {
                trace!(self.trace, self.now, "target: group {group} is in access state {state} again");
                self.target.set_state(group, state);
            }
            Event::OpenWindows => self.target(Target::open_windows),
            Event::Issue => {
                self.issue_due = false;
                self.issue();
                self.think();
            }
            Event::Destage => {
                if self.stage == Stage::Load {
                    self.target.destage();
                    let pause = self.rng.spread(MS, S);
                    self.at(self.now + pause, Event::Destage);
                }
            }
        }
    }

    /// The guest comes back when it has thought, if there is something to do.
    fn think(&mut self) {
        let more = self.stage == Stage::Load && self.guest.has_room() && self.issued < self.scenario.ops;
        if more && !self.issue_due {
            self.issue_due = true;
            let pause = self.rng.spread(US, self.scenario.think_ns);
            self.at(self.now + pause, Event::Issue);
        }
    }

    fn issue(&mut self) {
        if self.stage == Stage::Load
            && self.guest.has_room()
            && self.issued < self.scenario.ops
            && self.rng.permille(700)
        {
            self.issued += 1;
            let op = self.guest.choose();
            self.guest.submit(op);
        }
    }
}
