//! Captures of frames, as pcapng files: of a port in either direction, or of an operation of the line with what it
//! decided, with the metadata of rows of segments and of missing checksums.
//!
//! [`Capture`] is the data thread's side: it writes blocks into memory that it has, and gives it away when it is full, or
//! old; a frame for which there is none is counted, and the next one's block says how many were lost before it. A thread of
//! its own (`writer`) writes the file. A process that captures nothing pays one comparison for each burst.

mod spec;
mod writer;

use std::io::Write;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError};
use std::time::{Duration, Instant, SystemTime};

use vcp_core::pcapng::{self, INBOUND, OUTBOUND, Packet};

pub use self::spec::{CaptureSpec, Direction, OPERATIONS};
pub use self::writer::Writer;
use crate::frame::{Gso, OutFrame, VnetHeader};
use crate::switch::work::{Fate, Frames, Item, PortId};

/// Memory that goes to the writer at once, and how much of it there is.
const BUFFER_BYTES: usize = 256 << 10;
const BUFFERS: usize = 16;
/// What a block has besides the frame's bytes, at most.
const AROUND_BYTES: usize = 256;
/// How long a frame waits for others before it goes to the writer.
const HOLD: Duration = Duration::from_millis(100);
/// Longest comment.
const COMMENT_BYTES: usize = 120;

/// See the module.
#[derive(Debug)]
pub struct Capture {
    spec: CaptureSpec,
    /// What it is of; `None`: all members.
    port: Option<PortId>,
    buffer: Vec<u8>,
    /// When the first frame came into the buffer.
    since: Option<Instant>,
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
    clock: (Instant, SystemTime),
    /// Frames, those that were lost, and of these the ones that no block has told of.
    frames: u64,
    lost: u64,
    untold: u64,
    scratch: Box<[u8]>,
}

/// Text in place.
struct Text {
    bytes: [u8; COMMENT_BYTES],
    len: usize,
}

impl Text {
    fn new() -> Self {
        Self { bytes: [0; COMMENT_BYTES], len: 0 }
    }

    fn get(&self) -> Option<&str> {
        std::str::from_utf8(&self.bytes[..self.len]).ok().filter(|text| !text.is_empty())
    }

    fn word(&mut self, args: std::fmt::Arguments<'_>) {
        let mut rest = &mut self.bytes[self.len..];
        let before = rest.len();
        // What does not fit is left out.
        let _ = rest.write_fmt(args);
        self.len += before - rest.len();
    }
}

/// What a frame's sender left to others.
fn metadata(text: &mut Text, meta: &VnetHeader) {
    if meta.is_plain() {
        return;
    }
    let kind = match meta.gso() {
        Some(Gso::Tcp4) => "tcp4",
        Some(Gso::Tcp6) => "tcp6",
        Some(Gso::Udp) => "udp",
        None if meta.is_gso() => "unknown",
        None => "none",
    };
    text.word(format_args!("gso={kind} gso_size={} hdr_len={} ", meta.gso_size, meta.hdr_len));
    if meta.needs_csum() {
        text.word(format_args!("csum={}+{} ", meta.csum_start, meta.csum_offset));
    }
}

fn verdict(text: &mut Text, fate: Fate) {
    match fate {
        Fate::Drop(reason) => text.word(format_args!("dropped by {}: {}", reason.stage(), reason.name())),
        Fate::To(PortId::UPLINK) => text.word(format_args!("to the uplink")),
        Fate::To(port) => text.word(format_args!("to port number {}", port.0)),
        Fate::Many(ports) => text.word(format_args!("to {} members", ports.len())),
        Fate::Open => {}
    }
}

impl Capture {
    /// A capture, and what writes it to `file`. `members`: names of the ports, by their numbers; the uplink comes behind
    /// them.
    #[must_use]
    pub fn new(spec: CaptureSpec, port: Option<PortId>, members: &[&str], now: Instant) -> (Self, Writer) {
        let (full, to_write) = std::sync::mpsc::sync_channel(BUFFERS);
        let (give_back, empty) = std::sync::mpsc::sync_channel(BUFFERS);
        for _ in 1..BUFFERS {
            let _ = give_back.try_send(Vec::with_capacity(BUFFER_BYTES));
        }
        let mut head = Vec::new();
        pcapng::section(&mut head, &spec.to_string(), concat!("vcp-net ", env!("CARGO_PKG_VERSION")));
        for name in members.iter().chain(&["uplink"]) {
            pcapng::interface(&mut head, pcapng::ETHERNET, Some(name));
        }
        let limit_bytes = spec.size_bytes;
        let this = Self {
            scratch: vec![0; spec.snap_bytes].into(),
            spec,
            port,
            buffer: Vec::with_capacity(BUFFER_BYTES),
            since: None,
            full,
            empty,
            clock: (now, SystemTime::now()),
            frames: 0,
            lost: 0,
            untold: 0,
        };
        (this, Writer::new(head, limit_bytes, to_write, give_back))
    }

