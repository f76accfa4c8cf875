use std::time::{Duration, Instant};

use super::*;
use crate::error::Violation;
use crate::handshake::{Message, read_hello};
use crate::layout::{self, Desc, PARKED, flags};
use crate::region::{Access, Parcel};
use crate::ring::Words;
use crate::sync::Ordering;

const READ: u16 = 1;
const WRITE: u16 = 2;

pub(super) fn small() -> Config {
    Config { log2_slots: 6, window: 8, chain_max: 4, deadline: Duration::from_secs(20), ..Config::default() }
}

pub(super) fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(20))
}

fn hello(link: &Link) -> Hello {
    read_hello(link, Instant::now() + Duration::from_secs(20)).unwrap()
}

pub(super) fn pair(config: &Config, ours: &[Pool], theirs: &[Pool]) -> (Channel, Channel) {
    let (one, two) = Link::pair().unwrap();
    std::thread::scope(|scope| {
        let ours = scope.spawn(|| Channel::connect(one, config, ours).unwrap());
        let hello = hello(&two);
        let theirs = Channel::accept(two, hello, config, theirs).unwrap();
        (ours.join().unwrap(), theirs)
    })
}

fn request(channel: &mut Channel) -> Request {
    match channel.receive().unwrap() {
        Some(Incoming::Request(request)) => request,
        other => panic!("{other:?} is no request"),
    }
}

fn completion(channel: &mut Channel) -> Completion {
    match channel.receive().unwrap() {
        Some(Incoming::Completion(completion)) => completion,
        other => panic!("{other:?} is no completion"),
    }
}

fn one_way(channel: &mut Channel) -> OneWay {
    match channel.receive().unwrap() {
        Some(Incoming::OneWay(message)) => message,
        other => panic!("{other:?} is no one-way message"),
    }
}

fn parcel(pool: &Pool, fill: u8, len: usize) -> Parcel<'_> {
    let mut loan = pool.loan().unwrap().unwrap();
    loan[..len].fill(fill);
    loan.freeze(0..len)
}

#[test]
fn data_goes_out_by_reference_and_the_buffer_comes_back() {
    let pool = Pool::new(0, 1, 4096, 2, Access::Owner).unwrap();
    let (mut a, mut b) = pair(&small(), std::slice::from_ref(&pool), &[]);
    let head = Head { opcode: WRITE, value: Some(77), ..Head::default() };
    let token = a.request_one(head, parcel(&pool, 9, 100)).unwrap();
    a.commit();
    assert_eq!((pool.available(), a.in_flight()), (1, 1));
    let got = request(&mut b);
    assert_eq!((got.opcode, got.value, got.lane, got.replay), (WRITE, 77, 0, false));
    let segments = b.segments(&got).to_vec();
    assert_eq!(segments.len(), 1);
    let mut bytes = [0; 100];
    let slice = b.slice(segments[0]).unwrap();
    slice.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [9; 100]);
    assert!(slice.write(0, &bytes).is_err(), "the peer only reads");
    b.complete(got, Status { code: 3, value: 1 << 40, len: 100 }).unwrap();
    b.commit();
    let done = completion(&mut a);
    assert_eq!(done, Completion { token, code: 3, value: 1 << 40, len: 100 });
    assert_eq!(pool.available(), 1, "in the caller's hands until the next receive");
    assert!(a.receive().unwrap().is_none());
    assert_eq!((pool.available(), a.in_flight(), b.held()), (2, 0, 0));
}

#[test]
fn the_peer_fills_a_buffer_and_the_owner_reads_and_keeps_it() {
    let pool = Pool::new(1, 1, 4096, 2, Access::Both).unwrap();
    let (mut a, mut b) = pair(&small(), std::slice::from_ref(&pool), &[]);
    let blank = pool.blank().unwrap().unwrap().freeze(0..4096);
    a.request_one(Head { opcode: READ, ..Head::default() }, blank).unwrap();
    let got = request(&mut b);
    assert_eq!(got.value, 0);
    let segment = b.segments(&got)[0];
    b.slice(segment).unwrap().write(4000, &[5; 96]).unwrap();
    assert!(b.slice(segment).unwrap().write(4000, &[5; 97]).is_err());
    b.complete(got, Status::default()).unwrap();
    let done = completion(&mut a);
    let mut bytes = [0; 97];
    a.read_back(&done, 0, 3999, &mut bytes).unwrap();
    assert_eq!((bytes[0], bytes[1], bytes[96]), (0, 5, 5));
    assert!(a.read_back(&done, 1, 0, &mut bytes).is_err());
    let (region, raw) = a.take_back(&done).unwrap();
    assert_eq!(region, 1);
    assert!(a.take_back(&done).is_none(), "once");
    assert!(a.receive().unwrap().is_none());
    assert_eq!(pool.available(), 1, "kept");
    pool.blank_from_raw(raw).unwrap().read(4095, &mut bytes[..1]).unwrap();
    assert_eq!(pool.available(), 2);
}

