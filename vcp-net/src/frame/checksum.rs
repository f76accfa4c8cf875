//! The Internet checksum (RFC 1071).

/// Folds a sum to 16 bits.
#[must_use]
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The checksum of what was summed up.
#[must_use]
pub fn finish(sum: u64) -> u16 {
    !fold(sum)
}

/// As UDP has it: 0 means that there is none, so that a sum of 0 is written as its twin.
#[must_use]
pub fn finish_udp(sum: u64) -> u16 {
    match finish(sum) {
        0 => 0xffff,
        sum => sum,
    }
}

/// The sum of bytes, not folded; an odd one at the end is padded.
#[must_use]
pub fn sum(bytes: &[u8]) -> u64 {
    let pairs = bytes.chunks_exact(2);
    let odd = pairs.remainder().first().map_or(0, |&byte| u64::from(byte) << 8);
    pairs.map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u64>() + odd
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_rfc_1071() {
        let sum = sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(fold(sum), 0xddf2);
        assert_eq!(finish(sum), 0x220d);
        assert_eq!((finish_udp(0xffff), finish(0xffff)), (0xffff, 0));
    }
}
