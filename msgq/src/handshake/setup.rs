//! [`Setup`]: the set-up of one side as a state machine. Messages and descriptors go in and come out; sockets and clocks are
//! somebody else's.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::wire::Message;
use super::{Agreed, Config, Hello, Link, LinkError, features};
use crate::bell::{BellError, Ear, Kind, Ringer};
use crate::layout::{LANES_MAX, LOG2_SLOTS_MAX, LOG2_SLOTS_MIN, MAGIC, VERSION, control_bytes, header};
use crate::region::{PeerRegion, PeerRegions, Pool};
use crate::ring::Words;
use crate::shm::Mapping;
use crate::shm::file::{Access, FileError, check, create};
use crate::sync::Ordering;

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The control socket.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A message that does not belong here.
    #[error("unexpected message type {0}")]
    Unexpected(u16),
    /// No version that both understand.
    #[error("the peer speaks versions {min} to {max}, this side {VERSION}")]
    Version {
        /// Its oldest.
        min: u16,
        /// Its newest.
        max: u16,
    },
    /// A limit that makes no sense.
    #[error("the peer's {what} cannot be {value}")]
    Limit {
        /// Which one.
        what: &'static str,
        /// What it said.
        value: u64,
    },
    /// Features that one side must have are not there.
    #[error("feature bits {0:#x} are needed")]
    Features(u64),
    /// Another channel than this side's.
    #[error("the peer belongs to another channel")]
    Channel,
    /// A file that the peer sent.
    #[error("the peer's {what} is not acceptable")]
    File {
        /// Which one.
        what: &'static str,
        /// Why.
        #[source]
        source: FileError,
    },
    /// Too many regions, or too large ones.
    #[error("regions exceed {0}")]
    Quota(&'static str),
    /// A bell that the peer sent, or one of ours.
    #[error(transparent)]
    Bell(#[from] BellError),
    /// This side has not enough of something.
    #[error("cannot make the channel's memory")]
    Memory(#[source] FileError),
}

/// A message to be sent.
#[derive(Debug)]
pub struct Packet {
    /// The message.
    pub message: Message,
    /// Its descriptor.
    pub fd: Option<OwnedFd>,
}

/// An earlier life of the channel, of which this side has the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prior {
    /// The channel.
    pub channel: u128,
    /// Its last epoch.
    pub epoch: u64,
}

/// What a finished set-up leaves.
#[derive(Debug)]
pub struct Established {
    pub(crate) agreed: Agreed,
    pub(crate) link: Link,
    pub(crate) control_file: OwnedFd,
    pub(crate) own: Arc<Mapping>,
    pub(crate) peer: Arc<Mapping>,
    pub(crate) regions: PeerRegions,
    pub(crate) pools: Vec<Pool>,
    pub(crate) ringer: Ringer,
    pub(crate) ear: Ear,
    pub(crate) quota: (u16, u64),
}

impl Established {
    /// What was agreed.
    #[must_use]
    pub fn agreed(&self) -> &Agreed {
        &self.agreed
    }
}

/// What this side made.
#[derive(Debug)]
struct Own {
    file: OwnedFd,
    map: Arc<Mapping>,
    ringer: Ringer,
}

/// The state machine.
#[derive(Debug)]
pub struct Setup {
    accepts: bool,
    config: Config,
    pools: Vec<Pool>,
    prior: Option<Prior>,
    out: VecDeque<Packet>,
    agreed: Option<Agreed>,
    own: Option<Own>,
    peer: Option<Arc<Mapping>>,
    regions: PeerRegions,
    region_count: u16,
    ear: Option<Ear>,
    acks: usize,
    started: bool,
}

impl Setup {
    /// The side that speaks first.
    #[must_use]
    pub fn connecting(config: Config, pools: Vec<Pool>, prior: Option<Prior>) -> Self {
        let mut this = Self::new(false, config, pools, prior);
        let hello = this.hello();
        this.out.push_back(Packet { message: Message::Hello(hello), fd: None });
        this
    }

    /// The side that answers.
    #[must_use]
    pub fn accepting(config: Config, pools: Vec<Pool>, prior: Option<Prior>) -> Self {
        Self::new(true, config, pools, prior)
    }

    fn new(accepts: bool, config: Config, pools: Vec<Pool>, prior: Option<Prior>) -> Self {
        Self {
            accepts,
            config,
            pools,
            prior,
            out: VecDeque::new(),
            agreed: None,
            own: None,
            peer: None,
            regions: PeerRegions::default(),
            region_count: 0,
            ear: None,
            acks: 0,
            started: false,
        }
    }

    fn hello(&self) -> Hello {
        let prior = self.prior.unwrap_or(Prior { channel: 0, epoch: 0 });
        Hello {
            epoch: prior.epoch + 1,
            channel: prior.channel,
            resumes: self.prior.is_some(),
            ..self.config.hello()
        }
    }

    /// The next message to send.
    pub fn outgoing(&mut self) -> Option<Packet> {
        self.out.pop_front()
    }

    /// Whether there is nothing to wait for any more. What is [`outgoing`](Self::outgoing) has to be sent all the same.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.started && self.acks == self.pools.len() && self.out.is_empty()
    }

    /// A message came.
    ///
    /// # Errors
    /// It ends the set-up.
    pub fn incoming(&mut self, message: Message, fd: Option<OwnedFd>) -> Result<(), HandshakeError> {
        let unexpected = HandshakeError::Unexpected(message.kind());
        match (message, fd) {
            (Message::Hello(hello), None) if self.accepts && self.agreed.is_none() => self.welcome(&hello),
            (Message::Welcome(hello), None) if !self.accepts && self.agreed.is_none() => {
                self.welcomed(&hello)
            }
            (Message::RegionAck { number }, None) if self.own.is_some() => {
                let known = self.pools.iter().any(|pool| pool.region() == number);
                if !known || self.acks == self.pools.len() {
                    return Err(unexpected);
                }
                self.acks += 1;
                Ok(())
            }
            (Message::Bye { .. }, None) => Err(LinkError::Gone.into()),
            _ if self.agreed.is_none() || self.started => Err(unexpected),
            (Message::Control { bytes }, Some(fd)) if self.peer.is_none() => self.control(bytes, &fd),
            (Message::Region { number, generation, both_write, bytes }, Some(fd)) => {
                let access = if both_write { Access::Both } else { Access::Owner };
                self.region(number, generation, access, bytes, fd)
            }
            (Message::Bell { event }, Some(fd)) if self.ear.is_none() => {
                let kind = if event { Kind::Event } else { Kind::Pipe };
                if kind != self.bell() {
                    return Err(unexpected);
                }
                self.ear = Some(Ear::adopt(fd, kind)?);
                Ok(())
            }
            (Message::Start, None) if self.peer.is_some() && self.ear.is_some() => {
                self.started = true;
                Ok(())
            }
            _ => Err(unexpected),
        }
    }

    fn welcome(&mut self, theirs: &Hello) -> Result<(), HandshakeError> {
        if theirs.version_min > VERSION || theirs.version_max < VERSION {
            return Err(HandshakeError::Version { min: theirs.version_min, max: theirs.version_max });
        }
        let mut mine = self.hello();
        if let Some(prior) = self.prior
            && theirs.channel != prior.channel
        {
            return Err(HandshakeError::Channel);
        }
        mine.lanes = mine.lanes.min(theirs.lanes);
        mine.features &= theirs.features;
        mine.epoch = mine.epoch.max(theirs.epoch);
        mine.channel = match theirs.channel {
            0 => fresh_channel(),
            channel => channel,
        };
        self.agree(&mine, theirs, mine)?;
        self.out.push_back(Packet { message: Message::Welcome(mine), fd: None });
        self.offer()
    }

    fn welcomed(&mut self, welcome: &Hello) -> Result<(), HandshakeError> {
        if welcome.version_min != VERSION || welcome.version_max != VERSION {
            return Err(HandshakeError::Version { min: welcome.version_min, max: welcome.version_max });
        }
        let mine = self.hello();
        if self.prior.is_some_and(|prior| welcome.channel != prior.channel) || welcome.channel == 0 {
            return Err(HandshakeError::Channel);
        }
        if welcome.lanes > mine.lanes {
            return Err(HandshakeError::Limit { what: "number of lanes", value: welcome.lanes.into() });
        }
        if welcome.features & !mine.features != 0 {
            return Err(HandshakeError::Features(welcome.features & !mine.features));
        }
        self.agree(&mine, welcome, *welcome)?;
        self.offer()
    }

    fn agree(&mut self, mine: &Hello, theirs: &Hello, welcome: Hello) -> Result<(), HandshakeError> {
        let limit = |what, value, ok: bool| {
            if ok { Ok(()) } else { Err(HandshakeError::Limit { what, value }) }
        };
        let slots = theirs.log2_slots;
        limit("ring size", slots.into(), (LOG2_SLOTS_MIN..=LOG2_SLOTS_MAX).contains(&slots))?;
        limit("number of lanes", theirs.lanes.into(), (1..=LANES_MAX).contains(&theirs.lanes))?;
        limit("window", theirs.window.into(), theirs.window >= 1)?;
        limit("message length", theirs.chain_max.into(), theirs.chain_max >= 1)?;
        limit("segment length", theirs.segment_max.into(), theirs.segment_max >= 1)?;
        // An epoch is one more than the one before; nobody has had this many.
        let epochs = mine.epoch..=u64::from(u32::MAX);
        limit(
            "epoch",
            welcome.epoch,
            epochs.contains(&welcome.epoch) && welcome.epoch >= theirs.epoch.min(mine.epoch),
        )?;
        let missing = self.config.required & !welcome.features;
        if missing != 0 {
            return Err(HandshakeError::Features(missing));
        }
        self.agreed = Some(Agreed::new(mine, theirs, &welcome));
        Ok(())
    }

    fn bell(&self) -> Kind {
        match self.agreed {
            Some(agreed) if agreed.features & features::EVENT_BELL != 0 => Kind::Event,
            _ => Kind::Pipe,
        }
    }

    /// Makes this side's memory and bell, and queues all that the peer gets of it.
    fn offer(&mut self) -> Result<(), HandshakeError> {
        let agreed = self.agreed.expect("agreed before");
        let bytes = control_bytes(agreed.lanes, agreed.log2_mine);
        let (file, map) = create("msgq-control", bytes, Access::Owner).map_err(HandshakeError::Memory)?;
        for (word, value) in header_words(&agreed, agreed.log2_mine) {
            map.words()[word].store(value, Ordering::Relaxed);
        }
        let map = Arc::new(map);
        // No message is published yet, so wishes and heads are all that the peer may see; they are set up here, before
        // it can.
        for lane in 0..agreed.lanes {
            let lane = crate::layout::lane(lane, agreed.log2_mine);
            map.words()[lane.rx_event].store(crate::layout::PARKED, Ordering::Relaxed);
            map.words()[lane.tx_event].store(crate::layout::PARKED, Ordering::Relaxed);
        }
        let copy = |fd: std::os::fd::BorrowedFd<'_>| {
            fd.try_clone_to_owned().map_err(|_| {
                HandshakeError::Memory(FileError::System {
                    what: "copy a descriptor",
                    error: rustix::io::Errno::MFILE,
                })
            })
        };
        let (ringer, end) = Ringer::new(self.bell())?;
        let control = Message::Control { bytes: bytes as u64 };
        let fd = copy(std::os::fd::AsFd::as_fd(&file))?;
        self.out.push_back(Packet { message: control, fd: Some(fd) });
        for pool in &self.pools {
            let message = region_message(pool);
            self.out.push_back(Packet { message, fd: Some(copy(pool.file())?) });
        }
        let event = self.bell() == Kind::Event;
        self.out.push_back(Packet { message: Message::Bell { event }, fd: Some(end) });
        self.out.push_back(Packet { message: Message::Start, fd: None });
        self.own = Some(Own { file, map, ringer });
        Ok(())
    }

    fn control(&mut self, bytes: u64, fd: &OwnedFd) -> Result<(), HandshakeError> {
        let agreed = self.agreed.expect("agreed before");
        let wanted = control_bytes(agreed.lanes, agreed.log2_theirs);
        let refuse = |source| HandshakeError::File { what: "control memory", source };
        if bytes != wanted as u64 {
            return Err(refuse(FileError::Size { found: bytes, announced: wanted as u64 }));
        }
        check(fd, bytes, Access::Owner).map_err(refuse)?;
        let map = Mapping::read_only(fd, wanted)
            .map_err(|error| refuse(FileError::System { what: "map it", error }))?;
        // For people who look at a dump, and against mix-ups; nothing is ever taken from there.
        for (word, value) in header_words(&agreed, agreed.log2_theirs) {
            let found = map.words()[word].load(Ordering::Relaxed);
            if found != value {
                return Err(HandshakeError::Limit { what: "control memory header", value: found });
            }
        }
        self.peer = Some(Arc::new(map));
        Ok(())
    }

    fn region(
        &mut self,
        number: u16,
        generation: u16,
        access: Access,
        bytes: u64,
        fd: OwnedFd,
    ) -> Result<(), HandshakeError> {
        let quota = (self.config.regions_max, self.config.region_bytes_max);
        self.region_count += 1;
        if self.region_count > self.config.regions_max {
            return Err(HandshakeError::Quota("their number"));
        }
        if self.regions.get(number).is_some() {
            return Err(HandshakeError::Quota("one for each number"));
        }
        take_region(&mut self.regions, quota, number, generation, access, bytes, fd)?;
        self.out.push_back(Packet { message: Message::RegionAck { number }, fd: None });
        Ok(())
    }

    /// The channel's parts.
    ///
    /// # Errors
    /// It is not done.
    pub fn finish(self, link: Link) -> Result<Established, HandshakeError> {
        let quota = (self.config.regions_max, self.config.region_bytes_max);
        match (self.agreed, self.own, self.peer, self.ear) {
            (Some(agreed), Some(own), Some(peer), Some(ear)) if self.started => Ok(Established {
                agreed,
                link,
                control_file: own.file,
                own: own.map,
                peer,
                regions: self.regions,
                pools: self.pools,
                ringer: own.ringer,
                ear,
                quota,
            }),
            _ => Err(LinkError::Late.into()),
        }
    }
}

