//! `msgq`, through its public interface: everything is checked, and the peer is looked after whether it sleeps.

use std::hint::{black_box, spin_loop};
use std::time::{Duration, Instant};

use msgq::handshake::{Config, Link, read_hello};
use msgq::region::{Access, Pool};
use msgq::spin::Spin;
use msgq::{Channel, Head, Incoming, SendError, Status};
use serde_json::json;

use crate::pair::{self, median, quantiles};
use crate::{Measurement, Sample};

pub const ALL: [Measurement; 20] = [
    ("msgq one way, batch 1", || stream(1)),
    ("msgq one way, batch 8", || stream(8)),
    ("msgq one way, batch 32", || stream(32)),
    ("msgq one way, batch 32, one thread", stream_alone),
    ("msgq round trip, one thread", trip_alone),
    ("msgq request + completion, batch 1", || requests(1, None)),
    ("msgq request + completion, batch 32", || requests(32, None)),
    ("msgq request of 64 B by reference, batch 32", || requests(32, Some(64))),
    ("msgq request of 4 KiB by reference, batch 32", || requests(32, Some(4096))),
    ("msgq request of 64 KiB by reference, batch 32", || requests(32, Some(65536))),
    ("msgq round trip, busy", busy),
    ("msgq round trip, busy, quantiles", busy_quantiles),
    ("eventfd round trip, blocking", crate::peers::eventfd_blocking),
    ("msgq round trip, blocking (pipe)", || blocking(0)),
    ("msgq round trip, blocking (eventfd)", || blocking(msgq::handshake::features::EVENT_BELL)),
    ("msgq round trip, 30 us gaps, adaptive", || gaps(Spin::default())),
    ("msgq round trip, 30 us gaps, no spin", || gaps(Spin::Fixed(Duration::ZERO))),
    ("msgq kicks per message, saturated", || kicks(false)),
    ("msgq kicks per message, peer polls", || kicks(true)),
    ("msgq idle, CPU us per second", idle),
];

fn config() -> Config {
    Config { deadline: Duration::from_secs(10), ..Config::default() }
}

fn accept(link: Link, config: &Config, pools: &[Pool]) -> Channel {
    let hello = read_hello(&link, Instant::now() + Duration::from_secs(10)).expect("hello");
    Channel::accept(link, hello, config, pools).expect("channel")
}

/// Both ends in two processes.
fn two<T>(config: Config, pools: &[Pool], here: impl FnOnce(Channel) -> T, there: impl FnOnce(Channel)) -> T {
    let (one, two) = Link::pair().expect("sockets");
    // Each side closes the other's end, or nobody would ever hang up.
    let ends = std::cell::RefCell::new((Some(one), Some(two)));
    pair::run(
        || {
            ends.borrow_mut().1 = None;
            let link = ends.borrow_mut().0.take().expect("once");
            here(Channel::connect(link, &config, pools).expect("channel"))
        },
        || {
            ends.borrow_mut().0 = None;
            let link = ends.borrow_mut().1.take().expect("once");
            there(accept(link, &config, &[]));
        },
    )
}

/// Both ends on this thread: what the instructions take, without a line that moves.
fn alone() -> (Channel, Channel) {
    let (one, two) = Link::pair().expect("sockets");
    pair::pin(pair::cpus().0);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| accept(two, &config(), &[]));
        (Channel::connect(one, &config(), &[]).expect("channel"), other.join().expect("the other end"))
    })
}

fn stream_alone() -> Sample {
    const COUNT: u64 = 3_000_000;
    let (mut one, mut two) = alone();
    let started = Instant::now();
    let mut n = 0;
    while n < COUNT {
        for _ in 0..32 {
            one.send_words(0, 1, [n, n ^ 5], 16).expect("room");
            n += 1;
        }
        one.commit();
        take(&mut two, 32);
    }
    (started.elapsed().as_nanos() as f64 / COUNT as f64).into()
}

fn trip_alone() -> Sample {
    const COUNT: u32 = 1_000_000;
    let (mut one, mut two) = alone();
    let started = Instant::now();
    for _ in 0..COUNT {
        one.ask(0, 1, 7).expect("room");
        one.commit();
        match two.receive() {
            Ok(Some(Incoming::Request(request))) => {
                let len = two.segments(&request).iter().map(|segment| segment.len).sum();
                two.complete(request, Status { len, ..Status::default() }).expect("room");
            }
            other => unreachable!("{other:?}"),
        }
        two.commit();
        assert!(matches!(one.receive(), Ok(Some(Incoming::Completion(_)))));
    }
    (started.elapsed().as_nanos() as f64 / f64::from(COUNT)).into()
}

