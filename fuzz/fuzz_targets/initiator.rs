//! An initiator's session with a hostile target.
//!
//! Holds: no panic; every command is answered once; a command that succeeds has all its bytes, each placed once; no
//! data is placed, or sent from, outside a command's buffer.
#![no_main]

use std::time::{Duration, Instant};

use iscsi::initiator::{Command, Config, Direction, Event, Outcome, Place, Session};
use iscsi::pdu::{Bhs, InitiatorPdu, Itt, Opcode};
use iscsi::scsi::{Cdb, Lun, Status};
use iscsi::serial::Serial;
use libfuzzer_sys::fuzz_target;

const SLOTS: u16 = 4;
const FIRST_CMD_SN: u32 = 0xFFFF_FFFE;
const FIRST_STAT_SN: u32 = 0xFFFF_FFFC;

fn config(flags: u8) -> Config {
    Config {
        slots: SLOTS,
        cmd_sn: Serial(FIRST_CMD_SN),
        exp_stat_sn: Serial(FIRST_STAT_SN),
        max_cmd_sn: Serial(FIRST_CMD_SN).add(2),
        cid: 0,
        initial_r2t: flags & 1 != 0,
        immediate_data: flags & 2 != 0,
        first_burst_bytes: 1024,
        max_burst_bytes: 2048,
        max_send_bytes: 600,
        max_receive_bytes: 2048,
        max_outstanding_r2t: 2,
        header_digest: false,
        data_digest: flags & 4 != 0,
        nop_interval: Duration::from_secs(5),
        nop_timeout: Duration::from_secs(5),
        task_management_timeout: Duration::from_secs(5),
        logout_timeout: Duration::from_secs(2),
    }
}

/// What the caller of the session knows of a command.
struct Known {
    command: Command,
    placed: Vec<bool>,
}

struct Harness {
    session: Session,
    now: Instant,
    known: [Option<Known>; SLOTS as usize],
    tags: Vec<Itt>,
    stat_sn: Serial,
    exp_cmd_sn: Serial,
}

impl Harness {
    fn submit(&mut self, slot: u16, kind: u8) {
        if !self.session.is_free(slot) {
            return;
        }
        let len_bytes = [0, 512, 1024, 4096][usize::from(kind & 3)];
        let (cdb, direction) = match (len_bytes, kind & 4) {
            (0, _) => (Cdb([0; 16]), Direction::None),
            (_, 0) => (Cdb::read(0, len_bytes / 512), Direction::Read),
            _ => (Cdb::write(0, len_bytes / 512, false), Direction::Write),
        };
        let timeout = Duration::from_secs(30);
        let exact = kind & 8 == 0;
        let command = Command { lun: Lun::from_number(300), cdb, direction, len_bytes, exact, timeout };
        self.session.submit(slot, command, self.now);
        self.known[usize::from(slot)] = Some(Known { command, placed: vec![false; len_bytes as usize] });
    }

    fn send(&mut self) {
        while let Some(tx) = self.session.next_pdu(self.now) {
            let mut bytes = [0; 48];
            bytes.copy_from_slice(&tx.header()[..48]);
            let bhs = Bhs(bytes);
            let pdu = InitiatorPdu::decode(&bhs).expect("what is sent decodes");
            if let InitiatorPdu::ScsiCommand(command) = pdu {
                self.exp_cmd_sn = command.cmd_sn.next();
            }
            if let Some(data) = tx.data {
                assert_eq!(data.len_bytes, bhs.data_len_bytes());
                if let Some(known) = &self.known[usize::from(data.slot)] {
                    assert_eq!(known.command.direction, Direction::Write);
                    assert!(data.offset_bytes + data.len_bytes <= known.command.len_bytes);
                }
            }
            if !bhs.itt().is_none() {
                self.tags.retain(|&tag| tag != bhs.itt());
                self.tags.push(bhs.itt());
                if self.tags.len() > 8 {
                    self.tags.remove(0);
                }
            }
        }
    }

    /// Receives a PDU; false if the session cannot go on.
    fn receive(&mut self, bhs: &Bhs, data: &[u8], intact: bool) -> bool {
        let Ok(place) = self.session.header(bhs, self.now) else { return false };
        let inline = match place {
            Place::None | Place::Discard { .. } => &[],
            Place::Inline { len_bytes } => {
                assert_eq!(len_bytes as usize, data.len());
                data
            }
            Place::Task { slot, offset_bytes, len_bytes } => {
                let known = self.known[usize::from(slot)].as_mut().expect("data for a command");
                assert_eq!(known.command.direction, Direction::Read);
                for byte in &mut known.placed[offset_bytes as usize..][..len_bytes as usize] {
                    assert!(!std::mem::replace(byte, true), "a byte placed twice");
                }
                &[]
            }
        };
        let alive = self.session.end(inline, intact).is_ok();
        self.events();
        alive
    }

