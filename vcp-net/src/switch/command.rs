//! What people ask a switch: status, stations, groups, counters; and what they change while it runs.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::{Map, Value, json};
use vcp_core::ask::Rest;
use vcp_core::metrics::{Family, Samples, Unit};
use vcp_core::vu::port::Port;

use super::account::Tally;
use super::back::Member;
use super::cost::Stage;
use super::fabric::{Switch, SwitchFabric};
use super::line::{Line, Sender};
use super::work::PortId;
use crate::port::{NetPort, OnFull, PortSpec, Rate, Vlan};

static FRAMES: Family =
    Family::counter("vcp_net_frames", Unit::None, "Frames by port, pair of queues and direction");
static BYTES: Family =
    Family::counter("vcp_net_frame", Unit::Bytes, "Bytes of frames by port, pair of queues and direction");
static DROPS: Family = Family::counter(
    "vcp_net_drops",
    Unit::None,
    "Frames dropped by port, pair of queues, side, operation and reason",
);
static FINISHED: Family = Family::counter(
    "vcp_net_finished",
    Unit::None,
    "Frames whose checksum or segmentation was done in software, by the port that needed it",
);
static TIMED_FRAMES: Family = Family::counter(
    "vcp_net_timed_frames",
    Unit::None,
    "Frames in the bursts of which the operations were timed",
);
static TIMED_NS: Family = Family::counter(
    "vcp_net_timed_nanoseconds",
    Unit::None,
    "Nanoseconds that an operation took with the frames that were timed",
);
static SECOND_PASSES: Family =
    Family::counter("vcp_net_second_thread_passes", Unit::None, "Passes in which a second thread decided");
static SECOND_BURSTS: Family =
    Family::counter("vcp_net_second_thread_bursts", Unit::None, "Bursts that a second thread decided about");
static STATIONS: Family = Family::gauge("vcp_net_stations", Unit::None, "Stations that are known, by switch");

/// See [`Fabric::status`](vcp_core::fabric::Fabric::status).
pub(super) fn status(fabric: &SwitchFabric, ports: &[Port<NetPort>]) -> Value {
    let now = fabric.now();
    let switches = fabric.switches.iter().zip(&fabric.front.lines).enumerate().map(|(at, (switch, line))| {
        let own =
            fabric.members.iter().zip(ports).filter(|(member, _)| usize::from(member.spec.switch) == at);
        json!({
            "switch": at,
            "uplink": switch.uplink.status(),
            "ports": own.map(|(member, port)| port_json(member, port)).collect::<Vec<_>>(),
            "stations": line.table.stations(line.seconds(now)).count(),
            "operations": operations(switch, line),
        })
    });
    switches.collect()
}

fn port_json(member: &Member, port: &Port<NetPort>) -> Value {
    let mut value = serde_json::to_value(&member.spec).unwrap_or_default();
    value["attached"] = port.device().is_attached().into();
    value["full"] = member.full_since.is_some().into();
    value
}

/// The counters of the operations that are not drops.
fn operations(switch: &Switch, line: &Line) -> Value {
    let enqueue = &switch.back.enqueue;
    json!({
        "parse": { "unfinished": line.parse.unfinished },
        "police": { "seen": line.police.seen },
        "learn": { "new": line.learn.new, "moved": line.learn.moved, "no_room": line.learn.no_room },
        "snoop": { "reports": line.snoop.reports, "queries": line.snoop.queries },
        "lookup": { "known": line.lookup.known, "unknown": line.lookup.unknown, "group": line.lookup.group },
        "rewrite": {
            "tagged": enqueue.rewrite.tagged, "untagged": enqueue.rewrite.untagged,
            "retagged": enqueue.rewrite.retagged,
        },
        "enqueue": { "held": enqueue.held },
        // Of one burst in many: nanoseconds in each operation, and the frames that went through it then.
        "timed": {
            "frames": line.costs.frames(),
            "ns": Stage::ALL.map(|stage| (stage.name(), ns(switch, line, stage))).into_iter().collect::<BTreeMap<_, _>>(),
        },
    })
}

/// What an operation took with the bursts that were timed.
fn ns(switch: &Switch, line: &Line, stage: Stage) -> u64 {
    line.costs.ns(stage) + switch.back.costs.ns(stage)
}

/// What the second thread did, if there is one.
fn second(fabric: &SwitchFabric) -> Value {
    fabric.second.as_ref().map_or(Value::Null, |second| {
        let counts = second.counts;
        json!({ "passes": counts.passes, "bursts": counts.bursts, "asleep": counts.asleep })
    })
}

