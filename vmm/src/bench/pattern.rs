//! Data that tells where and when it was written: every sector holds seed, address and generation in its first 24
//! bytes and random words that follow from them in the rest, so that a lost, torn, stale or misplaced write is seen
//! and named.

/// Bytes in a sector.
pub(super) const SECTOR: usize = 512;

/// Fills `data`, whose first sector is `lba`.
pub(super) fn fill(data: &mut [u8], seed: u64, lba: u64, generation: u32) {
    for (n, sector) in data.chunks_exact_mut(SECTOR).enumerate() {
        let words = words(seed, lba + n as u64, generation);
        for (bytes, word) in sector.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// Compares `data`, whose first sector is `lba`, with what was written; the error says what is wrong, and where.
pub(super) fn check(data: &[u8], seed: u64, lba: u64, generation: u32) -> Result<(), String> {
    for (n, sector) in data.chunks_exact(SECTOR).enumerate() {
        let lba = lba + n as u64;
        let words = words(seed, lba, generation);
        let wrong = sector.chunks_exact(8).zip(words).position(|(bytes, word)| *bytes != word.to_le_bytes());
        if let Some(at) = wrong {
            return Err(explain(sector, seed, lba, generation, at));
        }
    }
    Ok(())
}

fn explain(sector: &[u8], seed: u64, lba: u64, generation: u32, at: usize) -> String {
    let word = |n: usize| {
        sector.chunks_exact(8).nth(n).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
    };
    let found = if sector.iter().all(|b| *b == 0) {
        "zeroes".to_owned()
    } else if word(0) == seed && word(1) == lba && word(2) < u64::from(generation) {
        format!("generation {}: a write was lost", word(2))
    } else if word(0) == seed && word(1) != lba && at < 3 {
        format!("the data of sector {}: it was misplaced", word(1))
    } else if at >= 3 {
        "a mix of two writes or damaged data".to_owned()
    } else {
        "data that was never written".to_owned()
    };
    format!("wrong data at sector {lba}, byte {}: expected generation {generation}, found {found}", at * 8)
}

fn words(seed: u64, lba: u64, generation: u32) -> impl Iterator<Item = u64> {
    let mut state = seed ^ lba.rotate_left(20) ^ (u64::from(generation) << 40);
    [seed, lba, u64::from(generation)].into_iter().chain(std::iter::repeat_with(move || random(&mut state)))
}

/// The splitmix64 generator: the next number after `state`.
pub(super) fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_is_right_and_any_flipped_bit_is_wrong() {
        let mut data = vec![0; 4 * SECTOR];
        fill(&mut data, 9, 1000, 3);
        check(&data, 9, 1000, 3).unwrap();
        for at in [0, 9, 23, 24, SECTOR, 4 * SECTOR - 1] {
            data[at] ^= 1;
            check(&data, 9, 1000, 3).unwrap_err();
            data[at] ^= 1;
        }
    }

    #[test]
    fn errors_name_the_cause() {
        let mut data = vec![0; SECTOR];
        assert!(check(&data, 9, 5, 2).unwrap_err().ends_with("found zeroes"));
        fill(&mut data, 9, 5, 1);
        let lost = check(&data, 9, 5, 2).unwrap_err();
        assert!(lost.ends_with("expected generation 2, found generation 1: a write was lost"), "{lost}");
        fill(&mut data, 9, 77, 2);
        assert!(check(&data, 9, 5, 2).unwrap_err().contains("the data of sector 77"));
        fill(&mut data, 9, 5, 2);
        data[SECTOR / 2..].fill(0);
        assert!(check(&data, 9, 5, 2).unwrap_err().contains("a mix of two writes"));
    }
}
