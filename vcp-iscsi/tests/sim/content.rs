//! What the blocks hold: each says which write it is of, and where it belongs.

use super::rng::mix;

/// Bytes of a logical block.
pub const BLOCK: usize = 512;
/// Bytes of a part of a block.
const PART: usize = 64;

/// Marks memory that nobody may have written to.
const POISON: u64 = 0xdead_beef_0bad_f00d;

/// What a block looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Zeroes throughout.
    Zero,
    /// Block of that write, whole and in its place.
    Write(u32),
    /// None of these: the first word.
    Garbage(u64),
}

/// The block at `lba` as `write` has it; `write` is not 0. Each part of it says where in the block it belongs.
pub fn fill(write: u32, lba: u64, out: &mut [u8]) {
    let name = (u64::from(write) << 32 | lba).to_be_bytes();
    let mut part = [0; PART];
    for (n, word) in part.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&mix(u64::from_be_bytes(name) ^ n as u64).to_le_bytes());
    }
    for (n, chunk) in out.chunks_exact_mut(PART).enumerate() {
        chunk.copy_from_slice(&part);
        chunk[8] = n as u8;
    }
    out[..8].copy_from_slice(&name);
}

/// The write and block that the first bytes claim to be.
pub fn claim(block: &[u8]) -> (u32, u64) {
    let first = u64::from_be_bytes(block[..8].try_into().unwrap_or_default());
    ((first >> 32) as u32, first & 0xffff_ffff)
}

pub fn look(lba: u64, block: &[u8]) -> Seen {
    let (write, at) = claim(block);
    if *block == [0; BLOCK] {
        return Seen::Zero;
    }
    let mut right = [0; BLOCK];
    fill(write, at, &mut right);
    if at == lba && write != 0 && *block == right {
        Seen::Write(write)
    } else {
        Seen::Garbage(u64::from(write) << 32 | at)
    }
}

fn pattern(n: u64) -> [u8; BLOCK] {
    let word = (POISON ^ mix(n)).to_le_bytes();
    let mut pattern = [0; BLOCK];
    pattern.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&word));
    pattern
}

/// Fills memory that must stay as it is; `n` tells apart one time from the next.
pub fn poison(n: u64, out: &mut [u8]) {
    let pattern = pattern(n);
    out.chunks_mut(BLOCK).for_each(|chunk| chunk.copy_from_slice(&pattern[..chunk.len()]));
}

/// Where memory is no longer as [`poison`] left it.
pub fn touched(n: u64, memory: &[u8]) -> Option<usize> {
    let pattern = pattern(n);
    memory.chunks(BLOCK).position(|chunk| *chunk != pattern[..chunk.len()]).map(|at| at * BLOCK)
}
