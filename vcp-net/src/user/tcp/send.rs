//! What a connection sends: data in order, repetitions, probes, acknowledgements.

use super::segment::{ACK, FIN, PSH, RST, SYN};
use super::time::Ms;
use super::{Conn, Late, Segment, State, before};

/// A part of a window that is worth a frame.
const WORTH_BYTES: u32 = 32 << 10;

/// What is to be sent next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing.
    Nothing,
    /// A segment without payload.
    Bare,
    /// Up to `max` bytes of the socket's queue from `offset` on; [`Conn::data`] has the header.
    Data {
        /// Where they begin.
        offset: u32,
        /// Most of them.
        max: u32,
    },
}

impl Conn {
    /// What the guest acknowledges; returns how many bytes of the socket's queue are done with.
    pub(super) fn acknowledged(&mut self, seg: &Segment, payload: u32, now: Ms) -> u32 {
        let waiting = self.max != self.una;
        if before(self.una, seg.ack) {
            let mut acked = seg.ack.wrapping_sub(self.una);
            if self.eof && seg.ack == self.eof_at.wrapping_add(1) {
                acked -= 1;
            }
            self.una = seg.ack;
            if before(self.nxt, self.una) {
                self.nxt = self.una;
            }
            self.dup_acks = 0;
            self.tail_sent = false;
            let round_trip = self.round_trip(seg, now);
            self.timer.progress(round_trip, now);
            self.board.advance(self.una);
            self.heard(seg);
            if self.recovering && !before(self.una, self.recover) {
                (self.recovering, self.retx) = (false, false);
            }
            self.make_up(true, now);
            if self.max != self.una {
                self.watch(now);
            }
            self.set_window(seg, true);
            return acked;
        }
        let window = self.window;
        if seg.ack == self.una {
            self.set_window(seg, false);
            if waiting {
                let same = window == self.window && payload == 0 && !seg.has(FIN) && window != 0;
                let news = self.heard(seg);
                self.dup_acks = self.dup_acks.saturating_add(u8::from(same));
                if same || news {
                    self.make_up(false, now);
                }
            }
        }
        0
    }

    /// What the guest's blocks say; whether that is new.
    fn heard(&mut self, seg: &Segment) -> bool {
        let mut news = false;
        if self.sack && seg.sack[0] != (0, 0) {
            for &block in &seg.sack {
                news |= self.board.add(block, self.una, self.max);
            }
        }
        news
    }

    /// How long a byte that is acknowledged by `seg` was on its way.
    fn round_trip(&mut self, seg: &Segment, now: Ms) -> Option<u32> {
        if self.stamps {
            let echo = seg.time.map(|(_, echo)| Self::stamp(now).wrapping_sub(echo));
            return echo.filter(|&rtt| rtt < 600_000);
        }
        let (_, since) = self.timed.take_if(|(end, _)| !before(self.una, *end))?;
        u32::try_from(now.saturating_sub(since)).ok()
    }

    /// Sees to it that what was lost is repeated (RFC 6675, 5, without a congestion window). `progress`: more was
    /// acknowledged.
    fn make_up(&mut self, progress: bool, now: Ms) {
        if !self.recovering {
            // Three segments came behind a gap; or the last one did, which was repeated after all others were sent.
            let lost = self.dup_acks >= 3
                || self.board.bytes() > 2 * u32::from(self.mss())
                || (self.tail_sent && !self.board.is_empty());
            if !lost || self.una == self.max {
                return;
            }
            self.recovering = true;
            (self.recover, self.round, self.rtx) = (self.max, self.max, self.una);
            self.timed = None;
            if self.sack && !self.board.is_empty() {
                self.repeat_from(self.una);
            } else {
                self.repeat_first();
            }
            self.tail = false;
            self.timer.wait(now);
            return;
        }
        if self.board.is_empty() {
            if progress && !self.sack {
                // The next one is missing as well (RFC 6582).
                self.repeat_first();
            } else if progress {
                // All gaps are filled. Whether the rest arrives is a new question.
                (self.recovering, self.retx) = (false, false);
            }
            return;
        }
        let again = self.board.highest().is_some_and(|highest| before(self.round, highest));
        if again && before(self.una, self.rtx) && !self.retx {
            (self.round, self.rtx) = (self.max, self.una);
        }
        if !self.retx || before(self.retx_at, self.una) {
            self.repeat_from(if before(self.rtx, self.una) { self.una } else { self.rtx });
        }
    }

    /// The first gap from `from` on is repeated.
    fn repeat_from(&mut self, from: u32) {
        let hole = self.board.hole(from);
        self.retx = hole.is_some();
        (self.retx_at, self.retx_to) = hole.unwrap_or((from, from));
    }

    /// The first segment is repeated.
    fn repeat_first(&mut self) {
        let to = self.una.wrapping_add(u32::from(self.mss()));
        self.retx = true;
        (self.retx_at, self.retx_to) = (self.una, if before(self.max, to) { self.max } else { to });
    }

