//! How a user-mode stack is set up: addresses, name, forwards. `--uplink user[,OPTION]...`

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::frame::Mac;

/// The stack's own MAC address, if none is given.
const OUR_MAC: Mac = Mac(0x5256_4350_0002);
/// Most connections of a guest at once, if nothing is said.
const FLOWS: u32 = 4096;

/// Most flows of all guests.
const FLOWS_MAX: u64 = 65_536;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserConfig {
    /// The gateway in the guests' IPv4 network. It also stands for the host itself, if that is wanted.
    pub gateway4: Ipv4Addr,
    /// Length of its prefix, 8 to 29.
    pub prefix4: u8,
    /// The gateway in the guests' IPv6 network, whose prefix has 64 bits.
    pub gateway6: Ipv6Addr,
    /// The stack's own address.
    pub mac: Mac,
    /// Domain of the guests' names.
    pub domain: String,
    /// Whether the gateway's addresses lead to the loopback addresses of the host.
    pub host: bool,
    /// Largest packet that guests are sent in one piece.
    pub mtu: u16,
    /// Most connections of a guest at once.
    pub flows: u32,
    /// Memory for what guests send behind a gap of TCP, for all of them together. A guest has a quarter of it at most, and a
    /// connection an eighth.
    #[serde(default = "ahead_bytes")]
    pub ahead_bytes: u32,
    /// Name servers instead of those of the host.
    pub dns: Vec<IpAddr>,
    /// What listens for whom.
    pub forwards: Vec<Forward>,
}

/// What is meant if nothing is said.
fn ahead_bytes() -> u32 {
    8 << 20
}

impl Default for UserConfig {
    fn default() -> Self {
        Self {
            gateway4: Ipv4Addr::new(10, 0, 2, 2),
            prefix4: 24,
            gateway6: Ipv6Addr::new(0xfd76, 0x6370, 0x6e65, 0x7400, 0, 0, 0, 2),
            mac: OUR_MAC,
            domain: "internal".into(),
            host: true,
            mtu: 1500,
            flows: FLOWS,
            ahead_bytes: ahead_bytes(),
            dns: Vec::new(),
            forwards: Vec::new(),
        }
    }
}

impl UserConfig {
    /// Most flows of all guests.
    #[must_use]
    pub fn flows_max(&self) -> u64 {
        (u64::from(self.flows) * 8).min(FLOWS_MAX)
    }

    fn mask4(&self) -> u32 {
        u32::MAX << (32 - u32::from(self.prefix4))
    }

    /// The mask of the IPv4 network.
    #[must_use]
    pub fn netmask(&self) -> Ipv4Addr {
        self.mask4().into()
    }

    /// The address that forwards DNS.
    #[must_use]
    pub fn dns4(&self) -> Ipv4Addr {
        (u32::from(self.gateway4) + 1).into()
    }

    /// See [`dns4`](Self::dns4).
    #[must_use]
    pub fn dns6(&self) -> Ipv6Addr {
        (u128::from(self.gateway6) + 1).into()
    }

    /// The gateway's link-local address.
    #[must_use]
    pub fn link_local(&self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.mac.bytes();
        let tail = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
        (0xfe80u128 << 112 | u128::from(u64::from_be_bytes(tail))).into()
    }

    /// Guest number `at`'s IPv4 address, as leases have it.
    #[must_use]
    pub fn guest4(&self, at: u32) -> Option<Ipv4Addr> {
        let address = u32::from(self.gateway4).checked_add(13)?.checked_add(at)?;
        let broadcast = u32::from(self.gateway4) | !self.mask4();
        (address < broadcast && address & self.mask4() == u32::from(self.gateway4) & self.mask4())
            .then(|| address.into())
    }

    /// Guest number `at`'s IPv6 address, as leases have it.
    #[must_use]
    pub fn guest6(&self, at: u32) -> Ipv6Addr {
        (u128::from(self.gateway6) + 0x13 + u128::from(at)).into()
    }

