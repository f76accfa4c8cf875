//! Both ends of a msgq channel against a peer that writes anything into the memory it owns: slots, heads, wishes. Only
//! errors of the channel may come of it.

#![no_main]

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use msgq::handshake::{Config, Link, read_hello};
use msgq::layout::{Desc, lane};
use msgq::region::{Access, Pool};
use msgq::ring::Words;
use msgq::{Channel, Head, Incoming, Status};

const LOG2: u8 = 4;

fn pair() -> (Channel, Channel, Pool) {
    // Long, for a machine that has other things to do: setting up is not what is tried here.
    let deadline = Duration::from_secs(60);
    let config = Config { log2_slots: LOG2, window: 4, chain_max: 3, deadline, ..Config::default() };
    let pool = Pool::new(0, 1, 256, 4, Access::Both).expect("pool");
    let (one, two) = Link::pair().expect("sockets");
    let pools = [pool.clone()];
    let hostile = std::thread::scope(|scope| {
        let there = scope.spawn(|| Channel::connect(one, &config, &pools).expect("channel"));
        let hello = read_hello(&two, Instant::now() + deadline).expect("hello");
        let here = Channel::accept(two, hello, &config, &pools).expect("channel");
        (here, there.join().expect("no panic"))
    });
    (hostile.0, hostile.1, pool)
}

fuzz_target!(|data: &[u8]| {
    let (mut channel, mut peer, pool) = pair();
    // The hostile side writes its own memory as it likes.
    let memory = peer.control_words();
    let words = memory.words();
    let lane = lane(0, LOG2);
    let mut held = Vec::new();
    let mut number = 0u64;
    let mut rest = data;
    while let Some((&op, after)) = rest.split_first() {
        rest = after;
        let mut take = |count: usize| {
            let (now, later) = rest.split_at(count.min(rest.len()));
            rest = later;
            let mut bytes = [0; 8];
            bytes[..now.len()].copy_from_slice(now);
            u64::from_le_bytes(bytes)
        };
        match op % 8 {
            // A slot under the right tag, all else as it comes.
            0..=2 => {
                let desc = Desc {
                    cookie: take(2),
                    value: take(3),
                    region: take(1) as u16 % 3,
                    opcode: take(1) as u16,
                    flags: take(1) as u16 % 64,
                    generation: take(1) as u16 % 3,
                    len: take(2) as u32,
                };
                let at = lane.slots + (number % (1 << LOG2)) as usize * 4;
                for (word, value) in desc.to_words(msgq::layout::tag(number)).into_iter().enumerate() {
                    words[at + word].store(value, Ordering::Release);
                }
                number += 1;
            }
            3 => words[lane.head].store(take(1), Ordering::Release),
            4 => words[lane.rx_event + (take(1) % 2) as usize].store(take(8), Ordering::Release),
            5 => {
                let at = take(2) as usize % words.len();
                words[at].store(take(8), Ordering::Release);
            }
            6 => {
                let _ = channel.ask(0, 1, take(1));
                if let Ok(Some(blank)) = pool.blank() {
                    let _ = channel.request_one(Head::default(), blank.freeze(0..8));
                }
                let _ = channel.send(0, 1, b"x");
                channel.commit();
            }
            _ => {
                let _ = channel.arm();
                channel.disarm();
                if let Some(request) = held.pop() {
                    let _ = channel.complete(request, Status::default());
                }
            }
        }
        for _ in 0..40 {
            match channel.receive() {
                Ok(Some(Incoming::Request(request))) => {
                    for segment in channel.segments(&request).to_vec() {
                        let slice = channel.slice(segment).expect("it was checked");
                        let mut byte = [0];
                        slice.read(slice.len() - 1, &mut byte).expect("inside");
                    }
                    held.push(request);
                }
                Ok(Some(Incoming::OneWay(message))) => {
                    for segment in channel.data(&message).to_vec() {
                        assert!(channel.slice(segment).is_some());
                    }
                }
                Ok(Some(Incoming::Completion(done))) => {
                    let _ = channel.read_back(&done, 0, 0, &mut [0; 8]);
                }
                Ok(None) | Err(_) => break,
            }
        }
    }
    let _ = peer.receive();
});
