//! Initiator and target of this crate, back to back over byte streams that are cut at random: random commands,
//! parameters and orders of completion, checked against a model of the disk.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::digest::Crc32c;
use crate::pdu::framing::{Digests, Limits, Receiver, Step, Trailer, append_pdu, write_header};
use crate::pdu::{AsyncMessage, TaskResponseCode};
use crate::scsi::sense::asc;
use crate::scsi::{SenseKey, opcode};
use crate::target;

const SLOTS: u16 = 16;
/// Each slot has a region of its own, so that commands underway at once never touch the same bytes.
const REGION_BYTES: usize = 64 << 10;

/// xorshift64: all choices follow from the seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

#[derive(Clone, Debug)]
struct Shape {
    seed: u64,
    initial_r2t: bool,
    immediate_data: bool,
    digests: Digests,
    first_burst_bytes: u32,
    max_burst_bytes: u32,
    to_target_bytes: u32,
    to_initiator_bytes: u32,
    max_outstanding_r2t: u8,
    window: u16,
    max_cut: usize,
}

fn shape() -> impl Strategy<Value = Shape> {
    let length = || prop_oneof![Just(512u32), Just(1000), Just(4096), Just(8192), 512u32..70_000];
    (
        (1u64.., any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()),
        (length(), length(), length(), length()),
        (
            1u8..5,
            1u16..24,
            prop_oneof![1 => Just(1usize), 4 => Just(50), 4 => Just(5000), 4 => Just(100_000)],
        ),
    )
        .prop_map(
            |((seed, initial_r2t, immediate_data, header, data), lengths, (r2ts, window, max_cut))| Shape {
                seed,
                initial_r2t,
                immediate_data,
                digests: Digests { header, data },
                first_burst_bytes: lengths.0.min(lengths.1),
                max_burst_bytes: lengths.1,
                to_target_bytes: lengths.2,
                to_initiator_bytes: lengths.3,
                max_outstanding_r2t: r2ts,
                window,
                max_cut,
            },
        )
}

/// What a slot is doing: the bytes of its buffer, and what to expect of its end.
struct Doing {
    buffer: Vec<u8>,
    is_write: bool,
    at: usize,
    fails: bool,
}

/// The target: its machine, its disk, and commands that wait to be carried out.
struct Device {
    session: target::Session,
    rx: Receiver,
    data: Vec<u8>,
    disk: Vec<u8>,
    buffers: Vec<Vec<u8>>,
    pending: Vec<target::TaskId>,
}

struct World {
    random: Random,
    now: Instant,
    digests: Digests,
    session: Session,
    rx: Receiver,
    place: Place,
    inline: Vec<u8>,
    slots: Vec<Option<Doing>>,
    model: Vec<u8>,
    device: Device,
    to_target: VecDeque<u8>,
    to_initiator: VecDeque<u8>,
    ended: usize,
    pinged: usize,
}

