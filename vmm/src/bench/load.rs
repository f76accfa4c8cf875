//! Random and sequential load on one queue, with the latency of every request.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;

use super::args::Rw;
use super::disk::{LoadQueue, Op, sectors};
use super::pattern;

/// What to do on one queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub(super) rw: Rw,
    /// Bytes per request.
    pub(super) len: usize,
    /// First block of the queue's part of the disk, in units of `len`.
    pub(super) first: u64,
    /// Number of blocks of that part.
    pub(super) blocks: u64,
    /// How long the load lasts; completions in the first `warm_up` of it are not counted.
    pub(super) time: Duration,
    pub(super) warm_up: Duration,
    pub(super) seed: u64,
    /// Whether the device has a write cache to flush.
    pub(super) flush: bool,
}

/// What came of it.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) flushes: u64,
    /// Rounds of `verify` in which all was right.
    pub(super) rounds: u32,
    /// Latencies in nanoseconds.
    pub(super) latency: Histogram<u64>,
    /// Requests of the warm-up, which nothing else here knows of.
    pub(super) warm_up: u64,
    /// What was counted took this long, and ended then.
    pub(super) elapsed: Duration,
    pub(super) ended: Option<SystemTime>,
}

impl Outcome {
    pub(super) fn new() -> Result<Self> {
        // From 1 ns to a minute with three digits.
        let latency = Histogram::new_with_bounds(1, 60_000_000_000, 3).context("cannot make a histogram")?;
        let (elapsed, ended) = (Duration::ZERO, None);
        Ok(Self { reads: 0, writes: 0, flushes: 0, rounds: 0, latency, warm_up: 0, elapsed, ended })
    }

    pub(super) fn count(&mut self, op: Op, latency: Duration) {
        match op {
            Op::Read => self.reads += 1,
            Op::Write => self.writes += 1,
            Op::Flush => self.flushes += 1,
        }
        self.latency.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Adds what another queue did at the same time.
    pub(super) fn merge(&mut self, other: &Self) -> Result<()> {
        self.reads += other.reads;
        self.writes += other.writes;
        self.flushes += other.flushes;
        self.warm_up += other.warm_up;
        self.rounds = if self.elapsed.is_zero() { other.rounds } else { self.rounds.min(other.rounds) };
        self.elapsed = self.elapsed.max(other.elapsed);
        self.ended = self.ended.max(other.ended);
        self.latency.add(&other.latency).context("cannot add histograms")
    }
}

/// Keeps the queue full until the time is over. What completes in the warm-up is forgotten.
pub(super) fn run(queue: &mut impl LoadQueue, job: &Job) -> Result<Outcome> {
    let mut outcome = Outcome::new()?;
    if job.rw.writes() {
        let mut data = vec![0; job.len];
        for slot in 0..queue.depth() {
            pattern::fill(&mut data, job.seed, u64::from(slot), 1);
            queue.write_data(slot, &data);
        }
    }
    let mut state = job.seed;
    let mut next = 0;
    let per_block = sectors(job.len as u64);
    let mut sector = || {
        let n = if job.rw.is_random() { pattern::random(&mut state) } else { next } % job.blocks;
        next += 1;
        (job.first + n) * per_block
    };
    let (reads_percent, mut choice) = (job.rw.reads_percent(), !job.seed);
    let mut op = || match reads_percent {
        100 => Op::Read,
        0 => Op::Write,
        percent if pattern::random(&mut choice) % 100 < percent => Op::Read,
        _ => Op::Write,
    };
    let mut underway = vec![Op::Read; usize::from(queue.depth())];
    let started = Instant::now();
    for slot in 0..queue.depth() {
        underway[usize::from(slot)] = op();
        queue.submit(slot, underway[usize::from(slot)], sector(), job.len)?;
    }
    let mut counted_from = started;
    let mut warm = job.warm_up.is_zero();
    // Whatever is completed is taken and submitted anew; then the backend is told once.
    while !warm || counted_from.elapsed() < job.time {
        let mut done = Some(queue.wait()?);
        if !warm && started.elapsed() >= job.warm_up {
            (warm, counted_from) = (true, Instant::now());
            outcome = Outcome { warm_up: outcome.reads + outcome.writes, ..Outcome::new()? };
        }
        while let Some(request) = done {
            let kind = &mut underway[usize::from(request.slot)];
            outcome.count(*kind, request.latency);
            *kind = op();
            queue.submit(request.slot, *kind, sector(), job.len)?;
            done = queue.poll()?;
        }
    }
    while queue.inflight() > 0 {
        let request = queue.wait()?;
        outcome.count(underway[usize::from(request.slot)], request.latency);
    }
    (outcome.elapsed, outcome.ended) = (counted_from.elapsed(), Some(SystemTime::now()));
    if job.rw.writes() && job.flush {
        queue.flush()?;
        outcome.flushes += 1;
    }
    Ok(outcome)
}