    /// Whether an address is one of the guests' network.
    #[must_use]
    pub fn is_inside(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => (u32::from(ip) ^ u32::from(self.gateway4)) & self.mask4() == 0,
            IpAddr::V6(ip) => {
                (u128::from(ip) ^ u128::from(self.gateway6)) >> 64 == 0 || ip.is_unicast_link_local()
            }
        }
    }

    /// Whether it is the gateway's.
    #[must_use]
    pub fn is_gateway(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => ip == self.gateway4,
            IpAddr::V6(ip) => ip == self.gateway6 || ip == self.link_local(),
        }
    }

    /// Whether it is where DNS is.
    #[must_use]
    pub fn is_dns(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => ip == self.dns4(),
            IpAddr::V6(ip) => ip == self.dns6(),
        }
    }

    /// Whether it is one of the stack's own.
    #[must_use]
    pub fn is_ours(&self, ip: IpAddr) -> bool {
        self.is_gateway(ip) || self.is_dns(ip)
    }

    /// The gateway's address of the same family.
    #[must_use]
    pub fn gateway_like(&self, ip: IpAddr) -> IpAddr {
        match ip {
            IpAddr::V4(_) => self.gateway4.into(),
            IpAddr::V6(_) => self.gateway6.into(),
        }
    }
}

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// Something that listens on the host for a guest: `tcp:ADDR:PORT-[GUEST:]PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// Of which protocol.
    pub transport: Transport,
    /// Where it listens.
    pub bind: SocketAddr,
    /// The guest's address; `None`: the first guest's.
    pub guest: Option<IpAddr>,
    /// The guest's port.
    pub port: u16,
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}-", self.transport, self.bind)?;
        match self.guest {
            Some(guest) => write!(f, "{}", SocketAddr::new(guest, self.port)),
            None => write!(f, "{}", self.port),
        }
    }
}

impl FromStr for Forward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = |why: &str| format!("`{text}`: {why} (tcp:ADDR:PORT-[GUEST:]PORT, or udp:...)");
        let (transport, rest) = text.split_once(':').ok_or_else(|| bad("no protocol"))?;
        let transport = match transport {
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            _ => return Err(bad("a protocol that is not known")),
        };
        let (host, guest) = rest.split_once('-').ok_or_else(|| bad("no port of the guest"))?;
        let host = match host.rsplit_once(':') {
            // As in QEMU: no address is all of them.
            Some(("", port)) => format!("0.0.0.0:{port}"),
            Some(_) => host.to_owned(),
            None => return Err(bad("no address to listen on")),
        };
        let bind = host.parse().map_err(|_| bad("not an address with a port"))?;
        let (guest, port) = match guest.rsplit_once(':') {
            None => (None, guest),
            Some(("", port)) => (None, port),
            Some((ip, port)) => {
                let ip = ip.trim_start_matches('[').trim_end_matches(']');
                (Some(ip.parse().map_err(|_| bad("not a guest's address"))?), port)
            }
        };
        let port =
            port.parse().ok().filter(|&port| port != 0).ok_or_else(|| bad("not a port of the guest"))?;
        Ok(Self { transport, bind, guest, port })
    }
}

impl FromStr for UserConfig {
    type Err = String;

