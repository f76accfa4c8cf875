//! A load that verifies itself while it runs: reads, writes and flushes at random places, many at once, each read compared
//! with what was last written there, and everything compared at the end. For backends that die and come back: a request
//! that is lost shows as one that never ends, one that is answered twice or not carried out shows as itself or as wrong
//! data. Prints each pause in which nothing was completed.

use crate::blk::{Disk, Done, Error, Op, SECTOR};
use crate::config::Config;
use crate::memory;
use crate::runtime::{key_pressed, println};
use crate::verify::{fill, random};

/// Nothing completed for so long is a pause, milliseconds. On a busy host the scheduler makes many shorter ones.
const PAUSE_MS: u64 = 20;
/// Completions between two looks at the keyboard and the disk's size.
const LOOK_EVERY: u64 = 256;
/// One request of so many is a flush.
const FLUSH_EVERY: u64 = 64;
/// What a buffer holds before it is read into.
const POISON: u8 = 0xa5;

/// What a slot is doing.
#[derive(Clone, Copy)]
struct Job {
    op: Op,
    block: u32,
}

struct Churn<'a> {
    disk: &'a mut Disk,
    seed: u64,
    len: usize,
    /// How often each block was written; the top bit is set while a request for it is under way.
    blocks: &'static mut [u32],
    jobs: &'static mut [Job],
    state: u64,
    /// Completed: reads, writes, flushes.
    done: [u64; 3],
    started: u64,
    last: u64,
    pauses: u64,
    longest: u64,
}

const BUSY: u32 = 1 << 31;

/// Runs until the time is over or somebody types something; an error is the first thing that was wrong.
pub fn run(disk: &mut Disk, config: &Config) -> Result<(), Error> {
    let len = config.block_bytes;
    let count = config.region_bytes.min(disk.len_bytes()) / len as u64;
    // Each slot finds a block that nobody else uses.
    let count = u32::try_from(count).unwrap_or(u32::MAX >> 1) & !BUSY;
    if disk.read_only() || count < 4 * u32::from(disk.depth()) {
        return Err(Error::Config("job=churn needs a writable disk and region= of four times qd= blocks"));
    }
    let take = |bytes: usize| memory::take(bytes).ok_or(Error::Memory).map(<[u8]>::as_mut_ptr);
    let blocks = take(count as usize * size_of::<u32>())?;
    // SAFETY: page aligned, long enough, zeroed, exclusively ours.
    let blocks = unsafe { core::slice::from_raw_parts_mut(blocks.cast::<u32>(), count as usize) };
    let depth = usize::from(disk.depth());
    let jobs = take(depth * size_of::<Job>())?.cast::<Job>();
    for slot in 0..depth {
        // SAFETY: page aligned and long enough; written before it is read.
        unsafe { jobs.add(slot).write(Job { op: Op::Flush, block: 0 }) };
    }
    // SAFETY: initialised above, exclusively ours.
    let jobs = unsafe { core::slice::from_raw_parts_mut(jobs, depth) };
    let now = disk.clock.now();
    let mut churn = Churn {
        disk,
        seed: config.seed,
        len,
        blocks,
        jobs,
        state: config.seed,
        done: [0; 3],
        started: now,
        last: now,
        pauses: 0,
        longest: 0,
    };
    churn.all(Op::Write)?;
    churn.started = churn.disk.clock.now();
    churn.last = churn.started;
    churn.done = [0; 3];
    println!("churn: {count} blocks of {len} bytes written");
    churn.at_random(config.secs)?;
    let secs = churn.disk.clock.secs(churn.disk.clock.now() - churn.started);
    let [reads, writes, flushes] = churn.done;
    let (pauses, longest) = (churn.pauses, churn.disk.clock.micros(churn.longest) / 1000.0);
    churn.all(Op::Read)?;
    // Nothing is in flight: whatever still comes was answered twice.
    if churn.disk.poll()?.is_some() {
        return Err(Error::Device("it completed a request twice"));
    }
    println!(
        "churn: ok, secs={secs:.2} ios={} reads={reads} writes={writes} flushes={flushes} pauses={pauses} \
         longest_ms={longest:.1}",
        reads + writes + flushes
    );
    Ok(())
}