    fn events(&mut self) {
        while let Some(event) = self.session.next_event() {
            let Event::Done { slot, outcome } = event else { continue };
            let known = self.known[usize::from(slot)].take().expect("answered once");
            if let Outcome::Status { status: Status::GOOD, transferred_bytes, .. } = outcome
                && known.command.direction == Direction::Read
            {
                if known.command.exact {
                    assert_eq!(transferred_bytes, known.command.len_bytes);
                }
                let placed = known.placed.iter().take_while(|&&placed| placed).count();
                assert!(placed >= transferred_bytes as usize, "success with bytes missing");
            }
        }
    }
}

const OPCODES: [Opcode; 9] = [
    Opcode::ScsiResponse,
    Opcode::DataIn,
    Opcode::R2t,
    Opcode::NopIn,
    Opcode::TaskManagementResponse,
    Opcode::LogoutResponse,
    Opcode::AsyncMessage,
    Opcode::Reject,
    Opcode::TextResponse,
];

fuzz_target!(|input: &[u8]| {
    let Some((&flags, mut input)) = input.split_first() else { return };
    let now = Instant::now();
    let mut harness = Harness {
        session: Session::new(config(flags), now),
        now,
        known: Default::default(),
        tags: Vec::new(),
        stat_sn: Serial(FIRST_STAT_SN),
        exp_cmd_sn: Serial(FIRST_CMD_SN),
    };
    while let Some((&[operation, a, b, c, d], rest)) = input.split_first_chunk::<5>() {
        input = rest;
        match operation % 8 {
            0 => harness.submit(u16::from(a) % SLOTS, b),
            1 => harness.send(),
            2 => {
                harness.now += Duration::from_millis(u64::from(a) * 100);
                if harness.session.timers(harness.now).is_err() {
                    break;
                }
                harness.events();
            }
            3 if a == 0xFF => harness.session.logout(harness.now, Duration::from_secs(1)),
            _ => {
                // Tags, numbers and sizes right unless a bit of the operation says otherwise.
                let opcode = OPCODES[usize::from(a) % OPCODES.len()];
                let mut bhs = Bhs::new(opcode);
                bhs.0[1] = b | if operation & 0x10 == 0 { 0x80 } else { 0 };
                if operation & 0x20 != 0 {
                    (bhs.0[2], bhs.0[3]) = (d & 0x83, d >> 2);
                }
                let tag = harness.tags.iter().rev().nth(usize::from(c) % 8).copied().unwrap_or(Itt::NONE);
                bhs.0[16..20].copy_from_slice(&tag.0.to_be_bytes());
                bhs.0[20..24].fill(if opcode == Opcode::R2t { 1 } else { 0xFF });
                bhs.0[24..28].copy_from_slice(&harness.stat_sn.0.to_be_bytes());
                bhs.0[28..32].copy_from_slice(&harness.exp_cmd_sn.0.to_be_bytes());
                bhs.0[32..36].copy_from_slice(&harness.exp_cmd_sn.add(3).0.to_be_bytes());
                bhs.0[39] = c >> 5;
                bhs.0[42] = (d >> 1) & 0x1E;
                bhs.0[46] = (d << 1) & 0x1E;
                let len_bytes = match opcode {
                    Opcode::DataIn => usize::from(d & 0x0F) * 256,
                    Opcode::ScsiResponse | Opcode::AsyncMessage if d & 1 == 1 => 20,
                    Opcode::Reject => 48,
                    _ => 0,
                };
                let (mut data, rest) = input.split_at(input.len().min(len_bytes));
                let padded;
                if opcode == Opcode::DataIn {
                    // Its bytes do not matter, their number does.
                    padded = vec![0; len_bytes];
                    data = &padded;
                } else {
                    input = rest;
                }
                bhs.set_data_len(data.len() as u32);
                if operation & 0x40 != 0
                    && let Some((patch, rest)) = input.split_first_chunk::<2>()
                {
                    bhs.0[8 + usize::from(patch[0]) % 40] = patch[1];
                    input = rest;
                }
                let takes_stat_sn = match opcode {
                    Opcode::DataIn => bhs.0[1] & 1 != 0,
                    Opcode::R2t => false,
                    Opcode::NopIn => bhs.itt() != Itt::NONE,
                    _ => true,
                };
                if !harness.receive(&bhs, data, operation & 0x80 == 0) {
                    break;
                }
                if takes_stat_sn {
                    harness.stat_sn = harness.stat_sn.next();
                }
            }
        }
    }
    // What was not answered is all there is to repeat.
    let mut unanswered = Vec::new();
    harness.events();
    harness.session.unanswered(&mut unanswered);
    unanswered.sort_unstable();
    let known: Vec<u16> = (0..SLOTS).filter(|&slot| harness.known[usize::from(slot)].is_some()).collect();
    assert_eq!(unanswered, known);
});
