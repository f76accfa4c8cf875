//! The faults that come by the clock: of the network, of the target and its machine.

use super::{Event, MS, S, World};
use crate::faults::Kind;
use crate::net::{ConnId, Item};
use crate::trace::trace;

impl World {
    pub(super) fn power_up(&mut self) {
        if !self.target_up {
            trace!(self.trace, self.now, "target: up again");
            self.target_up = true;
            self.host_up = true;
        }
    }

    pub(super) fn live(&mut self) -> Option<ConnId> {
        let live: Vec<_> =
            self.conns.iter().filter(|(_, c)| c.up && c.socket.is_some()).map(|(id, _)| *id).collect();
        (!live.is_empty()).then(|| self.rng.pick(&live))
    }

    /// A tick of the fault clock.
    pub(super) fn disturb(&mut self) {
        let now = self.now;
        for &kind in Kind::ALL {
            if !is_clocked(kind) || !self.faults.roll(kind, now) {
                continue;
            }
            trace!(self.trace, now, "fault: {kind:?}");
            let live = self.live();
            match (kind, live) {
                (Kind::Cut, Some(id)) => {
                    let to_target = self.rng.permille(500);
                    let after = if self.rng.permille(300) { 0 } else { self.rng.spread(1, 20_000) };
                    if after == 0 {
                        self.cut(id);
                    } else if let Some(pipe) = self.pipe(id, to_target) {
                        pipe.cut_after.get_or_insert(after);
                    }
                }
                (Kind::HalfOpen, Some(id)) => {
                    let until = now + self.rng.pick(&[S, 5 * S, 30 * S, 1_000_000 * S]);
                    let only = self.rng.below(4);
                    for to_target in [false, true] {
                        if only != u64::from(to_target) {
                            self.hold(id, to_target, until);
                        }
                    }
                }
                (Kind::Pause, Some(id)) => {
                    let until = now + self.rng.spread(MS, 4 * S);
                    for to_target in [false, true] {
                        self.hold(id, to_target, until);
                    }
                }
                (Kind::StopReading, Some(id)) => {
                    let until = now + self.rng.spread(MS, 4 * S);
                    if let Some(conn) = self.conns.get_mut(&id) {
                        conn.stop_reading_until = until;
                    }
                    self.at(until, Event::ReadAgain(id));
                }
                (Kind::BitFlip, Some(id)) if self.target.has_digests(id) => self.flip(id),
                (Kind::PathDeath, _) => self.kill_path(),
                (Kind::AccessChange, _) => {
                    let group = self.rng.below(self.target.unit.groups.len() as u64) as usize;
                    let before = self.scenario.unit.groups[group].1;
                    let state = self.rng.pick(&[0, 1, 2, 3, 0xF]);
                    self.target.set_state(group, state);
                    let until = now + self.rng.spread(MS, 8 * S);
                    self.at(until, Event::Access(group, before));
                }
                (Kind::Refuse, _) => self.refuse_until = now + self.rng.spread(MS, 10 * S),
                (Kind::PowerLoss, _) if self.target_up => self.power_loss(),
                (Kind::Crash, _) if self.target_up => {
                    self.target.restart(false);
                    let ids: Vec<_> = self.conns.keys().copied().collect();
                    for id in ids {
                        self.send(id, false, Item::Reset);
                    }
                    self.down();
                }
                (Kind::DropConnection, Some(id)) if self.target.has(id) => {
                    self.target.closed(id);
                    self.send(id, false, Item::End);
                }
                (Kind::Attention, _) => {
                    let codes = [0x2900, 0x2A09, 0x2A01, 0x3F0E, 0x2907, 0x2F00, 0xABCD];
                    self.target.attention(self.rng.pick(&codes));
                }
                (Kind::Stall, _) => {
                    let until = now + self.rng.spread(10 * MS, 20 * S);
                    self.target.stall(until);
                }
                (
                    Kind::AskLogout | Kind::TellDropped | Kind::Chatter | Kind::Ping | Kind::CloseWindow,
                    Some(id),
                ) => {
                    self.target(|target, cx| target.spontaneous(kind, id, cx));
                    if kind == Kind::CloseWindow {
                        let until = now + self.rng.spread(10 * MS, 10 * S);
                        self.at(until, Event::OpenWindows);
                    }
                }
                _ => {}
            }
        }
    }

    /// A portal dies: with its connections cut, or in silence.
    pub(super) fn kill_path(&mut self) {
        let portal = self.rng.below(self.target.settings.portals.len() as u64) as usize;
        let until = self.now + self.rng.spread(10 * MS, 10 * S);
        self.dead.insert(portal, until);
        let silent = self.rng.permille(500);
        trace!(self.trace, self.now, "network: portal {portal} is dead, silent {silent}");
        let ids: Vec<_> = self.conns.iter().filter(|(_, c)| c.portal == portal).map(|(id, _)| *id).collect();
        for id in ids {
            if silent {
                self.hold(id, true, until);
                self.hold(id, false, until);
            } else {
                self.cut(id);
            }
        }
    }

    /// A bit of what is on its way to the engine turns over.
    pub(super) fn flip(&mut self, id: ConnId) {
        let (at, bit) = (self.rng.next() as usize, self.rng.below(8));
        let Some(pipe) = self.pipe(id, false) else { return };
        for (_, item) in &mut pipe.queue {
            if let Item::Bytes(bytes) = item {
                let at = at % bytes.len();
                bytes[at] ^= 1 << bit;
                return;
            }
        }
    }

    pub(super) fn power_loss(&mut self) {
        let lost = self.target.restart(true);
        trace!(self.trace, self.now, "target: power lost, {lost} blocks fall back");
        let target = &self.target;
        self.guest
            .oracle
            .power_loss(&mut self.guest.active, |write, blocks| target.has_answered(write, blocks));
        self.down();
        self.host_up = false;
    }

    /// The target is away for a while.
    pub(super) fn down(&mut self) {
        self.target_up = false;
        let until = self.now + self.rng.spread(MS, 8 * S);
        self.at(until, Event::PowerUp);
    }
}

fn is_clocked(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Cut
            | Kind::HalfOpen
            | Kind::Pause
            | Kind::Refuse
            | Kind::StopReading
            | Kind::BitFlip
            | Kind::PowerLoss
            | Kind::Crash
            | Kind::DropConnection
            | Kind::AskLogout
            | Kind::TellDropped
            | Kind::Chatter
            | Kind::Ping
            | Kind::CloseWindow
            | Kind::Stall
            | Kind::Attention
            | Kind::PathDeath
            | Kind::AccessChange
    )
}
