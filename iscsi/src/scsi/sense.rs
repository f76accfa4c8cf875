//! Sense data (SPC-4 4.5): decoding of both formats, encoding of the fixed one, names, and what an initiator of a
//! disk does about each.

use std::fmt;

/// The sense key (SPC-4 table 27).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SenseKey {
    /// Nothing to report.
    NoSense = 0x0,
    /// Done, with recovery by the device.
    RecoveredError = 0x1,
    /// The logical unit cannot be accessed.
    NotReady = 0x2,
    /// A flaw of the medium or in the recorded data.
    MediumError = 0x3,
    /// A failure of the device that repeating will not cure.
    HardwareError = 0x4,
    /// Something in the CDB or in the parameters is not supported.
    IllegalRequest = 0x5,
    /// Something happened to the logical unit since the last command.
    UnitAttention = 0x6,
    /// Write protection, or thin provisioning ran out.
    DataProtect = 0x7,
    /// A blank or non-blank medium where it should not be.
    BlankCheck = 0x8,
    /// As the vendor says.
    VendorSpecific = 0x9,
    /// A third-party copy failed.
    CopyAborted = 0xA,
    /// The device gave the command up; repeating may cure it.
    AbortedCommand = 0xB,
    /// Not assigned.
    Reserved = 0xC,
    /// A buffered medium overflowed.
    VolumeOverflow = 0xD,
    /// Compared data differ.
    Miscompare = 0xE,
    /// Completed, see the additional code.
    Completed = 0xF,
}

impl SenseKey {
    /// From the low four bits of the field.
    pub fn from_bits(bits: u8) -> Self {
        match bits & 0xF {
            0x0 => Self::NoSense,
            0x1 => Self::RecoveredError,
            0x2 => Self::NotReady,
            0x3 => Self::MediumError,
            0x4 => Self::HardwareError,
            0x5 => Self::IllegalRequest,
            0x6 => Self::UnitAttention,
            0x7 => Self::DataProtect,
            0x8 => Self::BlankCheck,
            0x9 => Self::VendorSpecific,
            0xA => Self::CopyAborted,
            0xB => Self::AbortedCommand,
            0xD => Self::VolumeOverflow,
            0xE => Self::Miscompare,
            0xF => Self::Completed,
            _ => Self::Reserved,
        }
    }
}

impl fmt::Display for SenseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoSense => "NO SENSE",
            Self::RecoveredError => "RECOVERED ERROR",
            Self::NotReady => "NOT READY",
            Self::MediumError => "MEDIUM ERROR",
            Self::HardwareError => "HARDWARE ERROR",
            Self::IllegalRequest => "ILLEGAL REQUEST",
            Self::UnitAttention => "UNIT ATTENTION",
            Self::DataProtect => "DATA PROTECT",
            Self::BlankCheck => "BLANK CHECK",
            Self::VendorSpecific => "VENDOR SPECIFIC",
            Self::CopyAborted => "COPY ABORTED",
            Self::AbortedCommand => "ABORTED COMMAND",
            Self::Reserved => "RESERVED",
            Self::VolumeOverflow => "VOLUME OVERFLOW",
            Self::Miscompare => "MISCOMPARE",
            Self::Completed => "COMPLETED",
        })
    }
}

