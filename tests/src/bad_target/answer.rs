//! The answer to a command: a list of correct PDUs, then changed by the rules.

use std::time::Duration;

use iscsi::pdu::{
    AsyncEvent, AsyncMessage, Bhs, DataIn, DataInStatus, Itt, NopIn, Opcode, Pdu, R2t, Reject, RejectReason,
    Residual, ScsiCommand, ScsiResponse, ScsiResponseCode, TargetSn, Ttt,
};
use iscsi::scsi::{Lun, Sense, Status};
use iscsi::serial::Serial;

use super::disk::Done;
use super::fields::Field;
use super::script::{Action, Extra, Which};

/// Which counters a PDU carries; they are put in when it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// StatSN, which advances, and the window.
    Status,
    /// StatSN as it will be next, and the window.
    Next,
    /// The window only.
    Window,
    /// None: sent as it is.
    None,
    /// No PDU, but the FIN: nothing more will be sent.
    Fin,
}

/// Changes a field after the counters were put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edit {
    /// This value.
    Set(Field, u64),
    /// Plus this.
    Add(Field, u64),
    /// These bits.
    Or(Field, u64),
}

impl Edit {
    /// Changes a header.
    pub fn apply(self, header: &mut [u8; 48]) {
        match self {
            Self::Set(field, value) => field.put(header, value),
            Self::Add(field, value) => {
                let sum = field.get(header).wrapping_add(value);
                field.put(header, sum);
            }
            Self::Or(field, mask) => {
                let bits = field.get(header) | mask;
                field.put(header, bits);
            }
        }
    }
}

/// A PDU to send.
#[derive(Clone, Debug)]
pub struct Out {
    /// Header.
    pub header: [u8; 48],
    /// Data segment; for [`Numbers::None`] all bytes, header included.
    pub data: Vec<u8>,
    /// Counters.
    pub numbers: Numbers,
    /// Changes.
    pub edits: Vec<Edit>,
    /// The header digest is wrong.
    pub spoil_header: bool,
    /// The data digest is wrong.
    pub spoil_data: bool,
}

const SN: TargetSn = TargetSn { stat_sn: Serial(0), exp_cmd_sn: Serial(0), max_cmd_sn: Serial(0) };

impl Out {
    /// A PDU with these counters.
    pub fn new(pdu: &impl Pdu, data: Vec<u8>, numbers: Numbers) -> Self {
        let mut header = pdu.encode();
        header.set_data_len(data.len() as u32);
        Self { header: header.0, data, numbers, edits: Vec::new(), spoil_header: false, spoil_data: false }
    }

    /// The FIN.
    pub fn fin() -> Self {
        let none = Vec::new();
        Self { numbers: Numbers::Fin, ..Self::extra(&Extra::Raw(none), Lun::ZERO, None) }
    }

    /// The header with its edits.
    pub fn edited(&self) -> [u8; 48] {
        let mut header = self.header;
        for edit in &self.edits {
            edit.apply(&mut header);
        }
        header
    }

    /// Its opcode.
    pub fn opcode(&self) -> u8 {
        self.header[0] & 0x3F
    }

    /// Makes up a PDU.
    pub fn extra(extra: &Extra, lun: Lun, about: Option<&Bhs>) -> Self {
        match extra {
            Extra::Async(event, [p1, p2, p3]) => Self::asynchronous(*event, [*p1, *p2, *p3], lun, Vec::new()),
            Extra::AsyncSense(key, code) => {
                let mut data = vec![0, Sense::FIXED_BYTES as u8];
                data.extend_from_slice(&Sense::new(*key, *code).encode_fixed());
                Self::asynchronous(0, [0; 3], lun, data)
            }
            Extra::Nop(ttt) => {
                let pdu = NopIn { data_len_bytes: 0, lun, itt: Itt::NONE, ttt: Ttt(*ttt), sn: SN };
                Self::new(&pdu, Vec::new(), Numbers::Next)
            }
            Extra::NopBoth => {
                let pdu = NopIn { data_len_bytes: 0, lun, itt: Itt(1), ttt: Ttt(1), sn: SN };
                Self::new(&pdu, Vec::new(), Numbers::Status)
            }
            Extra::Reject(reason) => {
                let bytes = about.map_or([0; 48], |bhs| bhs.0).to_vec();
                let pdu =
                    Reject { reason: RejectReason::Protocol, data_len_bytes: 48, sn: SN, data_sn: Serial(0) };
                let mut out = Self::new(&pdu, bytes, Numbers::Status);
                out.header[2] = *reason;
                out
            }
            Extra::Stray => {
                let pdu = DataIn {
                    final_bit: false,
                    ack: false,
                    status: None,
                    data_len_bytes: 4,
                    lun: Lun::ZERO,
                    itt: Itt(0xABC0_0003),
                    ttt: Ttt::NONE,
                    exp_cmd_sn: Serial(0),
                    max_cmd_sn: Serial(0),
                    data_sn: Serial(0),
                    offset_bytes: 0,
                };
                Self::new(&pdu, vec![0xEE; 4], Numbers::Window)
            }
            Extra::Raw(bytes) => {
                let mut header = [0; 48];
                let known = bytes.len().min(48);
                header[..known].copy_from_slice(&bytes[..known]);
                Self {
                    header,
                    data: bytes.clone(),
                    numbers: Numbers::None,
                    edits: Vec::new(),
                    spoil_header: false,
                    spoil_data: false,
                }
            }
        }
    }

