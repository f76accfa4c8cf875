//! A connection between two processes: the session, the socket, and what came of a next PDU.

use std::time::Instant;

use iscsi::initiator::{Session, SessionState, Underway};
use serde::{Deserialize, Serialize};
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::handover::{FdIndex, Fds};

use super::{RX_STAGING_BYTES, Wire, WireStats};

/// A connection with nothing under way. What the socket holds goes with the socket.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WireState {
    session: SessionState,
    /// Received and not looked at.
    early: Vec<u8>,
    stream: FdIndex,
    stats: WireStats,
}

impl Wire {
    /// The connection, if nothing is under way.
    pub(in crate::portal) fn export(&self, fds: &mut Fds) -> Result<WireState, NotNow> {
        let busy = |why: Underway| NotNow::Busy(why.to_string());
        let session = self.session.export().map_err(busy)?;
        if self.is_sending() {
            return Err(NotNow::Busy("a PDU is sent in part".into()));
        }
        if !self.rx.is_between_pdus() {
            return Err(busy(Underway::Pdu));
        }
        Ok(WireState {
            session,
            early: self.staging[self.staged.clone()].to_vec(),
            stream: fds.put_copy(&self.stream)?,
            stats: self.stats,
        })
    }

    /// Goes on with a connection of another process.
    pub(in crate::portal) fn import(
        state: WireState,
        slots: u16,
        fds: &mut Fds,
        now: Instant,
    ) -> Result<Self, BadState> {
        let WireState { session, early, stream, stats } = state;
        if session.config.slots != slots {
            return Err(BadState::Text(format!("{} slots in a session for {slots}", session.config.slots)));
        }
        if early.len() > RX_STAGING_BYTES {
            return Err(BadState::Text(format!("{} bytes of a next PDU", early.len())));
        }
        let session =
            Session::import(session, now).map_err(|error| BadState::Text(format!("session: {error}")))?;
        let stream = fds.take(stream)?;
        let failed = |error: rustix::io::Errno| BadState::System {
            what: "use the connection to the target",
            source: error.into(),
        };
        if rustix::net::sockopt::socket_type(&stream).map_err(failed)? != rustix::net::SocketType::STREAM {
            return Err(BadState::Text("the connection to the target is no stream socket".into()));
        }
        let mut wire = Self::new(stream.into(), session, &early);
        wire.stats = stats;
        Ok(wire)
    }
}
