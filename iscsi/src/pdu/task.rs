//! Task Management Function Request and Response (RFC 7143 11.5, 11.6).

use super::{Bhs, Itt, Opcode, Pdu, PduError, TargetSn, expect};
use crate::scsi::lun::Lun;
use crate::serial::Serial;

super::codes! {
    /// Task management functions (11.5.1; those from 9 on are RFC 7144's).
    TaskFunction {
        AbortTask = 1: "ABORT TASK",
        AbortTaskSet = 2: "ABORT TASK SET",
        ClearAca = 3: "CLEAR ACA",
        ClearTaskSet = 4: "CLEAR TASK SET",
        LogicalUnitReset = 5: "LOGICAL UNIT RESET",
        TargetWarmReset = 6: "TARGET WARM RESET",
        TargetColdReset = 7: "TARGET COLD RESET",
        TaskReassign = 8: "TASK REASSIGN",
        QueryTask = 9: "QUERY TASK",
        QueryTaskSet = 10: "QUERY TASK SET",
        ITNexusReset = 11: "I_T NEXUS RESET",
        QueryAsyncEvent = 12: "QUERY ASYNCHRONOUS EVENT",
    }
}

/// Task Management Function Request (11.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskManagementRequest {
    /// Marked for immediate delivery, as it should be.
    pub immediate: bool,
    /// What to do.
    pub function: TaskFunction,
    /// Logical unit; reserved for functions on the whole target.
    pub lun: Lun,
    /// This request's own tag.
    pub itt: Itt,
    /// The tag of the task to act on (ABORT TASK, TASK REASSIGN, QUERY TASK), else none.
    pub referenced_itt: Itt,
    /// CmdSN.
    pub cmd_sn: Serial,
    /// ExpStatSN.
    pub exp_stat_sn: Serial,
    /// RefCmdSN: CmdSN of the task to abort; for other functions reserved.
    pub ref_cmd_sn: Serial,
    /// ExpDataSN, for TASK REASSIGN.
    pub exp_data_sn: Serial,
}

impl Pdu for TaskManagementRequest {
    const OPCODE: Opcode = Opcode::TaskManagementRequest;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        Ok(Self {
            immediate: bhs.immediate(),
            function: TaskFunction::from_code(bhs.0[1] & 0x7F),
            lun: bhs.lun(),
            itt: bhs.itt(),
            referenced_itt: Itt(bhs.u32_at(20)),
            cmd_sn: bhs.sn_at(24),
            exp_stat_sn: bhs.sn_at(28),
            ref_cmd_sn: bhs.sn_at(32),
            exp_data_sn: bhs.sn_at(36),
        })
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_immediate(self.immediate);
        bhs.0[1] = 0x80 | self.function.code();
        bhs.put_lun(self.lun);
        bhs.put_u32(16, self.itt.0);
        bhs.put_u32(20, self.referenced_itt.0);
        bhs.put_sn(24, self.cmd_sn);
        bhs.put_sn(28, self.exp_stat_sn);
        bhs.put_sn(32, self.ref_cmd_sn);
        bhs.put_sn(36, self.exp_data_sn);
        bhs
    }
}

super::codes! {
    /// Outcome of a task management function (11.6.1).
    TaskResponseCode {
        Complete = 0: "function complete",
        NoTask = 1: "task does not exist",
        NoLun = 2: "LUN does not exist",
        StillAllegiant = 3: "task still allegiant",
        ReassignUnsupported = 4: "task allegiance reassignment not supported",
        Unsupported = 5: "task management function not supported",
        AuthorizationFailed = 6: "function authorization failed",
        Succeeded = 7: "function succeeded",
        Rejected = 255: "function rejected",
    }
}

/// Task Management Function Response (11.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskManagementResponse {
    /// Outcome.
    pub response: TaskResponseCode,
    /// The request's tag.
    pub itt: Itt,
    /// The target's counters; StatSN advances.
    pub sn: TargetSn,
}

impl Pdu for TaskManagementResponse {
    const OPCODE: Opcode = Opcode::TaskManagementResponse;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        Ok(Self {
            response: TaskResponseCode::from_code(bhs.0[2]),
            itt: bhs.itt(),
            sn: TargetSn::decode(bhs),
        })
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_flag(0x80, true);
        bhs.0[2] = self.response.code();
        bhs.put_u32(16, self.itt.0);
        self.sn.encode(&mut bhs);
        bhs
    }
}
