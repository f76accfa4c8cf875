//! One connection: receive buffer, phase, outgoing batch.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use iscsi::login::target::{Claim, LoginError};
use iscsi::pdu::framing::{Digests, FrameError, Limits};
use iscsi::target::SessionError;

use super::frame;
use super::full::{FullFeature, Portals, Wider};
use super::login::{Login, LoginStep};
use super::out::Batch;
use crate::device::Device;

/// Room beside the longest data segment: so much can be received at once behind it.
const SPARE_BYTES: usize = 64 << 10;

/// Why a connection is closed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnError {
    #[error("closed by the initiator")]
    Closed,
    #[error("closed by the initiator in the middle of a PDU")]
    ClosedInPdu,
    #[error("logged out")]
    LoggedOut,
    #[error("login failed")]
    Login(#[from] LoginError),
    #[error("login not finished in time")]
    LoginTimeout,
    #[error("silent for too long")]
    Silent,
    #[error("replaced by a new session of the same initiator")]
    Reinstated,
    #[error("target reset")]
    Reset,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl ConnError {
    /// Whether this is how connections ordinarily end.
    pub(super) fn is_ordinary(&self) -> bool {
        matches!(self, Self::Closed | Self::LoggedOut | Self::Reinstated)
    }
}

/// Bytes received and not yet dealt with.
struct Received {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Received {
    fn new(capacity: usize) -> Self {
        Self { buffer: vec![0; capacity], start: 0, end: 0 }
    }

    fn consume(&mut self, len: usize) {
        self.start += len;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Room for more, behind what is there. An incomplete PDU is moved to the front if it stands too far back.
    fn room(&mut self) -> &mut [u8] {
        if self.start > 0 && self.buffer.len() - self.end < SPARE_BYTES {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.buffer[self.end..]
    }
}

/// What [`Conn::advance`] stopped for.
pub(super) enum Progress {
    /// Needs more input, or must send first.
    Idle,
    /// Other sessions are concerned.
    Wider(Wider),
    /// The initiator has proved who it is and may come in, if the server agrees.
    Decide(Claim),
}

pub(super) enum Phase {
    Login(Box<Login>),
    Full(Box<FullFeature>),
}

pub(super) struct Conn {
    pub(super) socket: TcpStream,
    pub(super) peer: SocketAddr,
    /// Our address as the initiator sees it.
    pub(super) portal: SocketAddr,
    /// Target portal group by which it came.
    pub(super) group: u16,
    pub(super) phase: Phase,
    pub(super) batch: Batch,
    received: Received,
    limits: Limits,
    pub(super) since: Instant,
    pub(super) last_heard: Instant,
    /// What epoll is asked for: input, output.
    pub(super) interest: (bool, bool),
}

impl Conn {
    pub(super) fn new(
        socket: TcpStream,
        group: u16,
        login: Login,
        limits: Limits,
        now: Instant,
    ) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        Ok(Self {
            peer: socket.peer_addr()?,
            portal: socket.local_addr()?,
            group,
            socket,
            phase: Phase::Login(Box::new(login)),
            batch: Batch::default(),
            // An initiator that has not logged in gets no large buffer.
            received: Received::new(limits.data_bytes as usize + SPARE_BYTES),
            limits,
            since: now,
            last_heard: now,
            interest: (true, false),
        })
    }

    /// The login is over: from here on PDUs may be as long as we declared.
    pub(super) fn enter_full_feature(&mut self, full: FullFeature) {
        self.limits.data_bytes = full.session.config().max_recv_segment_bytes;
        let mut larger = Received::new(self.limits.data_bytes as usize + 2 * SPARE_BYTES);
        let rest = &self.received.buffer[self.received.start..self.received.end];
        larger.buffer[..rest.len()].copy_from_slice(rest);
        larger.end = rest.len();
        self.received = larger;
        self.phase = Phase::Full(Box::new(full));
    }

    /// Receives once what is there.
    pub(super) fn fill(&mut self, now: Instant) -> Result<(), ConnError> {
        let between_pdus = self.received.start == self.received.end;
        let room = self.received.room();
        if room.is_empty() {
            return Ok(());
        }
        match (&self.socket).read(room) {
            Ok(0) if between_pdus => Err(ConnError::Closed),
            Ok(0) => Err(ConnError::ClosedInPdu),
            Ok(len) => {
                self.received.end += len;
                self.last_heard = now;
                Ok(())
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Deals with the PDUs that were received.
    pub(super) fn advance(
        &mut self,
        devices: &mut [Device],
        portals: &[(SocketAddr, u16)],
    ) -> Result<Progress, ConnError> {
        let portals = Portals { all: portals, here: self.portal };
        loop {
            let digests = match &self.phase {
                Phase::Login(_) => Digests::default(),
                Phase::Full(full) if full.can_receive() => full.digests,
                Phase::Full(_) => return Ok(Progress::Idle),
            };
            let bytes = &self.received.buffer[self.received.start..self.received.end];
            let Some(frame) = frame::cut(bytes, digests, self.limits)? else {
                return Ok(Progress::Idle);
            };
            let wire_bytes = frame.wire_bytes;
            let progress = match &mut self.phase {
                Phase::Full(full) => full
                    .receive(devices, &portals, &frame.bhs, frame.data, frame.digest_ok)?
                    .map(Progress::Wider),
                Phase::Login(login) => match login.receive(&frame.bhs, frame.data, &mut self.batch)? {
                    LoginStep::Continue => None,
                    LoginStep::Decide(claim) => Some(Progress::Decide(claim)),
                },
            };
            self.received.consume(wire_bytes);
            if let Some(progress) = progress {
                return Ok(progress);
            }
        }
    }

    /// Fills the batch, if it is empty, with what there is to send.
    pub(super) fn fill_batch(&mut self) {
        if self.batch.is_empty()
            && let Phase::Full(full) = &mut self.phase
        {
            full.transmit(&mut self.batch);
        }
    }

    /// Whether the connection is done: everything is said and sent.
    pub(super) fn is_finished(&self) -> bool {
        match &self.phase {
            Phase::Full(full) => {
                self.batch.is_empty()
                    && (full.session.is_finished() || (full.closing && !full.session.wants_transmit()))
            }
            Phase::Login(_) => false,
        }
    }

    /// What to wait for: input, output.
    pub(super) fn wanted(&self) -> (bool, bool) {
        let input = match &self.phase {
            Phase::Login(_) => true,
            Phase::Full(full) => full.can_receive(),
        };
        (input, !self.batch.is_empty())
    }
}
