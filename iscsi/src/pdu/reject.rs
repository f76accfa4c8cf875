//! Reject (RFC 7143 11.17): the target could not take a PDU.

use super::{Bhs, Opcode, Pdu, PduError, TargetSn, expect};
use crate::serial::Serial;

super::codes! {
    /// Why a PDU was rejected (11.17.1).
    RejectReason {
        DataDigest = 0x02: "data digest error",
        SnackReject = 0x03: "SNACK reject",
        Protocol = 0x04: "protocol error",
        Unsupported = 0x05: "command not supported",
        TooManyImmediate = 0x06: "immediate command reject: too many immediate commands",
        TaskInProgress = 0x07: "task in progress",
        InvalidDataAck = 0x08: "invalid data ACK",
        InvalidField = 0x09: "invalid PDU field",
        NoResources = 0x0A: "long operation reject: out of resources",
        NegotiationReset = 0x0B: "negotiation reset",
        WaitingForLogout = 0x0C: "waiting for logout",
    }
}

impl RejectReason {
    /// Whether the initiator may send the original PDU again (11.17.1).
    #[must_use]
    pub const fn may_resend(self) -> bool {
        matches!(self, Self::DataDigest | Self::TooManyImmediate | Self::NoResources)
    }
}

/// Reject (11.17). Its data segment is the complete header of the rejected PDU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reject {
    /// Why.
    pub reason: RejectReason,
    /// Bytes of the rejected header.
    pub data_len_bytes: u32,
    /// The target's counters; StatSN advances.
    pub sn: TargetSn,
    /// DataSN or R2TSN: the next number that the target sends for the command, for data PDUs; else reserved.
    pub data_sn: Serial,
}

impl Pdu for Reject {
    const OPCODE: Opcode = Opcode::Reject;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        Ok(Self {
            reason: RejectReason::from_code(bhs.0[2]),
            data_len_bytes: bhs.data_len_bytes(),
            sn: TargetSn::decode(bhs),
            data_sn: bhs.sn_at(36),
        })
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_flag(0x80, true);
        bhs.0[2] = self.reason.code();
        bhs.set_data_len(self.data_len_bytes);
        bhs.put_u32(16, 0xFFFF_FFFF);
        self.sn.encode(&mut bhs);
        bhs.put_sn(36, self.data_sn);
        bhs
    }
}
