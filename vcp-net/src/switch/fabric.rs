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
use vcp_core::queue::burst::{Batch, MAX_BURST};
use vcp_core::vu::port::Port;

use super::account::Account;
use super::command;
use super::enqueue::Targets;
use super::line::{From, Line, Member};
use super::table::Station;
use super::watch::Watch;
use super::work::{Frames, PortId, PortSet};
use crate::capture::Capture;
use crate::frame::{Mac, Offloads, OutFrame};
use crate::port::{NetPort, PortSpec, Vlan, receive_queue, transmit_queue};
use crate::uplink::none::NoUplink;
use crate::uplink::{self, Direct, Ingress, Room, Taken, Uplink};

/// One switch.
pub(super) struct Switch {
    /// Its operations and tables.
    pub(super) line: Line,
    /// Its uplink.
    pub(super) uplink: Box<dyn Uplink>,
    /// Its counters.
    pub(super) account: Account,
}

/// See the module.
pub struct SwitchFabric {
    pub(super) switches: Vec<Switch>,
    pub(super) members: Vec<Member>,
    /// Who looks at frames.
    pub(super) watch: Watch,
    batch: Batch,
    /// Whose turn is first.
    turn: usize,
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
        let switch = |(at, uplink): (usize, Box<dyn Uplink>)| {
            let own = ports.iter().enumerate().filter(|(_, port)| usize::from(port.switch) == at);
            let mut members: PortSet = own.map(|(port, _)| PortId(port as u8)).collect();
            if uplink.kind() != "none" {
                members = members.with(PortId::UPLINK);
            }
            let line = Line::new(members, secret ^ at as u64, now);
            Switch { line, uplink, account: account.clone() }
        };
        let switches = uplinks.into_iter().enumerate().map(switch).collect();
        let members = ports.iter().map(|spec| Member::new(spec.clone(), now)).collect();
        let watch = Watch::default();
        let mut this = Self { switches, members, watch, batch: Batch::default(), turn: 0, now };
        this.fix_addresses();
        this
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
                && let Some(switch) = self.switches.get_mut(usize::from(spec.switch))
            {
                let vid = match spec.vlan {
                    Vlan::Access(vid) => vid,
                    Vlan::Trunk { .. } => 0,
                };
                switch.line.table.fix(vid, mac, PortId(at as u8));
            }
        }
    }

    /// Lets port `at` send.
    fn serve(&mut self, at: usize, ports: &mut [Port<NetPort>], now: Instant) -> bool {
        let Self { switches, members, watch, batch, .. } = self;
        let Some(switch) = switches.get_mut(usize::from(members[at].spec.switch)) else { return false };
        let port = PortId(at as u8);
        let device = ports[at].device();
        let header = device.header_bytes();
        let host = device.host_offloads();
        let mut moved = false;
        members[at].credit.begin();
        for pair in 0..device.pairs() {
            loop {
                let (_, rings) = ports[at].parts();
                let Some(ring) = transmit_queue(rings, pair) else { break };
                let fetched = match ring.fetch(batch, MAX_BURST) {
                    Ok(0) => {
                        ring.want(true);
                        break;
                    }
                    Ok(fetched) => fetched,
                    Err(error) => {
                        rings.broke(2 * pair + 1, &error);
                        break;
                    }
                };
                let lens = (0..fetched).map(|at| batch.frame(at).len_bytes() as u64);
                let afford = members[at].credit.afford(lens);
                batch.truncate(afford);
                let from = From { port, pair, host };
                let frames = Frames::Ring(batch, header);
                let Switch { line, uplink, account } = switch;
                let (uplink, capture) = (&mut **uplink, watch.capture());
                let mut targets = Targets { members, ports, uplink, account, capture, from: port, now };
                let done = line.run(from, &frames, &mut targets);
                let bytes: u64 = (0..done).map(|at| batch.frame(at).len_bytes() as u64).sum();
                let (_, rings) = ports[at].parts();
                // It may have been stopped meanwhile: a frame to itself does not happen, so only by its own fault.
                let Some(ring) = transmit_queue(rings, pair) else { break };
                ring.give_back(batch, done);
                // One that waits for room elsewhere is not woken by its own driver.
                ring.want(done == afford);
                if done != 0 {
                    moved = true;
                    ports[at].touch();
                }
                let more = members[at].credit.spend(done as u64, bytes);
                if done < afford || fetched < MAX_BURST || !more {
                    break;
                }
            }
        }
        if !moved {
            members[at].credit.end();
        }
        moved
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
                    // It may hold the memory of that very guest.
                    self.batch.release();
                    switch.line.flush(port);
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
        for at in 0..count {
            moved |= self.serve((self.turn + at) % count, ports, now);
        }
        self.turn = if self.turn + 1 < count { self.turn + 1 } else { 0 };
        let Self { switches, members, watch, .. } = self;
        for switch in switches {
            let Switch { line, uplink, account } = switch;
            uplink.flush(now);
            let capture = watch.capture();
            moved |= uplink.receive(&mut Inlet { line, account, capture, members, ports, now }, now);
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
            self.switches.iter().map(|switch| switch.export(fds, now)).collect();
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
            *member = Member { partial, ..Member::new(spec, now) };
        }
        for (switch, state) in self.switches.iter_mut().zip(switches) {
            switch.import(state, fds, now)?;
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
    fn export(&self, fds: &mut Fds, now: Instant) -> Result<Value, NotNow> {
        let stations = self.line.table.stations(self.line.seconds(now)).filter(|station| !station.fixed);
        let state = SwitchState {
            kind: self.uplink.kind().to_owned(),
            uplink: self.uplink.export(fds, now)?,
            stations: stations.map(|it| (it.vid, it.mac, it.port.0, it.age_s)).collect(),
            account: self.account.clone(),
        };
        serde_json::to_value(state).map_err(|error| NotNow::Never(error.to_string()))
    }

    fn import(&mut self, state: SwitchState, fds: &mut Fds, now: Instant) -> Result<(), BadState> {
        let SwitchState { kind, uplink, stations, account } = state;
        if !account.is_like(&self.account) {
            return Err(BadState::Text("counters of other ports".into()));
        }
        self.account = account;
        self.uplink = uplink::restore(&kind, uplink, fds)?;
        let now_s = self.line.seconds(now);
        for (vid, mac, port, age_s) in stations {
            let port = PortId(port);
            if self.line.members.has(port) && port.0 < 128 && mac.is_station() {
                self.line.table.restore(&Station { vid, mac, port, age_s, fixed: false }, now_s);
            }
        }
        Ok(())
    }
}

/// A switch, as its uplink sees it.
struct Inlet<'a> {
    line: &'a mut Line,
    account: &'a mut Account,
    capture: Option<&'a mut Capture>,
    members: &'a mut [Member],
    ports: &'a mut [Port<NetPort>],
    now: Instant,
}