    /// Whether somebody writes it still.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !matches!(self.full.try_send(Vec::new()), Err(TrySendError::Disconnected(_)))
    }

    /// Frames in it, and frames for which there was no memory.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.frames, self.lost)
    }

    fn is_of(&self, port: PortId) -> bool {
        self.port.is_none_or(|own| own == port)
    }

    /// Whether frames that go out at `port` are captured: they must not pass by.
    #[inline]
    #[must_use]
    pub fn wants_out(&self, port: PortId) -> bool {
        self.spec.operation.is_none() && self.spec.direction != Direction::In && self.is_of(port)
    }

    /// Frames of `from`, of which the line has decided.
    pub fn decided(&mut self, from: PortId, items: &[Item], frames: &Frames<'_>, ports: usize, now: Instant) {
        if !self.is_of(from) {
            return;
        }
        let reach = match &self.spec.operation {
            None if self.spec.direction == Direction::Out => return,
            None => 0,
            Some(operation) => OPERATIONS.iter().position(|it| it == operation).unwrap_or(0),
        };
        for (at, item) in items.iter().enumerate() {
            // A frame that an earlier operation dropped does not come to this one.
            if let Fate::Drop(reason) = item.fate
                && OPERATIONS.iter().position(|it| *it == reason.stage()).is_some_and(|stage| stage < reach)
            {
                continue;
            }
            let mut text = Text::new();
            metadata(&mut text, &item.meta);
            verdict(&mut text, item.fate);
            self.put(from, INBOUND, &frames.get(at, item.meta), &text, ports, now);
        }
    }

    /// A frame as `port` got it.
    pub fn went_out(&mut self, port: PortId, out: &OutFrame<'_>, ports: usize, now: Instant) {
        let mut text = Text::new();
        metadata(&mut text, &out.meta);
        self.put(port, OUTBOUND, out, &text, ports, now);
    }

    fn put(
        &mut self,
        port: PortId,
        flags: u32,
        frame: &OutFrame<'_>,
        text: &Text,
        ports: usize,
        now: Instant,
    ) {
        let there = frame.total_bytes().min(self.spec.snap_bytes);
        if self.buffer.capacity() - self.buffer.len() < there + AROUND_BYTES {
            self.give();
        }
        if self.buffer.capacity() - self.buffer.len() < there + AROUND_BYTES {
            self.lost += 1;
            self.untold += 1;
            return;
        }
        let there = frame.copy_to(0, &mut self.scratch[..there]);
        let about = Packet {
            interface: if port == PortId::UPLINK { ports as u32 } else { port.0.into() },
            at_ns: pcapng::wall_ns(now, self.clock),
            original_bytes: frame.total_bytes(),
            flags,
            lost: std::mem::take(&mut self.untold),
            comment: text.get(),
        };
        let bytes = &self.scratch[..there];
        pcapng::packet(&mut self.buffer, &about, there, |out| out.extend_from_slice(bytes));
        self.frames += 1;
        self.since.get_or_insert(now);
    }

    /// Gives what there is to the writer, if there is memory in its place.
    fn give(&mut self) {
        if self.buffer.is_empty() {
            return;
        }
        let Ok(next) = self.empty.try_recv() else { return };
        match self.full.try_send(std::mem::replace(&mut self.buffer, next)) {
            Ok(()) => self.since = None,
            // The file is as long as it may be, or cannot be written: what comes is lost, and counted.
            Err(TrySendError::Disconnected(full) | TrySendError::Full(full)) => self.buffer = full,
        }
    }

    /// Time has passed.
    pub fn turn(&mut self, now: Instant) {
        if self.deadline().is_some_and(|deadline| now >= deadline) {
            self.give();
        }
    }

    /// When [`turn`](Self::turn) has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.since.map(|since| since + HOLD)
    }

    /// It ends: the last frames go to the writer, which ends with this.
    pub fn finish(mut self) -> (u64, u64) {
        if !self.buffer.is_empty() {
            let _ = self.full.try_send(std::mem::take(&mut self.buffer));
        }
        self.counts()
    }
}
