//! The control queue (VIRTIO 1.2, 5.1.6.5), where the front end forwards it; QEMU answers it by itself.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vcp_core::queue::{Chain, RingError};

use super::PortSpec;
use super::features;
use crate::frame::{Mac, Offloads};

const OK: u8 = 0;
const ERR: u8 = 1;

/// Most addresses of a filter table; a driver with more gets all frames.
const MAX_FILTER: usize = 64;
/// Longest command that is looked at: the longest table, with its lengths.
const MAX_COMMAND_BYTES: usize = 2 + 8 + 12 * MAX_FILTER;

/// What the driver wants to receive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    promiscuous: bool,
    all_multicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    /// Stations besides its own.
    unicast: Vec<u64>,
    multicast: Vec<u64>,
    own: Option<u64>,
    /// VLANs as bits; without any, tags are not filtered.
    vlans: Vec<u16>,
}

impl Filter {
    fn new(mac: Option<Mac>) -> Self {
        Self {
            // Until it says otherwise it gets everything: the switch sends it little that is not its own.
            promiscuous: true,
            all_multicast: true,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Vec::new(),
            multicast: Vec::new(),
            own: mac.map(|mac| mac.0),
            vlans: Vec::new(),
        }
    }

    /// Whether it wants a frame for `dst` with a tag for `vid`.
    #[must_use]
    pub fn wants(&self, dst: Mac, vid: Option<u16>) -> bool {
        if let Some(vid) = vid
            && !self.vlans.is_empty()
            && !self.vlans.contains(&vid)
        {
            return false;
        }
        if dst == Mac::BROADCAST {
            return !self.no_broadcast;
        }
        if dst.is_group() {
            return !self.no_multicast
                && (self.promiscuous || self.all_multicast || self.multicast.contains(&dst.0));
        }
        !self.no_unicast && (self.promiscuous || self.own == Some(dst.0) || self.unicast.contains(&dst.0))
    }
}

/// What the driver chose through the queue.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Control {
    pairs: Option<u16>,
    /// Bits of `VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET`.
    offloads: Option<u64>,
    filter: Filter,
    filters: bool,
    announce: bool,
    changed: bool,
}

impl Control {
    pub(super) fn new(spec: &PortSpec) -> Self {
        let filter = Filter::new(spec.mac);
        Self { pairs: None, offloads: None, filter, filters: false, announce: false, changed: false }
    }

    pub(super) fn pairs(&self) -> Option<u16> {
        self.pairs
    }

    pub(super) fn offloads(&self) -> Option<Offloads> {
        self.offloads.map(features::chosen)
    }

    pub(super) fn filter(&self) -> Option<&Filter> {
        self.filters.then_some(&self.filter)
    }

    pub(super) fn announces(&self) -> bool {
        self.announce
    }

    /// The driver is to say where it is.
    pub(super) fn ask_to_announce(&mut self) {
        (self.announce, self.changed) = (true, true);
    }

    /// The configuration space changed.
    pub(super) fn changed(&mut self) {
        self.changed = true;
    }

