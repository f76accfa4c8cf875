//! Text Request and Response (RFC 7143 11.10, 11.11).

use super::{Bhs, Itt, Opcode, Pdu, PduError, TargetSn, Ttt, expect};
use crate::scsi::lun::Lun;
use crate::serial::Serial;

fn final_and_continue(bhs: &Bhs, pdu: Opcode) -> Result<(bool, bool), PduError> {
    match (bhs.flag(0x80), bhs.flag(0x40)) {
        (true, true) => Err(PduError::Format { pdu, what: "final and continue bit together" }),
        bits => Ok(bits),
    }
}

/// Text Request (11.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextRequest {
    /// Marked for immediate delivery: CmdSN does not advance.
    pub immediate: bool,
    /// F: the initiator has nothing more to say.
    pub final_bit: bool,
    /// C: the text goes on in the next PDU. Not together with `final_bit`.
    pub continues: bool,
    /// Bytes of text.
    pub data_len_bytes: u32,
    /// Copied from the response, with its `ttt`.
    pub lun: Lun,
    /// One tag for the whole negotiation.
    pub itt: Itt,
    /// None in the first request (which resets an earlier negotiation), then the target's tag.
    pub ttt: Ttt,
    /// CmdSN.
    pub cmd_sn: Serial,
    /// ExpStatSN.
    pub exp_stat_sn: Serial,
}

impl Pdu for TextRequest {
    const OPCODE: Opcode = Opcode::TextRequest;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        let (final_bit, continues) = final_and_continue(bhs, Self::OPCODE)?;
        Ok(Self {
            immediate: bhs.immediate(),
            final_bit,
            continues,
            data_len_bytes: bhs.data_len_bytes(),
            lun: bhs.lun(),
            itt: bhs.itt(),
            ttt: Ttt(bhs.u32_at(20)),
            cmd_sn: bhs.sn_at(24),
            exp_stat_sn: bhs.sn_at(28),
        })
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_immediate(self.immediate);
        bhs.set_flag(0x80, self.final_bit);
        bhs.set_flag(0x40, self.continues);
        bhs.set_data_len(self.data_len_bytes);
        bhs.put_lun(self.lun);
        bhs.put_u32(16, self.itt.0);
        bhs.put_u32(20, self.ttt.0);
        bhs.put_sn(24, self.cmd_sn);
        bhs.put_sn(28, self.exp_stat_sn);
        bhs
    }
}

/// Text Response (11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextResponse {
    /// F: the negotiation is over, and `ttt` is none.
    pub final_bit: bool,
    /// C: the text goes on in the next PDU. Not together with `final_bit`.
    pub continues: bool,
    /// Bytes of text.
    pub data_len_bytes: u32,
    /// To be copied into the next request, with `ttt`.
    pub lun: Lun,
    /// As in the request.
    pub itt: Itt,
    /// The target's tag while the negotiation goes on.
    pub ttt: Ttt,
    /// The target's counters; StatSN advances.
    pub sn: TargetSn,
}

impl Pdu for TextResponse {
    const OPCODE: Opcode = Opcode::TextResponse;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        let (final_bit, continues) = final_and_continue(bhs, Self::OPCODE)?;
        Ok(Self {
            final_bit,
            continues,
            data_len_bytes: bhs.data_len_bytes(),
            lun: bhs.lun(),
            itt: bhs.itt(),
            ttt: Ttt(bhs.u32_at(20)),
            sn: TargetSn::decode(bhs),
        })
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_flag(0x80, self.final_bit);
        bhs.set_flag(0x40, self.continues);
        bhs.set_data_len(self.data_len_bytes);
        bhs.put_lun(self.lun);
        bhs.put_u32(16, self.itt.0);
        bhs.put_u32(20, self.ttt.0);
        self.sn.encode(&mut bhs);
        bhs
    }
}
