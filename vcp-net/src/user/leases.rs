//! Who has which address: leases of DHCP and DHCPv6, by MAC address, with the names that guests gave. An address stays
//! a guest's as long as there are others: a guest that comes back finds its own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::config::UserConfig;
use super::packet::Link;

/// Most leases.
const LEASES_MAX: usize = 1024;

/// One guest's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Lease {
    /// Its station.
    pub link: Link,
    /// Its name, in lower case; empty: not said.
    pub name: String,
    /// It was given the IPv4 address.
    pub bound4: bool,
    /// It was given the IPv6 address.
    pub bound6: bool,
    /// When it was heard last, by a count of events.
    used: u64,
}

/// See the module. The place of a lease in it says which addresses it has.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Leases {
    leases: Vec<Option<Lease>>,
    events: u64,
}

impl Leases {
    /// The lease of a station, a new one if it has none. `None`: there are no more addresses.
    pub fn of(&mut self, config: &UserConfig, link: Link) -> Option<u32> {
        self.events += 1;
        let events = self.events;
        let at = match self.find(link) {
            Some(at) => at,
            None => {
                let room = (0..LEASES_MAX as u32).take_while(|&at| config.guest4(at).is_some()).count();
                let free = self.leases.iter().position(Option::is_none);
                let at = match free {
                    Some(at) => at,
                    None if self.leases.len() < room => {
                        self.leases.push(None);
                        self.leases.len() - 1
                    }
                    None => {
                        // The one that was not heard of for the longest time, of those that were never bound first.
                        let lease = |at: &usize| self.leases[*at].as_ref();
                        (0..self.leases.len())
                            .min_by_key(|at| {
                                lease(at).map_or((false, 0), |it| (it.bound4 || it.bound6, it.used))
                            })
                            .filter(|at| lease(at).is_none_or(|it| !it.bound4 && !it.bound6))?
                    }
                };
                self.leases[at] =
                    Some(Lease { link, name: String::new(), bound4: false, bound6: false, used: events });
                at as u32
            }
        };
        self.get_mut(at)?.used = events;
        Some(at)
    }

    fn find(&self, link: Link) -> Option<u32> {
        let at = self.leases.iter().position(|it| it.as_ref().is_some_and(|it| it.link == link))?;
        Some(at as u32)
    }

    /// Number `at`.
    pub fn get_mut(&mut self, at: u32) -> Option<&mut Lease> {
        self.leases.get_mut(at as usize)?.as_mut()
    }

    /// Gives a lease a name, unless another has it.
    pub fn name(&mut self, at: u32, name: &str) {
        let name = name.split('.').next().unwrap_or("").to_ascii_lowercase();
        let good = !name.is_empty() && name.len() <= 63 && name.bytes().all(super::dns::is_name_byte);
        let mut others = self.leases.iter().enumerate().filter(|(other, _)| *other != at as usize);
        if good
            && !others.any(|(_, it)| it.as_ref().is_some_and(|it| it.name == name))
            && let Some(lease) = self.get_mut(at)
        {
            lease.name = name;
        }
    }

    /// All of them, with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Lease)> {
        self.leases.iter().enumerate().filter_map(|(at, it)| Some((at as u32, it.as_ref()?)))
    }

    /// The addresses of the guest of that name.
    #[must_use]
    pub fn by_name(&self, config: &UserConfig, name: &str) -> Option<(Option<Ipv4Addr>, Option<Ipv6Addr>)> {
        let (at, lease) = self.iter().find(|(_, lease)| lease.name == name)?;
        let v4 = config.guest4(at).filter(|_| lease.bound4);
        Some((v4, lease.bound6.then(|| config.guest6(at))))
    }

    /// The name of the guest with that address.
    #[must_use]
    pub fn by_address(&self, config: &UserConfig, ip: IpAddr) -> Option<&str> {
        let mut leases = self.iter().filter(|(_, lease)| !lease.name.is_empty());
        let found = leases.find(|(at, lease)| match ip {
            IpAddr::V4(ip) => lease.bound4 && config.guest4(*at) == Some(ip),
            IpAddr::V6(ip) => lease.bound6 && config.guest6(*at) == ip,
        });
        found.map(|(_, lease)| lease.name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Mac;

    fn link(at: u64) -> Link {
        Link { mac: Mac(0x5254_0000_0000 + at), vid: 0 }
    }

    #[test]
    fn a_guest_keeps_its_address_and_names_are_not_taken_twice() {
        let config: UserConfig = "net=10.1.0.0/27".parse().unwrap();
        let mut leases = Leases::default();
        assert_eq!((leases.of(&config, link(1)), leases.of(&config, link(2))), (Some(0), Some(1)));
        leases.name(0, "Web.example");
        leases.name(1, "web");
        leases.name(1, "bad name");
        leases.get_mut(0).unwrap().bound4 = true;
        let address = config.guest4(0).unwrap();
        assert_eq!(leases.by_name(&config, "web"), Some((Some(address), None)));
        assert_eq!(leases.by_address(&config, address.into()), Some("web"));
        // Fifteen addresses; what was only asked for is given to others, what is bound is not.
        for at in 3..40 {
            assert!(leases.of(&config, link(at)).is_some());
        }
        assert_eq!(leases.of(&config, link(1)), Some(0));
        for at in 0..16 {
            if let Some(lease) = leases.get_mut(at) {
                lease.bound4 = true;
            }
        }
        assert_eq!(leases.of(&config, link(99)), None);
    }
}
