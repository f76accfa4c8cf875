//! One side of a TCP connection towards a guest, as a state machine without I/O and without buffers (RFC 9293, 7323, 6298,
//! 2018, 2883, 6675).
//!
//! The other side is a socket of the host, which the owner of a [`Conn`] has. What the guest sends goes into that socket
//! at once, as far as it takes it; what comes from there stays in it until the guest has acknowledged it, so that every
//! repetition is read from the socket again: the offset of a sequence number in the socket's queue is its distance from the
//! first one that is not acknowledged. There is no congestion control: between a guest and its switch there is memory, and
//! the guest's window says how much of it. What the guest sends behind a gap its owner keeps in a [`Reassembly`], as long as
//! it likes, and says so ([`Conn::holds`]).

pub mod pool;
pub mod reassembly;
mod scoreboard;
pub mod segment;
mod send;
#[cfg(test)]
mod sim;
mod time;

use serde::{Deserialize, Serialize};

pub use pool::Pool;
pub use reassembly::Reassembly;
pub use segment::{Segment, before};
pub use send::Next;
pub use time::{Late, Ms};

use reassembly::Block;
use scoreboard::Scoreboard;
use segment::{ACK, FIN, RST, SACK_MAX, SYN};
use time::Timer;

/// Shift of the windows that are told to guests: up to 16 MiB.
const OUR_SCALE: u8 = 8;
/// Segment size of a guest that says nothing (RFC 9293, 3.7.1).
const DEFAULT_MSS: (u16, u16) = (536, 1220);
/// The smallest that is believed: with less, headers are all there is.
const MIN_MSS: u16 = 88;

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// The guest wants it; the host is being asked.
    Connecting,
    /// The host has agreed, and the guest was told so.
    SynAckSent,
    /// The host wants it; the guest was asked.
    SynSent,
    /// Data can flow. Ends are flags beside this.
    Open,
    /// All is over and acknowledged; the guest may have missed the last acknowledgement.
    TimeWait,
}

/// What a segment from the guest means for the socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// So many bytes at the front of the socket's queue are done with.
    pub acked: u32,
    /// So many bytes at the front of the segment's payload were there already.
    pub skip: u32,
    /// So many bytes behind them are next for the socket; [`Conn::received`] is told how many it took.
    pub deliver: u32,
    /// The guest's end follows these, or those that are ahead.
    pub fin: bool,
    /// So many bytes at the front of the payload are in the window, but behind a gap. They may be kept, and an answer is
    /// due at once ([`Conn::ack`]), as it is for what was there already.
    pub ahead: u32,
    /// The segment is behind a gap, or was there already.
    pub out_of_order: bool,
    /// The guest agreed just now.
    pub opened: bool,
    /// The guest gave up, or refused: the connection is no more.
    pub reset: bool,
    /// It was not one that is expected (for counters).
    pub odd: bool,
}

/// See the module.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Conn {
    /// Where it is.
    pub state: State,
    /// The guest's end was delivered.
    guest_fin: bool,
    /// The socket has no more; [`eof_at`](Self::eof_at) says where.
    eof: bool,
    /// An acknowledgement is due.
    ack_due: bool,
    /// Timestamps are used.
    stamps: bool,
    /// The guest takes (and sends) SACK.
    sack: bool,
    /// A question that must be answered is due.
    probe: bool,
    /// A repetition from `retx_at` up to `retx_to` is due.
    retx: bool,
    /// What was lost is being made up for, up to `recover`.
    recovering: bool,
    /// The deadline is that of a tail that nobody answers (RFC 8985, 7).
    #[serde(default)]
    tail: bool,
    /// The last of it was repeated.
    #[serde(default)]
    tail_sent: bool,
    /// The guest's shift.
    scale: u8,
    /// Ours; 0 if the guest does not scale.
    our_scale: u8,
    dup_acks: u8,
    mss: u16,
    /// The first that the guest has not acknowledged.
    una: u32,
    /// The next to be sent.
    nxt: u32,
    /// Behind the last that was ever sent.
    max: u32,
    eof_at: u32,
    recover: u32,
    #[serde(default)]
    retx_at: u32,
    retx_to: u32,
    /// Up to here gaps were repeated in this round of a recovery, which began when `round` was the next to be sent: who has
    /// something from behind that, and still has a gap, has missed the repetition as well.
    #[serde(default)]
    rtx: u32,
    #[serde(default)]
    round: u32,
    window: u32,
    wl1: u32,
    wl2: u32,
    /// The next that is expected from the guest.
    rcv: u32,
    /// The edge of the window that the guest was told.
    edge: u32,
    ts_recent: u32,
    timer: Timer,
    /// What the acknowledgement of a byte without timestamps is timed by, and since when.
    #[serde(default)]
    timed: Option<(u32, Ms)>,
    /// What the guest has behind a gap. Who goes on with the connection finds out again.
    #[serde(skip)]
    board: Scoreboard,
    /// What is kept of the guest's behind a gap, and what came twice.
    #[serde(skip)]
    blocks: [Block; SACK_MAX],
    #[serde(skip)]
    again: Option<Block>,
}