impl Ingress for Inlet<'_> {
    fn frame(&mut self, frame: &OutFrame<'_>) -> Taken {
        let from = From { port: PortId::UPLINK, pair: 0, host: Some(Offloads::ALL) };
        let Self { line, account, capture, members, ports, now } = self;
        let capture = capture.as_deref_mut();
        // Nothing that an uplink brings goes back to it.
        let uplink = &mut NoUplink;
        let mut targets = Targets { members, ports, uplink, account, capture, from: from.port, now: *now };
        match line.run(from, &Frames::One(frame), &mut targets) {
            0 => Taken::Full,
            _ => Taken::Done,
        }
    }

    fn find(&self, vid: u16, mac: Mac) -> Option<PortId> {
        self.line.table.get(vid, mac, self.line.seconds(self.now)).filter(|port| *port != PortId::UPLINK)
    }

    fn offloads(&self, port: PortId) -> Offloads {
        self.ports.get(port.index()).map_or(Offloads::NONE, |port| port.device().offloads())
    }

    fn direct(&mut self, port: PortId, len_bytes: usize) -> Room<'_> {
        let Some(member) = self.members.get_mut(port.index()) else { return Room::Unfit };
        // What is captured takes the line.
        if self.capture.is_some() {
            return Room::Unfit;
        }
        let simple = member.spec.vlan == Vlan::default() && member.spec.link && self.line.members.has(port);
        let Some(target) = self.ports.get_mut(port.index()) else { return Room::Unfit };
        target.touch();
        let (device, rings) = target.parts();
        if !simple || device.pairs() != 1 || device.filters().is_some() {
            return Room::Unfit;
        }
        let (header, count_at) = (device.header_bytes(), device.count_at());
        let mut error = None;
        let reserved =
            receive_queue(rings, 0).map(|ring| match ring.reserve(header + len_bytes, count_at.is_some()) {
                Ok(Ok(chains)) => Some(chains),
                Ok(Err(_)) => {
                    ring.want(true);
                    None
                }
                Err(broken) => {
                    error = Some(broken);
                    None
                }
            });
        if let Some(error) = error {
            rings.broke(0, &error);
            return Room::Unfit;
        }
        let (Some(chains), Some(ring)) = (reserved.flatten(), receive_queue(rings, 0)) else {
            return Room::Full;
        };
        ring.want(false);
        Room::Ready(Direct { ring, header, count_at, chains, len_bytes, port, account: self.account })
    }
}
