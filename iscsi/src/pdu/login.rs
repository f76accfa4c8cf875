//! Login Request and Response (RFC 7143 11.12, 11.13).

use std::fmt;

use super::{Bhs, Itt, Opcode, Pdu, PduError, TargetSn, expect};
use crate::serial::Serial;

/// The initiator's part of a session's name (11.12.5): with the initiator's name and the target portal group it names
/// the session, so keeping it across a reconnection is what reinstates the session (6.3.5).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Isid(pub [u8; 6]);

impl Isid {
    /// An ISID of the "random" kind (type 10b): 24 random bits and a qualifier of 16 bits that tells sessions of one
    /// initiator apart.
    #[must_use]
    pub const fn random(random: [u8; 3], qualifier: u16) -> Self {
        let q = qualifier.to_be_bytes();
        Self([0x80, random[0], random[1], random[2], q[0], q[1]])
    }
}

impl fmt::Display for Isid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Isid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Isid({self})")
    }
}

/// Stages of a connection (11.12.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Stage {
    /// Security negotiation (0).
    Security = 0,
    /// Login operational negotiation (1).
    Operational = 1,
    /// Full-feature phase (3): the login is over.
    FullFeature = 3,
}

impl Stage {
    const fn from_bits(bits: u8) -> Option<Self> {
        match bits & 3 {
            0 => Some(Self::Security),
            1 => Some(Self::Operational),
            3 => Some(Self::FullFeature),
            _ => None,
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Security => "security negotiation",
            Self::Operational => "operational negotiation",
            Self::FullFeature => "full-feature phase",
        })
    }
}

/// Reads C, CSG and, with T, NSG: the current stage, the transit and the continue bit.
fn stages(bhs: &Bhs, pdu: Opcode) -> Result<(Stage, Option<Stage>, bool), PduError> {
    let format = |what| PduError::Format { pdu, what };
    let flags = bhs.0[1];
    let current = Stage::from_bits(flags >> 2).ok_or(format("reserved current stage"))?;
    let continues = flags & 0x40 != 0;
    let transit = if flags & 0x80 != 0 {
        let next = Stage::from_bits(flags).ok_or(format("reserved next stage"))?;
        if continues {
            return Err(format("transit and continue bit together"));
        }
        if next <= current {
            return Err(format("transit to a stage that is not later"));
        }
        Some(next)
    } else {
        None
    };
    if current == Stage::FullFeature {
        return Err(format("current stage is the full-feature phase"));
    }
    Ok((current, transit, continues))
}

fn put_stages(bhs: &mut Bhs, current: Stage, transit: Option<Stage>, continues: bool) {
    bhs.set_flag(0x40, continues);
    bhs.0[1] |= (current as u8) << 2;
    if let Some(next) = transit {
        bhs.0[1] |= 0x80 | next as u8;
    }
}

/// Login Request (11.12). Always for immediate delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoginRequest {
    /// T with NSG: the initiator is ready to move on to this stage.
    pub transit: Option<Stage>,
    /// C: the text goes on in the next PDU. Not together with `transit`.
    pub continues: bool,
    /// CSG: the stage of this PDU.
    pub stage: Stage,
    /// Highest version supported; 0 is the only one.
    pub version_max: u8,
    /// Lowest version supported.
    pub version_min: u8,
    /// Bytes of text.
    pub data_len_bytes: u32,
    /// The initiator's part of the session's name.
    pub isid: Isid,
    /// The target's handle for the session: 0 for a new session.
    pub tsih: u16,
    /// One tag for the whole login.
    pub itt: Itt,
    /// Connection in the session.
    pub cid: u16,
    /// CmdSN; does not advance.
    pub cmd_sn: Serial,
    /// ExpStatSN.
    pub exp_stat_sn: Serial,
}

impl Pdu for LoginRequest {
    const OPCODE: Opcode = Opcode::LoginRequest;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        let (stage, transit, continues) = stages(bhs, Self::OPCODE)?;
        Ok(Self {
            transit,
            continues,
            stage,
            version_max: bhs.0[2],
            version_min: bhs.0[3],
            data_len_bytes: bhs.data_len_bytes(),
            isid: Isid(bhs.array_at(8)),
            tsih: bhs.u16_at(14),
            itt: bhs.itt(),
            cid: bhs.u16_at(20),
            cmd_sn: bhs.sn_at(24),
            exp_stat_sn: bhs.sn_at(28),
        })
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        bhs.set_immediate(true);
        put_stages(&mut bhs, self.stage, self.transit, self.continues);
        bhs.0[2] = self.version_max;
        bhs.0[3] = self.version_min;
        bhs.set_data_len(self.data_len_bytes);
        bhs.put(8, self.isid.0);
        bhs.put_u16(14, self.tsih);
        bhs.put_u32(16, self.itt.0);
        bhs.put_u16(20, self.cid);
        bhs.put_sn(24, self.cmd_sn);
        bhs.put_sn(28, self.exp_stat_sn);
        bhs
    }
}

/// Login Response (11.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoginResponse {
    /// T with NSG: the target moves on to this stage, too.
    pub transit: Option<Stage>,
    /// C: the text goes on in the next PDU. Not together with `transit`.
    pub continues: bool,
    /// CSG: the stage of this PDU.
    pub stage: Stage,
    /// Highest version that the target supports.
    pub version_max: u8,
    /// The version in use.
    pub version_active: u8,
    /// Bytes of text.
    pub data_len_bytes: u32,
    /// As in the request.
    pub isid: Isid,
    /// The session's handle, in the last response; else as in the request.
    pub tsih: u16,
    /// As in the request.
    pub itt: Itt,
    /// The target's counters; valid only if `status_class` is 0 (11.13.5).
    pub sn: TargetSn,
    /// Status class: 0 success, 1 redirection, 2 initiator error, 3 target error.
    pub status_class: u8,
    /// Status detail.
    pub status_detail: u8,
}

impl Pdu for LoginResponse {
    const OPCODE: Opcode = Opcode::LoginResponse;

    fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        expect(bhs, Self::OPCODE)?;
        // With an error the stage fields are whatever the target left there.
        let (stage, transit, continues) = match (bhs.0[36], stages(bhs, Self::OPCODE)) {
            (_, Ok(stages)) => stages,
            (0, Err(error)) => return Err(error),
            (_, Err(_)) => (Stage::Security, None, false),
        };
        Ok(Self {
            transit,
            continues,
            stage,
            version_max: bhs.0[2],
            version_active: bhs.0[3],
            data_len_bytes: bhs.data_len_bytes(),
            isid: Isid(bhs.array_at(8)),
            tsih: bhs.u16_at(14),
            itt: bhs.itt(),
            sn: TargetSn::decode(bhs),
            status_class: bhs.0[36],
            status_detail: bhs.0[37],
        })
    }

    fn encode(&self) -> Bhs {
        let mut bhs = Bhs::new(Self::OPCODE);
        put_stages(&mut bhs, self.stage, self.transit, self.continues);
        bhs.0[2] = self.version_max;
        bhs.0[3] = self.version_active;
        bhs.set_data_len(self.data_len_bytes);
        bhs.put(8, self.isid.0);
        bhs.put_u16(14, self.tsih);
        bhs.put_u32(16, self.itt.0);
        self.sn.encode(&mut bhs);
        bhs.0[36] = self.status_class;
        bhs.0[37] = self.status_detail;
        bhs
    }
}
