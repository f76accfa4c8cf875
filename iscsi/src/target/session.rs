//! The session: what it is made with, what the caller reports to it, and its books.

use std::collections::VecDeque;

use crate::pdu::{
    AsyncMessage, Itt, LogoutResponse, LogoutResponseCode, PduError, ScsiCommand, TargetSn,
    TaskManagementRequest, TaskManagementResponse, TaskResponseCode, TextRequest, TextResponse, Ttt,
};
use crate::scsi::lun::Lun;
use crate::scsi::{Sense, SenseKey, Status};
use crate::serial::Serial;

use super::control::{Answer, Control, own_nop_in};
use super::task::{SENSE_BYTES, State, TagTable, Task, TaskId};

/// Slots for immediate commands, beside those of the window.
pub(super) const IMMEDIATE_SLOTS: usize = 8;
/// Largest window.
const MAX_QUEUE_DEPTH: u16 = 4096;

pub(super) const NO_SN: TargetSn =
    TargetSn { stat_sn: Serial(0), exp_cmd_sn: Serial(0), max_cmd_sn: Serial(0) };

/// What login settled, and the size of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Commands that may be under way; the CmdSN window. 1 to 4096.
    pub queue_depth: u16,
    /// MaxRecvDataSegmentLength that we declared: longest data segment from the initiator, in bytes.
    pub max_recv_segment_bytes: u32,
    /// MaxRecvDataSegmentLength that the initiator declared.
    pub max_send_segment_bytes: u32,
    /// MaxBurstLength in bytes.
    pub max_burst_bytes: u32,
    /// FirstBurstLength in bytes.
    pub first_burst_bytes: u32,
    /// InitialR2T: no unsolicited Data-Out.
    pub initial_r2t: bool,
    /// ImmediateData: data may come with the command.
    pub immediate_data: bool,
    /// MaxOutstandingR2T for each task, 1 to 255.
    pub max_outstanding_r2t: u8,
    /// A discovery session: text, pings and logout only (RFC 7143 4.3).
    pub discovery: bool,
    /// CmdSN expected next: that of the login requests.
    pub exp_cmd_sn: Serial,
    /// StatSN that we send next: one after the last login response's.
    pub stat_sn: Serial,
    /// The connection's CID.
    pub cid: u16,
}

/// What a received PDU asks of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Nothing: the machine dealt with it.
    Handled,
    /// A new command, see [`Session::command`]. Answer with [`Session::complete`] or [`Session::accept_data`] before
    /// the next PDU.
    Command(TaskId),
    /// Data for a command.
    Data(Placement),
    /// The initiator aborted this task: its data is no longer needed, nothing is to be reported.
    Aborted(TaskId),
    /// A task management function on a logical unit or the target. Answer with
    /// [`Session::complete_task_management`].
    TaskManagement(TaskManagementRequest),
    /// Text; the PDU's data is the text. Answer with [`Session::send_text`].
    Text(TextRequest),
    /// The initiator logs out; once [`Session::is_finished`], close the connection.
    Logout,
}

/// Where the data of the PDU just received belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The task.
    pub task: TaskId,
    /// Offset in the task's data.
    pub offset: u32,
    /// Bytes from the start of the data segment to place there; what follows them is not wanted.
    pub len: u32,
    /// All data has come: carry the command out and [`complete`](Session::complete) it.
    pub complete: bool,
}

/// What [`Session::accept_data`] found in the command PDU itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// Bytes from the start of the immediate data to place at offset 0.
    pub immediate_len: u32,
    /// All data has come: carry the command out and [`complete`](Session::complete) it.
    pub complete: bool,
}

/// How a command ended.
#[derive(Clone, Copy, Debug)]
pub struct Completion<'a> {
    /// SCSI status.
    pub status: Status,
    /// For GOOD: bytes that the device had for the initiator. Ignored for writes, whose length is known.
    pub device_len: u32,
    /// Sense data, at most 32 bytes.
    pub sense: &'a [u8],
}

