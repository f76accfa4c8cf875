//! One command: what is asked, how far it is, how it ended.

use std::time::{Duration, Instant};

use super::Violation;
use crate::scsi::{Cdb, Lun, Sense, Status};
use crate::serial::Serial;

/// Which way a command's data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// No data.
    None,
    /// From the target.
    Read,
    /// To the target.
    Write,
}

/// A SCSI command as the caller asks for it.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    /// Logical unit.
    pub lun: Lun,
    /// Command descriptor block.
    pub cdb: Cdb,
    /// Which way the data goes.
    pub direction: Direction,
    /// Expected data transfer length (11.3.4).
    pub len_bytes: u32,
    /// GOOD with less data than `len_bytes` is damage (block reads and writes), not an answer (INQUIRY).
    pub exact: bool,
    /// From submission to answer; after that the task is aborted.
    pub timeout: Duration,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The target carried it to an end, and all data that the status implies was transferred exactly once.
    Status {
        /// SCSI status.
        status: Status,
        /// Sense data, with CHECK CONDITION.
        sense: Option<Sense>,
        /// Bytes transferred from offset 0 on without a gap.
        transferred_bytes: u32,
    },
    /// The target did not carry it out (11.4.3, response other than 00h). The SCSI status means nothing then.
    TargetFailure {
        /// The response code.
        response: u8,
    },
    /// An answer came, but the data is not what it should be. May be repeated.
    Damaged(Violation),
    /// It took too long and was aborted; the target no longer knows it.
    Aborted,
}

/// Where a task is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The slot is free.
    Free,
    /// Submitted, not sent.
    Queued,
    /// Sent, not answered.
    Active,
}

/// A task slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Task {
    pub(super) state: State,
    /// Of the tag: moves on with every submission.
    pub(super) generation: u16,
    pub(super) command: Command,
    pub(super) cmd_sn: Serial,
    pub(super) deadline: Instant,
    /// Bytes received (in order), or sent.
    pub(super) done_bytes: u32,
    /// Bytes of the Data-In sequence so far.
    pub(super) burst_bytes: u32,
    /// Data-In or R2T PDUs received.
    pub(super) received_pdus: u32,
    /// Where the next R2T must start: output below was sent unsolicited or asked for.
    pub(super) asked_bytes: u32,
    /// R2Ts not yet answered in full.
    pub(super) open_r2ts: u16,
    /// The data cannot be trusted any more; the first reason.
    pub(super) damage: Option<Violation>,
}

impl Task {
    pub(super) fn free(now: Instant) -> Self {
        Self {
            state: State::Free,
            generation: 0,
            command: Command {
                lun: Lun::ZERO,
                cdb: Cdb([0; 16]),
                direction: Direction::None,
                len_bytes: 0,
                exact: false,
                timeout: Duration::ZERO,
            },
            cmd_sn: Serial(0),
            deadline: now,
            done_bytes: 0,
            burst_bytes: 0,
            received_pdus: 0,
            asked_bytes: 0,
            open_r2ts: 0,
            damage: None,
        }
    }
}
