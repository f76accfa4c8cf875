//! Network devices: `--net`, `[[net]]`, and the body of the API's request.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vcp_core::process::named::is_switch_name;

use super::bounds::{BoundSpec, check_weight};
use super::size::Size;
use super::words::{number, parts, switch, wrong_key};
use crate::placement::Policy;

/// One network device. Exactly one of `user`, `tap`, `switch` and `socket` says what it is connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetSpec {
    /// The host's network through a user-mode stack of its own: no rights are needed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub user: bool,
    /// Ports of the host that lead to ports of the guest (with `user`): `tcp:127.0.0.1:2222-22`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub hostfwd: Vec<HostForward>,
    /// Name of a TAP interface of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Name of a switch among guests, of which the device gets a free port: `vcp-net serve --switch NAME`, which outlives
    /// each of them and is started by no monitor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub switch: Option<String>,
    /// Socket of a vhost-user-net backend that already runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub socket: Option<PathBuf>,
    /// MAC address, `aa:bb:cc:dd:ee:ff`; one is made from the device's number if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Number of queue pairs (receive and transmit), 1 to 16; 1 if not given. The backend must have as many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Where the device's VCP runs (with `user` and `tap`): the number of a hardware thread, `auto`, `own-core`,
    /// `sibling[:VCPU]` or `shared[:GROUP]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub cpu: Option<Policy>,
    /// Its share of a thread that it shares, relative to the others' (with `user` and `tap`), 1 to 10000; 100 if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 10000)]
    pub weight: Option<u32>,
    /// Most processor time of its VCP, percent of one hardware thread (not with `socket`), 5 to 10000; no bound if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 5, maximum = 10000)]
    pub cpu_max: Option<u32>,
    /// Most memory of its VCP besides the guest's, with K, M or G (not with `socket`); 1G if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub memory_max: Option<Size>,
    /// Most processes and threads of its VCP (not with `socket`), 16 to 4096; 128 if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 16, maximum = 4096)]
    pub pids_max: Option<u32>,
    /// Offer packed rings to the guest; the backend must have them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub packed: bool,
    /// Whether the backend is started or sought again when it dies, which is so if not given; else the run ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reconnect: Option<bool>,
}

/// Largest number of queue pairs of a network device.
pub(crate) const MAX_PAIRS: u16 = 16;

