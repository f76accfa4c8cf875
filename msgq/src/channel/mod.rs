//! [`Channel`]: one end of a connection between two processes.
//!
//! It joins rings, regions, windows, bells and the control socket. It belongs to one thread at a time (`Send`, and every
//! operation takes `&mut self`): one producer and one consumer per ring by construction. Many peers are many channels,
//! looked at by one thread in turn ([`Channel::arm`], [`wait_any`]).
//!
//! What the peer does wrong ends this channel with a [`Violation`]; what it publishes before it dies is still received.

mod dormant;
mod events;
mod flight;
mod held;
mod observe;
mod receive;
mod send;
mod size;
mod stats;
mod wait;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

pub use dormant::{Dormant, Keepsake};
pub use events::{Event, PeerState, RegionError};
pub use observe::{Observed, Phase};
pub use receive::{Completion, Incoming, OneWay, Request};
pub use send::{Batch, Head, SendError, Status, Token};
pub use size::{Fixed, RingUse, Sizer};
pub use stats::{COUNTERS, Durations, LATENCY_STEPS, Stats};
pub use wait::wait_any;

use crate::bell::{Ear, Ringer};
use crate::error::Violation;
use crate::handshake::{Agreed, Config, Established, HandshakeError, Hello, Link};
use crate::layout::Desc;
use crate::region::{PeerRegions, Pool, Segment};
use crate::ring::{Consumer, Producer, Shape};
use crate::shm::Mapping;
use crate::spin::Spin;
use flight::Flight;
use held::Held;

/// Why a channel does no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The peer broke a rule.
    #[error("the peer broke rule R{}", .0.rule())]
    Violation(#[from] Violation),
    /// The peer is gone, and everything that it had published was received.
    #[error("the peer is gone")]
    Gone,
    /// The system refused something while waiting.
    #[error("cannot wait: {0}")]
    Wait(rustix::io::Errno),
}

type Tx = Producer<Arc<Mapping>, Arc<Mapping>>;
type Rx = Consumer<Arc<Mapping>, Arc<Mapping>>;

/// Both rings of one priority.
#[derive(Debug)]
struct Lane {
    tx: Tx,
    rx: Rx,
    /// Slots of the message that is being received, if it has more than one.
    staged: Staged,
    /// Buffers of one-way messages, freed when the peer's head has passed the message.
    one_way: VecDeque<(u64, u16, u32)>,
}

/// A message to be sent again.
#[derive(Debug)]
struct Again {
    lane: u8,
    slots: Vec<Desc>,
    /// Buffers (region and number) to be freed when the peer's head has passed it: of a one-way message.
    bufs: Vec<(u16, u32)>,
}

#[derive(Debug)]
struct Staged {
    /// First slot of a message that is not whole; `None` between messages.
    first: Option<Desc>,
    /// First slot of the last message that was whole.
    head: Desc,
    slots: u16,
    segments: Vec<Segment>,
    since: Option<Instant>,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Channel {
    lanes: Vec<Lane>,
    flight: Flight,
    held: Held,
    pools: Vec<Option<(Pool, bool)>>,
    regions: PeerRegions,
    agreed: Agreed,
    quota: (u16, u64),
    link: Link,
    ringer: Ringer,
    ear: Ear,
    control_file: OwnedFd,
    control: Arc<Mapping>,
    /// The entry whose completion the application deals with now.
    settle: Option<u32>,
    /// Messages of the previous epoch that are sent again, before anything new.
    replay: VecDeque<Again>,
    /// Somebody waits for so many free slots in this lane.
    wanted: Option<(u8, u64)>,
    /// A kick is owed for released slots.
    kick: bool,
    peer: PeerState,
    failed: Option<Violation>,
    /// Something stands before the next message: it failed, or sends again what an earlier epoch left.
    blocked: bool,
    /// Times that line S was written.
    beat: u64,
    spin: Spin,
    clock: Option<Box<Clock>>,
    /// Nothing came since [`Channel::receive`] last found nothing, and nothing else is to be done when it does.
    idle: bool,
    stats: Stats,
}

/// When requests began, for the histograms.
#[derive(Debug)]
struct Clock {
    /// Own ones, by entry of the flight log.
    sent: Box<[Instant]>,
    /// The peer's, by their place among those that are held.
    taken: Box<[Instant]>,
    /// What time it is, if somebody says so.
    told: Option<Instant>,
}

impl Clock {
    #[inline]
    fn now(&self) -> Instant {
        self.told.unwrap_or_else(Instant::now)
    }
}

impl Channel {
    /// Connects to a side that accepts, over a connected socket.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub fn connect(link: Link, config: &Config, pools: &[Pool]) -> Result<Self, HandshakeError> {
        Self::new(crate::handshake::connect(link, config, pools, None)?)
    }

    /// Accepts a side that connects and has said `hello` ([`crate::handshake::read_hello`]).
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub fn accept(link: Link, hello: Hello, config: &Config, pools: &[Pool]) -> Result<Self, HandshakeError> {
        Self::new(crate::handshake::accept(link, hello, config, pools, None)?)
    }

    /// From a finished set-up.
    ///
    /// # Errors
    /// The memory for requests in flight cannot be had.
    pub fn new(established: Established) -> Result<Self, HandshakeError> {
        let agreed = established.agreed;
        let flight = Flight::new(agreed.window_mine, agreed.chain_max).map_err(HandshakeError::Memory)?;
        let held = Held::new(agreed.window_theirs, agreed.chain_max);
        Ok(Self::with(established, flight, held, Stats::default()))
    }