#[test]
fn one_way_messages_carry_sixteen_bytes_or_data() {
    let pool = Pool::new(0, 1, 64, 3, Access::Owner).unwrap();
    let (mut a, mut b) = pair(&small(), std::slice::from_ref(&pool), &[]);
    a.send(0, 5, b"hello, neighbour").unwrap();
    a.send(0, 6, b"").unwrap();
    assert_eq!(a.send(0, 5, &[0; 17]), Err(SendError::Inline(17)));
    let got = one_way(&mut b);
    assert_eq!((got.opcode, got.len), (5, 16));
    assert_eq!(got.words.map(u64::to_le_bytes).concat(), b"hello, neighbour");
    assert!(b.data(&got).is_empty());
    assert_eq!(one_way(&mut b).len, 0);

    let mut data = vec![parcel(&pool, 1, 10), parcel(&pool, 2, 20), parcel(&pool, 3, 30)];
    let head = Head { opcode: 7, value: Some(42), ..Head::default() };
    a.send_data(head, &mut data).unwrap();
    assert!(data.is_empty());
    let got = one_way(&mut b);
    assert_eq!((got.opcode, got.words[1]), (7, 42));
    let lens: Vec<u32> = b.data(&got).iter().map(|segment| segment.len).collect();
    assert_eq!(lens, [10, 20, 30]);
    a.reclaim(0);
    assert_eq!(pool.available(), 0, "the receiver may still read");
    assert!(b.receive().unwrap().is_none());
    assert!(b.data(&got).is_empty(), "its time is over");
    a.reclaim(0);
    assert_eq!(pool.available(), 3);
}

#[test]
fn what_is_refused_stays_the_callers() {
    let pool = Pool::new(0, 1, 64, 8, Access::Owner).unwrap();
    let other = Pool::new(0, 1, 64, 8, Access::Owner).unwrap();
    let (mut a, _b) = pair(&small(), std::slice::from_ref(&pool), &[]);
    let mut data: Vec<_> = (0..4).map(|n| parcel(&pool, n, 8)).collect();
    let head = Head { value: Some(0), ..Head::default() };
    assert_eq!(a.request(head, &mut data), Err(SendError::Length { slots: 5, max: 4 }));
    assert_eq!(data.len(), 4);
    a.request(Head::default(), &mut data).unwrap();
    assert!(data.is_empty());
    let (error, back) = a.request_one(Head { lane: 1, ..Head::default() }, parcel(&pool, 0, 8)).unwrap_err();
    assert_eq!(error, SendError::Lane(1));
    drop(back);
    let (error, _) = a.request_one(Head::default(), parcel(&other, 0, 8)).unwrap_err();
    assert_eq!(error, SendError::Pool(0), "a pool of the same number that was not announced");
    assert_eq!(pool.available(), 4);
    for _ in 1..8 {
        a.ask(0, 1, 1).unwrap();
    }
    assert_eq!(a.ask(0, 1, 1), Err(SendError::Window));
    assert_eq!((a.in_flight(), a.stats().window_full), (8, 1));
}

/// Both rings full of requests and one-way messages in both directions: every completion still gets through.
#[test]
fn two_full_rings_do_not_deadlock() {
    let (mut a, mut b) = pair(&small(), &[], &[]);
    for round in 0..50 {
        for side in [&mut a, &mut b] {
            while side.ask(0, 1, round).is_ok() {}
            while side.send(0, 2, b"x").is_ok() {}
        }
        assert_eq!((a.in_flight(), b.in_flight()), (8, 8));
        for side in [&mut a, &mut b] {
            let mut requests = Vec::new();
            loop {
                match side.receive().unwrap() {
                    Some(Incoming::Request(request)) => requests.push(request),
                    Some(_) => {}
                    None => break,
                }
            }
            assert_eq!(requests.len(), 8);
            for request in requests {
                side.complete(request, Status::default()).unwrap();
            }
            while side.send(0, 2, b"x").is_ok() {}
        }
        for side in [&mut a, &mut b] {
            while side.receive().unwrap().is_some() {}
            assert_eq!(side.in_flight(), 0);
        }
    }
}

