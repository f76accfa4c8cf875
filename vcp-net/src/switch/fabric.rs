//! [`SwitchFabric`]: all switches of a process, as the data thread sees them: each port has its turn, then the uplinks.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use vcp_core::ask::Rest;
use vcp_core::device::{RingDevice, Wait};
use vcp_core::fabric::Fabric;
use vcp_core::handover::Fds;
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::metrics::Samples;
use vcp_core::poll::{check_cpu, pin_to};
use vcp_core::queue::burst::MAX_BURST;
use vcp_core::vu::port::Port;

use super::account::Account;
use super::back::{Back, Member};
use super::command;
use super::enqueue::Targets;
use super::front::{Burst, Front};
use super::inlet::Inlet;
use super::line::{From, Line, Sender};
use super::second::{Answer, Lent, Pass, Second};
use super::table::Station;
use super::watch::Watch;
use super::work::{PortId, PortSet};
use crate::frame::Mac;
use crate::port::{NetPort, PortSpec, Vlan, transmit_queue};
use crate::uplink::{self, Uplink};

/// Usual value of [`SwitchFabric::busy_from`]: below it, lending costs more than it gains.
const BUSY: usize = MAX_BURST;

/// One switch, but for its [`Line`].
pub(super) struct Switch {
    /// What carries out.
    pub(super) back: Back,
    /// Its uplink.
    pub(super) uplink: Box<dyn Uplink>,
    /// Its counters.
    pub(super) account: Account,
}

/// See the module.
pub struct SwitchFabric {
    pub(super) switches: Vec<Switch>,
    pub(super) members: Vec<Member>,
    /// What decides; whole between two passes.
    pub(super) front: Front,
    /// What decides in passes of many frames, if there is one.
    pub(super) second: Option<Second>,
    /// Who looks at frames.
    pub(super) watch: Watch,
    burst: Burst,
    /// Whose turn is first.
    turn: usize,
    /// Frames that the last pass moved.
    busy: usize,
    /// From how many on the next one is worth a second thread.
    pub(super) busy_from: usize,
    now: Instant,
}

impl std::fmt::Debug for SwitchFabric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SwitchFabric").field("members", &self.members).finish_non_exhaustive()
    }
}

impl SwitchFabric {
    /// Switches with these uplinks, of which those ports are, by [`PortSpec::switch`]. Their tables are keyed by `secret`.
    #[must_use]
    pub fn new(ports: &[PortSpec], uplinks: Vec<Box<dyn Uplink>>, secret: u64, now: Instant) -> Self {
        let account = Account::new(ports.iter().map(|port| port.pairs));
        let line = |(at, uplink): (usize, &dyn Uplink)| {
            let own = ports.iter().enumerate().filter(|(_, port)| usize::from(port.switch) == at);
            let mut members: PortSet = own.map(|(port, _)| PortId(port as u8)).collect();
            if uplink.kind() != "none" {
                members = members.with(PortId::UPLINK);
            }
            Line::new(members, secret ^ at as u64, now)
        };
        let lines = uplinks.iter().map(|uplink| &**uplink).enumerate().map(line).collect();
        let switch = |uplink| Switch { back: Back::default(), uplink, account: account.clone() };
        let mut this = Self {
            switches: uplinks.into_iter().map(switch).collect(),
            members: ports.iter().map(|spec| Member::new(spec.clone())).collect(),
            front: Front {
                lines,
                senders: ports.iter().map(|spec| Sender::new(spec.clone(), now)).collect(),
            },
            second: None,
            watch: Watch::default(),
            burst: Burst::default(),
            turn: 0,
            busy: 0,
            busy_from: BUSY,
            now,
        };
        this.fix_addresses();
        this
    }

    /// Gives the first half of the line a thread of its own, which runs on hardware thread `cpu` if given.
    ///
    /// # Errors
    /// There is no such hardware thread, or no thread at all to be had.
    pub fn place_on_second(&mut self, cpu: Option<usize>) -> std::io::Result<()> {
        if let Some(cpu) = cpu {
            check_cpu(cpu).map_err(std::io::Error::other)?;
        }
        let place = move || {
            if let Some(Err(error)) = cpu.map(pin_to) {
                tracing::warn!(error = &error as &dyn std::error::Error, "the second thread runs anywhere");
            }
        };
        self.second = Some(Second::start(place)?);
        Ok(())
    }

