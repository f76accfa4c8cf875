//! The parameter list of UNMAP (SBC-3 5.28).

/// Bytes of a parameter list with one descriptor.
pub const ONE_DESCRIPTOR_BYTES: usize = 24;

/// The parameter list that names one range.
pub fn one_descriptor(lba: u64, blocks: u32) -> [u8; ONE_DESCRIPTOR_BYTES] {
    let mut list = [0; ONE_DESCRIPTOR_BYTES];
    list[0..2].copy_from_slice(&22u16.to_be_bytes());
    list[2..4].copy_from_slice(&16u16.to_be_bytes());
    list[8..16].copy_from_slice(&lba.to_be_bytes());
    list[16..20].copy_from_slice(&blocks.to_be_bytes());
    list
}

#[cfg(test)]
mod tests {
    #[test]
    fn one_range() {
        let list = super::one_descriptor(0x0102_0304_0506_0708, 0x090A_0B0C);
        assert_eq!(list[..8], [0, 22, 0, 16, 0, 0, 0, 0]);
        assert_eq!(list[8..20], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        assert_eq!(list[20..], [0; 4]);
    }
}