/// See [`Fabric::collect`](vcp_core::fabric::Fabric::collect).
pub(super) fn collect(fabric: &SwitchFabric, samples: &mut Samples) {
    for (number, (switch, line)) in fabric.switches.iter().zip(&fabric.front.lines).enumerate() {
        let number = number.to_string();
        for (name, pair, tally) in tallies(fabric, switch, &number) {
            let pair = pair.to_string();
            let labels = [("switch", number.as_str()), ("port", name.as_str()), ("pair", pair.as_str())];
            let with = |more: &[(&'static str, &'static str)]| {
                let mut all = labels.to_vec();
                all.extend_from_slice(more);
                all
            };
            for (way, frames, bytes) in
                [("in", tally.in_frames, tally.in_bytes), ("out", tally.out_frames, tally.out_bytes)]
            {
                samples.add(&FRAMES, &with(&[("direction", way)]), frames);
                samples.add(&BYTES, &with(&[("direction", way)]), bytes);
            }
            samples.add(&FINISHED, &labels, tally.finished);
            for (to, reason, count) in tally.each_drop().filter(|(.., count)| *count != 0) {
                let side = if to { "to" } else { "from" };
                let labels =
                    with(&[("side", side), ("operation", reason.stage()), ("reason", reason.name())]);
                samples.add(&DROPS, &labels, count);
            }
        }
        let stations = line.table.stations(line.seconds(fabric.now())).count();
        samples.add(&STATIONS, &[("switch", &number)], stations as u64);
        samples.add(&TIMED_FRAMES, &[("switch", &number)], line.costs.frames());
        for stage in Stage::ALL {
            let labels = [("switch", number.as_str()), ("operation", stage.name())];
            samples.add(&TIMED_NS, &labels, ns(switch, line, stage));
        }
    }
    if let Some(second) = &fabric.second {
        samples.add(&SECOND_PASSES, &[], second.counts.passes);
        samples.add(&SECOND_BURSTS, &[], second.counts.bursts);
    }
}

/// Name, pair and counters of each member of a switch.
fn tallies<'a>(
    fabric: &'a SwitchFabric,
    switch: &'a Switch,
    number: &str,
) -> impl Iterator<Item = (String, u16, &'a Tally)> {
    let own = fabric.members.iter().enumerate().filter({
        let number = number.to_owned();
        move |(_, member)| member.spec.switch.to_string() == number
    });
    let ports = own.flat_map(move |(at, member)| {
        let of = move |pair| (member.spec.name.clone(), pair, switch.account.get(PortId(at as u8), pair));
        (0..member.spec.pairs).map(of)
    });
    ports.chain([("uplink".to_owned(), 0, switch.account.get(PortId::UPLINK, 0))])
}

/// See [`Fabric::command`](vcp_core::fabric::Fabric::command).
pub(super) fn command(
    fabric: &mut SwitchFabric,
    ports: &mut [Port<NetPort>],
    name: &str,
    args: &Map<String, Value>,
    now: Instant,
) -> Option<Result<Rest, String>> {
    let answer = match name {
        "ports" => Ok(json!({ "switches": status(fabric, ports), "second_thread": second(fabric) })),
        "macs" => Ok(macs(fabric, now)),
        "groups" => Ok(groups(fabric, now)),
        "counters" => counters(fabric),
        "flush" => flush(fabric, args),
        "set" => set(fabric, ports, args, now),
        "capture" => {
            let spec = serde_json::from_value(Value::Object(args.clone()));
            let spec = spec.map_err(|error| format!("not a capture: {error}"));
            return Some(spec.and_then(|spec| fabric.capture(spec, now)));
        }
        "capture-stop" => return Some(fabric.watch.stop()),
        _ => return uplink(fabric, name, args, now),
    };
    Some(answer.map(Rest::done))
}

/// The name of a member.
fn name_of(fabric: &SwitchFabric, port: PortId) -> &str {
    fabric.members.get(port.index()).map_or("uplink", |member| &member.spec.name)
}

fn macs(fabric: &SwitchFabric, now: Instant) -> Value {
    let mut all = Vec::new();
    for (number, line) in fabric.front.lines.iter().enumerate() {
        for station in line.table.stations(line.seconds(now)) {
            all.push(json!({
                "switch": number, "vlan": station.vid, "mac": station.mac.to_string(),
                "port": name_of(fabric, station.port), "age_s": station.age_s, "fixed": station.fixed,
            }));
        }
    }
    json!({ "macs": all })
}

