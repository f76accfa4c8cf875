//! What the session sends, one PDU at a time.

use crate::pdu::{
    Bhs, DataIn, DataInStatus, Itt, LogoutResponseCode, Pdu, R2t, Residual, ScsiResponse, ScsiResponseCode,
    TargetSn, Ttt,
};
use crate::scsi::Status;
use crate::serial::Serial;

use super::session::Session;
use super::task::{SENSE_BYTES, State, Task, TaskId};

/// A PDU to send: the header, with DataSegmentLength set, and its data.
#[derive(Debug)]
pub struct Outgoing {
    /// The header.
    pub header: Bhs,
    /// The data segment.
    pub data: OutgoingData,
}

/// The data segment of a PDU to send. Padding and digests are the sender's.
#[derive(Debug)]
pub enum OutgoingData {
    /// None.
    None,
    /// A part of the data that the device has for the initiator.
    Task {
        /// The task. After `last` it is gone: take the data now.
        task: TaskId,
        /// Offset in its data.
        offset: u32,
        /// Bytes, at least 1.
        len: u32,
    },
    /// Sense data with its length before it.
    Sense {
        /// The bytes.
        bytes: [u8; SENSE_BYTES + 2],
        /// How many of them.
        len: u8,
    },
    /// Bytes of the machine: text, ping data, a rejected header.
    Bytes(Vec<u8>),
}

impl Session {
    /// Whether there is something to send.
    pub fn wants_transmit(&self) -> bool {
        !self.control.is_empty() || !self.sending.is_empty() || self.logout.is_some()
    }

    /// The next PDU to send. PDUs must go out in the order in which they are taken.
    pub fn poll_transmit(&mut self) -> Option<Outgoing> {
        if self.finished {
            return None;
        }
        let outgoing = self.next_outgoing();
        self.counters.pdus_sent += u64::from(outgoing.is_some());
        outgoing
    }

    fn next_outgoing(&mut self) -> Option<Outgoing> {
        if let Some((answer, data)) = self.control.pop() {
            let sn = self.sn(answer.takes_stat_sn());
            let data_out = if data.is_empty() { OutgoingData::None } else { OutgoingData::Bytes(data) };
            return Some(Outgoing { header: answer.encode(sn), data: data_out });
        }
        while let Some(slot) = self.sending.pop_front() {
            let t = &mut self.tasks[usize::from(slot)];
            t.queued = false;
            let outgoing = match t.state {
                State::Receiving => self.r2t(slot),
                State::Sending => Some(self.data_or_status(slot)),
                _ => None,
            };
            if outgoing.is_some() {
                return outgoing;
            }
        }
        let mut logout = self.logout.take()?;
        self.finished = logout.response == LogoutResponseCode::Closed;
        logout.sn = self.sn(true);
        Some(Outgoing { header: logout.encode(), data: OutgoingData::None })
    }

    /// The counters for a PDU that takes a StatSN, or only names the next.
    fn sn(&mut self, takes: bool) -> TargetSn {
        let stat_sn = if takes { self.stat_sn.take() } else { self.stat_sn };
        TargetSn { stat_sn, exp_cmd_sn: self.exp_cmd_sn, max_cmd_sn: self.max_cmd_sn() }
    }

    fn r2t(&mut self, slot: u16) -> Option<Outgoing> {
        let sn = self.sn(false);
        let max_r2t = u32::from(self.config.max_outstanding_r2t);
        let max_burst = self.config.max_burst_bytes;
        let t = &mut self.tasks[usize::from(slot)];
        if t.unsolicited_open || t.failed.is_some() || t.requested >= t.want {
            return None;
        }
        let desired_len_bytes = max_burst.min(t.want - t.requested);
        let r2t = R2t {
            lun: t.lun,
            itt: Itt(t.itt),
            ttt: Ttt(t.ttt(slot, t.r2t_sn)),
            sn,
            r2t_sn: Serial(t.r2t_sn),
            offset_bytes: t.requested,
            desired_len_bytes,
        };
        t.requested += desired_len_bytes;
        t.r2t_sn = t.r2t_sn.wrapping_add(1);
        let more = t.requested < t.want && t.r2t_sn.wrapping_sub(t.r2t_done) < max_r2t;
        self.counters.r2ts_sent += 1;
        if more {
            self.enqueue(slot);
        }
        Some(Outgoing { header: r2t.encode(), data: OutgoingData::None })
    }