/// Additional sense code and qualifier as one number, `ASC << 8 | ASCQ`, by the names of SPC-4 annex D.2.
pub mod asc {
    /// NO ADDITIONAL SENSE INFORMATION.
    pub const NONE: u16 = 0x0000;
    /// LOGICAL UNIT NOT READY, CAUSE NOT REPORTABLE.
    pub const NOT_READY: u16 = 0x0400;
    /// LOGICAL UNIT IS IN PROCESS OF BECOMING READY.
    pub const BECOMING_READY: u16 = 0x0401;
    /// LOGICAL UNIT NOT READY, INITIALIZING COMMAND REQUIRED.
    pub const INITIALIZING_REQUIRED: u16 = 0x0402;
    /// LOGICAL UNIT NOT ACCESSIBLE, ASYMMETRIC ACCESS STATE TRANSITION.
    pub const ALUA_TRANSITION: u16 = 0x040A;
    /// LOGICAL UNIT NOT ACCESSIBLE, TARGET PORT IN STANDBY STATE.
    pub const ALUA_STANDBY: u16 = 0x040B;
    /// LOGICAL UNIT NOT ACCESSIBLE, TARGET PORT IN UNAVAILABLE STATE.
    pub const ALUA_UNAVAILABLE: u16 = 0x040C;
    /// LOGICAL UNIT NOT READY, SPACE ALLOCATION IN PROGRESS.
    pub const SPACE_ALLOCATION_IN_PROGRESS: u16 = 0x0414;
    /// WRITE ERROR.
    pub const WRITE_ERROR: u16 = 0x0C00;
    /// UNEXPECTED UNSOLICITED DATA (RFC 7143 11.4.7.2).
    pub const UNEXPECTED_UNSOLICITED_DATA: u16 = 0x0C0C;
    /// INCORRECT AMOUNT OF DATA (RFC 7143 11.4.7.2).
    pub const INCORRECT_AMOUNT_OF_DATA: u16 = 0x0C0D;
    /// UNRECOVERED READ ERROR.
    pub const UNRECOVERED_READ_ERROR: u16 = 0x1100;
    /// PARAMETER LIST LENGTH ERROR.
    pub const PARAMETER_LIST_LENGTH: u16 = 0x1A00;
    /// MISCOMPARE DURING VERIFY OPERATION.
    pub const MISCOMPARE: u16 = 0x1D00;
    /// INVALID COMMAND OPERATION CODE.
    pub const INVALID_OPCODE: u16 = 0x2000;
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE.
    pub const LBA_OUT_OF_RANGE: u16 = 0x2100;
    /// INVALID FIELD IN CDB.
    pub const INVALID_FIELD_IN_CDB: u16 = 0x2400;
    /// LOGICAL UNIT NOT SUPPORTED.
    pub const LUN_NOT_SUPPORTED: u16 = 0x2500;
    /// INVALID FIELD IN PARAMETER LIST.
    pub const INVALID_FIELD_IN_PARAMETERS: u16 = 0x2600;
    /// WRITE PROTECTED.
    pub const WRITE_PROTECTED: u16 = 0x2700;
    /// SPACE ALLOCATION FAILED WRITE PROTECT.
    pub const SPACE_ALLOCATION_FAILED: u16 = 0x2707;
    /// NOT READY TO READY CHANGE, MEDIUM MAY HAVE CHANGED.
    pub const MEDIUM_CHANGED: u16 = 0x2800;
    /// POWER ON, RESET, OR BUS DEVICE RESET OCCURRED.
    pub const POWER_ON_OR_RESET: u16 = 0x2900;
    /// I_T NEXUS LOSS OCCURRED.
    pub const NEXUS_LOSS: u16 = 0x2907;
    /// PARAMETERS CHANGED.
    pub const PARAMETERS_CHANGED: u16 = 0x2A00;
    /// MODE PARAMETERS CHANGED.
    pub const MODE_PARAMETERS_CHANGED: u16 = 0x2A01;
    /// ASYMMETRIC ACCESS STATE CHANGED.
    pub const ALUA_STATE_CHANGED: u16 = 0x2A06;
    /// CAPACITY DATA HAS CHANGED.
    pub const CAPACITY_CHANGED: u16 = 0x2A09;
    /// COMMANDS CLEARED BY ANOTHER INITIATOR.
    pub const COMMANDS_CLEARED: u16 = 0x2F00;
    /// THIN PROVISIONING SOFT THRESHOLD REACHED.
    pub const THIN_THRESHOLD: u16 = 0x3807;
    /// SAVING PARAMETERS NOT SUPPORTED.
    pub const SAVING_NOT_SUPPORTED: u16 = 0x3900;
    /// MEDIUM NOT PRESENT.
    pub const MEDIUM_NOT_PRESENT: u16 = 0x3A00;
    /// TARGET OPERATING CONDITIONS HAVE CHANGED.
    pub const OPERATING_CONDITIONS_CHANGED: u16 = 0x3F00;
    /// INQUIRY DATA HAS CHANGED.
    pub const INQUIRY_CHANGED: u16 = 0x3F03;
    /// REPORTED LUNS DATA HAS CHANGED.
    pub const LUNS_CHANGED: u16 = 0x3F0E;
    /// INTERNAL TARGET FAILURE.
    pub const INTERNAL_TARGET_FAILURE: u16 = 0x4400;
    /// PROTOCOL SERVICE CRC ERROR (RFC 7143 11.4.7.2).
    pub const PROTOCOL_SERVICE_CRC: u16 = 0x4705;
    /// SOME COMMANDS CLEARED BY ISCSI PROTOCOL EVENT.
    pub const CLEARED_BY_ISCSI_EVENT: u16 = 0x477F;
    /// OVERLAPPED COMMANDS ATTEMPTED.
    pub const OVERLAPPED_COMMANDS: u16 = 0x4E00;
    /// INSUFFICIENT RESOURCES.
    pub const INSUFFICIENT_RESOURCES: u16 = 0x5503;

