//! Block devices: `--disk`, `[[disk]]`, and the body of the API's request.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::bounds::{BoundSpec, check_weight};
use super::size::Size;
use super::words::{number, parts, switch, wrong_key};
use crate::placement::Policy;

/// A URL that may hold a secret: it is not shown by `Debug`. Serialised in full, for `vcp run --print-config` and for
/// requests to the API; nothing that holds one is a part of an answer.
#[derive(Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(transparent)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// The URL in full, for the process that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// `HOST[:PORT]`.
    pub fn portal(&self) -> String {
        let authority = self.0.trim_start_matches("iscsi://").split('/').next().unwrap_or_default();
        authority.rsplit_once('@').map_or(authority, |(_, portal)| portal).to_owned()
    }

    /// Whether it names a secret: `USER%PASSWORD@`.
    pub fn has_secret(&self) -> bool {
        let authority = self.0.trim_start_matches("iscsi://").split('/').next().unwrap_or_default();
        authority.rsplit_once('@').is_some_and(|(user, _)| user.contains('%'))
    }
}

impl From<&str> for SecretUrl {
    fn from(url: &str) -> Self {
        Self(url.to_owned())
    }
}

impl std::fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("iscsi://...")
    }
}

/// One block device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskSpec {
    /// iSCSI URL: the monitor starts a `vcp-iscsi` for it. Either this or `socket`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub url: Option<SecretUrl>,
    /// Further ways to the same unit (with `url`): other portals, other targets. What such a URL does not say is as in
    /// `url`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub path: Vec<SecretUrl>,
    /// `all`: besides, every portal that the target names (with `url`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paths: Option<PathsFrom>,
    /// Further portals that its VCP may connect to, `HOST[:PORT]`: those that its target redirects to (with `url`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub portal: Vec<String>,
    /// What its VCP can reach: `portals` (of `url`, `path` and `portal`), `any` address over TCP, or the whole network of
    /// the `host` (with `url`). `portals` if not given, but `any` with `paths`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkAccess>,
    /// Sessions with each portal, 1 to 16; 1 if not given (with `url`).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 16)]
    pub sessions: Option<u16>,
    /// Socket of a vhost-user-blk backend that already runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub socket: Option<PathBuf>,
    /// Offer the disk read-only (with `url`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// Number of request queues, 1 to 64; 1 if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 64)]
    pub queues: Option<u16>,
    /// Where the disk's VCP runs (with `url`): the number of a hardware thread, `auto`, `own-core`, `sibling[:VCPU]` or
    /// `shared[:GROUP]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub cpu: Option<Policy>,
    /// Its share of a thread that it shares, relative to the others' (with `url`), 1 to 10000; 100 if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 10000)]
    pub weight: Option<u32>,
    /// How long its idle data thread looks before it sleeps (with `url`): microseconds, `always` or `adaptive`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poll_us: Option<String>,
    /// Percent of its time that its data thread may look for work at most (with `url`); the rest is the host's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 100)]
    pub poll_share: Option<u8>,
    /// Whether a second process stands by for the case that it dies (with `url`), which is so if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub standby: Option<bool>,
    /// Seconds that its data thread may stand still with work to do before it is killed (with `url`); 5 if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 3600)]
    pub watchdog: Option<u16>,
    /// Unix socket where programs of this user reach the same unit beside the guest, by `msgq` (with `url`): the monitor
    /// listens there and the disk's VCP serves them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub msgq: Option<PathBuf>,
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
    /// Whether another backend is started or sought when this one dies, which is so if not given; else the run ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reconnect: Option<bool>,
}

/// Which ways to a unit are taken besides those that are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PathsFrom {
    /// Every portal that the target names.
    All,
}

/// What a disk's VCP can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkAccess {
    /// The portals that its declaration names; it has no network itself.
    Portals,
    /// Any address, over TCP; it has no network itself.
    Any,
    /// What the host can.
    Host,
}

impl std::str::FromStr for NetworkAccess {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "portals" => Ok(Self::Portals),
            "any" => Ok(Self::Any),
            "host" => Ok(Self::Host),
            _ => Err(format!("network={text}: there are portals, any and host")),
        }
    }
}

impl std::fmt::Display for NetworkAccess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Portals => "portals",
            Self::Any => "any",
            Self::Host => "host",
        })
    }
}