#[test]
fn the_urgent_lane_goes_first() {
    let config = Config { lanes: 3, ..small() };
    let (mut a, mut b) = pair(&config, &[], &[]);
    for lane in [2, 1, 0, 2, 0] {
        a.send(lane, u16::from(lane), b"").unwrap();
    }
    let order: Vec<u8> = (0..5).map(|_| one_way(&mut b).lane).collect();
    assert_eq!(order, [0, 0, 1, 2, 2]);
    let token = a.ask(1, 1, 1).unwrap();
    let got = request(&mut b);
    b.complete(got, Status::default()).unwrap();
    assert_eq!(completion(&mut a).token, token);
}

/// Writes a slot as a hostile peer would: any words, under the right tag.
fn forge(channel: &mut Channel, desc: Desc) {
    let tx = &mut channel.lanes[0].tx;
    tx.push(desc);
    channel.commit();
}

#[test]
fn every_rule_broken_is_found_and_counted() {
    let pool = Pool::new(0, 1, 4096, 2, Access::Owner).unwrap();
    let good = Desc { region: 0, generation: 1, value: 0, len: 64, flags: flags::REQUEST, ..Desc::default() };
    let more = Desc { flags: flags::REQUEST | flags::MORE, ..good };
    let cases: &[(&[Desc], usize)] = &[
        (&[Desc { flags: 1 << 5, ..good }], 1),
        (&[Desc { flags: u16::MAX ^ 2, ..good }], 1),
        (&[Desc { region: 1, ..good }], 2),
        (&[Desc { generation: 2, ..good }], 2),
        (&[Desc { value: 8192, ..good }], 3),
        (&[Desc { value: u64::MAX, ..good }], 3),
        (&[Desc { len: 0, ..good }], 3),
        (&[Desc { len: u32::MAX, ..good }], 3),
        (&[Desc { flags: flags::REQUEST | flags::INLINE, len: 9, ..good }], 4),
        (&[Desc { flags: flags::ONE_WAY | flags::INLINE, len: 17, ..good }], 4),
        (&[more, more, more, more], 5),
        (&[more, Desc { flags: flags::ONE_WAY, ..good }], 5),
        (&[more, Desc { flags: flags::REQUEST | flags::INLINE, len: 8, ..good }], 5),
        (&[more, Desc { flags: flags::REQUEST | flags::REPLAY, ..good }], 5),
        (&[more, Desc { region: 9, ..good }], 2),
        (&[good; 9], 6),
        (&[Desc { flags: flags::COMPLETION, ..Desc::default() }], 7),
        (&[Desc { flags: flags::COMPLETION, cookie: u64::MAX, ..Desc::default() }], 7),
        (&[Desc { flags: flags::COMPLETION | flags::MORE, ..Desc::default() }], 7),
        (&[more, Desc { flags: flags::COMPLETION, ..Desc::default() }], 7),
        (&[Desc { flags: flags::CONTROL, opcode: 1, value: 63, ..Desc::default() }], 10),
        (&[Desc { flags: flags::CONTROL, opcode: 9, value: 5, ..Desc::default() }], 10),
    ];
    for (slots, rule) in cases {
        let (mut a, mut b) = pair(&small(), std::slice::from_ref(&pool), &[]);
        for desc in *slots {
            forge(&mut a, *desc);
        }
        let mut requests = Vec::new();
        let error = loop {
            match b.receive() {
                Ok(Some(Incoming::Request(request))) => requests.push(request),
                Ok(other) => panic!("{slots:?}: {other:?}"),
                Err(error) => break error,
            }
        };
        let Error::Violation(violation) = error else { panic!("{slots:?}: {error:?}") };
        assert_eq!(violation.rule(), *rule, "{slots:?}: {violation}");
        assert_eq!(b.stats().violations[rule - 1], 1);
        // It stays so, on this channel only, and whatever is tried.
        assert_eq!(b.receive().unwrap_err(), error);
        assert_eq!(b.send(0, 1, b"").unwrap_err(), SendError::Channel(error));
        for request in requests {
            assert_eq!(b.complete(request, Status::default()), Err(SendError::Channel(error)));
        }
        assert_eq!(b.stats().violations.iter().sum::<u64>(), 1);
    }
}

