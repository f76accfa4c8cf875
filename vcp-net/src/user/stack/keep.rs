//! The stack as it goes on in another process: no connection ends, no guest notices.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::handover::{FdIndex, Fds, monotonic_ns};

use super::forward::Forwards;
use super::shared::Shared;
use super::tcp::{self, TcpFlows};
use super::udp::{self, UdpFlows};
use super::{Link, Ms, UserStack};
use crate::switch::work::PortId;
use crate::user::UserConfig;
use crate::user::config::Forward;
use crate::user::counters::Counters;
use crate::user::leases::Leases;

/// Something that listens: a socket of its own, or the number of a flow.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListenerState {
    pub(super) forward: Forward,
    pub(super) bound: SocketAddr,
    pub(super) socket: Option<FdIndex>,
    pub(super) flow: Option<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    config: UserConfig,
    /// The stack's clock, and the system's at that moment.
    ms: Ms,
    at_ns: u64,
    counters: Counters,
    leases: Leases,
    neighbours: Vec<(IpAddr, Link)>,
    advertise_at: Ms,
    out: Vec<Vec<u8>>,
    gone: Vec<(u8, Ms)>,
    tcp: Vec<tcp::FlowState>,
    udp: Vec<udp::FlowState>,
    listeners: Vec<ListenerState>,
}

/// Descriptors that came and cannot be watched.
pub(super) fn cannot_watch(source: std::io::Error) -> BadState {
    BadState::System { what: "watch a socket that was handed over", source }
}

impl UserStack {
    /// See [`Uplink::export`](crate::uplink::Uplink::export).
    pub(super) fn keep(&self, fds: &mut Fds) -> Result<Value, NotNow> {
        let shared = &self.shared;
        let state = State {
            config: shared.config.clone(),
            ms: Instant::now().saturating_duration_since(shared.base).as_millis() as Ms,
            at_ns: monotonic_ns(),
            counters: shared.counters,
            leases: shared.leases.clone(),
            neighbours: shared.neighbours(),
            advertise_at: shared.advertise_at,
            out: shared.out.iter().cloned().collect(),
            gone: self.gone.iter().map(|&(port, at)| (port.0, at)).collect(),
            tcp: self.tcp.export(fds)?,
            udp: self.udp.export(fds)?,
            listeners: self.forwards.export(fds)?,
        };
        serde_json::to_value(state).map_err(|error| NotNow::Never(error.to_string()))
    }

    /// Goes on where another process stopped. Nothing outside is touched: the other one may still be the owner.
    ///
    /// # Errors
    /// The state is not understood.
    pub fn restore(state: Value, fds: &mut Fds) -> Result<Self, BadState> {
        let failed = |source| BadState::Json { what: "a user-mode stack", source };
        let state: State = serde_json::from_value(state).map_err(failed)?;
        let mut shared = Shared::new(state.config)
            .map_err(|source| BadState::System { what: "set up a user-mode stack", source })?;
        let since = Duration::from_nanos(monotonic_ns().saturating_sub(state.at_ns));
        let now = Instant::now();
        let age = Duration::from_millis(state.ms) + since;
        shared.base = now.checked_sub(age).ok_or_else(|| BadState::Text("a clock before all time".into()))?;
        shared.now(now);
        shared.counters = state.counters;
        shared.leases = state.leases;
        shared.advertise_at = state.advertise_at;
        shared.out = VecDeque::from(state.out);
        for (ip, link) in state.neighbours {
            shared.learn(ip, link);
        }
        shared.found.clear();
        let tcp = TcpFlows::restore(state.tcp, fds, &mut shared)?;
        let (udp, numbers) = UdpFlows::restore(state.udp, fds, &mut shared)?;
        let forwards = Forwards::restore(state.listeners, &numbers, fds, &mut shared)?;
        let gone = state.gone.into_iter().map(|(port, at)| (PortId(port), at)).collect();
        Ok(Self { shared, tcp, udp, forwards, looked: None, gone })
    }
}