    fn with(established: Established, flight: Flight, held: Held, mut stats: Stats) -> Self {
        let Established {
            agreed,
            link,
            control_file,
            own,
            peer,
            regions,
            pools: announced,
            ringer,
            ear,
            quota,
        } = established;
        let lanes = (0..agreed.lanes).map(|lane| {
            let tx = Shape {
                lane,
                producer_log2: agreed.log2_mine,
                consumer_log2: agreed.log2_theirs,
                min_log2: agreed.min_log2(agreed.window_theirs),
            };
            let rx = Shape {
                lane,
                producer_log2: agreed.log2_theirs,
                consumer_log2: agreed.log2_mine,
                min_log2: agreed.min_log2(agreed.window_mine),
            };
            let segments = Vec::with_capacity(usize::from(agreed.chain_max));
            Lane {
                tx: Producer::new(Arc::clone(&own), Arc::clone(&peer), tx),
                rx: Consumer::new(Arc::clone(&own), Arc::clone(&peer), rx),
                staged: Staged { first: None, head: Desc::default(), slots: 0, segments, since: None },
                one_way: VecDeque::new(),
            }
        });
        let mut pools: Vec<Option<(Pool, bool)>> = Vec::new();
        for pool in announced {
            put_pool(&mut pools, pool, true);
        }
        stats.epoch = agreed.epoch;
        Self {
            lanes: lanes.collect(),
            flight,
            held,
            pools,
            regions,
            agreed,
            quota,
            link,
            ringer,
            ear,
            control_file,
            control: own,
            settle: None,
            replay: VecDeque::new(),
            wanted: None,
            kick: false,
            peer: PeerState::Running,
            failed: None,
            blocked: false,
            beat: 0,
            spin: Spin::default(),
            clock: None,
            idle: false,
            stats,
        }
    }

    /// What was agreed at set-up.
    #[must_use]
    pub fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Requests of this side without completion.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.flight.in_flight()
    }

    /// Requests of the peer that this side has not completed.
    #[must_use]
    pub fn held(&self) -> u32 {
        self.held.count()
    }

    /// The peer's regions.
    #[must_use]
    pub fn regions(&self) -> &PeerRegions {
        &self.regions
    }

    /// How this channel looks for messages before it sleeps ([`wait`](Self::wait)).
    pub fn set_spin(&mut self, spin: Spin) {
        self.spin = spin;
    }

    /// Measures from here on how long requests take: own ones from sending to completion ([`Stats::latency`]), the peer's from
    /// receiving to completing ([`Stats::service`]). That is two looks at the clock for each, unless the caller
    /// [says](Self::set_now) what time it is.
    pub fn measure_latency(&mut self) {
        let now = Instant::now();
        self.clock = Some(Box::new(Clock {
            sent: vec![now; self.flight.window()].into(),
            taken: vec![now; self.held.places()].into(),
            told: None,
        }));
    }

    /// What time it is, until the next call: for a thread that looks at the clock once for many messages and channels.
    #[inline]
    pub fn set_now(&mut self, now: Instant) {
        if let Some(clock) = &mut self.clock {
            clock.told = Some(now);
        }
    }

    /// What becomes readable when the peer kicks. It stays so until [`arm`](Self::arm).
    #[must_use]
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.ear.as_fd()
    }

    /// The control socket: readable when [`attend`](Self::attend) has something to do.
    #[must_use]
    pub fn link(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }

    /// Bytes of memory that this side has taken for the channel: control memory, flight log, tables. Regions are not
    /// among them; the peer's control memory is the peer's.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let staged: usize =
            self.lanes.iter().map(|lane| lane.staged.segments.capacity() * size_of::<Segment>()).sum();
        self.control.len() + self.flight.bytes() + self.held.bytes() + staged + size_of::<Self>()
    }

    /// What this side's death must not take away, for whoever keeps it ([`Dormant::restore`]).
    #[must_use]
    pub fn keepsake(&self) -> Keepsake<'_> {
        Keepsake {
            flight: self.flight.file(),
            control: self.control_file.as_fd(),
            channel: self.agreed.channel,
            epoch: self.agreed.epoch,
            regions: self
                .pools
                .iter()
                .flatten()
                .map(|(pool, _)| (pool.region(), pool.generation(), pool.access(), pool.file()))
                .collect(),
        }
    }

    /// This side's control memory, for tests that play a hostile peer. It can only harm this channel's other end, whose
    /// business it is not to be harmed.
    #[doc(hidden)]
    #[must_use]
    pub fn control_words(&self) -> Arc<Mapping> {
        Arc::clone(&self.control)
    }

    #[cold]
    fn fail(&mut self, violation: Violation) -> Error {
        self.blocked = true;
        if self.failed.is_none() {
            self.failed = Some(violation);
            self.stats.violation(&violation);
            self.show();
        }
        Error::Violation(violation)
    }
}

fn put_pool(pools: &mut Vec<Option<(Pool, bool)>>, pool: Pool, ready: bool) {
    let at = usize::from(pool.region());
    if pools.len() <= at {
        pools.resize_with(at + 1, || None);
    }
    pools[at] = Some((pool, ready));
}

#[cfg(test)]
mod tests;
