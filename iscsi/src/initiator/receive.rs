//! What a session receives: every PDU checked against the command it is for before anything is believed.

use std::time::Instant;

use super::session::{Event, MAX_PING_ANSWERS, Session};
use super::transmit::Solicited;
use super::{Direction, Outcome, SessionError, Violation};
use crate::pdu::{
    AsyncEvent, AsyncMessage, Bhs, DataIn, NopIn, PduError, R2t, Reject, RejectReason, Residual,
    ScsiResponse, ScsiResponseCode, TargetPdu,
};
use crate::scsi::{Sense, Status};
use crate::serial::Serial;

/// Where the data segment of the PDU whose header just arrived belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// There is none.
    None,
    /// In memory of the caller's; to be handed to [`Session::end`]. At most MaxRecvDataSegmentLength bytes.
    Inline {
        /// Its length.
        len_bytes: u32,
    },
    /// In the buffer that the caller keeps for the slot; checked to lie inside the command's length.
    Task {
        /// The slot.
        slot: u16,
        /// First byte.
        offset_bytes: u32,
        /// Number of bytes, at least 1.
        len_bytes: u32,
    },
    /// Nowhere: it is to be read and dropped.
    Discard {
        /// Its length.
        len_bytes: u32,
    },
}

impl Session {
    /// Takes a header that arrived (its digest checked) and says where its data segment belongs. [`end`](Self::end)
    /// must follow when the segment is complete.
    ///
    /// # Errors
    /// The session cannot go on.
    pub fn header(&mut self, bhs: &Bhs, now: Instant) -> Result<Place, SessionError> {
        debug_assert!(self.current.is_none(), "end() was not called");
        self.last_received = now;
        let len_bytes = bhs.data_len_bytes();
        if len_bytes > self.config.max_receive_bytes {
            let slot = self.find(bhs.itt());
            return Err(self.violated(Violation::SegmentTooLong, slot));
        }
        let pdu = TargetPdu::decode(bhs).map_err(|error| {
            if matches!(error, PduError::UnexpectedOpcode { .. } | PduError::UnknownOpcode(_)) {
                self.counters.count(Violation::UnexpectedPdu);
            }
            SessionError::Format { error, slot: self.find(bhs.itt()) }
        })?;
        let place = match &pdu {
            TargetPdu::DataIn(data_in) => self.data_in(data_in)?,
            TargetPdu::LoginResponse(_) | TargetPdu::TextResponse(_) => {
                return Err(self.violated(Violation::UnexpectedPdu, None));
            }
            _ if len_bytes > 0 => Place::Inline { len_bytes },
            _ => Place::None,
        };
        self.current = Some(pdu);
        Ok(place)
    }

    /// Takes the end of the PDU: `inline` is the data segment if it was [`Place::Inline`], `intact` says whether the
    /// data digest matched (true if there is none).
    ///
    /// # Errors
    /// The session cannot go on.
    pub fn end(&mut self, inline: &[u8], intact: bool) -> Result<(), SessionError> {
        let Some(pdu) = self.current.take() else { return Ok(()) };
        if !intact && !matches!(pdu, TargetPdu::DataIn(_)) {
            // The PDU must be dropped, and with it the status it carried: only a new session helps (7.8).
            return Err(self.violated(Violation::DataDigest, None));
        }
        match pdu {
            TargetPdu::DataIn(pdu) => self.data_in_end(&pdu, intact),
            TargetPdu::ScsiResponse(pdu) => self.response(&pdu, inline),
            TargetPdu::R2t(pdu) => self.r2t(&pdu),
            TargetPdu::NopIn(pdu) => self.nop_in(&pdu),
            TargetPdu::TaskManagementResponse(pdu) => {
                self.window(pdu.sn.exp_cmd_sn, pdu.sn.max_cmd_sn);
                self.stat_sn(pdu.sn.stat_sn, None)?;
                self.tmf_response(pdu.itt, pdu.response)
            }
            TargetPdu::LogoutResponse(pdu) => {
                self.window(pdu.sn.exp_cmd_sn, pdu.sn.max_cmd_sn);
                self.stat_sn(pdu.sn.stat_sn, None)?;
                self.logout_response(&pdu)
            }
            TargetPdu::Reject(pdu) => self.reject(&pdu, inline),
            TargetPdu::AsyncMessage(pdu) => self.asynchronous(&pdu, inline),
            TargetPdu::LoginResponse(_) | TargetPdu::TextResponse(_) => {
                Err(self.violated(Violation::UnexpectedPdu, None))
            }
        }
    }

