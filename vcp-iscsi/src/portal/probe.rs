//! Finds out what a logical unit is: INQUIRY, vital product data, READ CAPACITY, MODE SENSE; in the end a
//! [`Lun`].
//!
//! A state machine without I/O: [`Probe::next`] gives the command, [`Probe::answer`] takes its outcome. It runs at the
//! start, after every reconnection (is it still the same unit?) and after a unit attention that tells of a change.

use std::time::Duration;

use iscsi::initiator::{Command, Direction};
use iscsi::scsi::capacity::{CAPACITY_16_BYTES, Capacity};
use iscsi::scsi::inquiry::{self, Inquiry};
use iscsi::scsi::mode::{CACHING_PAGE, ModeData};
use iscsi::scsi::vpd::{self, BlockLimits, Provisioning};
use iscsi::scsi::{self, Cdb, DataError, Sense, SenseKey, Status};

use crate::engine::Lun;

/// Most data that a probe command asks for; the buffer its data goes to has this size.
pub const PROBE_BUFFER_BYTES: usize = 4096;

/// Time limit of a probe command.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How often a command is repeated after a unit attention; a target has one for each event, so there may be several.
const MAX_RETRIES: u32 = 16;

/// Everything that a probe learned.
#[derive(Clone, Debug)]
pub struct Found {
    /// Standard INQUIRY data.
    pub inquiry: Inquiry,
    /// Supported VPD pages.
    pub pages: Vec<u8>,
    /// VPD page 80h.
    pub serial: Option<String>,
    /// VPD page 83h: the best designator.
    pub designator: Option<String>,
    /// VPD page B0h.
    pub limits: Option<BlockLimits>,
    /// VPD page B1h: medium rotation rate.
    pub rotation: Option<u16>,
    /// VPD page B2h.
    pub provisioning: Option<Provisioning>,
    /// READ CAPACITY.
    pub capacity: Capacity,
    /// MODE SENSE.
    pub mode: ModeData,
}

/// Why a logical unit cannot be used as a disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// The target knows no such unit.
    #[error("the target has no such LUN")]
    NoLun,
    /// The unit is something else.
    #[error("the LUN is not a disk but a device of type {0}")]
    NotADisk(&'static str),
    /// A command failed.
    #[error("{command} failed: {why}")]
    Command {
        /// The command.
        command: &'static str,
        /// Status and sense in words.
        why: String,
    },
    /// The answer makes no sense.
    #[error("{command} returned data that makes no sense")]
    Data {
        /// The command.
        command: &'static str,
        /// What is wrong with it.
        source: DataError,
    },
    /// A block size that no virtio block device can have, or that this program has no zero block for.
    #[error("logical blocks of {0} bytes are not supported (512 to 4096 are)")]
    BlockSize(u32),
    /// The unit has no blocks.
    #[error("the LUN has a size of 0")]
    Empty,
    /// It did not become ready.
    #[error("the LUN does not become ready: {0}")]
    NotReady(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Ready,
    Inquiry,
    Pages,
    Vpd(u8),
    Capacity16,
    Capacity10,
    Mode6,
    Mode10,
    Done,
}

/// How a probe command ended.
#[derive(Clone, Copy, Debug)]
pub struct Reply<'a> {
    /// SCSI status.
    pub status: Status,
    /// Sense data.
    pub sense: Option<Sense>,
    /// The data that came.
    pub data: &'a [u8],
}

/// What to do after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Send [`Probe::next`].
    Send,
    /// Send [`Probe::next`] after this time.
    Later(Duration),
    /// [`Probe::finish`].
    Done,
}

/// A probe underway.
#[derive(Debug)]
pub struct Probe {
    lun: scsi::Lun,
    step: Step,
    retries: u32,
    wanted: Vec<u8>,
    inquiry: Option<Inquiry>,
    pages: Vec<u8>,
    serial: Option<String>,
    designator: Option<String>,
    limits: Option<BlockLimits>,
    rotation: Option<u16>,
    provisioning: Option<Provisioning>,
    capacity: Option<Capacity>,
    mode: ModeData,
}

