//! `--disk` and `--net` specifications: words and `key=value` pairs with commas. A wrong key is answered with the
//! nearest right one.

use std::path::PathBuf;

use serde::Deserialize;

/// A URL that may hold a secret: it is not shown by `Debug`.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// The URL in full, for the process that needs it.
    pub fn expose(&self) -> &str {
        &self.0
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskSpec {
    /// iSCSI URL: the monitor starts a `vcp-iscsi` for it.
    pub url: Option<SecretUrl>,
    /// Socket of a vhost-user-blk backend that already runs.
    pub socket: Option<PathBuf>,
    /// Offer the disk read-only (with `url`).
    #[serde(default)]
    pub read_only: bool,
    /// Number of request queues, 1 to 64; 1 if not given.
    pub queues: Option<u16>,
    /// Hardware thread of the disk's VCP (with `url`).
    pub cpu: Option<usize>,
    /// Offer packed rings to the guest; the backend must have them.
    #[serde(default)]
    pub packed: bool,
    /// Whether another backend is started or sought when this one dies, which is so if not given; else the run ends.
    pub reconnect: Option<bool>,
}

/// One network device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetSpec {
    /// Socket of a vhost-user-net backend that already runs.
    pub socket: Option<PathBuf>,
    /// MAC address, `aa:bb:cc:dd:ee:ff`; one is made from the device's number if not given.
    pub mac: Option<String>,
    /// Whether the backend is sought again when it dies, which is so if not given; else the run ends.
    pub reconnect: Option<bool>,
}

/// Largest number of request queues of a disk.
pub const MAX_QUEUES: u16 = 64;

impl DiskSpec {
    /// Reads a specification as it stands after `--disk`.
    pub fn parse(text: &str) -> Result<Self, String> {
        const KEYS: &[&str] = &["url", "socket", "read-only", "queues", "cpu", "packed", "reconnect"];
        let mut spec = DiskSpec::default();
        for part in text.split(',') {
            let (key, value) = part.split_once('=').map_or((part, None), |(k, v)| (k, Some(v)));
            match (key, value) {
                ("url", Some(v)) if !v.is_empty() => spec.url = Some(v.into()),
                ("socket", Some(v)) if !v.is_empty() => spec.socket = Some(v.into()),
                ("read-only", None) => spec.read_only = true,
                ("queues", Some(v)) => spec.queues = Some(number(key, v)?),
                ("cpu", Some(v)) => spec.cpu = Some(number(key, v)?),
                ("packed", Some(v)) => spec.packed = switch(key, v)?,
                ("reconnect", Some(v)) => spec.reconnect = Some(switch(key, v)?),
                _ => return Err(wrong_key("disk", key, value, KEYS)),
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
            (None, Some(_)) if self.read_only => {
                return Err("read-only is the backend's business with socket=: set it there".into());
            }
            (None, Some(_)) if self.cpu.is_some() => {
                return Err("cpu= applies to the vcp-iscsi that url= starts; pin the backend of socket= where it is started".into());
            }
            _ => {}
        }
        match self.queues {
            Some(n) if !(1..=MAX_QUEUES).contains(&n) => {
                Err(format!("queues={n} is out of range: 1 to {MAX_QUEUES}"))
            }
            _ => Ok(()),
        }
    }
}

impl NetSpec {
    /// Reads a specification as it stands after `--net`.
    pub fn parse(text: &str) -> Result<Self, String> {
        const KEYS: &[&str] = &["socket", "mac", "reconnect"];
        let mut spec = NetSpec::default();
        for part in text.split(',') {
            let (key, value) = part.split_once('=').map_or((part, None), |(k, v)| (k, Some(v)));
            match (key, value) {
                ("socket", Some(v)) if !v.is_empty() => spec.socket = Some(v.into()),
                ("mac", Some(v)) => spec.mac = Some(v.to_owned()),
                ("reconnect", Some(v)) => spec.reconnect = Some(switch(key, v)?),
                ("user", _) | ("tap" | "switch" | "hostfwd" | "cpu", Some(_)) => {
                    return Err(format!(
                        "net {key:?} needs the network VCP, which this version does not have: start a vhost-user-net backend and give socket=PATH"
                    ));
                }
                _ => return Err(wrong_key("net", key, value, KEYS)),
            }
        }
        spec.validate()?;
        Ok(spec)
    }

    /// Checks what the syntax alone does not.
    pub fn validate(&self) -> Result<(), String> {
        if self.socket.is_none() {
            return Err("a net device needs socket=PATH of a vhost-user-net backend".into());
        }
        self.mac_bytes().map(|_| ())
    }

    /// The MAC address, if one was given. It must be a unicast address.
    pub fn mac_bytes(&self) -> Result<Option<[u8; 6]>, String> {
        let Some(text) = &self.mac else { return Ok(None) };
        let wrong = || format!("{text:?} is not a unicast MAC address: write e.g. 52:54:00:12:34:56");
        let mut mac = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(wrong());
        }
        Ok(Some(mac))
    }
}

fn number<T: std::str::FromStr>(key: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{key}={value:?} is not a number in range"))
}

fn switch(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" | "yes" | "true" => Ok(true),
        "off" | "no" | "false" => Ok(false),
        _ => Err(format!("{key}={value:?} is neither yes nor no")),
    }
}

fn wrong_key(what: &str, key: &str, value: Option<&str>, keys: &[&str]) -> String {
    if keys.contains(&key) {
        return match value {
            Some(v) if !v.is_empty() => format!("{what} option {key:?} takes no value"),
            _ => format!("{what} option {key:?} needs a value: {key}=..."),
        };
    }
    if key.starts_with("iscsi://") {
        return format!("write {what} url=iscsi://...");
    }
    if key.len() > 16 || !key.chars().all(|c| c.is_ascii_lowercase() || c == '-') {
        // Not repeated: it may be the rest of a URL with a secret in it.
        return format!(
            "{what} has something that is no option after a comma (a comma in a URL is written %2C): options are {}",
            keys.join(", ")
        );
    }
    let near = keys.iter().min_by_key(|k| distance(key, k)).filter(|k| distance(key, k) <= 3);
    match near {
        Some(near) => format!("unknown {what} option {key:?}: did you mean {near:?}?"),
        None => format!("unknown {what} option {key:?}: there are {}", keys.join(", ")),
    }
}

/// Levenshtein distance, for suggestions only.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = (above + 1).min(row[j] + 1).min(diagonal + usize::from(ca != *cb));
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_with_everything() {
        let text = "url=iscsi://h/iqn.x:y/0,read-only,queues=2,cpu=1,packed=on,reconnect=no";
        let spec = DiskSpec::parse(text).unwrap();
        assert!(spec.packed && spec.reconnect == Some(false));
        assert_eq!(spec.queues, Some(2));
        assert_eq!(spec.cpu, Some(1));
        assert!(spec.read_only);
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
            "socket=a,packed",
            "socket=a,reconnect=maybe",
            "socket=a,read-only=1",
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
    }

    #[test]
    fn net_macs() {
        let spec = NetSpec::parse("socket=/s,mac=52:54:00:12:34:56").unwrap();
        assert_eq!(spec.mac_bytes(), Ok(Some([0x52, 0x54, 0, 0x12, 0x34, 0x56])));
        for bad in [
            "socket=/s,mac=53:54:00:12:34:56",
            "socket=/s,mac=1:2",
            "socket=/s,mac=+2:54:00:12:34:56:77",
            "user",
            "tap=x",
            "",
        ] {
            assert!(NetSpec::parse(bad).is_err(), "{bad}");
        }
    }
}
