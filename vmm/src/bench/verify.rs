//! Writes patterns, flushes, reads back and compares, round after round.
//!
//! The first round writes every block, each later one about half of them, in an order that jumps; then all blocks are
//! read, so that a write that went to the wrong place or was lost is seen in the round in which it happened.

use std::time::{Instant, SystemTime};

use anyhow::{Result, anyhow};

use super::disk::{LoadQueue, Op, sectors};
use super::load::{Job, Outcome};
use super::pattern;

/// The least number of rounds: one that writes everything, one that overwrites.
const MIN_ROUNDS: u32 = 2;

/// Verifies the queue's part of the disk until the time is over.
pub(super) fn run(queue: &mut impl LoadQueue, job: &Job) -> Result<Outcome> {
    let mut outcome = Outcome::new()?;
    let started = Instant::now();
    // What each block was last written with.
    let mut generations = vec![0u32; usize::try_from(job.blocks)?];
    let mut round = 0;
    while round < MIN_ROUNDS || started.elapsed() < job.time {
        round += 1;
        write_round(queue, job, round, &mut generations, &mut outcome)?;
        if job.flush {
            queue.flush()?;
            outcome.flushes += 1;
        }
        read_round(queue, job, &generations, &mut outcome)
            .map_err(|e| e.context(format!("round {round}")))?;
        outcome.rounds = round;
    }
    (outcome.elapsed, outcome.ended) = (started.elapsed(), Some(SystemTime::now()));
    Ok(outcome)
}

fn write_round(
    queue: &mut impl LoadQueue,
    job: &Job,
    round: u32,
    generations: &mut [u32],
    outcome: &mut Outcome,
) -> Result<()> {
    let mut data = vec![0; job.len];
    let mut free: Vec<u16> = (0..queue.depth()).collect();
    let mut state = job.seed ^ u64::from(round);
    for block in order(job.blocks, round) {
        if round > 1 && pattern::random(&mut state) & 1 == 0 {
            continue;
        }
        let slot = match free.pop() {
            Some(slot) => slot,
            None => {
                let done = queue.wait()?;
                outcome.count(Op::Write, done.latency);
                done.slot
            }
        };
        let sector = (job.first + block) * sectors(job.len as u64);
        pattern::fill(&mut data, job.seed, sector, round);
        queue.write_data(slot, &data);
        queue.submit(slot, Op::Write, sector, job.len)?;
        queue.notify()?;
        generations[block as usize] = round;
    }
    while queue.inflight() > 0 {
        let done = queue.wait()?;
        outcome.count(Op::Write, done.latency);
    }
    Ok(())
}

fn read_round<Q: LoadQueue>(
    queue: &mut Q,
    job: &Job,
    generations: &[u32],
    outcome: &mut Outcome,
) -> Result<()> {
    let mut data = vec![0; job.len];
    // What lies in a buffer before the read is not what should be read.
    let poison = vec![0xa5; job.len];
    let mut blocks = 0..job.blocks;
    let mut reading = vec![0; usize::from(queue.depth())];
    let mut start = |queue: &mut Q, slot: u16, reading: &mut [u64]| -> Result<()> {
        if let Some(block) = blocks.next() {
            reading[usize::from(slot)] = block;
            queue.write_data(slot, &poison);
            queue.submit(slot, Op::Read, (job.first + block) * sectors(job.len as u64), job.len)?;
        }
        Ok(())
    };
    for slot in 0..queue.depth() {
        start(queue, slot, &mut reading)?;
    }
    while queue.inflight() > 0 {
        let done = queue.wait()?;
        outcome.count(Op::Read, done.latency);
        let block = reading[usize::from(done.slot)];
        queue.read_data(done.slot, &mut data);
        let sector = (job.first + block) * sectors(job.len as u64);
        pattern::check(&data, job.seed, sector, generations[block as usize]).map_err(|e| anyhow!(e))?;
        start(queue, done.slot, &mut reading)?;
    }
    Ok(())
}

/// All numbers below `blocks` once: in order in the first round, then with jumps that differ from round to round.
fn order(blocks: u64, round: u32) -> impl Iterator<Item = u64> {
    let mut step = if round == 1 { 1 } else { (blocks / 3).wrapping_add(u64::from(round) * 7) % blocks };
    step = step.max(1);
    while gcd(step, blocks) != 1 {
        step += 1;
    }
    (0..blocks).map(move |n| (u128::from(n) * u128::from(step) % u128::from(blocks)) as u64)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_has_every_block_once() {
        for blocks in [1, 2, 3, 12, 1000] {
            for round in 1..9 {
                let mut all: Vec<u64> = order(blocks, round).collect();
                all.sort_unstable();
                assert_eq!(all, (0..blocks).collect::<Vec<_>>(), "{blocks} blocks, round {round}");
            }
        }
    }
}
