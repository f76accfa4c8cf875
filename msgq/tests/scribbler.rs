//! A peer that writes random words over all that it may write to, while messages flow in both directions: the other side
//! ends with an error of that channel, or goes on; it never panics, hangs, or reads outside. And it serves a second, honest
//! channel all the while.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use msgq::handshake::{Config, Link, read_hello};
use msgq::region::{Access, Pool};
use msgq::ring::Words;
use msgq::{Channel, Error, Head, Incoming, SendError, Status};

fn pair(config: &Config, pools: &[Pool]) -> (Channel, Channel) {
    let (one, two) = Link::pair().unwrap();
    std::thread::scope(|scope| {
        let there = scope.spawn(|| Channel::connect(one, config, pools).unwrap());
        let hello = read_hello(&two, Instant::now() + Duration::from_secs(30)).unwrap();
        let here = Channel::accept(two, hello, config, pools).unwrap();
        (here, there.join().unwrap())
    })
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 ^ self.0 >> 29
    }
}

/// One pass over everything that can be done with a channel; what went wrong with it.
fn turn(channel: &mut Channel, pool: &Pool) -> Result<u64, Error> {
    let mut moved = 0;
    for _ in 0..64 {
        match channel.receive()? {
            Some(Incoming::Request(request)) => {
                for segment in channel.segments(&request).to_vec() {
                    let mut byte = [0];
                    let slice = channel.slice(segment).expect("a checked segment has memory");
                    slice.read(slice.len() - 1, &mut byte).expect("its last byte is inside");
                }
                match channel.complete(request, Status::default()) {
                    Err(SendError::Channel(error)) => return Err(error),
                    _ => moved += 1,
                }
            }
            Some(Incoming::OneWay(message)) => {
                for segment in channel.data(&message) {
                    assert!(channel.slice(*segment).is_some());
                }
                moved += 1;
            }
            Some(Incoming::Completion(done)) => {
                let _ = channel.read_back(&done, 0, 0, &mut [0; 16]);
                moved += 1;
            }
            None => break,
        }
    }
    if let Ok(Some(blank)) = pool.blank()
        && let Err((SendError::Channel(error), _)) = channel.request_one(Head::default(), blank.freeze(0..64))
    {
        return Err(error);
    }
    if let Err(SendError::Channel(error)) = channel.send(0, 1, b"hello") {
        return Err(error);
    }
    channel.arm()?;
    channel.disarm();
    Ok(moved)
}

#[test]
fn random_words_everywhere_cost_only_that_channel() {
    let config = Config { log2_slots: 6, window: 16, deadline: Duration::from_secs(30), ..Config::default() };
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let rounds = number("MSGQ_ROUNDS").unwrap_or(300);
    let mut random = Random(number("MSGQ_SEED").unwrap_or(7));
    let (mut violations, mut survived) = ([0u64; 12], 0);
    let shared = Pool::new(0, 1, 4096, 64, Access::Both).unwrap();
    let (mut honest, mut friend) = pair(&config, std::slice::from_ref(&shared));
    let mut honest_moved = 0;
    for round in 0..rounds {
        let pool = Pool::new(0, 1, 4096, 64, Access::Both).unwrap();
        let (mut victim, mut hostile) = pair(&config, std::slice::from_ref(&pool));
        let memory = hostile.control_words();
        let stop = AtomicBool::new(false);
        let seed = random.next();
        let over = std::thread::scope(|scope| {
            let (stop, memory, pool) = (&stop, &memory, &pool);
            scope.spawn(move || {
                let mut random = Random(seed);
                let words = memory.words();
                // Some rounds scribble everywhere, some only over slots, or over heads and wishes.
                let range = match round % 3 {
                    0 => 0..words.len(),
                    1 => 512..words.len(),
                    _ => 16..64,
                };
                while !stop.load(Ordering::Relaxed) {
                    let at = range.start + random.next() as usize % (range.end - range.start);
                    let word = match random.next() % 4 {
                        0 => random.next(),
                        1 => random.next() % 64,
                        // A whole slot that may be the next one, with fields that are nearly right.
                        2 if range.end > 512 => {
                            let slot = random.next() % 64;
                            let first = 512 + slot as usize * 4;
                            let turn = random.next() % 64;
                            words[first].store(random.next() % 20, Ordering::Relaxed);
                            words[first + 1].store(random.next() % 300_000, Ordering::Relaxed);
                            let flags = random.next() % 40;
                            let fields = (random.next() % 2) | (flags << 32) | ((random.next() % 3) << 48);
                            words[first + 2].store(fields, Ordering::Relaxed);
                            let last = ((slot + 1 + turn * 64) << 32) | (random.next() % 5000);
                            words[first + 3].store(last, Ordering::Release);
                            continue;
                        }
                        _ => words[at].load(Ordering::Relaxed) ^ 1 << (random.next() % 64),
                    };
                    words[at].store(word, Ordering::Release);
                    // And does what an honest peer does, so that there is something to spoil.
                    if random.next().is_multiple_of(8) {
                        let _ = hostile.ask(0, 1, 1);
                        let _ = hostile.send(0, 1, b"x");
                        let _ = hostile.receive();
                        hostile.commit();
                    }
                }
                drop(hostile);
            });
            let end = Instant::now() + Duration::from_millis(20);
            let over = loop {
                match turn(&mut victim, pool) {
                    Err(error) => break Some(error),
                    Ok(_) if Instant::now() > end => break None,
                    Ok(_) => {}
                }
                for side in [&mut honest, &mut friend] {
                    honest_moved += turn(side, &shared).expect("the honest channel goes on");
                }
            };
            stop.store(true, Ordering::Relaxed);
            over
        });
        match over {
            Some(Error::Violation(violation)) => violations[violation.rule()] += 1,
            Some(error) => panic!("{error}"),
            None => survived += 1,
        }
    }
    println!("violations by rule: {violations:?}, {survived} rounds without; {honest_moved} honest messages");
    assert!(violations.iter().filter(|count| **count > 0).count() >= 3, "{violations:?}");
    assert!(honest_moved > 10_000, "{honest_moved}");
}
