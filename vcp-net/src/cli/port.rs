//! `--port`.

use std::path::PathBuf;
use std::str::FromStr;

use crate::port::{OnFull, PortSpec, Vlan};

/// A port of the command line.
#[derive(Clone, Debug)]
pub struct PortArg {
    /// Its socket; `fd:N` for one that this process was started with.
    pub path: PathBuf,
    /// The socket listens already, as this descriptor, which the process was started with.
    pub fd: Option<i32>,
    /// A front end listens there; otherwise this process does.
    pub connect: bool,
    /// What it is like.
    pub spec: PortSpec,
}

impl FromStr for PortArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut spec = PortSpec::default();
        let mut at: Option<(PathBuf, bool)> = None;
        let mut fd = None;
        let (mut access, mut trunk, mut native) = (None, None, None);
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let number = || value.parse::<u16>().map_err(|_| format!("`{part}`: not a number"));
            match key {
                "socket" | "connect" | "fd" if at.is_some() => return Err("a port has one socket".into()),
                "socket" | "connect" if value.is_empty() => return Err(format!("`{part}`: no path")),
                "fd" => {
                    let number = value.parse().map_err(|_| format!("`{part}`: not a descriptor's number"))?;
                    (fd, at) = (Some(number), Some((format!("fd:{number}").into(), false)));
                }
                "socket" => at = Some((value.into(), false)),
                "connect" => at = Some((value.into(), true)),
                "name" if !value.is_empty() => value.clone_into(&mut spec.name),
                "mac" => spec.mac = Some(value.parse()?),
                "mtu" => spec.mtu = Some(number()?),
                "queues" => spec.pairs = number()?,
                "switch" => spec.switch = number()?,
                "vlan" => access = Some(number()?),
                "trunk" => trunk = Some(vlans(value)?),
                "native" => native = Some(if value == "none" { None } else { Some(number()?) }),
                "on-full" => {
                    spec.on_full = match value {
                        "wait" => OnFull::Wait,
                        "drop" => OnFull::Drop,
                        _ => return Err(format!("`{part}`: wait or drop")),
                    }
                }
                "protect" => spec.protect = is_on(part, value)?,
                "offloads" => spec.offloads = is_on(part, value)?,
                "rate" => spec.rate.bytes = Some(size(value).ok_or_else(|| format!("`{part}`: not a size"))?),
                "frames" => {
                    spec.rate.frames = Some(value.parse().map_err(|_| format!("`{part}`: not a number"))?);
                }
                _ => return Err(format!("`{part}` is no option of a port")),
            }
        }
        let (path, connect) = at.ok_or("`socket=` (or `connect=`) is missing")?;
        spec.vlan = match (access, trunk, native) {
            (Some(_), Some(_), _) | (Some(_), _, Some(_)) => {
                return Err("a port is in one VLAN (vlan=) or a trunk (trunk=, native=)".into());
            }
            (Some(vid), None, None) => Vlan::Access(vid),
            (None, None, None) => Vlan::default(),
            (None, trunk, native) => {
                Vlan::Trunk { native: native.unwrap_or(Some(0)), allowed: trunk.unwrap_or_default() }
            }
        };
        spec.check()?;
        Ok(Self { path, fd, connect, spec })
    }
}

fn is_on(part: &str, value: &str) -> Result<bool, String> {
    match value {
        "" | "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("`{part}`: on or off")),
    }
}

/// `all`, or numbers with `-` between them.
fn vlans(text: &str) -> Result<Vec<u16>, String> {
    if text == "all" {
        return Ok(Vec::new());
    }
    text.split('-').map(|vid| vid.parse().map_err(|_| format!("`{vid}` is no VLAN"))).collect()
}

/// A number with K, M or G for powers of 1024.
pub(crate) fn size(text: &str) -> Option<u64> {
    let (digits, factor) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        b'G' => (&text[..text.len() - 1], 1u64 << 30),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(text: &str) -> Result<PortArg, String> {
        text.parse()
    }

    #[test]
    fn what_a_port_can_be() {
        let plain = port("socket=/run/a").unwrap();
        assert_eq!((plain.path, plain.connect, plain.spec), ("/run/a".into(), false, PortSpec::default()));
        let full = port(
            "connect=/b,name=x,mac=52:54:00:00:00:01,mtu=9000,queues=4,vlan=5,on-full=drop,protect,rate=1M,frames=7,switch=1",
        );
        let full = full.unwrap();
        assert!(full.connect && full.spec.protect && full.spec.on_full == OnFull::Drop);
        assert_eq!((full.spec.mtu, full.spec.pairs, full.spec.switch), (Some(9000), 4, 1));
        assert_eq!((full.spec.vlan, full.spec.rate.bytes), (Vlan::Access(5), Some(1 << 20)));
        let given = port("fd=3,queues=2").unwrap();
        assert_eq!((given.fd, given.connect, given.path), (Some(3), false, "fd:3".into()));
        let trunk = port("socket=/c,trunk=5-7,native=none").unwrap().spec.vlan;
        assert_eq!(trunk, Vlan::Trunk { native: None, allowed: vec![5, 7] });
    }

    #[test]
    fn what_it_cannot_be() {
        for bad in [
            "",
            "socket=",
            "mac=52:54:00:00:00:01",
            "socket=/a,socket=/b",
            "socket=/a,fd=3",
            "fd=x",
            "socket=/a,mac=01:00:00:00:00:00",
            "socket=/a,mtu=67",
            "socket=/a,queues=0",
            "socket=/a,queues=17",
            "socket=/a,vlan=0",
            "socket=/a,vlan=4095",
            "socket=/a,vlan=5,trunk=all",
            "socket=/a,trunk=5-x",
            "socket=/a,on-full=perhaps",
            "socket=/a,protect",
            "socket=/a,rate=0",
            "socket=/a,rate=1X",
            "socket=/a,colour=red",
        ] {
            assert!(port(bad).is_err(), "{bad}");
        }
    }
}
