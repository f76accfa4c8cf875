//! What a session sends: control PDUs, solicited and unsolicited data, commands; in this order.

use std::time::Instant;

use super::Direction;
use super::session::Session;
use super::task::State;
use crate::digest::{DIGEST_BYTES, digest_bytes};
use crate::pdu::{BHS_BYTES, Bhs, DataOut, Itt, NopOut, Pdu, ScsiCommand, TaskAttribute, Ttt};
use crate::scsi::Lun;
use crate::serial::Serial;

/// Data of a command: `len_bytes` bytes from `offset_bytes` on of the buffer that the caller keeps for the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataRef {
    /// The task slot.
    pub slot: u16,
    /// First byte.
    pub offset_bytes: u32,
    /// Number of bytes, at least 1.
    pub len_bytes: u32,
}

/// A PDU to send: the header bytes, then the data, [`pad_bytes`](Self::pad_bytes) zero bytes, and the data's digest if
/// wanted.
#[derive(Clone, Copy, Debug)]
pub struct TxPdu {
    bytes: [u8; BHS_BYTES + DIGEST_BYTES],
    len: u8,
    /// The data segment, if there is one.
    pub data: Option<DataRef>,
    /// CRC32C over data and padding follows (13.1); computed by the caller, over a copy of the data if somebody else
    /// can change it.
    pub data_digest: bool,
}

impl TxPdu {
    /// The basic header segment, with its digest if negotiated.
    pub fn header(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// Zero bytes behind the data.
    pub fn pad_bytes(&self) -> usize {
        self.data.map_or(0, |d| (4 - d.len_bytes as usize % 4) % 4)
    }
}

/// An R2T that is being answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Solicited {
    pub(super) itt: Itt,
    pub(super) ttt: Ttt,
    pub(super) lun: Lun,
    pub(super) offset_bytes: u32,
    pub(super) left_bytes: u32,
    pub(super) data_sn: Serial,
}

/// Unsolicited Data-Out that must follow before the next command's (4.2.5.2).
#[derive(Clone, Copy, Debug)]
pub(super) struct Unsolicited {
    pub(super) slot: u16,
    pub(super) offset_bytes: u32,
    pub(super) end_bytes: u32,
    pub(super) data_sn: Serial,
}

impl Session {
    /// The next PDU to send, if there is one. PDUs are to be sent whole and in this order.
    pub fn next_pdu(&mut self, now: Instant) -> Option<TxPdu> {
        if self.logout.as_ref().is_some_and(super::timers::Logout::is_sent) {
            // After a Logout nothing may be sent (11.14).
            return None;
        }
        self.control_pdu(now)
            .or_else(|| self.unsolicited_pdu(now))
            .or_else(|| self.solicited_pdu(now))
            .or_else(|| self.command_pdu(now))
    }

    fn control_pdu(&mut self, now: Instant) -> Option<TxPdu> {
        if let Some((lun, ttt)) = self.ping_answers.pop_front() {
            return Some(self.nop_out(Itt::NONE, ttt, lun));
        }
        if let Some(request) = self.tmf_request() {
            return Some(self.tx(request.encode(), None));
        }
        if let Some((itt, at, sent @ false)) = &mut self.ping {
            *sent = true;
            // The round trip begins here.
            *at = now;
            let itt = *itt;
            return Some(self.nop_out(itt, Ttt::NONE, Lun::ZERO));
        }
        let request = self.logout_request(now)?;
        Some(self.tx(request.encode(), None))
    }

    fn nop_out(&self, itt: Itt, ttt: Ttt, lun: Lun) -> TxPdu {
        let pdu = NopOut {
            immediate: true,
            data_len_bytes: 0,
            lun,
            itt,
            ttt,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.exp_stat_sn,
        };
        self.tx(pdu.encode(), None)
    }

    fn unsolicited_pdu(&mut self, now: Instant) -> Option<TxPdu> {
        let mut u = self.unsolicited?;
        let len_bytes = (u.end_bytes - u.offset_bytes).min(self.config.max_send_bytes);
        let pdu = DataOut {
            final_bit: u.offset_bytes + len_bytes == u.end_bytes,
            data_len_bytes: len_bytes,
            // Valid only with a transfer tag (11.7.4); the command's, as other initiators send it.
            lun: self.task(u.slot).command.lun,
            itt: self.itt(u.slot),
            ttt: Ttt::NONE,
            exp_stat_sn: self.exp_stat_sn,
            data_sn: u.data_sn.take(),
            offset_bytes: u.offset_bytes,
        };
        let data = DataRef { slot: u.slot, offset_bytes: u.offset_bytes, len_bytes };
        u.offset_bytes += len_bytes;
        self.task_mut(u.slot).done_bytes += len_bytes;
        self.unsolicited = (!pdu.final_bit).then_some(u);
        if pdu.final_bit {
            self.data_sent(u.slot, now);
        }
        Some(self.tx(pdu.encode(), Some(data)))
    }

