//! Data that tells where it belongs: every sector carries its number and a seed, so that a sector that was lost, stale
//! or misplaced is named.

use std::fmt;

/// Bytes of a virtio sector.
pub const SECTOR: usize = 512;

/// What is wrong with read data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Byte offset on the disk of the first wrong sector.
    pub offset: u64,
    /// Number of wrong sectors.
    pub sectors: usize,
    /// What was expected there.
    pub expected: u64,
    /// What the first eight bytes are.
    pub found: u64,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { offset, sectors, expected, found } = self;
        write!(
            f,
            "{sectors} wrong sectors from byte {offset}: expected {expected:#018x}, found {found:#018x}"
        )
    }
}

impl std::error::Error for Mismatch {}

/// Fills `buf` with the pattern of `seed` for the disk from byte `offset` (of a sector) on.
pub fn fill(seed: u64, offset: u64, buf: &mut [u8]) {
    for (n, sector) in buf.chunks_mut(SECTOR).enumerate() {
        let mut word = first(seed, offset / SECTOR as u64 + n as u64);
        for bytes in sector.chunks_mut(8) {
            bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
            word = mix(word);
        }
    }
}

/// Returns `len` bytes of pattern.
pub fn make(seed: u64, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0; len];
    fill(seed, offset, &mut buf);
    buf
}

/// Checks that `buf` is what [`fill`] makes.
pub fn check(seed: u64, offset: u64, buf: &[u8]) -> Result<(), Mismatch> {
    let mut wrong: Option<Mismatch> = None;
    let mut expected = [0; SECTOR];
    for (n, sector) in buf.chunks(SECTOR).enumerate() {
        let at = offset + (n * SECTOR) as u64;
        fill(seed, at, &mut expected);
        if sector != &expected[..sector.len()] {
            let head: [u8; 8] = sector[..8].try_into().unwrap_or_default();
            wrong
                .get_or_insert(Mismatch {
                    offset: at,
                    sectors: 0,
                    expected: first(seed, at / SECTOR as u64),
                    found: u64::from_le_bytes(head),
                })
                .sectors += 1;
        }
    }
    wrong.map_or(Ok(()), Err)
}

fn first(seed: u64, sector: u64) -> u64 {
    mix(seed.rotate_left(32) ^ sector ^ 0x9e37_79b9_7f4a_7c15)
}

/// The finalizer of splitmix64, a bijection.
pub fn mix(word: u64) -> u64 {
    let z = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_stale_and_misplaced_sectors_are_found() {
        let mut buf = make(7, 4096, 8 * SECTOR);
        assert_eq!(check(7, 4096, &buf), Ok(()));
        assert!(check(8, 4096, &buf).is_err());
        assert!(check(7, 4608, &buf).is_err());
        let stale = make(6, 4096 + 1024, SECTOR);
        buf[1024..1024 + SECTOR].copy_from_slice(&stale);
        buf[2048] ^= 1;
        let wrong = check(7, 4096, &buf).unwrap_err();
        assert_eq!((wrong.offset, wrong.sectors), (4096 + 1024, 2));
    }
}
