//! How a PDU of the target goes wrong on its way out: numbers, order, tags and promises that do not hold.

use iscsi::pdu::{Bhs, DataIn, Opcode, Pdu, R2t, Residual, ScsiResponse, ScsiResponseCode};
use iscsi::scsi::Status;
use iscsi::serial::Serial;

use crate::faults::Kind;
use crate::rng::Rng;

/// One command's fault that shows in its PDUs.
#[derive(Clone, Debug)]
pub struct Mangle {
    pub kind: Kind,
    /// PDUs of the kind concerned that still go out right.
    pub after: u64,
    pub done: bool,
    held: Option<(Bhs, Vec<u8>)>,
}

/// PDUs that go out in place of one.
pub type Out = Vec<(Bhs, Vec<u8>)>;

fn put32(bhs: &mut Bhs, at: usize, value: u32) {
    bhs.0[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn get32(bhs: &Bhs, at: usize) -> u32 {
    u32::from_be_bytes([bhs.0[at], bhs.0[at + 1], bhs.0[at + 2], bhs.0[at + 3]])
}

impl Mangle {
    pub fn new(kind: Kind, rng: &mut Rng) -> Self {
        Self { kind, after: rng.below(3), done: false, held: None }
    }

    /// A PDU of the command goes out; `early` is set where GOOD is claimed before its time.
    pub fn apply(&mut self, header: Bhs, data: Vec<u8>, rng: &mut Rng, early: &mut bool) -> Out {
        let opcode = header.opcode();
        let is_data = opcode == Some(Opcode::DataIn);
        let is_last = is_data && header.0[1] & 1 != 0;
        let is_status = opcode == Some(Opcode::ScsiResponse) || is_last;
        let fits = match self.kind {
            Kind::DropDataIn
            | Kind::DoubleDataIn
            | Kind::SwapDataIn
            | Kind::WrongDataSn
            | Kind::WrongOffset => is_data,
            Kind::WrongR2t | Kind::EarlyGood => opcode == Some(Opcode::R2t),
            Kind::WrongExpDataSn | Kind::TargetFailure => opcode == Some(Opcode::ScsiResponse),
            Kind::WrongResidual | Kind::WrongStatSn | Kind::DoubleResponse => is_status,
            _ => true,
        };
        if let Some(held) = self.held.take() {
            return vec![(header, data), held];
        }
        if self.done || !fits {
            return vec![(header, data)];
        }
        // A status comes once.
        if self.after > 0 && !is_status {
            self.after -= 1;
            return vec![(header, data)];
        }
        self.done = true;
        let mut bhs = header;
        match self.kind {
            Kind::DropDataIn => {
                // The status is told, the data is not there.
                if is_last {
                    bhs.set_data_len(0);
                    return vec![(bhs, Vec::new())];
                }
                return Vec::new();
            }
            Kind::DoubleDataIn => {
                // The first of both without the status, which would end the command.
                bhs.0[1] &= !1;
                if is_last {
                    bhs.0[24..28].fill(0);
                }
                return vec![(bhs, data.clone()), (header, data)];
            }
            Kind::SwapDataIn if is_last => return vec![(header, data)],
            Kind::SwapDataIn => {
                self.held = Some((header, data));
                return Vec::new();
            }
            Kind::WrongDataSn => {
                let wrong = rng.pick(&[1, 2, u32::MAX, 0x8000_0000, 77]);
                let sn = get32(&bhs, 36).wrapping_add(wrong);
                put32(&mut bhs, 36, sn);
            }
            Kind::WrongOffset => {
                let shift = rng.pick(&[512, 4096, u32::MAX - 511, 0x7FFF_FE00, 1]);
                let offset = get32(&bhs, 40).wrapping_add(shift);
                put32(&mut bhs, 40, offset);
            }
            Kind::WrongResidual => {
                // A wrong count, underflow or overflow; both bits together are a format error.
                bhs.0[1] |= rng.pick(&[0x02, 0x02, 0x06]);
                put32(&mut bhs, 44, rng.pick(&[1, 512, 4096, u32::MAX]));
            }
            Kind::WrongExpDataSn => {
                let sn = get32(&bhs, 36).wrapping_add(rng.pick(&[1, 5, 1000]));
                put32(&mut bhs, 36, sn);
            }
            Kind::WrongStatSn => {
                let sn = get32(&bhs, 24).wrapping_add(rng.pick(&[1, u32::MAX, 0x7FFF_FFFF]));
                put32(&mut bhs, 24, sn);
            }
            Kind::DoubleResponse => return vec![(header, data.clone()), (header, data)],
            Kind::TargetFailure => {
                bhs.0[2] = rng.pick(&[1, 0x80, 0xFF]);
            }
            Kind::WrongTag => {
                // None that may be another command's: an answer to that could not be told from its own.
                let tag = rng.pick(&[0xFFFF_FFFF, 0x0000_FFFF, get32(&bhs, 16) ^ 0x8000_0000]);
                put32(&mut bhs, 16, tag);
            }
            Kind::Nonsense => {
                bhs.0[0] = rng.pick(&[0x3F, 0x01, 0x2A, 0x24]);
                if rng.permille(300) {
                    bhs.0[4] = 0xFF;
                }
            }
            Kind::WrongWindow => {
                let exp = get32(&bhs, 28);
                put32(&mut bhs, 32, exp.wrapping_sub(rng.pick(&[2, 100, 0x7FFF_0000])));
            }
            Kind::WrongR2t => {
                let (offset, len) = (get32(&bhs, 40), get32(&bhs, 44));
                match rng.below(6) {
                    0 => put32(&mut bhs, 40, offset.wrapping_add(rng.pick(&[512, 0x8000_0000, 0xFFFF_FE00]))),
                    1 => put32(&mut bhs, 44, rng.pick(&[0, len + 512, 0x00FF_FFFF, u32::MAX])),
                    2 => return vec![(header, data.clone()), (header, data)],
                    3 => put32(&mut bhs, 36, get32(&header, 36) + 1),
                    4 => bhs.0[9] ^= 1,
                    _ => put32(&mut bhs, 40, offset.wrapping_sub(512)),
                }
            }
            Kind::EarlyGood => {
                // In place of the R2T: after the last one all data may have been sent, and then it is no lie that shows.
                *early = true;
                return Vec::new();
            }
            _ => {}
        }
        vec![(bhs, data)]
    }
}

/// Whether the header's StatSN is one that counts or names the next.
pub fn has_stat_sn(bhs: &Bhs) -> bool {
    bhs.opcode() != Some(Opcode::DataIn) || bhs.0[1] & 1 != 0
}

/// GOOD for the write that the R2T is of, with the counters of the R2T.
pub fn early_good(r2t: &Bhs) -> Option<Bhs> {
    let r2t = R2t::decode(r2t).ok()?;
    let response = ScsiResponse {
        response: ScsiResponseCode::Completed,
        status: Status::GOOD.0,
        residual: Residual::None,
        bidi_residual: Residual::None,
        data_len_bytes: 0,
        itt: r2t.itt,
        snack_tag: 0,
        sn: r2t.sn,
        exp_data_sn: Serial(0),
    };
    Some(response.encode())
}

/// What a PDU is, on one line.
pub fn name(bhs: &Bhs) -> String {
    let what = match bhs.opcode() {
        Some(Opcode::DataIn) => match DataIn::decode(bhs) {
            Ok(pdu) => format!(
                "Data-In {}+{} DataSN {}{}",
                pdu.offset_bytes,
                pdu.data_len_bytes,
                pdu.data_sn.0,
                pdu.status.map_or(String::new(), |s| format!(" status {:02x} {:?}", s.status, s.residual))
            ),
            Err(error) => format!("Data-In ({error})"),
        },
        Some(Opcode::ScsiResponse) => {
            format!("SCSI Response {:02x} status {:02x} StatSN {:x}", bhs.0[2], bhs.0[3], get32(bhs, 24))
        }
        Some(Opcode::R2t) => {
            format!("R2T {}+{} R2TSN {}", get32(bhs, 40), get32(bhs, 44), get32(bhs, 36))
        }
        Some(opcode) => opcode.name().to_owned(),
        None => format!("opcode {:#04x}", bhs.0[0]),
    };
    format!("{what} itt {:08x}", bhs.itt().0)
}