impl Completion<'_> {
    /// A status without data or sense.
    pub const fn status(status: Status) -> Self {
        Self { status, device_len: 0, sense: &[] }
    }
}

/// Why the connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// A header that is not a PDU.
    #[error(transparent)]
    Pdu(#[from] PduError),
    /// A data segment longer than we declared to take.
    #[error("data segment of {len_bytes} bytes exceeds the declared {max_bytes}")]
    SegmentTooLong {
        /// DataSegmentLength.
        len_bytes: u32,
        /// MaxRecvDataSegmentLength.
        max_bytes: u32,
    },
    /// A CmdSN in the window but not the next one: on a single connection the gap can never close (4.2.2.1).
    #[error("CmdSN {got} where {expected} is next")]
    CmdSnGap {
        /// What came.
        got: Serial,
        /// What is next.
        expected: Serial,
    },
    /// A digest error in a PDU whose loss cannot be recovered at error recovery level 0.
    #[error("data digest error in a command")]
    CommandDigest,
}

/// What happened in a session, for metrics. Names say what is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub struct Counters {
    pub pdus_received: u64,
    pub pdus_sent: u64,
    pub commands: u64,
    pub r2ts_sent: u64,
    pub pings: u64,
    pub rejects_sent: u64,
    pub tasks_aborted: u64,
    pub outside_window: u64,
    pub data_discarded: u64,
    pub data_sequence_errors: u64,
    pub data_digest_errors: u64,
}

/// The machine. See the [module](super).
#[derive(Debug)]
pub struct Session {
    pub(super) config: Config,
    pub(super) exp_cmd_sn: Serial,
    pub(super) stat_sn: Serial,
    pub(super) tasks: Box<[Task]>,
    pub(super) free: Vec<u16>,
    /// Commands under way that count against the window, and immediate ones.
    pub(super) in_window: u16,
    pub(super) immediate: u16,
    pub(super) tags: TagTable,
    /// Tasks with something to send, in order; each is in it at most once.
    pub(super) sending: VecDeque<u16>,
    pub(super) control: Control,
    /// The logout response, which goes out after everything else.
    pub(super) logout: Option<LogoutResponse>,
    pub(super) finished: bool,
    pub(super) ping: Option<u32>,
    pub(super) next_ping: u32,
    pub(super) counters: Counters,
}

impl Session {
    /// A session at the start of its full-feature phase.
    pub fn new(mut config: Config) -> Self {
        config.queue_depth = config.queue_depth.clamp(1, MAX_QUEUE_DEPTH);
        config.max_outstanding_r2t = config.max_outstanding_r2t.max(1);
        config.max_send_segment_bytes =
            config.max_send_segment_bytes.clamp(512, crate::pdu::MAX_DATA_SEGMENT_BYTES);
        config.max_burst_bytes = config.max_burst_bytes.max(512);
        let slots = usize::from(config.queue_depth) + IMMEDIATE_SLOTS;
        Self {
            exp_cmd_sn: config.exp_cmd_sn,
            stat_sn: config.stat_sn,
            tasks: vec![Task::default(); slots].into_boxed_slice(),
            // The lowest slot is used first: few tasks stay in few cache lines.
            free: (0..slots as u16).rev().collect(),
            in_window: 0,
            immediate: 0,
            tags: TagTable::new(slots),
            sending: VecDeque::with_capacity(slots),
            control: Control::new(),
            logout: None,
            finished: false,
            ping: None,
            next_ping: 0,
            counters: Counters::default(),
            config,
        }
    }

    /// Number of task slots; every [`TaskId::slot`] is below.
    pub fn slots(&self) -> usize {
        self.tasks.len()
    }

    /// What the session was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Whether there is room for what the next PDU may cause. If not, send first.
    pub fn can_receive(&self) -> bool {
        self.control.has_room() && self.logout.is_none() && !self.finished
    }

