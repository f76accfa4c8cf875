//! The disk: memory, and what a SCSI block device says of itself. It does as it is told; only the answers are spoiled.

use anyhow::bail;
use iscsi::scsi::sense::asc;
use iscsi::scsi::{Sense, SenseKey, Status, opcode as op};

use super::event::Event;
use crate::Result;

const BLOCK_BYTES: usize = 512;

/// A disk of 512-byte blocks.
#[derive(Debug)]
pub struct Disk {
    data: Vec<u8>,
    serial: String,
    write_cache: bool,
    dpofua: bool,
    write_protected: bool,
    thin: bool,
    max_transfer_blocks: u32,
}

/// How a command ended.
#[derive(Clone, Debug, Default)]
pub struct Done {
    /// SCSI status.
    pub status: u8,
    /// Sense data.
    pub sense: Option<Sense>,
    /// Data for the initiator, all that there is.
    pub data: Vec<u8>,
}

impl Done {
    /// CHECK CONDITION.
    pub fn check(key: SenseKey, code: u16) -> Self {
        Self { status: Status::CHECK_CONDITION.0, sense: Some(Sense::new(key, code)), data: Vec::new() }
    }

    fn data(data: Vec<u8>) -> Self {
        Self { data, ..Self::default() }
    }
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            data: vec![0; 2048 * BLOCK_BYTES],
            serial: "BAD-1".into(),
            write_cache: true,
            dpofua: true,
            write_protected: false,
            thin: false,
            max_transfer_blocks: 0,
        }
    }
}

