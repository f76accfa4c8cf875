//! Set-up: two processes with a socket between them become the two ends of a channel.
//!
//! ```text
//!  connecting side                               accepting side
//!    HELLO version, limits, features, epoch  ──►
//!                                            ◄──  WELCOME version, features, lanes, epoch, channel: chosen
//!    CONTROL + file, REGION + file ..., BELL + end, START   (both, in this order, not waiting for each other)
//!    REGION_ACK for each REGION                             (both)
//! ```
//!
//! Each side is ready when it has START and an acknowledgement of each of its regions. [`Setup`] is the state machine
//! without I/O; [`connect`] and [`accept`] run it on a socket against a deadline. Whatever is unexpected ends it.

mod link;
mod setup;
pub mod wire;

use std::time::{Duration, Instant};

pub use link::{Link, LinkError};
pub use setup::{Established, HandshakeError, Packet, Prior, Setup};
pub(crate) use setup::{region_message, take_region};
pub use wire::{Hello, Message};

use crate::layout::{LANES_MAX, LOG2_SLOTS_MAX, LOG2_SLOTS_MIN};
use crate::region::Pool;

/// Feature bits. Those from [`APPLICATION`](features::APPLICATION) up are the application's.
pub mod features {
    /// Bells may be eventfds: each side trusts the other, or has confined it.
    pub const EVENT_BELL: u64 = 1;
    /// All bits that the queue itself knows.
    pub const KNOWN: u64 = EVENT_BELL;
    /// First bit for applications.
    pub const APPLICATION: u64 = 1 << 32;
}

/// What one side wants and allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Slots of each of its own rings, as a power of two, 2 to 15.
    pub log2_slots: u8,
    /// Rings in each direction, from the most urgent one, 1 to 4.
    pub lanes: u8,
    /// Most requests of its own without completion; cut to half of the smaller ring.
    pub window: u32,
    /// Most slots of one message, 255 at most; cut to a quarter of the smaller ring.
    pub chain_max: u16,
    /// Longest segment in bytes.
    pub segment_max: u32,
    /// Feature bits offered.
    pub features: u64,
    /// Feature bits without which there is no channel.
    pub required: u64,
    /// Most regions of the peer.
    pub regions_max: u16,
    /// Most bytes in all regions of the peer.
    pub region_bytes_max: u64,
    /// How long the set-up may take.
    pub deadline: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            log2_slots: 10,
            lanes: 1,
            window: 256,
            chain_max: 8,
            segment_max: 16 << 20,
            features: 0,
            required: 0,
            regions_max: 64,
            region_bytes_max: 1 << 34,
            deadline: Duration::from_secs(1),
        }
    }
}

impl Config {
    /// What it says of itself.
    fn hello(&self) -> Hello {
        Hello {
            version_min: crate::layout::VERSION,
            version_max: crate::layout::VERSION,
            log2_slots: self.log2_slots.clamp(LOG2_SLOTS_MIN, LOG2_SLOTS_MAX),
            lanes: self.lanes.clamp(1, LANES_MAX),
            // Its length has eight bits in the flight log.
            chain_max: self.chain_max.clamp(1, 255),
            window: self.window.max(1),
            segment_max: self.segment_max.max(1),
            features: self.features,
            ..Hello::default()
        }
    }
}

/// What both sides work out alike from HELLO and WELCOME.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Feature bits.
    pub features: u64,
    /// Number of this life of the channel.
    pub epoch: u64,
    /// The channel.
    pub channel: u128,
    /// Rings in each direction.
    pub lanes: u8,
    /// Most slots of one message.
    pub chain_max: u16,
    /// Longest segment in bytes.
    pub segment_max: u32,
    /// Slots of this side's rings, as a power of two.
    pub log2_mine: u8,
    /// Slots of the peer's rings, as a power of two.
    pub log2_theirs: u8,
    /// Most requests of this side without completion.
    pub window_mine: u32,
    /// Most requests of the peer without completion: so many slots of this side's rings are kept for completions.
    pub window_theirs: u32,
    /// The peer still has the state of the previous epoch, and repeats what was not completed.
    pub peer_resumes: bool,
}

impl Agreed {
    fn new(mine: &Hello, theirs: &Hello, welcome: &Hello) -> Self {
        let smaller = 1u32 << mine.log2_slots.min(theirs.log2_slots);
        Self {
            features: welcome.features,
            epoch: welcome.epoch,
            channel: welcome.channel,
            lanes: welcome.lanes,
            chain_max: mine.chain_max.min(theirs.chain_max).min((smaller / 4) as u16),
            segment_max: mine.segment_max.min(theirs.segment_max),
            log2_mine: mine.log2_slots,
            log2_theirs: theirs.log2_slots,
            window_mine: mine.window.min(smaller / 2),
            window_theirs: theirs.window.min(smaller / 2),
            peer_resumes: theirs.resumes,
        }
    }

    /// Fewest slots that a ring may be shrunk to whose consumer may have `window` requests in flight, as a power of two:
    /// the completions' share, and room for one message.
    #[must_use]
    pub fn min_log2(&self, window: u32) -> u8 {
        let slots = window + u32::from(self.chain_max) + 1;
        (slots.next_power_of_two().trailing_zeros() as u8).max(LOG2_SLOTS_MIN)
    }
}

/// Connects: the side that speaks first.
///
/// # Errors
/// [`HandshakeError`].
pub fn connect(
    link: Link,
    config: &Config,
    pools: &[Pool],
    prior: Option<Prior>,
) -> Result<Established, HandshakeError> {
    let deadline = Instant::now() + config.deadline;
    let mut setup = Setup::connecting(config.clone(), pools.to_vec(), prior);
    drive(&link, &mut setup, deadline)?;
    setup.finish(link)
}

/// Waits for the first message of a side that connects, to decide what it gets.
///
/// # Errors
/// [`HandshakeError`].
pub fn read_hello(link: &Link, deadline: Instant) -> Result<Hello, HandshakeError> {
    match link.expect(deadline)? {
        (Message::Hello(hello), _) => Ok(hello),
        (other, _) => Err(HandshakeError::Unexpected(other.kind())),
    }
}

/// Accepts whoever said `hello`.
///
/// # Errors
/// [`HandshakeError`].
pub fn accept(
    link: Link,
    hello: Hello,
    config: &Config,
    pools: &[Pool],
    prior: Option<Prior>,
) -> Result<Established, HandshakeError> {
    let deadline = Instant::now() + config.deadline;
    let mut setup = Setup::accepting(config.clone(), pools.to_vec(), prior);
    setup.incoming(Message::Hello(hello), None)?;
    drive(&link, &mut setup, deadline)?;
    setup.finish(link)
}

fn drive(link: &Link, setup: &mut Setup, deadline: Instant) -> Result<(), HandshakeError> {
    let mut waiting: Option<Packet> = None;
    loop {
        while let Some(packet) = waiting.take().or_else(|| setup.outgoing()) {
            if !link.send(&packet.message, packet.fd.as_ref().map(std::os::fd::AsFd::as_fd))? {
                waiting = Some(packet);
                break;
            }
        }
        if waiting.is_none() && setup.is_done() {
            return Ok(());
        }
        match link.receive()? {
            Some((message, fd)) => setup.incoming(message, fd)?,
            None => link.wait(waiting.is_some(), deadline)?,
        }
        if Instant::now() >= deadline {
            return Err(LinkError::Late.into());
        }
    }
}

#[cfg(test)]
mod tests;
