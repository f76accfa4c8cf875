//! Flows that go on in another process: their sockets travel with what is known of them.

use std::collections::VecDeque;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::handover::{FdIndex, Fds};

use super::{Flow, Key, PEERS_MAX, SWEEP_MS, UdpFlows};
use crate::switch::work::PortId;
use crate::user::config::Forward;
use crate::user::packet::Link;
use crate::user::stack::UDP_TOKEN;
use crate::user::stack::keep::cannot_watch;
use crate::user::stack::shared::Shared;
use crate::user::tcp::Ms;

/// A flow. Frames that wait for room do not travel: they are datagrams.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::user::stack) struct FlowState {
    /// Its number here, by which forwards name it.
    pub(in crate::user::stack) at: u32,
    ping: bool,
    guest: (IpAddr, u16),
    vid: u16,
    link: Option<Link>,
    port: u8,
    socket: FdIndex,
    peers: Vec<IpAddr>,
    plain: bool,
    query: (u16, usize),
    used: Ms,
    forward: Option<Forward>,
}

impl UdpFlows {
    pub(in crate::user::stack) fn export(&self, fds: &mut Fds) -> Result<Vec<FlowState>, NotNow> {
        let one = |(at, flow): (u32, &Flow)| {
            Ok(FlowState {
                at,
                ping: flow.key.ping,
                guest: flow.key.guest,
                vid: flow.key.vid,
                link: flow.link,
                port: flow.port.0,
                socket: fds.put_copy(&flow.socket)?,
                peers: flow.peers.clone(),
                plain: flow.plain,
                query: flow.query,
                used: flow.used,
                forward: flow.forward,
            })
        };
        self.flows.iter().map(one).collect()
    }

    /// Goes on with them. Returns with them what their numbers were, and are.
    pub(in crate::user::stack) fn restore(
        states: Vec<FlowState>,
        fds: &mut Fds,
        shared: &mut Shared,
    ) -> Result<(Self, Vec<(u32, u32)>), BadState> {
        let (mut this, mut numbers) = (Self::default(), Vec::new());
        this.sweep_at = shared.ms + SWEEP_MS;
        for mut state in states {
            let key = Key { ping: state.ping, guest: state.guest, vid: state.vid };
            let port = PortId(state.port);
            if this.keys.contains_key(&key) || !shared.take_flow(port) {
                return Err(BadState::Text(format!(
                    "a flow of {}:{} that cannot be",
                    key.guest.0, key.guest.1
                )));
            }
            state.peers.truncate(PEERS_MAX);
            let flow = Flow {
                key,
                link: state.link,
                port,
                socket: fds.take(state.socket)?,
                peers: state.peers,
                peer_next: 0,
                plain: state.plain,
                query: state.query,
                ready: false,
                queued: false,
                held: VecDeque::new(),
                used: state.used,
                blocked: None,
                overflowed: None,
                forward: state.forward,
            };
            let at = this.flows.insert(flow);
            let token = this.flows.token(UDP_TOKEN, at);
            if let Some(flow) = this.flows.get(at) {
                shared.watch(&flow.socket, token, false).map_err(cannot_watch)?;
            }
            this.keys.insert(key, at);
            numbers.push((state.at, at));
        }
        Ok((this, numbers))
    }
}