impl Probe {
    /// A probe of this unit.
    pub fn new(lun: scsi::Lun) -> Self {
        Self {
            lun,
            step: Step::Inquiry,
            retries: 0,
            wanted: Vec::new(),
            inquiry: None,
            pages: Vec::new(),
            serial: None,
            designator: None,
            limits: None,
            rotation: None,
            provisioning: None,
            capacity: None,
            mode: ModeData::default(),
        }
    }

    /// The command to send now; its data goes to a buffer of [`PROBE_BUFFER_BYTES`].
    pub fn next(&self) -> Command {
        const VPD_BYTES: u16 = 1024;
        let (cdb, len_bytes) = match self.step {
            Step::Ready => (Cdb::test_unit_ready(), 0),
            // 36 bytes first is what every device takes; more is not needed.
            Step::Inquiry => (Cdb::inquiry(96), 96),
            Step::Pages => (Cdb::inquiry_vpd(vpd::SUPPORTED_PAGES, 255), 255),
            Step::Vpd(page) => (Cdb::inquiry_vpd(page, VPD_BYTES), u32::from(VPD_BYTES)),
            Step::Capacity16 => (Cdb::read_capacity_16(CAPACITY_16_BYTES), CAPACITY_16_BYTES),
            Step::Capacity10 => (Cdb::read_capacity_10(), 8),
            Step::Mode6 => (Cdb::mode_sense_6(CACHING_PAGE, 192), 192),
            Step::Mode10 | Step::Done => (Cdb::mode_sense_10(CACHING_PAGE, 512), 512),
        };
        Command {
            lun: self.lun,
            cdb,
            direction: if len_bytes == 0 { Direction::None } else { Direction::Read },
            len_bytes,
            exact: false,
            timeout: TIMEOUT,
        }
    }

    /// Takes the outcome of [`next`](Self::next).
    ///
    /// # Errors
    /// The unit cannot be used.
    pub fn answer(&mut self, reply: Reply<'_>) -> Result<Next, ProbeError> {
        let command = self.next().cdb.name();
        if reply.status == Status::GOOD {
            self.retries = 0;
            return self.good(command, reply.data);
        }
        let why = reason(reply.status, reply.sense);
        let key = reply.sense.map(|s| s.key);
        if key == Some(SenseKey::UnitAttention) || reply.status.is_transient() {
            self.retries += 1;
            if self.retries > MAX_RETRIES {
                return Err(ProbeError::Command { command, why });
            }
            return Ok(if reply.status.is_transient() {
                Next::Later(Duration::from_millis(50))
            } else {
                Next::Send
            });
        }
        if key == Some(SenseKey::NotReady) {
            self.retries += 1;
            if self.retries > MAX_RETRIES {
                return Err(ProbeError::NotReady(why));
            }
            return Ok(Next::Later(Duration::from_millis(250)));
        }
        if reply.sense.is_some_and(|s| s.code == scsi::sense::asc::LUN_NOT_SUPPORTED) {
            return Err(ProbeError::NoLun);
        }
        self.retries = 0;
        // Everything else is optional, or has a second form.
        self.step = match self.step {
            Step::Ready | Step::Inquiry | Step::Capacity10 => {
                return Err(ProbeError::Command { command, why });
            }
            Step::Pages => Step::Capacity16,
            Step::Vpd(_) => self.next_page(),
            Step::Capacity16 => Step::Capacity10,
            Step::Mode6 => Step::Mode10,
            Step::Mode10 | Step::Done => Step::Done,
        };
        Ok(self.what_next())
    }

    fn what_next(&self) -> Next {
        if self.step == Step::Done { Next::Done } else { Next::Send }
    }

    fn next_page(&mut self) -> Step {
        self.wanted.pop().map_or(Step::Capacity16, Step::Vpd)
    }