    /// The code in words; codes not in the table give the empty string.
    pub fn name(code: u16) -> &'static str {
        match code {
            NONE => "no additional sense information",
            NOT_READY => "logical unit not ready, cause not reportable",
            BECOMING_READY => "logical unit is in process of becoming ready",
            INITIALIZING_REQUIRED => "logical unit not ready, initializing command required",
            0x0403 => "logical unit not ready, manual intervention required",
            0x0404 => "logical unit not ready, format in progress",
            0x0407 => "logical unit not ready, operation in progress",
            0x0409 => "logical unit not ready, self-test in progress",
            ALUA_TRANSITION => "logical unit not accessible, asymmetric access state transition",
            ALUA_STANDBY => "logical unit not accessible, target port in standby state",
            ALUA_UNAVAILABLE => "logical unit not accessible, target port in unavailable state",
            SPACE_ALLOCATION_IN_PROGRESS => "logical unit not ready, space allocation in progress",
            0x0800 => "logical unit communication failure",
            WRITE_ERROR => "write error",
            UNEXPECTED_UNSOLICITED_DATA => "write error, unexpected unsolicited data",
            INCORRECT_AMOUNT_OF_DATA => "write error, not enough unsolicited data",
            UNRECOVERED_READ_ERROR => "unrecovered read error",
            PARAMETER_LIST_LENGTH => "parameter list length error",
            MISCOMPARE => "miscompare during verify operation",
            INVALID_OPCODE => "invalid command operation code",
            LBA_OUT_OF_RANGE => "logical block address out of range",
            INVALID_FIELD_IN_CDB => "invalid field in CDB",
            LUN_NOT_SUPPORTED => "logical unit not supported",
            INVALID_FIELD_IN_PARAMETERS => "invalid field in parameter list",
            WRITE_PROTECTED => "write protected",
            SPACE_ALLOCATION_FAILED => "space allocation failed, write protect",
            MEDIUM_CHANGED => "not ready to ready change, medium may have changed",
            POWER_ON_OR_RESET => "power on, reset, or bus device reset occurred",
            0x2901 => "power on occurred",
            0x2902 => "SCSI bus reset occurred",
            0x2903 => "bus device reset function occurred",
            0x2904 => "device internal reset",
            NEXUS_LOSS => "I_T nexus loss occurred",
            PARAMETERS_CHANGED => "parameters changed",
            MODE_PARAMETERS_CHANGED => "mode parameters changed",
            0x2A03 => "reservations preempted",
            0x2A04 => "reservations released",
            0x2A05 => "registrations preempted",
            ALUA_STATE_CHANGED => "asymmetric access state changed",
            CAPACITY_CHANGED => "capacity data has changed",
            COMMANDS_CLEARED => "commands cleared by another initiator",
            THIN_THRESHOLD => "thin provisioning soft threshold reached",
            SAVING_NOT_SUPPORTED => "saving parameters not supported",
            MEDIUM_NOT_PRESENT => "medium not present",
            OPERATING_CONDITIONS_CHANGED => "target operating conditions have changed",
            0x3F01 => "microcode has been changed",
            INQUIRY_CHANGED => "inquiry data has changed",
            LUNS_CHANGED => "reported LUNs data has changed",
            INTERNAL_TARGET_FAILURE => "internal target failure",
            0x4700 => "SCSI parity error",
            PROTOCOL_SERVICE_CRC => "protocol service CRC error",
            CLEARED_BY_ISCSI_EVENT => "some commands cleared by iSCSI protocol event",
            OVERLAPPED_COMMANDS => "overlapped commands attempted",
            INSUFFICIENT_RESOURCES => "insufficient resources",
            _ => "",
        }
    }
}

