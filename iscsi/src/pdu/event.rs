//! Asynchronous Message (RFC 7143 11.9): the target tells something unasked.

use super::{Bhs, Opcode, Pdu, PduError, TargetSn, expect};
use crate::scsi::lun::Lun;

super::codes! {
    /// What happened (11.9.1). What the parameters mean depends on it.
    AsyncEvent {
        Scsi = 0: "SCSI asynchronous event",
        LogoutRequested = 1: "target requests logout",
        ConnectionDropped = 2: "target will drop or has dropped a connection",
        SessionDropped = 3: "target will drop or has dropped all connections of the session",
        NegotiationRequested = 4: "target requests parameter negotiation",
        TaskTermination = 5: "all active tasks of a logical unit are being terminated",
        Vendor = 255: "vendor-specific event",
    }
}

/// Asynchronous Message (11.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsyncMessage {
    /// What happened.
    pub event: AsyncEvent,
    /// AsyncVCode, for vendor-specific events.
    pub vendor_code: u8,
    /// Bytes of sense data (event 0) or vendor data.
    pub data_len_bytes: u32,
    /// Logical unit, for events 0 and 5.
    pub lun: Lun,
    /// The target's counters; StatSN advances.
    pub sn: TargetSn,
    /// CID for event 2; else reserved.
    pub parameter1: u16,
    /// Time2Wait in seconds for events 2 and 3; else reserved.
    pub parameter2: u16,
    /// Time to log out (event 1), Time2Retain (2, 3) or time to negotiate (4), in seconds.
    pub parameter3: u16,
}

impl Pdu for AsyncMessage {
    const OPCODE: Opcode = Opcode::AsyncMessage;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        Ok(Self {
            event: AsyncEvent::from_code(bhs.0[36]),
            vendor_code: bhs.0[37],
            data_len_bytes: bhs.data_len_bytes(),
            lun: bhs.lun(),
            sn: TargetSn::decode(bhs),
            parameter1: bhs.u16_at(38),
            parameter2: bhs.u16_at(40),
            parameter3: bhs.u16_at(42),
        })
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_flag(0x80, true);
        bhs.set_data_len(self.data_len_bytes);
        bhs.put_lun(self.lun);
        bhs.put_u32(16, 0xFFFF_FFFF);
        self.sn.encode(&mut bhs);
        bhs.0[36] = self.event.code();
        bhs.0[37] = self.vendor_code;
        bhs.put_u16(38, self.parameter1);
        bhs.put_u16(40, self.parameter2);
        bhs.put_u16(42, self.parameter3);
        bhs
    }
}