    /// When it last moved.
    pub(super) fn now(&self) -> Instant {
        self.now
    }

    /// Addresses that are a port's alone.
    pub(super) fn fix_addresses(&mut self) {
        for (at, member) in self.members.iter().enumerate() {
            let spec = &member.spec;
            if let (true, Some(mac)) = (spec.protect, spec.mac)
                && let Some(line) = self.front.lines.get_mut(usize::from(spec.switch))
            {
                let vid = match spec.vlan {
                    Vlan::Access(vid) => vid,
                    Vlan::Trunk { .. } => 0,
                };
                line.table.fix(vid, mac, PortId(at as u8));
            }
        }
    }

    /// Lets port `at` send, on this thread; how many frames moved.
    fn serve(&mut self, at: usize, ports: &mut [Port<NetPort>], now: Instant) -> usize {
        let Self { switches, members, front, watch, burst, .. } = self;
        let Some(switch) = switches.get_mut(usize::from(members[at].spec.switch)) else { return 0 };
        let port = PortId(at as u8);
        let device = ports[at].device();
        let (header, host) = (device.header_bytes(), device.host_offloads());
        let mut moved = 0;
        front.senders[at].credit.begin();
        for pair in 0..device.pairs() {
            let from = From { port, pair, host };
            let (_, rings) = ports[at].parts();
            if let Some(ring) = transmit_queue(rings, pair) {
                ring.rewind();
            }
            loop {
                let (_, rings) = ports[at].parts();
                let Some(ring) = transmit_queue(rings, pair) else { break };
                match front.take(ring, from, header, burst, now) {
                    Ok(true) => {}
                    Ok(false) => {
                        ring.want(true);
                        break;
                    }
                    Err(error) => {
                        rings.broke(2 * pair + 1, &error);
                        break;
                    }
                }
                let Switch { back, uplink, account } = switch;
                let (uplink, capture) = (&mut **uplink, watch.capture());
                let mut targets = Targets { members, ports, uplink, account, capture, from: port, now };
                let done = back.deliver(&burst.work, &burst.frames(), from, burst.timed, &mut targets);
                let (_, rings) = ports[at].parts();
                // It may have been stopped meanwhile: a frame to itself does not happen, so only by its own fault.
                let Some(ring) = transmit_queue(rings, pair) else { break };
                front.settle(ring, burst, done);
                if done != 0 {
                    moved += done;
                    ports[at].touch();
                }
                if done < burst.len() || !burst.more {
                    break;
                }
            }
        }
        if moved == 0 {
            front.senders[at].credit.end();
        }
        moved
    }

    /// Lets all ports send, the second thread deciding. `None` if it does not take part.
    fn serve_with_second(&mut self, ports: &mut [Port<NetPort>], now: Instant) -> Option<usize> {
        // What is captured shows each frame with what became of it, burst by burst: on one thread.
        if self.busy < self.busy_from || self.watch.capture().is_some() {
            return None;
        }
        let Self { switches, members, front, second, turn, .. } = self;
        let second = second.as_mut().filter(|_| switches.len() == front.lines.len())?;
        if !second.engage() {
            return None;
        }
        let mut pass = Pass { front: std::mem::take(front), rings: std::mem::take(&mut second.spare), now };
        let count = ports.len();
        for at in (0..count).map(|at| (*turn + at) % count) {
            let (device, rings) = ports[at].parts();
            let (header, host) = (device.header_bytes(), device.host_offloads());
            for pair in 0..device.pairs() {
                if let Some(ring) = rings.lend(2 * pair + 1) {
                    let from = From { port: PortId(at as u8), pair, host };
                    pass.rings.push(Lent::new(ring, from, header));
                }
            }
        }
        second.begin(pass);
        let mut moved = 0;
        let mut pass = loop {
            let burst = match second.next() {
                Answer::Burst(burst) => burst,
                Answer::End(pass) => break pass,
            };
            let at = burst.from.port.index();
            let switch = members.get(at).and_then(|member| switches.get_mut(usize::from(member.spec.switch)));
            // What was taken behind a burst that is held comes back as it is.
            let done = match switch.filter(|_| !second.held.contains(&burst.ring)) {
                Some(Switch { back, uplink, account }) => {
                    let (uplink, from) = (&mut **uplink, burst.from);
                    let mut targets =
                        Targets { members, ports, uplink, account, capture: None, from: from.port, now };
                    back.deliver(&burst.work, &burst.frames(), from, burst.timed, &mut targets)
                }
                None => 0,
            };
            if done < burst.len() {
                second.held.push(burst.ring);
            }
            if done != 0 {
                moved += done;
                ports[at].touch();
            }
            second.done(burst, done);
        };
        for Lent { ring, from, error, .. } in pass.rings.drain(..) {
            let (_, rings) = ports[from.port.index()].parts();
            rings.take_back(2 * from.pair + 1, ring);
            if let Some(error) = error {
                rings.broke(2 * from.pair + 1, &error);
            }
        }
        (second.spare, *front) = (pass.rings, pass.front);
        Some(moved)
    }