    /// Moves the command window (4.2.2.1).
    fn window(&mut self, exp_cmd_sn: Serial, max_cmd_sn: Serial) {
        // Counters that contradict each other are both ignored.
        if max_cmd_sn.is_before(exp_cmd_sn.sub(1)) {
            return;
        }
        if exp_cmd_sn.is_after(self.cmd_sn) {
            self.counters.count(Violation::CmdSnAhead);
        } else if exp_cmd_sn.is_after(self.exp_cmd_sn) {
            self.exp_cmd_sn = exp_cmd_sn;
        }
        if max_cmd_sn.is_after(self.max_cmd_sn) {
            self.max_cmd_sn = max_cmd_sn;
        }
    }

    /// Takes a status number (4.2.2.2). TCP keeps the order, so a gap means that a PDU was never sent.
    fn stat_sn(&mut self, stat_sn: Serial, slot: Option<u16>) -> Result<(), SessionError> {
        if stat_sn != self.exp_stat_sn {
            return Err(self.violated(Violation::StatSnGap, slot));
        }
        self.exp_stat_sn = stat_sn.next();
        Ok(())
    }

    /// Checks a Data-In and says where its data goes. What is wrong with it spoils the task, not the session: the
    /// data is dropped and the status, when it comes, is not believed.
    fn data_in(&mut self, pdu: &DataIn) -> Result<Place, SessionError> {
        let slot = self.require(pdu.itt)?;
        let max_burst_bytes = self.config.max_burst_bytes;
        let len_bytes = pdu.data_len_bytes;
        let task = self.task_mut(slot);
        if task.command.direction == Direction::Read && pdu.data_sn.is_before(Serial(task.received_pdus)) {
            // A duplicate is to be discarded (7.9). If it was new data under an old number, bytes will be missing.
            self.counters.count(Violation::DataSnRepeat);
            return Ok(if len_bytes == 0 { Place::None } else { Place::Discard { len_bytes } });
        }
        let wrong = if task.command.direction != Direction::Read {
            Some(Violation::WrongDirection)
        } else if pdu.data_sn.0 != task.received_pdus {
            Some(Violation::DataSnGap)
        } else if len_bytes > 0 && pdu.offset_bytes != task.done_bytes {
            // DataPDUInOrder and DataSequenceInOrder are always Yes here (13.18, 13.19).
            Some(Violation::DataOffset)
        } else if task.done_bytes.checked_add(len_bytes).is_none_or(|end| end > task.command.len_bytes) {
            Some(Violation::DataOutOfBounds)
        } else {
            None
        };
        task.received_pdus = task.received_pdus.wrapping_add(1);
        task.burst_bytes = task.burst_bytes.saturating_add(len_bytes);
        let long_burst = task.burst_bytes > max_burst_bytes;
        if pdu.final_bit {
            task.burst_bytes = 0;
        }
        if let Some(violation) = wrong {
            self.damage(slot, violation);
        } else if long_burst {
            // Harmless to the data; counted only.
            self.counters.count(Violation::DataBurst);
        }
        let task = self.task_mut(slot);
        Ok(match (len_bytes, task.damage) {
            (0, _) => Place::None,
            (_, Some(_)) => Place::Discard { len_bytes },
            (_, None) => {
                let offset_bytes = task.done_bytes;
                task.done_bytes += len_bytes;
                Place::Task { slot, offset_bytes, len_bytes }
            }
        })
    }

