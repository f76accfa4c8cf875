//! SNACK Request (RFC 7143 11.16), used from error recovery level 1 on.

use super::{Bhs, Itt, Opcode, Pdu, PduError, expect};
use crate::scsi::lun::Lun;
use crate::serial::Serial;

super::codes! {
    /// What is asked for (11.16.1).
    SnackType {
        DataOrR2t = 0: "Data/R2T SNACK",
        Status = 1: "Status SNACK",
        DataAck = 2: "DataACK",
        RData = 3: "R-Data SNACK",
    }
}

/// SNACK Request (11.16).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snack {
    /// What is asked for (four bits).
    pub kind: SnackType,
    /// Of the Data-In acknowledged; else reserved.
    pub lun: Lun,
    /// The task's tag; none for status and DataACK.
    pub itt: Itt,
    /// Target transfer tag for DataACK, SNACK tag for R-Data, else none.
    pub tag: u32,
    /// ExpStatSN.
    pub exp_stat_sn: Serial,
    /// First number asked for, or the next expected for DataACK.
    pub beg_run: u32,
    /// How many; 0 means all from `beg_run` on.
    pub run_length: u32,
}

impl Pdu for Snack {
    const OPCODE: Opcode = Opcode::Snack;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        Ok(Self {
            kind: SnackType::from_code(bhs.0[1] & 0x0F),
            lun: bhs.lun(),
            itt: bhs.itt(),
            tag: bhs.u32_at(20),
            exp_stat_sn: bhs.sn_at(28),
            beg_run: bhs.u32_at(40),
            run_length: bhs.u32_at(44),
        })
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.0[1] = 0x80 | (self.kind.code() & 0x0F);
        bhs.put_lun(self.lun);
        bhs.put_u32(16, self.itt.0);
        bhs.put_u32(20, self.tag);
        bhs.put_sn(28, self.exp_stat_sn);
        bhs.put_u32(40, self.beg_run);
        bhs.put_u32(44, self.run_length);
        bhs
    }
}