    /// Waits for an answer to what was sent.
    fn watch(&mut self, now: Ms) {
        let some = self.max.wrapping_sub(self.una) > u32::from(self.mss());
        let tail =
            self.state == State::Open && some && self.window != 0 && !self.recovering && !self.tail_sent;
        let after = if tail { self.timer.tail() } else { None };
        self.tail = after.is_some();
        match after {
            Some(after) => self.timer.at(now + after),
            None => self.timer.wait(now),
        }
    }

    /// The guest's window, unless `seg` is older than the one that told of it last. Who acknowledges more is not old, even
    /// if it is a repetition with old numbers: its window counts from there.
    pub(super) fn set_window(&mut self, seg: &Segment, more: bool) {
        let newer = before(self.wl1, seg.seq) || (self.wl1 == seg.seq && !before(seg.ack, self.wl2));
        if more || newer {
            let scale = if seg.has(SYN) { 0 } else { self.scale };
            self.window = u32::from(seg.window) << scale;
            (self.wl1, self.wl2) = (seg.seq, seg.ack);
        }
    }

    /// The end of what the socket ever gives, if it is known.
    fn data_end(&self) -> Option<u32> {
        self.eof.then_some(self.eof_at)
    }

    /// What is to be sent. `pending`: the socket may have more than was sent.
    pub fn next(&mut self, pending: bool, now: Ms) -> Next {
        match self.state {
            State::Connecting => return Next::Nothing,
            State::SynAckSent | State::SynSent => {
                return if self.nxt == self.una { Next::Bare } else { Next::Nothing };
            }
            State::TimeWait => return if self.ack_due { Next::Bare } else { Next::Nothing },
            State::Open => {}
        }
        let end = self.data_end();
        if self.retx {
            let to = end.filter(|&end| before(end, self.retx_to)).unwrap_or(self.retx_to);
            let sound = !before(self.retx_at, self.una) && !before(self.max, to);
            if sound && before(self.retx_at, to) {
                return Next::Data {
                    offset: self.retx_at.wrapping_sub(self.una),
                    max: to.wrapping_sub(self.retx_at),
                };
            }
            // Only the end is missing.
            self.retx = false;
            if sound && end == Some(self.una) && self.una != self.max {
                self.nxt = self.una;
            }
        }
        let mut gap = u32::MAX;
        if !self.board.is_empty() && before(self.nxt, self.max) {
            // What the guest has is not sent to it again.
            self.nxt = self.board.skip(self.nxt);
            gap = self.board.hole(self.nxt).map_or(u32::MAX, |(from, to)| to.wrapping_sub(from));
        }
        let used = self.nxt.wrapping_sub(self.una);
        let left = self.window.saturating_sub(used);
        let known = end.map_or(u32::MAX, |end| end.wrapping_sub(self.nxt));
        let past_end = end.is_some_and(|end| before(end, self.nxt));
        if !past_end && known != 0 && (pending || end.is_some() || before(self.nxt, self.max)) {
            let repeated = before(self.nxt, self.max);
            // The rest of a window that is nearly full waits until there is more of it (RFC 9293, 3.8.6.2.1): small pieces
            // cost as much as large ones.
            let worth =
                (self.window / 4).clamp(u32::from(self.mss()), WORTH_BYTES.max(u32::from(self.mss())));
            if left != 0 && (left >= worth.min(known) || used == 0 || repeated) {
                return Next::Data { offset: used, max: left.min(known).min(gap) };
            }
            if left == 0 && used == 0 && self.timer_is_idle(now) {
                self.timer.wait(now);
            }
        }
        if end == Some(self.nxt) && !past_end {
            return Next::Bare;
        }
        if self.ack_due || self.probe { Next::Bare } else { Next::Nothing }
    }

    /// Nothing is waited for that would be repeated.
    fn timer_is_idle(&self, now: Ms) -> bool {
        self.timer.deadline() > now + 70_000
    }

    fn stamp(now: Ms) -> u32 {
        now as u32
    }

    fn header(&mut self, seq: u32, flags: u8, now: Ms) -> Segment {
        self.ack_due = false;
        Segment {
            sack: self.blocks,
            seq,
            ack: if flags & ACK != 0 { self.rcv } else { 0 },
            flags,
            window: self.window_field(flags & SYN != 0),
            time: self.stamps.then(|| (Self::stamp(now), self.ts_recent)),
            ..Segment::default()
        }
    }

    /// The header of a segment without payload, as [`Next::Bare`] asks for it. `mss`: what is told to the guest.
    pub fn bare(&mut self, mss: u16, now: Ms) -> Segment {
        match self.state {
            State::SynAckSent | State::SynSent => {
                let flags = if self.state == State::SynSent { SYN } else { SYN | ACK };
                let mut segment = self.header(self.una, flags, now);
                segment.mss = mss;
                segment.sack_ok = self.sack;
                segment.scale = (self.our_scale != 0).then_some(self.our_scale);
                self.nxt = self.una.wrapping_add(1);
                self.max = self.nxt;
                self.timer.wait(now);
                segment
            }
            State::Open if self.data_end() == Some(self.nxt) => {
                let segment = self.header(self.nxt, FIN | ACK, now);
                self.nxt = self.nxt.wrapping_add(1);
                if before(self.max, self.nxt) {
                    self.max = self.nxt;
                }
                self.timer.wait(now);
                segment
            }
            _ => {
                // A number that was acknowledged must be answered.
                let back = u32::from(std::mem::take(&mut self.probe));
                let mut segment = self.header(self.nxt.wrapping_sub(back), ACK, now);
                self.tell_again(&mut segment);
                segment
            }
        }
    }

