//! Uplinks: where frames of a switch go besides its guests, and where others come from.
//!
//! An [`Uplink`] is a member of one switch. It is driven by the data thread and never blocks:
//!
//! * [`send`](Uplink::send) gets one frame at a time, whose bytes lie in the sender's guest memory during the call and no
//!   longer. What it does not take unfinished ([`offloads`](Uplink::offloads)) is finished before.
//! * [`receive`](Uplink::receive) brings frames in, through an [`Ingress`]: [`frame`](Ingress::frame) for frames that
//!   take the line of the switch like any other, [`direct`](Ingress::direct) for bulk data that is to be read straight
//!   into the memory of a guest whose port is known.
//! * [`waits`](Uplink::waits) says what to sleep for.
//!
//! [`none`] is the uplink of a switch without one; [`tap`] a network device of the host that this process makes,
//! [`packet`] one that is there. The user-mode stack ([`crate::user`]) is another.

pub mod none;
pub mod packet;
mod sys;
pub mod tap;

use std::time::Instant;

use serde_json::{Map, Value, json};
use vcp_core::ask::Rest;
use vcp_core::device::Wait;
use vcp_core::handover::Fds;
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::metrics::Samples;
use vcp_core::queue::burst::BurstRing;
use vcp_core::sock::Scatter;

use crate::frame::{Mac, Offloads, OutFrame, VnetHeader};
use crate::switch::account::Account;
use crate::switch::work::PortId;

/// What became of a frame that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The uplink has it.
    Done,
    /// There is no room now. Nothing of the frame was taken.
    Full,
    /// It will not take it.
    Refused,
}

/// Where a frame for an uplink comes from.
#[derive(Clone, Copy, Debug)]
pub struct Sender {
    /// The port.
    pub port: PortId,
    /// The VLAN; 0: none.
    pub vid: u16,
    /// Now.
    pub now: Instant,
}

/// See the module.
pub trait Uplink: Send {
    /// Its kind, as the command line names it.
    fn kind(&self) -> &'static str;

    /// What it takes unfinished.
    fn offloads(&self) -> Offloads;

    /// Longest packet that it takes.
    fn mtu(&self) -> usize {
        usize::MAX
    }

    /// Whether senders wait while it has no room (their frames stay in their rings). Otherwise these are dropped. One that
    /// makes them wait sees to it in [`waits`](Self::waits) that it is called again when there is room.
    fn waits_when_full(&self) -> bool {
        false
    }

    /// Takes one frame.
    fn send(&mut self, frame: &OutFrame<'_>, from: Sender) -> Sent;

    /// A burst of frames was sent: what was gathered goes out.
    fn flush(&mut self, _now: Instant) {}

    /// Brings frames in, as many as a turn is long; returns whether there was anything, or time moved something.
    fn receive(&mut self, into: &mut dyn Ingress, now: Instant) -> bool;

    /// What to wait for.
    fn waits<'a>(&'a self, _add: &mut dyn FnMut(Wait<'a>)) {}

    /// A port's front end came or went.
    fn attached(&mut self, _port: PortId, _attached: bool) {}

    /// What people want to know of it.
    fn status(&self) -> Value {
        json!({ "kind": self.kind() })
    }

    /// Its metrics.
    fn collect(&self, _samples: &mut Samples) {}

    /// A command of the control socket; `None` if it does not know it.
    fn command(
        &mut self,
        _name: &str,
        _args: &Map<String, Value>,
        _now: Instant,
    ) -> Option<Result<Rest, String>> {
        None
    }

    /// Its state for another process, which [`restore`] goes on from. Changes nothing.
    ///
    /// # Errors
    /// It cannot be handed over now, or at all.
    fn export(&self, fds: &mut Fds, now: Instant) -> Result<Value, NotNow>;

    /// The process ends.
    fn close(&mut self) {}
}

/// An uplink that goes on where that of another process stopped. Nothing outside is touched: the other one may still be the
/// owner.
///
/// # Errors
/// The state is not understood.
pub fn restore(kind: &str, state: Value, fds: &mut Fds) -> Result<Box<dyn Uplink>, BadState> {
    match kind {
        "none" => Ok(Box::new(none::NoUplink)),
        "packet" => Ok(Box::new(packet::Packet::restore(state, fds)?)),
        "user" => Ok(Box::new(crate::user::UserStack::restore(state, fds)?)),
        "tap" => Ok(Box::new(tap::Tap::restore(state, fds)?)),
        _ => Err(BadState::Text(format!("an uplink of a kind that is not known: {kind}"))),
    }
}

/// What became of a frame that was brought in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is done with: delivered, or dropped and counted.
    Done,
    /// Its target has no room, and is one that is waited for: it is the uplink's still.
    Full,
}

/// The switch, as an uplink sees it.
pub trait Ingress {
    /// Takes a frame along the line of the switch.
    fn frame(&mut self, frame: &OutFrame<'_>) -> Taken;

    /// The port behind which a station is, if that is known.
    fn find(&self, vid: u16, mac: Mac) -> Option<PortId>;

    /// What a port takes unfinished; nothing, if it is not there.
    fn offloads(&self, port: PortId) -> Offloads;

    /// Room for a frame of up to `len_bytes` bytes in the memory of the guest at `port`, to be filled and
    /// [committed](Direct::commit).
    fn direct(&mut self, port: PortId, len_bytes: usize) -> Room<'_>;
}

/// What there is for a frame that is to be read straight into a guest's memory.
pub enum Room<'a> {
    /// Room for it.
    Ready(Direct<'a>),
    /// There is none now.
    Full,
    /// The port's frames need more than that (a tag, another queue than the first): it gets them by
    /// [`Ingress::frame`] alone.
    Unfit,
}

/// Room for one frame in a guest's memory. Nothing happens to it until it is committed.
pub struct Direct<'a> {
    pub(crate) ring: &'a mut BurstRing,
    /// Bytes of the header in front of the frame.
    pub(crate) header: usize,
    pub(crate) count_at: Option<usize>,
    pub(crate) chains: usize,
    pub(crate) len_bytes: usize,
    pub(crate) port: PortId,
    pub(crate) account: &'a mut Account,
}

impl Direct<'_> {
    /// Appends the room for bytes `offset .. offset + len_bytes` of the frame to what a socket fills. Returns how much it
    /// appended.
    pub fn scatter<'s>(&'s self, offset: usize, len_bytes: usize, into: &mut Scatter<'s>) -> usize {
        let len_bytes = len_bytes.min(self.len_bytes.saturating_sub(offset));
        into.push_space(&self.ring.space(self.chains), self.header + offset, len_bytes)
    }

    /// The frame is `len_bytes` long, of which `head` are the first and the others were filled in; the guest gets it.
    pub fn commit(self, meta: &VnetHeader, head: &[u8], len_bytes: usize) {
        let header = meta.emit();
        self.ring.write(self.chains, 0, &header[..self.header]);
        self.ring.write(self.chains, self.header, head);
        let len_bytes = len_bytes.min(self.len_bytes);
        self.ring.commit(self.chains, self.count_at, self.header + len_bytes);
        let from = self.account.of(PortId::UPLINK, 0);
        from.in_frames += 1;
        from.in_bytes += len_bytes as u64;
        from.delivered += 1;
        from.targets += 1;
        let to = self.account.of(self.port, 0);
        to.out_frames += 1;
        to.out_bytes += len_bytes as u64;
    }
}