#[test]
fn a_head_that_lies_ends_the_channel() {
    for (head, rule) in [(1u64 << 50, 8), (u64::MAX, 8)] {
        let (mut a, b) = pair(&small(), &[], &[]);
        let word = layout::lane(0, 6).head;
        b.control.words()[word].store(head, Ordering::Release);
        let error = loop {
            if let Err(error) = a.send(0, 1, b"")
                && error != SendError::Full
            {
                break error;
            }
        };
        let SendError::Channel(Error::Violation(violation)) = error else { panic!("{error:?}") };
        assert_eq!(violation.rule(), rule);
    }
}

/// A peer that sends requests without releasing completions takes away its own reserve.
#[test]
fn a_reserve_that_is_not_kept_is_the_peers_fault() {
    let config = Config { log2_slots: 4, window: 8, chain_max: 1, ..small() };
    let (mut a, mut b) = pair(&config, &[], &[]);
    let request_slot = Desc { flags: flags::REQUEST | flags::INLINE, len: 8, ..Desc::default() };
    let error = 'outer: loop {
        for _ in 0..8 {
            a.lanes[0].tx.free(1).unwrap();
            forge(&mut a, request_slot);
        }
        while let Some(Incoming::Request(request)) = b.receive().unwrap() {
            if let Err(error) = b.complete(request, Status::default()) {
                break 'outer error;
            }
        }
    };
    assert_eq!(error, SendError::Channel(Error::Violation(Violation::Reserve)));
}

#[test]
fn a_chain_that_never_ends_is_late() {
    let pool = Pool::new(0, 1, 4096, 2, Access::Owner).unwrap();
    let (mut a, mut b) = pair(&small(), std::slice::from_ref(&pool), &[]);
    forge(&mut a, Desc { generation: 1, len: 64, flags: flags::REQUEST | flags::MORE, ..Desc::default() });
    assert!(b.receive().unwrap().is_none());
    b.lanes[0].staged.since = Some(Instant::now() - Duration::from_secs(2));
    assert_eq!(b.receive().unwrap_err(), Error::Violation(Violation::ChainLate));
}

#[test]
fn what_a_dead_peer_had_published_is_received_first() {
    let (mut a, mut b) = pair(&small(), &[], &[]);
    for n in 0..5 {
        a.send(0, n, b"").unwrap();
    }
    drop(a);
    assert!(b.wait(soon()).unwrap());
    b.attend_quietly();
    for n in 0..5 {
        assert_eq!(one_way(&mut b).opcode, n);
    }
    assert_eq!(b.receive().unwrap_err(), Error::Gone);
}

#[test]
fn a_survivor_sends_again_what_was_not_answered() {
    let config = small();
    let pool = Pool::new(0, 1, 64, 8, Access::Owner).unwrap();
    let (mut a, mut b) = pair(&config, std::slice::from_ref(&pool), &[]);
    let tokens: Vec<_> = (0..4)
        .map(|n| a.request_one(Head { opcode: n, ..Head::default() }, parcel(&pool, n as u8, 8)).unwrap())
        .collect();
    a.send(0, 100, b"seen").unwrap();
    a.send(0, 101, b"unseen").unwrap();
    let mut held: Vec<_> = (0..4).map(|_| request(&mut b)).collect();
    assert_eq!(one_way(&mut b).opcode, 100);
    b.lanes[0].rx.release();
    // Answered, but the answer is published only: it is still received.
    b.complete(held.remove(1), Status::default()).unwrap();
    drop(b);
    assert!(a.wait(soon()).unwrap());
    a.attend_quietly();
    assert_eq!(completion(&mut a).token, tokens[1]);
    assert_eq!(a.receive().unwrap_err(), Error::Gone);
    let dormant = a.into_dormant();
    assert_eq!((dormant.in_flight(), dormant.tokens().len()), (3, 3));

    let (one, two) = Link::pair().unwrap();
    let (mut a, mut b) = std::thread::scope(|scope| {
        let b = scope.spawn(|| {
            let hello = hello(&two);
            assert!(hello.resumes && hello.epoch == 2);
            Channel::accept(two, hello, &config, &[]).unwrap()
        });
        (dormant.connect(one, &config).unwrap(), b.join().unwrap())
    });
    assert_eq!((a.agreed().epoch, b.agreed().epoch), (2, 2));
    assert_eq!(a.agreed().channel, b.agreed().channel);
    let again = one_way(&mut b);
    assert!(again.opcode == 101 && again.replay);
    for n in [0, 2, 3] {
        let got = request(&mut b);
        assert_eq!((got.opcode, got.replay, got.cookie), (n, true, tokens[usize::from(n)].number()));
        let mut byte = [0];
        let segment = b.segments(&got)[0];
        b.slice(segment).unwrap().read(0, &mut byte).unwrap();
        assert_eq!(u16::from(byte[0]), n, "the data is still there");
        b.complete(got, Status::default()).unwrap();
        assert_eq!(completion(&mut a).token, tokens[usize::from(n)]);
    }
    assert!(a.receive().unwrap().is_none());
    assert_eq!((a.in_flight(), pool.available(), a.stats().replays), (0, 8, 4));
}