    /// Whether the logout response has been sent: close the connection.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// The command of a task.
    pub fn command(&self, task: TaskId) -> ScsiCommand {
        let t = &self.tasks[task.slot()];
        ScsiCommand {
            immediate: t.immediate,
            final_bit: !t.unsolicited_open,
            read: t.read,
            write: t.write,
            attribute: Default::default(),
            ahs_len_bytes: 0,
            data_len_bytes: t.immediate_len,
            lun: t.lun,
            itt: Itt(t.itt),
            expected_len_bytes: t.edtl,
            cmd_sn: t.cmd_sn,
            exp_stat_sn: Serial(0),
            cdb: t.cdb,
        }
    }

    /// The device takes `device_len` bytes for a command that was just announced. If the data is already there,
    /// carry the command out at once. Nothing happens if the task has ended meanwhile.
    pub fn accept_data(&mut self, task: TaskId, device_len: u32) -> Accepted {
        let t = &mut self.tasks[task.slot()];
        if t.generation != task.generation || t.state != State::Started {
            return Accepted { immediate_len: 0, complete: false };
        }
        t.device_len = device_len;
        t.want = if t.write { device_len.min(t.edtl) } else { 0 };
        t.received = t.immediate_len;
        let complete = t.received >= t.want && !t.unsolicited_open;
        t.state = if complete { State::Executing } else { State::Receiving };
        let immediate_len = t.immediate_len.min(t.want);
        if !complete {
            self.solicit(task.slot);
        }
        Accepted { immediate_len, complete }
    }

    /// A command ended. Its status goes out as soon as no more data of the initiator is under way. Nothing happens if
    /// the task was aborted meanwhile.
    pub fn complete(&mut self, task: TaskId, completion: Completion<'_>) {
        let t = &mut self.tasks[task.slot()];
        if t.generation != task.generation
            || !matches!(t.state, State::Started | State::Receiving | State::Executing)
        {
            return;
        }
        t.status = completion.status.0;
        if completion.status == Status::GOOD && t.want == 0 && t.device_len == 0 {
            t.device_len = completion.device_len;
            t.data_len = if t.read { completion.device_len.min(t.edtl) } else { 0 };
        } else {
            t.data_len = 0;
        }
        let sense_len = completion.sense.len().min(SENSE_BYTES);
        t.sense[..sense_len].copy_from_slice(&completion.sense[..sense_len]);
        t.sense_len = sense_len as u8;
        if t.expects_data() {
            t.state = State::Draining;
        } else {
            t.state = State::Sending;
            self.enqueue(task.slot);
        }
    }

    /// Ends tasks, of one logical unit or all, without an answer to the initiator; `ended` is told of each.
    pub fn abort_tasks(&mut self, lun: Option<Lun>, mut ended: impl FnMut(TaskId)) {
        for slot in 0..self.tasks.len() as u16 {
            let t = &self.tasks[usize::from(slot)];
            if t.state != State::Free && lun.is_none_or(|lun| lun.number() == t.lun.number()) {
                let task = self.id(slot);
                self.abort(slot);
                ended(task);
            }
        }
    }

    /// Answers a task management function.
    pub fn complete_task_management(&mut self, itt: Itt, response: TaskResponseCode) {
        let answer = TaskManagementResponse { response, itt, sn: NO_SN };
        self.control.push(Answer::TaskManagement(answer), Vec::new());
    }

    /// Answers text with a text response; `ttt` is the tag to go on with if it is not the last.
    /// `text` is at most [`Config::max_send_segment_bytes`] long.
    pub fn send_text(&mut self, itt: Itt, ttt: Ttt, continues: bool, text: Vec<u8>) {
        let answer = TextResponse {
            final_bit: ttt.is_none(),
            continues,
            data_len_bytes: text.len() as u32,
            lun: Lun::ZERO,
            itt,
            ttt,
            sn: NO_SN,
        };
        self.control.push(Answer::Text(answer), text);
    }

