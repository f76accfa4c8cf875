//! A guest that computes, and does I/O beside it as a program with asynchronous requests would: a slice of computing, a look
//! at the ring, what has completed is submitted again, and on. How much of the computing is left says what the I/O costs the
//! guest; the work is counted alone first, with the device idle, and then with the load.

use core::hint::black_box;

use crate::blk::{Disk, Error, Op, SECTOR};
use crate::config::{Config, LOADS};
use crate::histogram::Histogram;
use crate::runtime::{Clock, key_pressed, println};
use crate::verify::random;

/// Steps between two looks at the clock: some microseconds.
const STEPS: u64 = 4096;

/// Work of which nothing can be left out: each step needs the one before.
struct Work {
    state: u64,
    steps: u64,
}

impl Work {
    /// Computes until `until`.
    fn run(&mut self, clock: Clock, until: u64) {
        while clock.now() < until {
            let mut x = self.state;
            for _ in 0..STEPS {
                x = black_box(
                    x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407),
                );
            }
            self.state = x;
            self.steps += STEPS;
        }
    }
}

/// Computes alone, then beside each load that was asked for, with a result line each.
pub fn run(disk: &mut Disk, config: &Config) -> Result<(), Error> {
    let clock = disk.clock;
    let mut work = Work { state: config.seed, steps: 0 };
    let rate = |steps: u64, ticks: u64| steps as f64 / clock.micros(ticks);
    println!("mixed: alone");
    let start = clock.now();
    work.run(clock, start + clock.ticks(config.secs));
    println!("mixed: rw=none secs={} mops={:.2}", config.secs, rate(work.steps, clock.now() - start));
    for (name, bit) in LOADS {
        let op = if name.ends_with("write") { Op::Write } else { Op::Read };
        if config.loads & bit == 0 || (op == Op::Write && disk.read_only()) {
            continue;
        }
        let is_random = name.starts_with("rand");
        let len = if is_random { config.block_bytes } else { config.seq_block_bytes };
        println!("mixed: with {name}");
        let (mut load, kicks) = (Load::new(disk, config, op, is_random, len)?, disk.kicks());
        let before = work.steps;
        let start = clock.now();
        let ticks = load.beside(disk, &mut work, start + clock.ticks(config.secs), config)?;
        let us = |ticks| clock.micros(ticks);
        println!(
            "mixed: rw={name} bs={len} qd={} secs={:.2} mops={:.2} ios={} iops={:.0} p50_us={:.1} p99_us={:.1} max_us={:.1} \
             kicks={}",
            disk.depth(),
            clock.secs(ticks),
            rate(work.steps - before, ticks),
            load.done,
            load.done as f64 / clock.secs(ticks),
            us(load.histogram.quantile(500)),
            us(load.histogram.quantile(990)),
            us(load.histogram.max()),
            disk.kicks() - kicks,
        );
        disk.wait_all()?;
        if op == Op::Write {
            disk.flush()?;
        }
    }
    // Whoever measures wants to look at the processes that serve us while they are there.
    while config.holds && !key_pressed() {
        work.run(clock, clock.now() + clock.ticks(1) / 50);
    }
    Ok(())
}

/// The requests beside the work.
struct Load {
    op: Op,
    is_random: bool,
    len: usize,
    blocks: u64,
    next: u64,
    state: u64,
    done: u64,
    histogram: Histogram,
}

impl Load {
    fn new(disk: &Disk, config: &Config, op: Op, is_random: bool, len: usize) -> Result<Self, Error> {
        let blocks = config.region_bytes.min(disk.len_bytes()) / len as u64;
        if blocks == 0 {
            return Err(Error::Device("it is smaller than one request"));
        }
        let (state, histogram) = (config.seed, Histogram::new());
        Ok(Self { op, is_random, len, blocks, next: 0, state, done: 0, histogram })
    }

    fn start(&mut self, disk: &mut Disk, slot: u16) -> Result<(), Error> {
        let block = if self.is_random { random(&mut self.state) } else { self.next } % self.blocks;
        self.next += 1;
        disk.start(slot, self.op, block * (self.len as u64 / SECTOR), self.len)
    }

    /// Runs until `end`; returns how long that took, in ticks. Requests are then still in flight.
    fn beside(&mut self, disk: &mut Disk, work: &mut Work, end: u64, config: &Config) -> Result<u64, Error> {
        let clock = disk.clock;
        let start = clock.now();
        let slice = clock.ticks(1) / 1_000_000 * config.slice_us;
        for slot in 0..disk.depth() {
            self.start(disk, slot)?;
        }
        disk.kick();
        let mut last = start;
        loop {
            let now = clock.now();
            if now >= end {
                return Ok(now - start);
            }
            work.run(clock, now + slice);
            let before = self.done;
            while let Some(request) = disk.poll()? {
                self.histogram.add(request.ticks);
                self.done += 1;
                self.start(disk, request.slot)?;
            }
            if self.done > before {
                last = clock.now();
                disk.kick();
            } else if clock.now() - last > clock.ticks(config.timeout_secs) {
                return Err(Error::Timeout(config.timeout_secs, disk.inflight()));
            }
        }
    }
}
