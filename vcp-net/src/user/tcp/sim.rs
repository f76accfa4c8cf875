//! A connection over a wire with delay, loss and changes of order, in virtual time: a guest that keeps to the standards in
//! the simplest way (it keeps what comes out of order, says so by SACK, and repeats the gaps that it is told of, or goes back
//! when it must), a socket that takes bytes at a rate, and every combination of round-trip time and loss. Nothing stalls,
//! nothing collapses, every byte is where it belongs. And windows that close and open again, at random.

use std::collections::{BTreeMap, VecDeque};

use super::segment::{ACK, FIN, SYN, Segment, before};
use super::{Conn, Late, Ms, Next, Pool, Reassembly, State};

const MSS: u32 = 1448;
const GUEST_ISN: u32 = 0xffff_f000;
const ISN: u32 = 0x7fff_fe00;
/// The guest's window.
const WINDOW: u32 = 256 << 10;
/// A guest repeats what was not acknowledged for so long (and a round trip).
const RTO_MS: Ms = 300;

#[derive(Clone, Copy)]
struct Plan {
    rtt_ms: Ms,
    /// Segments lost, of 1000.
    loss: u64,
    /// Segments that others overtake, of 1000.
    late: u64,
    /// Bytes from the host and from the guest.
    down: u32,
    up: u32,
    /// The host takes, and the guest reads, so many bytes at most each millisecond.
    rate: u32,
    /// Both stop for a while now and then.
    moody: bool,
    /// The guest does SACK, both ways.
    sack: bool,
    /// What comes behind a gap is kept, in so many bytes.
    keep: u32,
    seed: u64,
}

const PLAN: Plan = Plan {
    rtt_ms: 0,
    loss: 0,
    late: 0,
    down: 1_500_000,
    up: 1_500_000,
    rate: 100_000,
    moody: false,
    sack: true,
    keep: 8 << 20,
    seed: 1,
};

