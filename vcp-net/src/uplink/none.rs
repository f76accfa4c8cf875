//! No uplink: frames that go nowhere else go nowhere.

use std::time::Instant;

use serde_json::Value;
use vcp_core::handover::Fds;
use vcp_core::handover::state::NotNow;

use super::{Ingress, Sender, Sent, Uplink};
use crate::frame::{Offloads, OutFrame};

/// See the module.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoUplink;

impl Uplink for NoUplink {
    fn kind(&self) -> &'static str {
        "none"
    }

    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    /// Never called: it is a member of no switch.
    fn send(&mut self, _frame: &OutFrame<'_>, _from: Sender) -> Sent {
        Sent::Refused
    }

    fn receive(&mut self, _into: &mut dyn Ingress, _now: Instant) -> bool {
        false
    }

    fn export(&self, _fds: &mut Fds, _now: Instant) -> Result<Value, NotNow> {
        Ok(Value::Null)
    }
}
