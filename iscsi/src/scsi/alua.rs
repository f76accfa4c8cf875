//! Asymmetric logical unit access (SPC-4 5.15): the states of target port groups, as REPORT TARGET PORT GROUPS tells
//! them, and what follows for commands.

use std::fmt;

use super::{DataError, be16, be32, need};

/// Asymmetric access state of a target port group (SPC-4 table 308).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccessState {
    /// Active/optimized: the way to take.
    Optimized,
    /// Active/non-optimized: works, but slower or at the cost of others.
    NonOptimized,
    /// Knows the unit, carries out no reads and writes until it is activated.
    Standby,
    /// As standby, and knows even less.
    Unavailable,
    /// Optimized for some blocks, non-optimized for others.
    LbaDependent,
    /// Cannot be used without a repair.
    Offline,
    /// Between two states.
    Transitioning,
}

impl AccessState {
    /// From the four bits of the field; `None` for those that the standard has not assigned.
    pub fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits & 0xF {
            0x0 => Self::Optimized,
            0x1 => Self::NonOptimized,
            0x2 => Self::Standby,
            0x3 => Self::Unavailable,
            0x4 => Self::LbaDependent,
            0xE => Self::Offline,
            0xF => Self::Transitioning,
            _ => return None,
        })
    }

    /// The four bits of the field.
    pub fn bits(self) -> u8 {
        match self {
            Self::Optimized => 0x0,
            Self::NonOptimized => 0x1,
            Self::Standby => 0x2,
            Self::Unavailable => 0x3,
            Self::LbaDependent => 0x4,
            Self::Offline => 0xE,
            Self::Transitioning => 0xF,
        }
    }

    /// Whether reads and writes are carried out in this state.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Optimized | Self::NonOptimized | Self::LbaDependent)
    }

    /// The state that NOT READY with this additional code tells of (SPC-4 5.15.2.4), if it tells of one.
    pub fn from_sense(code: u16) -> Option<Self> {
        match code {
            super::sense::asc::ALUA_TRANSITION => Some(Self::Transitioning),
            super::sense::asc::ALUA_STANDBY => Some(Self::Standby),
            super::sense::asc::ALUA_UNAVAILABLE => Some(Self::Unavailable),
            _ => None,
        }
    }
}

impl fmt::Display for AccessState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Optimized => "active/optimized",
            Self::NonOptimized => "active/non-optimized",
            Self::Standby => "standby",
            Self::Unavailable => "unavailable",
            Self::LbaDependent => "logical block dependent",
            Self::Offline => "offline",
            Self::Transitioning => "transitioning",
        })
    }
}

/// One target port group descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetPortGroup {
    /// TARGET PORT GROUP.
    pub id: u16,
    /// ASYMMETRIC ACCESS STATE; a value that the standard has not assigned reads as unavailable.
    pub state: AccessState,
    /// PREF: the preferred group.
    pub preferred: bool,
    /// RELATIVE TARGET PORT IDENTIFIERs of its ports.
    pub ports: Vec<u16>,
}

/// Decodes the parameter data of REPORT TARGET PORT GROUPS (length only header), as far as it came.
///
/// # Errors
/// It is too short to have a header.
pub fn parse_groups(data: &[u8]) -> Result<Vec<TargetPortGroup>, DataError> {
    need("REPORT TARGET PORT GROUPS data", data, 4)?;
    let end = data.len().min((be32(data, 0) as usize).saturating_add(4));
    let mut rest = &data[4..end];
    let mut groups = Vec::new();
    while let Some((head, tail)) = rest.split_at_checked(8) {
        let ports_bytes = usize::from(head[7]) * 4;
        let ports = &tail[..tail.len().min(ports_bytes)];
        groups.push(TargetPortGroup {
            id: be16(head, 2),
            state: AccessState::from_bits(head[0]).unwrap_or(AccessState::Unavailable),
            preferred: head[0] & 0x80 != 0,
            ports: ports.chunks_exact(4).map(|port| be16(port, 2)).collect(),
        });
        rest = tail.get(ports_bytes..).unwrap_or_default();
    }
    Ok(groups)
}

/// Encodes the parameter data of REPORT TARGET PORT GROUPS; all states but offline and logical block dependent are
/// told as supported.
pub fn encode_groups(groups: &[TargetPortGroup]) -> Vec<u8> {
    let mut data = vec![0; 4];
    for group in groups {
        let preferred = if group.preferred { 0x80 } else { 0 };
        let [id_high, id_low] = group.id.to_be_bytes();
        // T_SUP, U_SUP, S_SUP, AN_SUP, AO_SUP.
        data.extend_from_slice(&[preferred | group.state.bits(), 0x8F, id_high, id_low, 0, 0, 0]);
        data.push(group.ports.len().min(255) as u8);
        for port in group.ports.iter().take(255) {
            data.extend_from_slice(&[0, 0]);
            data.extend_from_slice(&port.to_be_bytes());
        }
    }
    let len = (data.len() - 4) as u32;
    data[..4].copy_from_slice(&len.to_be_bytes());
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_round_trip() {
        let groups = [
            TargetPortGroup { id: 1, state: AccessState::Optimized, preferred: true, ports: vec![1, 2] },
            TargetPortGroup { id: 0x1234, state: AccessState::Standby, preferred: false, ports: vec![] },
            TargetPortGroup { id: 3, state: AccessState::Transitioning, preferred: false, ports: vec![9] },
        ];
        let data = encode_groups(&groups);
        assert_eq!(data[..8], [0, 0, 0, 36, 0x80, 0x8F, 0, 1]);
        assert_eq!(parse_groups(&data).unwrap(), groups);
    }

    #[test]
    fn what_did_not_come_is_not_made_up() {
        assert!(parse_groups(&[0, 0, 0]).is_err());
        assert_eq!(parse_groups(&[0xFF, 0xFF, 0xFF, 0xFF]).unwrap(), []);
        // One group that claims more ports than came, behind it nothing.
        let data = [0, 0, 0, 200, 0x01, 0, 0, 7, 0, 0, 0, 40, 0, 0, 0, 5, 0, 0];
        let groups = parse_groups(&data).unwrap();
        assert_eq!((groups.len(), groups[0].id, &groups[0].ports[..]), (1, 7, &[5][..]));
        // Bytes behind the length do not count; an unknown state is none to send to.
        let mut data = encode_groups(&[]);
        data.extend_from_slice(&[0; 8]);
        assert_eq!(parse_groups(&data).unwrap(), []);
        let groups = parse_groups(&[0, 0, 0, 8, 0x07, 0, 0, 1, 0, 0, 0, 0]).unwrap();
        assert_eq!(groups[0].state, AccessState::Unavailable);
    }
}
