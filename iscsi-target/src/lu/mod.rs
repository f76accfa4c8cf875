//! The device server of one logical unit: what a direct access block device answers to each command
//! (SPC-4, SBC-3), over any [`Storage`].
//!
//! A command is [started](LogicalUnit::start) with its CDB. It ends at once, or with data for the initiator, or it
//! asks for data from the initiator, which is [placed](LogicalUnit::place) piece by piece as it arrives and
//! [finished](LogicalUnit::finish). Nothing here knows of iSCSI, sessions or sockets; commands for the target as a
//! whole (REPORT LUNS, unit attentions) are the [device](crate::device)'s.

mod identity;
mod inquiry;
mod mode;
mod opcodes;
mod provisioning;
mod report;
mod transfer;

#[cfg(test)]
mod tests;

use std::io;

use iscsi::scsi::sense::asc;
use iscsi::scsi::{Sense, SenseKey, Status, opcode as op};

pub use identity::Identity;
pub(crate) use inquiry::standard as standard_inquiry;
use mode::ModeState;
use opcodes::ORWRITE_16;

use crate::storage::{Extent, Pool, Storage};

/// The first 16 bytes of a CDB. Longer CDBs belong to operation codes that are not supported.
pub type CdbBytes = [u8; 16];

/// Most bytes of one READ, WRITE or VERIFY (VPD page B0h, MAXIMUM TRANSFER LENGTH).
pub const MAX_TRANSFER_BYTES: u32 = 8 << 20;
/// Most bytes that one WRITE SAME sets (MAXIMUM WRITE SAME LENGTH).
pub const MAX_WRITE_SAME_BYTES: u32 = 16 << 20;
/// Most bytes that one UNMAP descriptor list gives back (MAXIMUM UNMAP LBA COUNT).
pub const MAX_UNMAP_BYTES: u64 = 512 << 20;
/// Most descriptors in one UNMAP.
pub const MAX_UNMAP_DESCRIPTORS: u32 = 256;
/// Most blocks of a COMPARE AND WRITE.
pub const MAX_COMPARE_BLOCKS: u8 = 16;
/// Most bytes of a parameter list or other data that is collected before it is acted on.
pub const MAX_STAGED_BYTES: u32 = 128 << 10;

/// How a logical unit presents itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Logical block size, 512 or 4096.
    pub block_bytes: u32,
    /// Writes are refused (DATA PROTECT, WRITE PROTECTED).
    pub read_only: bool,
    /// The write cache is on at start (WCE); off means that every write is durable before its status.
    pub write_cache: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { block_bytes: 512, read_only: false, write_cache: true }
    }
}

/// What a command comes to when it is started.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// Finished without data.
    Done(Status),
    /// Finished with GOOD; the caller's list of extents holds this many bytes for the initiator.
    In {
        /// Bytes.
        len: u32,
    },
    /// Waits for data from the initiator.
    Out(Transfer),
    /// Finished with CHECK CONDITION.
    Failed(Sense),
}

/// Data that a command takes from the initiator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// How much.
    pub len: u32,
    /// What to do with it.
    pub sink: Sink,
}

/// Where data from the initiator goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sink {
    /// Straight to the medium.
    Write {
        /// Byte offset on the medium.
        offset: u64,
        /// Durable before the status.
        fua: bool,
    },
    /// Compared with the medium.
    Compare {
        /// Byte offset on the medium.
        offset: u64,
    },
    /// Or-ed into the medium.
    Or {
        /// Byte offset on the medium.
        offset: u64,
        /// Durable before the status.
        fua: bool,
    },
    /// Collected, and acted on when all is there.
    Staged,
}

/// One logical unit.
pub struct LogicalUnit {
    identity: Identity,
    block_bytes: u32,
    blocks: u64,
    read_only: bool,
    mode: ModeState,
    default_mode: ModeState,
    storage: Box<dyn Storage>,
    /// Something was written since the last flush.
    dirty: bool,
    pool: Pool,
    scratch: Vec<Extent>,
    or_buffer: Vec<u8>,
    /// There are target port groups with states of their own.
    asymmetric: bool,
    /// Group of the port that the command at hand came by.
    port_group: u16,
}

impl LogicalUnit {
    /// A logical unit on `storage`. A last part that does not fill a block is not used.
    pub fn new(storage: Box<dyn Storage>, identity: Identity, options: Options) -> Self {
        let mode = ModeState { wce: options.write_cache, ..ModeState::default() };
        Self {
            identity,
            block_bytes: options.block_bytes,
            blocks: storage.len_bytes() / u64::from(options.block_bytes),
            read_only: options.read_only,
            mode,
            default_mode: mode,
            storage,
            dirty: false,
            pool: Pool::new(),
            scratch: Vec::new(),
            or_buffer: Vec::new(),
            asymmetric: false,
            port_group: 1,
        }
    }