impl Churn<'_> {
    /// Reads or writes every block once.
    fn all(&mut self, op: Op) -> Result<(), Error> {
        let mut fresh = 0..self.disk.depth();
        for block in 0..self.blocks.len() as u32 {
            let slot = match fresh.next() {
                Some(slot) => slot,
                None => self.next()?.slot,
            };
            self.start(slot, Job { op, block })?;
        }
        self.drain()
    }

    /// The load proper.
    fn at_random(&mut self, secs: u64) -> Result<(), Error> {
        let end = self.started + self.disk.clock.ticks(secs);
        for slot in 0..self.disk.depth() {
            let job = self.pick();
            self.start(slot, job)?;
        }
        let mut look = LOOK_EVERY;
        while self.disk.clock.now() < end {
            if self.done.iter().sum::<u64>() >= look {
                look += LOOK_EVERY;
                if key_pressed() {
                    break;
                }
                if let Some(sectors) = self.disk.capacity_change()? {
                    println!("churn: the disk has {sectors} sectors now");
                }
            }
            let mut completed = Some(self.next()?);
            while let Some(Done { slot, .. }) = completed {
                let job = self.pick();
                self.start(slot, job)?;
                completed = match self.disk.poll()? {
                    Some(done) => Some(self.completed(done)?),
                    None => None,
                };
            }
        }
        self.drain()
    }

    /// What to do next: something with a block that nobody else uses.
    fn pick(&mut self) -> Job {
        let dice = random(&mut self.state);
        let op = match dice >> 32 {
            d if d % FLUSH_EVERY == 0 && self.disk.has_flush() => Op::Flush,
            d if d & 64 == 0 => Op::Read,
            _ => Op::Write,
        };
        loop {
            let block = (random(&mut self.state) % self.blocks.len() as u64) as u32;
            if self.blocks[block as usize] & BUSY == 0 {
                return Job { op, block };
            }
        }
    }

    fn lba(&self, block: u32) -> u64 {
        u64::from(block) * (self.len as u64 / SECTOR)
    }

    fn start(&mut self, slot: u16, job: Job) -> Result<(), Error> {
        self.jobs[usize::from(slot)] = job;
        if job.op == Op::Flush {
            return self.disk.start(slot, Op::Flush, 0, 0);
        }
        let lba = self.lba(job.block);
        let generation = self.blocks[job.block as usize];
        self.blocks[job.block as usize] |= BUSY;
        let (seed, len) = (self.seed, self.len);
        let data = self.disk.data(slot, len);
        if job.op == Op::Write {
            for (n, sector) in data.chunks_exact_mut(SECTOR as usize).enumerate() {
                fill(sector, seed, lba + n as u64, u64::from(generation) + 1);
            }
        } else {
            data.fill(POISON);
        }
        self.disk.start(slot, job.op, lba, len)
    }

    /// Waits for a completion and takes it.
    fn next(&mut self) -> Result<Done, Error> {
        let done = self.disk.wait()?;
        self.completed(done)
    }

    fn drain(&mut self) -> Result<(), Error> {
        while self.disk.inflight() > 0 {
            self.next()?;
        }
        Ok(())
    }

    /// Checks what was completed.
    fn completed(&mut self, done: Done) -> Result<Done, Error> {
        self.pause();
        let Job { op, block } = self.jobs[usize::from(done.slot)];
        let at = block as usize;
        match op {
            Op::Flush => self.done[2] += 1,
            Op::Write => {
                self.done[1] += 1;
                self.blocks[at] = (self.blocks[at] & !BUSY) + 1;
            }
            _ => {
                self.done[0] += 1;
                self.blocks[at] &= !BUSY;
                self.compare(done.slot, block)?;
            }
        }
        Ok(done)
    }

    fn compare(&mut self, slot: u16, block: u32) -> Result<(), Error> {
        let (lba, generation) = (self.lba(block), u64::from(self.blocks[block as usize]));
        let mut expect = [0; SECTOR as usize];
        let (seed, len) = (self.seed, self.len);
        for (n, sector) in self.disk.data(slot, len).chunks_exact(SECTOR as usize).enumerate() {
            let lba = lba + n as u64;
            fill(&mut expect, seed, lba, generation);
            if let Some(byte) = (0..expect.len()).find(|i| expect[*i] != sector[*i]) {
                return Err(Error::Mismatch(lba, byte));
            }
        }
        Ok(())
    }

    /// Something was completed: how long was nothing?
    fn pause(&mut self) {
        let (now, clock) = (self.disk.clock.now(), self.disk.clock);
        let ticks = now.wrapping_sub(self.last);
        self.last = now;
        self.longest = self.longest.max(ticks);
        let ms = clock.micros(ticks) / 1000.0;
        if ms >= PAUSE_MS as f64 {
            self.pauses += 1;
            println!("churn: pause at_s={:.3} ms={ms:.1}", clock.secs(now - self.started));
            // Printing takes its time, too.
            self.last = clock.now();
        }
    }
}