/// Decoded sense data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// The sense key.
    pub key: SenseKey,
    /// `ASC << 8 | ASCQ`, see [`asc`].
    pub code: u16,
    /// About an earlier command, not this one (response codes 71h, 73h).
    pub deferred: bool,
    /// The INFORMATION field if marked valid; for block devices the first LBA concerned.
    pub information: Option<u64>,
}

impl Sense {
    /// Bytes of [`encode_fixed`](Self::encode_fixed).
    pub const FIXED_BYTES: usize = 18;

    /// Current sense data with a key and an additional code.
    pub const fn new(key: SenseKey, code: u16) -> Self {
        Self { key, code, deferred: false, information: None }
    }

    /// Decodes fixed (70h, 71h) or descriptor (72h, 73h) format; `None` if it is neither or too short to hold the
    /// key. Fields behind the end of what was sent read as zero (SPC-4 4.5.3).
    pub fn parse(data: &[u8]) -> Option<Self> {
        let response_code = data.first()? & 0x7F;
        match response_code {
            0x70 | 0x71 => {
                let key = SenseKey::from_bits(*data.get(2)?);
                let valid = data.first()? & 0x80 != 0 && data.len() >= 7;
                Some(Self {
                    key,
                    code: super::be16(data, 12),
                    deferred: response_code == 0x71,
                    information: valid.then(|| u64::from(super::be32(data, 3))),
                })
            }
            0x72 | 0x73 => {
                let key = SenseKey::from_bits(*data.get(1)?);
                Some(Self {
                    key,
                    code: super::be16(data, 2),
                    deferred: response_code == 0x73,
                    information: descriptor_information(data),
                })
            }
            _ => None,
        }
    }

    /// Encodes the fixed format, as most targets send it.
    pub fn encode_fixed(&self) -> [u8; Self::FIXED_BYTES] {
        let mut out = [0; Self::FIXED_BYTES];
        out[0] = if self.deferred { 0x71 } else { 0x70 };
        // The fixed format has 32 bits for INFORMATION; a larger LBA is left out rather than cut (SPC-4 4.5.3).
        if let Some(information) = self.information.and_then(|i| u32::try_from(i).ok()) {
            out[0] |= 0x80;
            out[3..7].copy_from_slice(&information.to_be_bytes());
        }
        out[2] = self.key as u8;
        out[7] = (Self::FIXED_BYTES - 8) as u8;
        out[12..14].copy_from_slice(&self.code.to_be_bytes());
        out
    }

    /// What the initiator of a disk does about it.
    pub fn action(&self) -> Action {
        use SenseKey as K;
        match (self.key, self.code) {
            // What the unit offers may have changed: look again, then repeat.
            (K::UnitAttention, code)
                if code == asc::CAPACITY_CHANGED
                    || code == asc::PARAMETERS_CHANGED
                    || code == asc::MODE_PARAMETERS_CHANGED
                    || code == asc::MEDIUM_CHANGED
                    || code >> 8 == 0x3F =>
            {
                Action::Rescan
            }
            // The unit only tells of an event; the command was not carried out (SAM-5 5.14).
            (K::UnitAttention, _) => Action::Retry,
            (K::NoSense | K::RecoveredError | K::Completed, _) => Action::Log,
            (
                K::NotReady,
                asc::NOT_READY
                | asc::BECOMING_READY
                | asc::ALUA_TRANSITION
                | asc::SPACE_ALLOCATION_IN_PROGRESS
                | 0x0407
                | 0x0409,
            ) => Action::Retry,
            // A device that lost a race in itself, a transport CRC, a nexus loss: the command may be repeated.
            (K::AbortedCommand, _) => Action::Retry,
            (K::DataProtect, asc::SPACE_ALLOCATION_FAILED) => Action::NoSpace,
            (K::IllegalRequest, asc::INVALID_OPCODE) => Action::Unsupported,
            (K::IllegalRequest, asc::INVALID_FIELD_IN_CDB | asc::INVALID_FIELD_IN_PARAMETERS) => {
                Action::Unsupported
            }
            _ => Action::Fail,
        }
    }
}