    pub(super) fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    pub(super) fn export(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    pub(super) fn import(&mut self, state: Value) -> serde_json::Result<()> {
        *self = serde_json::from_value(state)?;
        Ok(())
    }

    /// Carries out the command in `chain`; returns the bytes written.
    ///
    /// # Errors
    /// There is no room for the answer.
    pub(super) fn answer(&mut self, chain: &Chain, pairs_max: u16) -> Result<u32, RingError> {
        if chain.writable.is_empty() {
            return Err(RingError::Framing("a control command without room for its answer"));
        }
        let mut bytes = [0; MAX_COMMAND_BYTES];
        let len = chain.readable.len_bytes();
        let ack = match bytes.get_mut(..len) {
            Some(bytes) => {
                chain.readable.copy_to(0, bytes);
                self.command(bytes, pairs_max).map_or(ERR, |()| OK)
            }
            // A table that is longer than ours: everything passes, which a filter may always do.
            None => {
                self.filter.promiscuous = true;
                OK
            }
        };
        chain.writable.copy_from(0, &[ack]);
        Ok(1)
    }

    fn command(&mut self, bytes: &[u8], pairs_max: u16) -> Option<()> {
        let [class, command, data @ ..] = bytes else { return None };
        let word = || Some(u16::from_le_bytes(data.try_into().ok()?));
        match (class, command) {
            // VIRTIO_NET_CTRL_RX.
            (0, 0..=5) => {
                let &[on] = data else { return None };
                let on = on != 0;
                self.filters = true;
                let filter = &mut self.filter;
                *match command {
                    0 => &mut filter.promiscuous,
                    1 => &mut filter.all_multicast,
                    // ALLUNI: every station, as promiscuous mode has it.
                    2 => &mut filter.promiscuous,
                    3 => &mut filter.no_multicast,
                    4 => &mut filter.no_unicast,
                    _ => &mut filter.no_broadcast,
                } = on;
                Some(())
            }
            // VIRTIO_NET_CTRL_MAC: TABLE_SET, ADDR_SET.
            (1, 0) => {
                let (unicast, rest) = table(data)?;
                let (multicast, rest) = table(rest)?;
                if !rest.is_empty() {
                    return None;
                }
                (self.filter.unicast, self.filter.multicast) = (unicast, multicast);
                Some(())
            }
            (1, 1) => {
                self.filter.own = Some(Mac::new(data.try_into().ok()?).0);
                Some(())
            }
            // VIRTIO_NET_CTRL_VLAN: ADD, DEL.
            (2, 0) => {
                let vid = word()?;
                if vid > 4095 {
                    return None;
                }
                if !self.filter.vlans.contains(&vid) {
                    self.filter.vlans.push(vid);
                }
                Some(())
            }
            (2, 1) => {
                let vid = word()?;
                self.filter.vlans.retain(|&it| it != vid);
                Some(())
            }
            // VIRTIO_NET_CTRL_ANNOUNCE_ACK.
            (3, 0) => {
                self.changed |= std::mem::take(&mut self.announce);
                Some(())
            }
            // VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
            (4, 0) => {
                let pairs = word()?;
                if !(1..=pairs_max).contains(&pairs) {
                    return None;
                }
                self.pairs = Some(pairs);
                Some(())
            }
            // VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET.
            (5, 0) => {
                self.offloads = Some(u64::from_le_bytes(data.try_into().ok()?));
                Some(())
            }
            _ => None,
        }
    }
}

/// A table of addresses: their number, then they.
fn table(data: &[u8]) -> Option<(Vec<u64>, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (addresses, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    let mac = |bytes: &[u8]| bytes.try_into().map_or(0, |bytes| Mac::new(bytes).0);
    Some((addresses.chunks_exact(6).map(mac).collect(), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control() -> Control {
        let mac = Some(Mac(0x0200_0000_0001));
        Control::new(&PortSpec { mac, ..PortSpec::default() })
    }

    #[test]
    fn commands_change_what_they_name_and_nothing_else() {
        let mut control = control();
        assert!(control.filter().is_none());
        assert!(control.command(&[0, 0, 0], 4).is_some(), "not promiscuous");
        assert!(control.command(&[0, 1, 0], 4).is_some(), "not all multicast");
        let mut set = vec![1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 5, 1, 0, 0, 0];
        set.extend([1, 0, 0x5e, 0, 0, 9]);
        assert!(control.command(&set, 4).is_some());
        let filter = control.filter().unwrap();
        let wants = |mac| filter.wants(Mac(mac), None);
        assert!(wants(0x0200_0000_0001) && wants(0x0200_0000_0005) && !wants(0x0200_0000_0006));
        assert!(wants(0x0100_5e00_0009) && !wants(0x0100_5e00_0008) && wants(Mac::BROADCAST.0));
        assert!(control.command(&[4, 0, 3, 0], 4).is_some());
        assert_eq!(control.pairs(), Some(3));
        assert!(control.command(&[2, 0, 7, 0], 4).is_some());
        let filter = control.filter().unwrap();
        assert!(filter.wants(Mac::BROADCAST, Some(7)) && !filter.wants(Mac::BROADCAST, Some(8)));
    }

    #[test]
    fn a_driver_is_asked_to_announce_itself_until_it_says_that_it_did() {
        let mut control = control();
        control.ask_to_announce();
        assert!(control.announces() && control.take_config_change() && !control.take_config_change());
        assert!(control.command(&[3, 0], 1).is_some());
        assert!(!control.announces() && control.take_config_change());
        assert!(control.command(&[3, 0], 1).is_some() && !control.take_config_change());
    }

    #[test]
    fn what_is_not_a_command_is_refused() {
        let mut control = control();
        for bad in [
            &[][..],
            &[0],
            &[0, 0],
            &[0, 9, 1],
            &[1, 0, 255, 255, 255, 255],
            &[1, 0, 1, 0, 0, 0, 1, 2, 3],
            &[1, 1, 1],
            &[2, 0, 0, 16],
            &[4, 0, 0, 0],
            &[4, 0, 5, 0],
            &[5, 0, 1],
            &[9, 0],
        ] {
            assert!(control.command(bad, 4).is_none(), "{bad:?}");
        }
        assert_eq!((control.pairs(), control.offloads()), (None, None));
    }

    #[test]
    fn offloads_are_those_of_the_features_bits() {
        let mut control = control();
        let bits: u64 = 1 << 1 | 1 << 7;
        let mut command = vec![5, 0];
        command.extend(bits.to_le_bytes());
        assert!(control.command(&command, 1).is_some());
        assert_eq!(control.offloads(), Some(Offloads { csum: true, tso4: true, ..Offloads::NONE }));
    }
}
