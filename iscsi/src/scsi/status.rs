//! SCSI status codes (SAM-5 5.3.1).

use std::fmt;

/// The status byte of a SCSI Response or of a Data-In with the S bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Status(pub u8);

impl Status {
    /// GOOD.
    pub const GOOD: Status = Status(0x00);
    /// CHECK CONDITION: sense data tells what happened.
    pub const CHECK_CONDITION: Status = Status(0x02);
    /// CONDITION MET (PRE-FETCH).
    pub const CONDITION_MET: Status = Status(0x04);
    /// BUSY: try again later.
    pub const BUSY: Status = Status(0x08);
    /// RESERVATION CONFLICT.
    pub const RESERVATION_CONFLICT: Status = Status(0x18);
    /// TASK SET FULL: too many commands at once.
    pub const TASK_SET_FULL: Status = Status(0x28);
    /// ACA ACTIVE.
    pub const ACA_ACTIVE: Status = Status(0x30);
    /// TASK ABORTED: by another initiator's task management.
    pub const TASK_ABORTED: Status = Status(0x40);

    /// Whether the same command may succeed later without anybody doing anything about it.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::BUSY | Self::TASK_SET_FULL | Self::ACA_ACTIVE | Self::TASK_ABORTED)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self {
            Self::GOOD => "GOOD",
            Self::CHECK_CONDITION => "CHECK CONDITION",
            Self::CONDITION_MET => "CONDITION MET",
            Self::BUSY => "BUSY",
            Self::RESERVATION_CONFLICT => "RESERVATION CONFLICT",
            Self::TASK_SET_FULL => "TASK SET FULL",
            Self::ACA_ACTIVE => "ACA ACTIVE",
            Self::TASK_ABORTED => "TASK ABORTED",
            Status(other) => return write!(f, "status {other:#04x}"),
        })
    }
}
