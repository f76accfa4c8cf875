//! Logout Request and Response (RFC 7143 11.14, 11.15).

use super::{Bhs, Itt, Opcode, Pdu, PduError, TargetSn, expect};
use crate::serial::Serial;

super::codes! {
    /// What to close (11.14.1).
    LogoutReason {
        CloseSession = 0: "close the session",
        CloseConnection = 1: "close the connection",
        RemoveForRecovery = 2: "remove the connection for recovery",
    }
}

/// Logout Request (11.14).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogoutRequest {
    /// Marked for immediate delivery: CmdSN does not advance.
    pub immediate: bool,
    /// What to close.
    pub reason: LogoutReason,
    /// This request's tag.
    pub itt: Itt,
    /// The connection to close; reserved for [`LogoutReason::CloseSession`].
    pub cid: u16,
    /// CmdSN.
    pub cmd_sn: Serial,
    /// ExpStatSN.
    pub exp_stat_sn: Serial,
}

impl Pdu for LogoutRequest {
    const OPCODE: Opcode = Opcode::LogoutRequest;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        Ok(Self {
            immediate: bhs.immediate(),
            reason: LogoutReason::from_code(bhs.0[1] & 0x7F),
            itt: bhs.itt(),
            cid: bhs.u16_at(20),
            cmd_sn: bhs.sn_at(24),
            exp_stat_sn: bhs.sn_at(28),
        })
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_immediate(self.immediate);
        bhs.0[1] = 0x80 | self.reason.code();
        bhs.put_u32(16, self.itt.0);
        bhs.put_u16(20, self.cid);
        bhs.put_sn(24, self.cmd_sn);
        bhs.put_sn(28, self.exp_stat_sn);
        bhs
    }
}

super::codes! {
    /// Outcome of a logout (11.15.1).
    LogoutResponseCode {
        Closed = 0: "connection or session closed successfully",
        NoCid = 1: "CID not found",
        RecoveryUnsupported = 2: "connection recovery is not supported",
        CleanupFailed = 3: "cleanup failed",
    }
}

/// Logout Response (11.15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogoutResponse {
    /// Outcome.
    pub response: LogoutResponseCode,
    /// The request's tag.
    pub itt: Itt,
    /// The target's counters; StatSN advances.
    pub sn: TargetSn,
    /// Time2Wait: seconds before a reconnection; reserved once the session is closed.
    pub time2wait_s: u16,
    /// Time2Retain: seconds for which the target keeps tasks after Time2Wait.
    pub time2retain_s: u16,
}

impl Pdu for LogoutResponse {
    const OPCODE: Opcode = Opcode::LogoutResponse;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        Ok(Self {
            response: LogoutResponseCode::from_code(bhs.0[2]),
            itt: bhs.itt(),
            sn: TargetSn::decode(bhs),
            time2wait_s: bhs.u16_at(40),
            time2retain_s: bhs.u16_at(42),
        })
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_flag(0x80, true);
        bhs.0[2] = self.response.code();
        bhs.put_u32(16, self.itt.0);
        self.sn.encode(&mut bhs);
        bhs.put_u16(40, self.time2wait_s);
        bhs.put_u16(42, self.time2retain_s);
        bhs
    }
}
