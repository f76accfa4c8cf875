//! The network between engine and target: what is sent takes its time, in pieces, and may be cut, held back or refused.

use super::{Event, MS, NETWORK, S, US, World};
use crate::net::{Attempt, Conn, ConnId, Item, Pipe};
use crate::trace::trace;

impl World {
    /// Takes connections that the engine began.
    pub(super) fn connect_begun(&mut self) -> bool {
        let begun = self.net.begun();
        let any = !begun.is_empty();
        for (id, address, socket) in begun {
            let portal = self.target.settings.portals.iter().position(|p| p.address == address);
            trace!(self.trace, self.now, "network: conn {id} to {address}");
            self.conns.insert(id, Conn::new(portal.unwrap_or(usize::MAX), socket));
            let at = self.now + self.latency() * 2;
            self.at(at, Event::Connect(id));
        }
        any
    }

    pub(super) fn latency(&mut self) -> u64 {
        let (low, high) = self.scenario.link_ns;
        self.rng.spread(low, high)
    }

    /// Takes what the engine sent.
    pub(super) fn take_sent(&mut self) -> bool {
        let mut any = false;
        let ids: Vec<_> = self.conns.iter().filter(|(_, c)| c.socket.is_some()).map(|(id, _)| *id).collect();
        for id in ids {
            while let Some(conn) = self.conns.get_mut(&id) {
                if conn.stop_reading_until > self.now {
                    break;
                }
                let mut buffer = std::mem::take(&mut self.buffer);
                let got = conn.take_sent(&mut buffer);
                match got {
                    None => {
                        self.buffer = buffer;
                        break;
                    }
                    Some(None) => {
                        self.buffer = buffer;
                        conn.socket = None;
                        conn.to_engine.queue.clear();
                        if self.two_groups {
                            // An aborted connection delivers nothing more but what the network carries already.
                            conn.to_target.forget_after(self.now + NETWORK);
                        }
                        any = true;
                        trace!(self.trace, self.now, "network: conn {id} closed by the engine");
                        self.send(id, true, Item::End);
                        break;
                    }
                    Some(Some(got)) => {
                        any = true;
                        self.note(got as u64);
                        self.send_bytes(id, true, &buffer[..got]);
                        self.buffer = buffer;
                    }
                }
            }
        }
        any
    }

    pub(super) fn pipe(&mut self, id: ConnId, to_target: bool) -> Option<&mut Pipe> {
        let conn = self.conns.get_mut(&id)?;
        Some(if to_target { &mut conn.to_target } else { &mut conn.to_engine })
    }

    pub(super) fn send(&mut self, id: ConnId, to_target: bool, item: Item) {
        let at = self.now + self.latency();
        self.send_at(id, to_target, item, at);
    }

    pub(super) fn send_at(&mut self, id: ConnId, to_target: bool, item: Item, at: u64) {
        let due = self.pipe(id, to_target).and_then(|pipe| pipe.push(at, item));
        if let Some(due) = due {
            self.at(due, if to_target { Event::ToTarget(id) } else { Event::ToEngine(id) });
        }
    }

    /// Sends bytes in pieces of any size, as far as the connection lasts.
    pub(super) fn send_bytes(&mut self, id: ConnId, to_target: bool, mut bytes: &[u8]) {
        let mut cut = false;
        if let Some(pipe) = self.pipe(id, to_target)
            && let Some(left) = &mut pipe.cut_after
        {
            let keep = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
            cut = keep < bytes.len();
            bytes = &bytes[..keep];
            *left -= keep as u64;
        }
        while !bytes.is_empty() {
            let len = match self.rng.below(4) {
                0 => self.rng.spread(1, bytes.len() as u64) as usize,
                _ => bytes.len(),
            };
            self.send(id, to_target, Item::Bytes(bytes[..len].to_vec()));
            bytes = &bytes[len..];
        }
        if cut {
            self.cut(id);
        }
    }

    /// Breaks a connection: nothing sent from now on arrives, and each end learns it in its time.
    pub(super) fn cut(&mut self, id: ConnId) {
        trace!(self.trace, self.now, "network: conn {id} is cut");
        for to_target in [false, true] {
            let late = match self.rng.below(4) {
                0 => self.rng.spread(MS, 30 * S),
                _ => self.rng.spread(US, 10 * MS),
            };
            let item = if self.rng.permille(500) { Item::End } else { Item::Reset };
            self.send_at(id, to_target, item, self.now + late);
        }
    }

    pub(super) fn connect(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let portal = conn.portal;
        let dead = self.dead.get(&portal).is_some_and(|&until| until > self.now);
        let refused = self.now < self.refuse_until || portal == usize::MAX;
        if dead || (!self.target_up && !self.host_up) {
            trace!(self.trace, self.now, "network: conn {id} is not answered");
            return;
        }
        if refused || !self.target_up {
            trace!(self.trace, self.now, "network: conn {id} is refused");
            self.net.decide(id, Attempt::Refused);
            // What the system would say by readiness.
            conn.socket = None;
            return;
        }
        self.net.decide(id, Attempt::Up);
        conn.up = true;
        conn.at_target = true;
        self.guest.kicked = true;
        self.target(|target, cx| target.connected(id, portal, cx));
    }

    pub(super) fn deliver_to_target(&mut self, id: ConnId) {
        loop {
            let now = self.now;
            let Some(item) = self.pipe(id, true).and_then(|pipe| pipe.due(now)) else { return };
            if !self.target_up {
                // Nobody there; what comes later is answered with a reset.
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.at_target = false;
                }
                continue;
            }
            match item {
                Item::Bytes(bytes) if self.target.has(id) => {
                    self.target(|target, cx| target.bytes(id, &bytes, cx));
                }
                Item::Bytes(_) => self.send(id, false, Item::Reset),
                Item::End | Item::Reset => {
                    self.send(id, false, Item::End);
                    // One that is busy notices late; until then, what it has of the session goes on.
                    let late = if self.rng.permille(500) { self.rng.spread(MS, 20 * S) } else { 0 };
                    self.at(self.now + late, Event::Noticed(id));
                }
            }
        }
    }

    pub(super) fn deliver_to_engine(&mut self, id: ConnId) {
        loop {
            let now = self.now;
            let Some(conn) = self.conns.get_mut(&id) else { return };
            if !conn.stuck.is_empty() {
                // The socket is full: goes on as soon as the engine has read.
                return;
            }
            let Some(item) = conn.to_engine.due(now) else { return };
            match item {
                Item::Bytes(bytes) => conn.give(&bytes),
                Item::End | Item::Reset => {
                    trace!(self.trace, self.now, "network: conn {id} ends for the engine ({item:?})");
                    conn.socket = None;
                    conn.to_engine.queue.clear();
                }
            }
        }
    }

    pub(super) fn hold(&mut self, id: ConnId, to_target: bool, until: u64) {
        if let Some(pipe) = self.pipe(id, to_target) {
            pipe.hold(until);
        }
        self.at(until, if to_target { Event::ToTarget(id) } else { Event::ToEngine(id) });
    }
}
