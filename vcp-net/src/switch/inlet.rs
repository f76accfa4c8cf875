//! [`Inlet`]: a switch, as its uplink sees it.

use std::time::Instant;

use vcp_core::vu::port::Port;

use super::account::Account;
use super::back::{Back, Member};
use super::enqueue::Targets;
use super::line::{From, Line};
use super::work::{Frames, PortId, Work};
use crate::capture::Capture;
use crate::frame::{Mac, Offloads, OutFrame};
use crate::port::{NetPort, Vlan, receive_queue};
use crate::uplink::none::NoUplink;
use crate::uplink::{Direct, Ingress, Room, Taken};

/// See the module.
pub(super) struct Inlet<'a> {
    pub(super) line: &'a mut Line,
    pub(super) work: &'a mut Work,
    pub(super) back: &'a mut Back,
    pub(super) account: &'a mut Account,
    pub(super) capture: Option<&'a mut Capture>,
    pub(super) members: &'a mut [Member],
    pub(super) ports: &'a mut [Port<NetPort>],
    pub(super) now: Instant,
}

impl Ingress for Inlet<'_> {
    fn frame(&mut self, frame: &OutFrame<'_>) -> Taken {
        let from = From { port: PortId::UPLINK, pair: 0, host: Some(Offloads::ALL) };
        let Self { line, work, back, account, capture, members, ports, now } = self;
        let capture = capture.as_deref_mut();
        // Nothing that an uplink brings goes back to it.
        let uplink = &mut NoUplink;
        let mut targets = Targets { members, ports, uplink, account, capture, from: from.port, now: *now };
        let frames = Frames::One(frame);
        let timed = line.decide(work, &frames, from, None, *now);
        match back.deliver(work, &frames, from, timed, &mut targets) {
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