    fn data_or_status(&mut self, slot: u16) -> Outgoing {
        let (max_segment, max_burst) = (self.config.max_send_segment_bytes, self.config.max_burst_bytes);
        let t = &mut self.tasks[usize::from(slot)];
        if t.sent >= t.data_len {
            return self.status(slot);
        }
        let offset = t.sent;
        let burst_left = max_burst - offset % max_burst;
        let len = max_segment.min(burst_left).min(t.data_len - offset);
        t.sent += len;
        let last = t.sent == t.data_len;
        let data_sn = Serial(t.data_sn_out);
        t.data_sn_out += 1;
        // The status rides on the last Data-In if it has no sense data (11.7.3).
        let collapse = last && t.status == Status::GOOD.0 && t.sense_len == 0;
        let final_bit = last || len == burst_left;
        let (itt, residual, status) = (Itt(t.itt), residual(t), t.status);
        let task = TaskId { slot, generation: t.generation };
        if collapse {
            self.release(slot);
        } else if last {
            // Nothing of another task comes between data and its status.
            self.tasks[usize::from(slot)].queued = true;
            self.sending.push_front(slot);
        } else {
            self.enqueue(slot);
        }
        let sn = self.sn(collapse);
        let data_in = DataIn {
            final_bit,
            ack: false,
            status: collapse.then_some(DataInStatus { status, residual, stat_sn: sn.stat_sn }),
            data_len_bytes: len,
            lun: Default::default(),
            itt,
            ttt: Ttt::NONE,
            exp_cmd_sn: sn.exp_cmd_sn,
            max_cmd_sn: sn.max_cmd_sn,
            data_sn,
            offset_bytes: offset,
        };
        Outgoing { header: data_in.encode(), data: OutgoingData::Task { task, offset, len } }
    }

    fn status(&mut self, slot: u16) -> Outgoing {
        self.release(slot);
        let sn = self.sn(true);
        let t = &self.tasks[usize::from(slot)];
        let sense_len = usize::from(t.sense_len);
        let mut data = OutgoingData::None;
        let mut data_len_bytes = 0;
        if sense_len > 0 {
            let mut bytes = [0; SENSE_BYTES + 2];
            bytes[1] = t.sense_len;
            bytes[2..2 + sense_len].copy_from_slice(&t.sense[..sense_len]);
            data_len_bytes = 2 + sense_len as u32;
            data = OutgoingData::Sense { bytes, len: t.sense_len + 2 };
        }
        let response = ScsiResponse {
            response: ScsiResponseCode::Completed,
            status: t.status,
            residual: residual(t),
            bidi_residual: Residual::None,
            data_len_bytes,
            itt: Itt(t.itt),
            snack_tag: 0,
            sn,
            // 11.4.8: zero where no Data-In was sent, so R2Ts of a write do not count.
            exp_data_sn: Serial(t.data_sn_out),
        };
        Outgoing { header: response.encode(), data }
    }
}

/// How far the transfer missed the expected length (11.4.5). A command that failed moved nothing that counts.
fn residual(t: &Task) -> Residual {
    let expected = if t.read || t.write { t.edtl } else { 0 };
    let moved = if t.status == Status::GOOD.0 { t.device_len } else { 0 };
    match moved.cmp(&expected) {
        std::cmp::Ordering::Equal => Residual::None,
        std::cmp::Ordering::Less => Residual::Underflow(expected - moved),
        std::cmp::Ordering::Greater => Residual::Overflow(moved - expected),
    }
}