/// The first information descriptor (type 00h) of descriptor format sense data, if marked valid (SPC-4 4.5.2.2).
fn descriptor_information(data: &[u8]) -> Option<u64> {
    let end = data.len().min(8 + usize::from(*data.get(7)?));
    let mut at = 8;
    while at + 2 <= end {
        let len = 2 + usize::from(data[at + 1]);
        if data[at] == 0x00 && len >= 12 && at + 12 <= end {
            return (data[at + 2] & 0x80 != 0).then(|| super::be64(data, at + 4));
        }
        at += len;
    }
    None
}

impl fmt::Display for Sense {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:02X}/{:02X}", self.key, self.code >> 8, self.code & 0xFF)?;
        let name = asc::name(self.code);
        if !name.is_empty() && self.code != asc::NONE {
            write!(f, " ({name})")?;
        }
        if let Some(information) = self.information {
            write!(f, " at {information}")?;
        }
        if self.deferred {
            f.write_str(" (deferred)")?;
        }
        Ok(())
    }
}

/// What to do about sense data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Repeat the command, with back-off and a bound.
    Retry,
    /// Read capacity and limits again, then repeat the command.
    Rescan,
    /// The command was carried out; worth a line in the log.
    Log,
    /// Report the failure; repeating will not help.
    Fail,
    /// The logical unit cannot do this.
    Unsupported,
    /// A thinly provisioned unit has no room; may work after an administrator added some.
    NoSpace,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_format_round_trips() {
        let sense = Sense {
            key: SenseKey::MediumError,
            code: asc::UNRECOVERED_READ_ERROR,
            deferred: false,
            information: Some(0x1234_5678),
        };
        assert_eq!(Sense::parse(&sense.encode_fixed()), Some(sense));
        assert_eq!(sense.to_string(), "MEDIUM ERROR 11/00 (unrecovered read error) at 305419896");
    }

    #[test]
    fn descriptor_format_is_read() {
        let mut data = vec![0x72, 0x06, 0x2A, 0x09, 0, 0, 0, 12, 0x00, 0x0A, 0x80, 0];
        data.extend_from_slice(&0x1_0000_0001u64.to_be_bytes());
        let sense = Sense::parse(&data).unwrap();
        assert_eq!((sense.key, sense.code), (SenseKey::UnitAttention, asc::CAPACITY_CHANGED));
        assert_eq!(sense.information, Some(0x1_0000_0001));
        assert_eq!(sense.action(), Action::Rescan);
    }

    #[test]
    fn short_and_foreign_sense_data() {
        assert_eq!(Sense::parse(&[]), None);
        assert_eq!(Sense::parse(&[0x70, 0]), None);
        assert_eq!(Sense::parse(&[0x7F, 0, 6, 0]), None);
        // The key came, the additional code did not.
        assert_eq!(Sense::parse(&[0x70, 0, 6]).unwrap(), Sense::new(SenseKey::UnitAttention, 0));
        // A descriptor that claims more than there is.
        assert_eq!(Sense::parse(&[0x72, 5, 0x24, 0, 0, 0, 0, 200, 0, 250]).unwrap().information, None);
    }

    #[test]
    fn unit_attention_is_never_a_failure() {
        for code in 0..=u16::MAX {
            let action = Sense::new(SenseKey::UnitAttention, code).action();
            assert!(matches!(action, Action::Retry | Action::Rescan), "{code:#06x}: {action:?}");
        }
    }

    #[test]
    fn thin_provisioning_out_of_space_is_told_apart() {
        assert_eq!(Sense::new(SenseKey::DataProtect, asc::SPACE_ALLOCATION_FAILED).action(), Action::NoSpace);
        assert_eq!(Sense::new(SenseKey::DataProtect, asc::WRITE_PROTECTED).action(), Action::Fail);
    }
}
