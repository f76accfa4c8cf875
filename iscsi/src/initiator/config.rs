//! What a session is made with.

use std::time::Duration;

use crate::serial::Serial;

/// Parameters of a [`Session`](super::Session): what login agreed on, where login left the counters, time limits.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Config {
    /// Task slots; the most commands at once. At most [`Config::MAX_SLOTS`].
    pub slots: u16,
    /// CmdSN of the first command: that of the leading login (11.12.8).
    pub cmd_sn: Serial,
    /// StatSN expected next: one after that of the final Login Response.
    pub exp_stat_sn: Serial,
    /// MaxCmdSN of the final Login Response.
    pub max_cmd_sn: Serial,
    /// Connection identifier used at login; named in the Logout.
    pub cid: u16,
    /// InitialR2T (13.10): no unsolicited Data-Out.
    pub initial_r2t: bool,
    /// ImmediateData (13.11).
    pub immediate_data: bool,
    /// FirstBurstLength (13.14) in bytes.
    pub first_burst_bytes: u32,
    /// MaxBurstLength (13.13) in bytes.
    pub max_burst_bytes: u32,
    /// The target's MaxRecvDataSegmentLength (13.12) in bytes: the most that one PDU to it carries.
    pub max_send_bytes: u32,
    /// Our MaxRecvDataSegmentLength in bytes.
    pub max_receive_bytes: u32,
    /// MaxOutstandingR2T (13.17).
    pub max_outstanding_r2t: u16,
    /// CRC32C over headers.
    pub header_digest: bool,
    /// CRC32C over data.
    pub data_digest: bool,
    /// A ping is sent when nothing was received for so long.
    pub nop_interval: Duration,
    /// The connection counts as lost when a ping and all else stays unanswered for so long.
    pub nop_timeout: Duration,
    /// A task management function that takes longer has failed.
    pub task_management_timeout: Duration,
    /// After the target asked for a logout, or the caller did, the session ends without an answer after so long.
    pub logout_timeout: Duration,
}

impl Config {
    /// Upper bound of `slots`: the tags above are those of pings and task management.
    pub const MAX_SLOTS: u16 = 0xFFF0;
    /// Outstanding R2Ts per command that this initiator has room for.
    pub const MAX_OUTSTANDING_R2T: u16 = 16;
}
