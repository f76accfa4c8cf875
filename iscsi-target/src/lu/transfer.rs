//! The commands that move blocks: READ, WRITE, VERIFY, WRITE AND VERIFY, ORWRITE, COMPARE AND WRITE, and what
//! belongs to them (SYNCHRONIZE CACHE, PRE-FETCH).

use iscsi::scsi::sense::asc;
use iscsi::scsi::{Sense, SenseKey, Status};

use super::{
    CdbBytes, LogicalUnit, MAX_COMPARE_BLOCKS, MAX_TRANSFER_BYTES, Sink, Step, Transfer, be16, be32, be64,
    illegal, invalid_field, read_error, write_error,
};
use crate::storage::Extent;

/// DPO, FUA and protection bits stand at the same place in all CDBs of these families.
const FUA: u8 = 0x08;
const PROTECT: u8 = 0xE0;

/// The LBA, number of blocks and flags of a CDB of the 6, 10, 12 or 16 byte family.
pub(super) fn range_of(cdb: &CdbBytes) -> (u64, u64, u8) {
    match cdb[0] >> 5 {
        0 => {
            let lba = be32(cdb, 0) & 0x1F_FFFF;
            let blocks = if cdb[4] == 0 { 256 } else { u64::from(cdb[4]) };
            (u64::from(lba), blocks, 0)
        }
        5 => (u64::from(be32(cdb, 2)), u64::from(be32(cdb, 6)), cdb[1]),
        4 => (be64(cdb, 2), u64::from(be32(cdb, 10)), cdb[1]),
        _ => (u64::from(be32(cdb, 2)), u64::from(be16(cdb, 7)), cdb[1]),
    }
}

impl LogicalUnit {
    /// Range in bytes of a data transfer, and its flags.
    fn transfer_range(&self, cdb: &CdbBytes) -> Result<(u64, u32, u8), Sense> {
        let (lba, blocks, flags) = range_of(cdb);
        // Protection information is not supported, so the field must be zero (SBC-3 5.7).
        if flags & PROTECT != 0 {
            return Err(invalid_field());
        }
        let (offset, len) = self.byte_range(lba, blocks)?;
        match u32::try_from(len) {
            Ok(len) if len <= MAX_TRANSFER_BYTES => Ok((offset, len, flags)),
            _ => Err(invalid_field()),
        }
    }

    pub(super) fn read(&mut self, cdb: &CdbBytes, reply: &mut Vec<Extent>) -> Result<Step, Sense> {
        let (offset, len, flags) = self.transfer_range(cdb)?;
        if flags & FUA != 0 {
            // What is read comes from the medium: bring the medium up to date first (SBC-3 table 45).
            self.settle(true)?;
        }
        let lba = offset / u64::from(self.block_bytes);
        self.storage.read(offset, len as usize, reply).map_err(|e| read_error(&e, lba))?;
        Ok(Step::In { len })
    }

    pub(super) fn write(&mut self, cdb: &CdbBytes) -> Result<Step, Sense> {
        let (offset, len, flags) = self.transfer_range(cdb)?;
        self.check_writable()?;
        Ok(Step::Out(Transfer { len, sink: Sink::Write { offset, fua: flags & FUA != 0 } }))
    }

    /// WRITE AND VERIFY: written, and read back from the medium by being flushed to it.
    pub(super) fn write_verify(&mut self, cdb: &CdbBytes) -> Result<Step, Sense> {
        let (offset, len, _) = self.transfer_range(cdb)?;
        self.check_writable()?;
        Ok(Step::Out(Transfer { len, sink: Sink::Write { offset, fua: true } }))
    }

    pub(super) fn verify(&mut self, cdb: &CdbBytes) -> Result<Step, Sense> {
        let (offset, len, flags) = self.transfer_range(cdb)?;
        match flags >> 1 & 0x03 {
            // No data is sent; the blocks are readable, which is all that is asked.
            0 => Ok(Step::Done(Status::GOOD)),
            1 => Ok(Step::Out(Transfer { len, sink: Sink::Compare { offset } })),
            _ => Err(invalid_field()),
        }
    }

    pub(super) fn or_write(&mut self, cdb: &CdbBytes) -> Result<Step, Sense> {
        let (offset, len, flags) = self.transfer_range(cdb)?;
        self.check_writable()?;
        Ok(Step::Out(Transfer { len, sink: Sink::Or { offset, fua: flags & FUA != 0 } }))
    }

