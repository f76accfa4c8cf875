//! [`Front`]: the clients of one device model, on the data thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use msgq::Channel;
use rustix::event::{PollFd, PollFlags};
use serde_json::json;

use super::client::{Client, Taken};
use super::listen::{ListenerStats, Serving};
use crate::ask::{Ask, Told, tell};
use crate::device::{RingDevice, Rings};
use crate::mailbox::Mailbox;
use crate::metrics::DeviceMetrics;
use crate::poll::Side;
use crate::queue::{Chain, ChainId, RingError};

/// Passes between two looks at the control sockets of a thread that does not sleep.
const PASSES_PER_LOOK: u64 = 1024;

/// Which way the data of a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// There is none.
    None,
    /// From the client.
    ToDevice,
    /// To the client: its regions must be writable.
    FromDevice,
}

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// A chain for the device: a header, the client's data, and room for a status.
    Chain {
        /// Bytes that the device reads first.
        header: [u8; 16],
        /// Where the data goes.
        direction: Direction,
        /// Bytes that the device writes last; 32 at most.
        status_bytes: usize,
    },
    /// The device's features (8 bytes) and configuration space, as far as the client's one segment takes them.
    Config,
    /// No such opcode.
    Unknown,
}

/// How a device model's requests look in messages.
pub trait Protocol: Send + std::fmt::Debug {
    /// What a request with this opcode and value is.
    fn plan(&self, opcode: u16, value: u64) -> Plan;
    /// The code for what the device wrote as its status.
    fn code(&self, status: &[u8]) -> u16;
    /// The code for a request that cannot be one.
    fn invalid(&self) -> u16;
    /// The code for an opcode that there is not.
    fn unknown(&self) -> u16;
    /// Features that a client acknowledges by connecting.
    fn features(&self, offered: u64) -> u64 {
        offered
    }
}

/// A client that is gone, with requests under way. Another one that takes its place in the channel waits for them: a write
/// of the dead one must not come after one of the living.
#[derive(Debug)]
struct Ghost {
    queue: u16,
    life: u32,
    channel: u128,
    inflight: u32,
}

#[derive(Debug)]
struct Clients<P> {
    protocol: P,
    places: Vec<Option<Client>>,
    ghosts: Vec<Ghost>,
    life: u32,
    stopped: bool,
    features: u64,
    config: Vec<u8>,
}

/// A device model without a guest, and its clients.
#[derive(Debug)]
pub struct Front<D, P> {
    device: D,
    clients: Clients<P>,
    arrivals: Arc<Mailbox<Channel>>,
    stats: Arc<ListenerStats>,
    /// Clients for whom there was no place.
    turned_away: u64,
    passes: u64,
    _serving: Option<Serving>,
}

impl<D: RingDevice, P: Protocol> Front<D, P> {
    /// A front for `device`, which has a queue for each client that there can be at a time. Channels come through `arrivals`.
    pub fn new(
        mut device: D,
        protocol: P,
        arrivals: Arc<Mailbox<Channel>>,
        stats: Arc<ListenerStats>,
        serving: Option<Serving>,
    ) -> Self {
        let features = protocol.features(device.features());
        device.set_features(features);
        let mut config = vec![0; 248];
        device.read_config(0, &mut config);
        let clients = Clients {
            protocol,
            places: (0..device.queues()).map(|_| None).collect(),
            ghosts: Vec::new(),
            life: 0,
            stopped: false,
            features,
            config,
        };
        Self { device, clients, arrivals, stats, turned_away: 0, passes: 0, _serving: serving }
    }

    fn arrive(&mut self) {
        while let Some(channel) = self.arrivals.take() {
            // The same program, after its connection broke: what its former life had not been heard of is sent again, and
            // what is under way is waited for.
            let number = channel.agreed().channel;
            for client in self.clients.places.iter_mut().flatten() {
                client.over |= client.channel.agreed().channel == number;
            }
            self.bury();
            let Some(place) = self.clients.places.iter_mut().find(|place| place.is_none()) else {
                self.turned_away += 1;
                tracing::warn!("a msgq client was turned away: all places are taken");
                channel.close(1);
                continue;
            };
            self.clients.life = self.clients.life.wrapping_add(1);
            *place = Client::new(channel, self.clients.life);
        }
    }

    /// Takes clients away that are over.
    fn bury(&mut self) {
        for (queue, place) in self.clients.places.iter_mut().enumerate() {
            let Some(client) = place.take_if(|client| client.over) else { continue };
            let inflight = client.inflight();
            if inflight != 0 {
                let (life, channel) = (client.life, client.channel.agreed().channel);
                self.clients.ghosts.push(Ghost { queue: queue as u16, life, channel, inflight });
            }
        }
        self.clients.ghosts.retain(|ghost| ghost.inflight != 0);
    }
}

impl<P: Protocol> Clients<P> {
    fn of(&mut self, id: ChainId) -> Option<(&mut Client, &P)> {
        let client = self.places.get_mut(usize::from(id.queue))?.as_mut()?;
        (client.life == id.epoch).then_some((client, &self.protocol))
    }

    /// A chain of a client that is gone ended.
    fn lay(&mut self, id: ChainId) {
        let ghost = self.ghosts.iter_mut().find(|ghost| (ghost.queue, ghost.life) == (id.queue, id.epoch));
        if let Some(ghost) = ghost {
            ghost.inflight = ghost.inflight.saturating_sub(1);
        }
    }
}

