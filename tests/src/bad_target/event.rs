//! What rules can wait for.

use iscsi::scsi::opcode as op;

/// Something that an initiator does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// READ.
    Read,
    /// WRITE.
    Write,
    /// SYNCHRONIZE CACHE.
    Sync,
    /// UNMAP.
    Unmap,
    /// WRITE SAME.
    Same,
    /// INQUIRY.
    Inquiry,
    /// READ CAPACITY.
    Capacity,
    /// MODE SENSE.
    Mode,
    /// TEST UNIT READY.
    Ready,
    /// REPORT LUNS.
    Luns,
    /// Any command; in scripts only.
    Command,
    /// A command that is none of these.
    Other,
    /// A connection.
    Connect,
    /// A Login Request.
    Login,
    /// A Task Management Function Request.
    Tmf,
    /// A NOP-Out that wants an answer.
    Ping,
    /// A Logout Request.
    Logout,
    /// A Text Request.
    Text,
}

const NAMES: &[(&str, Event)] = &[
    ("read", Event::Read),
    ("write", Event::Write),
    ("sync", Event::Sync),
    ("unmap", Event::Unmap),
    ("same", Event::Same),
    ("inquiry", Event::Inquiry),
    ("capacity", Event::Capacity),
    ("mode", Event::Mode),
    ("ready", Event::Ready),
    ("luns", Event::Luns),
    ("command", Event::Command),
    ("connect", Event::Connect),
    ("login", Event::Login),
    ("tmf", Event::Tmf),
    ("ping", Event::Ping),
    ("logout", Event::Logout),
    ("text", Event::Text),
];

impl Event {
    /// By name.
    pub fn parse(name: &str) -> Option<Self> {
        NAMES.iter().find(|(known, _)| *known == name).map(|&(_, event)| event)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, event)| *event == self).map_or("other", |(name, _)| name)
    }

    /// That of a command.
    pub fn of_cdb(cdb: &[u8; 16]) -> Self {
        match cdb[0] {
            op::READ_6 | op::READ_10 | op::READ_12 | op::READ_16 => Self::Read,
            op::WRITE_6 | op::WRITE_10 | op::WRITE_12 | op::WRITE_16 => Self::Write,
            op::SYNCHRONIZE_CACHE_10 | op::SYNCHRONIZE_CACHE_16 => Self::Sync,
            op::UNMAP => Self::Unmap,
            op::WRITE_SAME_10 | op::WRITE_SAME_16 => Self::Same,
            op::INQUIRY => Self::Inquiry,
            op::READ_CAPACITY_10 => Self::Capacity,
            op::SERVICE_ACTION_IN_16 if cdb[1] & 0x1F == op::SA_READ_CAPACITY_16 => Self::Capacity,
            op::MODE_SENSE_6 | op::MODE_SENSE_10 => Self::Mode,
            op::TEST_UNIT_READY => Self::Ready,
            op::REPORT_LUNS => Self::Luns,
            _ => Self::Other,
        }
    }

    /// Whether this, as a rule's event, is meant by what happened.
    pub fn covers(self, happened: Self) -> bool {
        let is_command = |e| {
            !matches!(e, Self::Connect | Self::Login | Self::Tmf | Self::Ping | Self::Logout | Self::Text)
        };
        self == happened || (self == Self::Command && is_command(happened))
    }
}
