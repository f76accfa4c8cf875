//! A full-feature session over a socket: what is queued goes out in one system call, what arrives goes straight to
//! where it belongs.
//!
//! - Sending: headers, padding and digests are built in an arena; payload is named, not copied, and the kernel takes
//!   it from guest memory. With data digests the payload is copied once and digested on the way: the guest may change its
//!   memory between digest and transmission, or retransmission (the field's oldest digest trouble).
//! - Receiving: one large receive into a staging buffer takes many headers and small payloads at once. Where payloads
//!   are long, only a header and what little comes with it is staged; the rest is received into guest memory directly,
//!   together with the next header.
//! - A runner with a ring (`vcp_core::uring`) makes these calls for it: sends, and receives into the staging buffer.
//! - A socket that was emptied is not looked at again before the runner says that it is readable, if the runner does
//!   that at all (`Wire::readiness`).

mod export;
mod ring;

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use iscsi::digest::Crc32c;
use iscsi::initiator::{Place, Session, SessionError, TxPdu};
use iscsi::pdu::framing::{FrameError, Limits, Receiver, Step, Trailer};
use iscsi::pdu::{ahs::MAX_AHS_BYTES, framing::Digests};
use vcp_core::mem::GuestBuf;
use vcp_core::sock::{Gather, IovStorage, Scatter};

pub use export::WireState;
use ring::InRing;

use super::job::{Data, Jobs};
use super::net::Stream;
use super::observe::observe_sent;
use crate::recorder::Recorder;

/// Bytes taken from the socket at once into private memory: the answers to a batch of 32 reads of 4 KiB fit, and seven
/// of 32 KiB. This and the next two were chosen by measurement, see `docs/decisions/data-path.md`.
pub const RX_STAGING_BYTES: usize = 256 << 10;
/// The rest of a payload at least this long is received into guest memory without a copy. To copy a shorter one costs
/// less than a call of its own.
pub const RX_DIRECT_MIN_BYTES: u32 = 32 << 10;
/// Bytes staged where the next payload is expected to be long, and behind a payload that is received directly: room for
/// the next header, and for short PDUs between long ones.
pub const RX_HEADER_ROOM_BYTES: usize = 1 << 10;
/// What a ring received is taken for the start of a batch from here on, if it is not one PDU and nothing else.
const RX_BATCH_BYTES: usize = 16 << 10;
/// Passes in a row that may leave out the receive on an emptied socket. A guest that queues request after request keeps
/// the loop from sleeping, and so from hearing that the socket is readable.
const RX_SKIPS: u8 = 2;
/// Receives per call of [`Wire::pump`], so that other work gets its turn.
const RX_ROUNDS: usize = 16;
/// Pieces queued for one send at most; guest buffers may be several entries of the I/O vector each.
const TX_PIECES: usize = 256;
/// Bytes queued for one send at most: more than a socket buffer takes brings nothing.
const TX_BYTES: usize = 1 << 20;
/// The same where data digests are in use: what was copied and digested is still in the second-level cache when the kernel
/// takes it, and it is few enough calls (`docs/decisions/data-path.md`).
const TX_DIGESTED_BYTES: usize = 512 << 10;

