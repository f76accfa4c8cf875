//! What each PDU of the initiator does to the session.

use crate::pdu::{
    Bhs, DataOut, LogoutReason, LogoutRequest, LogoutResponseCode, NopIn, NopOut, Opcode, Pdu, Reject,
    RejectReason, ScsiCommand, TaskAttribute, TaskFunction, TaskManagementRequest, TaskResponseCode,
    TextRequest, Ttt,
};
use crate::scsi::lun::Lun;
use crate::scsi::sense::asc;
use crate::scsi::{Sense, SenseKey, Status};
use crate::serial::Serial;

use super::control::Answer;
use super::session::{Completion, Event, IMMEDIATE_SLOTS, NO_SN, Placement, Session, SessionError};
use super::task::{State, Task};

/// What the CmdSN of a PDU says.
enum Order {
    Deliver,
    Ignore,
}

impl Session {
    /// Takes a PDU: its header and data segment (without padding). `digest_ok` is false if the data digest was wrong.
    ///
    /// # Errors
    /// The connection must be closed; what is queued (a Reject, perhaps) may still be sent.
    pub fn receive(&mut self, bhs: &Bhs, data: &[u8], digest_ok: bool) -> Result<Event, SessionError> {
        self.counters.pdus_received += 1;
        let len_bytes = bhs.data_len_bytes();
        if len_bytes > self.config.max_recv_segment_bytes {
            let max_bytes = self.config.max_recv_segment_bytes;
            return Err(SessionError::SegmentTooLong { len_bytes, max_bytes });
        }
        let opcode = bhs.opcode();
        if !digest_ok {
            self.counters.data_digest_errors += 1;
            self.reject(bhs, RejectReason::DataDigest);
            // Only lost data of a task can be made good at this level, by failing the task (7.8). A command that is
            // lost leaves a gap in CmdSN.
            return match opcode {
                Some(Opcode::DataOut) => self.data_out(bhs, false),
                _ if bhs.immediate() => Ok(Event::Handled),
                _ => Err(SessionError::CommandDigest),
            };
        }
        match opcode {
            Some(Opcode::ScsiCommand) => self.scsi_command(bhs),
            Some(Opcode::DataOut) => self.data_out(bhs, true),
            Some(Opcode::NopOut) => self.nop_out(bhs, data),
            Some(Opcode::TaskManagementRequest) => self.task_management(bhs),
            Some(Opcode::TextRequest) => {
                let text = TextRequest::decode(bhs)?;
                self.in_order(text.immediate, text.cmd_sn, |_| Ok(Event::Text(text)))
            }
            Some(Opcode::LogoutRequest) => {
                let logout = LogoutRequest::decode(bhs)?;
                self.in_order(logout.immediate, logout.cmd_sn, |session| Ok(session.logout(&logout)))
            }
            // Data acknowledgement and retransmission belong to higher recovery levels (11.16).
            Some(Opcode::Snack) => Ok(self.rejected(bhs, RejectReason::SnackReject)),
            Some(Opcode::LoginRequest) => Ok(self.rejected(bhs, RejectReason::Protocol)),
            _ => Ok(self.rejected(bhs, RejectReason::Unsupported)),
        }
    }

    /// Delivers a PDU in CmdSN order (4.2.2.1): what is outside the window is silently ignored.
    fn in_order(
        &mut self,
        immediate: bool,
        cmd_sn: Serial,
        deliver: impl FnOnce(&mut Self) -> Result<Event, SessionError>,
    ) -> Result<Event, SessionError> {
        match self.order(immediate, cmd_sn)? {
            Order::Deliver => deliver(self),
            Order::Ignore => Ok(Event::Handled),
        }
    }

    fn order(&mut self, immediate: bool, cmd_sn: Serial) -> Result<Order, SessionError> {
        if immediate {
            return Ok(Order::Deliver);
        }
        if !cmd_sn.in_window(self.exp_cmd_sn, self.max_cmd_sn()) {
            self.counters.outside_window += 1;
            return Ok(Order::Ignore);
        }
        if cmd_sn != self.exp_cmd_sn {
            return Err(SessionError::CmdSnGap { got: cmd_sn, expected: self.exp_cmd_sn });
        }
        self.exp_cmd_sn = self.exp_cmd_sn.next();
        Ok(Order::Deliver)
    }

    /// Rejects a PDU that the caller was told of.
    pub fn reject(&mut self, bhs: &Bhs, reason: RejectReason) {
        self.counters.rejects_sent += 1;
        let answer = Reject { reason, data_len_bytes: bhs.0.len() as u32, sn: NO_SN, data_sn: Serial(0) };
        self.control.push(Answer::Reject(answer), bhs.0.to_vec());
    }

    fn rejected(&mut self, bhs: &Bhs, reason: RejectReason) -> Event {
        self.reject(bhs, reason);
        Event::Handled
    }