impl<P: Protocol> Rings for Clients<P> {
    fn take(&mut self, queue: u16, chain: &mut Chain) -> bool {
        if self.stopped {
            return false;
        }
        let Self { protocol, places, ghosts, features, config, .. } = self;
        let Some(Some(client)) = places.get_mut(usize::from(queue)) else { return false };
        let channel = client.channel.agreed().channel;
        if ghosts.iter().any(|ghost| ghost.channel == channel && ghost.inflight != 0) {
            return false;
        }
        let tell = |out: &mut [u8]| {
            let all = features.to_le_bytes().into_iter().chain(config.iter().copied());
            out.iter_mut().zip(all).for_each(|(to, from)| *to = from);
        };
        matches!(client.take(queue, protocol, &tell, chain), Taken::Chain)
    }

    fn complete(&mut self, id: ChainId, len_bytes: u32) {
        match self.of(id) {
            Some((client, protocol)) => client.complete(id.head, len_bytes, protocol),
            None => self.lay(id),
        }
    }

    fn wanted(&self, id: ChainId) -> bool {
        let place = self.places.get(usize::from(id.queue));
        place
            .is_some_and(|place| place.as_ref().is_some_and(|client| client.life == id.epoch && !client.over))
    }

    fn fail(&mut self, id: ChainId, _error: RingError) {
        match self.of(id) {
            Some((client, protocol)) => client.refuse(id.head, protocol.invalid()),
            None => self.lay(id),
        }
    }
}

impl<D: RingDevice + std::fmt::Debug, P: Protocol> Side for Front<D, P> {
    fn pass(&mut self, now: Instant) -> bool {
        let mut moved = false;
        if self.arrivals.has_mail() {
            self.arrive();
            moved = true;
        }
        self.passes += 1;
        if self.passes.is_multiple_of(PASSES_PER_LOOK) {
            // A thread that is never idle would not hear of regions and deaths otherwise.
            for client in self.clients.places.iter_mut().flatten() {
                moved |= client.attend();
            }
        }
        moved |= self.device.poll(&mut self.clients, now);
        for client in self.clients.places.iter_mut().flatten() {
            client.channel.commit();
        }
        if self.clients.places.iter().flatten().any(|client| client.over) {
            self.bury();
            moved = true;
        }
        if !self.clients.ghosts.is_empty() {
            self.clients.ghosts.retain(|ghost| ghost.inflight != 0);
        }
        if self.device.take_config_change() {
            self.device.read_config(0, &mut self.clients.config);
        }
        moved
    }

    fn arm(&mut self) -> bool {
        self.arrivals.clear_wake();
        let mut awake = self.arrivals.has_mail();
        let room = self.device.has_room();
        for client in self.clients.places.iter_mut().flatten() {
            // What came over the control socket first: a region that a message names must be there.
            awake |= client.attend();
            match client.channel.arm() {
                // A device without room takes nothing before its engine moved.
                Ok(more) => awake |= more && room,
                Err(_) => {
                    client.over = true;
                    awake = true;
                }
            }
            if client.channel.peer_state() == msgq::PeerState::Gone {
                // What it published is still taken; then `receive` says that it is gone.
                awake |= room || client.inflight() == 0;
            }
        }
        awake
    }

    fn disarm(&mut self) {
        for client in self.clients.places.iter_mut().flatten() {
            client.channel.disarm();
        }
    }

    fn fds<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        fds.push(PollFd::new(&*self.arrivals, PollFlags::IN));
        for client in self.clients.places.iter().flatten() {
            fds.push(PollFd::from_borrowed_fd(client.channel.bell(), PollFlags::IN));
            if client.channel.peer_state() != msgq::PeerState::Gone {
                fds.push(PollFd::from_borrowed_fd(client.channel.link(), PollFlags::IN));
            }
        }
        let wait = self.device.wait();
        if let Some(fd) = wait.fd {
            let writable = if wait.writable { PollFlags::OUT } else { PollFlags::empty() };
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN | writable));
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.device.wait().deadline
    }

    fn readiness(&mut self, ready: bool) {
        self.device.readiness(ready);
    }

    fn moves_long(&self) -> bool {
        self.inflight() != 0 && self.device.moves_long()
    }

    fn inflight(&self) -> u32 {
        let ghosts: u32 = self.clients.ghosts.iter().map(|ghost| ghost.inflight).sum();
        self.clients.places.iter().flatten().map(Client::inflight).sum::<u32>() + ghosts
    }

    fn stop(&mut self) {
        self.clients.stopped = true;
    }

    fn close(&mut self, limit: Duration) {
        for client in self.clients.places.drain(..).flatten() {
            client.channel.close(0);
        }
        self.device.close(limit);
    }

    fn metrics(&self) -> Arc<DeviceMetrics> {
        Arc::clone(self.device.metrics())
    }

    fn tell(&mut self, ask: Ask, now: Instant) -> Told {
        let status = matches!(ask, Ask::Status);
        let mut told = tell(&mut self.device, ask, now);
        if status && let Told::Status(value) = &mut told {
            let clients: Vec<_> = self.clients.places.iter().flatten().map(describe).collect();
            let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
            let msgq = json!({
                "clients": clients,
                "accepted": count(&self.stats.accepted),
                "refused": count(&self.stats.refused),
                "failed_set_ups": count(&self.stats.failed),
                "turned_away": self.turned_away,
                "waiting_for_predecessors": self.clients.ghosts.len(),
            });
            if let serde_json::Value::Object(fields) = value {
                fields.insert("msgq".into(), msgq);
            }
        }
        told
    }
}

fn describe(client: &Client) -> serde_json::Value {
    let counters: serde_json::Map<_, _> =
        client.channel.stats().counters().map(|(name, count)| (name, count.into())).collect();
    json!({
        "channel": format!("{:032x}", client.channel.agreed().channel),
        "inflight": client.inflight(),
        "memory_bytes": client.channel.memory_bytes(),
        "counters": counters,
    })
}
