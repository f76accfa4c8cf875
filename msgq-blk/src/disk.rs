//! [`Disk`]: the client.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use msgq::handshake::{Config, HandshakeError, Link, LinkError};
use msgq::region::{Access, Pool};
use msgq::shm::Outside;
use msgq::shm::file::FileError;
use msgq::spin::Spin;
use msgq::{Channel, Completion, Dormant, Head, Incoming, PeerState, SendError, Token};

use crate::proto::{self, Info, IoError};

/// Region that the VCP writes to.
const IN: u16 = 0;
/// Region that it only reads.
const OUT: u16 = 1;

/// What a client takes.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most requests in flight, 1 to 1024.
    pub depth: u16,
    /// Most bytes of a request.
    pub io_bytes: u32,
    /// How long setting up may take.
    pub deadline: Duration,
    /// How it looks for completions before it sleeps.
    pub spin: Spin,
    /// For so long after the server was gone (an upgrade, a death) [`Disk::wait`] tries to reach its next incarnation before
    /// it fails. Nothing is lost meanwhile: what is in flight is sent again, with a mark. Zero: the caller sees
    /// [`msgq::Error::Gone`] and [reconnects](Disk::reconnect) itself. Only for a disk that was opened by its path.
    pub reattach: Duration,
    /// Measure how long requests take ([`msgq::Stats::latency`] of the [channel](Disk::channel); also seen by whoever holds its
    /// control memory): two looks at the clock for each.
    pub latency: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            depth: 64,
            io_bytes: 128 << 10,
            deadline: Duration::from_secs(1),
            spin: Spin::default(),
            reattach: Duration::from_secs(10),
            latency: true,
        }
    }
}

