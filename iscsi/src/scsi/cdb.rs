//! Command descriptor blocks for what an initiator of a disk sends (SPC-4, SBC-3).

use super::opcode as op;

/// A command descriptor block of up to 16 bytes, zero-padded as iSCSI carries it (RFC 7143 11.3.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cdb(pub [u8; 16]);

impl Cdb {
    fn build(opcode: u8, fill: impl FnOnce(&mut [u8; 16])) -> Self {
        let mut bytes = [0; 16];
        bytes[0] = opcode;
        fill(&mut bytes);
        Self(bytes)
    }

    /// The operation code.
    pub fn opcode(&self) -> u8 {
        self.0[0]
    }

    /// The operation in words.
    pub fn name(&self) -> &'static str {
        match (self.0[0], self.0[1] & 0x1F) {
            (op::SERVICE_ACTION_IN_16, op::SA_READ_CAPACITY_16) => "READ CAPACITY(16)",
            (op::SERVICE_ACTION_IN_16, op::SA_GET_LBA_STATUS) => "GET LBA STATUS",
            (op::MAINTENANCE_IN, op::SA_REPORT_TARGET_PORT_GROUPS) => "REPORT TARGET PORT GROUPS",
            (opcode, _) => op::name(opcode),
        }
    }

    /// TEST UNIT READY.
    pub fn test_unit_ready() -> Self {
        Self::build(op::TEST_UNIT_READY, |_| {})
    }

    /// REQUEST SENSE, fixed format.
    pub fn request_sense(allocation_bytes: u8) -> Self {
        Self::build(op::REQUEST_SENSE, |b| b[4] = allocation_bytes)
    }

    /// INQUIRY, standard data.
    pub fn inquiry(allocation_bytes: u16) -> Self {
        Self::build(op::INQUIRY, |b| b[3..5].copy_from_slice(&allocation_bytes.to_be_bytes()))
    }

    /// INQUIRY of a vital product data page.
    pub fn inquiry_vpd(page: u8, allocation_bytes: u16) -> Self {
        Self::build(op::INQUIRY, |b| {
            b[1] = 0x01;
            b[2] = page;
            b[3..5].copy_from_slice(&allocation_bytes.to_be_bytes());
        })
    }

    /// REPORT LUNS, all that the target shows to this initiator; SPC-4 asks for at least 16 bytes.
    pub fn report_luns(allocation_bytes: u32) -> Self {
        Self::build(op::REPORT_LUNS, |b| b[6..10].copy_from_slice(&allocation_bytes.to_be_bytes()))
    }

    /// REPORT TARGET PORT GROUPS, with the header that has a length only.
    pub fn report_target_port_groups(allocation_bytes: u32) -> Self {
        Self::build(op::MAINTENANCE_IN, |b| {
            b[1] = op::SA_REPORT_TARGET_PORT_GROUPS;
            b[6..10].copy_from_slice(&allocation_bytes.to_be_bytes());
        })
    }

    /// READ CAPACITY(10).
    pub fn read_capacity_10() -> Self {
        Self::build(op::READ_CAPACITY_10, |_| {})
    }

    /// READ CAPACITY(16).
    pub fn read_capacity_16(allocation_bytes: u32) -> Self {
        Self::build(op::SERVICE_ACTION_IN_16, |b| {
            b[1] = op::SA_READ_CAPACITY_16;
            b[10..14].copy_from_slice(&allocation_bytes.to_be_bytes());
        })
    }

    /// MODE SENSE(6), current values, without block descriptors.
    pub fn mode_sense_6(page: u8, allocation_bytes: u8) -> Self {
        Self::build(op::MODE_SENSE_6, |b| {
            b[1] = 0x08;
            b[2] = page & 0x3F;
            b[4] = allocation_bytes;
        })
    }

    /// MODE SENSE(10), current values, without block descriptors.
    pub fn mode_sense_10(page: u8, allocation_bytes: u16) -> Self {
        Self::build(op::MODE_SENSE_10, |b| {
            b[1] = 0x08;
            b[2] = page & 0x3F;
            b[7..9].copy_from_slice(&allocation_bytes.to_be_bytes());
        })
    }

    /// READ(10) where address and length fit, else READ(16).
    pub fn read(lba: u64, blocks: u32) -> Self {
        Self::transfer(op::READ_10, op::READ_16, lba, blocks, false)
    }

    /// WRITE(10) where address and length fit, else WRITE(16).
    pub fn write(lba: u64, blocks: u32, fua: bool) -> Self {
        Self::transfer(op::WRITE_10, op::WRITE_16, lba, blocks, fua)
    }

    fn transfer(short: u8, long: u8, lba: u64, blocks: u32, fua: bool) -> Self {
        let flags = u8::from(fua) << 3;
        match (u32::try_from(lba), u16::try_from(blocks)) {
            (Ok(lba), Ok(blocks)) => Self::build(short, |b| {
                b[1] = flags;
                b[2..6].copy_from_slice(&lba.to_be_bytes());
                b[7..9].copy_from_slice(&blocks.to_be_bytes());
            }),
            _ => Self::build(long, |b| {
                b[1] = flags;
                b[2..10].copy_from_slice(&lba.to_be_bytes());
                b[10..14].copy_from_slice(&blocks.to_be_bytes());
            }),
        }
    }

    /// SYNCHRONIZE CACHE(10) of the whole medium, answered when it is done.
    pub fn synchronize_cache_10() -> Self {
        Self::build(op::SYNCHRONIZE_CACHE_10, |_| {})
    }

    /// SYNCHRONIZE CACHE(16) of the whole medium, answered when it is done.
    pub fn synchronize_cache_16() -> Self {
        Self::build(op::SYNCHRONIZE_CACHE_16, |_| {})
    }

    /// UNMAP with a parameter list of that length ([`super::unmap`]).
    pub fn unmap(parameter_bytes: u16) -> Self {
        Self::build(op::UNMAP, |b| b[7..9].copy_from_slice(&parameter_bytes.to_be_bytes()))
    }

    /// WRITE SAME(16) with one block of data; `unmap` allows to deallocate instead of writing.
    pub fn write_same_16(lba: u64, blocks: u32, unmap: bool) -> Self {
        Self::build(op::WRITE_SAME_16, |b| {
            b[1] = u8::from(unmap) << 3;
            b[2..10].copy_from_slice(&lba.to_be_bytes());
            b[10..14].copy_from_slice(&blocks.to_be_bytes());
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfers_take_the_shortest_form_that_fits() {
        let small = Cdb::read(0x1234_5678, 0x1000);
        assert_eq!(small.0[..10], [0x28, 0, 0x12, 0x34, 0x56, 0x78, 0, 0x10, 0, 0]);
        // The first block behind 2 TiB of 512-byte blocks.
        let far = Cdb::read(0x1_0000_0000, 8);
        assert_eq!(far.0, [0x88, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0]);
        let long = Cdb::write(0, 0x1_0000, true);
        assert_eq!(long.0, [0x8A, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
        assert_eq!(Cdb::write(0, 1, true).0[1], 0x08);
        assert_eq!(Cdb::write(0, 1, false).0[1], 0);
    }

    #[test]
    fn other_commands() {
        assert_eq!(Cdb::inquiry_vpd(0xB0, 0x0100).0[..6], [0x12, 1, 0xB0, 1, 0, 0]);
        assert_eq!(Cdb::read_capacity_16(32).0[..2], [0x9E, 0x10]);
        assert_eq!(Cdb::read_capacity_16(32).0[10..14], [0, 0, 0, 32]);
        assert_eq!(Cdb::unmap(24).0[..10], [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]);
        assert_eq!(Cdb::write_same_16(7, 9, true).0, [0x93, 8, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 9, 0, 0]);
        assert_eq!(Cdb::read_capacity_16(32).name(), "READ CAPACITY(16)");
        assert_eq!(Cdb::mode_sense_10(0x08, 0x0200).0[..10], [0x5A, 8, 8, 0, 0, 0, 0, 2, 0, 0]);
    }
}
