//! A connection over a wire with delay and loss, in virtual time: a guest that keeps to the standards in the simplest way
//! (it keeps what comes out of order, says so by SACK, and goes back to the gap when it must), a socket that is a count of
//! bytes, and every combination of round-trip time and loss. Nothing stalls, nothing collapses, every byte is where it
//! belongs. And windows that close and open again, at random.

use std::collections::{BTreeMap, VecDeque};

use super::segment::{ACK, FIN, SYN, Segment, before};
use super::{Conn, Late, Ms, Next, State};

const MSS: u32 = 1448;
const GUEST_ISN: u32 = 0xffff_f000;
const ISN: u32 = 0x7fff_fe00;
/// The guest's window.
const WINDOW: u32 = 256 << 10;
/// A guest repeats what was not acknowledged for so long (and a round trip).
const RTO_MS: Ms = 300;

#[derive(Clone, Copy)]
struct Plan {
    /// Half of the round-trip time.
    delay_ms: Ms,
    /// Segments lost, of 1000.
    loss: u64,
    /// Bytes either way.
    len: u32,
    /// The host takes, and the guest reads, so many bytes at most each millisecond.
    rate: u32,
    /// Both stop for a while now and then.
    moody: bool,
    seed: u64,
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// A wire: what is on it arrives in order, or not at all.
#[derive(Default)]
struct Wire {
    on: VecDeque<(Ms, Segment, u32)>,
    lost: u64,
}

impl Wire {
    fn put(&mut self, seg: Segment, payload: u32, now: Ms, plan: &Plan, random: &mut Random) {
        if random.below(1000) < plan.loss {
            self.lost += 1;
            return;
        }
        self.on.push_back((now + plan.delay_ms, seg, payload));
    }

    fn take(&mut self, now: Ms) -> Option<(Segment, u32)> {
        self.on.front().filter(|(at, ..)| *at <= now)?;
        self.on.pop_front().map(|(_, seg, payload)| (seg, payload))
    }
}

/// The guest. Numbers count from the beginning of its streams.
struct Guest {
    /// Ours, acknowledged and sent; theirs, received in order and read.
    una: u32,
    nxt: u32,
    got: u32,
    read: u32,
    /// Pieces out of order.
    pieces: BTreeMap<u32, u32>,
    peer_isn: u32,
    open: bool,
    window: u32,
    scale: u8,
    dups: u32,
    since: Ms,
    fin_got: bool,
    fin_acked: bool,
    answer: bool,
    stamp: u32,
}

impl Guest {
    fn header(&self, offset: u32, flags: u8, now: Ms) -> Segment {
        let mut seg = Segment {
            seq: GUEST_ISN.wrapping_add(1).wrapping_add(offset),
            ack: self.peer_isn.wrapping_add(1).wrapping_add(self.got + u32::from(self.fin_got)),
            flags,
            window: ((WINDOW - (self.got - self.read)) >> 7).min(65_535) as u16,
            time: Some((now as u32, self.stamp)),
            ..Segment::default()
        };
        let base = self.peer_isn.wrapping_add(1);
        for (block, (&at, &len)) in seg.sack.iter_mut().zip(&self.pieces) {
            *block = (base.wrapping_add(at), base.wrapping_add(at + len));
        }
        seg
    }