/// Where the rest of a payload goes that is worth a receive of its own: guest memory, offset, and how much of it is due.
fn direct<'a>(rx: &Receiver, place: Place, long: bool, jobs: &'a Jobs) -> Option<(&'a GuestBuf, usize, u32)> {
    let (Step::Data { offset_bytes: done, len_bytes }, Place::Task { slot, offset_bytes, .. }) =
        (rx.step(), place)
    else {
        return None;
    };
    match jobs.data(slot) {
        Data::Guest(guest) if (long || len_bytes >= RX_DIRECT_MIN_BYTES) && !rx.digests().data => {
            Some((guest, (offset_bytes + done) as usize, len_bytes))
        }
        _ => None,
    }
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The socket failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The target closed it.
    #[error("the target closed the connection")]
    Closed,
    /// What arrives is no stream of PDUs any more.
    #[error("the stream of PDUs is broken")]
    Frame(#[from] FrameError),
    /// The protocol ended it.
    #[error(transparent)]
    Session(#[from] SessionError),
}

#[derive(Clone, Copy, Debug)]
enum Piece {
    /// Of the arena.
    Private { at: usize, len_bytes: usize },
    /// Of a slot's data.
    Slot { slot: u16, at: usize, len_bytes: usize },
}

/// What moved, for the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct WireStats {
    /// Calls of `sendmsg`.
    pub sends: u64,
    /// Calls of `recvmsg`.
    pub receives: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Payload bytes copied from the staging buffer.
    pub copied_bytes: u64,
    /// Payload bytes received into guest memory directly.
    pub direct_bytes: u64,
}

/// A session and its connection.
#[derive(Debug)]
pub struct Wire {
    stream: Stream,
    /// The protocol.
    pub session: Session,
    rx: Receiver,
    staging: Box<[u8]>,
    staged: std::ops::Range<usize>,
    place: Place,
    inline: Vec<u8>,
    arena: Vec<u8>,
    pieces: VecDeque<Piece>,
    blocked: bool,
    iov: IovStorage,
    /// What a runner's ring has of this connection, while it does the calls.
    in_ring: Option<InRing>,
    /// The last fill stopped before the session had no more.
    unfilled: bool,
    /// How the connection ended, found out by the ring.
    ended: Option<WireError>,
    /// The runner tells when the socket is readable.
    watched: bool,
    /// The last receive emptied the socket.
    drained: bool,
    /// What the ring received last was as much as of a batch.
    much: bool,
    /// PDUs that were received whole.
    pdus: u32,
    /// Passes that left out the receive since the last one.
    skipped: u8,
    /// The last payload for guest memory was a long one, so the next is taken for one, too.
    long: bool,
    /// What moved so far.
    pub stats: WireStats,
    /// The last PDUs.
    pub(super) recorder: Recorder,
}

impl Wire {
    /// A session that just logged in. `early` is what arrived behind the final Login Response.
    pub fn new(stream: Stream, session: Session, early: &[u8]) -> Self {
        let config = session.config();
        let limits = Limits { ahs_bytes: MAX_AHS_BYTES, data_bytes: config.max_receive_bytes };
        let mut rx = Receiver::new(limits);
        rx.configure(limits, Digests { header: config.header_digest, data: config.data_digest });
        let mut staging = vec![0; RX_STAGING_BYTES.max(early.len())].into_boxed_slice();
        staging[..early.len()].copy_from_slice(early);
        Self {
            stream,
            session,
            rx,
            staging,
            staged: 0..early.len(),
            place: Place::None,
            inline: Vec::with_capacity(512),
            arena: Vec::with_capacity(TX_PIECES * 64),
            pieces: VecDeque::with_capacity(2 * TX_PIECES),
            blocked: false,
            iov: IovStorage::new(),
            in_ring: None,
            unfilled: false,
            ended: None,
            watched: false,
            drained: false,
            much: false,
            pdus: 0,
            skipped: 0,
            long: false,
            stats: WireStats::default(),
            recorder: Recorder::default(),
        }
    }

    /// The socket.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Whether the socket took not all that was to be sent.
    pub fn wants_write(&self) -> bool {
        self.blocked
    }

    /// Whether something waits to be sent.
    pub fn is_sending(&self) -> bool {
        !self.pieces.is_empty()
    }

    /// The runner looked at the socket, or a pass may have to (`ready`: there may be something to receive).
    pub(super) fn readiness(&mut self, ready: bool) {
        self.watched = true;
        self.skipped = 0;
        if ready {
            self.drained = false;
        }
    }

    /// Whether what arrives are long payloads, each of them in many pieces.
    pub(super) fn receives_long(&self) -> bool {
        self.long
    }

    /// Sends what the session has and what the socket takes. Returns whether anything moved.
    pub(super) fn send(&mut self, jobs: &mut Jobs, now: Instant) -> Result<bool, WireError> {
        if self.in_ring.is_some() {
            if self.ended.is_some() || !self.pieces.is_empty() {
                return Ok(false);
            }
            self.fill(jobs, now);
            return Ok(!self.pieces.is_empty());
        }
        let mut moved = false;
        loop {
            if self.pieces.is_empty() {
                self.fill(jobs, now);
                if self.pieces.is_empty() {
                    self.blocked = false;
                    return Ok(moved);
                }
            }
            let mut gather = Gather::new(&mut self.iov);
            for piece in &self.pieces {
                let (pushed, len_bytes) = match *piece {
                    Piece::Private { at, len_bytes } => {
                        (gather.push_bytes(&self.arena[at..at + len_bytes]), len_bytes)
                    }
                    Piece::Slot { slot, at, len_bytes } => match jobs.data(slot) {
                        Data::Guest(data) => (gather.push_guest(data, at, len_bytes), len_bytes),
                        Data::Private(data) => (gather.push_bytes(&data[at..at + len_bytes]), len_bytes),
                    },
                };
                if pushed < len_bytes {
                    break;
                }
            }
            self.stats.sends += 1;
            match gather.send(&self.stream) {
                Ok(sent) => {
                    moved = true;
                    self.stats.sent_bytes += sent as u64;
                    self.sent(sent, jobs);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked = true;
                    return Ok(moved);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Queues PDUs until the session has no more or it is enough for one send.
    fn fill(&mut self, jobs: &mut Jobs, now: Instant) {
        self.arena.clear();
        let most_bytes = if self.rx.digests().data { TX_DIGESTED_BYTES } else { TX_BYTES };
        let mut queued_bytes = 0;
        self.unfilled = false;
        loop {
            if self.pieces.len() >= TX_PIECES || queued_bytes >= most_bytes {
                self.unfilled = true;
                break;
            }
            let Some(pdu) = self.session.next_pdu(now) else { break };
            queued_bytes += pdu.header().len() + pdu.data.map_or(0, |d| d.len_bytes as usize);
            observe_sent(&mut self.recorder, &pdu, jobs, now);
            self.queue(&pdu, jobs);
        }
    }

    fn queue(&mut self, pdu: &TxPdu, jobs: &mut Jobs) {
        self.private(|arena| arena.extend_from_slice(pdu.header()));
        let Some(data) = pdu.data else { return };
        let (at, len_bytes) = (data.offset_bytes as usize, data.len_bytes as usize);
        if pdu.data_digest {
            let source = jobs.data(data.slot);
            self.private(|arena| {
                let mut crc = Crc32c::new();
                match source {
                    Data::Guest(guest) => {
                        let register = guest.append_to_digested(at, len_bytes, arena, crc.register());
                        crc = Crc32c::from_register(register);
                    }
                    Data::Private(bytes) => {
                        arena.extend_from_slice(&bytes[at..at + len_bytes]);
                        crc.update(&bytes[at..at + len_bytes]);
                    }
                }
                arena.extend_from_slice(Trailer::new(data.len_bytes, Some(crc)).as_bytes());
            });
            return;
        }
        if let Some(job) = jobs.get_mut(data.slot) {
            job.unsent += 1;
        }
        self.pieces.push_back(Piece::Slot { slot: data.slot, at, len_bytes });
        let trailer = Trailer::new(data.len_bytes, None);
        if !trailer.as_bytes().is_empty() {
            self.private(|arena| arena.extend_from_slice(trailer.as_bytes()));
        }
    }

    /// Queues what `build` appends to the arena; together with the piece before, if that is of the arena as well.
    fn private(&mut self, build: impl FnOnce(&mut Vec<u8>)) {
        let from = self.arena.len();
        build(&mut self.arena);
        let added = self.arena.len() - from;
        if let Some(Piece::Private { at, len_bytes }) = self.pieces.back_mut()
            && *at + *len_bytes == from
        {
            *len_bytes += added;
        } else {
            self.pieces.push_back(Piece::Private { at: from, len_bytes: added });
        }
    }

    /// Takes sent bytes off the queue.
    fn sent(&mut self, mut bytes: usize, jobs: &mut Jobs) {
        while bytes > 0 {
            let Some(piece) = self.pieces.front_mut() else { return };
            let (Piece::Private { at, len_bytes } | Piece::Slot { at, len_bytes, .. }) = piece;
            let taken = bytes.min(*len_bytes);
            *at += taken;
            *len_bytes -= taken;
            bytes -= taken;
            if *len_bytes == 0 {
                if let Piece::Slot { slot, .. } = *piece
                    && let Some(job) = jobs.get_mut(slot)
                {
                    job.unsent -= 1;
                }
                self.pieces.pop_front();
            }
        }
    }

    /// Receives what is there and hands it to the session. Returns whether anything moved.
    pub(super) fn receive(&mut self, jobs: &mut Jobs, now: Instant) -> Result<bool, WireError> {
        let mut moved = !self.staged.is_empty();
        let before = self.pdus;
        self.parse(jobs, now)?;
        // Behind what arrived before.
        if let Some(error) = self.ended.take() {
            return Err(error);
        }
        // Of a batch, the ring's receive wakes this thread with the first segments, and takes only those; the others came
        // while they were worked off.
        let of_batch = self.pdus.wrapping_sub(before) > 1 || !self.rx.is_between_pdus();
        let armed = self.in_ring.as_ref().is_some_and(InRing::is_receiving);
        let more = std::mem::take(&mut self.much) && of_batch && !armed;
        if self.ring_receives(jobs) && !more {
            return Ok(moved);
        }
        if self.watched && self.drained && self.skipped < RX_SKIPS && !more {
            self.skipped += 1;
            return Ok(moved);
        }
        (self.skipped, self.drained) = (0, false);
        for _ in 0..RX_ROUNDS {
            let (room, got) = match self.receive_once(jobs) {
                Ok(result) => result,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.drained = true;
                    break;
                }
                Err(error) => return Err(error.into()),
            };
            if got == 0 {
                return Err(WireError::Closed);
            }
            moved = true;
            self.parse(jobs, now)?;
            if self.ring_receives(jobs) {
                break;
            }
            if got < room {
                // The socket is empty now; what arrives from here on wakes the poll loop again.
                self.drained = true;
                break;
            }
        }
        Ok(moved)
    }

    /// One receive: into the slot's data if a long rest of it is due, else into the staging buffer. Returns room and
    /// what came.
    fn receive_once(&mut self, jobs: &Jobs) -> io::Result<(usize, usize)> {
        debug_assert!(self.staged.is_empty());
        self.stats.receives += 1;
        let mut scatter = Scatter::new(&mut self.iov);
        if let Some((guest, offset, len_bytes)) = direct(&self.rx, self.place, self.long, jobs) {
            let direct = scatter.push_guest(guest, offset, len_bytes as usize);
            // Only when all of it fits may something else follow.
            if direct == len_bytes as usize {
                scatter.push_bytes_mut(&mut self.staging[..RX_HEADER_ROOM_BYTES]);
            }
            let room = scatter.len_bytes();
            let got = scatter.recv(&self.stream)?;
            let placed = got.min(direct);
            self.rx.data_len(placed as u32);
            self.staged = 0..got - placed;
            self.stats.direct_bytes += placed as u64;
            self.stats.received_bytes += got as u64;
            return Ok((room, got));
        }
        // With data digests everything goes through private memory, in pieces as large as may be.
        let short = self.long && !self.rx.digests().data;
        let room = if short { RX_HEADER_ROOM_BYTES } else { self.staging.len() };
        scatter.push_bytes_mut(&mut self.staging[..room]);
        let room = scatter.len_bytes();
        let got = scatter.recv(&self.stream)?;
        self.staged = 0..got;
        self.stats.received_bytes += got as u64;
        Ok((room, got))
    }

    /// Whether what comes next is received by the runner's ring: all that goes through the staging buffer. Guest memory is
    /// received into by a call, so that nothing of it is armed.
    fn ring_receives(&self, jobs: &Jobs) -> bool {
        self.in_ring.as_ref().is_some_and(InRing::is_receiving)
            || self.in_ring.is_some()
                && (!self.long || self.rx.digests().data)
                && direct(&self.rx, self.place, self.long, jobs).is_none()
    }

    /// Works off the staging buffer.
    fn parse(&mut self, jobs: &Jobs, now: Instant) -> Result<(), WireError> {
        loop {
            let staged = &self.staging[self.staged.clone()];
            match self.rx.step() {
                Step::Framing { .. } => {
                    if staged.is_empty() {
                        return Ok(());
                    }
                    self.staged.start += self.rx.feed(staged)?;
                }
                Step::Header => {
                    self.recorder.received(&self.rx.header().0, now);
                    self.place = self.session.header(self.rx.header(), now)?;
                    self.inline.clear();
                    if let Place::Task { len_bytes, .. } = self.place {
                        self.long = len_bytes >= RX_DIRECT_MIN_BYTES;
                    }
                    self.rx.accept();
                }
                Step::Data { offset_bytes: done, len_bytes } => {
                    if staged.is_empty() {
                        return Ok(());
                    }
                    let bytes = &staged[..staged.len().min(len_bytes as usize)];
                    let (digested, taken) = (self.rx.digests().data, bytes.len());
                    self.recorder.received_data(bytes);
                    match self.place {
                        Place::Task { slot, offset_bytes, .. } => {
                            if let Data::Guest(guest) = jobs.data(slot) {
                                let at = (offset_bytes + done) as usize;
                                self.stats.copied_bytes += taken as u64;
                                self.staged.start += taken;
                                if digested {
                                    let crc =
                                        guest.copy_from_digested(at, bytes, self.rx.digest().register());
                                    self.rx.data_digested(taken as u32, Crc32c::from_register(crc));
                                } else {
                                    guest.copy_from(at, bytes);
                                    self.rx.data_len(taken as u32);
                                }
                                continue;
                            }
                        }
                        Place::Inline { .. } => self.inline.extend_from_slice(bytes),
                        Place::None | Place::Discard { .. } => {}
                    }
                    if digested {
                        self.rx.data(bytes);
                    } else {
                        self.rx.data_len(taken as u32);
                    }
                    self.staged.start += taken;
                }
                Step::Done { data_digest_ok } => {
                    self.pdus = self.pdus.wrapping_add(1);
                    self.session.end(&self.inline, data_digest_ok)?;
                    self.rx.next_pdu();
                }
            }
        }
    }
}