fn groups(fabric: &SwitchFabric, now: Instant) -> Value {
    let mut all = Vec::new();
    for (number, line) in fabric.front.lines.iter().enumerate() {
        for group in line.snoop.groups(line.seconds(now)) {
            let ports: Vec<&str> = group.ports.iter().map(|&port| name_of(fabric, port)).collect();
            all.push(
                json!({ "switch": number, "vlan": group.vid, "mac": group.mac.to_string(), "ports": ports }),
            );
        }
    }
    json!({ "groups": all })
}

fn counters(fabric: &SwitchFabric) -> Result<Value, String> {
    let mut all = Vec::new();
    for (number, switch) in fabric.switches.iter().enumerate() {
        let text = number.to_string();
        let ports: Vec<Value> = tallies(fabric, switch, &text)
            .map(|(name, pair, tally)| {
                let mut value = tally.json();
                value["port"] = name.into();
                value["pair"] = pair.into();
                value
            })
            .collect();
        let balance = switch.account.balance().err();
        all.push(
            json!({ "switch": number, "balanced": balance.is_none(), "imbalance": balance, "ports": ports }),
        );
    }
    Ok(json!({ "switches": all }))
}

/// Forgets stations: of one port, or all.
fn flush(fabric: &mut SwitchFabric, args: &Map<String, Value>) -> Result<Value, String> {
    let port = match args.get("port") {
        None => None,
        Some(_) => Some(find(fabric, args)?),
    };
    for line in &mut fabric.front.lines {
        line.table.flush(port);
    }
    Ok(Value::Null)
}

fn find(fabric: &SwitchFabric, args: &Map<String, Value>) -> Result<PortId, String> {
    let name = args.get("port").and_then(Value::as_str).ok_or("`port` is missing")?;
    let at = fabric.members.iter().position(|member| member.spec.name == name);
    at.map(|at| PortId(at as u8)).ok_or_else(|| {
        let there: Vec<&str> = fabric.members.iter().map(|member| &*member.spec.name).collect();
        format!("no port `{name}` (there is {})", there.join(", "))
    })
}

/// Changes a port while it runs: VLANs, rate, what happens when it is full, its link.
fn set(
    fabric: &mut SwitchFabric,
    ports: &mut [Port<NetPort>],
    args: &Map<String, Value>,
    now: Instant,
) -> Result<Value, String> {
    let at = find(fabric, args)?.index();
    let mut spec: PortSpec = fabric.members[at].spec.clone();
    for (key, value) in args {
        let bad = |error: serde_json::Error| format!("`{key}`: {error}");
        let value = value.clone();
        match key.as_str() {
            "port" => {}
            "vlan" => spec.vlan = serde_json::from_value::<Vlan>(value).map_err(bad)?,
            "on_full" => spec.on_full = serde_json::from_value::<OnFull>(value).map_err(bad)?,
            "rate" => spec.rate = serde_json::from_value::<Rate>(value).map_err(bad)?,
            "protect" => spec.protect = serde_json::from_value(value).map_err(bad)?,
            "link" => spec.link = serde_json::from_value(value).map_err(bad)?,
            _ => return Err(format!("`{key}` cannot be changed (vlan, on_full, rate, protect, link can)")),
        }
    }
    spec.check()?;
    let member = &mut fabric.members[at];
    let partial = std::mem::take(&mut member.partial);
    *member = Member { partial, attached: member.attached, ..Member::new(spec.clone()) };
    fabric.front.senders[at] = Sender::new(spec.clone(), now);
    let switch = usize::from(spec.switch);
    let (device, _) = ports[at].parts();
    device.change(spec);
    if let Some(line) = fabric.front.lines.get_mut(switch) {
        line.table.unfix(PortId(at as u8));
        line.flush(PortId(at as u8));
    }
    fabric.fix_addresses();
    Ok(serde_json::to_value(&fabric.members[at].spec).unwrap_or_default())
}

/// A command of an uplink: of the switch that is named, or of the only one that knows it.
fn uplink(
    fabric: &mut SwitchFabric,
    name: &str,
    args: &Map<String, Value>,
    now: Instant,
) -> Option<Result<Rest, String>> {
    let wanted = args.get("switch").and_then(Value::as_u64);
    let mut args = args.clone();
    args.remove("switch");
    let chosen = fabric.switches.iter_mut().enumerate();
    let mut chosen = chosen.filter(|(at, _)| wanted.is_none_or(|wanted| wanted == *at as u64));
    chosen.find_map(|(_, switch)| switch.uplink.command(name, &args, now))
}