    fn asynchronous(event: u8, parameters: [u16; 3], lun: Lun, data: Vec<u8>) -> Self {
        let pdu = AsyncMessage {
            event: AsyncEvent::Scsi,
            vendor_code: 0,
            data_len_bytes: data.len() as u32,
            lun,
            sn: SN,
            parameter1: parameters[0],
            parameter2: parameters[1],
            parameter3: parameters[2],
        };
        let mut out = Self::new(&pdu, data, Numbers::Status);
        out.header[36] = event;
        out
    }

    /// An R2T.
    pub fn r2t(command: &ScsiCommand, ttt: u32, r2t_sn: u32, offset_bytes: u32, len_bytes: u32) -> Self {
        let pdu = R2t {
            lun: command.lun,
            itt: command.itt,
            ttt: Ttt(ttt),
            sn: SN,
            r2t_sn: Serial(r2t_sn),
            offset_bytes,
            desired_len_bytes: len_bytes,
        };
        Self::new(&pdu, Vec::new(), Numbers::Next)
    }
}

/// How Data-In is cut.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Longest segment that the initiator takes.
    pub segment_bytes: usize,
    /// MaxBurstLength.
    pub burst_bytes: usize,
    /// The status comes in a Response.
    pub apart: bool,
}

/// The correct answer, but for what `actions` say of its substance. `moved_bytes`: output data that was fetched.
pub fn compose(
    command: &ScsiCommand,
    done: &Done,
    moved_bytes: usize,
    mut shape: Shape,
    actions: &[Action],
) -> Vec<Out> {
    let good = done.status == Status::GOOD.0;
    let expected = command.expected_len_bytes as usize;
    let mut data = if command.read && good { &done.data[..done.data.len().min(expected)] } else { &[] };
    let moved = if command.write { moved_bytes } else { done.data.len() };
    let mut told = match (good, command.read || command.write) {
        (true, true) if moved < expected => Residual::Underflow((expected - moved) as u32),
        (true, true) if moved > expected => Residual::Overflow((moved - expected) as u32),
        (false, true) if expected > 0 => Residual::Underflow(expected as u32),
        _ => Residual::None,
    };
    for action in actions {
        match *action {
            Action::Short(n) => {
                let n = n.min(data.len());
                data = &data[..data.len() - n];
                told = Residual::Underflow(n as u32);
            }
            Action::Missing(n) => data = &data[..data.len() - n.min(data.len())],
            Action::Apart | Action::Response(_) => shape.apart = true,
            Action::Segment(n) => shape.segment_bytes = n.clamp(1, shape.segment_bytes),
            Action::Residual(true, n) => told = Residual::Overflow(n),
            Action::Residual(false, n) => told = Residual::Underflow(n),
            _ => {}
        }
    }
    let mut outs = data_in(command, data, shape, actions.contains(&Action::Empty));
    let last_carries = good && done.sense.is_none() && !shape.apart;
    if let (true, Some(last)) = (last_carries, outs.last_mut()) {
        let (flags, count) = match told {
            Residual::None => (0, 0),
            Residual::Overflow(count) => (0x04, count),
            Residual::Underflow(count) => (0x02, count),
        };
        last.header[1] |= 0x81 | flags;
        last.header[44..48].copy_from_slice(&count.to_be_bytes());
        last.numbers = Numbers::Status;
        return outs;
    }
    let mut sense = Vec::new();
    if let Some(s) = done.sense {
        sense.extend_from_slice(&[0, Sense::FIXED_BYTES as u8]);
        sense.extend_from_slice(&s.encode_fixed());
    }
    for action in actions {
        if let (Action::SenseLength(n), [high, low, ..]) = (action, &mut sense[..]) {
            [*high, *low] = n.to_be_bytes();
        }
    }
    let response = ScsiResponse {
        response: ScsiResponseCode::Completed,
        status: done.status,
        residual: told,
        bidi_residual: Residual::None,
        data_len_bytes: sense.len() as u32,
        itt: command.itt,
        snack_tag: 0,
        sn: SN,
        exp_data_sn: Serial(outs.len() as u32),
    };
    outs.push(Out::new(&response, sense, Numbers::Status));
    outs
}

