//! The world: virtual time, the network between engine and target, the faults, and the rules that hold throughout.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vcp_core::device::RingDevice;
use vcp_core::uring::{self, IoMode, Ring};
use vcp_iscsi::blk::BlkDevice;
use vcp_iscsi::portal::IscsiEngine;

use crate::faults::{Faults, Happened, Kind};
use crate::guest::{Guest, Op};
use crate::net::{Attempt, Conn, ConnId, Item, Pipe, SimNetwork};
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

    /// Takes connections that the engine began.
    fn connect_begun(&mut self) -> bool {
        let begun = self.net.begun();
        let any = !begun.is_empty();
        for (id, address, socket) in begun {
            let portal = self.target.settings.portals.iter().position(|p| p.address == address);
            trace!(self.trace, self.now, "network: conn {id} to {address}");
            self.conns.insert(id, Conn::new(portal.unwrap_or(usize::MAX), socket));
            let at = self.now + self.latency() * 2;
            self.at(at, Event::Connect(id));
        }
        any
    }

    fn latency(&mut self) -> u64 {
        let (low, high) = self.scenario.link_ns;
        self.rng.spread(low, high)
    }

    /// Takes what the engine sent.
    fn take_sent(&mut self) -> bool {
        let mut any = false;
        let ids: Vec<_> = self.conns.iter().filter(|(_, c)| c.socket.is_some()).map(|(id, _)| *id).collect();
        for id in ids {
            while let Some(conn) = self.conns.get_mut(&id) {
                if conn.stop_reading_until > self.now {
                    break;
                }
                let mut buffer = std::mem::take(&mut self.buffer);
                let got = conn.take_sent(&mut buffer);
                match got {
                    None => {
                        self.buffer = buffer;
                        break;
                    }
                    Some(None) => {
                        self.buffer = buffer;
                        conn.socket = None;
                        conn.to_engine.queue.clear();
                        if self.two_groups {
                            // An aborted connection delivers nothing more but what the network carries already.
                            conn.to_target.forget_after(self.now + NETWORK);
                        }
                        any = true;
                        trace!(self.trace, self.now, "network: conn {id} closed by the engine");
                        self.send(id, true, Item::End);
                        break;
                    }
                    Some(Some(got)) => {
                        any = true;
                        self.note(got as u64);
                        self.send_bytes(id, true, &buffer[..got]);
                        self.buffer = buffer;
                    }
                }
            }
        }
        any
    }

    fn pipe(&mut self, id: ConnId, to_target: bool) -> Option<&mut Pipe> {
        let conn = self.conns.get_mut(&id)?;
        Some(if to_target { &mut conn.to_target } else { &mut conn.to_engine })
    }

    fn send(&mut self, id: ConnId, to_target: bool, item: Item) {
        let at = self.now + self.latency();
        self.send_at(id, to_target, item, at);
    }

    fn send_at(&mut self, id: ConnId, to_target: bool, item: Item, at: u64) {
        let due = self.pipe(id, to_target).and_then(|pipe| pipe.push(at, item));
        if let Some(due) = due {
            self.at(due, if to_target { Event::ToTarget(id) } else { Event::ToEngine(id) });
        }
    }

    /// Sends bytes in pieces of any size, as far as the connection lasts.
    fn send_bytes(&mut self, id: ConnId, to_target: bool, mut bytes: &[u8]) {
        let mut cut = false;
        if let Some(pipe) = self.pipe(id, to_target)
            && let Some(left) = &mut pipe.cut_after
        {
            let keep = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
            cut = keep < bytes.len();
            bytes = &bytes[..keep];
            *left -= keep as u64;
        }
        while !bytes.is_empty() {
            let len = match self.rng.below(4) {
                0 => self.rng.spread(1, bytes.len() as u64) as usize,
                _ => bytes.len(),
            };
            self.send(id, to_target, Item::Bytes(bytes[..len].to_vec()));
            bytes = &bytes[len..];
        }
        if cut {
            self.cut(id);
        }
    }

    /// Breaks a connection: nothing sent from now on arrives, and each end learns it in its time.
    fn cut(&mut self, id: ConnId) {
        trace!(self.trace, self.now, "network: conn {id} is cut");
        for to_target in [false, true] {
            let late = match self.rng.below(4) {
                0 => self.rng.spread(MS, 30 * S),
                _ => self.rng.spread(US, 10 * MS),
            };
            let item = if self.rng.permille(500) { Item::End } else { Item::Reset };
            self.send_at(id, to_target, item, self.now + late);
        }
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

    fn connect(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let portal = conn.portal;
        let dead = self.dead.get(&portal).is_some_and(|&until| until > self.now);
        let refused = self.now < self.refuse_until || portal == usize::MAX;
        if dead || (!self.target_up && !self.host_up) {
            trace!(self.trace, self.now, "network: conn {id} is not answered");
            return;
        }
        if refused || !self.target_up {
            trace!(self.trace, self.now, "network: conn {id} is refused");
            self.net.decide(id, Attempt::Refused);
            // What the system would say by readiness.
            conn.socket = None;
            return;
        }
        self.net.decide(id, Attempt::Up);
        conn.up = true;
        conn.at_target = true;
        self.guest.kicked = true;
        self.target(|target, cx| target.connected(id, portal, cx));
    }

    fn deliver_to_target(&mut self, id: ConnId) {
        loop {
            let now = self.now;
            let Some(item) = self.pipe(id, true).and_then(|pipe| pipe.due(now)) else { return };
            if !self.target_up {
                // Nobody there; what comes later is answered with a reset.
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.at_target = false;
                }
                continue;
            }
            match item {
                Item::Bytes(bytes) if self.target.has(id) => {
                    self.target(|target, cx| target.bytes(id, &bytes, cx));
                }
                Item::Bytes(_) => self.send(id, false, Item::Reset),
                Item::End | Item::Reset => {
                    self.send(id, false, Item::End);
                    // One that is busy notices late; until then, what it has of the session goes on.
                    let late = if self.rng.permille(500) { self.rng.spread(MS, 20 * S) } else { 0 };
                    self.at(self.now + late, Event::Noticed(id));
                }
            }
        }
    }

    fn deliver_to_engine(&mut self, id: ConnId) {
        loop {
            let now = self.now;
            let Some(conn) = self.conns.get_mut(&id) else { return };
            if !conn.stuck.is_empty() {
                // The socket is full: goes on as soon as the engine has read.
                return;
            }
            let Some(item) = conn.to_engine.due(now) else { return };
            match item {
                Item::Bytes(bytes) => conn.give(&bytes),
                Item::End | Item::Reset => {
                    trace!(self.trace, self.now, "network: conn {id} ends for the engine ({item:?})");
                    conn.socket = None;
                    conn.to_engine.queue.clear();
                }
            }
        }
    }

    fn power_up(&mut self) {
        if !self.target_up {
            trace!(self.trace, self.now, "target: up again");
            self.target_up = true;
            self.host_up = true;
        }
    }

    fn live(&mut self) -> Option<ConnId> {
        let live: Vec<_> =
            self.conns.iter().filter(|(_, c)| c.up && c.socket.is_some()).map(|(id, _)| *id).collect();
        (!live.is_empty()).then(|| self.rng.pick(&live))
    }

    /// A tick of the fault clock.
    fn disturb(&mut self) {
        let now = self.now;
        for &kind in Kind::ALL {
            if !is_clocked(kind) || !self.faults.roll(kind, now) {
                continue;
            }
            trace!(self.trace, now, "fault: {kind:?}");
            let live = self.live();
            match (kind, live) {
                (Kind::Cut, Some(id)) => {
                    let to_target = self.rng.permille(500);
                    let after = if self.rng.permille(300) { 0 } else { self.rng.spread(1, 20_000) };
                    if after == 0 {
                        self.cut(id);
                    } else if let Some(pipe) = self.pipe(id, to_target) {
                        pipe.cut_after.get_or_insert(after);
                    }
                }
                (Kind::HalfOpen, Some(id)) => {
                    let until = now + self.rng.pick(&[S, 5 * S, 30 * S, 1_000_000 * S]);
                    let only = self.rng.below(4);
                    for to_target in [false, true] {
                        if only != u64::from(to_target) {
                            self.hold(id, to_target, until);
                        }
                    }
                }
                (Kind::Pause, Some(id)) => {
                    let until = now + self.rng.spread(MS, 4 * S);
                    for to_target in [false, true] {
                        self.hold(id, to_target, until);
                    }
                }
                (Kind::StopReading, Some(id)) => {
                    let until = now + self.rng.spread(MS, 4 * S);
                    if let Some(conn) = self.conns.get_mut(&id) {
                        conn.stop_reading_until = until;
                    }
                    self.at(until, Event::ReadAgain(id));
                }
                (Kind::BitFlip, Some(id)) if self.target.has_digests(id) => self.flip(id),
                (Kind::PathDeath, _) => self.kill_path(),
                (Kind::AccessChange, _) => {
                    let group = self.rng.below(self.target.unit.groups.len() as u64) as usize;
                    let before = self.scenario.unit.groups[group].1;
                    let state = self.rng.pick(&[0, 1, 2, 3, 0xF]);
                    self.target.set_state(group, state);
                    let until = now + self.rng.spread(MS, 8 * S);
                    self.at(until, Event::Access(group, before));
                }
                (Kind::Refuse, _) => self.refuse_until = now + self.rng.spread(MS, 10 * S),
                (Kind::PowerLoss, _) if self.target_up => self.power_loss(),
                (Kind::Crash, _) if self.target_up => {
                    self.target.restart(false);
                    let ids: Vec<_> = self.conns.keys().copied().collect();
                    for id in ids {
                        self.send(id, false, Item::Reset);
                    }
                    self.down();
                }
                (Kind::DropConnection, Some(id)) if self.target.has(id) => {
                    self.target.closed(id);
                    self.send(id, false, Item::End);
                }
                (Kind::Attention, _) => {
                    let codes = [0x2900, 0x2A09, 0x2A01, 0x3F0E, 0x2907, 0x2F00, 0xABCD];
                    self.target.attention(self.rng.pick(&codes));
                }
                (Kind::Stall, _) => {
                    let until = now + self.rng.spread(10 * MS, 20 * S);
                    self.target.stall(until);
                }
                (
                    Kind::AskLogout | Kind::TellDropped | Kind::Chatter | Kind::Ping | Kind::CloseWindow,
                    Some(id),
                ) => {
                    self.target(|target, cx| target.spontaneous(kind, id, cx));
                    if kind == Kind::CloseWindow {
                        let until = now + self.rng.spread(10 * MS, 10 * S);
                        self.at(until, Event::OpenWindows);
                    }
                }
                _ => {}
            }
        }
    }

    /// A portal dies: with its connections cut, or in silence.
    fn kill_path(&mut self) {
        let portal = self.rng.below(self.target.settings.portals.len() as u64) as usize;
        let until = self.now + self.rng.spread(10 * MS, 10 * S);
        self.dead.insert(portal, until);
        let silent = self.rng.permille(500);
        trace!(self.trace, self.now, "network: portal {portal} is dead, silent {silent}");
        let ids: Vec<_> = self.conns.iter().filter(|(_, c)| c.portal == portal).map(|(id, _)| *id).collect();
        for id in ids {
            if silent {
                self.hold(id, true, until);
                self.hold(id, false, until);
            } else {
                self.cut(id);
            }
        }
    }

    fn hold(&mut self, id: ConnId, to_target: bool, until: u64) {
        if let Some(pipe) = self.pipe(id, to_target) {
            pipe.hold(until);
        }
        self.at(until, if to_target { Event::ToTarget(id) } else { Event::ToEngine(id) });
    }

    /// A bit of what is on its way to the engine turns over.
    fn flip(&mut self, id: ConnId) {
        let (at, bit) = (self.rng.next() as usize, self.rng.below(8));
        let Some(pipe) = self.pipe(id, false) else { return };
        for (_, item) in &mut pipe.queue {
            if let Item::Bytes(bytes) = item {
                let at = at % bytes.len();
                bytes[at] ^= 1 << bit;
                return;
            }
        }
    }

    fn power_loss(&mut self) {
        let lost = self.target.restart(true);
        trace!(self.trace, self.now, "target: power lost, {lost} blocks fall back");
        let target = &self.target;
        self.guest
            .oracle
            .power_loss(&mut self.guest.active, |write, blocks| target.has_answered(write, blocks));
        self.down();
        self.host_up = false;
    }

    /// The target is away for a while.
    fn down(&mut self) {
        self.target_up = false;
        let until = self.now + self.rng.spread(MS, 8 * S);
        self.at(until, Event::PowerUp);
    }

    /// Goes on to the next stage if it is time; whether all is done.
    fn advance_stage(&mut self) -> Result<bool, String> {
        match self.stage {
            Stage::Load => {
                let over = self.issued >= self.scenario.ops
                    && (self.guest.in_flight() == 0 || self.now > self.stage_since + 60 * S);
                if over || self.now > 3600 * S {
                    self.quiet();
                } else if self.issued >= self.scenario.ops && self.stage_since == 0 {
                    self.stage_since = self.now.max(1);
                }
                Ok(false)
            }
            Stage::Quiet => {
                // Where requests fail while the target is away, it has to be back.
                if self.guest.in_flight() == 0 && self.is_up() {
                    self.guest.check_idle();
                    self.guest.may_fail = false;
                    self.stage = Stage::Proof { next: 0 };
                    self.stage_since = self.now;
                    self.guest.submit(Op::Flush);
                    return Ok(false);
                }
                self.in_time()?;
                Ok(false)
            }
            Stage::Proof { next } => {
                if self.guest.in_flight() > 0 {
                    self.in_time()?;
                    return Ok(false);
                }
                self.stage_since = self.now;
                if next == 0 {
                    // What was flushed survives this.
                    self.power_loss();
                    self.power_up();
                }
                if next >= self.scenario.unit.blocks {
                    self.guest.check_idle();
                    return match self.guest.violation.take() {
                        Some(what) => Err(what),
                        None => Ok(true),
                    };
                }
                let blocks = 16.min(self.scenario.unit.blocks - next);
                self.guest.submit(Op::Read { lba: next, blocks });
                self.stage = Stage::Proof { next: next + blocks };
                Ok(false)
            }
        }
    }

    fn is_up(&self) -> bool {
        vcp_iscsi::engine::Engine::status(self.device.engine())["state"] == "up"
    }

    fn in_time(&self) -> Result<(), String> {
        if self.now < self.stage_since + ANSWERED_WITHIN {
            return Ok(());
        }
        Err(format!(
            "no answer within {} s after the faults stopped: {:?}; engine: {}",
            ANSWERED_WITHIN / S,
            self.guest.oldest(),
            vcp_iscsi::engine::Engine::status(self.device.engine())
        ))
    }

    /// The faults stop, and what they left is put right.
    fn quiet(&mut self) {
        trace!(self.trace, self.now, "no more faults");
        self.stage = Stage::Quiet;
        self.stage_since = self.now;
        self.faults.active = false;
        self.power_up();
        self.refuse_until = 0;
        self.dead.clear();
        for (group, (_, state)) in self.scenario.unit.groups.clone().into_iter().enumerate() {
            self.target.set_state(group, state);
        }
        self.target.stall(self.now);
        self.target(Target::open_windows);
    }
}

fn is_clocked(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Cut
            | Kind::HalfOpen
            | Kind::Pause
            | Kind::Refuse
            | Kind::StopReading
            | Kind::BitFlip
            | Kind::PowerLoss
            | Kind::Crash
            | Kind::DropConnection
            | Kind::AskLogout
            | Kind::TellDropped
            | Kind::Chatter
            | Kind::Ping
            | Kind::CloseWindow
            | Kind::Stall
            | Kind::Attention
            | Kind::PathDeath
            | Kind::AccessChange
    )
}