#[test]
fn a_request_that_is_still_worked_on_is_not_done_twice() {
    let config = small();
    let (mut a, mut b) = pair(&config, &[], &[]);
    let token = a.ask(0, 1, 1).unwrap();
    let held = request(&mut b);
    // The connection breaks, and both sides live.
    a.link = Link::pair().unwrap().0;
    b.link = Link::pair().unwrap().0;
    let (a, b) = (a.into_dormant(), b.into_dormant());
    let (one, two) = Link::pair().unwrap();
    let (mut a, mut b) = std::thread::scope(|scope| {
        let a = scope.spawn(|| a.connect(one, &config).unwrap());
        let hello = hello(&two);
        let b = b.accept(two, hello, &config).unwrap();
        (a.join().unwrap(), b)
    });
    assert!(b.receive().unwrap().is_none());
    assert_eq!((b.stats().replays_merged, b.held()), (1, 1));
    b.complete(held, Status::default()).unwrap();
    assert_eq!(completion(&mut a).token, token);
}

#[test]
fn a_new_peer_gets_no_answers_of_its_predecessor() {
    let config = small();
    let (mut a, mut b) = pair(&config, &[], &[]);
    a.ask(0, 1, 1).unwrap();
    let held = request(&mut b);
    let channel = b.agreed().channel;
    drop(a);
    let b = b.into_dormant();
    let (one, two) = Link::pair().unwrap();
    let mut b = std::thread::scope(|scope| {
        scope.spawn(|| {
            // It knows the channel's number, but has no state.
            let prior = crate::handshake::Prior { channel, epoch: 1 };
            let mut setup = crate::handshake::Setup::connecting(config.clone(), Vec::new(), Some(prior));
            let first = setup.outgoing().unwrap();
            let Message::Hello(hello) = first.message else { panic!() };
            one.send(&Message::Hello(Hello { resumes: false, ..hello }), None).unwrap();
            loop {
                while let Some(packet) = setup.outgoing() {
                    let fd = packet.fd.as_ref().map(AsFd::as_fd);
                    one.send(&packet.message, fd).unwrap();
                }
                if setup.is_done() {
                    break;
                }
                let (message, fd) = one.expect(Instant::now() + Duration::from_secs(20)).unwrap();
                setup.incoming(message, fd).unwrap();
            }
            setup.finish(one).unwrap()
        });
        let hello = hello(&two);
        b.accept(two, hello, &config).unwrap()
    });
    assert_eq!(b.complete(held, Status::default()), Err(SendError::Stale));
    assert_eq!((b.stats().stale_completions, b.held()), (1, 0));
}