    fn good(&mut self, command: &'static str, data: &[u8]) -> Result<Next, ProbeError> {
        let wrong = |source| ProbeError::Data { command, source };
        self.step = match self.step {
            Step::Inquiry => {
                let inquiry = Inquiry::parse(data).map_err(wrong)?;
                if inquiry.qualifier != 0 || inquiry.device_type == inquiry::TYPE_NONE {
                    return Err(ProbeError::NoLun);
                }
                if inquiry.device_type != inquiry::TYPE_DISK {
                    return Err(ProbeError::NotADisk(inquiry::type_name(inquiry.device_type)));
                }
                self.inquiry = Some(inquiry);
                Step::Ready
            }
            Step::Ready => Step::Pages,
            Step::Pages => {
                self.pages = vpd::supported_pages(data).unwrap_or_default().to_vec();
                // Taken from the end.
                self.wanted = [
                    vpd::PROVISIONING,
                    vpd::BLOCK_CHARACTERISTICS,
                    vpd::BLOCK_LIMITS,
                    vpd::DEVICE_IDENTIFICATION,
                    vpd::UNIT_SERIAL_NUMBER,
                ]
                .into_iter()
                .filter(|page| self.pages.contains(page))
                .collect();
                self.next_page()
            }
            Step::Vpd(page) => {
                // A page that cannot be read is as good as one that is not there: limits then stay unknown.
                match page {
                    vpd::UNIT_SERIAL_NUMBER => {
                        self.serial = vpd::serial_number(data).ok().filter(|s| !s.is_empty());
                    }
                    vpd::DEVICE_IDENTIFICATION => {
                        self.designator = vpd::designator(data).ok().flatten().map(|(_, text)| text);
                    }
                    vpd::BLOCK_LIMITS => self.limits = BlockLimits::parse(data).ok(),
                    vpd::BLOCK_CHARACTERISTICS => self.rotation = vpd::rotation_rate(data).ok(),
                    vpd::PROVISIONING => self.provisioning = Provisioning::parse(data).ok(),
                    _ => {}
                }
                self.next_page()
            }
            Step::Capacity16 => {
                self.capacity = Some(Capacity::parse_16(data).map_err(wrong)?);
                Step::Mode6
            }
            Step::Capacity10 => {
                let too_large = DataError::Field {
                    what: "READ CAPACITY(10) data",
                    field: "returned logical block address",
                    value: u64::from(u32::MAX),
                };
                let capacity = Capacity::parse_10(data).map_err(wrong)?.ok_or(too_large).map_err(wrong)?;
                self.capacity = Some(capacity);
                Step::Mode6
            }
            Step::Mode6 => match ModeData::parse_6(data) {
                Ok(mode) => {
                    self.mode = mode;
                    Step::Done
                }
                Err(_) => Step::Mode10,
            },
            Step::Mode10 | Step::Done => {
                self.mode = ModeData::parse_10(data).unwrap_or_default();
                Step::Done
            }
        };
        Ok(self.what_next())
    }

    /// What was found, after [`Next::Done`].
    ///
    /// # Errors
    /// The unit cannot be used.
    pub fn finish(self) -> Result<Found, ProbeError> {
        let (Some(inquiry), Some(capacity)) = (self.inquiry, self.capacity) else {
            return Err(ProbeError::NoLun);
        };
        if capacity.block_bytes > 4096 {
            return Err(ProbeError::BlockSize(capacity.block_bytes));
        }
        if capacity.blocks == 0 {
            return Err(ProbeError::Empty);
        }
        Ok(Found {
            inquiry,
            pages: self.pages,
            serial: self.serial,
            designator: self.designator,
            limits: self.limits,
            rotation: self.rotation,
            provisioning: self.provisioning,
            capacity,
            mode: self.mode,
        })
    }
}

/// Status and sense in words.
pub fn reason(status: Status, sense: Option<Sense>) -> String {
    match sense {
        Some(sense) => format!("{status}, {sense}"),
        None => status.to_string(),
    }
}