    /// Notes ports whose front end came or went.
    fn note_attached(&mut self, ports: &[Port<NetPort>]) {
        for (at, (member, port)) in self.members.iter_mut().zip(ports).enumerate() {
            let attached = port.device().is_attached();
            if member.attached == attached {
                continue;
            }
            member.attached = attached;
            member.full_since = None;
            member.partial.fill(0);
            if let Some(switch) = self.switches.get_mut(usize::from(member.spec.switch)) {
                let port = PortId(at as u8);
                if !attached {
                    // It may hold the memory of that very guest; those of a second thread hold none between passes.
                    self.burst.release();
                    if let Some(line) = self.front.lines.get_mut(usize::from(member.spec.switch)) {
                        line.flush(port);
                    }
                }
                switch.uplink.attached(port, attached);
            }
        }
    }

    /// Puts a port's numbers where every VCP has them.
    fn show(&self, ports: &[Port<NetPort>]) {
        for (at, (member, port)) in self.members.iter().zip(ports).enumerate() {
            let Some(switch) = self.switches.get(usize::from(member.spec.switch)) else { continue };
            let (mut sent, mut got, mut lost) = ((0, 0), (0, 0), (0, 0));
            for pair in 0..member.spec.pairs {
                let tally = switch.account.get(PortId(at as u8), pair);
                sent = (sent.0 + tally.delivered, sent.1 + tally.in_bytes);
                got = (got.0 + tally.out_frames, got.1 + tally.out_bytes);
                lost = (lost.0 + tally.drops_from(), lost.1 + tally.drops_to());
            }
            let metrics = port.device().metrics();
            for (op, (ok, bytes), failed) in [(&metrics.write, sent, lost.0), (&metrics.read, got, lost.1)] {
                op.ok.set(ok);
                op.bytes.set(bytes);
                op.failed.set(failed);
            }
        }
    }
}

impl Fabric<NetPort> for SwitchFabric {
    fn poll(&mut self, ports: &mut [Port<NetPort>], now: Instant) -> bool {
        self.now = now;
        self.note_attached(ports);
        let mut moved = ports.iter_mut().fold(false, |moved, port| port.poll(now) | moved);
        let count = ports.len();
        self.busy = match self.serve_with_second(ports, now) {
            Some(frames) => frames,
            None => (0..count).map(|at| self.serve((self.turn + at) % count, ports, now)).sum(),
        };
        moved |= self.busy != 0;
        self.turn = if self.turn + 1 < count { self.turn + 1 } else { 0 };
        let Self { switches, members, front, watch, burst, .. } = self;
        for (switch, line) in switches.iter_mut().zip(&mut front.lines) {
            let Switch { back, uplink, account } = switch;
            uplink.flush(now);
            let (capture, work) = (watch.capture(), &mut burst.work);
            let mut inlet = Inlet { line, work, back, account, capture, members, ports, now };
            moved |= uplink.receive(&mut inlet, now);
        }
        self.watch.turn(now);
        if moved {
            self.show(ports);
        }
        moved
    }

