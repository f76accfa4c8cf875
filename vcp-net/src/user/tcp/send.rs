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
            let rtt = seg.time.filter(|_| self.stamps).map(|(_, echo)| Self::stamp(now).wrapping_sub(echo));
            self.timer.progress(rtt.filter(|&rtt| rtt < 600_000), self.max != self.una, now);
            if self.recovering {
                if before(self.una, self.recover) {
                    self.repeat_hole(seg);
                } else {
                    self.recovering = false;
                    self.retx = false;
                }
            }
            self.set_window(seg);
            return acked;
        }
        let window = self.window;
        if seg.ack == self.una {
            self.set_window(seg);
        }
        let same = window == self.window && payload == 0 && !seg.has(FIN) && waiting;
        if seg.ack == self.una && same && self.window != 0 {
            self.dup_acks = self.dup_acks.saturating_add(1);
            // With SACK, what is missing is known at once (RFC 6675 waits for three as well: networks reorder).
            if self.dup_acks == 3 && !self.recovering {
                self.recovering = true;
                self.recover = self.max;
                self.repeat_hole(seg);
                self.timer.wait(now);
            }
        }
        0
    }

    /// Marks the first hole for repetition.
    fn repeat_hole(&mut self, seg: &Segment) {
        let blocks = seg.sack.iter().filter(|(left, right)| left != right);
        let left = blocks
            .map(|&(left, _)| left)
            .filter(|&left| before(self.una, left) && !before(self.max, left))
            .min_by_key(|left| left.wrapping_sub(self.una));
        let default = self.una.wrapping_add(u32::from(self.mss()));
        self.retx_to = left.filter(|_| self.sack).unwrap_or(default);
        if before(self.max, self.retx_to) {
            self.retx_to = self.max;
        }
        self.retx = true;
    }

    pub(super) fn set_window(&mut self, seg: &Segment) {
        let newer = before(self.wl1, seg.seq) || (self.wl1 == seg.seq && !before(seg.ack, self.wl2));
        if newer {
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
            if before(self.una, to) {
                return Next::Data { offset: 0, max: to.wrapping_sub(self.una) };
            }
            // Only the end is missing.
            self.retx = false;
            if end == Some(self.una) && self.una != self.max {
                self.nxt = self.una;
            }
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
                return Next::Data { offset: used, max: left.min(known) };
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
                self.header(self.nxt.wrapping_sub(back), ACK, now)
            }
        }
    }

    /// Bytes of the header that [`data`](Self::data) gives.
    #[must_use]
    pub fn data_header_bytes(&self) -> usize {
        if self.stamps { 32 } else { 20 }
    }

    /// The header of `len` bytes from `offset` on, which [`next`](Self::next) allowed. `last`: the socket has no more for
    /// now.
    pub fn data(&mut self, offset: u32, len: u32, last: bool, now: Ms) -> Segment {
        let seq = self.una.wrapping_add(offset);
        let segment = self.header(seq, if last { ACK | PSH } else { ACK }, now);
        let end = seq.wrapping_add(len);
        let idle = self.max == self.una;
        if offset == 0 {
            // What is left of a hole follows with the next acknowledgement.
            self.retx = false;
        }
        if before(self.nxt, end) {
            self.nxt = end;
        }
        if before(self.max, self.nxt) {
            self.max = self.nxt;
        }
        if idle || self.timer_is_idle(now) {
            self.timer.wait(now);
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
        let late = self.timer.late(false);
        self.timer.wait(now);
        if self.max != self.una {
            // Everything again, as it is acknowledged.
            self.nxt = self.una;
            (self.recovering, self.retx, self.dup_acks) = (false, false, 0);
        }
        if self.window == 0 || self.max == self.una {
            // A question that has to be answered (RFC 9293, 3.8.6.1, 3.8.4): a number that was acknowledged.
            self.probe = true;
        }
        late
    }
}