    fn scsi_command(&mut self, bhs: &Bhs) -> Result<Event, SessionError> {
        let command = ScsiCommand::decode(bhs)?;
        if let Order::Ignore = self.order(command.immediate, command.cmd_sn)? {
            return Ok(Event::Handled);
        }
        // A PDU that is rejected has still used its CmdSN (11.17).
        let reason = if self.config.discovery {
            Some(RejectReason::Protocol)
        } else if command.itt.is_none()
            || matches!(command.attribute, TaskAttribute::Reserved(_))
            || (!command.write && (command.data_len_bytes != 0 || !command.final_bit))
        {
            Some(RejectReason::InvalidField)
        } else if self.tags.find(command.itt).is_some() {
            Some(RejectReason::TaskInProgress)
        } else if command.immediate && usize::from(self.immediate) >= IMMEDIATE_SLOTS {
            Some(RejectReason::TooManyImmediate)
        } else {
            None
        };
        if let Some(reason) = reason {
            return Ok(self.rejected(bhs, reason));
        }
        // The window and the count of immediate commands leave a slot for each.
        let Some(slot) = self.free.pop() else {
            return Ok(self.rejected(bhs, RejectReason::NoResources));
        };
        self.counters.commands += 1;
        match command.immediate {
            true => self.immediate += 1,
            false => self.in_window += 1,
        }
        self.tags.insert(command.itt.0, slot);
        let t = &mut self.tasks[usize::from(slot)];
        *t = Task {
            state: State::Started,
            generation: t.generation,
            queued: t.queued,
            immediate: command.immediate,
            itt: command.itt.0,
            lun: command.lun,
            cmd_sn: command.cmd_sn,
            cdb: command.cdb,
            read: command.read,
            write: command.write,
            edtl: command.expected_len_bytes,
            immediate_len: command.data_len_bytes,
            unsolicited_open: !command.final_bit,
            ..Task::default()
        };
        let config = &self.config;
        let unsolicited = command.data_len_bytes != 0 || !command.final_bit;
        let broken = if (command.data_len_bytes != 0 && !config.immediate_data)
            || (!command.final_bit && config.initial_r2t)
        {
            Some(asc::UNEXPECTED_UNSOLICITED_DATA)
        } else if unsolicited
            && (command.data_len_bytes > config.first_burst_bytes.min(command.expected_len_bytes))
        {
            Some(asc::INCORRECT_AMOUNT_OF_DATA)
        } else {
            None
        };
        if let Some(code) = broken {
            self.fail(slot, code);
            self.settle_failed(slot);
            return Ok(Event::Handled);
        }
        if command.read && command.write {
            // No command of a direct access device that is supported here moves data both ways.
            let sense = Sense::new(SenseKey::IllegalRequest, asc::INVALID_FIELD_IN_CDB).encode_fixed();
            let status = Status::CHECK_CONDITION;
            let task = self.id(slot);
            self.complete(task, Completion { status, device_len: 0, sense: &sense });
            return Ok(Event::Handled);
        }
        Ok(Event::Command(self.id(slot)))
    }

    fn data_out(&mut self, bhs: &Bhs, digest_ok: bool) -> Result<Event, SessionError> {
        let data = DataOut::decode(bhs)?;
        let slot = if data.ttt.is_none() { self.tags.find(data.itt) } else { self.solicited(&data) };
        let Some(slot) = slot.filter(|&slot| self.tasks[usize::from(slot)].state != State::Free) else {
            // Data that was under way when its task ended or was aborted (11.5.1 expects it).
            self.counters.data_discarded += 1;
            return Ok(Event::Handled);
        };
        let max_burst = self.config.max_burst_bytes;
        let first_burst = self.config.first_burst_bytes;
        let t = &mut self.tasks[usize::from(slot)];
        // The sequence that this PDU belongs to, and where it ends.
        let end = if data.ttt.is_none() {
            if !t.unsolicited_open {
                self.fail(slot, asc::UNEXPECTED_UNSOLICITED_DATA);
                self.settle_failed(slot);
                return Ok(Event::Handled);
            }
            first_burst.min(t.edtl)
        } else {
            let done = u64::from(t.r2t_done);
            let end = u64::from(t.solicited_from) + (done + 1) * u64::from(max_burst);
            end.min(u64::from(t.want)) as u32
        };
        let solicited = !data.ttt.is_none();
        let fits = data.offset_bytes == t.received
            && data.data_sn.0 == t.data_sn_in
            && (!solicited || (data.lun == t.lun && data.ttt.0 == t.ttt(slot, t.r2t_done)))
            && data.data_len_bytes <= end.saturating_sub(data.offset_bytes);
        // A solicited sequence brings exactly what was asked for (11.8.4).
        let at_end = data.offset_bytes.saturating_add(data.data_len_bytes) == end;
        let whole = !solicited || data.final_bit == at_end;
        let broken = if !digest_ok {
            Some(asc::PROTOCOL_SERVICE_CRC)
        } else if !fits || !whole {
            Some(asc::INCORRECT_AMOUNT_OF_DATA)
        } else {
            None
        };
        if data.final_bit {
            t.data_sn_in = 0;
            match solicited {
                true => t.r2t_done = t.r2t_done.wrapping_add(1),
                false => t.unsolicited_open = false,
            }
        } else {
            t.data_sn_in = t.data_sn_in.wrapping_add(1);
        }
        if t.state == State::Draining {
            self.counters.data_discarded += 1;
            if !t.expects_data() {
                t.state = State::Sending;
                self.enqueue(slot);
            }
            return Ok(Event::Handled);
        }
        if let Some(code) = broken {
            self.fail(slot, code);
        }
        let t = &mut self.tasks[usize::from(slot)];
        if t.failed.is_some() || t.state != State::Receiving {
            self.settle_failed(slot);
            return Ok(Event::Handled);
        }
        let offset = t.received;
        t.received += data.data_len_bytes;
        let len = t.want.saturating_sub(offset).min(data.data_len_bytes);
        let complete = t.received >= t.want && !t.expects_data();
        if complete {
            t.state = State::Executing;
        } else if data.final_bit {
            self.solicit(slot);
        }
        Ok(Event::Data(Placement { task: self.id(slot), offset, len, complete }))
    }

