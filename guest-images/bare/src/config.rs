//! The kernel command line.

use crate::blk::Error;
use crate::runtime::println;

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Job {
    /// Only print what the disks are.
    Identify,
    /// Write, flush, read back and compare.
    Verify,
    /// Measure.
    Bench,
    /// Write, flush, read back and compare, and measure.
    All,
    /// Read, write and compare at random for a while.
    Churn,
    /// Compute, alone and beside loads.
    Mixed,
}

/// The loads of `bench`, as bits.
pub const LOADS: [(&str, u8); 4] = [("randread", 1), ("randwrite", 2), ("read", 4), ("write", 8)];

/// The values of the command line, checked.
#[derive(Clone, Copy)]
pub struct Config {
    /// What to do.
    pub job: Job,
    /// Which loads, bits of [`LOADS`].
    pub loads: u8,
    /// Requests in flight.
    pub depth: u16,
    /// Bytes per random request.
    pub block_bytes: usize,
    /// Bytes per sequential request.
    pub seq_block_bytes: usize,
    /// Length of a load in seconds.
    pub secs: u64,
    /// Bytes of the disk to use, at most.
    pub region_bytes: u64,
    /// Seed of pattern and addresses.
    pub seed: u64,
    /// Whether indirect descriptors may be used.
    pub indirect: bool,
    /// Seconds without a completion after which a load gives up.
    pub timeout_secs: u64,
    /// Microseconds of computing between two looks at the ring.
    pub slice_us: u64,
    /// Whether the guest goes on until a key is pressed when it is done.
    pub holds: bool,
}

impl Config {
    /// Parses the command line. Words that are not for this guest (`console=ttyS0`) are named and left alone.
    pub fn parse(line: &[u8]) -> Result<Self, Error> {
        let mut config = Self {
            job: Job::All,
            loads: 15,
            depth: 32,
            block_bytes: 4096,
            seq_block_bytes: 128 << 10,
            secs: 2,
            region_bytes: 64 << 20,
            seed: 1,
            indirect: true,
            timeout_secs: 10,
            slice_us: 50,
            holds: false,
        };
        let line = core::str::from_utf8(line).map_err(|_| Error::Config("the command line is not UTF-8"))?;
        for word in line.trim_end_matches('\0').split_ascii_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match key {
                "job" => config.job = job(value)?,
                "rw" => config.loads = loads(value)?,
                "qd" => config.depth = number(value, 1, 1024)? as u16,
                "bs" => config.block_bytes = number(value, 512, 1 << 20)? as usize,
                "seqbs" => config.seq_block_bytes = number(value, 512, 1 << 20)? as usize,
                "secs" => config.secs = number(value, 1, 3600)?,
                "region" => config.region_bytes = number(value, 1 << 20, u64::MAX)?,
                "seed" => config.seed = number(value, 0, u64::MAX)?,
                "indirect" => config.indirect = number(value, 0, 1)? == 1,
                "timeout" => config.timeout_secs = number(value, 1, 3600)?,
                "slice" => config.slice_us = number(value, 1, 100_000)?,
                "hold" => config.holds = number(value, 0, 1)? == 1,
                _ => println!("guest: {word}: not for this guest"),
            }
        }
        if !config.block_bytes.is_multiple_of(512) || !config.seq_block_bytes.is_multiple_of(512) {
            return Err(Error::Config("bs= and seqbs= are multiples of 512"));
        }
        Ok(config)
    }
}

fn job(value: &str) -> Result<Job, Error> {
    match value {
        "identify" => Ok(Job::Identify),
        "verify" => Ok(Job::Verify),
        "bench" => Ok(Job::Bench),
        "all" => Ok(Job::All),
        "churn" => Ok(Job::Churn),
        "mixed" => Ok(Job::Mixed),
        _ => Err(Error::Config("job= is identify, verify, bench, all, churn or mixed")),
    }
}

fn loads(value: &str) -> Result<u8, Error> {
    value.split(',').try_fold(0, |bits, name| {
        let load = LOADS.iter().find(|(n, _)| *n == name);
        load.map(|(_, bit)| bits | bit).ok_or(Error::Config("rw= is randread, randwrite, read, write"))
    })
}

/// Parses a number with an optional K, M or G (powers of 1024).
fn number(value: &str, min: u64, max: u64) -> Result<u64, Error> {
    let (digits, shift) = match value.as_bytes().last() {
        Some(b'K' | b'k') => (&value[..value.len() - 1], 10),
        Some(b'M' | b'm') => (&value[..value.len() - 1], 20),
        Some(b'G' | b'g') => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    let number = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    number
        .filter(|n| (min..=max).contains(n))
        .ok_or(Error::Config("a number on the command line is out of range"))
}
