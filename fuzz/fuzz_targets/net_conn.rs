//! A hostile guest's segments against one side of a TCP connection, with a socket that is a count of bytes, and what is kept
//! of those that come out of order.
//!
//! Holds: nothing is sent beyond the window or what the socket has; the socket is told to throw away only what was sent
//! and not yet acknowledged; what is delivered lies within the segment; what is kept is what came first for each number, is
//! told as it is, and its memory is bounded and goes back; the deadline does not lie in the past for ever: a
//! connection that is left alone ends.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use vcp_net::user::tcp::segment::{ACK, HEADER_MAX, RST, SYN, Segment};
use vcp_net::user::tcp::{Conn, Late, Ms, Next, Pool, Reassembly, State};

#[path = "../support/input.rs"]
mod input;
use input::Input;

/// Memory for what comes out of order.
const POOL: u32 = 256 << 10;
/// Turns of a connection that is left alone until it must have ended: each try doubles the wait up to a minute, and one
/// that is open and idle is asked after two hours.
const LIFE: usize = 64;

struct World {
    conn: Conn,
    /// Bytes that the socket has, unacknowledged ones included.
    queue: u64,
    /// It has no more than those.
    ended: bool,
    now: Ms,
    /// Of what was sent, the furthest byte that is not acknowledged.
    sent: u64,
    last: Segment,
    pool: Pool,
    ahead: Reassembly,
    /// What is at the numbers that are kept: which segment brought it.
    kept: BTreeMap<u32, u8>,
    segments: u8,
}

impl World {
    /// Keeps what is ahead, and delivers what follows now.
    fn keep(&mut self, seg: &Segment, ahead: u32, fin: bool) {
        let (next, tag, kept) = (self.conn.expects(), self.segments, &mut self.kept);
        let mut fresh = Vec::new();
        let put = self.ahead.put(&mut self.pool, next, (seg.seq, ahead, fin), |from, bytes| {
            for (at, to) in bytes.iter_mut().enumerate() {
                let seq = seg.seq.wrapping_add(from + at as u32);
                assert!(kept.insert(seq, tag).is_none(), "a number is placed twice");
                fresh.push(seq);
                *to = tag;
            }
        });
        assert!(put.bytes + put.refused <= ahead && self.pool.used_bytes() <= POOL.into());
        if put.bytes == 0 {
            // What was placed was one range too many.
            kept.retain(|seq, _| !fresh.contains(seq));
        }
        let told = self.ahead.told(next);
        self.conn.holds(told, put.again);
        for (left, right) in told.into_iter().filter(|(left, right)| left != right) {
            assert!(right.wrapping_sub(left) <= POOL + 1 && left.wrapping_sub(next) < 1 << 31);
        }
        let _ = self.conn.ack(self.now);
    }

    fn fill(&mut self, mut room: u32) {
        loop {
            let next = self.conn.expects();
            self.ahead.advance(&mut self.pool, next);
            self.kept.retain(|&seq, _| seq.wrapping_sub(next) < 1 << 31);
            if self.conn.guest_ended() {
                self.ahead.clear(&mut self.pool);
                self.kept.clear();
                break;
            }
            if self.ahead.ends(next) {
                self.conn.received(0, true, self.now);
                continue;
            }
            let (mut seq, kept) = (next, &self.kept);
            self.ahead.each(&self.pool, next, |bytes| {
                for byte in bytes {
                    assert_eq!(kept.get(&seq), Some(byte), "other bytes");
                    seq = seq.wrapping_add(1);
                }
                true
            });
            let ready = seq.wrapping_sub(next);
            assert_eq!(ready, self.ahead.ready(next));
            let taken = ready.min(room);
            if taken == 0 {
                break;
            }
            room -= taken;
            self.conn.received(taken, false, self.now);
        }
        self.conn.holds(self.ahead.told(self.conn.expects()), None);
        assert_eq!(self.ahead.is_empty() && self.pool.used_bytes() != 0, false, "a leak");
    }

    fn segment(&mut self, seg: &Segment, payload: u32, room: u32) -> bool {
        self.segments = self.segments.wrapping_add(1);
        let outcome = self.conn.segment(seg, payload, false, self.now);
        assert!(u64::from(outcome.acked) <= self.sent, "more is acknowledged than was sent");
        self.sent -= u64::from(outcome.acked);
        self.queue -= u64::from(outcome.acked);
        assert!(u64::from(outcome.skip) + u64::from(outcome.deliver) <= u64::from(payload));
        if outcome.reset {
            return false;
        }
        if outcome.out_of_order {
            assert!(outcome.deliver == 0 && outcome.ahead <= payload.min(self.conn.told_room()));
            self.keep(seg, outcome.ahead, outcome.fin);
        } else if outcome.deliver != 0 || outcome.fin {
            let taken = outcome.deliver.min(room);
            let told = self.conn.told_room();
            self.conn.received(taken, outcome.fin && taken == outcome.deliver, self.now);
            assert!(self.conn.told_room() <= told, "the edge moves back");
            self.fill(room - taken);
        }
        true
    }