/// Most portals besides those of the ways.
const MAX_PORTALS: usize = 64;
/// Most ways to a disk.
const MAX_PATHS: usize = 16;
/// Largest number of request queues of a disk.
pub const MAX_QUEUES: u16 = 64;

const KEYS: &[&str] = &[
    "url",
    "path",
    "paths",
    "portal",
    "network",
    "sessions",
    "socket",
    "read-only",
    "queues",
    "cpu",
    "weight",
    "poll-us",
    "poll-share",
    "standby",
    "watchdog",
    "msgq",
    "cpu-max",
    "memory-max",
    "pids-max",
    "packed",
    "reconnect",
];

impl DiskSpec {
    /// Reads a specification as it stands after `--disk`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut spec = DiskSpec::default();
        for part in parts(text) {
            match part {
                ("url", Some(v)) if !v.is_empty() => spec.url = Some(v.into()),
                ("path", Some(v)) if !v.is_empty() => spec.path.push(v.into()),
                ("paths", Some("all")) => spec.paths = Some(PathsFrom::All),
                ("portal", Some(v)) if !v.is_empty() => spec.portal.push(v.to_owned()),
                ("network", Some(v)) => spec.network = Some(v.parse()?),
                (key @ "sessions", Some(v)) => spec.sessions = Some(number(key, v)?),
                ("socket", Some(v)) if !v.is_empty() => spec.socket = Some(v.into()),
                ("read-only", None) => spec.read_only = true,
                (key @ "queues", Some(v)) => spec.queues = Some(number(key, v)?),
                ("cpu", Some(v)) => spec.cpu = Some(v.parse()?),
                (key @ "weight", Some(v)) => spec.weight = Some(number(key, v)?),
                ("poll-us", Some(v)) => spec.poll_us = Some(v.to_owned()),
                (key @ "poll-share", Some(v)) => {
                    spec.poll_share = Some(number(key, v.trim_end_matches('%'))?);
                }
                (key @ "standby", Some(v)) => spec.standby = Some(switch(key, v)?),
                (key @ "watchdog", Some(v)) => spec.watchdog = Some(number(key, v)?),
                ("msgq", Some(v)) if !v.is_empty() => spec.msgq = Some(v.into()),
                (key @ "cpu-max", Some(v)) => spec.cpu_max = Some(number(key, v.trim_end_matches('%'))?),
                ("memory-max", Some(v)) => spec.memory_max = Some(v.parse()?),
                (key @ "pids-max", Some(v)) => spec.pids_max = Some(number(key, v)?),
                (key @ "packed", Some(v)) => spec.packed = switch(key, v)?,
                (key @ "reconnect", Some(v)) => spec.reconnect = Some(switch(key, v)?),
                part => return Err(wrong_key("disk", part, KEYS)),
            }
        }
        spec.validate()?;
        Ok(spec)
    }

    /// Checks what the syntax alone does not.
    pub fn validate(&self) -> Result<(), String> {
        match (&self.url, &self.socket) {
            (None, None) => return Err("a disk needs url=iscsi://... or socket=PATH".into()),
            (Some(_), Some(_)) => return Err("a disk has either url= or socket=, not both".into()),
            (Some(url), None) if !url.expose().starts_with("iscsi://") => {
                return Err("a disk's url must begin with iscsi://, e.g. url=iscsi://127.0.0.1/iqn.2026-01.example:disk/0".into());
            }
            (None, Some(_)) if !self.path.is_empty() || self.paths.is_some() || self.sessions.is_some() => {
                return Err("path=, paths= and sessions= apply to the vcp-iscsi that url= starts; give them to the backend of socket=".into());
            }
            (None, Some(_)) if self.read_only => {
                return Err("read-only is the backend's business with socket=: set it there".into());
            }
            (None, Some(_)) if self.of_own_vcp().is_some() => {
                let key = self.of_own_vcp().unwrap_or_default();
                return Err(format!(
                    "{key}= applies to the vcp-iscsi that url= starts; for the backend of socket=, see to it where that is started"
                ));
            }
            (None, Some(_)) if self.cpu.is_some() => {
                return Err("cpu= applies to the vcp-iscsi that url= starts; pin the backend of socket= where it is started".into());
            }
            _ => {}
        }
        if !self.path.iter().all(|url| url.expose().starts_with("iscsi://")) {
            return Err("a disk's path must begin with iscsi://, e.g. path=iscsi://192.0.2.8".into());
        }
        if let Some(portal) = self.portal.iter().find(|portal| !is_portal(portal)) {
            return Err(format!("portal={portal:?} is not HOST[:PORT] (an IPv6 address stands in brackets)"));
        }
        if self.portal.len() > MAX_PORTALS {
            return Err(format!("{} portals are too many: at most {MAX_PORTALS}", self.portal.len()));
        }
        if self.path.len() >= MAX_PATHS {
            return Err(format!("{} ways to a disk are too many: at most {MAX_PATHS}", self.path.len() + 1));
        }
        if let Some(n) = self.sessions
            && !(1..=MAX_PATHS).contains(&usize::from(n))
        {
            return Err(format!("sessions={n} is out of range: 1 to {MAX_PATHS}"));
        }
        check_weight(self.weight)?;
        if self.watchdog.is_some_and(|seconds| !(1..=3600).contains(&seconds)) {
            return Err("watchdog= is out of range: 1 to 3600 seconds".into());
        }
        if self.poll_share.is_some_and(|share| share > 100) {
            return Err("poll-share= is out of range: 0 to 100 percent".into());
        }
        if let Some(poll) = &self.poll_us {
            poll.parse::<vcp_core::poll::PollMode>().map_err(|e| format!("poll-us: {e}"))?;
        }
        self.bounds().validate()?;
        match self.queues {
            Some(n) if !(1..=MAX_QUEUES).contains(&n) => {
                Err(format!("queues={n} is out of range: 1 to {MAX_QUEUES}"))
            }
            _ => Ok(()),
        }
    }

    /// What its VCP can reach.
    pub fn reach(&self) -> NetworkAccess {
        match (self.network, self.paths) {
            (Some(network), _) => network,
            // Where the target says which portals there are.
            (None, Some(PathsFrom::All)) => NetworkAccess::Any,
            (None, None) => NetworkAccess::Portals,
        }
    }

    /// Every portal that the declaration names.
    pub fn portals(&self) -> Vec<String> {
        let urls = self.url.iter().chain(&self.path).map(SecretUrl::portal);
        urls.chain(self.portal.iter().cloned()).collect()
    }

    /// Bounds of its VCP, as they were given.
    pub fn bounds(&self) -> BoundSpec {
        BoundSpec { cpu_max: self.cpu_max, memory_max: self.memory_max, pids_max: self.pids_max }
    }

    /// A key that only a VCP of our own can honour, if one was given.
    fn of_own_vcp(&self) -> Option<&'static str> {
        [
            ("portal", !self.portal.is_empty()),
            ("network", self.network.is_some()),
            ("weight", self.weight.is_some()),
            ("poll-us", self.poll_us.is_some()),
            ("poll-share", self.poll_share.is_some()),
            ("standby", self.standby.is_some()),
            ("watchdog", self.watchdog.is_some()),
            ("msgq", self.msgq.is_some()),
            ("cpu-max", self.cpu_max.is_some()),
            ("memory-max", self.memory_max.is_some()),
            ("pids-max", self.pids_max.is_some()),
        ]
        .into_iter()
        .find_map(|(key, given)| given.then_some(key))
    }
}