/// Receives so many one-way messages, spinning.
fn take(channel: &mut Channel, count: u64) {
    let mut sum = 0u64;
    let mut got = 0;
    while got < count {
        match channel.receive().expect("message") {
            Some(Incoming::OneWay(message)) => {
                sum = sum.wrapping_add(message.words[0] ^ message.words[1]);
                got += 1;
            }
            Some(_) => unreachable!("only one-way messages"),
            None => spin_loop(),
        }
    }
    black_box(sum);
}

fn stream(batch: u64) -> Sample {
    let count = if batch == 1 { 2_000_000u64 } else { 6_000_000 };
    let send = move |mut channel: Channel| {
        // The other side is ready when it says so.
        take(&mut channel, 1);
        let started = Instant::now();
        let mut n = 0;
        while n < count {
            for _ in 0..batch {
                while let Err(error) = channel.send_words(0, 1, [n, n ^ 5], 16) {
                    assert_eq!(error, SendError::Full);
                    spin_loop();
                }
                n += 1;
            }
            channel.commit();
        }
        take(&mut channel, 1);
        started.elapsed().as_nanos() as f64 / count as f64
    };
    let receive = move |mut channel: Channel| {
        channel.send(0, 1, b"").expect("room");
        let count = count.div_ceil(batch) * batch;
        take(&mut channel, count);
        channel.send(0, 1, b"").expect("room");
        // Until the sender has seen it.
        while channel.receive().is_ok() {
            channel.wait(None).ok();
        }
    };
    two(config(), &[], send, receive).into()
}

/// Serves requests by completing them, until the peer is gone. Spins.
fn serve(mut channel: Channel) {
    loop {
        let mut moved = false;
        loop {
            match channel.receive() {
                Ok(Some(Incoming::Request(request))) => {
                    let len = channel.segments(&request).iter().map(|segment| segment.len).sum();
                    channel.complete(request, Status { len, ..Status::default() }).expect("room");
                    moved = true;
                }
                Ok(Some(_)) => unreachable!("only requests"),
                Ok(None) => break,
                Err(_) => return,
            }
        }
        if moved {
            channel.commit();
        } else if channel.link_quiet() {
            spin_loop();
        } else {
            while let Ok(Some(_)) = channel.attend() {}
        }
    }
}

trait Quiet {
    fn link_quiet(&mut self) -> bool;
}

impl Quiet for Channel {
    /// Whether the control socket need not be looked at: nearly always.
    fn link_quiet(&mut self) -> bool {
        use std::cell::Cell;
        thread_local!(static LOOKS: Cell<u32> = const { Cell::new(0) });
        LOOKS.with(|looks| {
            looks.set(looks.get().wrapping_add(1));
            looks.get() % 65536 != 0
        })
    }
}