impl World {
    fn new(shape: &Shape) -> Self {
        let stat_sn = Serial(FIRST_STAT_SN);
        let cmd_sn = Serial(FIRST_CMD_SN);
        let config = Config {
            slots: SLOTS,
            max_cmd_sn: cmd_sn.add(u32::from(shape.window)).sub(1),
            initial_r2t: shape.initial_r2t,
            immediate_data: shape.immediate_data,
            first_burst_bytes: shape.first_burst_bytes,
            max_burst_bytes: shape.max_burst_bytes,
            max_send_bytes: shape.to_target_bytes,
            max_receive_bytes: shape.to_initiator_bytes,
            max_outstanding_r2t: shape.max_outstanding_r2t.into(),
            header_digest: shape.digests.header,
            data_digest: shape.digests.data,
            ..config()
        };
        let target_config = target::Config {
            queue_depth: shape.window,
            max_recv_segment_bytes: shape.to_target_bytes,
            max_send_segment_bytes: shape.to_initiator_bytes,
            max_burst_bytes: shape.max_burst_bytes,
            first_burst_bytes: shape.first_burst_bytes,
            initial_r2t: shape.initial_r2t,
            immediate_data: shape.immediate_data,
            max_outstanding_r2t: shape.max_outstanding_r2t,
            discovery: false,
            exp_cmd_sn: cmd_sn,
            stat_sn,
            cid: 0,
        };
        let receiver = |data_bytes| {
            let mut rx = Receiver::new(Limits { ahs_bytes: 0, data_bytes });
            rx.configure(Limits { ahs_bytes: 0, data_bytes }, shape.digests);
            rx
        };
        let now = Instant::now();
        let session = target::Session::new(target_config);
        let disk_bytes = usize::from(SLOTS) * REGION_BYTES;
        Self {
            random: Random(shape.seed),
            now,
            digests: shape.digests,
            session: Session::new(config, now),
            rx: receiver(shape.to_initiator_bytes),
            place: Place::None,
            inline: Vec::new(),
            slots: (0..SLOTS).map(|_| None).collect(),
            model: vec![0; disk_bytes],
            device: Device {
                buffers: vec![Vec::new(); session.slots()],
                session,
                rx: receiver(shape.to_target_bytes),
                data: Vec::new(),
                disk: vec![0; disk_bytes],
                pending: Vec::new(),
            },
            to_target: VecDeque::new(),
            to_initiator: VecDeque::new(),
            ended: 0,
            pinged: 0,
        }
    }

    fn submit(&mut self, slot: u16) {
        let blocks = 1 + self.random.below(REGION_BYTES / 512);
        let first = self.random.below(REGION_BYTES / 512 - blocks + 1);
        let at = usize::from(slot) * REGION_BYTES + first * 512;
        let is_write = self.random.below(2) == 0;
        let fails = self.random.below(12) == 0;
        let mut buffer = vec![0; blocks * 512];
        let mut command = read(buffer.len() as u32);
        if is_write {
            command = write(buffer.len() as u32);
            let fill = self.random.next().to_le_bytes();
            for (n, byte) in buffer.iter_mut().enumerate() {
                *byte = fill[n % 8] ^ (n / 8) as u8;
            }
            if !fails {
                self.model[at..at + buffer.len()].copy_from_slice(&buffer);
            }
        }
        let lba = (at / 512) as u64;
        command.cdb =
            if is_write { Cdb::write(lba, blocks as u32, fails) } else { Cdb::read(lba, blocks as u32) };
        if fails {
            // A mark for the device below; DPO means nothing here.
            command.cdb.0[1] |= 0x10;
        }
        command.lun = Lun::ZERO;
        self.slots[usize::from(slot)] = Some(Doing { buffer, is_write, at, fails });
        self.session.submit(slot, command, self.now);
    }

    fn initiator_sends(&mut self) {
        for _ in 0..1 + self.random.below(4) {
            let Some(pdu) = self.session.next_pdu(self.now) else { return };
            self.to_target.extend(pdu.header());
            if let Some(data) = pdu.data {
                let doing = self.slots[usize::from(data.slot)].as_ref().unwrap();
                let bytes = &doing.buffer[data.offset_bytes as usize..][..data.len_bytes as usize];
                self.to_target.extend(bytes);
                assert_eq!(pdu.data_digest, self.digests.data);
                let mut crc = Crc32c::new();
                crc.update(bytes);
                let trailer = Trailer::new(data.len_bytes, pdu.data_digest.then_some(crc));
                assert_eq!(pdu.pad_bytes(), (4 - bytes.len() % 4) % 4);
                self.to_target.extend(trailer.as_bytes());
            }
        }
    }