/// What a network device is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetKind<'a> {
    /// A user-mode stack, with these ports of the host.
    User(&'a [HostForward]),
    /// A TAP interface.
    Tap(&'a str),
    /// A switch of the guest's network devices.
    Switch(&'a str),
    /// A backend that already runs.
    Socket(&'a Path),
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of the host that leads to a port of the guest: `tcp:ADDR:PORT-PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostForward {
    /// Of the transport layer.
    pub protocol: Protocol,
    /// Address of the host that is listened on; `None`: all.
    pub address: Option<IpAddr>,
    /// Port of the host.
    pub host_port: u16,
    /// Port of the guest.
    pub guest_port: u16,
}

impl FromStr for HostForward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is not a forwarded port: write e.g. tcp:127.0.0.1:2222-22 (the host's port, then the guest's)"
            )
        };
        let (protocol, rest) = text.split_once(':').ok_or_else(wrong)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(wrong()),
        };
        let (address, ports) = rest.rsplit_once(':').ok_or_else(wrong)?;
        let bare = address.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(address);
        let address = match bare {
            "" => None,
            _ => Some(bare.parse::<IpAddr>().map_err(|_| wrong())?),
        };
        let (host, guest) = ports.split_once('-').ok_or_else(wrong)?;
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(wrong);
        Ok(Self { protocol, address, host_port: port(host)?, guest_port: port(guest)? })
    }
}

impl TryFrom<String> for HostForward {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl std::fmt::Display for HostForward {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:", self.protocol)?;
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]")?,
            Some(address) => write!(f, "{address}")?,
            None => {}
        }
        write!(f, ":{}-{}", self.host_port, self.guest_port)
    }
}

impl From<HostForward> for String {
    fn from(forward: HostForward) -> Self {
        forward.to_string()
    }
}

const KEYS: &[&str] = &[
    "user",
    "hostfwd",
    "tap",
    "switch",
    "socket",
    "mac",
    "queues",
    "cpu",
    "weight",
    "cpu-max",
    "memory-max",
    "pids-max",
    "packed",
    "reconnect",
];

/// Longest name of a network interface (`IFNAMSIZ` without its NUL).
const MAX_INTERFACE_NAME: usize = 15;

impl NetSpec {
    /// Reads a specification as it stands after `--net`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut spec = NetSpec::default();
        for part in parts(text) {
            match part {
                ("user", None) => spec.user = true,
                ("hostfwd", Some(v)) => spec.hostfwd.push(v.parse()?),
                ("tap", Some(v)) if !v.is_empty() => spec.tap = Some(v.to_owned()),
                ("switch", Some(v)) if !v.is_empty() => spec.switch = Some(v.to_owned()),
                ("socket", Some(v)) if !v.is_empty() => spec.socket = Some(v.into()),
                ("mac", Some(v)) => spec.mac = Some(v.to_owned()),
                (key @ "queues", Some(v)) => spec.queues = Some(number(key, v)?),
                ("cpu", Some(v)) => spec.cpu = Some(v.parse()?),
                (key @ "weight", Some(v)) => spec.weight = Some(number(key, v)?),
                (key @ "cpu-max", Some(v)) => spec.cpu_max = Some(number(key, v.trim_end_matches('%'))?),
                ("memory-max", Some(v)) => spec.memory_max = Some(v.parse()?),
                (key @ "pids-max", Some(v)) => spec.pids_max = Some(number(key, v)?),
                (key @ "packed", Some(v)) => spec.packed = switch(key, v)?,
                (key @ "reconnect", Some(v)) => spec.reconnect = Some(switch(key, v)?),
                part => return Err(wrong_key("net", part, KEYS)),
            }
        }
        spec.validate()?;
        Ok(spec)
    }

    /// What it is connected to; an error says what is missing or too much.
    pub fn kind(&self) -> Result<NetKind<'_>, String> {
        let kinds = [
            self.user.then_some(NetKind::User(&self.hostfwd)),
            self.tap.as_deref().map(NetKind::Tap),
            self.switch.as_deref().map(NetKind::Switch),
            self.socket.as_deref().map(NetKind::Socket),
        ];
        let mut kinds = kinds.into_iter().flatten();
        match (kinds.next(), kinds.next()) {
            (Some(kind), None) => Ok(kind),
            (None, _) => Err("a net device needs one of user, tap=NAME, switch=NAME and socket=PATH".into()),
            _ => Err("a net device has only one of user, tap=, switch= and socket=".into()),
        }
    }

    /// Checks what the syntax alone does not.
    pub fn validate(&self) -> Result<(), String> {
        if let Some(pairs) = self.queues.filter(|pairs| !(1..=MAX_PAIRS).contains(pairs)) {
            return Err(format!("queues={pairs} is out of range: 1 to {MAX_PAIRS}"));
        }
        check_weight(self.weight)?;
        let kind = self.kind()?;
        if !self.hostfwd.is_empty() && !self.user {
            return Err("hostfwd= needs user: other networks reach the guest by its own address".into());
        }
        match kind {
            NetKind::Tap(name) if !is_name(name, MAX_INTERFACE_NAME) => {
                return Err(format!("tap={name:?} is not the name of a network interface"));
            }
            NetKind::Switch(name) if !is_switch_name(name) => {
                return Err(format!(
                    "switch={name:?} is not a name: letters, digits, '-', '_' and '.', at most 32"
                ));
            }
            NetKind::Socket(_) | NetKind::Switch(_) if self.cpu.is_some() || self.weight.is_some() => {
                return Err("cpu= and weight= apply to a vcp-net that the monitor starts; pin the backend of socket= or switch= where it is started".into());
            }
            _ => {}
        }
        self.bounds().validate()?;
        let others = matches!(kind, NetKind::Socket(_) | NetKind::Switch(_));
        if others && self.bounds() != BoundSpec::default() {
            return Err("cpu-max=, memory-max= and pids-max= apply to a vcp-net that the monitor starts; see to the backend of socket= or switch= where that is started".into());
        }
        let mut ports: Vec<_> = self.hostfwd.iter().map(|f| (f.protocol, f.address, f.host_port)).collect();
        ports.sort_unstable();
        if let Some(double) = ports.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("hostfwd= gives the host's {} port {} twice", double[0].0, double[0].2));
        }
        self.mac_bytes().map(|_| ())
    }

    /// Bounds of its VCP, as they were given.
    pub fn bounds(&self) -> BoundSpec {
        BoundSpec { cpu_max: self.cpu_max, memory_max: self.memory_max, pids_max: self.pids_max }
    }

    /// The MAC address, if one was given. It must be a unicast address.
    pub fn mac_bytes(&self) -> Result<Option<[u8; 6]>, String> {
        let Some(text) = &self.mac else { return Ok(None) };
        let wrong = || format!("{text:?} is not a unicast MAC address: write e.g. 52:54:00:12:34:56");
        let mut mac = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(wrong)?, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(wrong());
        }
        Ok(Some(mac))
    }
}

/// Not a path, not empty, and nothing that a program could take for an option or a list.
fn is_name(name: &str, longest: usize) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=longest).contains(&name.len()) && name.chars().all(good) && !name.starts_with(['-', '.'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_read() {
        let spec = NetSpec::parse("user,hostfwd=tcp:127.0.0.1:2222-22,hostfwd=udp::53-53,hostfwd=tcp:[::1]:80-8080,mac=52:54:00:12:34:56,cpu=1").unwrap();
        let NetKind::User(forwards) = spec.kind().unwrap() else { panic!("{spec:?}") };
        let texts: Vec<_> = forwards.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["tcp:127.0.0.1:2222-22", "udp::53-53", "tcp:[::1]:80-8080"]);
        assert_eq!(
            (&spec.cpu, spec.mac_bytes()),
            (&Some(Policy::Named(1)), Ok(Some([0x52, 0x54, 0, 0x12, 0x34, 0x56])))
        );
        assert_eq!(NetSpec::parse("tap=tap0").unwrap().kind(), Ok(NetKind::Tap("tap0")));
        assert_eq!(NetSpec::parse("switch=lan.1").unwrap().kind(), Ok(NetKind::Switch("lan.1")));
        let spec = NetSpec::parse("socket=/s,packed=on,reconnect=no").unwrap();
        assert_eq!((spec.kind(), spec.reconnect), (Ok(NetKind::Socket(Path::new("/s"))), Some(false)));
        assert!(spec.packed && !NetSpec::parse("socket=/s,packed=off").unwrap().packed);
    }

    #[test]
    fn bad_nets_are_refused() {
        for bad in [
            "",
            "mac=52:54:00:12:34:56",
            "user,tap=x",
            "user=yes",
            "tap=",
            "tap=a/b",
            "tap=abcdefghijklmnop",
            "switch=../x",
            "switch=-x",
            "switch=x,cpu=1",
            "user,cpu=nowhere",
            "user,weight=0",
            "socket=/s,cpu=1",
            "socket=/s,queues=0",
            "socket=/s,memory-max=1G",
            "user,cpu-max=4",
            "socket=/s,queues=17",
            "tap=x,hostfwd=tcp::1-1",
            "user,hostfwd=tcp:127.0.0.1:2222",
            "user,hostfwd=icmp::1-1",
            "user,hostfwd=tcp::0-1",
            "user,hostfwd=tcp::1-65536",
            "user,hostfwd=tcp:localhost:1-1",
            "user,hostfwd=tcp::1-1,hostfwd=tcp::1-2",
            "socket=/s,mac=53:54:00:12:34:56",
            "socket=/s,mac=1:2",
            "socket=/s,mac=+2:54:00:12:34:56",
            "socket=/s,mac=52:54:00:12:34:56:77",
            "socket=/s,queue=2",
            "socket=/s,packed",
            "socket=/s,packed=perhaps",
        ] {
            assert!(NetSpec::parse(bad).is_err(), "{bad}");
        }
    }
}