fn requests(batch: u64, bytes: Option<usize>) -> Sample {
    let count = 1_000_000u64;
    let pool = bytes.map(|bytes| Pool::new(0, 1, bytes, 256, Access::Both).expect("pool"));
    let pools: Vec<Pool> = pool.iter().cloned().collect();
    let here = |mut channel: Channel| {
        let started = Instant::now();
        let (mut sent, mut done) = (0, 0);
        while done < count {
            let mut pushed = 0;
            while pushed < batch && sent < count && u64::from(channel.in_flight()) < 128 {
                let result = match (&pool, bytes) {
                    (Some(pool), Some(bytes)) => {
                        let Some(blank) = pool.blank().expect("pool") else { break };
                        let head = Head { opcode: 1, ..Head::default() };
                        channel.request_one(head, blank.freeze(0..bytes)).map_err(|(error, _)| error)
                    }
                    _ => channel.ask(0, 1, sent),
                };
                match result {
                    Ok(_) => {
                        sent += 1;
                        pushed += 1;
                    }
                    Err(SendError::Full | SendError::Window) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            channel.commit();
            while let Some(Incoming::Completion(_)) = channel.receive().expect("completion") {
                done += 1;
            }
        }
        started.elapsed().as_nanos() as f64 / count as f64
    };
    two(config(), &pools, here, serve).into()
}

fn one_trip(channel: &mut Channel) {
    channel.ask(0, 1, 7).expect("room");
    channel.commit();
    loop {
        match channel.receive().expect("completion") {
            Some(Incoming::Completion(_)) => return,
            _ => spin_loop(),
        }
    }
}

fn busy() -> Sample {
    const COUNT: u32 = 400_000;
    let here = |mut channel: Channel| {
        one_trip(&mut channel);
        let started = Instant::now();
        for _ in 0..COUNT {
            one_trip(&mut channel);
        }
        started.elapsed().as_nanos() as f64 / f64::from(COUNT)
    };
    two(config(), &[], here, serve).into()
}

fn busy_quantiles() -> Sample {
    let here = |mut channel: Channel| {
        one_trip(&mut channel);
        let times = (0..100_000).map(|_| {
            let started = Instant::now();
            one_trip(&mut channel);
            started.elapsed().as_nanos() as u32
        });
        quantiles(times.collect())
    };
    two(config(), &[], here, serve)
}

/// Serves requests, sleeping between them as `spin` says.
fn serve_sleeping(mut channel: Channel, spin: Spin) {
    channel.set_spin(spin);
    loop {
        match channel.receive() {
            Ok(Some(Incoming::Request(request))) => {
                channel.complete(request, Status::default()).expect("room");
                channel.commit();
            }
            Ok(_) => {
                channel.wait(None).expect("wait");
            }
            Err(_) => return,
        }
    }
}

fn sleeping_trip(channel: &mut Channel) {
    channel.ask(0, 1, 7).expect("room");
    channel.commit();
    loop {
        match channel.receive().expect("completion") {
            Some(Incoming::Completion(_)) => return,
            _ => {
                channel.wait(None).expect("wait");
            }
        }
    }
}

fn blocking(features: u64) -> Sample {
    let spin = Spin::Fixed(Duration::ZERO);
    let here = move |mut channel: Channel| {
        channel.set_spin(spin);
        (0..200).for_each(|_| sleeping_trip(&mut channel));
        let times = (0..5_000).map(|_| {
            let started = Instant::now();
            sleeping_trip(&mut channel);
            started.elapsed().as_nanos() as u32
        });
        median(times.collect())
    };
    two(Config { features, ..config() }, &[], here, move |channel| serve_sleeping(channel, spin))
}

/// Trips in a piece, whose mean is taken; the median of the pieces' means is the result: a mean shows every sleep, but one
/// moment in which the host ran something else would be all that the mean of everything shows.
const PIECE: usize = 500;

fn gaps(spin: Spin) -> Sample {
    let here = move |mut channel: Channel| {
        channel.set_spin(spin);
        let mut trip = || {
            let until = Instant::now() + Duration::from_micros(30);
            while Instant::now() < until {
                spin_loop();
            }
            let started = Instant::now();
            sleeping_trip(&mut channel);
            started.elapsed().as_nanos() as u32
        };
        for _ in 0..PIECE {
            trip();
        }
        let times: Vec<u32> = (0..10 * PIECE).map(|_| trip()).collect();
        let mut means: Vec<f64> = times
            .chunks(PIECE)
            .map(|piece| piece.iter().map(|&ns| f64::from(ns)).sum::<f64>() / PIECE as f64)
            .collect();
        means.sort_unstable_by(f64::total_cmp);
        let mut sample = quantiles(times);
        sample.more["mean"] = sample.value.into();
        sample.more["sleeps"] = channel.stats().sleeps.into();
        sample.value = means[means.len() / 2];
        sample
    };
    two(config(), &[], here, move |channel| serve_sleeping(channel, spin))
}

/// A stream in bursts of 32 to a receiver that sleeps when there is nothing, or polls.
fn kicks(polls: bool) -> Sample {
    let count = 3_000_000u64;
    let here = move |mut channel: Channel| {
        take(&mut channel, 1);
        let started = Instant::now();
        let mut n = 0;
        while n < count {
            for _ in 0..32 {
                while let Err(error) = channel.send_words(0, 1, [n, 0], 16) {
                    assert_eq!(error, SendError::Full);
                    channel.commit();
                    spin_loop();
                }
                n += 1;
            }
            channel.commit();
        }
        let kicks = channel.stats().kicks;
        take(&mut channel, 1);
        let ns = started.elapsed().as_nanos() as f64 / count as f64;
        Sample { value: kicks as f64 / count as f64, more: json!({ "ns_per_message": ns, "kicks": kicks }) }
    };
    let there = move |mut channel: Channel| {
        channel.set_spin(if polls { Spin::Always } else { Spin::default() });
        channel.send(0, 1, b"").expect("room");
        channel.commit();
        let mut got = 0;
        while got < count {
            match channel.receive().expect("message") {
                Some(_) => got += 1,
                None => drop(channel.wait(None).expect("wait")),
            }
        }
        channel.send(0, 1, b"").expect("room");
        channel.commit();
        while channel.receive().is_ok() {
            channel.wait(None).ok();
        }
    };
    two(config(), &[], here, there)
}

/// Both ends wait for a second: the processor time of this side, and what the channel takes.
fn idle() -> Sample {
    let here = |mut channel: Channel| {
        let before = cpu_us();
        channel.wait(Some(Instant::now() + Duration::from_secs(1))).expect("wait");
        Sample {
            value: cpu_us() - before,
            more: json!({ "memory_bytes": channel.memory_bytes(), "kicks": channel.stats().kicks }),
        }
    };
    two(config(), &[], here, |channel| serve_sleeping(channel, Spin::default()))
}

fn cpu_us() -> f64 {
    // SAFETY: plain data, filled by the call.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let us = |time: libc::timeval| time.tv_sec as f64 * 1e6 + time.tv_usec as f64;
    us(usage.ru_utime) + us(usage.ru_stime)
}