    fn solicited_pdu(&mut self, now: Instant) -> Option<TxPdu> {
        loop {
            let s = *self.solicited.front()?;
            // The task may have been answered in the meantime.
            let Some(slot) = self.find(s.itt) else {
                self.solicited.pop_front();
                continue;
            };
            let len_bytes = s.left_bytes.min(self.config.max_send_bytes);
            let pdu = DataOut {
                final_bit: len_bytes == s.left_bytes,
                data_len_bytes: len_bytes,
                lun: s.lun,
                itt: s.itt,
                ttt: s.ttt,
                exp_stat_sn: self.exp_stat_sn,
                data_sn: s.data_sn,
                offset_bytes: s.offset_bytes,
            };
            let task = self.task_mut(slot);
            task.done_bytes += len_bytes;
            if pdu.final_bit {
                task.open_r2ts -= 1;
                self.solicited.pop_front();
            } else if let Some(front) = self.solicited.front_mut() {
                front.offset_bytes += len_bytes;
                front.left_bytes -= len_bytes;
                front.data_sn = front.data_sn.next();
            }
            if pdu.final_bit {
                self.data_sent(slot, now);
            }
            let data = DataRef { slot, offset_bytes: s.offset_bytes, len_bytes };
            return Some(self.tx(pdu.encode(), Some(data)));
        }
    }

    fn command_pdu(&mut self, now: Instant) -> Option<TxPdu> {
        // A logout that is on its way stops new commands (11.9.1, event 1).
        // So does a reset of the unit: what was sent behind it would be in doubt (4.2.3.3 has it survive, many a target
        // ends it), and must neither count as ended nor be repeated while it may live.
        if self.logout.is_some() || self.is_resetting() || self.cmd_sn.is_after(self.max_cmd_sn) {
            if !self.queue.is_empty() {
                self.flow.stalled(now);
            }
            return None;
        }
        let slot = self.queue.pop_front()?;
        self.flow.goes(now);
        let command = self.task(slot).command;
        let is_write = command.direction == Direction::Write;
        // The four cases of InitialR2T and ImmediateData (13.10, 13.11).
        let first_burst = if is_write { command.len_bytes.min(self.config.first_burst_bytes) } else { 0 };
        let immediate =
            if self.config.immediate_data { first_burst.min(self.config.max_send_bytes) } else { 0 };
        let unsolicited = if self.config.initial_r2t { immediate } else { first_burst };
        let cmd_sn = self.cmd_sn.take();
        self.active += 1;
        let task = self.task_mut(slot);
        task.state = State::Active;
        task.cmd_sn = cmd_sn;
        task.done_bytes = immediate;
        task.asked_bytes = unsolicited;
        if unsolicited > immediate {
            self.unsolicited = Some(Unsolicited {
                slot,
                offset_bytes: immediate,
                end_bytes: unsolicited,
                data_sn: Serial(0),
            });
        }
        if unsolicited == immediate {
            self.data_sent(slot, now);
        }
        let pdu = ScsiCommand {
            immediate: false,
            final_bit: unsolicited == immediate,
            read: command.direction == Direction::Read,
            write: is_write,
            attribute: TaskAttribute::Simple,
            ahs_len_bytes: 0,
            data_len_bytes: immediate,
            lun: command.lun,
            itt: self.itt(slot),
            expected_len_bytes: command.len_bytes,
            cmd_sn,
            exp_stat_sn: self.exp_stat_sn,
            cdb: command.cdb.0,
        };
        let data = (immediate > 0).then_some(DataRef { slot, offset_bytes: 0, len_bytes: immediate });
        Some(self.tx(pdu.encode(), data))
    }

    /// Everything of a command's output that may be sent now was sent: what is left waits for an R2T.
    fn data_sent(&mut self, slot: u16, now: Instant) {
        let task = self.task(slot);
        if task.command.direction == Direction::Write && task.asked_bytes < task.command.len_bytes {
            self.flow.waits(slot, now);
        } else {
            self.flow.begins(slot);
        }
    }

    fn tx(&self, bhs: Bhs, data: Option<DataRef>) -> TxPdu {
        let mut bytes = [0; BHS_BYTES + DIGEST_BYTES];
        bytes[..BHS_BYTES].copy_from_slice(&bhs.0);
        let mut len = BHS_BYTES;
        if self.config.header_digest {
            bytes[BHS_BYTES..].copy_from_slice(&digest_bytes(&bhs.0));
            len += DIGEST_BYTES;
        }
        // A segment of no bytes has no digest (11.2.3).
        let data_digest = self.config.data_digest && data.is_some();
        TxPdu { bytes, len: len as u8, data, data_digest }
    }
}
