//! [`PortSpec`]: what a user says of a port.

use serde::{Deserialize, Serialize};

use crate::frame::Mac;

/// Pairs of queues of a port at most.
pub const PAIRS_MAX: u16 = 16;
/// Smallest and largest MTU: what IPv4 demands, and the longest packet.
pub const MTU_RANGE: std::ops::RangeInclusive<u16> = 68..=65535;

/// What is done with a frame for a port that has no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFull {
    /// It stays with its sender (its descriptors are not taken) as long as the port goes on taking frames; a port that
    /// stands still for longer than [`PATIENCE`](crate::switch::PATIENCE) does not hold others up.
    #[default]
    Wait,
    /// It is dropped, and counted.
    Drop,
}

/// Which VLANs a port is in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vlan {
    /// One: its frames have no tag.
    Access(u16),
    /// Several, with tags; frames without one belong to `native`, if there is one.
    Trunk {
        /// Where frames without a tag belong.
        native: Option<u16>,
        /// The VLANs; none: all.
        allowed: Vec<u16>,
    },
}

impl Default for Vlan {
    /// A port that does not know of VLANs: all of them, as they come.
    fn default() -> Self {
        Self::Trunk { native: Some(0), allowed: Vec::new() }
    }
}

/// How much a port may send, in bytes and frames per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Bytes per second.
    pub bytes: Option<u64>,
    /// Frames per second; a row of segments counts as many.
    pub frames: Option<u64>,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    /// Its name in logs, metrics and commands.
    pub name: String,
    /// Its address, as the driver is told; only front ends that leave the address to the back end use it.
    pub mac: Option<Mac>,
    /// Its MTU, as the driver is told and as the switch enforces it.
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to [`PAIRS_MAX`].
    pub pairs: u16,
    /// VLANs.
    pub vlan: Vlan,
    /// What happens when it has no room.
    pub on_full: OnFull,
    /// It may send from its own address alone, and nobody else may.
    pub protect: bool,
    /// How much it may send.
    pub rate: Rate,
    /// Whether checksums and segmentation are offered.
    pub offloads: bool,
    /// The link is up.
    pub link: bool,
    /// Which of the process's switches it is a port of.
    pub switch: u16,
}

impl Default for PortSpec {
    fn default() -> Self {
        Self {
            name: String::new(),
            mac: None,
            mtu: None,
            pairs: 1,
            vlan: Vlan::default(),
            on_full: OnFull::default(),
            protect: false,
            rate: Rate::default(),
            offloads: true,
            link: true,
            switch: 0,
        }
    }
}

impl PortSpec {
    /// Whether it is one that can be.
    ///
    /// # Errors
    /// What is wrong, in words for the user.
    pub fn check(&self) -> Result<(), String> {
        let vid = |vid: u16| match vid {
            1..=4094 => Ok(()),
            _ => Err(format!("{vid} is no VLAN (1 to 4094)")),
        };
        match &self.vlan {
            Vlan::Access(own) => vid(*own)?,
            Vlan::Trunk { native, allowed } => {
                native.iter().filter(|native| **native != 0).try_for_each(|native| vid(*native))?;
                allowed.iter().try_for_each(|allowed| vid(*allowed))?;
            }
        }
        if !(1..=PAIRS_MAX).contains(&self.pairs) {
            return Err(format!("{} pairs of queues (1 to {PAIRS_MAX})", self.pairs));
        }
        if self.mtu.is_some_and(|mtu| !MTU_RANGE.contains(&mtu)) {
            let (from, to) = (MTU_RANGE.start(), MTU_RANGE.end());
            return Err(format!("an MTU of {} ({from} to {to})", self.mtu.unwrap_or(0)));
        }
        if self.mac.is_some_and(|mac| !mac.is_station()) {
            return Err("a MAC address that no station can have".into());
        }
        if self.protect && self.mac.is_none() {
            return Err("protection needs the port's address (mac=)".into());
        }
        if [self.rate.bytes, self.rate.frames].contains(&Some(0)) {
            return Err("a rate of 0".into());
        }
        Ok(())
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}
