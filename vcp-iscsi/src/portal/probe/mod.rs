//! Finds out what a logical unit is: INQUIRY, vital product data, READ CAPACITY, MODE SENSE; in the end a
//! [`Lun`](crate::engine::Lun).
//!
//! [`Found`] is what was found, [`Identity`] what tells one unit from another, [`Access`] which way to it this is.
//!
//! A state machine without I/O: [`Probe::next`] gives the command, [`Probe::answer`] takes its outcome. It runs at the
//! start, after every reconnection (is it still the same unit?) and after a unit attention that tells of a change.

use std::time::Duration;

use iscsi::initiator::{Command, Direction};
use iscsi::scsi::alua::{self, AccessState};
use iscsi::scsi::capacity::{CAPACITY_16_BYTES, Capacity};
use iscsi::scsi::inquiry::{self, Inquiry};
use iscsi::scsi::mode::{CACHING_PAGE, ModeData};
use iscsi::scsi::vpd::{self, BlockLimits, Designators, Provisioning};
use iscsi::scsi::{self, Cdb, DataError, Sense, SenseKey, Status};

mod found;
mod unit;

pub use found::Found;
pub use unit::{Access, Identity, UnitId, UnitIdError};

/// Most data that a probe command asks for; the buffer its data goes to has this size.
pub const PROBE_BUFFER_BYTES: usize = 4096;

/// Time limit of a probe command.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How often a command is repeated after a unit attention; a target has one for each event, so there may be several.
const MAX_RETRIES: u32 = 16;

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
    /// This way to it is closed for reads and writes.
    #[error("the LUN carries out no reads and writes through this port ({0}; another path may do)")]
    NoAccess(AccessState),
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
    Groups,
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
    /// Only REPORT TARGET PORT GROUPS.
    brief: bool,
    step: Step,
    retries: u32,
    wanted: Vec<u8>,
    inquiry: Option<Inquiry>,
    pages: Vec<u8>,
    serial: Option<String>,
    names: Designators,
    access: Option<Access>,
    /// The state that the unit's sense data told of, where it did not let us go on.
    closed: Option<AccessState>,
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
            brief: false,
            step: Step::Inquiry,
            retries: 0,
            wanted: Vec::new(),
            inquiry: None,
            pages: Vec::new(),
            serial: None,
            names: Designators::default(),
            access: None,
            closed: None,
            limits: None,
            rotation: None,
            provisioning: None,
            capacity: None,
            mode: ModeData::default(),
        }
    }

    /// Only a look at the access state of the port that is named in `names`; `before` is what it was, and stays if the
    /// unit does not tell. Ends with [`access`](Self::access), not with [`finish`](Self::finish).
    pub fn of_access(lun: scsi::Lun, names: Designators, before: Option<Access>) -> Self {
        Self { brief: true, step: Step::Groups, names, access: before, ..Self::new(lun) }
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
            Step::Groups => {
                let len_bytes = PROBE_BUFFER_BYTES as u32;
                (Cdb::report_target_port_groups(len_bytes), len_bytes)
            }
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
        // Which group this is was read before; the state that holds is what the unit says now.
        if key == Some(SenseKey::NotReady)
            && let Some(state) = reply.sense.and_then(|s| AccessState::from_sense(s.code))
        {
            self.closed = Some(state);
            self.step = Step::Done;
            return Ok(Next::Done);
        }
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
            Step::Pages => self.after_pages(),
            Step::Vpd(_) => self.next_page(),
            Step::Groups if self.brief => Step::Done,
            Step::Groups => Step::Ready,
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
        self.wanted.pop().map_or_else(|| self.after_pages(), Step::Vpd)
    }

    fn after_pages(&self) -> Step {
        let asymmetric = self.inquiry.as_ref().is_some_and(|inquiry| inquiry.tpgs != 0);
        if asymmetric { Step::Groups } else { Step::Ready }
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
                // What a port in standby state knows as well comes first.
                Step::Pages
            }
            Step::Ready => Step::Capacity16,
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
                        self.names = Designators::parse(data).unwrap_or_default();
                    }
                    vpd::BLOCK_LIMITS => self.limits = BlockLimits::parse(data).ok(),
                    vpd::BLOCK_CHARACTERISTICS => self.rotation = vpd::rotation_rate(data).ok(),
                    vpd::PROVISIONING => self.provisioning = Provisioning::parse(data).ok(),
                    _ => {}
                }
                self.next_page()
            }
            Step::Groups => {
                let groups = alua::parse_groups(data).unwrap_or_default();
                self.access = Access::find(&groups, &self.names).or(self.access);
                match &self.access {
                    _ if self.brief => Step::Done,
                    Some(access) if !access.state.is_active() => Step::Done,
                    _ => Step::Ready,
                }
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

    /// What tells the unit from others, after [`Next::Done`]; known for a port without access as well.
    pub fn identity(&self) -> Identity {
        Identity { serial: self.serial.clone(), names: self.names.unit.clone() }
    }

    /// VPD page 83h, after [`Next::Done`].
    pub fn names(&self) -> &Designators {
        &self.names
    }

    /// The group of the port and its state, after [`Next::Done`]; `None`: the unit has one way for all.
    pub fn access(&self) -> Option<Access> {
        match (self.access, self.closed) {
            (Some(access), Some(state)) => Some(Access { state, ..access }),
            (None, Some(state)) => Some(Access { group: None, state, preferred: false }),
            (access, None) => access,
        }
    }

    /// What was found, after [`Next::Done`].
    ///
    /// # Errors
    /// The unit cannot be used.
    pub fn finish(self) -> Result<Found, ProbeError> {
        let access = self.access();
        if let Some(access) = access.filter(|access| !access.state.is_active()) {
            return Err(ProbeError::NoAccess(access.state));
        }
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
            designator: self.names.unit.first().map(|name| name.text.clone()),
            names: self.names,
            access,
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

#[cfg(test)]
mod tests;