    fn take(&mut self, seg: &Segment, payload: u32, now: Ms) {
        if let Some((value, _)) = seg.time {
            self.stamp = value;
        }
        if seg.has(SYN) {
            (self.peer_isn, self.scale, self.open) = (seg.seq, seg.scale.unwrap_or(0), true);
            (self.since, self.answer, self.window) = (now, true, seg.window.into());
            return;
        }
        let acked = seg.ack.wrapping_sub(GUEST_ISN.wrapping_add(1));
        let window = u32::from(seg.window) << self.scale;
        if acked > self.una && acked <= self.nxt {
            (self.una, self.since, self.dups) = (acked, now, 0);
        } else if acked == self.una && payload == 0 && window == self.window && self.nxt > self.una {
            self.dups += 1;
        }
        self.window = window;
        let at = seg.seq.wrapping_sub(self.peer_isn.wrapping_add(1));
        if payload != 0 {
            self.answer = true;
            assert!(
                at.wrapping_add(payload).wrapping_sub(self.read) <= WINDOW || before(at, self.got),
                "past the window"
            );
            if !before(at.wrapping_add(payload), self.got.wrapping_add(1)) {
                let piece = self.pieces.entry(at).or_insert(0);
                *piece = payload.max(*piece);
            }
            while let Some((&first, &len)) = self.pieces.first_key_value().filter(|(at, _)| **at <= self.got)
            {
                self.pieces.remove(&first);
                self.got = self.got.max(first + len);
            }
        }
        if seg.has(FIN) {
            self.answer = true;
            self.fin_got |= at.wrapping_add(payload) == self.got;
        } else if payload == 0 && before(at, self.got) {
            // A question.
            self.answer = true;
        }
    }
}

struct Outcome {
    took_ms: Ms,
    lost: u64,
}

/// Bytes go both ways; then both sides end.
fn run(plan: Plan) -> Outcome {
    let mut random = Random(plan.seed | 1);
    let (mut down, mut up) = (Wire::default(), Wire::default());
    let syn = Segment {
        seq: GUEST_ISN,
        flags: SYN,
        window: 65_535,
        mss: 1460,
        scale: Some(7),
        sack_ok: true,
        time: Some((0, 0)),
        ..Segment::default()
    };
    let mut conn = Conn::asked(&syn, false, ISN, 0);
    let mut guest = Guest {
        una: 0,
        nxt: 0,
        got: 0,
        read: 0,
        pieces: BTreeMap::new(),
        peer_isn: 0,
        open: false,
        window: 0,
        scale: 0,
        dups: 0,
        since: 0,
        fin_got: false,
        fin_acked: false,
        answer: false,
        stamp: 0,
    };
    conn.connected(0);
    // Of the socket: bytes that the guest acknowledged, bytes that the host took, and how many it has room for.
    let (mut thrown, mut delivered, mut room, mut host_fin) = (0u32, 0u32, 256u32 << 10, false);
    conn.room(room);
    let (mut now, mut moved_at, mut stopped_until) = (0 as Ms, 0 as Ms, 0 as Ms);
    loop {
        let mut moved = false;
        while let Some((seg, payload)) = up.take(now) {
            let outcome = conn.segment(&seg, payload, false, now);
            assert!(!outcome.reset);
            thrown += outcome.acked;
            if outcome.deliver != 0 || outcome.fin {
                let at = seg.seq.wrapping_add(outcome.skip).wrapping_sub(GUEST_ISN.wrapping_add(1));
                assert_eq!(at, delivered, "not the next bytes of the guest");
                let taken = outcome.deliver.min(room);
                (delivered, room) = (delivered + taken, room - taken);
                let fin = outcome.fin && taken == outcome.deliver;
                host_fin |= fin;
                conn.received(taken, fin, now);
                moved = true;
            }
        }
        for _ in 0..4096 {
            let (seg, payload) = match conn.next(!conn.host_ended(), now) {
                Next::Nothing => break,
                Next::Bare => (conn.bare(1460, now), 0),
                Next::Data { offset, max } => {
                    let left = plan.len - thrown - offset.min(plan.len - thrown);
                    if left == 0 {
                        conn.ended(offset);
                        continue;
                    }
                    let len = left.min(max).min(MSS);
                    (conn.data(offset, len, len == left, now), len)
                }
            };
            down.put(seg, payload, now, &plan, &mut random);
        }
        while let Some((seg, payload)) = down.take(now) {
            let before = guest.got;
            guest.take(&seg, payload, now);
            moved |= guest.got != before;
        }
        if now >= stopped_until {
            let told = WINDOW - (guest.got - guest.read);
            guest.read += (guest.got - guest.read).min(plan.rate);
            guest.answer |= told < MSS && WINDOW - (guest.got - guest.read) >= MSS;
            let free = (256 << 10) - room;
            room += free.min(plan.rate);
            conn.room(room);
            if plan.moody && random.below(50) == 0 {
                stopped_until = now + random.below(400);
            }
        }
        if guest.open {
            if guest.dups >= 3 || (guest.nxt > guest.una && now >= guest.since + RTO_MS + 2 * plan.delay_ms) {
                (guest.nxt, guest.dups, guest.since) = (guest.una, 0, now);
            }
            let mut sent = false;
            let shut = guest.window == 0 && guest.nxt == guest.una && guest.una < plan.len;
            if shut && now >= guest.since + RTO_MS + 2 * plan.delay_ms {
                // A number that was acknowledged: it must be answered.
                up.put(guest.header(guest.una.wrapping_sub(1), ACK, now), 0, now, &plan, &mut random);
                guest.since = now;
            }
            while guest.nxt < plan.len && guest.nxt - guest.una < guest.window {
                let len = (plan.len - guest.nxt).min(MSS).min(guest.window - (guest.nxt - guest.una));
                up.put(guest.header(guest.nxt, ACK, now), len, now, &plan, &mut random);
                (guest.nxt, sent) = (guest.nxt + len, true);
            }
            let ends = guest.una >= plan.len && !guest.fin_acked;
            if ends && guest.nxt <= plan.len {
                up.put(guest.header(plan.len, ACK | FIN, now), 0, now, &plan, &mut random);
                (guest.nxt, guest.since, sent) = (plan.len + 1, now, true);
            }
            guest.fin_acked |= guest.una > plan.len;
            if std::mem::take(&mut guest.answer) && !sent {
                up.put(guest.header(guest.nxt, ACK, now), 0, now, &plan, &mut random);
            }
        }
        match conn.late(now) {
            Late::No | Late::Repeat => {}
            Late::GiveUp => panic!("given up at {now} ms: {conn:?}"),
            Late::Over => break,
        }
        if conn.state == State::TimeWait && guest.fin_got && guest.fin_acked {
            break;
        }
        if moved {
            moved_at = now;
        }
        assert!(now - moved_at < 30_000, "it stalls at {now} ms: {conn:?}, {delivered} and {}", guest.got);
        if !(moved && plan.delay_ms == 0) {
            now += 1;
        }
    }
    assert_eq!((delivered, guest.got, host_fin), (plan.len, plan.len, true));
    Outcome { took_ms: now, lost: down.lost + up.lost }
}

#[test]
fn every_round_trip_time_and_loss_gets_through() {
    for delay_ms in [0, 1, 5, 25, 100] {
        for loss in [0, 1, 10] {
            for seed in 1..4u64 {
                let plan = Plan {
                    delay_ms,
                    loss,
                    len: 1_500_000,
                    rate: 100_000,
                    moody: false,
                    seed: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
                };
                let Outcome { took_ms, lost } = run(plan);
                // A window for each round trip, and for each loss what it takes to find out and to repeat.
                let rtt = 2 * delay_ms;
                let allowed = 200 + 24 * rtt + lost * (2 * rtt + 2 * RTO_MS);
                assert!(
                    took_ms <= allowed,
                    "{took_ms} ms at {rtt} ms, {lost} lost of {loss} per mille ({allowed})"
                );
            }
        }
    }
}

#[test]
fn windows_that_close_and_open_again_stop_nobody() {
    for seed in 1..60u64 {
        let plan = Plan {
            delay_ms: seed % 4,
            loss: seed % 3,
            len: 1_000_000,
            rate: 2_000 + (seed as u32 * 977) % 30_000,
            moody: true,
            seed: seed.wrapping_mul(0x2545_f491_4f6c_dd1d),
        };
        run(plan);
    }
}
