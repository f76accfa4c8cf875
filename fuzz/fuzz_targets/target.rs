//! A target's session with a hostile initiator.
//!
//! Holds: no panic; every data byte is placed inside its task's data and inside the PDU it came in; what is sent
//! decodes, lies inside the expected length, and its StatSN has no gap.
#![no_main]

use std::collections::HashMap;

use iscsi::pdu::{Bhs, InitiatorPdu, Itt, Opcode, TargetPdu, TaskResponseCode, Ttt};
use iscsi::scsi::Status;
use iscsi::serial::Serial;
use iscsi::target::{Completion, Config, Event, OutgoingData, Session, TaskId};
use libfuzzer_sys::fuzz_target;

const FIRST_STAT_SN: u32 = 0xFFFF_FFFD;
const FIRST_CMD_SN: u32 = 0xFFFF_FFFE;
const DEVICE_BYTES: u32 = 4096;

fn config(flags: u8) -> Config {
    Config {
        queue_depth: 4,
        max_recv_segment_bytes: 2048,
        max_send_segment_bytes: 600,
        max_burst_bytes: 1024,
        first_burst_bytes: 512,
        initial_r2t: flags & 1 != 0,
        immediate_data: flags & 2 != 0,
        max_outstanding_r2t: 2,
        discovery: flags & 0x1C == 0x1C,
        exp_cmd_sn: Serial(FIRST_CMD_SN),
        stat_sn: Serial(FIRST_STAT_SN),
        cid: 0,
    }
}

struct Harness {
    session: Session,
    /// Expected length of the tasks under way, by slot.
    lengths: HashMap<usize, u32>,
    /// Tasks whose data is complete, to be ended later.
    ready: Vec<TaskId>,
    transfers: Vec<(Itt, Ttt, u32)>,
    stat_sn: Serial,
    cmd_sn: Serial,
}

impl Harness {
    fn receive(&mut self, bhs: &Bhs, data: &[u8], digest_ok: bool) -> bool {
        if !self.session.can_receive() {
            return true;
        }
        let Ok(event) = self.session.receive(bhs, data, digest_ok) else { return false };
        match event {
            Event::Handled | Event::Logout => {}
            Event::Command(task) => {
                let command = self.session.command(task);
                self.lengths.insert(task.slot(), command.expected_len_bytes);
                if command.write {
                    let accepted = self.session.accept_data(task, DEVICE_BYTES);
                    assert!(accepted.immediate_len as usize <= data.len());
                    assert!(accepted.immediate_len <= command.expected_len_bytes.min(DEVICE_BYTES));
                    if accepted.complete {
                        self.ready.push(task);
                    }
                } else {
                    // The machine wants an answer before the next PDU.
                    self.complete_task(task, command.cdb[0] & 1 != 0);
                }
            }
            Event::Data(placement) => {
                assert!(placement.len as usize <= data.len());
                let wanted = self.lengths[&placement.task.slot()].min(DEVICE_BYTES);
                assert!(placement.offset.checked_add(placement.len).is_some_and(|end| end <= wanted));
                if placement.complete {
                    self.ready.push(placement.task);
                }
            }
            Event::Aborted(task) => self.ready.retain(|&ready| ready != task),
            Event::TaskManagement(request) => {
                let ready = &mut self.ready;
                self.session.abort_tasks(Some(request.lun), |task| ready.retain(|&ready| ready != task));
                self.session.complete_task_management(request.itt, TaskResponseCode::Complete);
            }
            Event::Text(request) => self.session.send_text(request.itt, Ttt::NONE, false, data.to_vec()),
        }
        true
    }

    fn complete(&mut self, which: u8, bad: bool) {
        if self.ready.is_empty() {
            return;
        }
        let task = self.ready.swap_remove(usize::from(which) % self.ready.len());
        self.complete_task(task, bad);
    }

    fn complete_task(&mut self, task: TaskId, bad: bool) {
        let completion = if bad {
            Completion { status: Status::CHECK_CONDITION, device_len: 0, sense: &[0x70; 18] }
        } else {
            Completion { status: Status::GOOD, device_len: DEVICE_BYTES, sense: &[] }
        };
        self.session.complete(task, completion);
    }

