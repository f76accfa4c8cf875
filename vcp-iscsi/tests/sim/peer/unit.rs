//! The model's logical unit: what it says of itself, and what a CDB asks of the medium.

use iscsi::scsi::opcode;

use crate::content::BLOCK;

/// How the unit presents itself.
#[derive(Clone, Debug)]
pub struct Unit {
    pub blocks: u64,
    pub write_cache: bool,
    pub fua: bool,
    /// MAXIMUM TRANSFER LENGTH in blocks.
    pub max_transfer_blocks: u32,
    /// UNMAP and WRITE SAME.
    pub thin: bool,
    pub serial: String,
    /// Target port groups: tag and ALUA state. One group: no ALUA.
    pub groups: Vec<(u16, u8)>,
}

/// What is to be done with the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    Read { lba: u64, blocks: u64 },
    Write { lba: u64, blocks: u64, fua: bool },
    Flush,
    WriteSame { lba: u64, blocks: u64 },
    Unmap,
}

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, &b| n << 8 | u64::from(b))
}

impl Medium {
    pub fn of(cdb: &[u8; 16]) -> Option<Self> {
        let (ten, sixteen) = ((be(&cdb[2..6]), be(&cdb[7..9])), (be(&cdb[2..10]), be(&cdb[10..14])));
        let fua = cdb[1] & 0x08 != 0;
        Some(match cdb[0] {
            opcode::READ_10 => Self::Read { lba: ten.0, blocks: ten.1 },
            opcode::READ_16 => Self::Read { lba: sixteen.0, blocks: sixteen.1 },
            opcode::WRITE_10 => Self::Write { lba: ten.0, blocks: ten.1, fua },
            opcode::WRITE_16 => Self::Write { lba: sixteen.0, blocks: sixteen.1, fua },
            opcode::SYNCHRONIZE_CACHE_10 | opcode::SYNCHRONIZE_CACHE_16 => Self::Flush,
            opcode::WRITE_SAME_16 => Self::WriteSame { lba: sixteen.0, blocks: sixteen.1 },
            opcode::UNMAP => Self::Unmap,
            _ => return None,
        })
    }
}

impl Unit {
    /// The range of an UNMAP parameter list with one descriptor.
    pub fn unmap_range(list: &[u8]) -> Option<(u64, u64)> {
        list.get(8..20).map(|d| (be(&d[..8]), be(&d[8..])))
    }

    pub fn in_range(&self, lba: u64, blocks: u64) -> bool {
        lba.checked_add(blocks).is_some_and(|end| end <= self.blocks)
    }

    /// Data of a command that does not touch the medium, through a port of target port group `group`; `None`: not known.
    pub fn tell(&self, cdb: &[u8; 16], group: u16) -> Option<Vec<u8>> {
        Some(match (cdb[0], cdb[1], cdb[2]) {
            (opcode::TEST_UNIT_READY, ..) => Vec::new(),
            (opcode::REPORT_LUNS, ..) => vec![0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            (opcode::INQUIRY, 0, 0) => {
                // Implicit ALUA where there are several groups.
                let tpgs = if self.groups.len() > 1 { 0x10 } else { 0 };
                let mut data = vec![0, 0, 6, 0x12, 31, tpgs, 0, 2];
                data.extend_from_slice(b"VCP     SIMULATED DISK  1   ");
                data
            }
            (opcode::INQUIRY, 1, code) => {
                let payload = self.page(code, group)?;
                let mut data = vec![0, code];
                data.extend_from_slice(&(payload.len() as u16).to_be_bytes());
                data.extend(payload);
                data
            }
            (opcode::SERVICE_ACTION_IN_16, action, _) if action & 0x1F == opcode::SA_READ_CAPACITY_16 => {
                let mut data = (self.blocks - 1).to_be_bytes().to_vec();
                data.extend_from_slice(&(BLOCK as u32).to_be_bytes());
                data.extend_from_slice(&[0, 0, if self.thin { 0xC0 } else { 0 }, 0]);
                data.resize(32, 0);
                data
            }
            (opcode::MODE_SENSE_6, ..) => {
                let (fua, cache) = (if self.fua { 0x10 } else { 0 }, if self.write_cache { 4 } else { 0 });
                let mut data = vec![23, 0, fua, 0, 8, 18, cache];
                data.resize(24, 0);
                data
            }
            (opcode::MAINTENANCE_IN, action, _)
                if action & 0x1F == opcode::SA_REPORT_TARGET_PORT_GROUPS && self.groups.len() > 1 =>
            {
                let mut data = vec![0; 4];
                for (n, &(tag, state)) in self.groups.iter().enumerate() {
                    // All states supported; one port for each group.
                    data.extend_from_slice(&[state, 0x8F]);
                    data.extend_from_slice(&tag.to_be_bytes());
                    data.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, n as u8 + 1]);
                }
                let len = (data.len() - 4) as u32;
                data[..4].copy_from_slice(&len.to_be_bytes());
                data
            }
            _ => return None,
        })
    }

    fn page(&self, code: u8, group: u16) -> Option<Vec<u8>> {
        Some(match code {
            0x00 => vec![0x00, 0x80, 0x83, 0xB0, 0xB2],
            0x80 => self.serial.clone().into_bytes(),
            0x83 => {
                // NAA of the unit; target port group and relative port of the port.
                let mut page = vec![0x01, 0x03, 0, 8, 0x30, 0, 0, 0, 0, 0, 0, 1];
                let [high, low] = group.to_be_bytes();
                page.extend_from_slice(&[0x01, 0x15, 0, 4, 0, 0, high, low]);
                page.extend_from_slice(&[0x01, 0x14, 0, 4, 0, 0, high, low]);
                page
            }
            0xB0 => {
                let mut page = vec![0; 60];
                page[4..8].copy_from_slice(&self.max_transfer_blocks.to_be_bytes());
                if self.thin {
                    page[16..20].copy_from_slice(&0x1000u32.to_be_bytes());
                    page[20..24].copy_from_slice(&1u32.to_be_bytes());
                    page[24..28].copy_from_slice(&1u32.to_be_bytes());
                    page[32..40].copy_from_slice(&u64::from(self.max_transfer_blocks).to_be_bytes());
                }
                page
            }
            0xB2 => vec![0, if self.thin { 0xC0 } else { 0 }, if self.thin { 2 } else { 0 }, 0],
            _ => return None,
        })
    }
}