#[test]
fn a_dead_side_goes_on_from_what_was_kept() {
    let config = small();
    let pool = Pool::new(0, 1, 64, 8, Access::Owner).unwrap();
    let (mut a, b) = pair(&config, std::slice::from_ref(&pool), &[]);
    let token = a.request_one(Head { opcode: 9, ..Head::default() }, parcel(&pool, 33, 64)).unwrap();
    let kept = a.keepsake();
    let flight = kept.flight.try_clone_to_owned().unwrap();
    let (number, generation, access, file) = kept.regions[0];
    let file = file.try_clone_to_owned().unwrap();
    let (channel, epoch) = (kept.channel, kept.epoch);
    drop((a, pool));
    let mut b = b;
    let first = request(&mut b);
    assert_eq!(first.cookie, token.number());
    b.complete(first, Status::default()).unwrap();
    b.attend_quietly();
    assert_eq!(b.receive().unwrap_err(), Error::Gone);
    let b = b.into_dormant();

    let old = Pool::restore(number, generation, file, access).unwrap();
    assert!(old.loan().unwrap().is_none());
    let a = Dormant::restore(flight, channel, epoch, vec![old]).unwrap();
    assert_eq!(a.tokens(), [token]);
    let (one, two) = Link::pair().unwrap();
    let (mut a, mut b) = std::thread::scope(|scope| {
        let a = scope.spawn(|| a.connect(one, &config).unwrap());
        let hello = hello(&two);
        let b = b.accept(two, hello, &config).unwrap();
        (a.join().unwrap(), b)
    });
    let again = request(&mut b);
    assert!(again.replay && again.cookie == token.number() && again.opcode == 9);
    let segment = b.segments(&again)[0];
    let mut bytes = [0; 64];
    b.slice(segment).unwrap().read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [33; 64]);
    b.complete(again, Status::default()).unwrap();
    assert_eq!(completion(&mut a).token, token);
    // Its next request has another number.
    let next = a.ask(0, 1, 1).unwrap();
    assert_ne!(next, token);
}

#[test]
fn regions_come_and_go_while_messages_flow() {
    let (mut a, mut b) = pair(&small(), &[], &[]);
    let pool = Pool::new(5, 3, 64, 8, Access::Owner).unwrap();
    a.add_pool(pool.clone()).unwrap();
    assert!(a.add_pool(pool.clone()).is_err());
    let (error, _) = a.request_one(Head::default(), parcel(&pool, 0, 8)).unwrap_err();
    assert_eq!(error, SendError::Pool(5), "not acknowledged yet");
    assert!(b.wait(soon()).unwrap());
    assert_eq!(b.regions().get(5).unwrap().generation(), 3);
    assert!(a.wait(soon()).unwrap());
    a.request_one(Head::default(), parcel(&pool, 0, 8)).unwrap();
    let got = request(&mut b);
    let segment = b.segments(&got)[0];
    assert!(b.slice(segment).is_some());
    assert!(a.remove_pool(5).unwrap());
    assert!(!a.remove_pool(5).unwrap());
    b.attend().unwrap();
    assert!(b.slice(segment).is_none());
    forge(&mut a, Desc { region: 5, generation: 3, len: 8, flags: flags::ONE_WAY, ..Desc::default() });
    assert_eq!(b.receive().unwrap_err(), Error::Violation(Violation::Region(5)));
}

#[test]
fn a_policy_shrinks_and_grows_the_ring_under_load() {
    let (mut a, mut b) = pair(&small(), &[], &[]);
    let ring = a.ring_use(0).unwrap();
    assert_eq!((ring.log2, ring.min_log2, ring.max_log2), (6, 4, 6));
    let (mut sent, mut got) = (0u64, 0u64);
    for round in 0..200 {
        let changed = a.resize(0, &mut Fixed([0, 5, 63, 5][round % 4])).unwrap();
        assert!(changed, "{round}: {:?}", a.ring_use(0));
        for _ in 0..(round % 30) {
            if a.send_words(0, 1, [sent, 0], 8).is_ok() {
                sent += 1;
            }
        }
        while let Some(message) = b.receive().unwrap() {
            let Incoming::OneWay(message) = message else { panic!() };
            assert_eq!(message.words[0], got);
            got += 1;
        }
    }
    assert_eq!(sent, got);
    assert_eq!(a.stats().resizes, 200);
    // A ring shrunk to the least still takes all completions and a whole message.
    a.resize(0, &mut Fixed(4)).unwrap();
    while b.ask(0, 1, 1).is_ok() {}
    while a.send(0, 1, b"x").is_ok() {}
    while let Some(message) = a.receive().unwrap() {
        let Incoming::Request(request) = message else { panic!() };
        a.complete(request, Status::default()).unwrap();
    }
}