    fn send(&mut self) {
        while let Some(out) = self.session.poll_transmit() {
            let pdu = TargetPdu::decode(&out.header).expect("what is sent decodes");
            let len_bytes = match out.data {
                OutgoingData::None => 0,
                OutgoingData::Task { task, offset, len } => {
                    assert!(offset + len <= self.lengths[&task.slot()]);
                    len
                }
                OutgoingData::Sense { len, .. } => u32::from(len),
                OutgoingData::Bytes(bytes) => bytes.len() as u32,
            };
            assert_eq!(len_bytes, out.header.data_len_bytes());
            let stat_sn = match pdu {
                TargetPdu::DataIn(data_in) => data_in.status.map(|status| status.stat_sn),
                TargetPdu::R2t(r2t) => {
                    assert!(r2t.desired_len_bytes <= 1024);
                    self.transfers.push((r2t.itt, r2t.ttt, r2t.offset_bytes));
                    None
                }
                TargetPdu::NopIn(nop) if nop.itt.is_none() => None,
                TargetPdu::NopIn(nop) => Some(nop.sn.stat_sn),
                TargetPdu::ScsiResponse(response) => Some(response.sn.stat_sn),
                TargetPdu::TaskManagementResponse(response) => Some(response.sn.stat_sn),
                TargetPdu::TextResponse(response) => Some(response.sn.stat_sn),
                TargetPdu::LogoutResponse(response) => Some(response.sn.stat_sn),
                TargetPdu::Reject(reject) => Some(reject.sn.stat_sn),
                TargetPdu::AsyncMessage(message) => Some(message.sn.stat_sn),
                TargetPdu::LoginResponse(_) => panic!("a login response in the full-feature phase"),
            };
            if let Some(stat_sn) = stat_sn {
                assert_eq!(stat_sn, self.stat_sn);
                self.stat_sn = stat_sn.next();
            }
        }
    }
}

const OPCODES: [Opcode; 8] = [
    Opcode::ScsiCommand,
    Opcode::DataOut,
    Opcode::NopOut,
    Opcode::TaskManagementRequest,
    Opcode::TextRequest,
    Opcode::LogoutRequest,
    Opcode::Snack,
    Opcode::LoginRequest,
];

fuzz_target!(|input: &[u8]| {
    let Some((&flags, mut input)) = input.split_first() else { return };
    let mut harness = Harness {
        session: Session::new(config(flags)),
        lengths: HashMap::new(),
        ready: Vec::new(),
        transfers: Vec::new(),
        stat_sn: Serial(FIRST_STAT_SN),
        cmd_sn: Serial(FIRST_CMD_SN),
    };
    while let Some((&[operation, a, b, c, d], rest)) = input.split_first_chunk::<5>() {
        input = rest;
        match operation % 8 {
            0 => harness.send(),
            1 => harness.complete(a, b & 1 != 0),
            2 if a == 0 => {
                harness.session.send_ping();
            }
            kind => {
                // Mostly commands and their data; tags, numbers and sizes right unless a bit says otherwise.
                let opcode = match kind {
                    3 | 4 => Opcode::ScsiCommand,
                    5 | 6 => Opcode::DataOut,
                    _ => OPCODES[usize::from(a) % OPCODES.len()],
                };
                let mut bhs = Bhs::new(opcode);
                bhs.set_immediate(operation & 0x10 != 0 && opcode != Opcode::DataOut);
                bhs.0[1] = b;
                bhs.0[19] = c & 0x0F;
                bhs.0[20..24].fill(0xFF);
                bhs.0[24..28].copy_from_slice(&harness.cmd_sn.0.to_be_bytes());
                let mut len_bytes = usize::from(d & 0x0F) * 128;
                match opcode {
                    Opcode::ScsiCommand => {
                        // Expected length.
                        bhs.0[20..24].copy_from_slice(&(u32::from(d >> 4) * 512).to_be_bytes());
                        if bhs.0[1] & 0x20 == 0 {
                            len_bytes = 0;
                        }
                    }
                    Opcode::DataOut if operation & 0x20 == 0 && !harness.transfers.is_empty() => {
                        let index = usize::from(c) % harness.transfers.len();
                        let (itt, ttt, offset) = harness.transfers[index];
                        bhs.0[16..20].copy_from_slice(&itt.0.to_be_bytes());
                        bhs.0[20..24].copy_from_slice(&ttt.0.to_be_bytes());
                        bhs.0[40..44].copy_from_slice(&offset.to_be_bytes());
                        if bhs.0[1] & 0x80 != 0 {
                            harness.transfers.swap_remove(index);
                        } else {
                            harness.transfers[index].2 = offset.wrapping_add(len_bytes as u32);
                        }
                    }
                    Opcode::DataOut => bhs.0[42] = d >> 4,
                    _ => len_bytes &= 0xFF,
                }
                bhs.set_data_len(len_bytes as u32);
                if operation & 0x40 != 0
                    && let Some((patch, rest)) = input.split_first_chunk::<2>()
                {
                    bhs.0[8 + usize::from(patch[0]) % 40] = patch[1];
                    input = rest;
                }
                let orders = InitiatorPdu::decode(&bhs).is_ok() && !bhs.immediate();
                if !harness.receive(&bhs, &vec![0; len_bytes], operation & 0x80 == 0) {
                    harness.send();
                    return;
                }
                if orders && !matches!(opcode, Opcode::DataOut | Opcode::Snack | Opcode::LoginRequest) {
                    harness.cmd_sn = harness.cmd_sn.next();
                }
            }
        }
    }
    while !harness.ready.is_empty() {
        harness.complete(0, false);
    }
    harness.send();
});