    /// Number of logical blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Size of a logical block.
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// What it is called.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The commands to come arrive by a port of this group; `asymmetric`: there are others.
    pub fn set_port(&mut self, group: u16, asymmetric: bool) {
        (self.port_group, self.asymmetric) = (group, asymmetric);
    }

    /// Starts a command. `edtl` is the length of the data that the initiator offers, if it offers any. Data for the
    /// initiator is appended to `reply`.
    pub fn start(&mut self, cdb: &CdbBytes, edtl: u32, reply: &mut Vec<Extent>) -> Step {
        self.dispatch(cdb, edtl, reply).unwrap_or_else(Step::Failed)
    }

    fn dispatch(&mut self, cdb: &CdbBytes, edtl: u32, reply: &mut Vec<Extent>) -> Result<Step, Sense> {
        match cdb[0] {
            op::READ_6 | op::READ_10 | op::READ_12 | op::READ_16 => self.read(cdb, reply),
            op::WRITE_6 | op::WRITE_10 | op::WRITE_12 | op::WRITE_16 => self.write(cdb),
            op::WRITE_VERIFY_10 | op::WRITE_VERIFY_12 | op::WRITE_VERIFY_16 => self.write_verify(cdb),
            op::VERIFY_10 | op::VERIFY_12 | op::VERIFY_16 => self.verify(cdb),
            op::SYNCHRONIZE_CACHE_10 | op::SYNCHRONIZE_CACHE_16 => self.synchronize_cache(cdb),
            op::PREFETCH_10 | op::PREFETCH_16 => self.prefetch(cdb),
            op::COMPARE_AND_WRITE => self.compare_and_write(cdb, edtl),
            ORWRITE_16 => self.or_write(cdb),
            op::WRITE_SAME_10 | op::WRITE_SAME_16 => self.write_same(cdb, edtl),
            op::UNMAP => self.unmap_start(cdb, edtl),
            op::TEST_UNIT_READY | op::START_STOP_UNIT | op::PREVENT_ALLOW => self.unit_control(cdb),
            op::INQUIRY => self.inquiry(cdb, reply),
            op::MODE_SENSE_6 | op::MODE_SENSE_10 => self.mode_sense(cdb, reply),
            op::MODE_SELECT_6 | op::MODE_SELECT_10 => self.mode_select_start(cdb, edtl),
            op::READ_CAPACITY_10 => self.read_capacity_10(cdb, reply),
            op::SERVICE_ACTION_IN_16 => match cdb[1] & 0x1F {
                op::SA_READ_CAPACITY_16 => self.read_capacity_16(cdb, reply),
                op::SA_GET_LBA_STATUS => self.get_lba_status(cdb, reply),
                _ => Err(invalid_field()),
            },
            op::MAINTENANCE_IN if cdb[1] & 0x1F == op::SA_REPORT_SUPPORTED_OPCODES => {
                self.report_supported_opcodes(cdb, reply)
            }
            op::MAINTENANCE_IN => Err(invalid_field()),
            _ => Err(illegal(asc::INVALID_OPCODE)),
        }
    }

    /// Takes a piece of the data that the initiator sends, `at` bytes from its start. Pieces come in order.
    pub fn place(
        &mut self,
        transfer: &Transfer,
        at: u32,
        data: &[u8],
        staged: &mut Vec<u8>,
    ) -> Result<(), Sense> {
        match transfer.sink {
            Sink::Write { offset, .. } => self.write_piece(offset + u64::from(at), data),
            Sink::Compare { offset } => self.compare_piece(offset + u64::from(at), at, data),
            Sink::Or { offset, .. } => self.or_piece(offset + u64::from(at), data),
            Sink::Staged => {
                if staged.len() + data.len() > MAX_STAGED_BYTES as usize {
                    return Err(illegal(asc::PARAMETER_LIST_LENGTH));
                }
                staged.extend_from_slice(data);
                Ok(())
            }
        }
    }