    fn waits<'a>(&'a self, add: &mut dyn FnMut(Wait<'a>)) {
        self.switches.iter().for_each(|switch| switch.uplink.waits(add));
        if let Some(deadline) = self.watch.deadline() {
            add(Wait { deadline: Some(deadline), ..Wait::default() });
        }
        let stuck = self.members.iter().filter_map(|member| member.stuck_at(self.now)).min();
        if let Some(deadline) = stuck {
            add(Wait { deadline: Some(deadline), ..Wait::default() });
        }
    }

    fn status(&self, ports: &[Port<NetPort>]) -> Value {
        command::status(self, ports)
    }

    fn collect(&self, samples: &mut Samples) {
        command::collect(self, samples);
    }

    fn command(
        &mut self,
        ports: &mut [Port<NetPort>],
        name: &str,
        args: &Map<String, Value>,
        now: Instant,
    ) -> Option<Result<Rest, String>> {
        command::command(self, ports, name, args, now)
    }

    fn export(&self, fds: &mut Fds, now: Instant) -> Result<Value, NotNow> {
        let switches: Result<Vec<Value>, NotNow> =
            self.switches.iter().zip(&self.front.lines).map(|(it, line)| it.export(line, fds, now)).collect();
        let members: Vec<&PortSpec> = self.members.iter().map(|member| &member.spec).collect();
        let partial: Vec<&[u32]> = self.members.iter().map(|member| &member.partial[..]).collect();
        Ok(json!({ "switches": switches?, "ports": members, "partial": partial }))
    }

    fn import(&mut self, state: Value, fds: &mut Fds, now: Instant) -> Result<(), BadState> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct State {
            switches: Vec<SwitchState>,
            ports: Vec<PortSpec>,
            partial: Vec<Vec<u32>>,
        }
        let failed = |source| BadState::Json { what: "the switches", source };
        let State { switches, ports, partial } = serde_json::from_value(state).map_err(failed)?;
        if switches.len() != self.switches.len() || ports.len() != self.members.len() {
            return Err(BadState::Text("a state of other switches than those of the offer".into()));
        }
        for (at, ((member, spec), partial)) in self.members.iter_mut().zip(ports).zip(partial).enumerate() {
            if spec.pairs != member.spec.pairs || partial.len() != member.partial.len() {
                return Err(BadState::Text(format!("port {at} has other queues than the offer says")));
            }
            *member = Member { partial, ..Member::new(spec.clone()) };
            self.front.senders[at] = Sender::new(spec, now);
        }
        for ((switch, line), state) in self.switches.iter_mut().zip(&mut self.front.lines).zip(switches) {
            switch.import(line, state, fds, now)?;
        }
        self.fix_addresses();
        Ok(())
    }

    fn close(&mut self, _limit: Duration) {
        self.watch.close();
        self.switches.iter_mut().for_each(|switch| switch.uplink.close());
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SwitchState {
    kind: String,
    uplink: Value,
    /// VLAN, address, port, age.
    stations: Vec<(u16, Mac, u8, u32)>,
    account: Account,
}

impl Switch {
    fn export(&self, line: &Line, fds: &mut Fds, now: Instant) -> Result<Value, NotNow> {
        let stations = line.table.stations(line.seconds(now)).filter(|station| !station.fixed);
        let state = SwitchState {
            kind: self.uplink.kind().to_owned(),
            uplink: self.uplink.export(fds, now)?,
            stations: stations.map(|it| (it.vid, it.mac, it.port.0, it.age_s)).collect(),
            account: self.account.clone(),
        };
        serde_json::to_value(state).map_err(|error| NotNow::Never(error.to_string()))
    }

    fn import(
        &mut self,
        line: &mut Line,
        state: SwitchState,
        fds: &mut Fds,
        now: Instant,
    ) -> Result<(), BadState> {
        let SwitchState { kind, uplink, stations, account } = state;
        if !account.is_like(&self.account) {
            return Err(BadState::Text("counters of other ports".into()));
        }
        self.account = account;
        self.uplink = uplink::restore(&kind, uplink, fds)?;
        let now_s = line.seconds(now);
        for (vid, mac, port, age_s) in stations {
            let port = PortId(port);
            if line.members.has(port) && port.0 < 128 && mac.is_station() {
                line.table.restore(&Station { vid, mac, port, age_s, fixed: false }, now_s);
            }
        }
        Ok(())
    }
}