impl Found {
    /// The unit in the terms of the device model. `read_only`: the user asked for that.
    pub fn lun(&self, read_only: bool) -> Lun {
        let limits = self.limits.unwrap_or_default();
        let provisioning = self.provisioning.unwrap_or_default();
        let block_bytes = self.capacity.block_bytes;
        // The expected data transfer length is 32 bits of bytes, and so is a virtio segment; 16 MiB is plenty.
        let cdb_limit = (16 << 20) / block_bytes;
        let max_transfer_blocks = match limits.max_transfer_blocks {
            0 => cdb_limit,
            told => told.min(cdb_limit),
        };
        let read_only = read_only || self.mode.write_protected;
        // SBC-3 4.7.3.4: UNMAP only with LBPU and limits that allow at least one descriptor and block. Where page B0h
        // tells no limits (older units), UNMAP of moderate length is tried.
        let can_unmap = provisioning.unmap
            && !read_only
            && self.limits.is_none_or(|l| l.max_unmap_blocks > 0 && l.max_unmap_descriptors > 0);
        let max_discard_blocks = match (can_unmap, self.limits) {
            (false, _) => 0,
            (true, Some(l)) => l.max_unmap_blocks.min(1 << 22),
            (true, None) => 1 << 16,
        };
        // There is no capability bit for WRITE SAME(16) as such; it is mandatory for thin units and where B0h has a
        // limit for it. Others get it as far as the field's usual default goes, and refusal is told as unsupported.
        let max_same = limits.max_write_same_blocks.min(1 << 22) as u32;
        let max_write_zeroes_blocks = match (read_only, max_same) {
            (true, _) => 0,
            (false, 0) if provisioning.write_same_16 => 1 << 16,
            (false, told) => told,
        };
        Lun {
            blocks: self.capacity.blocks,
            block_bytes,
            physical_exponent: self.capacity.physical_exponent,
            lowest_aligned: self.capacity.lowest_aligned,
            read_only,
            write_cache: self.mode.write_cache.unwrap_or(false),
            fua: self.mode.dpo_fua,
            max_transfer_blocks: max_transfer_blocks.max(1),
            opt_transfer_blocks: limits.optimal_transfer_blocks,
            min_transfer_blocks: u32::from(limits.optimal_granularity_blocks),
            max_discard_blocks,
            discard_granularity: if can_unmap { limits.unmap_granularity_blocks.max(1) } else { 0 },
            discard_alignment: limits.unmap_alignment_blocks.filter(|_| can_unmap).unwrap_or(0),
            max_write_zeroes_blocks,
            write_zeroes_may_unmap: provisioning.write_same_16,
            serial: self.serial.clone().or_else(|| self.designator.clone()).unwrap_or_default(),
            vendor: self.inquiry.vendor.clone(),
            product: self.inquiry.product.clone(),
            revision: self.inquiry.revision.clone(),
        }
    }

    /// Whether this is the same unit as that found before: what identifies it and what a guest cannot see change.
    pub fn is_same_unit(&self, before: &Found) -> bool {
        self.capacity.block_bytes == before.capacity.block_bytes
            && self.serial == before.serial
            && self.designator == before.designator
    }
}

#[cfg(test)]
mod tests {
    use iscsi::scsi::sense::asc;

    use super::*;

    /// A unit that answers each command from a table; commands that are not in it are not known to it.
    fn probe(table: &[(&str, Vec<u8>)], mut attentions: usize) -> Result<Found, ProbeError> {
        let mut probe = Probe::new(scsi::Lun::ZERO);
        for _ in 0..100 {
            let command = probe.next();
            let key = match (command.cdb.name(), command.cdb.0[1]) {
                ("INQUIRY", 1) => format!("VPD {:02X}", command.cdb.0[2]),
                (name, _) => name.to_owned(),
            };
            let found = table.iter().find(|(name, _)| *name == key);
            let (status, sense, data) = if attentions > 0 && key != "INQUIRY" {
                attentions -= 1;
                let sense = Sense::new(SenseKey::UnitAttention, asc::POWER_ON_OR_RESET);
                (Status::CHECK_CONDITION, Some(sense), &[][..])
            } else if let Some((_, data)) = found {
                (Status::GOOD, None, &data[..data.len().min(command.len_bytes as usize)])
            } else {
                let sense = Sense::new(SenseKey::IllegalRequest, asc::INVALID_OPCODE);
                (Status::CHECK_CONDITION, Some(sense), &[][..])
            };
            if probe.answer(Reply { status, sense, data })? == Next::Done {
                return probe.finish();
            }
        }
        panic!("the probe does not end");
    }

    fn inquiry(first: u8) -> (&'static str, Vec<u8>) {
        let mut data = vec![first, 0, 6, 2, 31, 0, 0, 2];
        data.extend_from_slice(b"VENDOR  PRODUCT         REV ");
        ("INQUIRY", data)
    }