    /// Ends a command whose data has been placed.
    pub fn finish(&mut self, cdb: &CdbBytes, transfer: &Transfer, staged: &[u8]) -> Result<(), Sense> {
        match transfer.sink {
            Sink::Write { fua, .. } | Sink::Or { fua, .. } => self.settle(fua),
            Sink::Compare { .. } => Ok(()),
            Sink::Staged => match cdb[0] {
                op::COMPARE_AND_WRITE => self.compare_and_write_finish(cdb, staged),
                op::WRITE_SAME_10 | op::WRITE_SAME_16 => self.write_same_finish(cdb, staged),
                op::UNMAP => self.unmap_finish(staged),
                op::MODE_SELECT_6 | op::MODE_SELECT_10 => self.mode_select_finish(cdb, staged),
                _ => Err(Sense::new(SenseKey::HardwareError, asc::INTERNAL_TARGET_FAILURE)),
            },
        }
    }

    /// LOGICAL UNIT RESET: mode parameters as at start (SPC-4 6.11). The medium is not touched.
    pub fn reset(&mut self) {
        self.mode = self.default_mode;
    }

    /// Whether the initiators want sense data in descriptor format (D_SENSE in the control mode page).
    pub fn descriptor_sense(&self) -> bool {
        self.mode.d_sense
    }

    /// Makes what was written durable, as at an orderly end.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.dirty {
            self.storage.flush()?;
            self.dirty = false;
        }
        Ok(())
    }

    /// TEST UNIT READY, START STOP UNIT, PREVENT ALLOW MEDIUM REMOVAL: the unit is always ready and not removable.
    fn unit_control(&mut self, cdb: &CdbBytes) -> Result<Step, Sense> {
        match cdb[0] {
            op::START_STOP_UNIT => {
                let (power_condition, load_eject) = (cdb[4] >> 4, cdb[4] & 0x02 != 0);
                // There is nothing to eject, and no power condition to enter.
                if power_condition != 0 || load_eject {
                    return Err(invalid_field());
                }
                // NO_FLUSH unset: a stop writes the cache back (SBC-3 5.25). The unit stays ready: a stopped unit
                // would take the disk from every initiator.
                if cdb[4] & 0x05 == 0 {
                    self.settle(true)?;
                }
            }
            op::PREVENT_ALLOW if cdb[4] & 0x03 > 1 => return Err(invalid_field()),
            _ => {}
        }
        Ok(Step::Done(Status::GOOD))
    }

    /// Hands out parameter data, cut to the allocation length.
    fn reply(&mut self, data: &[u8], allocation_bytes: usize, reply: &mut Vec<Extent>) -> Step {
        let data = &data[..data.len().min(allocation_bytes)];
        self.pool.copy(data, reply);
        Step::In { len: data.len() as u32 }
    }

    /// Fails if the medium is write protected, by the administrator or by an initiator (SWP).
    fn check_writable(&self) -> Result<(), Sense> {
        if self.read_only || self.mode.swp {
            return Err(Sense::new(SenseKey::DataProtect, asc::WRITE_PROTECTED));
        }
        Ok(())
    }

    /// Byte offset and length of a range of blocks that lies on the medium.
    fn byte_range(&self, lba: u64, blocks: u64) -> Result<(u64, u64), Sense> {
        match lba.checked_add(blocks) {
            Some(end) if end <= self.blocks => {
                let block_bytes = u64::from(self.block_bytes);
                Ok((lba * block_bytes, blocks * block_bytes))
            }
            _ => Err(illegal(asc::LBA_OUT_OF_RANGE)),
        }
    }
}

/// ILLEGAL REQUEST with a code.
pub(crate) const fn illegal(code: u16) -> Sense {
    Sense::new(SenseKey::IllegalRequest, code)
}

/// ILLEGAL REQUEST, INVALID FIELD IN CDB.
pub(crate) const fn invalid_field() -> Sense {
    illegal(asc::INVALID_FIELD_IN_CDB)
}

/// What a failed read of the medium is to the initiator.
fn read_error(error: &io::Error, lba: u64) -> Sense {
    tracing::warn!(lba, %error, "medium: read failed");
    Sense { information: Some(lba), ..Sense::new(SenseKey::MediumError, asc::UNRECOVERED_READ_ERROR) }
}

/// What a failed write or flush of the medium is to the initiator.
fn write_error(error: &io::Error) -> Sense {
    tracing::warn!(%error, "medium: write failed");
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Sense::new(SenseKey::DataProtect, asc::SPACE_ALLOCATION_FAILED)
        }
        io::ErrorKind::ReadOnlyFilesystem => Sense::new(SenseKey::DataProtect, asc::WRITE_PROTECTED),
        _ => Sense::new(SenseKey::MediumError, asc::WRITE_ERROR),
    }
}

fn be16(cdb: &[u8], at: usize) -> u16 {
    cdb.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_be_bytes)
}

fn be32(cdb: &[u8], at: usize) -> u32 {
    cdb.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn be64(cdb: &[u8], at: usize) -> u64 {
    cdb.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}