    /// The options behind `user`, with commas between them.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut this = Self::default();
        for option in text.split(',').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').ok_or_else(|| format!("`{option}` has no value"))?;
            let bad = |what: &str| format!("`{option}`: {what}");
            match name {
                "hostfwd" => this.forwards.push(value.parse()?),
                "net" => {
                    let (ip, len) = value.split_once('/').unwrap_or((value, "24"));
                    let ip: Ipv4Addr = ip.parse().map_err(|_| bad("not an IPv4 network"))?;
                    let len: u8 = len.parse().map_err(|_| bad("not a length of a prefix"))?;
                    if !(8..=27).contains(&len) {
                        return Err(bad("a prefix of 8 to 27 bits is wanted"));
                    }
                    this.prefix4 = len;
                    this.gateway4 = (u32::from(ip) & u32::MAX << (32 - u32::from(len)) | 2).into();
                }
                "net6" => {
                    let ip = value.strip_suffix("/64").unwrap_or(value);
                    let ip: Ipv6Addr = ip.parse().map_err(|_| bad("not an IPv6 network of 64 bits"))?;
                    this.gateway6 = (u128::from(ip) >> 64 << 64 | 2).into();
                }
                "mac" => this.mac = value.parse()?,
                "domain" => {
                    if value.is_empty() || value.len() > 63 || !value.bytes().all(super::dns::is_name_byte) {
                        return Err(bad("not a domain"));
                    }
                    this.domain = value.to_ascii_lowercase();
                }
                "host" => {
                    this.host = match value {
                        "on" => true,
                        "off" => false,
                        _ => return Err(bad("`on` or `off` is wanted")),
                    }
                }
                "mtu" => {
                    let mtu = value.parse().ok().filter(|&mtu| mtu >= 1280);
                    this.mtu = mtu.ok_or_else(|| bad("1280 to 65535 is wanted"))?;
                }
                "flows" => {
                    let flows = value.parse().ok().filter(|flows| (1..=65536).contains(flows));
                    this.flows = flows.ok_or_else(|| bad("1 to 65536 is wanted"))?;
                }
                "ahead" => {
                    let mib: Option<u32> = value.parse().ok().filter(|mib| *mib <= 256);
                    this.ahead_bytes = mib.ok_or_else(|| bad("0 to 256 (MiB) is wanted"))? << 20;
                }
                "dns" => this.dns.push(value.parse().map_err(|_| bad("not an address"))?),
                _ => {
                    return Err(bad(
                        "not an option of `user` (hostfwd, net, net6, mac, domain, host, mtu, flows, ahead, dns)",
                    ));
                }
            }
        }
        if !this.mac.is_station() {
            return Err(format!("{} is no address of a station", this.mac));
        }
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_are_read_as_they_are_written() {
        let forward: Forward = "tcp:127.0.0.1:2222-22".parse().unwrap();
        assert_eq!((forward.transport, forward.guest, forward.port), (Transport::Tcp, None, 22));
        assert_eq!(forward.to_string(), "tcp:127.0.0.1:2222-22");
        let forward: Forward = "udp::53-10.0.2.16:5353".parse().unwrap();
        assert_eq!(forward.to_string(), "udp:0.0.0.0:53-10.0.2.16:5353");
        assert_eq!("tcp:[::1]:80-[fd00::1]:8080".parse::<Forward>().unwrap().bind.port(), 80);
        for bad in
            ["", "tcp", "tcp:1-2", "tcp:127.0.0.1:1", "icmp:127.0.0.1:1-1", "tcp:127.0.0.1:1-0", "tcp:x:1-1"]
        {
            assert!(bad.parse::<Forward>().is_err(), "{bad}");
        }
    }

    #[test]
    fn options_are_read_and_addresses_follow() {
        let config: UserConfig = "".parse().unwrap();
        assert_eq!(config, UserConfig::default());
        assert_eq!(config.guest4(0), Some(Ipv4Addr::new(10, 0, 2, 15)));
        assert_eq!((config.guest4(239).is_some(), config.guest4(240)), (true, None));
        assert!(
            config.is_inside("10.0.2.99".parse().unwrap()) && !config.is_inside("10.0.3.1".parse().unwrap())
        );
        assert!(config.is_ours("10.0.2.3".parse().unwrap()) && config.link_local().is_unicast_link_local());
        let config: UserConfig =
            "net=192.168.7.0/24,host=off,mtu=9000,hostfwd=tcp::1-2,ahead=2".parse().unwrap();
        assert_eq!((config.gateway4, config.host, config.mtu), (Ipv4Addr::new(192, 168, 7, 2), false, 9000));
        assert_eq!(config.ahead_bytes, 2 << 20);
        for bad in
            ["net=1", "host=1", "ahead=257", "mtu=100", "x=1", "host", "domain=a b", "mac=ff:ff:ff:ff:ff:ff"]
        {
            assert!(bad.parse::<UserConfig>().is_err(), "{bad}");
        }
    }
}