    fn capacity_16(last: u64, block_bytes: u32) -> (&'static str, Vec<u8>) {
        let mut data = last.to_be_bytes().to_vec();
        data.extend_from_slice(&block_bytes.to_be_bytes());
        data.resize(32, 0);
        ("READ CAPACITY(16)", data)
    }

    fn ready() -> (&'static str, Vec<u8>) {
        ("TEST UNIT READY", Vec::new())
    }

    #[test]
    fn an_old_disk_that_knows_almost_nothing() {
        let capacity_10 = ("READ CAPACITY(10)", vec![0, 0, 0x0F, 0xFF, 0, 0, 2, 0]);
        let found = probe(&[inquiry(0), ready(), capacity_10], 3).unwrap();
        let lun = found.lun(false);
        assert_eq!((lun.blocks, lun.block_bytes), (4096, 512));
        assert_eq!((lun.max_discard_blocks, lun.max_write_zeroes_blocks), (0, 0));
        assert!(!lun.write_cache && !lun.fua && !lun.read_only);
        assert_eq!((lun.max_transfer_blocks, lun.serial.as_str()), (32768, ""));
    }

    #[test]
    fn limits_of_a_thin_disk_of_more_than_2_tib() {
        let mut limits = vec![0; 64];
        limits[1] = vpd::BLOCK_LIMITS;
        limits[3] = 60;
        limits[8..12].copy_from_slice(&2048u32.to_be_bytes());
        limits[20..24].copy_from_slice(&0x1000u32.to_be_bytes());
        limits[24..28].copy_from_slice(&1u32.to_be_bytes());
        limits[28..32].copy_from_slice(&128u32.to_be_bytes());
        limits[36..44].copy_from_slice(&0x8000u64.to_be_bytes());
        let table = [
            inquiry(0),
            ready(),
            capacity_16(0x3_0000_0000, 4096),
            ("VPD 00", vec![0, 0, 0, 4, 0, 0x80, 0xB0, 0xB2]),
            ("VPD 80", b"\0\x80\0\x04SN-1".to_vec()),
            ("VPD B0", limits),
            ("VPD B2", vec![0, 0xB2, 0, 4, 0, 0xC0, 2, 0]),
            ("MODE SENSE(6)", vec![7, 0, 0x90, 0, 0x08, 2, 0x04, 0]),
        ];
        let found = probe(&table, 0).unwrap();
        let lun = found.lun(false);
        assert_eq!((lun.blocks, lun.block_bytes, lun.max_transfer_blocks), (0x3_0000_0001, 4096, 2048));
        assert!(lun.write_cache && lun.fua, "caching page and DPOFUA");
        // Write protected: no discard, whatever the pages say.
        assert!(lun.read_only);
        assert_eq!((lun.max_discard_blocks, lun.max_write_zeroes_blocks), (0, 0));
        assert_eq!(lun.serial, "SN-1");
        let mut writable = found.clone();
        writable.mode.write_protected = false;
        let lun = writable.lun(false);
        assert_eq!((lun.max_discard_blocks, lun.discard_granularity), (0x1000, 128));
        assert_eq!((lun.max_write_zeroes_blocks, lun.write_zeroes_may_unmap), (0x8000, true));
        assert!(writable.lun(true).read_only);
        assert!(found.is_same_unit(&writable));
        writable.serial = Some("SN-2".into());
        assert!(!found.is_same_unit(&writable));
    }

    #[test]
    fn what_is_no_disk_is_told() {
        let fails = |table: &[_], attentions| probe(table, attentions).unwrap_err();
        assert_eq!(fails(&[inquiry(0x7F)], 0), ProbeError::NoLun);
        assert_eq!(fails(&[inquiry(0x0C)], 0), ProbeError::NotADisk("array controller"));
        assert_eq!(fails(&[inquiry(0), ready(), capacity_16(9, 8192)], 0), ProbeError::BlockSize(8192));
        assert!(matches!(fails(&[inquiry(0), ready(), capacity_16(9, 520)], 0), ProbeError::Data { .. }));
        assert!(matches!(fails(&[inquiry(0), ready()], 0), ProbeError::Command { .. }));
        assert!(
            matches!(fails(&[inquiry(0), ready()], 99), ProbeError::Command { .. }),
            "attentions without end"
        );
    }
}
