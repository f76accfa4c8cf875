//! Data-Out, Data-In and Ready To Transfer (RFC 7143 11.7, 11.8).

use super::{Bhs, Itt, Opcode, Pdu, PduError, Residual, TargetSn, Ttt, expect};
use crate::scsi::lun::Lun;
use crate::serial::Serial;

/// SCSI Data-Out (11.7): unsolicited, or in answer to an R2T.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataOut {
    /// F: last PDU of the sequence.
    pub final_bit: bool,
    /// Bytes of data.
    pub data_len_bytes: u32,
    /// The R2T's LUN; for unsolicited data the command's or zero (valid only with a `ttt`).
    pub lun: Lun,
    /// The task's tag.
    pub itt: Itt,
    /// The R2T's tag; none for unsolicited data.
    pub ttt: Ttt,
    /// ExpStatSN.
    pub exp_stat_sn: Serial,
    /// Number of the PDU in its sequence, from 0.
    pub data_sn: Serial,
    /// Where the data belongs in the command's output, in bytes.
    pub offset_bytes: u32,
}

impl Pdu for DataOut {
    const OPCODE: Opcode = Opcode::DataOut;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        Ok(Self {
            final_bit: bhs.flag(0x80),
            data_len_bytes: bhs.data_len_bytes(),
            lun: bhs.lun(),
            itt: bhs.itt(),
            ttt: Ttt(bhs.u32_at(20)),
            exp_stat_sn: bhs.sn_at(28),
            data_sn: bhs.sn_at(36),
            offset_bytes: bhs.u32_at(40),
        })
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_flag(0x80, self.final_bit);
        bhs.set_data_len(self.data_len_bytes);
        bhs.put_lun(self.lun);
        bhs.put_u32(16, self.itt.0);
        bhs.put_u32(20, self.ttt.0);
        bhs.put_sn(28, self.exp_stat_sn);
        bhs.put_sn(36, self.data_sn);
        bhs.put_u32(40, self.offset_bytes);
        bhs
    }
}

/// The status that a last Data-In may carry in place of a SCSI Response (S bit, 11.7.3): the command completed and has
/// no sense data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataInStatus {
    /// The SCSI status byte.
    pub status: u8,
    /// The residual of the transfer.
    pub residual: Residual,
    /// StatSN; advances.
    pub stat_sn: Serial,
}

/// SCSI Data-In (11.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataIn {
    /// F: last PDU of the sequence.
    pub final_bit: bool,
    /// A: the target wants this sequence acknowledged by SNACK; ignored at error recovery level 0 (11.7.2).
    pub ack: bool,
    /// Status, if it came with the data.
    pub status: Option<DataInStatus>,
    /// Bytes of data; 0 is allowed (11.7.7).
    pub data_len_bytes: u32,
    /// Valid with a `ttt`.
    pub lun: Lun,
    /// The task's tag.
    pub itt: Itt,
    /// The tag to acknowledge with, if `ack`; else none.
    pub ttt: Ttt,
    /// ExpCmdSN.
    pub exp_cmd_sn: Serial,
    /// MaxCmdSN.
    pub max_cmd_sn: Serial,
    /// Number of the PDU in the command, from 0, counted together with R2Ts for bidirectional commands.
    pub data_sn: Serial,
    /// Where the data belongs in the command's input, in bytes.
    pub offset_bytes: u32,
}

impl Pdu for DataIn {
    const OPCODE: Opcode = Opcode::DataIn;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        let format = |what| PduError::Format { pdu: Self::OPCODE, what };
        let final_bit = bhs.flag(0x80);
        let status = if bhs.flag(0x01) {
            if !final_bit {
                return Err(format("status without the final bit"));
            }
            Some(DataInStatus {
                status: bhs.0[3],
                residual: Residual::from_bits(bhs.flag(0x04), bhs.flag(0x02), bhs.u32_at(44))
                    .ok_or(format("both overflow and underflow"))?,
                stat_sn: bhs.sn_at(24),
            })
        } else {
            None
        };
        Ok(Self {
            final_bit,
            ack: bhs.flag(0x40),
            status,
            data_len_bytes: bhs.data_len_bytes(),
            lun: bhs.lun(),
            itt: bhs.itt(),
            ttt: Ttt(bhs.u32_at(20)),
            exp_cmd_sn: bhs.sn_at(28),
            max_cmd_sn: bhs.sn_at(32),
            data_sn: bhs.sn_at(36),
            offset_bytes: bhs.u32_at(40),
        })
    }

    /// With a status the final bit is set, whatever `final_bit` says.
    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_flag(0x80, self.final_bit);
        bhs.set_flag(0x40, self.ack);
        if let Some(status) = self.status {
            let (overflow, underflow, count) = status.residual.to_bits();
            bhs.set_flag(0x80, true);
            bhs.set_flag(0x04, overflow);
            bhs.set_flag(0x02, underflow);
            bhs.set_flag(0x01, true);
            bhs.0[3] = status.status;
            bhs.put_sn(24, status.stat_sn);
            bhs.put_u32(44, count);
        }
        bhs.set_data_len(self.data_len_bytes);
        bhs.put_lun(self.lun);
        bhs.put_u32(16, self.itt.0);
        bhs.put_u32(20, self.ttt.0);
        bhs.put_sn(28, self.exp_cmd_sn);
        bhs.put_sn(32, self.max_cmd_sn);
        bhs.put_sn(36, self.data_sn);
        bhs.put_u32(40, self.offset_bytes);
        bhs
    }
}

/// Ready To Transfer (11.8): the target asks for output data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct R2t {
    /// To be copied into the Data-Out.
    pub lun: Lun,
    /// The task's tag.
    pub itt: Itt,
    /// To be copied into the Data-Out; never none.
    pub ttt: Ttt,
    /// The target's counters; StatSN is the next one and does not advance.
    pub sn: TargetSn,
    /// Number of the R2T in the command, from 0.
    pub r2t_sn: Serial,
    /// Where the wanted data starts in the command's output, in bytes.
    pub offset_bytes: u32,
    /// Bytes wanted, at least 1.
    pub desired_len_bytes: u32,
}

impl Pdu for R2t {
    const OPCODE: Opcode = Opcode::R2t;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        let format = |what| PduError::Format { pdu: Self::OPCODE, what };
        let pdu = Self {
            lun: bhs.lun(),
            itt: bhs.itt(),
            ttt: Ttt(bhs.u32_at(20)),
            sn: TargetSn::decode(bhs),
            r2t_sn: bhs.sn_at(36),
            offset_bytes: bhs.u32_at(40),
            desired_len_bytes: bhs.u32_at(44),
        };
        if pdu.ttt.is_none() {
            return Err(format("no target transfer tag"));
        }
        if pdu.desired_len_bytes == 0 {
            return Err(format("desired data transfer length is 0"));
        }
        if bhs.data_len_bytes() != 0 {
            return Err(format("has a data segment"));
        }
        Ok(pdu)
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_flag(0x80, true);
        bhs.put_lun(self.lun);
        bhs.put_u32(16, self.itt.0);
        bhs.put_u32(20, self.ttt.0);
        self.sn.encode(&mut bhs);
        bhs.put_sn(36, self.r2t_sn);
        bhs.put_u32(40, self.offset_bytes);
        bhs.put_u32(44, self.desired_len_bytes);
        bhs
    }
}