/// What is at a place of the guest's stream.
fn byte(at: u32) -> u8 {
    (at ^ at >> 8 ^ at >> 16).wrapping_mul(31) as u8
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

/// A wire.
#[derive(Default)]
struct Wire {
    on: VecDeque<(Ms, Segment, u32)>,
    delay_ms: Ms,
    lost: u64,
    sent: u64,
}

impl Wire {
    fn put(&mut self, seg: Segment, payload: u32, now: Ms, plan: &Plan, random: &mut Random) {
        self.sent += u64::from(payload);
        if random.below(1000) < plan.loss {
            self.lost += 1;
            return;
        }
        let late = if random.below(1000) < plan.late { 1 + random.below(4) } else { 0 };
        let at = now + self.delay_ms + late;
        let place = self.on.partition_point(|(other, ..)| *other <= at);
        self.on.insert(place, (at, seg, payload));
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
    max: u32,
    got: u32,
    read: u32,
    /// Pieces out of order.
    pieces: BTreeMap<u32, u32>,
    peer_isn: u32,
    open: bool,
    window: u32,
    scale: u8,
    dups: u32,
    /// What the other side says that it has behind a gap.
    sacked: BTreeMap<u32, u32>,
    /// It is repeating, up to `recover`; gaps before `repeated` were, since `round` was the next.
    recovering: bool,
    recover: u32,
    repeated: u32,
    round: u32,
    sack: bool,
    moody: bool,
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
        if !self.sack {
            return seg;
        }
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
        assert!(acked <= self.max || acked > u32::MAX / 2, "it acknowledges what was not sent");
        for (left, right) in seg.sack.into_iter().filter(|(left, right)| left != right) {
            assert!(self.sack, "it was not permitted");
            let (left, right) =
                (left.wrapping_sub(GUEST_ISN.wrapping_add(1)), right.wrapping_sub(GUEST_ISN.wrapping_add(1)));
            assert!(left < right && right <= self.max, "it has what was not sent");
            if left > acked {
                let known = self.sacked.entry(left).or_insert(right);
                *known = right.max(*known);
            }
        }
        if acked > self.una && acked <= self.max {
            (self.una, self.since, self.dups) = (acked, now, 0);
            self.nxt = self.nxt.max(acked);
            while let Some((&left, &right)) = self.sacked.first_key_value() {
                if right > acked {
                    // A socket that is full: what it did not take is not acknowledged yet.
                    assert!(left != acked || self.moody, "what it had is not acknowledged");
                    break;
                }
                self.sacked.remove(&left);
            }
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

impl Guest {
    /// The first gap from `at` on with something behind it.
    fn hole(&self, mut at: u32) -> Option<(u32, u32)> {
        for (&left, &right) in &self.sacked {
            if at < left {
                return Some((at, left));
            }
            at = at.max(right);
        }
        None
    }

    /// What is to be repeated now (RFC 6675, without a congestion window).
    fn repeats(&mut self) -> Vec<(u32, u32)> {
        let bytes: u32 = self.sacked.iter().map(|(left, right)| right - left).sum();
        if self.una >= self.recover {
            self.recovering = false;
        }
        if !self.recovering && self.una >= self.recover && (self.dups >= 3 || bytes > 2 * MSS) {
            (self.recovering, self.recover) = (true, self.max);
            (self.repeated, self.round) = (self.una, self.max);
        }
        let mut pieces = Vec::new();
        if !self.recovering {
            return pieces;
        }
        let highest = self.sacked.last_key_value().map_or(0, |(_, right)| *right);
        if highest > self.round && self.una < self.repeated {
            (self.repeated, self.round) = (self.una, self.max);
        }
        while let Some((left, right)) = self.hole(self.repeated.max(self.una)) {
            let len = (right - left).min(MSS);
            pieces.push((left, len));
            self.repeated = left + len;
        }
        pieces
    }
}

struct Outcome {
    took_ms: Ms,
    lost: u64,
    /// Bytes that the guest sent.
    sent_up: u64,
    sent_down: u64,
}

/// The socket, and what is kept in front of it.
struct Host {
    took: u32,
    room: u32,
    fin: bool,
    pool: Pool,
    ahead: Reassembly,
}

impl Host {
    /// What follows what was taken goes to the socket; whether anything did.
    fn fill(&mut self, conn: &mut Conn, now: Ms) -> bool {
        if self.ahead.is_empty() {
            return false;
        }
        self.ahead.advance(&mut self.pool, conn.expects());
        let (mut taken, took, room) = (0, self.took, self.room);
        self.ahead.each(&self.pool, conn.expects(), |bytes| {
            let most = bytes.len().min((room - taken) as usize);
            assert!((took + taken..).zip(&bytes[..most]).all(|(at, is)| *is == byte(at)), "other bytes");
            taken += most as u32;
            most == bytes.len()
        });
        if taken != 0 {
            (self.took, self.room) = (took + taken, room - taken);
            conn.received(taken, false, now);
        }
        if self.ahead.ends(conn.expects()) {
            self.fin = true;
            conn.received(0, true, now);
        }
        self.ahead.advance(&mut self.pool, conn.expects());
        conn.holds(self.ahead.told(conn.expects()), None);
        taken != 0
    }
}

/// Bytes go both ways; then both sides end.
fn run(plan: Plan) -> Outcome {
    let mut random = Random(plan.seed | 1);
    let mut down = Wire { delay_ms: plan.rtt_ms / 2, ..Wire::default() };
    let mut up = Wire { delay_ms: plan.rtt_ms - plan.rtt_ms / 2, ..Wire::default() };
    let syn = Segment {
        seq: GUEST_ISN,
        flags: SYN,
        window: 65_535,
        mss: 1460,
        scale: Some(7),
        sack_ok: plan.sack,
        time: Some((0, 0)),
        ..Segment::default()
    };
    let mut conn = Conn::asked(&syn, false, ISN, 0);
    let mut guest = Guest {
        una: 0,
        nxt: 0,
        max: 0,
        got: 0,
        read: 0,
        pieces: BTreeMap::new(),
        peer_isn: 0,
        open: false,
        window: 0,
        scale: 0,
        dups: 0,
        sacked: BTreeMap::new(),
        recovering: false,
        recover: 0,
        repeated: 0,
        round: 0,
        sack: plan.sack,
        moody: plan.moody,
        since: 0,
        fin_got: false,
        fin_acked: false,
        answer: false,
        stamp: 0,
    };
    conn.connected(0);
    // Bytes of the socket's queue that the guest acknowledged.
    let mut thrown = 0u32;
    let mut host =
        Host { took: 0, room: 256 << 10, fin: false, pool: Pool::new(plan.keep), ahead: Reassembly::new(0) };
    conn.room(host.room);
    let (mut now, mut moved_at, mut stopped_until) = (0 as Ms, 0 as Ms, 0 as Ms);
    loop {
        let mut moved = false;
        while let Some((seg, payload)) = up.take(now) {
            let outcome = conn.segment(&seg, payload, false, now);
            assert!(!outcome.reset);
            thrown += outcome.acked;
            let place = |seq: u32| seq.wrapping_sub(GUEST_ISN.wrapping_add(1));
            if outcome.out_of_order {
                if plan.keep != 0 && (outcome.ahead != 0 || outcome.fin) {
                    let piece = (seg.seq, outcome.ahead, outcome.fin);
                    let kept = host.ahead.put(&mut host.pool, conn.expects(), piece, |from, bytes| {
                        let at = place(seg.seq) + from;
                        (at..).zip(bytes).for_each(|(at, to)| *to = byte(at));
                    });
                    conn.holds(host.ahead.told(conn.expects()), kept.again);
                }
                if let Some(answer) = conn.ack(now) {
                    down.put(answer, 0, now, &plan, &mut random);
                }
            } else if outcome.deliver != 0 || outcome.fin {
                let at = place(seg.seq.wrapping_add(outcome.skip));
                assert_eq!(at, host.took, "not the next bytes of the guest");
                let taken = outcome.deliver.min(host.room);
                (host.took, host.room) = (host.took + taken, host.room - taken);
                let fin = outcome.fin && taken == outcome.deliver;
                host.fin |= fin;
                conn.received(taken, fin, now);
                moved = true;
            }
            moved |= host.fill(&mut conn, now);
        }
        moved |= host.fill(&mut conn, now);
        for _ in 0..4096 {
            let (seg, payload) = match conn.next(!conn.host_ended(), now) {
                Next::Nothing => break,
                Next::Bare => (conn.bare(1460, now), 0),
                Next::Data { offset, max } => {
                    let left = plan.down - thrown - offset.min(plan.down - thrown);
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
            host.room += ((256 << 10) - host.room).min(plan.rate);
            conn.room(host.room);
            if plan.moody && random.below(50) == 0 {
                stopped_until = now + random.below(400);
            }
        }
        if guest.open {
            let patience = RTO_MS + plan.rtt_ms;
            if (guest.dups >= 3 && !plan.sack) || (guest.max > guest.una && now >= guest.since + patience) {
                (guest.nxt, guest.dups, guest.since) = (guest.una, 0, now);
                (guest.recovering, guest.recover) = (false, guest.max);
            }
            if plan.sack {
                for (at, len) in guest.repeats() {
                    // The end is not data.
                    let (len, fin) = (len.min(plan.up.saturating_sub(at)), at + len > plan.up);
                    let flags = if fin { ACK | FIN } else { ACK };
                    up.put(guest.header(at, flags, now), len, now, &plan, &mut random);
                }
            }
            let mut sent = false;
            let shut = guest.window == 0 && guest.nxt == guest.una && guest.una < plan.up;
            if shut && now >= guest.since + patience {
                // A number that was acknowledged: it must be answered.
                up.put(guest.header(guest.una.wrapping_sub(1), ACK, now), 0, now, &plan, &mut random);
                guest.since = now;
            }
            while guest.nxt < plan.up && guest.nxt - guest.una < guest.window {
                let there = guest.sacked.range(..=guest.nxt).next_back().map_or(0, |(_, right)| *right);
                if plan.sack && there > guest.nxt {
                    guest.nxt = there;
                    continue;
                }
                let len = (plan.up - guest.nxt).min(MSS).min(guest.window - (guest.nxt - guest.una));
                up.put(guest.header(guest.nxt, ACK, now), len, now, &plan, &mut random);
                (guest.nxt, sent) = (guest.nxt + len, true);
                guest.max = guest.max.max(guest.nxt);
            }
            // As real ones do, it sends its end behind its data at once.
            if guest.nxt == plan.up && !guest.fin_acked {
                up.put(guest.header(plan.up, ACK | FIN, now), 0, now, &plan, &mut random);
                (guest.nxt, sent) = (plan.up + 1, true);
                guest.max = guest.nxt;
            }
            guest.fin_acked |= guest.una > plan.up;
            if std::mem::take(&mut guest.answer) && !sent {
                up.put(guest.header(guest.nxt, ACK, now), 0, now, &plan, &mut random);
            }
        }
        match conn.late(now) {
            Late::No | Late::Repeat | Late::Probe => {}
            Late::GiveUp => panic!("given up at {now} ms: {conn:?}"),
            Late::Over => break,
        }
        if conn.state == State::TimeWait && guest.fin_got && guest.fin_acked {
            break;
        }
        if moved {
            moved_at = now;
        }
        assert!(now - moved_at < 30_000, "it stalls at {now} ms: {conn:?}, {} and {}", host.took, guest.got);
        if !(moved && plan.rtt_ms == 0) {
            now += 1;
        }
    }
    assert_eq!((host.took, guest.got, host.fin), (plan.up, plan.down, true));
    host.ahead.clear(&mut host.pool);
    assert_eq!(host.pool.used_bytes(), 0);
    Outcome { took_ms: now, lost: down.lost + up.lost, sent_up: up.sent, sent_down: down.sent }
}

/// Seeds of a plan.
const RUNS: u64 = 3;

/// The same plan with several seeds: milliseconds altogether, and bytes sent either way.
fn runs(plan: Plan) -> (Ms, u64, u64) {
    let each = (1..=RUNS).map(|seed| run(Plan { seed: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), ..plan }));
    each.fold((0, 0, 0), |sum, it| (sum.0 + it.took_ms, sum.1 + it.sent_up, sum.2 + it.sent_down))
}

#[test]
fn every_round_trip_time_and_loss_gets_through() {
    for (way, up, down) in [("from the guest", 1_500_000, 0), ("to the guest", 0, 1_500_000)] {
        for rtt_ms in [0, 1, 10, 50, 200] {
            let mut clean = 0;
            for loss in [0, 1, 10] {
                let plan = Plan { rtt_ms, loss, up, down, ..PLAN };
                let (took, sent_up, sent_down) = runs(plan);
                let (plainly, ..) = runs(Plan { sack: false, keep: 0, ..plan });
                let rate = |ms: Ms| RUNS as f64 * 1.5e6 * 8.0 / 1000.0 / ms as f64;
                eprintln!(
                    "{way}, {rtt_ms} ms, {loss} of 1000 lost: {:.1} Mbit/s, without SACK {:.1}; sent {:.3} times",
                    rate(took),
                    rate(plainly),
                    (sent_up + sent_down) as f64 / RUNS as f64 / 1.5e6
                );
                if loss == 0 {
                    clean = took;
                }
                assert!(took <= 3 * clean + RUNS * (RTO_MS + rtt_ms), "{took} ms, {clean} without a loss");
                assert!(took <= plainly + plainly / 8 + 10, "{took} ms, {plainly} without SACK");
                // What a TCP with a congestion window would have (Mathis et al.).
                let mathis = 1.22 * f64::from(MSS) * 8.0
                    / 1000.0
                    / (rtt_ms.max(1) as f64)
                    / (loss.max(1) as f64 / 1000.0).sqrt();
                assert!(rtt_ms < 10 || loss == 0 || rate(took) >= mathis, "{} < {mathis}", rate(took));
                assert!(
                    sent_up + sent_down <= RUNS * 1_600_000,
                    "repeated for nothing: {sent_up}, {sent_down}"
                );
            }
        }
    }
}

#[test]
fn both_ways_at_once_with_changes_of_order() {
    for rtt_ms in [0, 1, 10, 50, 200] {
        for (loss, late) in [(0, 0), (1, 5), (10, 0), (10, 30)] {
            for sack in [true, false] {
                let Outcome { took_ms, lost, .. } = run(Plan { rtt_ms, loss, late, sack, ..PLAN });
                // A window for each round trip, and for each loss what it takes to find out and to repeat.
                let allowed = 300 + 24 * rtt_ms + (lost + late * 10) * (2 * rtt_ms + 2 * RTO_MS);
                assert!(took_ms <= allowed, "{took_ms} ms at {rtt_ms} ms, {lost} lost ({allowed})");
            }
        }
    }
}

#[test]
fn little_room_for_what_is_ahead_stops_nobody() {
    for keep in [0, 64 << 10, 512 << 10] {
        runs(Plan { rtt_ms: 10, loss: 20, keep, ..PLAN });
    }
}

#[test]
fn windows_that_close_and_open_again_stop_nobody() {
    for seed in 1..40u64 {
        run(Plan {
            rtt_ms: 2 * (seed % 4),
            loss: seed % 3,
            late: seed % 5 * 3,
            down: 1_000_000,
            up: 1_000_000,
            rate: 2_000 + (seed as u32 * 977) % 30_000,
            moody: true,
            sack: seed % 7 != 0,
            seed: seed.wrapping_mul(0x2545_f491_4f6c_dd1d),
            ..PLAN
        });
    }
}
