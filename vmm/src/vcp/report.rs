//! What a keeper lets others know of its device's backend, without anybody waiting for anybody.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use vcp_core::pulse::PulsePage;

use super::cgroup::Group;
use super::keeper::Source;
use super::life::{Life, LifeFacts, State};
use super::process::VcpProcess;
use super::threads;
use crate::machine::status::{BackendStatus, ControlGroup, LoadSplit};
use crate::virtio::vhost_user::front::Front;

/// The board on which a keeper writes.
#[derive(Debug)]
pub(super) struct Board {
    front: Arc<Front>,
    facts: Mutex<Facts>,
}

#[derive(Debug, Default)]
struct Facts {
    state: Option<State>,
    life: LifeFacts,
    pid: Option<u32>,
    pulse: Option<Arc<PulsePage>>,
    cpu: Option<usize>,
    spaces: Vec<&'static str>,
    control: Option<Arc<OwnedFd>>,
    cgroup: Option<Arc<Group>>,
    network: Option<&'static str>,
    not_confined: Vec<String>,
}

impl Board {
    pub(super) fn new(front: Arc<Front>) -> Self {
        Self { front, facts: Mutex::default() }
    }

    pub(super) fn put(&self, life: &Life, process: Option<&VcpProcess>, source: &Source) {
        let facts = Facts {
            state: Some(life.state().clone()),
            life: life.facts.clone(),
            pid: process.map(VcpProcess::pid),
            pulse: process.map(VcpProcess::pulse),
            cpu: match source {
                Source::Process(_, vcp) => vcp.cpu,
                Source::Socket(_) => None,
            },
            spaces: process.map(|process| process.spaces().names()).unwrap_or_default(),
            control: process.map(|process| process.control().descriptor()),
            cgroup: process.and_then(VcpProcess::cgroup),
            network: match source {
                Source::Process(_, vcp) => Some(match vcp.dialer.as_ref().map(|dialer| dialer.reach().any) {
                    Some(false) => "portals",
                    Some(true) => "any",
                    None => "host",
                }),
                Source::Socket(_) => None,
            },
            not_confined: match (source, process) {
                (Source::Process(_, vcp), Some(process)) => {
                    vcp.not_confined.iter().chain(process.missing()).cloned().collect()
                }
                _ => Vec::new(),
            },
        };
        *self.facts.lock().unwrap_or_else(PoisonError::into_inner) = facts;
    }

    pub(super) fn status(&self) -> BackendStatus {
        let facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let state = facts.state.as_ref();
        let next = match state {
            Some(State::Away(at)) => Some(at.saturating_duration_since(now).as_millis() as u64),
            _ => None,
        };
        let beat = facts.pulse.as_ref().map(|pulse| pulse.read());
        let (pid, life) = (facts.pid, &facts.life);
        BackendStatus {
            connected: self.front.is_connected(),
            state: state.map_or("over", State::name).to_owned(),
            pid,
            thread_id: pid.and_then(|pid| threads::find(pid, threads::DATA)),
            cpu: facts.cpu,
            restarts: life.restarts,
            control: facts.control.clone(),
            stalls: life.stalls,
            upgrades: life.upgrades,
            next_start_ms: next,
            last_death: life.last_death.clone(),
            last_away_us: life.last_away.map(|away| away.as_micros() as u64),
            upgrade_pause_us: beat.filter(|beat| beat.stopped_ns > 0).map(|beat| beat.stopped_ns / 1000),
            load: beat.map(|beat| LoadSplit {
                busy_ns: beat.busy_ns,
                look_ns: beat.look_ns,
                sleep_ns: beat.sleep_ns,
                requests: beat.completed,
                inflight: beat.inflight,
            }),
            namespaces: facts.spaces.iter().map(|name| (*name).to_owned()).collect(),
            network: facts.network.map(str::to_owned),
            control_group: facts.cgroup.as_deref().map(of_group),
            not_confined: facts.not_confined.clone(),
        }
    }
}

fn of_group(group: &Group) -> ControlGroup {
    let (bounds, usage) = (group.bounds(), group.usage());
    ControlGroup {
        path: group.path().display().to_string(),
        cpu_max_percent: bounds.cpu_percent,
        cpu_weight: bounds.weight,
        memory_max_bytes: bounds.memory_bytes,
        pids_max: bounds.tasks,
        memory_bytes: usage.memory_bytes,
        pids: usage.tasks,
        cpu_us: usage.cpu_us,
        throttled_us: usage.throttled_us,
        oom_kills: usage.oom_kills,
        refused_pids: usage.refused_tasks,
    }
}