fn data_in(command: &ScsiCommand, data: &[u8], shape: Shape, empty_first: bool) -> Vec<Out> {
    let mut outs = Vec::new();
    if empty_first && !data.is_empty() {
        let mut empty = data_in(command, &data[..1], shape, false).remove(0);
        empty.data.clear();
        empty.header[1] = 0;
        empty.header[5..8].fill(0);
        outs.push(empty);
    }
    for burst in data.chunks(shape.burst_bytes.max(1)) {
        let pieces = burst.len().div_ceil(shape.segment_bytes);
        for (n, piece) in burst.chunks(shape.segment_bytes).enumerate() {
            let offset = piece.as_ptr() as usize - data.as_ptr() as usize;
            let pdu = DataIn {
                final_bit: n + 1 == pieces,
                ack: false,
                status: None::<DataInStatus>,
                data_len_bytes: piece.len() as u32,
                lun: Lun::ZERO,
                itt: command.itt,
                ttt: Ttt::NONE,
                exp_cmd_sn: Serial(0),
                max_cmd_sn: Serial(0),
                data_sn: Serial(outs.len() as u32),
                offset_bytes: offset as u32,
            };
            outs.push(Out::new(&pdu, piece.to_vec(), Numbers::Window));
        }
    }
    outs
}

/// Where a PDU stands in an answer. R2Ts are named by their number in the command.
fn find(outs: &[Out], which: Which) -> Option<usize> {
    match which {
        Which::Data(n) => {
            let data = outs.iter().enumerate().filter(|(_, out)| out.opcode() == Opcode::DataIn as u8);
            data.map(|(at, _)| at).nth(n)
        }
        Which::R2t(n) => outs.iter().position(|out| {
            out.opcode() == Opcode::R2t as u8 && out.header[36..40] == (n as u32).to_be_bytes()
        }),
        Which::Status => outs.iter().rposition(|out| out.numbers == Numbers::Status),
    }
}

/// How an answer is sent.
#[derive(Clone, Debug, Default)]
pub struct Manner {
    /// Later.
    pub after: Option<Duration>,
    /// So many bytes of it, then FIN.
    pub truncate: Option<usize>,
}

/// Changes an answer as the rules want it.
pub fn spoil(outs: &mut Vec<Out>, actions: &[Action], lun: Lun, about: Option<&Bhs>) -> Manner {
    let mut manner = Manner::default();
    for action in actions {
        match action {
            Action::Slow(time) => manner.after = Some(*time),
            Action::Truncate(n) => manner.truncate = Some(*n),
            Action::Insert(first, extra) => {
                let at = if *first { 0 } else { outs.len() };
                outs.insert(at, Out::extra(extra, lun, about));
            }
            Action::Response(code) => {
                if let Some(at) = find(outs, Which::Status) {
                    outs[at].header[2] = *code;
                }
            }
            _ => spoil_one(outs, action),
        }
    }
    manner
}

fn spoil_one(outs: &mut Vec<Out>, action: &Action) {
    let (Action::Drop(which)
    | Action::Repeat(which)
    | Action::Swap(which)
    | Action::Cut(which, _)
    | Action::Set(which, ..)
    | Action::Add(which, ..)
    | Action::Or(which, ..)
    | Action::SpoilHeader(which)
    | Action::SpoilData(which)) = action
    else {
        return;
    };
    let Some(at) = find(outs, *which) else { return };
    let count = outs.len();
    let out = &mut outs[at];
    match *action {
        Action::Drop(_) => {
            outs.remove(at);
        }
        Action::Repeat(_) => {
            let mut again = out.clone();
            if again.opcode() == Opcode::DataIn as u8 {
                // The repetition carries no status: that may come only once.
                again.header[1] &= !0x01;
                again.numbers = Numbers::Window;
                outs.insert(at, again);
            } else {
                outs.insert(at + 1, again);
            }
        }
        Action::Swap(_) if at + 1 < count => outs.swap(at, at + 1),
        Action::Cut(_, n) => {
            let n = n.min(out.data.len());
            out.data.drain(..n);
            let offset = Field { at: 40, len: 4 };
            let moved = offset.get(&out.header) + n as u64;
            offset.put(&mut out.header, moved);
            Field { at: 5, len: 3 }.put(&mut out.header, out.data.len() as u64);
        }
        Action::Set(_, field, value) => out.edits.push(Edit::Set(field, value)),
        Action::Add(_, field, value) => out.edits.push(Edit::Add(field, value)),
        Action::Or(_, field, value) => out.edits.push(Edit::Or(field, value)),
        Action::SpoilHeader(_) => out.spoil_header = true,
        Action::SpoilData(_) => out.spoil_data = true,
        _ => {}
    }
}