/// Sleeping on both sides, every message of a ping-pong: a lost wake-up would end in the deadline.
#[test]
fn sleepers_are_woken() {
    for (event, spin) in
        [(0, Spin::Fixed(Duration::ZERO)), (1, Spin::Fixed(Duration::ZERO)), (0, Spin::default())]
    {
        let config = Config { features: event, ..small() };
        let (mut a, mut b) = pair(&config, &[], &[]);
        a.set_spin(spin);
        b.set_spin(spin);
        const ROUNDS: u64 = 2000;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    let got = loop {
                        match b.receive().unwrap() {
                            Some(Incoming::Request(request)) => break request,
                            _ => assert!(b.wait(soon()).unwrap(), "lost wake-up"),
                        }
                    };
                    b.complete(got, Status::default()).unwrap();
                    b.commit();
                }
            });
            for _ in 0..ROUNDS {
                a.ask(0, 1, 1).unwrap();
                loop {
                    match a.receive().unwrap() {
                        Some(Incoming::Completion(_)) => break,
                        _ => assert!(a.wait(soon()).unwrap(), "lost wake-up"),
                    }
                }
            }
        });
        assert!(a.stats().kicks <= ROUNDS + 1);
    }
}

/// A sender that fills the ring sleeps for room and is woken when there is some.
#[test]
fn a_sender_sleeps_for_room() {
    let (mut a, mut b) = pair(&small(), &[], &[]);
    a.set_spin(Spin::Fixed(Duration::ZERO));
    b.set_spin(Spin::Fixed(Duration::ZERO));
    const COUNT: u64 = 20_000;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut next = 0;
            while next < COUNT {
                match b.receive().unwrap() {
                    Some(Incoming::OneWay(message)) => {
                        assert_eq!(message.words[0], next);
                        next += 1;
                    }
                    _ => assert!(b.wait(soon()).unwrap(), "lost wake-up of the receiver"),
                }
            }
        });
        for n in 0..COUNT {
            while let Err(error) = a.send_words(0, 1, [n, 0], 8) {
                assert_eq!(error, SendError::Full);
                assert!(a.wait(soon()).unwrap(), "lost wake-up of the sender");
            }
        }
        a.commit();
    });
}

#[test]
fn one_thread_serves_many_channels() {
    let mut pairs: Vec<_> = (0..5).map(|_| pair(&small(), &[], &[])).collect();
    std::thread::scope(|scope| {
        let (mut clients, mut servers): (Vec<_>, Vec<_>) = pairs.iter_mut().map(|(a, b)| (a, b)).unzip();
        scope.spawn(move || {
            for round in 0..200 {
                let client = &mut clients[round % 5];
                client.ask(0, 1, 1).unwrap();
                while !matches!(client.receive().unwrap(), Some(Incoming::Completion(_))) {
                    assert!(client.wait(soon()).unwrap());
                }
            }
        });
        let mut served = 0;
        while served < 200 {
            let mut moved = false;
            for server in &mut servers {
                while let Some(Incoming::Request(request)) = server.receive().unwrap() {
                    server.complete(request, Status::default()).unwrap();
                    served += 1;
                    moved = true;
                }
                server.commit();
            }
            if !moved && served < 200 {
                assert!(wait_any(&mut servers, soon()).unwrap());
            }
        }
    });
}

#[test]
fn an_idle_channel_asks_for_nothing_and_its_memory_is_told() {
    let (mut a, b) = pair(&Config { deadline: Duration::from_secs(20), ..Config::default() }, &[], &[]);
    assert!(!a.wait(Some(Instant::now() + Duration::from_millis(5))).unwrap());
    assert_eq!((a.stats().kicks, b.stats().kicks), (0, 0));
    let lane = layout::lane(0, 10);
    assert_eq!(a.control.words()[lane.rx_event].load(Ordering::Relaxed), PARKED);
    assert!((32 << 10..256 << 10).contains(&a.memory_bytes()), "{}", a.memory_bytes());
}

#[test]
fn draining_and_saying_good_bye() {
    let (mut a, mut b) = pair(&small(), &[], &[]);
    a.drain().unwrap();
    assert!(b.wait(soon()).unwrap());
    assert_eq!(b.peer_state(), PeerState::Draining);
    a.close(7);
    assert_eq!(b.attend().unwrap(), Some(Event::Gone(Some(7))));
    assert_eq!(b.receive().unwrap_err(), Error::Gone);
}