    fn data_in_end(&mut self, pdu: &DataIn, intact: bool) -> Result<(), SessionError> {
        let slot = self.require(pdu.itt)?;
        self.window(pdu.exp_cmd_sn, pdu.max_cmd_sn);
        if !intact {
            // The header has a digest of its own, so the task is known; it is repeated when it is answered.
            self.damage(slot, Violation::DataDigest);
        }
        // The A bit is ignored at error recovery level 0 (11.7.2).
        let Some(status) = pdu.status else { return Ok(()) };
        self.stat_sn(status.stat_sn, Some(slot))?;
        self.answered(slot, Status(status.status), status.residual, None);
        Ok(())
    }

    fn response(&mut self, pdu: &ScsiResponse, data: &[u8]) -> Result<(), SessionError> {
        let slot = self.require(pdu.itt)?;
        self.window(pdu.sn.exp_cmd_sn, pdu.sn.max_cmd_sn);
        self.stat_sn(pdu.sn.stat_sn, Some(slot))?;
        if pdu.response != ScsiResponseCode::Completed {
            // Status and residual mean nothing then (11.4.3).
            self.finish(slot, Outcome::TargetFailure { response: pdu.response.code() });
            return Ok(());
        }
        let sense = match data {
            [] => None,
            [high, low, rest @ ..] => {
                let len = usize::from(u16::from_be_bytes([*high, *low]));
                let Some(sense) = rest.get(..len) else {
                    return Err(self.violated(Violation::SenseLength, Some(slot)));
                };
                Sense::parse(sense)
            }
            [_] => return Err(self.violated(Violation::SenseLength, Some(slot))),
        };
        // More than arrived: PDUs are missing. Fewer: targets exist that leave the field zero; bytes are counted anyway.
        if pdu.exp_data_sn.is_after(Serial(self.task(slot).received_pdus)) {
            self.damage(slot, Violation::ExpDataSn);
        }
        self.answered(slot, Status(pdu.status), pdu.residual, sense);
        Ok(())
    }

    /// A status came for a task: believes it if the data accounts for it.
    fn answered(&mut self, slot: u16, status: Status, residual: Residual, sense: Option<Sense>) {
        let task = self.task(slot);
        let (expected, done, exact) = (task.command.len_bytes, task.done_bytes, task.command.exact);
        let mut wrong = None;
        if status == Status::GOOD {
            // What the target says was transferred of the expected length (11.4.5).
            let told = match residual {
                Residual::None | Residual::Overflow(_) => Some(expected),
                Residual::Underflow(missing) => expected.checked_sub(missing),
            };
            wrong = match (told, task.command.direction) {
                (None, _) => Some(Violation::Residual),
                (Some(_), Direction::None) => None,
                (Some(told), Direction::Read) if done != told => {
                    Some(if done < told { Violation::ShortData } else { Violation::Residual })
                }
                (Some(told), Direction::Write) if done < told => Some(Violation::Unfetched),
                (Some(told), _) if exact && told != expected => Some(Violation::ShortData),
                _ => None,
            };
        }
        if let Some(violation) = wrong {
            self.damage(slot, violation);
        }
        let outcome = match self.task(slot).damage {
            // A failure is told as what it is; damaged data only spoils a success.
            Some(violation) if status == Status::GOOD => Outcome::Damaged(violation),
            _ => Outcome::Status { status, sense, transferred_bytes: done },
        };
        self.finish(slot, outcome);
    }

