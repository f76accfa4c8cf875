//! NOP-Out and NOP-In: pings in both directions, and their answers (RFC 7143 11.18, 11.19).

use super::{Bhs, Itt, Opcode, Pdu, PduError, TargetSn, Ttt, expect};
use crate::scsi::lun::Lun;
use crate::serial::Serial;

/// NOP-Out (11.18).
///
/// A ping has an `itt` and [`Ttt::NONE`]. The answer to the target's ping has [`Itt::NONE`], `immediate`, and the
/// ping's `ttt` and `lun`. Neither tag: it only tells ExpStatSN, and no answer comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NopOut {
    /// Marked for immediate delivery: CmdSN does not advance. Must be set if `itt` is none.
    pub immediate: bool,
    /// Bytes of ping data.
    pub data_len_bytes: u32,
    /// The LUN of the NOP-In that is answered; else reserved.
    pub lun: Lun,
    /// The ping's tag, or none.
    pub itt: Itt,
    /// The tag of the NOP-In that is answered, or none.
    pub ttt: Ttt,
    /// CmdSN.
    pub cmd_sn: Serial,
    /// ExpStatSN.
    pub exp_stat_sn: Serial,
}

impl Pdu for NopOut {
    const OPCODE: Opcode = Opcode::NopOut;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        let pdu = Self {
            immediate: bhs.immediate(),
            data_len_bytes: bhs.data_len_bytes(),
            lun: bhs.lun(),
            itt: bhs.itt(),
            ttt: Ttt(bhs.u32_at(20)),
            cmd_sn: bhs.sn_at(24),
            exp_stat_sn: bhs.sn_at(28),
        };
        if pdu.itt.is_none() && !pdu.immediate {
            return Err(PduError::Format { pdu: Self::OPCODE, what: "no task tag, but not immediate" });
        }
        Ok(pdu)
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_immediate(self.immediate);
        bhs.set_flag(0x80, true);
        bhs.set_data_len(self.data_len_bytes);
        bhs.put_lun(self.lun);
        bhs.put_u32(16, self.itt.0);
        bhs.put_u32(20, self.ttt.0);
        bhs.put_sn(24, self.cmd_sn);
        bhs.put_sn(28, self.exp_stat_sn);
        bhs
    }
}

/// NOP-In (11.19).
///
/// The answer to a ping has its `itt` and [`Ttt::NONE`]; its StatSN advances. A ping of the target has [`Itt::NONE`],
/// a `ttt` and a `lun`; with neither tag it only tells the counters. In the latter two cases StatSN is the next one
/// and does not advance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NopIn {
    /// Bytes of ping data returned.
    pub data_len_bytes: u32,
    /// To be copied into the answer, if `ttt` is a tag; else reserved.
    pub lun: Lun,
    /// The tag of the ping that is answered, or none.
    pub itt: Itt,
    /// The target's tag, to be copied into the answer, or none.
    pub ttt: Ttt,
    /// The target's counters.
    pub sn: TargetSn,
}

impl Pdu for NopIn {
    const OPCODE: Opcode = Opcode::NopIn;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        let pdu = Self {
            data_len_bytes: bhs.data_len_bytes(),
            lun: bhs.lun(),
            itt: bhs.itt(),
            ttt: Ttt(bhs.u32_at(20)),
            sn: TargetSn::decode(bhs),
        };
        // 7.7 names this one.
        if !pdu.itt.is_none() && !pdu.ttt.is_none() {
            return Err(PduError::Format { pdu: Self::OPCODE, what: "both task tags are set" });
        }
        Ok(pdu)
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_flag(0x80, true);
        bhs.set_data_len(self.data_len_bytes);
        bhs.put_lun(self.lun);
        bhs.put_u32(16, self.itt.0);
        bhs.put_u32(20, self.ttt.0);
        self.sn.encode(&mut bhs);
        bhs
    }
}