/// Whether a text has the form of a portal; whether there is one, who connects will see.
fn is_portal(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[').map(|inner| inner.split_once(']')) {
        Some(Some((host, ""))) => (host, None),
        Some(Some((host, rest))) => (host, rest.strip_prefix(':').or(Some(""))),
        Some(None) => return false,
        None if text.matches(':').count() > 1 => return false,
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    let good = |c: char| !c.is_whitespace() && !c.is_control() && !matches!(c, '/' | '@' | '[' | ']');
    !host.is_empty()
        && host.chars().all(good)
        && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_disk_can_reach() {
        let spec =
            DiskSpec::parse("url=iscsi://u%p@h:1/iqn.x:y/0,path=iscsi://[::1]:2,portal=i,portal=[::2]")
                .unwrap();
        assert_eq!(spec.portals(), ["h:1", "[::1]:2", "i", "[::2]"]);
        assert_eq!(spec.reach(), NetworkAccess::Portals);
        let reach = |text: &str| DiskSpec::parse(text).unwrap().reach();
        assert_eq!(reach("url=iscsi://h/i/0,paths=all"), NetworkAccess::Any);
        assert_eq!(reach("url=iscsi://h/i/0,paths=all,network=portals"), NetworkAccess::Portals);
        assert_eq!(reach("url=iscsi://h/i/0,network=host"), NetworkAccess::Host);
        for bad in ["", "h:", "h:0", "h:65536", "a:b:c", "[::1", "[::1]x", "[]:1", "a b", "u@h"] {
            assert!(!is_portal(bad), "{bad}");
        }
        assert!(["h", "h:1", "10.0.0.1:3260", "[::1]", "[::1]:3260"].iter().all(|good| is_portal(good)));
    }

    #[test]
    fn disk_with_everything() {
        let text = "url=iscsi://h/iqn.x:y/0,read-only,queues=2,cpu=1,packed=on,reconnect=no";
        let spec = DiskSpec::parse(text).unwrap();
        assert!(spec.packed && spec.reconnect == Some(false));
        assert_eq!(spec.queues, Some(2));
        assert_eq!(spec.cpu, Some(Policy::Named(1)));
        let text =
            "url=iscsi://h/i/0,cpu=shared:a,weight=50,poll-us=20,poll-share=25%,standby=off,watchdog=2";
        let spec = DiskSpec::parse(text).unwrap();
        assert_eq!((spec.cpu, spec.weight), (Some(Policy::Shared("a".into())), Some(50)));
        assert_eq!((spec.poll_us.as_deref(), spec.poll_share), (Some("20"), Some(25)));
        assert_eq!((spec.standby, spec.watchdog), (Some(false), Some(2)));
        let spec = DiskSpec::parse("url=iscsi://h/iqn.x:y/0,read-only,msgq=/run/a").unwrap();
        assert!(spec.read_only && spec.msgq == Some("/run/a".into()));
    }

    #[test]
    fn several_ways_to_a_disk() {
        let text = "url=iscsi://h/iqn.x:y/0,path=iscsi://i,path=iscsi://j/iqn.x:z/0,paths=all,sessions=2";
        let spec = DiskSpec::parse(text).unwrap();
        let paths: Vec<_> = spec.path.iter().map(SecretUrl::expose).collect();
        assert_eq!(paths, ["iscsi://i", "iscsi://j/iqn.x:z/0"]);
        assert_eq!((spec.paths, spec.sessions), (Some(PathsFrom::All), Some(2)));
    }

    #[test]
    fn wrong_key_gets_a_suggestion() {
        let error = DiskSpec::parse("sokcet=/tmp/x").unwrap_err();
        assert!(error.contains("did you mean \"socket\""), "{error}");
    }

    #[test]
    fn bad_disks_are_refused() {
        for bad in [
            "",
            "url=",
            "socket=a,url=iscsi://b",
            "url=http://x",
            "socket=a,queues=0",
            "socket=a,queues=65",
            "socket=a,queues=x",
            "socket=a,cpu=1",
            "socket=a,standby=off",
            "socket=a,msgq=b",
            "url=iscsi://h/i/0,msgq=",
            "socket=a,network=host",
            "url=iscsi://h/i/0,network=lan",
            "url=iscsi://h/i/0,portal=a:b:c",
            "socket=a,pids-max=64",
            "url=iscsi://h/i/0,cpu-max=4",
            "url=iscsi://h/i/0,memory-max=1M",
            "url=iscsi://h/i/0,pids-max=4",
            "url=iscsi://h/i/0,weight=0",
            "url=iscsi://h/i/0,poll-share=101",
            "url=iscsi://h/i/0,poll-us=soon",
            "url=iscsi://h/i/0,watchdog=0",
            "url=iscsi://h/i/0,cpu=core",
            "socket=a,packed",
            "socket=a,reconnect=maybe",
            "socket=a,read-only=1",
            "socket=a,sessions=2",
            "socket=a,path=iscsi://b",
            "url=iscsi://h/iqn.x:y/0,path=b",
            "url=iscsi://h/iqn.x:y/0,paths=some",
            "url=iscsi://h/iqn.x:y/0,sessions=17",
        ] {
            assert!(DiskSpec::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let error = DiskSpec::parse("url=iscsi://u%pass,Word1@h/iqn.x:y/0").unwrap_err();
        assert!(!error.contains("Word1"), "{error}");
        let spec = DiskSpec::parse("url=iscsi://u%passWord1@h/iqn.x:y/0").unwrap();
        assert!(!format!("{spec:?}").contains("passWord1"));
        assert!(spec.url.unwrap().has_secret());
        assert!(!SecretUrl::from("iscsi://h/iqn.x:y%20z/0").has_secret());
    }
}