    /// What came twice is told first, once (RFC 2883).
    fn tell_again(&mut self, segment: &mut Segment) {
        if let Some(block) = self.again.take() {
            segment.sack.rotate_right(1);
            segment.sack[0] = block;
        }
    }

    /// An acknowledgement that does not wait for anything: of what came out of order (RFC 5681, 4.2). `None` if there is none
    /// now.
    pub fn ack(&mut self, now: Ms) -> Option<Segment> {
        if self.state != State::Open {
            return None;
        }
        let mut segment = self.header(self.nxt, ACK, now);
        self.tell_again(&mut segment);
        Some(segment)
    }

    /// Bytes of the header that [`data`](Self::data) gives.
    #[must_use]
    pub fn data_header_bytes(&self) -> usize {
        20 + self.option_bytes()
    }

    /// The header of `len` bytes from `offset` on, which [`next`](Self::next) allowed. `last`: the socket has no more for
    /// now.
    pub fn data(&mut self, offset: u32, len: u32, last: bool, now: Ms) -> Segment {
        let seq = self.una.wrapping_add(offset);
        let segment = self.header(seq, if last { ACK | PSH } else { ACK }, now);
        let end = seq.wrapping_add(len);
        let idle = self.max == self.una;
        if self.retx && seq == self.retx_at {
            self.retx_at = end;
            if self.recovering {
                // Only what is sent from now on can show that this was lost as well.
                (self.rtx, self.round) = (end, self.max);
            }
            if !before(end, self.retx_to) {
                self.retx = false;
                if self.recovering && !self.board.is_empty() {
                    self.repeat_from(end);
                }
            }
        }
        if before(self.nxt, end) {
            self.nxt = end;
        }
        if before(self.max, self.nxt) {
            self.max = self.nxt;
            if self.timed.is_none() && !self.stamps && !self.recovering {
                self.timed = Some((self.max, now));
            }
        }
        if idle || self.timer_is_idle(now) {
            self.watch(now);
        }
        segment
    }

    /// The socket gives no more: its queue has `queued` bytes, and the end comes behind them.
    pub fn ended(&mut self, queued: u32) {
        if !self.eof {
            self.eof = true;
            self.eof_at = self.una.wrapping_add(queued);
        }
    }

    /// The header of a segment that ends the connection at once.
    #[must_use]
    pub fn reset(&self) -> Segment {
        let (seq, ack, flags) = match self.state {
            // The guest has no number of ours.
            State::Connecting => (0, self.rcv, RST | ACK),
            State::SynSent => (self.max, 0, RST),
            _ => (self.nxt, self.rcv, RST | ACK),
        };
        Segment { seq, ack, flags, ..Segment::default() }
    }

    /// When [`late`](Self::late) is to be called.
    #[must_use]
    pub fn deadline(&self) -> Ms {
        self.timer.deadline()
    }

    /// A deadline may have passed.
    pub fn late(&mut self, now: Ms) -> Late {
        if !self.timer.is_due(now) {
            return Late::No;
        }
        match self.state {
            State::Connecting => return Late::GiveUp,
            State::TimeWait => return Late::Over,
            State::SynAckSent | State::SynSent => {
                if self.nxt == self.una {
                    // The first one has not been sent yet.
                    self.timer.wait(now);
                    return Late::Repeat;
                }
                let late = self.timer.late(true);
                self.nxt = self.una;
                self.timer.wait(now);
                return late;
            }
            State::Open => {}
        }
        if std::mem::take(&mut self.tail) {
            if self.max == self.una || self.window == 0 {
                self.timer.wait(now);
                return Late::No;
            }
            let last = self.data_end().filter(|&end| before(end, self.max)).unwrap_or(self.max);
            let first = last.wrapping_sub(u32::from(self.mss()));
            self.tail_sent = true;
            self.retx = before(self.una, last);
            (self.retx_at, self.retx_to) = (if before(first, self.una) { self.una } else { first }, last);
            self.timer.wait(now);
            return Late::Probe;
        }
        let late = self.timer.late(false);
        self.timer.wait(now);
        if self.max != self.una {
            // Everything again, but for what the guest said that it had: unless that does not help.
            if self.timer.tries() > 2 {
                self.board.clear();
            }
            self.nxt = self.una;
            (self.retx, self.dup_acks, self.timed) = (false, 0, None);
            self.recovering = !self.board.is_empty();
            (self.recover, self.round, self.rtx) = (self.max, self.max, self.max);
        }
        if self.window == 0 || self.max == self.una {
            // A question that has to be answered (RFC 9293, 3.8.6.1, 3.8.4): a number that was acknowledged.
            self.probe = true;
        }
        late
    }
}