    /// The slot that a target transfer tag names, if the tag is one that is still answered.
    fn solicited(&self, data: &DataOut) -> Option<u16> {
        let slot = data.ttt.0 as u16;
        let t = self.tasks.get(usize::from(slot))?;
        let matches =
            t.generation & 0xFF == data.ttt.0 >> 24 && t.itt == data.itt.0 && t.r2t_sn != t.r2t_done;
        matches.then_some(slot)
    }

    fn nop_out(&mut self, bhs: &Bhs, data: &[u8]) -> Result<Event, SessionError> {
        let nop = NopOut::decode(bhs)?;
        if let Order::Ignore = self.order(nop.immediate, nop.cmd_sn)? {
            return Ok(Event::Handled);
        }
        self.counters.pings += 1;
        if !nop.ttt.is_none() && self.ping == Some(nop.ttt.0) {
            self.ping = None;
        }
        if !nop.itt.is_none() {
            // As much of the ping data as the initiator can take comes back (11.19.1).
            let max = self.config.max_send_segment_bytes as usize;
            let echo = data[..data.len().min(max)].to_vec();
            let answer = NopIn {
                data_len_bytes: echo.len() as u32,
                lun: Lun::ZERO,
                itt: nop.itt,
                ttt: Ttt::NONE,
                sn: NO_SN,
            };
            self.control.push(Answer::NopIn(answer), echo);
        }
        Ok(Event::Handled)
    }

    fn task_management(&mut self, bhs: &Bhs) -> Result<Event, SessionError> {
        let request = TaskManagementRequest::decode(bhs)?;
        if let Order::Ignore = self.order(request.immediate, request.cmd_sn)? {
            return Ok(Event::Handled);
        }
        if self.config.discovery {
            return Ok(self.rejected(bhs, RejectReason::Protocol));
        }
        let response = match request.function {
            TaskFunction::AbortTask => return Ok(self.abort_task(&request)),
            TaskFunction::AbortTaskSet
            | TaskFunction::ClearTaskSet
            | TaskFunction::LogicalUnitReset
            | TaskFunction::TargetWarmReset
            | TaskFunction::TargetColdReset => return Ok(Event::TaskManagement(request)),
            TaskFunction::TaskReassign => TaskResponseCode::ReassignUnsupported,
            _ => TaskResponseCode::Unsupported,
        };
        self.complete_task_management(request.itt, response);
        Ok(Event::Handled)
    }

    fn abort_task(&mut self, request: &TaskManagementRequest) -> Event {
        let found = self
            .tags
            .find(request.referenced_itt)
            .filter(|&slot| self.tasks[usize::from(slot)].lun.number() == request.lun.number());
        if let Some(slot) = found {
            let task = self.id(slot);
            self.abort(slot);
            self.complete_task_management(request.itt, TaskResponseCode::Complete);
            return Event::Aborted(task);
        }
        // A command that has not come yet counts as received and aborted (11.5.1, 11.6.1).
        let never_came = request.ref_cmd_sn.in_window(self.exp_cmd_sn, self.max_cmd_sn())
            && request.ref_cmd_sn.is_before(request.cmd_sn);
        let response = if never_came { TaskResponseCode::Complete } else { TaskResponseCode::NoTask };
        self.complete_task_management(request.itt, response);
        Event::Handled
    }

    fn logout(&mut self, logout: &LogoutRequest) -> Event {
        let response = match logout.reason {
            LogoutReason::CloseSession => LogoutResponseCode::Closed,
            LogoutReason::CloseConnection if logout.cid == self.config.cid => LogoutResponseCode::Closed,
            LogoutReason::CloseConnection => LogoutResponseCode::NoCid,
            _ => LogoutResponseCode::RecoveryUnsupported,
        };
        self.start_logout(logout.itt, response);
        if response == LogoutResponseCode::Closed { Event::Logout } else { Event::Handled }
    }
}
