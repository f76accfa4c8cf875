//! Thin provisioning: UNMAP, WRITE SAME, GET LBA STATUS.

use iscsi::scsi::sense::asc;
use iscsi::scsi::{Sense, Status, opcode as op};

use super::transfer::range_of;
use super::{
    CdbBytes, LogicalUnit, MAX_UNMAP_BYTES, MAX_UNMAP_DESCRIPTORS, MAX_WRITE_SAME_BYTES, Sink, Step,
    Transfer, be16, be32, be64, illegal, invalid_field, read_error, write_error,
};
use crate::storage::{CHUNK_BYTES, Extent};

/// WRITE SAME: NDOB, LBDATA, PBDATA, UNMAP, ANCHOR and WRPROTECT in byte 1 of the CDB.
const NDOB: u8 = 0x01;
const OBSOLETE_DATA: u8 = 0x06;
const UNMAP: u8 = 0x08;
const ANCHOR: u8 = 0x10;
const PROTECT: u8 = 0xE0;

/// Most descriptors that one GET LBA STATUS returns.
const MAX_STATUS_DESCRIPTORS: usize = 64;

impl LogicalUnit {
    pub(super) fn unmap_start(&mut self, cdb: &CdbBytes, edtl: u32) -> Result<Step, Sense> {
        // Anchored blocks are not supported (ANC_SUP 0 in VPD page B2h).
        if cdb[1] & 0x01 != 0 {
            return Err(invalid_field());
        }
        self.check_writable()?;
        let len = u32::from(be16(cdb, 7));
        match len {
            0 => Ok(Step::Done(Status::GOOD)),
            1..8 => Err(illegal(asc::PARAMETER_LIST_LENGTH)),
            _ if edtl < len => Err(illegal(asc::PARAMETER_LIST_LENGTH)),
            _ => Ok(Step::Out(Transfer { len, sink: Sink::Staged })),
        }
    }

    pub(super) fn unmap_finish(&mut self, list: &[u8]) -> Result<(), Sense> {
        self.check_writable()?;
        // Descriptors that were cut off are not errors (SBC-3 5.28.2): whole ones in what came are processed.
        let body = list.get(8..).unwrap_or_default();
        let described = usize::from(be16(list, 2)).min(body.len());
        let descriptors = || body[..described].chunks_exact(16);
        if descriptors().len() > MAX_UNMAP_DESCRIPTORS as usize {
            return Err(illegal(asc::INVALID_FIELD_IN_PARAMETERS));
        }
        // All are checked before the first takes effect.
        let mut total_bytes = 0;
        for descriptor in descriptors() {
            let (_, len) = self.byte_range(be64(descriptor, 0), u64::from(be32(descriptor, 8)))?;
            total_bytes += len;
        }
        if total_bytes > MAX_UNMAP_BYTES {
            return Err(illegal(asc::INVALID_FIELD_IN_PARAMETERS));
        }
        for descriptor in descriptors() {
            let (offset, len) = self.byte_range(be64(descriptor, 0), u64::from(be32(descriptor, 8)))?;
            self.dirty = true;
            self.storage.unmap(offset, len).map_err(|e| write_error(&e))?;
        }
        self.settle(false)
    }

    pub(super) fn write_same(&mut self, cdb: &CdbBytes, edtl: u32) -> Result<Step, Sense> {
        let (lba, blocks, flags) = range_of(cdb);
        let no_data = cdb[0] == op::WRITE_SAME_16 && flags & NDOB != 0;
        // LBDATA and PBDATA are obsolete; ANCHOR and protection are not supported.
        if flags & (PROTECT | ANCHOR | OBSOLETE_DATA) != 0 || (flags & NDOB != 0 && !no_data) {
            return Err(invalid_field());
        }
        self.check_writable()?;
        let (_, len) = self.byte_range(lba, blocks)?;
        // WSNZ is set in VPD page B0h: zero does not mean "to the end".
        if blocks == 0 || len > u64::from(MAX_WRITE_SAME_BYTES) {
            return Err(invalid_field());
        }
        if no_data {
            self.fill(lba, blocks, None, flags & UNMAP != 0)?;
            return Ok(Step::Done(Status::GOOD));
        }
        if edtl != self.block_bytes {
            return Err(invalid_field());
        }
        Ok(Step::Out(Transfer { len: self.block_bytes, sink: Sink::Staged }))
    }

    pub(super) fn write_same_finish(&mut self, cdb: &CdbBytes, block: &[u8]) -> Result<(), Sense> {
        self.check_writable()?;
        let (lba, blocks, flags) = range_of(cdb);
        if block.len() != self.block_bytes as usize {
            return Err(illegal(asc::PARAMETER_LIST_LENGTH));
        }
        self.fill(lba, blocks, Some(block), flags & UNMAP != 0)
    }

    /// Sets a range to copies of `block`, or to zeroes. Blocks that the initiator allows to unmap are unmapped if
    /// they would read as zeroes anyway.
    fn fill(&mut self, lba: u64, blocks: u64, block: Option<&[u8]>, unmap: bool) -> Result<(), Sense> {
        let (mut offset, mut len) = self.byte_range(lba, blocks)?;
        let zero = block.is_none_or(|block| block.iter().all(|&byte| byte == 0));
        self.dirty = true;
        if zero && unmap {
            self.storage.unmap(offset, len).map_err(|e| write_error(&e))?;
        } else {
            // A multiple of the block: both sizes are powers of two.
            let mut pattern = vec![0; (CHUNK_BYTES as u64).min(len) as usize];
            if let Some(block) = block.filter(|_| !zero) {
                pattern.chunks_exact_mut(block.len()).for_each(|copy| copy.copy_from_slice(block));
            }
            while len > 0 {
                let now = len.min(pattern.len() as u64);
                self.storage.write(offset, &pattern[..now as usize]).map_err(|e| write_error(&e))?;
                offset += now;
                len -= now;
            }
        }
        self.settle(false)
    }

    pub(super) fn get_lba_status(&mut self, cdb: &CdbBytes, reply: &mut Vec<Extent>) -> Result<Step, Sense> {
        let (start, allocation_bytes) = (be64(cdb, 2), be32(cdb, 10) as usize);
        if start >= self.blocks {
            return Err(illegal(asc::LBA_OUT_OF_RANGE));
        }
        let block_bytes = u64::from(self.block_bytes);
        let mut data = vec![0; 8];
        let mut lba = start;
        let room = (allocation_bytes.saturating_sub(8) / 16).clamp(1, MAX_STATUS_DESCRIPTORS);
        while lba < self.blocks && data.len() < 8 + 16 * room {
            let (mapped, run) =
                self.storage.mapped(lba * block_bytes).map_err(|error| read_error(&error, lba))?;
            // A run that ends inside a block counts for the whole of it.
            let blocks = run.div_ceil(block_bytes).clamp(1, self.blocks - lba).min(u64::from(u32::MAX));
            data.extend_from_slice(&lba.to_be_bytes());
            data.extend_from_slice(&(blocks as u32).to_be_bytes());
            // PROVISIONING STATUS: 0 mapped, 1 deallocated.
            data.extend_from_slice(&[u8::from(!mapped), 0, 0, 0]);
            lba += blocks;
        }
        let parameter_bytes = (data.len() - 4) as u32;
        data[..4].copy_from_slice(&parameter_bytes.to_be_bytes());
        Ok(self.reply(&data, allocation_bytes, reply))
    }
}