impl Disk {
    /// Takes `option KEY VALUE`, if the key is one of the disk's.
    ///
    /// # Errors
    /// The value makes no sense.
    pub fn set(&mut self, key: &str, value: &str) -> Result<bool> {
        let yes = match value {
            "yes" => Some(true),
            "no" => Some(false),
            _ => None,
        };
        match (key, yes) {
            ("blocks", _) => self.resize(value.parse()?),
            ("serial", _) => self.serial = value.into(),
            ("max-transfer", _) => self.max_transfer_blocks = value.parse()?,
            ("wce", Some(yes)) => self.write_cache = yes,
            ("dpofua", Some(yes)) => self.dpofua = yes,
            ("write-protected", Some(yes)) => self.write_protected = yes,
            ("thin", Some(yes)) => self.thin = yes,
            ("wce" | "dpofua" | "write-protected" | "thin", None) => bail!("{key} is yes or no"),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Another size; what was there stays.
    pub fn resize(&mut self, blocks: u64) {
        self.data.resize(blocks as usize * BLOCK_BYTES, 0);
    }

    /// Blocks.
    pub fn blocks(&self) -> u64 {
        (self.data.len() / BLOCK_BYTES) as u64
    }

    /// Bytes that a command wants of the initiator or has for it, from its CDB; `None` where the CDB does not say.
    pub fn transfer_bytes(cdb: &[u8; 16]) -> Option<usize> {
        match Event::of_cdb(cdb) {
            Event::Read | Event::Write => Some(range(cdb).1 as usize * BLOCK_BYTES),
            Event::Same => Some(BLOCK_BYTES),
            _ => None,
        }
    }

    /// Carries a command out.
    pub fn run(&mut self, cdb: &[u8; 16], out: &[u8]) -> Done {
        let event = Event::of_cdb(cdb);
        let (lba, blocks) = range(cdb);
        if matches!(event, Event::Read | Event::Write | Event::Same)
            && lba.checked_add(u64::from(blocks)).is_none_or(|end| end > self.blocks())
        {
            return Done::check(SenseKey::IllegalRequest, asc::LBA_OUT_OF_RANGE);
        }
        if self.write_protected && matches!(event, Event::Write | Event::Same | Event::Unmap) {
            return Done::check(SenseKey::DataProtect, asc::WRITE_PROTECTED);
        }
        let at = lba as usize * BLOCK_BYTES;
        let len = blocks as usize * BLOCK_BYTES;
        match event {
            Event::Read => Done::data(self.data[at..at + len].to_vec()),
            Event::Write if out.len() >= len => {
                self.data[at..at + len].copy_from_slice(&out[..len]);
                Done::default()
            }
            Event::Same if out.len() >= BLOCK_BYTES => {
                for block in self.data[at..at + len].chunks_mut(BLOCK_BYTES) {
                    block.copy_from_slice(&out[..BLOCK_BYTES]);
                }
                Done::default()
            }
            Event::Unmap if self.thin => self.unmap(out),
            Event::Sync | Event::Ready => Done::default(),
            Event::Inquiry => self.inquiry(cdb),
            Event::Capacity => Done::data(self.capacity(cdb)),
            Event::Mode => Done::data(self.mode(cdb)),
            Event::Luns => Done::data(Vec::new()),
            _ => Done::check(SenseKey::IllegalRequest, asc::INVALID_OPCODE),
        }
    }

    fn unmap(&mut self, list: &[u8]) -> Done {
        for descriptor in list.get(8..).unwrap_or_default().chunks_exact(16) {
            let lba = be(&descriptor[..8]) as usize;
            let blocks = be(&descriptor[8..12]) as usize;
            let Some(range) = self.data.get_mut(lba * BLOCK_BYTES..(lba + blocks) * BLOCK_BYTES) else {
                return Done::check(SenseKey::IllegalRequest, asc::LBA_OUT_OF_RANGE);
            };
            range.fill(0);
        }
        Done::default()
    }

    fn inquiry(&self, cdb: &[u8; 16]) -> Done {
        let page = |code: u8, body: &[u8]| {
            let mut data = vec![0, code, 0, body.len() as u8];
            data.extend_from_slice(body);
            data
        };
        Done::data(match (cdb[1] & 1, cdb[2]) {
            (0, _) => {
                // SPC-4, response data format 2, CmdQue.
                let mut data = vec![0, 0, 6, 2, 31, 0, 0, 2];
                data.extend_from_slice(b"TEST    BAD TARGET      1   ");
                data
            }
            (_, 0x00) => page(0, &[0x00, 0x80, 0x83, 0xB0, 0xB2][..if self.thin { 5 } else { 4 }]),
            (_, 0x80) => page(0x80, self.serial.as_bytes()),
            (_, 0x83) => {
                // T10 vendor identification, ASCII, of the unit.
                let mut body = vec![2, 1, 0, 8 + self.serial.len() as u8];
                body.extend_from_slice(b"TEST    ");
                body.extend_from_slice(self.serial.as_bytes());
                page(0x83, &body)
            }
            (_, 0xB0) => {
                let mut body = [0; 60];
                body[4..8].copy_from_slice(&self.max_transfer_blocks.to_be_bytes());
                if self.thin {
                    body[16..20].copy_from_slice(&65536_u32.to_be_bytes());
                    body[20..24].copy_from_slice(&1_u32.to_be_bytes());
                }
                body[32..40].copy_from_slice(&65536_u64.to_be_bytes());
                page(0xB0, &body)
            }
            // LBPU, LBPWS, LBPRZ; thin.
            (_, 0xB2) if self.thin => page(0xB2, &[0, 0xC4, 2, 0]),
            _ => return Done::check(SenseKey::IllegalRequest, asc::INVALID_FIELD_IN_CDB),
        })
    }

    fn capacity(&self, cdb: &[u8; 16]) -> Vec<u8> {
        let last = self.blocks().saturating_sub(1);
        if cdb[0] == op::READ_CAPACITY_10 {
            let last = u32::try_from(last).unwrap_or(u32::MAX);
            return [last.to_be_bytes(), (BLOCK_BYTES as u32).to_be_bytes()].concat();
        }
        let mut data = last.to_be_bytes().to_vec();
        data.extend_from_slice(&(BLOCK_BYTES as u32).to_be_bytes());
        data.resize(32, 0);
        if self.thin {
            data[14] = 0xC0;
        }
        data
    }

    fn mode(&self, cdb: &[u8; 16]) -> Vec<u8> {
        let device = u8::from(self.write_protected) << 7 | u8::from(self.dpofua) << 4;
        let mut page = [0; 20];
        page[..3].copy_from_slice(&[0x08, 18, u8::from(self.write_cache) << 2]);
        let header: &[u8] =
            if cdb[0] == op::MODE_SENSE_6 { &[23, 0, device, 0] } else { &[0, 26, 0, device, 0, 0, 0, 0] };
        [header, &page].concat()
    }
}

/// REPORT LUNS data of one unit.
pub fn luns(lun: iscsi::scsi::Lun) -> Vec<u8> {
    let mut data = vec![0, 0, 0, 8, 0, 0, 0, 0];
    data.extend_from_slice(&lun.0);
    data
}

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, &byte| n << 8 | u64::from(byte))
}

/// First block and number of blocks of a command on the medium.
fn range(cdb: &[u8; 16]) -> (u64, u32) {
    match cdb[0] >> 5 {
        0 => (be(&[cdb[1] & 0x1F, cdb[2], cdb[3]]), if cdb[4] == 0 { 256 } else { u32::from(cdb[4]) }),
        1 | 2 => (be(&cdb[2..6]), be(&cdb[7..9]) as u32),
        5 => (be(&cdb[2..6]), be(&cdb[6..10]) as u32),
        _ => (be(&cdb[2..10]), be(&cdb[10..14]) as u32),
    }
}