    fn r2t(&mut self, pdu: &R2t) -> Result<(), SessionError> {
        let slot = self.require(pdu.itt)?;
        self.window(pdu.sn.exp_cmd_sn, pdu.sn.max_cmd_sn);
        let max_open = self.config.max_outstanding_r2t;
        let max_burst_bytes = self.config.max_burst_bytes;
        let is_write = self.is_write(slot);
        let task = self.task_mut(slot);
        if is_write && pdu.r2t_sn.is_before(Serial(task.received_pdus)) {
            // A duplicate is to be discarded (7.9): its data was sent or is on its way.
            self.counters.count(Violation::R2tSnRepeat);
            return Ok(());
        }
        let end = pdu.offset_bytes.checked_add(pdu.desired_len_bytes);
        let violation = if !is_write {
            Some(Violation::WrongDirection)
        } else if pdu.lun != task.command.lun {
            Some(Violation::R2tLun)
        } else if pdu.r2t_sn.0 != task.received_pdus {
            Some(Violation::R2tSnGap)
        } else if end.is_none_or(|end| end > task.command.len_bytes) {
            Some(Violation::R2tOutOfBounds)
        } else if pdu.offset_bytes != task.asked_bytes {
            Some(Violation::R2tOverlap)
        } else if pdu.desired_len_bytes > max_burst_bytes {
            Some(Violation::R2tTooLong)
        } else if task.open_r2ts >= max_open {
            Some(Violation::R2tTooMany)
        } else {
            None
        };
        if let Some(violation) = violation {
            return Err(self.violated(violation, Some(slot)));
        }
        self.flow.r2t(slot, self.last_received);
        let task = self.task_mut(slot);
        task.received_pdus += 1;
        task.asked_bytes += pdu.desired_len_bytes;
        task.open_r2ts += 1;
        self.solicited.push_back(Solicited {
            itt: pdu.itt,
            ttt: pdu.ttt,
            lun: pdu.lun,
            offset_bytes: pdu.offset_bytes,
            left_bytes: pdu.desired_len_bytes,
            data_sn: Serial(0),
        });
        Ok(())
    }

    fn nop_in(&mut self, pdu: &NopIn) -> Result<(), SessionError> {
        self.window(pdu.sn.exp_cmd_sn, pdu.sn.max_cmd_sn);
        if !pdu.itt.is_none() {
            self.stat_sn(pdu.sn.stat_sn, None)?;
            let Some((_, at, _)) = self.ping.filter(|&(itt, _, sent)| itt == pdu.itt && sent) else {
                return Err(self.violated(Violation::UnexpectedAnswer, None));
            };
            self.ping = None;
            self.rtt.sample(self.last_received.saturating_duration_since(at));
            return Ok(());
        }
        // Its StatSN names the next one and does not advance (11.19.2).
        if !pdu.ttt.is_none() {
            if self.ping_answers.len() >= MAX_PING_ANSWERS {
                return Err(self.violated(Violation::PingFlood, None));
            }
            self.ping_answers.push_back((pdu.lun, pdu.ttt));
        }
        Ok(())
    }

    fn reject(&mut self, pdu: &Reject, rejected: &[u8]) -> Result<(), SessionError> {
        self.window(pdu.sn.exp_cmd_sn, pdu.sn.max_cmd_sn);
        self.stat_sn(pdu.sn.stat_sn, None)?;
        self.counters.count(Violation::Rejected);
        self.events.push_back(Event::Rejected { reason: pdu.reason });
        if pdu.reason == RejectReason::WaitingForLogout {
            return Err(SessionError::Rejected(pdu.reason));
        }
        let header: Option<[u8; crate::pdu::BHS_BYTES]> =
            rejected.get(..crate::pdu::BHS_BYTES).and_then(|b| b.try_into().ok());
        match header {
            Some(bytes) => self.rejected(&Bhs(bytes), pdu.reason),
            None => Ok(()),
        }
    }

    fn asynchronous(&mut self, pdu: &AsyncMessage, data: &[u8]) -> Result<(), SessionError> {
        self.window(pdu.sn.exp_cmd_sn, pdu.sn.max_cmd_sn);
        self.stat_sn(pdu.sn.stat_sn, None)?;
        match pdu.event {
            AsyncEvent::Scsi => {
                // The segment has the form of a SCSI Response's (11.9.3).
                let sense = data.get(2..).and_then(Sense::parse);
                self.events.push_back(Event::UnitEvent { lun: pdu.lun, sense });
            }
            AsyncEvent::LogoutRequested | AsyncEvent::NegotiationRequested => {
                self.logout_wanted(pdu.parameter3);
            }
            AsyncEvent::ConnectionDropped | AsyncEvent::SessionDropped => {
                return Err(SessionError::Dropped { time2wait_s: pdu.parameter2 });
            }
            // Only after FastAbort was negotiated (11.9.1, event 5), which is not offered; its tasks are in doubt.
            AsyncEvent::TaskTermination => return Err(SessionError::Dropped { time2wait_s: 0 }),
            AsyncEvent::Vendor | AsyncEvent::Other(_) => {}
        }
        Ok(())
    }
}
