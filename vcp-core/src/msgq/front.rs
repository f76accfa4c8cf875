//! [`Front`]: the clients of one device model, on the data thread.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use msgq::Channel;
use rustix::event::epoll;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::client::{Client, Taken};
use super::listen::{Identity, Listener, ListenerOptions, ListenerStats, Serving};
use super::metrics;
use crate::ask::{Ask, Told, tell};
use crate::device::{RingDevice, Rings, Wait};
use crate::handover::Fds;
use crate::handover::state::{BadState, NotNow, SocketState};
use crate::mailbox::Mailbox;
use crate::metrics::DeviceMetrics;
use crate::poll::Side;
use crate::queue::{Chain, ChainId, RingError};
use crate::uring::Ring;

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
    held: bool,
    features: u64,
    config: Vec<u8>,
}

/// How clients come in.
#[derive(Debug)]
enum Entrance {
    /// By the mailbox only.
    None,
    /// It opens once this process is the owner.
    Closed(Box<ListenerOptions>, Option<(Listener, Identity)>),
    Open(Serving),
}

/// The state of a front for another process: its clients connect anew, and what they sent that nobody took is sent again.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FrontState {
    socket: SocketState,
    device: Value,
}

/// A device model without a guest, and its clients.
#[derive(Debug)]
pub struct Front<D, P> {
    device: D,
    clients: Clients<P>,
    arrivals: Arc<Mailbox<Channel>>,
    /// Mailbox, bells and control sockets: what wakes it besides the device.
    epoll: OwnedFd,
    stats: Arc<ListenerStats>,
    entrance: Entrance,
    /// Clients for whom there was no place.
    turned_away: u64,
    passes: u64,
}

