//! The SCSI that iSCSI carries: command descriptor blocks, the data they return, status and sense.
//!
//! Written against SPC-4 (primary commands), SBC-3 (block commands) and SAM-5 (architecture). Everything here is a
//! function from bytes to values or back; who sends a command, when, and what to do about its answer is decided
//! elsewhere (`initiator`, `target` and the programs above them). Both ends use the same constants.

pub mod alua;
pub mod capacity;
pub mod cdb;
pub mod inquiry;
pub mod lun;
pub mod mode;
pub mod opcode;
pub mod sense;
pub mod status;
pub mod unmap;
pub mod vpd;

pub use cdb::Cdb;
pub use lun::Lun;
pub use sense::{Action, Sense, SenseKey};
pub use status::Status;

/// Data returned by a SCSI command that cannot be what the standard says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    /// Fewer bytes than the fixed part of the format.
    #[error("{what}: {got_bytes} bytes where at least {need_bytes} are needed")]
    Short {
        /// Which data.
        what: &'static str,
        /// What came.
        got_bytes: usize,
        /// What the fixed part takes.
        need_bytes: usize,
    },
    /// A field holds a value that the standard excludes.
    #[error("{what}: {field} is {value:#x}")]
    Field {
        /// Which data.
        what: &'static str,
        /// Which field of it.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// Fails unless `data` has at least `need_bytes`.
pub(crate) fn need(what: &'static str, data: &[u8], need_bytes: usize) -> Result<(), DataError> {
    if data.len() < need_bytes {
        return Err(DataError::Short { what, got_bytes: data.len(), need_bytes });
    }
    Ok(())
}

/// Two bytes, big-endian, at `at`; 0 where the data ends before.
pub(crate) fn be16(data: &[u8], at: usize) -> u16 {
    data.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_be_bytes)
}

/// Four bytes, big-endian, at `at`; 0 where the data ends before.
pub(crate) fn be32(data: &[u8], at: usize) -> u32 {
    data.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// Eight bytes, big-endian, at `at`; 0 where the data ends before.
pub(crate) fn be64(data: &[u8], at: usize) -> u64 {
    data.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}
