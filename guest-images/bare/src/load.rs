//! Random and sequential load at a given depth, with one result line each.

use crate::blk::{Disk, Error, Op, SECTOR};
use crate::config::{Config, LOADS};
use crate::histogram::Histogram;
use crate::runtime::println;
use crate::verify::random;

/// Runs the loads that were asked for; writing ones are skipped on a read-only disk.
pub fn run(disk: &mut Disk, config: &Config) -> Result<(), Error> {
    for (name, bit) in LOADS {
        if config.loads & bit == 0 {
            continue;
        }
        let op = if name.ends_with("write") { Op::Write } else { Op::Read };
        if op == Op::Write && disk.read_only() {
            println!("bench: {name} skipped, the disk is read-only");
            continue;
        }
        let is_random = name.starts_with("rand");
        let len = if is_random { config.block_bytes } else { config.seq_block_bytes };
        load(disk, config, name, op, is_random, len)?;
    }
    Ok(())
}

fn load(
    disk: &mut Disk,
    config: &Config,
    name: &str,
    op: Op,
    is_random: bool,
    len: usize,
) -> Result<(), Error> {
    let blocks = config.region_bytes.min(disk.len_bytes()) / len as u64;
    if blocks == 0 {
        return Err(Error::Device("it is smaller than one request"));
    }
    let clock = disk.clock;
    let mut histogram = Histogram::new();
    let mut state = config.seed;
    let mut next = 0;
    let mut lba = move || {
        let block = if is_random { random(&mut state) % blocks } else { next % blocks };
        next += 1;
        block * (len as u64 / SECTOR)
    };
    let kicks = disk.kicks();
    let mut done = 0u64;
    let started = clock.now();
    let end = started + clock.ticks(config.secs);
    for slot in 0..disk.depth() {
        disk.start(slot, op, lba(), len)?;
    }
    // Whatever has completed is taken and submitted again before the device is told once.
    while clock.now() < end {
        let mut completed = Some(disk.wait()?);
        while let Some(request) = completed {
            histogram.add(request.ticks);
            done += 1;
            disk.start(request.slot, op, lba(), len)?;
            completed = disk.poll()?;
        }
    }
    while disk.inflight() > 0 {
        let request = disk.wait()?;
        histogram.add(request.ticks);
        done += 1;
    }
    let secs = clock.secs(clock.now() - started);
    if op == Op::Write {
        disk.flush()?;
    }
    let us = |ticks| clock.micros(ticks);
    println!(
        "bench: rw={name} bs={len} qd={} secs={secs:.2} ios={done} iops={:.0} mib_s={:.1} \
         p50_us={:.1} p90_us={:.1} p99_us={:.1} p999_us={:.1} max_us={:.1} kicks={}",
        disk.depth(),
        done as f64 / secs,
        (done * len as u64) as f64 / secs / (1 << 20) as f64,
        us(histogram.quantile(500)),
        us(histogram.quantile(900)),
        us(histogram.quantile(990)),
        us(histogram.quantile(999)),
        us(histogram.max()),
        disk.kicks() - kicks,
    );
    Ok(())
}
