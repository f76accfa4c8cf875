//! Which unit it is ([`Identity`], [`UnitId`]), and through which port group it was asked ([`Access`]).

use std::fmt;
use std::str::FromStr;

use iscsi::scsi::alua::{AccessState, TargetPortGroup};
use iscsi::scsi::vpd::{Designator, DesignatorKind, Designators};

/// What tells one logical unit from another.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Identity {
    /// VPD page 80h.
    pub serial: Option<String>,
    /// VPD page 83h: the names of the unit itself, best kind first.
    pub names: Vec<Designator>,
}

impl Identity {
    /// Whether both are the same unit. World-wide names decide; where there are none, a serial number does between
    /// sessions with the same target (`same_target`) and nothing between different ones.
    ///
    /// # Errors
    /// In words, why not.
    pub fn check_same(&self, other: &Self, same_target: bool) -> Result<(), String> {
        use DesignatorKind as Kind;
        for kind in [Kind::Naa, Kind::Eui64, Kind::Name, Kind::T10] {
            let names = |identity: &Self| {
                let mut names: Vec<_> =
                    identity.names.iter().filter(|name| name.kind == kind).cloned().collect();
                names.sort();
                names.dedup();
                names
            };
            let (ours, theirs) = (names(self), names(other));
            if ours.is_empty() && theirs.is_empty() {
                continue;
            }
            return if ours == theirs { Ok(()) } else { Err(format!("{self}, not {other}")) };
        }
        match () {
            () if !same_target => Err("it has no world-wide name (VPD page 83h) to tell it by".to_owned()),
            () if self.serial == other.serial => Ok(()),
            () => Err(format!("{self}, not {other}")),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.names.first(), &self.serial) {
            (Some(name), _) => write!(f, "{name}"),
            (None, Some(serial)) => write!(f, "serial number {serial:?}"),
            (None, None) => f.write_str("a unit without a name"),
        }
    }
}

/// A unit as a user names it: `naa.HEX`, `eui.HEX`, `t10.TEXT` or a SCSI name string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitId(String);

/// A text that is no [`UnitId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a unit is named by its designator: naa.HEX, eui.HEX, t10.TEXT or iqn... (`vcp-iscsi info` shows it)"
)]
pub struct UnitIdError;

impl FromStr for UnitId {
    type Err = UnitIdError;

    fn from_str(text: &str) -> Result<Self, UnitIdError> {
        let (kind, rest) = text.split_once('.').ok_or(UnitIdError)?;
        let kind = kind.to_ascii_lowercase();
        let is_hex = |digits: usize| rest.len() >= digits && rest.bytes().all(|b| b.is_ascii_hexdigit());
        match kind.as_str() {
            "naa" | "eui" if is_hex(16) => Ok(Self(text.to_ascii_lowercase())),
            "t10" | "iqn" if !rest.is_empty() => Ok(Self(format!("{kind}.{rest}"))),
            _ => Err(UnitIdError),
        }
    }
}

impl UnitId {
    /// Whether it names this unit.
    pub fn names(&self, identity: &Identity) -> bool {
        identity.names.iter().any(|name| name.to_string().eq_ignore_ascii_case(&self.0))
    }
}

impl fmt::Display for UnitId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The target port group of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Access {
    /// Its number, where the unit tells it.
    pub group: Option<u16>,
    /// What can be done through it.
    pub state: AccessState,
    /// The unit would rather be reached through it.
    pub preferred: bool,
}

impl Access {
    /// The group of the port that answered, among all groups; `None` if the unit does not tell which one it is.
    pub fn find(groups: &[TargetPortGroup], names: &Designators) -> Option<Self> {
        let group = match (names.port_group, names.relative_port) {
            (Some(id), _) => groups.iter().find(|group| group.id == id)?,
            (None, Some(port)) => groups.iter().find(|group| group.ports.contains(&port))?,
            (None, None) => return None,
        };
        Some(Self { group: Some(group.id), state: group.state, preferred: group.preferred })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(names: &[(DesignatorKind, &str)], serial: Option<&str>) -> Identity {
        let names = names.iter().map(|&(kind, text)| Designator { kind, text: text.into() }).collect();
        Identity { serial: serial.map(Into::into), names }
    }

    #[test]
    fn the_best_name_that_either_has_decides() {
        use DesignatorKind::{Naa, T10};
        let one = named(&[(Naa, "60"), (T10, "same")], Some("1"));
        assert!(one.check_same(&one, false).is_ok());
        // Another name, whatever else is the same.
        let other = named(&[(Naa, "61"), (T10, "same")], Some("1"));
        assert_eq!(other.check_same(&one, true), Err("naa.61, not naa.60".into()));
        // No name of the kind that the other has.
        assert!(named(&[(T10, "same")], Some("1")).check_same(&one, true).is_err());
        // Order and repetition do not matter.
        let two = named(&[(Naa, "60"), (Naa, "70")], None);
        assert!(named(&[(Naa, "70"), (Naa, "60"), (Naa, "70")], None).check_same(&two, false).is_ok());
        assert!(two.check_same(&one, true).is_err());
    }

    #[test]
    fn a_serial_number_is_enough_within_a_target_only() {
        let one = named(&[], Some("1"));
        assert!(one.check_same(&one, true).is_ok());
        assert!(one.check_same(&one, false).is_err());
        assert!(named(&[], Some("2")).check_same(&one, true).is_err());
        assert!(named(&[], None).check_same(&one, true).is_err());
    }

    #[test]
    fn unit_ids() {
        let id: UnitId = "NAA.600A0B8000000001".parse().unwrap();
        assert!(id.names(&named(&[(DesignatorKind::Naa, "600a0b8000000001")], None)));
        assert!(!id.names(&named(&[(DesignatorKind::Eui64, "600a0b8000000001")], None)));
        assert!(
            "t10.IET     00010001"
                .parse::<UnitId>()
                .unwrap()
                .names(&named(&[(DesignatorKind::T10, "IET     00010001")], None))
        );
        for wrong in ["", "naa", "naa.", "naa.xyz", "naa.60", "wwn.1234", "t10."] {
            assert!(wrong.parse::<UnitId>().is_err(), "{wrong}");
        }
    }
}
