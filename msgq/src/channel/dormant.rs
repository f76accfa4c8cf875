//! Recovery: what is left of a channel whose peer is gone, or whose own side died, and how it goes on.
//!
//! Every epoch has new control memories; a ring is never used again. What this side published and the peer did not
//! answer is sent again with the REPLAY mark, oldest first; what the peer had published was received before the channel
//! was put to rest ([`Channel::receive`] until [`Error::Gone`](super::Error::Gone)).

use std::collections::VecDeque;
use std::os::fd::{BorrowedFd, OwnedFd};

use super::flight::Flight;
use super::held::Held;
use super::{Again, Channel, Stats};
use crate::handshake::{Config, HandshakeError, Hello, Link, Prior};
use crate::layout::flags;
use crate::region::{Access, Pool};
use crate::shm::file::FileError;

/// Descriptors and numbers by which a later incarnation goes on. The keeper (the monitor, say) holds copies.
#[derive(Debug)]
pub struct Keepsake<'c> {
    /// Requests in flight.
    pub flight: BorrowedFd<'c>,
    /// Control memory: for a post-mortem only.
    pub control: BorrowedFd<'c>,
    /// The channel.
    pub channel: u128,
    /// Its epoch.
    pub epoch: u64,
    /// Number, generation, access and file of each region.
    pub regions: Vec<(u16, u16, Access, BorrowedFd<'c>)>,
}

/// A channel without a peer.
#[derive(Debug)]
pub struct Dormant {
    prior: Prior,
    flight: Flight,
    /// `None` in a new incarnation, which knows of no request of the peer's.
    held: Option<Held>,
    pools: Vec<Pool>,
    /// One-way messages that the peer may not have seen.
    unread: VecDeque<Again>,
    stats: Stats,
}

impl Channel {
    /// Puts a channel to rest whose peer is gone. Receive everything before; what is not received is lost.
    #[must_use]
    pub fn into_dormant(mut self) -> Dormant {
        if let Some(index) = self.settle.take() {
            self.settled(index);
        }
        let mut unread = VecDeque::new();
        for (number, lane) in self.lanes.iter_mut().enumerate() {
            // A head that lies makes more be sent again, or less: the peer that wrote it is gone.
            let _ = lane.tx.refresh();
            let head = lane.tx.head();
            let mut bufs = std::mem::take(&mut lane.one_way);
            let mut slots = Vec::new();
            for index in head..lane.tx.tail() {
                let Some(desc) = lane.tx.published(index) else { continue };
                if desc.kind() != flags::ONE_WAY {
                    continue;
                }
                slots.push(desc);
                if !desc.has(flags::MORE) {
                    let own = bufs.iter().filter(|(last, ..)| *last == index);
                    let own = own.map(|&(_, region, buf)| (region, buf)).collect();
                    let slots = std::mem::take(&mut slots);
                    unread.push_back(Again { lane: number as u8, slots, bufs: own });
                }
            }
            // Those that the peer has seen are free; the others, when the new ring's head passes them.
            bufs.retain(|(last, ..)| *last < head);
            for (_, region, buf) in bufs {
                if let Some(Some((pool, _))) = self.pools.get(usize::from(region)) {
                    pool.inner.release(buf);
                }
            }
        }
        // What was to be sent again and was not yet.
        unread.extend(self.replay.drain(..).filter(|again| again.slots[0].kind() == flags::ONE_WAY));
        Dormant {
            prior: Prior { channel: self.agreed.channel, epoch: self.agreed.epoch },
            flight: self.flight,
            held: Some(self.held),
            pools: self.pools.into_iter().flatten().map(|(pool, _)| pool).collect(),
            unread,
            stats: self.stats,
        }
    }
}

impl Dormant {
    /// Goes on for a side that died, with what its keeper kept. `pools` are the old regions ([`Pool::restore`]), so that
    /// what is sent again finds its data, and new ones under other numbers.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn restore(flight: OwnedFd, channel: u128, epoch: u64, pools: Vec<Pool>) -> Result<Self, FileError> {
        let flight = Flight::adopt(flight)?;
        let stats = Stats { epoch, ..Stats::default() };
        let prior = Prior { channel, epoch };
        Ok(Self { prior, flight, held: None, pools, unread: VecDeque::new(), stats })
    }

    /// The channel that it is.
    #[must_use]
    pub fn channel(&self) -> u128 {
        self.prior.channel
    }

    /// Its last epoch.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.prior.epoch
    }

    /// Requests that will be sent again.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.flight.in_flight()
    }

    /// Numbers of the regions that requests to be sent again refer to: those a new incarnation has to
    /// [restore](Pool::restore).
    #[must_use]
    pub fn regions_in_use(&self) -> Vec<u16> {
        let unanswered = self.flight.unanswered();
        let slots = unanswered.iter().flat_map(|(_, slots)| slots);
        let mut numbers: Vec<u16> =
            slots.filter(|desc| !desc.has(flags::INLINE)).map(|desc| desc.region).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }

    /// Announces another pool from the next epoch on.
    pub fn add_pool(&mut self, pool: Pool) {
        self.pools.push(pool);
    }

    /// Tokens of the requests that will be sent again, oldest first.
    #[must_use]
    pub fn tokens(&self) -> Vec<super::Token> {
        self.flight.unanswered().iter().map(|(_, slots)| super::Token(slots[0].cookie)).collect()
    }

    /// Connects anew.
    ///
    /// # Errors
    /// [`HandshakeError`], and the dormant channel to try again with.
    pub fn connect(self, link: Link, config: &Config) -> Result<Channel, (HandshakeError, Box<Self>)> {
        let config = self.config(config);
        match crate::handshake::connect(link, &config, &self.pools, Some(self.prior)) {
            Ok(established) => Ok(self.wake(established)),
            Err(error) => Err((error, Box::new(self))),
        }
    }

    /// Accepts the peer's next incarnation (or the same one), which said `hello`.
    ///
    /// # Errors
    /// [`HandshakeError`], and the dormant channel to try again with.
    pub fn accept(
        self,
        link: Link,
        hello: Hello,
        config: &Config,
    ) -> Result<Channel, (HandshakeError, Box<Self>)> {
        let config = self.config(config);
        match crate::handshake::accept(link, hello, &config, &self.pools, Some(self.prior)) {
            Ok(established) => Ok(self.wake(established)),
            Err(error) => Err((error, Box::new(self))),
        }
    }

    /// The tables stay as large as they were.
    fn config(&self, config: &Config) -> Config {
        let mut config = config.clone();
        config.window = config.window.min(self.flight.window() as u32);
        config.chain_max = config.chain_max.min(self.flight.chain_max() as u16);
        config
    }

    fn wake(self, established: crate::handshake::Established) -> Channel {
        let agreed = established.agreed;
        let mut held = match self.held {
            Some(held) if held.takes(agreed.window_theirs, agreed.chain_max) => held,
            _ => Held::new(agreed.window_theirs, agreed.chain_max),
        };
        if !agreed.peer_resumes {
            held.orphan();
        }
        let mut channel = Channel::with(established, self.flight, held, self.stats);
        // One-way messages first: they were published in order among themselves, and nobody waits for the requests less.
        channel.replay = self.unread;
        let requests = channel.flight.unanswered().into_iter();
        channel.replay.extend(requests.map(|(lane, slots)| Again { lane, slots, bufs: Vec::new() }));
        channel.blocked = true;
        let _ = channel.pump_replay();
        channel.commit();
        channel
    }
}
