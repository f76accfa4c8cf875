//! READ CAPACITY and REPORT SUPPORTED OPERATION CODES.

use iscsi::scsi::Sense;

use super::{CdbBytes, LogicalUnit, Step, be16, be32, be64, invalid_field, opcodes};
use crate::storage::Extent;

/// Physical block size presented when the logical one is smaller: what file systems and memory are managed by.
const PHYSICAL_BLOCK_BYTES: u32 = 4096;

impl LogicalUnit {
    pub(super) fn read_capacity_10(
        &mut self,
        cdb: &CdbBytes,
        reply: &mut Vec<Extent>,
    ) -> Result<Step, Sense> {
        // PMI is obsolete; without it the LBA must be zero (SBC-3 5.15).
        if cdb[8] & 0x01 == 0 && be32(cdb, 2) != 0 {
            return Err(invalid_field());
        }
        let last = u32::try_from(self.blocks.saturating_sub(1)).unwrap_or(u32::MAX);
        let mut data = [0; 8];
        data[..4].copy_from_slice(&last.to_be_bytes());
        data[4..].copy_from_slice(&self.block_bytes.to_be_bytes());
        Ok(self.reply(&data, data.len(), reply))
    }

    pub(super) fn read_capacity_16(
        &mut self,
        cdb: &CdbBytes,
        reply: &mut Vec<Extent>,
    ) -> Result<Step, Sense> {
        if cdb[14] & 0x01 == 0 && be64(cdb, 2) != 0 {
            return Err(invalid_field());
        }
        let mut data = [0; 32];
        data[..8].copy_from_slice(&self.blocks.saturating_sub(1).to_be_bytes());
        data[8..12].copy_from_slice(&self.block_bytes.to_be_bytes());
        data[13] = (PHYSICAL_BLOCK_BYTES / self.block_bytes).max(1).ilog2() as u8;
        // LBPME and LBPRZ: thinly provisioned, unmapped blocks read as zeroes.
        data[14] = 0xC0;
        Ok(self.reply(&data, be32(cdb, 10) as usize, reply))
    }

    pub(super) fn report_supported_opcodes(
        &mut self,
        cdb: &CdbBytes,
        reply: &mut Vec<Extent>,
    ) -> Result<Step, Sense> {
        let (with_timeouts, options) = (cdb[2] & 0x80 != 0, cdb[2] & 0x07);
        let (opcode, service_action) = (cdb[3], be16(cdb, 4));
        let data = match options {
            0 => opcodes::all(with_timeouts),
            // One operation code without service actions; with; or either.
            1..=3 => {
                let has_actions = opcodes::has_service_actions(opcode);
                match options {
                    1 if has_actions => return Err(invalid_field()),
                    2 if !has_actions && opcodes::is_known(opcode) => return Err(invalid_field()),
                    _ => {}
                }
                opcodes::one(opcodes::find(opcode, service_action), with_timeouts)
            }
            _ => return Err(invalid_field()),
        };
        Ok(self.reply(&data, be32(cdb, 6) as usize, reply))
    }
}