impl<D: RingDevice, P: Protocol> Front<D, P> {
    /// A front for `device`, which has a queue for each client that there can be at a time, and whose clients come through
    /// `arrivals`.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new(mut device: D, protocol: P, arrivals: Arc<Mailbox<Channel>>) -> rustix::io::Result<Self> {
        let features = protocol.features(device.features());
        device.set_features(features);
        let mut config = vec![0; 248];
        device.read_config(0, &mut config);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        watch(&epoll, &*arrivals)?;
        let clients = Clients {
            protocol,
            places: (0..device.queues()).map(|_| None).collect(),
            ghosts: Vec::new(),
            life: 0,
            held: false,
            features,
            config,
        };
        let (stats, entrance) = (Arc::default(), Entrance::None);
        Ok(Self { device, clients, arrivals, epoll, stats, entrance, turned_away: 0, passes: 0 })
    }

    /// The same, with a socket where clients connect: `listener`, or (`None`) that of the process which this one
    /// [takes over from](Side::import), from when it is the owner.
    ///
    /// # Errors
    /// It cannot accept.
    pub fn with_listener(
        mut self,
        listener: Option<Listener>,
        options: ListenerOptions,
    ) -> std::io::Result<Self> {
        self.entrance = match listener {
            Some(listener) => Entrance::Open(self.open(listener, options)?),
            None => Entrance::Closed(Box::new(options), None),
        };
        Ok(self)
    }

    fn open(&self, listener: Listener, options: ListenerOptions) -> std::io::Result<Serving> {
        listener.start(options, Arc::clone(&self.arrivals), Arc::clone(&self.stats))
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
            let watched =
                watch(&self.epoll, channel.bell()).and_then(|()| watch(&self.epoll, channel.link()));
            if let Err(error) = watched {
                tracing::warn!(%error, "a msgq client cannot be waited for");
                continue;
            }
            self.clients.life = self.clients.life.wrapping_add(1);
            let mut channel = channel;
            channel.measure_latency();
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
        if self.held {
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
                moved |= client.attend(&self.epoll);
            }
        }
        for client in self.clients.places.iter_mut().flatten() {
            client.channel.set_now(now);
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
            awake |= client.attend(&self.epoll);
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

    fn waits<'a>(&'a self, waits: &mut Vec<Wait<'a>>) {
        if !self.clients.held {
            waits.push(Wait { fd: Some(self.epoll.as_fd()), writable: false, deadline: None });
        }
        waits.push(self.device.wait());
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

    fn submit_to(&mut self, ring: &mut Ring) -> bool {
        self.device.submit_to(ring)
    }

    fn reap_from(&mut self, ring: &mut Ring) {
        self.device.reap_from(ring);
    }

    fn leave_ring(&mut self) {
        self.device.leave_ring();
    }

    fn hold(&mut self, hold: bool) {
        self.clients.held = hold;
        if let Entrance::Open(serving) = &self.entrance {
            serving.hold(hold);
        }
    }

    fn export(&self, fds: &mut Fds, now: Instant) -> Result<Value, NotNow> {
        let Entrance::Open(serving) = &self.entrance else {
            return Err(NotNow::Never("its msgq clients cannot connect anew".into()));
        };
        if self.inflight() != 0 {
            return Err(NotNow::Busy(format!("{} requests of msgq clients are under way", self.inflight())));
        }
        if !serving.is_quiet() || self.arrivals.has_mail() {
            return Err(NotNow::Busy("a msgq client is being set up".into()));
        }
        let state = FrontState { socket: serving.export(fds)?, device: self.device.export(fds, now)? };
        serde_json::to_value(state).map_err(|error| NotNow::Never(error.to_string()))
    }

    fn import(&mut self, state: Value, fds: &mut Fds, now: Instant) -> Result<(), BadState> {
        let state: FrontState = serde_json::from_value(state)
            .map_err(|source| BadState::Json { what: "the front for msgq clients", source })?;
        let Entrance::Closed(_, listener) = &mut self.entrance else {
            return Err(BadState::Text("a front that is open already takes over from no other".into()));
        };
        let mut theirs = Listener::import(state.socket, fds)?;
        self.device.import(state.device, fds, now)?;
        self.device.set_features(self.clients.features);
        self.device.read_config(0, &mut self.clients.config);
        // Until this process is the owner, the file is the other one's.
        let identity = theirs.release();
        *listener = Some((theirs, identity));
        Ok(())
    }

    fn own(&mut self) -> std::io::Result<()> {
        let Entrance::Closed(options, listener) = std::mem::replace(&mut self.entrance, Entrance::None)
        else {
            return Ok(());
        };
        let Some((mut listener, identity)) = listener else { return Ok(()) };
        listener.own(identity);
        self.entrance = Entrance::Open(self.open(listener, *options)?);
        Ok(())
    }

    fn given(&mut self) {
        if let Entrance::Open(serving) = &mut self.entrance {
            serving.release();
        }
        self.entrance = Entrance::None;
        // They see the connection end, after all that was completed.
        self.clients.places.iter_mut().for_each(|place| *place = None);
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
        let mut told = tell(&mut self.device, ask, now);
        if let Told::Samples(samples) = &mut told {
            let channels = self.clients.places.iter().flatten().map(|client| &client.channel);
            metrics::collect(samples, channels, &self.stats);
        }
        if let Told::Status(value) = &mut told {
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
            if let Value::Object(fields) = value {
                fields.insert("msgq".into(), msgq);
            }
        }
        told
    }
}

fn watch(epoll: &OwnedFd, fd: impl AsFd) -> rustix::io::Result<()> {
    epoll::add(epoll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
}

fn describe(client: &Client) -> Value {
    let counters: serde_json::Map<_, _> =
        client.channel.stats().counters().map(|(name, count)| (name, count.into())).collect();
    let service = metrics::snapshot(&client.channel.stats().service);
    json!({
        "channel": format!("{:032x}", client.channel.agreed().channel),
        "inflight": client.inflight(),
        "memory_bytes": client.channel.memory_bytes(),
        "counters": counters,
        // From receiving a request to publishing its completion; upper bounds, powers of two.
        "service_ns": {
            "count": service.count,
            "sum": service.sum_ns,
            "p50": service.quantile_ns(0.5),
            "p99": service.quantile_ns(0.99),
        },
    })
}