    fn initiator_receives(&mut self, max_cut: usize) {
        let len = (1 + self.random.below(max_cut)).min(self.to_initiator.len());
        let bytes: Vec<u8> = self.to_initiator.drain(..len).collect();
        let mut rest = &bytes[..];
        loop {
            match self.rx.step() {
                Step::Header => {
                    self.place = self.session.header(self.rx.header(), self.now).unwrap();
                    self.inline.clear();
                    self.rx.accept();
                }
                Step::Done { data_digest_ok } => {
                    self.session.end(&self.inline, data_digest_ok).unwrap();
                    self.rx.next_pdu();
                }
                _ if rest.is_empty() => break,
                Step::Framing { .. } => {
                    let taken = self.rx.feed(rest).unwrap();
                    rest = &rest[taken..];
                }
                Step::Data { offset_bytes: done, len_bytes } => {
                    let (part, behind) = rest.split_at(rest.len().min(len_bytes as usize));
                    match self.place {
                        Place::Task { slot, offset_bytes, .. } => {
                            let doing = self.slots[usize::from(slot)].as_mut().unwrap();
                            let at = (offset_bytes + done) as usize;
                            doing.buffer[at..at + part.len()].copy_from_slice(part);
                        }
                        Place::Inline { .. } => self.inline.extend_from_slice(part),
                        Place::None | Place::Discard { .. } => panic!("data without a place"),
                    }
                    self.rx.data(part);
                    rest = behind;
                }
            }
        }
        while let Some(event) = self.session.next_event() {
            match event {
                Event::Done { slot, outcome } => self.check(slot, outcome),
                Event::UnitEvent { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn check(&mut self, slot: u16, outcome: Outcome) {
        let doing = self.slots[usize::from(slot)].take().unwrap();
        let Outcome::Status { status, sense, transferred_bytes } = outcome else { panic!("{outcome:?}") };
        if doing.fails {
            assert_eq!(status, Status::CHECK_CONDITION);
            assert_eq!(sense.unwrap().code, asc::UNRECOVERED_READ_ERROR);
        } else {
            assert_eq!((status, transferred_bytes as usize), (Status::GOOD, doing.buffer.len()));
            let end = doing.at + doing.buffer.len();
            if !doing.is_write {
                assert!(doing.buffer == self.model[doing.at..end], "slot {slot} read something else");
            }
            assert!(
                self.device.disk[doing.at..end] == self.model[doing.at..end],
                "slot {slot}: disk differs"
            );
        }
        self.ended += 1;
    }

    fn target_receives(&mut self, max_cut: usize) {
        let len = (1 + self.random.below(max_cut)).min(self.to_target.len());
        let bytes: Vec<u8> = self.to_target.drain(..len).collect();
        let mut rest = &bytes[..];
        let device = &mut self.device;
        loop {
            match device.rx.step() {
                Step::Header => {
                    device.data.clear();
                    device.rx.accept();
                }
                Step::Done { data_digest_ok } => {
                    let header = *device.rx.header();
                    let event = device.session.receive(&header, &device.data, data_digest_ok).unwrap();
                    device.event(event);
                    device.rx.next_pdu();
                }
                _ if rest.is_empty() => break,
                Step::Framing { .. } => {
                    let taken = device.rx.feed(rest).unwrap();
                    rest = &rest[taken..];
                }
                Step::Data { len_bytes, .. } => {
                    let (part, behind) = rest.split_at(rest.len().min(len_bytes as usize));
                    device.data.extend_from_slice(part);
                    device.rx.data(part);
                    rest = behind;
                }
            }
        }
    }

    fn target_works(&mut self) {
        if !self.device.pending.is_empty() {
            let chosen = self.random.below(self.device.pending.len());
            let task = self.device.pending.swap_remove(chosen);
            self.device.carry_out(task);
        }
        if self.random.below(40) == 0 && self.device.session.send_ping() {
            self.pinged += 1;
        }
        if self.random.below(60) == 0 {
            let message = AsyncMessage {
                event: crate::pdu::AsyncEvent::Vendor,
                vendor_code: 1,
                data_len_bytes: 0,
                lun: Lun::ZERO,
                sn: TargetSn { stat_sn: Serial(0), exp_cmd_sn: Serial(0), max_cmd_sn: Serial(0) },
                parameter1: 0,
                parameter2: 0,
                parameter3: 0,
            };
            self.device.session.send_async(message, vec![1, 2, 3]);
        }
    }

    fn target_sends(&mut self) {
        for _ in 0..1 + self.random.below(4) {
            let Some(out) = self.device.session.poll_transmit() else { return };
            let data = match &out.data {
                target::OutgoingData::None => &[][..],
                target::OutgoingData::Task { task, offset, len } => {
                    &self.device.buffers[task.slot()][*offset as usize..][..*len as usize]
                }
                target::OutgoingData::Sense { bytes, len } => &bytes[..usize::from(*len)],
                target::OutgoingData::Bytes(bytes) => bytes,
            };
            assert_eq!(out.header.data_len_bytes() as usize, data.len());
            let mut pdu = Vec::new();
            append_pdu(&mut pdu, &out.header, data, self.digests);
            self.to_initiator.extend(pdu);
        }
    }

    /// Runs until `commands` commands have ended.
    fn run(&mut self, commands: usize, max_cut: usize) {
        let mut submitted = 0;
        let mut idle = 0;
        while self.ended < commands {
            let before =
                (self.ended, self.to_target.len(), self.to_initiator.len(), self.device.pending.len());
            if submitted < commands && self.random.below(2) == 0 {
                let slot = self.random.below(SLOTS.into()) as u16;
                if self.session.is_free(slot) {
                    self.submit(slot);
                    submitted += 1;
                }
            }
            // With single bytes a step is small: more of them.
            let rounds = if max_cut < 8 { 400 } else { 1 };
            self.initiator_sends();
            for _ in 0..rounds {
                self.target_receives(max_cut);
            }
            self.target_works();
            self.target_sends();
            for _ in 0..rounds {
                self.initiator_receives(max_cut);
            }
            let after =
                (self.ended, self.to_target.len(), self.to_initiator.len(), self.device.pending.len());
            idle = if before == after { idle + 1 } else { 0 };
            assert!(idle < 500, "nothing moves: {} of {commands} ended", self.ended);
        }
    }
}

impl Device {
    fn event(&mut self, event: target::Event) {
        match event {
            target::Event::Command(task) => {
                let command = self.session.command(task);
                let len = command.expected_len_bytes as usize;
                self.buffers[task.slot()] = vec![0; len];
                if command.write {
                    let accepted = self.session.accept_data(task, len as u32);
                    let now = accepted.immediate_len as usize;
                    self.buffers[task.slot()][..now].copy_from_slice(&self.data[..now]);
                    if accepted.complete {
                        self.pending.push(task);
                    }
                } else {
                    self.pending.push(task);
                }
            }
            target::Event::Data(placement) => {
                let (at, len) = (placement.offset as usize, placement.len as usize);
                self.buffers[placement.task.slot()][at..at + len].copy_from_slice(&self.data[..len]);
                if placement.complete {
                    self.pending.push(placement.task);
                }
            }
            target::Event::TaskManagement(request) => {
                self.session.complete_task_management(request.itt, TaskResponseCode::Complete);
            }
            target::Event::Handled | target::Event::Logout => {}
            other => panic!("{other:?}"),
        }
    }

    fn carry_out(&mut self, task: target::TaskId) {
        let command = self.session.command(task);
        let cdb = command.cdb;
        assert!(matches!(cdb[0], opcode::READ_10 | opcode::WRITE_10));
        let at = u32::from_be_bytes([cdb[2], cdb[3], cdb[4], cdb[5]]) as usize * 512;
        let buffer = &mut self.buffers[task.slot()];
        let end = at + buffer.len();
        if cdb[1] & 0x10 != 0 {
            let sense = Sense::new(SenseKey::MediumError, asc::UNRECOVERED_READ_ERROR).encode_fixed();
            let completion =
                target::Completion { status: Status::CHECK_CONDITION, device_len: 0, sense: &sense };
            return self.session.complete(task, completion);
        }
        if command.write {
            self.disk[at..end].copy_from_slice(buffer);
        } else {
            buffer.copy_from_slice(&self.disk[at..end]);
        }
        let device_len = buffer.len() as u32;
        let completion = target::Completion { status: Status::GOOD, device_len, sense: &[] };
        self.session.complete(task, completion);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Every command ends as it should, with the bytes that it should have, whatever was negotiated and however the
    /// streams are cut; the target finds nothing to object to, nor the initiator.
    #[test]
    fn initiator_and_target_agree(shape in shape()) {
        let mut world = World::new(&shape);
        world.run(60, shape.max_cut);
        prop_assert_eq!(world.session.counters().seen().collect::<Vec<_>>(), vec![]);
        let counters = world.device.session.counters();
        prop_assert_eq!(counters.rejects_sent, 0);
        prop_assert_eq!(counters.outside_window, 0);
        prop_assert_eq!(counters.data_sequence_errors, 0);
        prop_assert!(world.device.disk == world.model);
    }

    /// Whatever bytes a target sends, the session neither panics nor places anything outside a command's buffer.
    #[test]
    fn arbitrary_headers_do_no_harm(headers in proptest::collection::vec(any::<[u8; 48]>(), 1..40), seed in 1u64..) {
        let mut bench = Bench::new();
        let mut random = Random(seed);
        let mut tags = Vec::new();
        for slot in 0..8 {
            let command = if slot % 2 == 0 { read(8192) } else { write(8192) };
            tags.push(bench.start(slot, command).itt);
            while bench.next_tx().is_some() {}
        }
        for mut bytes in headers {
            // Mostly PDUs of a target, for tasks that exist, with numbers near the right ones.
            bytes[0] = [0x20, 0x21, 0x22, 0x25, 0x31, 0x32, 0x3F, 0x26][random.below(8)];
            if random.below(8) != 0 {
                let itt = tags[random.below(tags.len())];
                bytes[16..20].copy_from_slice(&itt.0.to_be_bytes());
                bytes[4..8].copy_from_slice(&(random.below(9000) as u32).to_be_bytes());
                bytes[36..40].copy_from_slice(&(random.below(3) as u32).to_be_bytes());
                bytes[40..44].copy_from_slice(&(random.below(9000) as u32).to_be_bytes());
                bytes[24..28].copy_from_slice(&bench.session.exp_stat_sn.0.to_be_bytes());
            }
            let Ok(place) = bench.session.header(&Bhs(bytes), bench.now) else { break };
            let mut inline = Vec::new();
            match place {
                Place::Task { slot, offset_bytes, len_bytes } => {
                    prop_assert!(slot % 2 == 0 && slot < 8, "only reads are placed");
                    prop_assert!(offset_bytes.checked_add(len_bytes).is_some_and(|end| end <= 8192));
                }
                Place::Inline { len_bytes } => {
                    prop_assert!(len_bytes <= 8192);
                    inline = (0..len_bytes).map(|_| random.next() as u8).collect();
                }
                Place::None | Place::Discard { .. } => {}
            }
            if bench.session.end(&inline, random.below(16) != 0).is_err() {
                break;
            }
            while let Some(event) = bench.session.next_event() {
                if let Event::Done { outcome: Outcome::Status { status: Status::GOOD, transferred_bytes, .. }, .. } = event {
                    prop_assert_eq!(transferred_bytes, 8192, "GOOD with missing bytes");
                }
            }
            while bench.session.next_pdu(bench.now).is_some() {}
        }
    }
}

#[test]
fn header_helpers_agree() {
    // The session writes its headers itself; the framing's helper must give the same bytes.
    let mut bench = Bench::with(Config { header_digest: true, ..config() });
    bench.submit(0, read(512));
    let pdu = bench.session.next_pdu(bench.now).unwrap();
    let mut out = [0; 52];
    let bhs = Bhs(pdu.header()[..48].try_into().unwrap());
    assert_eq!(write_header(&bhs, &[], Digests { header: true, data: false }, &mut out), Some(52));
    assert_eq!(out, pdu.header());
}