/// What went wrong with the client; what went wrong with a request is an [`IoError`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody serves a disk there.
    #[error("cannot connect to {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: LinkError,
    },
    /// The server is no disk, or one of another kind.
    #[error("cannot set up a channel")]
    SetUp(#[from] HandshakeError),
    /// No memory for buffers.
    #[error("cannot make buffers")]
    Memory(#[from] FileError),
    /// As many requests in flight as may be. Poll, then try again.
    #[error("as many requests are in flight as may be")]
    Full,
    /// A request longer than its buffer, not of whole blocks, or outside the disk.
    #[error("{len} bytes at sector {sector} are not a request for this disk")]
    Range {
        /// First sector.
        sector: u64,
        /// Bytes.
        len: u64,
    },
    /// The channel.
    #[error(transparent)]
    Send(SendError),
    /// The channel does no more. [`Disk::reconnect`] goes on where it ended.
    #[error(transparent)]
    Channel(#[from] msgq::Error),
    /// A request that was waited for.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Bytes that a completion does not have.
    #[error(transparent)]
    Outside(#[from] Outside),
    /// The server told nothing sensible of the disk.
    #[error("the server does not tell what the disk is")]
    Info,
}

impl From<SendError> for Error {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Full | SendError::Window => Self::Full,
            SendError::Channel(error) => Self::Channel(error),
            error => Self::Send(error),
        }
    }
}

/// A request that ended.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// As given.
    pub tag: u64,
    /// How it ended.
    pub result: Result<(), IoError>,
    completion: Completion,
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
struct Pending {
    tag: u64,
    /// Bytes that a read has to bring.
    read: u32,
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    /// `None` between a failed attempt to connect anew and the next; `rest` is what is left then.
    channel: Option<Channel>,
    rest: Option<Box<Dormant>>,
    /// Where the server is, to reach its next incarnation.
    path: Option<PathBuf>,
    input: Pool,
    output: Pool,
    pending: Vec<Option<Pending>>,
    inflight: u32,
    info: Info,
    options: Options,
}

impl Disk {
    /// Connects to the socket of `vcp-iscsi serve --msgq-path`.
    ///
    /// # Errors
    /// Nobody serves a disk there, or not to this user.
    pub fn open(path: &Path, options: &Options) -> Result<Self, Error> {
        Self::start(dial(path)?, Some(path.into()), options)
    }

    /// On a connected socket, say one that a monitor gave.
    ///
    /// # Errors
    /// The other side is no disk.
    pub fn on(link: Link, options: &Options) -> Result<Self, Error> {
        Self::start(link, None, options)
    }

    fn start(link: Link, path: Option<PathBuf>, options: &Options) -> Result<Self, Error> {
        let io_bytes = options.io_bytes.max(4096) as usize;
        let buffers = window(options) as usize;
        let input = Pool::new(IN, 1, io_bytes, buffers, Access::Both)?;
        let output = Pool::new(OUT, 1, io_bytes, buffers, Access::Owner)?;
        let config = config(options);
        let mut channel = Channel::connect(link, &config, &[input.clone(), output.clone()])?;
        prepare(&mut channel, options);
        let pending = vec![None; channel.agreed().window_mine as usize];
        let options = options.clone();
        let mut disk = Self {
            channel: Some(channel),
            rest: None,
            path,
            input,
            output,
            pending,
            inflight: 0,
            info: Info::default(),
            options,
        };
        disk.ask_info()?;
        Ok(disk)
    }

    fn ask_info(&mut self) -> Result<(), Error> {
        let blank = self.input.blank().ok().flatten().ok_or(Error::Full)?;
        let parcel = blank.freeze(0..proto::CONFIG_BYTES);
        let head = Head { opcode: proto::CONFIG, ..Head::default() };
        let token = channel(&mut self.channel)?.request_one(head, parcel).map_err(|(error, _)| error)?;
        self.note(token, 0, 0);
        let done = self.wait_for(0, Some(Instant::now() + self.options.deadline))?;
        done.result?;
        let mut bytes = [0; proto::CONFIG_BYTES];
        self.read_back(&done, 0, &mut bytes)?;
        self.info = Info::read(&bytes).ok_or(Error::Info)?;
        Ok(())
    }

    /// What the disk is.
    #[must_use]
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Requests in flight.
    #[must_use]
    pub fn inflight(&self) -> u32 {
        self.inflight
    }

    /// Most requests in flight.
    #[must_use]
    pub fn depth(&self) -> u32 {
        (self.pending.len() as u32).min(window(&self.options)).saturating_sub(1)
    }

    /// The channel, for its statistics and descriptors; `None` between a failed [`reconnect`](Self::reconnect) and the next.
    #[must_use]
    pub fn channel(&self) -> Option<&Channel> {
        self.channel.as_ref()
    }

    fn room(&self) -> Result<(), Error> {
        if self.channel.is_none() && self.reattaches() {
            // Until `wait` has found the server again.
            return Err(Error::Full);
        }
        if self.inflight < self.depth() { Ok(()) } else { Err(Error::Full) }
    }

    fn check(&self, sector: u64, len: usize) -> Result<(), Error> {
        let wrong = Error::Range { sector, len: len as u64 };
        let sectors = len as u64 / proto::SECTOR_BYTES;
        let whole = len != 0 && len.is_multiple_of(self.info.block_bytes as usize);
        let inside = sector.checked_add(sectors).is_some_and(|end| end <= self.info.sectors);
        if whole && inside && len <= self.input.buf_bytes() { self.room() } else { Err(wrong) }
    }

    fn note(&mut self, token: Token, tag: u64, read: u32) {
        self.pending[token.slot() as usize] = Some(Pending { tag, read });
        self.inflight += 1;
    }

    /// Starts a read of `len` bytes. [`poll`](Self::poll) gives `tag` back when it has ended.
    ///
    /// # Errors
    /// [`Error::Full`]: poll first. [`Error::Range`]: there are no such bytes.
    pub fn submit_read(&mut self, sector: u64, len: usize, tag: u64) -> Result<(), Error> {
        self.check(sector, len)?;
        let blank = self.input.blank().ok().flatten().ok_or(Error::Full)?;
        let head = Head { opcode: proto::READ, value: Some(sector), ..Head::default() };
        let sent = channel(&mut self.channel)?.request_one(head, blank.freeze(0..len));
        let token = sent.map_err(|(error, _)| error)?;
        self.note(token, tag, len as u32);
        Ok(())
    }

    /// Starts a write of `len` bytes, which `fill` writes into the buffer that goes out.
    ///
    /// # Errors
    /// As [`submit_read`](Self::submit_read).
    pub fn submit_write_with(
        &mut self,
        sector: u64,
        len: usize,
        tag: u64,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<(), Error> {
        self.check(sector, len)?;
        let mut loan = self.output.loan().ok().flatten().ok_or(Error::Full)?;
        fill(&mut loan[..len]);
        let head = Head { opcode: proto::WRITE, value: Some(sector), ..Head::default() };
        let sent = channel(&mut self.channel)?.request_one(head, loan.freeze(0..len));
        let token = sent.map_err(|(error, _)| error)?;
        self.note(token, tag, 0);
        Ok(())
    }

    /// Starts a write of a copy of `data`.
    ///
    /// # Errors
    /// As [`submit_read`](Self::submit_read).
    pub fn submit_write(&mut self, sector: u64, data: &[u8], tag: u64) -> Result<(), Error> {
        self.submit_write_with(sector, data.len(), tag, |out| out.copy_from_slice(data))
    }

    /// Starts a flush: every write that has completed is durable when it ends.
    ///
    /// # Errors
    /// [`Error::Full`].
    pub fn submit_flush(&mut self, tag: u64) -> Result<(), Error> {
        self.room()?;
        let token = channel(&mut self.channel)?.ask(0, proto::FLUSH, 0)?;
        self.note(token, tag, 0);
        Ok(())
    }

    /// Starts a discard (or, with `zero`, a write-zeroes that may unmap).
    ///
    /// # Errors
    /// As [`submit_read`](Self::submit_read).
    pub fn submit_discard(&mut self, sector: u64, sectors: u32, zero: bool, tag: u64) -> Result<(), Error> {
        self.room()?;
        let mut loan = self.output.loan().ok().flatten().ok_or(Error::Full)?;
        loan[..8].copy_from_slice(&sector.to_le_bytes());
        loan[8..12].copy_from_slice(&sectors.to_le_bytes());
        loan[12..16].copy_from_slice(&u32::from(zero).to_le_bytes());
        let opcode = if zero { proto::WRITE_ZEROES } else { proto::DISCARD };
        let head = Head { opcode, value: Some(0), ..Head::default() };
        let sent = channel(&mut self.channel)?.request_one(head, loan.freeze(0..proto::RANGE_BYTES));
        let token = sent.map_err(|(error, _)| error)?;
        self.note(token, tag, 0);
        Ok(())
    }

    /// Whether a server that is gone is waited for.
    fn reattaches(&self) -> bool {
        self.path.is_some() && !self.options.reattach.is_zero()
    }

    /// The next request that ended. What was submitted before is on its way after this. The data of a read can be read
    /// ([`read_back`](Self::read_back)) until the next call.
    ///
    /// # Errors
    /// The channel does no more.
    pub fn poll(&mut self) -> Result<Option<Done>, Error> {
        let reattaches = self.reattaches();
        let Some(channel) = &mut self.channel else {
            return if reattaches { Ok(None) } else { Err(msgq::Error::Gone.into()) };
        };
        channel.commit();
        loop {
            let completion = match channel.receive() {
                Ok(Some(Incoming::Completion(completion))) => completion,
                // A disk sends neither messages nor requests.
                Ok(Some(_)) => continue,
                Ok(None) => return Ok(None),
                // All that it published was received. `wait` finds the next one.
                Err(msgq::Error::Gone) if reattaches => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            let Some(pending) = self.pending[completion.token.slot() as usize].take() else { continue };
            self.inflight -= 1;
            let mut result = IoError::of(completion.code, completion.len);
            if result.is_ok() && completion.len < pending.read {
                result = Err(IoError::Answer { code: completion.code, len: completion.len });
            }
            return Ok(Some(Done { tag: pending.tag, result, completion }));
        }
    }

    /// Copies bytes out of a completed read, until the next [`poll`](Self::poll).
    ///
    /// # Errors
    /// It has no such bytes, or not any more.
    pub fn read_back(&self, done: &Done, offset: usize, to: &mut [u8]) -> Result<(), Error> {
        let channel = self.channel.as_ref().ok_or(msgq::Error::Gone)?;
        channel.read_back(&done.completion, 0, offset, to)?;
        Ok(())
    }

    /// Waits until [`poll`](Self::poll) may have something, or until `deadline`. If the server is gone, its next incarnation
    /// is sought ([`Options::reattach`]); then this may take longer than `deadline` by what setting up takes.
    ///
    /// # Errors
    /// The channel does no more.
    pub fn wait(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        let gone = self.channel.as_ref().is_none_or(|channel| channel.peer_state() == PeerState::Gone);
        if gone && self.reattaches() && !self.channel.as_ref().is_some_and(Channel::has_message) {
            return self.reattach(deadline);
        }
        channel(&mut self.channel)?.wait(deadline)?;
        Ok(())
    }

    /// Connects anew, trying again while nobody serves there.
    fn reattach(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        let path = self.path.clone().ok_or(msgq::Error::Gone)?;
        let by = Instant::now() + self.options.reattach;
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match self.reconnect(&path) {
                Ok(()) => return Ok(()),
                Err(error @ (Error::Connect { .. } | Error::SetUp(_))) => error,
                Err(error) => return Err(error),
            };
            let now = Instant::now();
            if now >= by {
                return Err(error);
            }
            if deadline.is_some_and(|deadline| now >= deadline) {
                return Ok(());
            }
            // There is nothing to wait for but that a socket file is there and somebody listens.
            std::thread::park_timeout(pause.min(by - now));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Waits for one request; others that end meanwhile are lost, so there must be none.
    fn wait_for(&mut self, tag: u64, deadline: Option<Instant>) -> Result<Done, Error> {
        loop {
            match self.poll()? {
                Some(done) if done.tag == tag => return Ok(done),
                Some(_) => {}
                None if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    return Err(HandshakeError::from(LinkError::Late).into());
                }
                None => self.wait(deadline)?,
            }
        }
    }

    fn alone(&self) -> Result<(), Error> {
        if self.inflight == 0 { Ok(()) } else { Err(Error::Full) }
    }

    /// Reads, and waits for it. Any length of whole blocks; nothing else may be in flight.
    ///
    /// # Errors
    /// [`Error::Full`] if something is in flight; what went wrong otherwise.
    pub fn read_at(&mut self, sector: u64, to: &mut [u8]) -> Result<(), Error> {
        self.alone()?;
        let most = self.input.buf_bytes() / self.info.block_bytes as usize * self.info.block_bytes as usize;
        for (number, part) in to.chunks_mut(most).enumerate() {
            let at = sector + (number * most) as u64 / proto::SECTOR_BYTES;
            self.submit_read(at, part.len(), 0)?;
            let done = self.wait_for(0, None)?;
            done.result?;
            self.read_back(&done, 0, part)?;
        }
        Ok(())
    }

    /// Writes, and waits for it. Any length of whole blocks; nothing else may be in flight.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    pub fn write_at(&mut self, sector: u64, from: &[u8]) -> Result<(), Error> {
        self.alone()?;
        let most = self.output.buf_bytes() / self.info.block_bytes as usize * self.info.block_bytes as usize;
        for (number, part) in from.chunks(most).enumerate() {
            self.submit_write(sector + (number * most) as u64 / proto::SECTOR_BYTES, part, 0)?;
            self.wait_for(0, None)?.result?;
        }
        Ok(())
    }

    /// Flushes, and waits for it. Nothing else may be in flight.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    pub fn flush(&mut self) -> Result<(), Error> {
        self.alone()?;
        self.submit_flush(0)?;
        self.wait_for(0, None)?.result?;
        Ok(())
    }

    /// After [`msgq::Error::Gone`]: connects to the server's next incarnation. Requests in flight are sent again by
    /// themselves, and end as if nothing had happened. [`wait`](Self::wait) does this by itself, if it is to.
    ///
    /// # Errors
    /// Nobody serves there (yet), or setting up failed: try again. Meanwhile nothing can be submitted.
    pub fn reconnect(&mut self, path: &Path) -> Result<(), Error> {
        self.reconnect_on(dial(path)?)
    }

    /// As [`reconnect`](Self::reconnect), on a connected socket, say one that a monitor gave.
    ///
    /// # Errors
    /// Setting up failed: try again, on another one.
    pub fn reconnect_on(&mut self, link: Link) -> Result<(), Error> {
        let rest = match (self.rest.take(), self.channel.take()) {
            (Some(rest), _) => rest,
            (None, Some(channel)) => Box::new(channel.into_dormant()),
            (None, None) => return Err(msgq::Error::Gone.into()),
        };
        match rest.connect(link, &config(&self.options)) {
            Ok(mut channel) => {
                prepare(&mut channel, &self.options);
                self.channel = Some(channel);
                Ok(())
            }
            Err((error, rest)) => {
                self.rest = Some(rest);
                Err(error.into())
            }
        }
    }
}

/// Pauses between attempts to reach a server that is gone.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

fn dial(path: &Path) -> Result<Link, Error> {
    Link::dial(path).map_err(|source| Error::Connect { path: path.into(), source })
}

fn channel(channel: &mut Option<Channel>) -> Result<&mut Channel, Error> {
    channel.as_mut().ok_or_else(|| msgq::Error::Gone.into())
}

fn prepare(channel: &mut Channel, options: &Options) {
    channel.set_spin(options.spin);
    if options.latency {
        channel.measure_latency();
    }
}

/// Requests in flight, and one whose completion the caller deals with.
fn window(options: &Options) -> u32 {
    u32::from(options.depth.clamp(1, 1024)) + 1
}

fn config(options: &Options) -> Config {
    // Two slots for each request, and the window is at most half a ring.
    let log2_slots = (window(options) * 4).next_power_of_two().trailing_zeros() as u8;
    Config {
        log2_slots: log2_slots.clamp(6, 13),
        window: window(options),
        chain_max: 8,
        segment_max: options.io_bytes.max(4096),
        features: proto::FEATURE,
        required: proto::FEATURE,
        deadline: options.deadline,
        ..Config::default()
    }
}
