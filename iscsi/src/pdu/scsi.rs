//! SCSI Command and SCSI Response (RFC 7143 11.3, 11.4).

use super::{Bhs, Itt, Opcode, Pdu, PduError, TargetSn, expect};
use crate::scsi::lun::Lun;
use crate::serial::Serial;

/// SAM task attributes as a SCSI Command carries them (11.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum TaskAttribute {
    /// Untagged (0): the target treats it as simple.
    Untagged,
    /// Simple (1).
    #[default]
    Simple,
    /// Ordered (2).
    Ordered,
    /// Head of queue (3).
    HeadOfQueue,
    /// ACA (4).
    Aca,
    /// Reserved values 5 to 7; a target refuses them.
    Reserved(u8),
}

impl TaskAttribute {
    const fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::Untagged,
            1 => Self::Simple,
            2 => Self::Ordered,
            3 => Self::HeadOfQueue,
            4 => Self::Aca,
            other => Self::Reserved(other),
        }
    }

    const fn bits(self) -> u8 {
        match self {
            Self::Untagged => 0,
            Self::Simple => 1,
            Self::Ordered => 2,
            Self::HeadOfQueue => 3,
            Self::Aca => 4,
            Self::Reserved(bits) => bits & 7,
        }
    }
}

/// SCSI Command (11.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScsiCommand {
    /// Marked for immediate delivery: CmdSN does not advance.
    pub immediate: bool,
    /// F: no unsolicited Data-Out follows.
    pub final_bit: bool,
    /// R: input data is expected.
    pub read: bool,
    /// W: output data is expected.
    pub write: bool,
    /// Task attribute.
    pub attribute: TaskAttribute,
    /// Bytes of additional header segments ([`super::ahs`]), a multiple of four.
    pub ahs_len_bytes: usize,
    /// Bytes of immediate data.
    pub data_len_bytes: u32,
    /// Logical unit.
    pub lun: Lun,
    /// The task's tag.
    pub itt: Itt,
    /// Expected data transfer length: bytes that the CDB asks to transfer (for bidirectional commands, the output).
    pub expected_len_bytes: u32,
    /// CmdSN.
    pub cmd_sn: Serial,
    /// ExpStatSN.
    pub exp_stat_sn: Serial,
    /// The command descriptor block, zero-padded; what exceeds 16 bytes is in an additional header segment.
    pub cdb: [u8; 16],
}

impl Pdu for ScsiCommand {
    const OPCODE: Opcode = Opcode::ScsiCommand;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        Ok(Self {
            immediate: bhs.immediate(),
            final_bit: bhs.flag(0x80),
            read: bhs.flag(0x40),
            write: bhs.flag(0x20),
            attribute: TaskAttribute::from_bits(bhs.0[1]),
            ahs_len_bytes: bhs.ahs_len_bytes(),
            data_len_bytes: bhs.data_len_bytes(),
            lun: bhs.lun(),
            itt: bhs.itt(),
            expected_len_bytes: bhs.u32_at(20),
            cmd_sn: bhs.sn_at(24),
            exp_stat_sn: bhs.sn_at(28),
            cdb: bhs.array_at(32),
        })
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_immediate(self.immediate);
        bhs.set_flag(0x80, self.final_bit);
        bhs.set_flag(0x40, self.read);
        bhs.set_flag(0x20, self.write);
        bhs.0[1] |= self.attribute.bits();
        bhs.set_ahs_len(self.ahs_len_bytes);
        bhs.set_data_len(self.data_len_bytes);
        bhs.put_lun(self.lun);
        bhs.put_u32(16, self.itt.0);
        bhs.put_u32(20, self.expected_len_bytes);
        bhs.put_sn(24, self.cmd_sn);
        bhs.put_sn(28, self.exp_stat_sn);
        bhs.put(32, self.cdb);
        bhs
    }
}

super::codes! {
    /// Whether the target carried the command out (11.4.3). In all cases but the first, the SCSI status and the
    /// residual are without meaning and the command has failed.
    ScsiResponseCode {
        Completed = 0x00: "command completed at target",
        TargetFailure = 0x01: "target failure",
    }
}

