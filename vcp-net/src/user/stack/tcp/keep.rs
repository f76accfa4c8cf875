//! Connections that go on in another process: their sockets travel with what is known of them.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::handover::{FdIndex, Fds};

use super::{Flow, Key, TcpFlows};
use crate::switch::work::PortId;
use crate::user::packet::Link;
use crate::user::stack::TCP_TOKEN;
use crate::user::stack::keep::cannot_watch;
use crate::user::stack::shared::Shared;
use crate::user::tcp::{Conn, Ms};

/// A connection.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::user::stack) struct FlowState {
    guest: (IpAddr, u16),
    remote: (IpAddr, u16),
    vid: u16,
    conn: Conn,
    link: Option<Link>,
    port: u8,
    socket: Option<FdIndex>,
    peek_at: u32,
}

impl TcpFlows {
    pub(in crate::user::stack) fn export(&self, fds: &mut Fds) -> Result<Vec<FlowState>, NotNow> {
        let one = |flow: &Flow| {
            Ok(FlowState {
                guest: flow.key.guest,
                remote: flow.key.remote,
                vid: flow.key.vid,
                conn: flow.conn.clone(),
                link: flow.link,
                port: flow.port.0,
                socket: fds.put_copy_of(flow.socket.as_ref())?,
                peek_at: flow.peek_at,
            })
        };
        self.flows.iter().map(|(_, flow)| flow).map(one).collect()
    }

    /// Goes on with them.
    pub(in crate::user::stack) fn restore(
        states: Vec<FlowState>,
        fds: &mut Fds,
        shared: &mut Shared,
    ) -> Result<Self, BadState> {
        let mut this = Self::new(shared.config.ahead_bytes);
        for state in states {
            let FlowState { guest, remote, vid, conn, link, port, socket, peek_at } = state;
            let (key, port) = (Key { guest, remote, vid }, PortId(port));
            let socket = fds.take_if(socket)?;
            if !conn.is_sound() || this.keys.contains_key(&key) || !shared.take_flow(port) {
                return Err(BadState::Text(format!(
                    "a connection of {}:{} that cannot be",
                    guest.0, guest.1
                )));
            }
            // All may have changed meanwhile: each is looked at once.
            let (token, timer, lost) = (0, Ms::MAX, link.is_none());
            let flow = Flow {
                key,
                conn,
                link,
                port,
                // It was not acknowledged: the guest sends it again.
                ahead: None,
                socket,
                token,
                peek_at,
                readable: true,
                hung_up: false,
                queued: false,
                timer,
            };
            let at = this.flows.insert(flow);
            let token = this.flows.token(TCP_TOKEN, at);
            if let Some(flow) = this.flows.get_mut(at) {
                flow.token = token;
                if let Some(socket) = &flow.socket {
                    shared.watch(socket, token, true).map_err(cannot_watch)?;
                }
            }
            this.keys.insert(key, at);
            if lost {
                this.lost.push(at);
            }
            this.queue(at);
            this.schedule(at);
        }
        Ok(this)
    }
}