impl Conn {
    /// A connection that a guest asks for by `syn`. `isn`: RFC 6528.
    #[must_use]
    pub fn asked(syn: &Segment, v6: bool, isn: u32, now: Ms) -> Self {
        let mut this = Self::new(State::Connecting, isn, now);
        this.learn(syn, v6);
        this.timer.at(now + time::CONNECT_MS);
        this
    }

    /// A connection that the host asks for. [`next`](Self::next) has its first segment.
    #[must_use]
    pub fn asking(isn: u32, now: Ms) -> Self {
        let mut this = Self::new(State::SynSent, isn, now);
        this.our_scale = OUR_SCALE;
        (this.stamps, this.sack) = (true, true);
        this.timer.at(now);
        this
    }

    fn new(state: State, isn: u32, now: Ms) -> Self {
        Self {
            state,
            guest_fin: false,
            eof: false,
            ack_due: false,
            stamps: false,
            sack: false,
            probe: false,
            retx: false,
            recovering: false,
            tail: false,
            tail_sent: false,
            scale: 0,
            our_scale: 0,
            dup_acks: 0,
            mss: DEFAULT_MSS.0,
            una: isn,
            nxt: isn,
            max: isn,
            eof_at: 0,
            recover: isn,
            retx_at: isn,
            retx_to: isn,
            rtx: isn,
            round: isn,
            window: 0,
            wl1: 0,
            wl2: 0,
            rcv: 0,
            edge: 0,
            ts_recent: 0,
            timer: Timer::new(now),
            timed: None,
            board: Scoreboard::default(),
            blocks: [(0, 0); SACK_MAX],
            again: None,
        }
    }

    /// What the guest's SYN says.
    fn learn(&mut self, syn: &Segment, v6: bool) {
        self.rcv = syn.seq.wrapping_add(1);
        self.edge = self.rcv;
        self.scale = syn.scale.unwrap_or(0);
        self.our_scale = syn.scale.map_or(0, |_| OUR_SCALE);
        self.stamps = syn.time.is_some();
        self.sack = syn.sack_ok;
        self.ts_recent = syn.time.map_or(0, |(value, _)| value);
        let default = if v6 { DEFAULT_MSS.1 } else { DEFAULT_MSS.0 };
        self.mss = if syn.mss == 0 { default } else { syn.mss.max(MIN_MSS) };
        // The window of a SYN is never scaled.
        self.window = u32::from(syn.window);
        (self.wl1, self.wl2) = (syn.seq, self.una);
    }

    /// The host has agreed: the guest is told next.
    pub fn connected(&mut self, now: Ms) {
        if self.state == State::Connecting {
            self.state = State::SynAckSent;
            self.timer.reset(now);
            self.timer.at(now);
        }
    }

