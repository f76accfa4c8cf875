//! Writes a pattern that is different for each sector and each time, flushes, reads it back with other request sizes
//! and compares every byte; then overwrites a part out of order and compares again.

use crate::blk::{Disk, Error, Op, SECTOR};
use crate::config::Config;
use crate::runtime::println;

/// Verifies a region at the start of the disk.
pub fn run(disk: &mut Disk, config: &Config) -> Result<(), Error> {
    if disk.read_only() {
        println!("verify: skipped, the disk is read-only");
        return Ok(());
    }
    // What is overwritten is a third of the groups; the region has whole requests of either size.
    let group = config.block_bytes.min(config.seq_block_bytes);
    let sectors = group as u64 / SECTOR;
    let unit = (config.seq_block_bytes * config.block_bytes / gcd(config.seq_block_bytes, config.block_bytes))
        as u64;
    let region = config.region_bytes.min(disk.len_bytes()) / unit * unit;
    if region == 0 {
        return Err(Error::Device("it is smaller than one request of seqbs= bytes"));
    }
    let started = disk.clock.now();
    let generation = |first: bool, lba: u64| if !first && lba / sectors % 3 == 1 { 2 } else { 1 };

    write(disk, config, region, config.seq_block_bytes, |_| true, 1)?;
    disk.flush()?;
    read(disk, config, region, config.block_bytes, |lba| generation(true, lba))?;
    // Every third group again, with another pattern: neighbours must stay as they are.
    write(disk, config, region, group, |lba| lba / sectors % 3 == 1, 2)?;
    disk.flush()?;
    read(disk, config, region, config.seq_block_bytes, |lba| generation(false, lba))?;
    let secs = disk.clock.secs(disk.clock.now() - started);
    println!(
        "verify: ok, {} MiB written, flushed, read back and compared twice in {secs:.2} s",
        region >> 20
    );
    Ok(())
}

fn write(
    disk: &mut Disk,
    config: &Config,
    region: u64,
    len: usize,
    wanted: impl Fn(u64) -> bool,
    generation: u64,
) -> Result<(), Error> {
    let mut next = 0;
    let mut free = 0;
    while next < region {
        let lba = next / SECTOR;
        next += len as u64;
        if !wanted(lba) {
            continue;
        }
        // The first slots are fresh; then each completion gives one back.
        let slot = if free < disk.depth() {
            free += 1;
            free - 1
        } else {
            disk.wait()?.slot
        };
        for (n, sector) in disk.data(slot, len).chunks_exact_mut(SECTOR as usize).enumerate() {
            fill(sector, config.seed, lba + n as u64, generation);
        }
        disk.start(slot, Op::Write, lba, len)?;
        disk.kick();
    }
    disk.wait_all()
}

fn read(
    disk: &mut Disk,
    config: &Config,
    region: u64,
    len: usize,
    generation: impl Fn(u64) -> u64,
) -> Result<(), Error> {
    let depth = u64::from(disk.depth());
    let blocks = region / len as u64;
    let mut expect = [0; SECTOR as usize];
    let mut first = 0;
    while first < blocks {
        let batch = depth.min(blocks - first);
        for slot in 0..batch {
            let lba = (first + slot) * len as u64 / SECTOR;
            // What is in the buffer is not what should be read.
            disk.data(slot as u16, len).fill(0xa5);
            disk.start(slot as u16, Op::Read, lba, len)?;
        }
        disk.kick();
        disk.wait_all()?;
        for slot in 0..batch {
            let lba = (first + slot) * len as u64 / SECTOR;
            for (n, sector) in disk.data(slot as u16, len).chunks_exact(SECTOR as usize).enumerate() {
                let lba = lba + n as u64;
                fill(&mut expect, config.seed, lba, generation(lba));
                if let Some(byte) = (0..expect.len()).find(|i| expect[*i] != sector[*i]) {
                    return Err(Error::Mismatch(lba, byte));
                }
            }
        }
        first += batch;
    }
    Ok(())
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Fills a sector from seed, address and generation.
pub fn fill(sector: &mut [u8], seed: u64, lba: u64, generation: u64) {
    let mut state =
        seed ^ lba.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ generation.wrapping_mul(0xd6e8_feb8_6659_fd93);
    for word in sector.chunks_exact_mut(8) {
        word.copy_from_slice(&random(&mut state).to_le_bytes());
    }
}

/// The splitmix64 generator.
pub fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