    /// Lets it send; whether it did.
    fn turn(&mut self) -> bool {
        let pending = self.sent < self.queue || !self.ended;
        match self.conn.next(pending, self.now) {
            Next::Nothing => false,
            Next::Bare => {
                self.last = self.conn.bare(1460, self.now);
                self.round_trip();
                true
            }
            Next::Data { offset, max } => {
                assert!(max != 0);
                let there = self.queue.saturating_sub(u64::from(offset)).min(u64::from(max)) as u32;
                if there == 0 {
                    if self.ended {
                        self.conn.ended(offset);
                        return true;
                    }
                    return false;
                }
                assert!(u64::from(offset) <= self.sent, "a hole");
                let mss = u32::from(self.conn.mss());
                let len = there.min(mss * 4);
                self.last = self.conn.data(offset, len, len == there, self.now);
                self.round_trip();
                self.sent = self.sent.max(u64::from(offset) + u64::from(len));
                assert!(u64::from(self.conn.in_flight()) <= self.sent, "more in flight than was sent");
                true
            }
        }
    }

    /// What is sent is read as it was written.
    fn round_trip(&self) {
        let mut bytes = [0; HEADER_MAX];
        let len = self.last.emit(&mut bytes);
        let read = Segment::parse(&bytes[..len]).expect("our own header");
        assert_eq!(Segment { header_bytes: 0, ..read }, Segment { header_bytes: 0, ..self.last });
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let flags = input.byte();
    let isn = input.long();
    let mut guest = Segment {
        seq: input.long(),
        flags: SYN,
        window: input.word(),
        mss: input.word(),
        scale: (flags & 1 != 0).then(|| input.byte() % 15),
        sack_ok: flags & 2 != 0,
        time: (flags & 4 != 0).then(|| (input.long(), 0)),
        ..Segment::default()
    };
    let conn = if flags & 8 != 0 { Conn::asking(isn, 0) } else { Conn::asked(&guest, false, isn, 0) };
    let mut world = World {
        conn,
        queue: 0,
        ended: false,
        now: 0,
        sent: 0,
        last: Segment::default(),
        pool: Pool::new(POOL),
        ahead: Reassembly::new(0),
        kept: BTreeMap::new(),
        segments: 0,
    };
    guest.seq = guest.seq.wrapping_add(1);
    let mut alive = true;
    while alive && !input.is_empty() {
        match input.byte() % 8 {
            0 => world.conn.connected(world.now),
            1..=3 => {
                let kind = input.byte();
                let payload = if kind & 0x20 != 0 { u32::from(input.word()) } else { 0 };
                let seg = Segment {
                    seq: guest.seq.wrapping_add(input.near()),
                    ack: world.last.seq.wrapping_add(input.near()),
                    flags: match kind & 0x1f {
                        0..=15 => ACK,
                        other => other & (ACK | SYN | RST | 1),
                    },
                    window: input.word(),
                    time: (kind & 0x40 != 0).then(|| (input.near(), world.now as u32)),
                    sack: [(world.last.seq.wrapping_add(input.near()), world.last.seq), (0, 0), (0, 0)],
                    sack_ok: true,
                    // As far as its parser lets it.
                    scale: Some(input.byte().min(14)),
                    mss: input.word(),
                    ..Segment::default()
                };
                let before = world.conn.told_room();
                alive = world.segment(&seg, payload, u32::from(input.word()) * 4);
                if payload != 0 && world.conn.told_room() != before {
                    guest.seq = guest.seq.wrapping_add(before.wrapping_sub(world.conn.told_room()));
                }
            }
            4 if !world.ended => world.queue += u64::from(input.word()),
            4 => {}
            5 => world.ended |= input.byte() & 3 == 0,
            6 => {
                world.now += u64::from(input.word());
                match world.conn.late(world.now) {
                    Late::No | Late::Repeat | Late::Probe => {}
                    Late::GiveUp | Late::Over => alive = false,
                }
            }
            _ => {
                world.conn.room(input.long());
            }
        }
        for _ in 0..4 {
            if !world.turn() {
                break;
            }
        }
    }
    // Nobody says anything any more.
    for _ in 0..LIFE {
        if !alive {
            return;
        }
        let deadline = world.conn.deadline();
        world.now = world.now.max(deadline);
        match world.conn.late(world.now) {
            Late::GiveUp | Late::Over => alive = false,
            Late::No | Late::Repeat | Late::Probe => {}
        }
        for _ in 0..4 {
            if !world.turn() {
                break;
            }
        }
        assert!(
            world.conn.deadline() > world.now || world.conn.state == State::TimeWait || !alive,
            "it spins"
        );
    }
    assert!(!alive, "it never ends: {:?}", world.conn);
});