    /// Sends an Asynchronous Message with `data` (sense data or vendor data).
    pub fn send_async(&mut self, mut message: AsyncMessage, data: Vec<u8>) {
        message.data_len_bytes = data.len() as u32;
        self.control.push(Answer::Async(message), data);
    }

    /// Pings the initiator; `false` if an earlier ping is unanswered.
    pub fn send_ping(&mut self) -> bool {
        if self.ping.is_some() {
            return false;
        }
        self.next_ping = self.next_ping.wrapping_add(1) & 0x7FFF_FFFF;
        self.ping = Some(self.next_ping);
        self.control.push(Answer::NopIn(own_nop_in(Ttt(self.next_ping))), Vec::new());
        true
    }

    /// Whether a ping is unanswered.
    pub fn ping_outstanding(&self) -> bool {
        self.ping.is_some()
    }

    /// The last CmdSN that there is room for.
    pub(super) fn max_cmd_sn(&self) -> Serial {
        // Every command under way has taken its number from ExpCmdSN, so this never goes back.
        self.exp_cmd_sn.add(u32::from(self.config.queue_depth - self.in_window)).sub(1)
    }

    /// Lets a task ask for data, or ends it if nothing more is to come.
    pub(super) fn solicit(&mut self, slot: u16) {
        let max_r2t = u32::from(self.config.max_outstanding_r2t);
        let t = &mut self.tasks[usize::from(slot)];
        if t.state != State::Receiving || t.unsolicited_open {
            return;
        }
        if t.r2t_sn == 0 && t.requested == 0 {
            t.solicited_from = t.received;
            t.requested = t.received;
        }
        let outstanding = t.r2t_sn.wrapping_sub(t.r2t_done);
        if t.requested < t.want && outstanding < max_r2t {
            self.enqueue(slot);
        }
    }

    /// A task broke a rule: it fails with this code once its sequences are closed.
    pub(super) fn fail(&mut self, slot: u16, code: u16) {
        self.counters.data_sequence_errors += 1;
        self.tasks[usize::from(slot)].failed.get_or_insert(code);
    }

    /// Ends a failed task as soon as no more data of it can come.
    pub(super) fn settle_failed(&mut self, slot: u16) {
        let t = &mut self.tasks[usize::from(slot)];
        if let Some(code) = t.failed
            && !t.expects_data()
            && matches!(t.state, State::Started | State::Receiving)
        {
            let sense = Sense::new(SenseKey::AbortedCommand, code).encode_fixed();
            t.want = 0;
            let task = self.id(slot);
            self.complete(task, Completion { status: Status::CHECK_CONDITION, device_len: 0, sense: &sense });
        }
    }

    /// The task that has a slot now.
    pub(super) fn id(&self, slot: u16) -> TaskId {
        TaskId { slot, generation: self.tasks[usize::from(slot)].generation }
    }

    pub(super) fn abort(&mut self, slot: u16) {
        self.counters.tasks_aborted += 1;
        // A place in the queue stays with the slot and is passed over.
        self.release(slot);
    }

    /// Puts a task behind the others with something to send.
    pub(super) fn enqueue(&mut self, slot: u16) {
        let t = &mut self.tasks[usize::from(slot)];
        if !t.queued {
            t.queued = true;
            self.sending.push_back(slot);
        }
    }

    /// Gives a slot back.
    pub(super) fn release(&mut self, slot: u16) {
        let t = &mut self.tasks[usize::from(slot)];
        let (itt, immediate) = (t.itt, t.immediate);
        t.state = State::Free;
        t.generation = t.generation.wrapping_add(1);
        self.tags.remove(itt);
        self.free.push(slot);
        match immediate {
            true => self.immediate -= 1,
            false => self.in_window -= 1,
        }
    }

    pub(super) fn start_logout(&mut self, itt: Itt, response: LogoutResponseCode) {
        self.logout = Some(LogoutResponse { response, itt, sn: NO_SN, time2wait_s: 0, time2retain_s: 0 });
    }
}