/// How far a transfer missed the expected length (11.4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Residual {
    /// Exactly the expected length.
    #[default]
    None,
    /// U: this many bytes of the expected length were not transferred.
    Underflow(u32),
    /// O: this many bytes would have followed.
    Overflow(u32),
}

impl Residual {
    /// Of the bits O and U and the count; `None` for both bits.
    #[inline]
    pub(super) const fn from_bits(overflow: bool, underflow: bool, count: u32) -> Option<Self> {
        match (overflow, underflow) {
            (false, false) => Some(Self::None),
            (false, true) => Some(Self::Underflow(count)),
            (true, false) => Some(Self::Overflow(count)),
            (true, true) => None,
        }
    }

    /// The bits O and U and the count.
    #[inline]
    pub(super) const fn to_bits(self) -> (bool, bool, u32) {
        match self {
            Self::None => (false, false, 0),
            Self::Underflow(count) => (false, true, count),
            Self::Overflow(count) => (true, false, count),
        }
    }
}

/// SCSI Response (11.4). Its data segment has the sense data behind a two-byte length, then response data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScsiResponse {
    /// Whether the target carried the command out: look at it first.
    pub response: ScsiResponseCode,
    /// The SCSI status byte (SAM-5 5.3.1), valid with [`ScsiResponseCode::Completed`].
    pub status: u8,
    /// The residual of the transfer; [`Residual::None`] if `response` is not [`ScsiResponseCode::Completed`].
    pub residual: Residual,
    /// The residual of the read half of a bidirectional command; like `residual`.
    pub bidi_residual: Residual,
    /// Bytes of sense and response data.
    pub data_len_bytes: u32,
    /// The task's tag.
    pub itt: Itt,
    /// SNACK tag; 0 unless the target resegmented data.
    pub snack_tag: u32,
    /// The target's counters; StatSN advances.
    pub sn: TargetSn,
    /// ExpDataSN: how many Data-In and R2T PDUs the target sent for the command (11.4.8).
    pub exp_data_sn: Serial,
}

/// SAM-5 status CHECK CONDITION.
const CHECK_CONDITION: u8 = 0x02;

impl Pdu for ScsiResponse {
    const OPCODE: Opcode = Opcode::ScsiResponse;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        let format = |what| PduError::Format { pdu: Self::OPCODE, what };
        let response = ScsiResponseCode::from_code(bhs.0[2]);
        let (residual, bidi_residual) = if response == ScsiResponseCode::Completed {
            // 7.7 names this one: a check condition always brings its sense data.
            if bhs.0[3] == CHECK_CONDITION && bhs.data_len_bytes() == 0 {
                return Err(format("check condition without sense data"));
            }
            (
                Residual::from_bits(bhs.flag(0x04), bhs.flag(0x02), bhs.u32_at(44))
                    .ok_or(format("both overflow and underflow"))?,
                Residual::from_bits(bhs.flag(0x10), bhs.flag(0x08), bhs.u32_at(40))
                    .ok_or(format("both bidirectional overflow and underflow"))?,
            )
        } else {
            (Residual::None, Residual::None)
        };
        Ok(Self {
            response,
            status: bhs.0[3],
            residual,
            bidi_residual,
            data_len_bytes: bhs.data_len_bytes(),
            itt: bhs.itt(),
            snack_tag: bhs.u32_at(20),
            sn: TargetSn::decode(bhs),
            exp_data_sn: bhs.sn_at(36),
        })
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        let (overflow, underflow, count) = self.residual.to_bits();
        let (bidi_overflow, bidi_underflow, bidi_count) = self.bidi_residual.to_bits();
        bhs.set_flag(0x80, true);
        bhs.set_flag(0x10, bidi_overflow);
        bhs.set_flag(0x08, bidi_underflow);
        bhs.set_flag(0x04, overflow);
        bhs.set_flag(0x02, underflow);
        bhs.0[2] = self.response.code();
        bhs.0[3] = self.status;
        bhs.set_data_len(self.data_len_bytes);
        bhs.put_u32(16, self.itt.0);
        bhs.put_u32(20, self.snack_tag);
        self.sn.encode(&mut bhs);
        bhs.put_sn(36, self.exp_data_sn);
        bhs.put_u32(40, bidi_count);
        bhs.put_u32(44, count);
        bhs
    }
}