    pub(super) fn synchronize_cache(&mut self, cdb: &CdbBytes) -> Result<Step, Sense> {
        let (lba, blocks, _) = range_of(cdb);
        // No blocks means: to the end.
        self.byte_range(lba, blocks)?;
        self.settle(true)?;
        Ok(Step::Done(Status::GOOD))
    }

    pub(super) fn prefetch(&mut self, cdb: &CdbBytes) -> Result<Step, Sense> {
        let (lba, blocks, _) = range_of(cdb);
        self.byte_range(lba, blocks)?;
        // GOOD: there is no cache into which all of it would fit for certain (SBC-3 5.10).
        Ok(Step::Done(Status::GOOD))
    }

    pub(super) fn compare_and_write(&mut self, cdb: &CdbBytes, edtl: u32) -> Result<Step, Sense> {
        if cdb[1] & PROTECT != 0 || cdb[13] > MAX_COMPARE_BLOCKS {
            return Err(invalid_field());
        }
        let (_, len) = self.byte_range(be64(cdb, 2), u64::from(cdb[13]))?;
        self.check_writable()?;
        // At most 16 blocks of 4 KiB, twice.
        let len = 2 * len as u32;
        if edtl != len {
            return Err(invalid_field());
        }
        Ok(match len {
            0 => Step::Done(Status::GOOD),
            _ => Step::Out(Transfer { len, sink: Sink::Staged }),
        })
    }

    pub(super) fn compare_and_write_finish(&mut self, cdb: &CdbBytes, staged: &[u8]) -> Result<(), Sense> {
        let (offset, len) = self.byte_range(be64(cdb, 2), u64::from(cdb[13]))?;
        self.check_writable()?;
        if staged.len() as u64 != 2 * len {
            return Err(illegal(asc::PARAMETER_LIST_LENGTH));
        }
        let (expected, new) = staged.split_at(len as usize);
        self.compare_piece(offset, 0, expected)?;
        self.write_piece(offset, new)?;
        self.settle(cdb[1] & FUA != 0)
    }

    pub(super) fn write_piece(&mut self, offset: u64, data: &[u8]) -> Result<(), Sense> {
        self.dirty = true;
        self.storage.write(offset, data).map_err(|e| write_error(&e))
    }

    /// Compares `data`, which stands `at` bytes into what the initiator sent, with the medium at `offset`.
    pub(super) fn compare_piece(&mut self, offset: u64, at: u32, data: &[u8]) -> Result<(), Sense> {
        let lba = offset / u64::from(self.block_bytes);
        self.scratch.clear();
        self.storage.read(offset, data.len(), &mut self.scratch).map_err(|e| read_error(&e, lba))?;
        let mut done = 0;
        let mut difference = None;
        for medium in self.scratch.iter().map(Extent::as_slice) {
            let sent = &data[done..done + medium.len()];
            if sent != medium {
                difference = sent.iter().zip(medium).position(|(a, b)| a != b).map(|at| done + at);
                break;
            }
            done += medium.len();
        }
        self.scratch.clear();
        match difference {
            None => Ok(()),
            // INFORMATION is the offset of the first byte that differs (SBC-3 5.3, 5.31).
            Some(position) => Err(Sense {
                information: Some(u64::from(at) + position as u64),
                ..Sense::new(SenseKey::Miscompare, asc::MISCOMPARE)
            }),
        }
    }

    pub(super) fn or_piece(&mut self, offset: u64, data: &[u8]) -> Result<(), Sense> {
        let lba = offset / u64::from(self.block_bytes);
        self.scratch.clear();
        self.storage.read(offset, data.len(), &mut self.scratch).map_err(|e| read_error(&e, lba))?;
        self.or_buffer.clear();
        let medium = self.scratch.iter().flat_map(Extent::as_slice);
        self.or_buffer.extend(data.iter().zip(medium).map(|(a, b)| a | b));
        self.scratch.clear();
        self.dirty = true;
        self.storage.write(offset, &self.or_buffer).map_err(|e| write_error(&e))
    }

    /// Flushes if the command demands it or there is no write cache that could hold it back.
    pub(super) fn settle(&mut self, force: bool) -> Result<(), Sense> {
        if force || !self.mode.wce {
            self.flush().map_err(|e| write_error(&e))?;
        }
        Ok(())
    }
}