    /// Whether it is one that can be, as far as its numbers say: for what comes from another process.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.scale <= 14 && self.our_scale <= 14 && self.mss >= MIN_MSS
    }

    /// Largest payload of a segment to the guest, beside the options that it has now.
    #[must_use]
    pub fn mss(&self) -> u16 {
        self.mss - self.option_bytes() as u16
    }

    /// Bytes of the options of a segment with data.
    fn option_bytes(&self) -> usize {
        let stamps = if self.stamps { 12 } else { 0 };
        match self.blocks.iter().filter(|block| **block != (0, 0)).count() {
            0 => stamps,
            blocks => stamps + 4 + 8 * blocks,
        }
    }

    /// A router on the way (or the guest) takes less.
    pub fn shrink_mss(&mut self, mss: u16) {
        self.mss = self.mss.min(mss.max(MIN_MSS));
    }

    /// Whether the guest's end was delivered.
    #[must_use]
    pub fn guest_ended(&self) -> bool {
        self.guest_fin
    }

    /// Whether the socket's end is known.
    #[must_use]
    pub fn host_ended(&self) -> bool {
        self.eof
    }

    /// Whether the guest has acknowledged all there will ever be.
    fn all_acked(&self) -> bool {
        self.eof && self.una == self.eof_at.wrapping_add(1)
    }

    /// Bytes in the socket's queue that were sent and are not acknowledged.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        let data_end = if self.eof && before(self.eof_at, self.max) { self.eof_at } else { self.max };
        match self.state {
            State::Open if before(self.una, data_end) => data_end.wrapping_sub(self.una),
            _ => 0,
        }
    }

    /// Takes a segment from the guest with so much payload. `v6`: it came by IPv6.
    pub fn segment(&mut self, seg: &Segment, payload: u32, v6: bool, now: Ms) -> Outcome {
        match self.state {
            State::Connecting => self.while_connecting(seg),
            State::SynSent => self.answered(seg, v6, now),
            State::TimeWait => {
                self.ack_due |= seg.has(FIN) || payload != 0;
                Outcome { odd: true, ..Outcome::default() }
            }
            State::SynAckSent | State::Open => self.while_open(seg, payload, now),
        }
    }

    /// The guest repeats its question, or takes it back.
    fn while_connecting(&self, seg: &Segment) -> Outcome {
        let reset = seg.has(RST) && seg.seq == self.rcv;
        Outcome { reset, odd: !reset && !seg.has(SYN), ..Outcome::default() }
    }

    /// The guest's answer to our question.
    fn answered(&mut self, seg: &Segment, v6: bool, now: Ms) -> Outcome {
        let ours = seg.has(ACK) && seg.ack == self.max && self.max != self.una;
        if !ours {
            return Outcome { odd: true, ..Outcome::default() };
        }
        if seg.has(RST) {
            return Outcome { reset: true, ..Outcome::default() };
        }
        if !seg.has(SYN) {
            return Outcome { odd: true, ..Outcome::default() };
        }
        self.una = seg.ack;
        self.learn(seg, v6);
        self.wl2 = seg.ack;
        self.state = State::Open;
        self.ack_due = true;
        self.timer.reset(now);
        Outcome { opened: true, ..Outcome::default() }
    }

    fn while_open(&mut self, seg: &Segment, payload: u32, now: Ms) -> Outcome {
        if seg.has(RST) {
            // RFC 5961, 3.2: only the expected number ends it; others in the window are asked about.
            let reset = seg.seq == self.rcv;
            self.ack_due |= !reset && !before(seg.seq, self.rcv) && before(seg.seq, self.edge);
            return Outcome { reset, odd: !reset, ..Outcome::default() };
        }
        if seg.has(SYN) {
            if self.state == State::SynAckSent && seg.seq.wrapping_add(1) == self.rcv {
                // It missed our answer.
                self.timer.at(now);
                self.nxt = self.una;
            } else {
                self.ack_due = true;
            }
            return Outcome { odd: true, ..Outcome::default() };
        }
        if !seg.has(ACK) {
            return Outcome { odd: true, ..Outcome::default() };
        }
        if let (true, Some((value, _))) = (self.stamps, seg.time) {
            if before(value, self.ts_recent) {
                // PAWS (RFC 7323, 5).
                self.ack_due = true;
                return Outcome { odd: true, ..Outcome::default() };
            }
            if !before(self.rcv, seg.seq) {
                self.ts_recent = value;
            }
        }
        let mut outcome = Outcome::default();
        if before(self.max, seg.ack) {
            // It acknowledges what was never sent.
            self.ack_due = true;
            return Outcome { odd: true, ..outcome };
        }
        if self.state == State::SynAckSent {
            if seg.ack != self.max {
                return Outcome { odd: true, ..outcome };
            }
            self.state = State::Open;
            self.una = seg.ack;
            self.nxt = seg.ack;
            self.timer.reset(now);
            // From here on windows are scaled.
            self.set_window(seg, false);
            outcome.opened = true;
        }
        outcome.acked = self.acknowledged(seg, payload, now);
        self.arrived(seg, payload, &mut outcome);
        self.timer.heard();
        if self.max == self.una && self.window != 0 {
            self.timer.reset(now);
        }
        if self.guest_fin && self.all_acked() {
            self.state = State::TimeWait;
            self.timer.at(now + time::TIME_WAIT_MS);
        }
        outcome
    }

    /// What arrived of the guest's data.
    fn arrived(&mut self, seg: &Segment, payload: u32, outcome: &mut Outcome) {
        let fin = seg.has(FIN);
        if payload == 0 && !fin {
            // A question whether we are still there (RFC 9293, 3.8.4) has a number that was acknowledged.
            self.ack_due |= before(seg.seq, self.rcv);
            return;
        }
        // Everything that takes up sequence numbers is answered.
        self.ack_due = true;
        let skip = self.rcv.wrapping_sub(seg.seq);
        if self.guest_fin {
            outcome.odd = true;
        } else if before(self.rcv, seg.seq) {
            outcome.odd = true;
            outcome.out_of_order = true;
            if before(seg.seq, self.edge) {
                outcome.ahead = payload.min(self.edge.wrapping_sub(seg.seq));
                outcome.fin = fin && outcome.ahead == payload;
            }
        } else if skip < payload || (fin && skip == payload) {
            outcome.skip = skip;
            outcome.deliver = payload - skip;
            outcome.fin = fin;
        } else {
            outcome.odd = true;
            outcome.out_of_order = true;
            if self.sack && payload != 0 {
                self.again = Some((seg.seq, seg.seq.wrapping_add(payload)));
            }
        }
    }

    /// The next that is expected from the guest.
    #[must_use]
    pub fn expects(&self) -> u32 {
        self.rcv
    }

    /// Whether the guest understands what it is told of what is kept.
    #[must_use]
    pub fn can_sack(&self) -> bool {
        self.sack
    }

    /// The edge of the window that the guest knows of.
    #[must_use]
    pub fn edge(&self) -> u32 {
        self.edge
    }

    /// What is kept of the guest's data behind a gap is this ([`Reassembly::told`]), of which `again` was there already.
    pub fn holds(&mut self, blocks: [Block; SACK_MAX], again: Option<Block>) {
        if self.sack {
            self.blocks = blocks;
            self.again = again.or(self.again);
        }
    }

    /// The socket took `bytes` of what was to be delivered; `fin`: and the guest's end behind it.
    pub fn received(&mut self, bytes: u32, fin: bool, now: Ms) {
        self.rcv = self.rcv.wrapping_add(bytes.wrapping_add(u32::from(fin)));
        if before(self.edge, self.rcv) {
            self.edge = self.rcv;
        }
        self.guest_fin |= fin;
        self.ack_due = true;
        if self.guest_fin && self.all_acked() {
            self.state = State::TimeWait;
            self.timer.at(now + time::TIME_WAIT_MS);
        }
    }

    /// Room that the guest knows of.
    #[must_use]
    pub fn told_room(&self) -> u32 {
        self.edge.wrapping_sub(self.rcv)
    }

    /// The socket has room for so many bytes. Returns whether the guest should be told: it knows of too little to go on
    /// with, and there is enough now that it is worth it.
    pub fn room(&mut self, bytes: u32) -> bool {
        let unit = 1u32 << self.our_scale;
        let bytes = bytes.min(u32::from(u16::MAX) << self.our_scale) & !(unit - 1);
        let told = self.told_room();
        if bytes <= told {
            return false;
        }
        self.edge = self.rcv.wrapping_add(bytes);
        let mss = u32::from(self.mss);
        let tell = told < mss && bytes - told >= mss.min(4096);
        if tell && matches!(self.state, State::Open) && !self.guest_fin {
            self.ack_due = true;
        }
        tell
    }

    /// The window field of a segment.
    fn window_field(&self, syn: bool) -> u16 {
        let room = self.told_room();
        let field = if syn { room } else { room >> self.our_scale };
        u16::try_from(field).unwrap_or(u16::MAX)
    }
}