/// Checks a region against the quota, and its file; maps it and puts it into the table.
pub(crate) fn take_region(
    regions: &mut PeerRegions,
    quota: (u16, u64),
    number: u16,
    generation: u16,
    access: Access,
    bytes: u64,
    fd: OwnedFd,
) -> Result<(), HandshakeError> {
    if number >= quota.0 {
        return Err(HandshakeError::Quota("the number of regions"));
    }
    if regions.total().saturating_add(bytes) > quota.1 {
        return Err(HandshakeError::Quota("the bytes allowed"));
    }
    let refuse = |source| HandshakeError::File { what: "region", source };
    check(&fd, bytes, access).map_err(refuse)?;
    let region = PeerRegion::new(fd, bytes, generation, access)
        .map_err(|error| refuse(FileError::System { what: "map it", error }))?;
    regions.insert(number, region);
    Ok(())
}

/// How a pool is announced.
pub(crate) fn region_message(pool: &Pool) -> Message {
    Message::Region {
        number: pool.region(),
        generation: pool.generation(),
        both_write: pool.access() == Access::Both,
        bytes: pool.len_bytes() as u64,
    }
}

fn header_words(agreed: &Agreed, log2_slots: u8) -> [(usize, u64); 8] {
    [
        (header::MAGIC, MAGIC),
        (header::VERSION, VERSION.into()),
        (header::LOG2_SLOTS, log2_slots.into()),
        (header::LANES, agreed.lanes.into()),
        (header::FEATURES, agreed.features),
        (header::EPOCH, agreed.epoch),
        (header::CHANNEL_LOW, agreed.channel as u64),
        (header::CHANNEL_HIGH, (agreed.channel >> 64) as u64),
    ]
}

/// A number for a new channel that nobody guesses.
fn fresh_channel() -> u128 {
    let mut bytes = [0; 16];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u128::from_le_bytes(bytes) | 1
}
