//! What a target is made of: targets, their LUNs, and how sessions are negotiated. Reads the LUN specifications of
//! the command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use iscsi::chap::Account;
use iscsi::scsi::alua::AccessState;

use crate::lu::Options;
pub use crate::server::PollMode;

/// A whole server.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen.
    pub listen: Vec<PortalConfig>,
    /// Access states of target port groups at start, where they are not active/optimized.
    pub groups: Vec<(u16, AccessState)>,
    /// Unix socket over which access states are changed.
    pub control: Option<PathBuf>,
    /// The targets.
    pub targets: Vec<TargetConfig>,
    /// What sessions are offered.
    pub session: SessionConfig,
    /// Connections at a time; more are turned away.
    pub max_connections: usize,
    /// A login must be over by then.
    pub login_timeout: Duration,
    /// A connection that is silent for this long is pinged, and closed if it stays silent for as long again. Zero:
    /// never.
    pub keepalive: Duration,
    /// The hardware thread of the data path.
    pub cpu: Option<usize>,
    /// How the data thread waits.
    pub poll: PollMode,
}

/// One portal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortalConfig {
    /// Address; port 0 takes a free one.
    pub addr: SocketAddr,
    /// Its target portal group, which is a target port group of SCSI as well.
    pub group: u16,
}

impl std::str::FromStr for PortalConfig {
    type Err = String;

    /// `ADDR:PORT[,group=N]`; the group is 1 if not given.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (addr, rest) = text.split_once(',').map_or((text, None), |(addr, rest)| (addr, Some(rest)));
        let addr = addr.parse().map_err(|_| format!("`{addr}`: expected an address and a port"))?;
        let group = match rest.map(|rest| rest.strip_prefix("group=").and_then(|id| id.parse().ok())) {
            None => 1,
            Some(Some(group @ 1..)) => group,
            Some(_) => return Err("expected ,group=N behind the address, N from 1 to 65535".into()),
        };
        Ok(Self { addr, group })
    }
}

/// One target.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    /// iSCSI name.
    pub name: String,
    /// Logical units.
    pub luns: Vec<LunConfig>,
    /// Who may log in; none: everybody.
    pub chap: Option<Account>,
    /// What we prove to the initiator, if it asks.
    pub mutual_chap: Option<Account>,
}

/// Where a logical unit keeps its blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Medium {
    /// Memory of this many bytes.
    Memory(u64),
    /// A file or block device.
    File(PathBuf),
}

/// One logical unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LunConfig {
    /// Its number; none: the next free one.
    pub number: Option<u16>,
    /// Its medium.
    pub medium: Medium,
    /// How it presents itself.
    pub options: Options,
    /// NAA identifier instead of the derived one: for the same medium behind several targets or servers.
    pub naa: Option<u64>,
}

/// What login offers and takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionConfig {
    /// The CmdSN window.
    pub queue_depth: u16,
    /// MaxOutstandingR2T.
    pub max_outstanding_r2t: u8,
    /// InitialR2T.
    pub initial_r2t: bool,
    /// ImmediateData.
    pub immediate_data: bool,
    /// MaxBurstLength in bytes.
    pub max_burst_bytes: u32,
    /// FirstBurstLength in bytes.
    pub first_burst_bytes: u32,
    /// MaxRecvDataSegmentLength in bytes.
    pub max_recv_segment_bytes: u32,
    /// HeaderDigest.
    pub header_digest: DigestChoice,
    /// DataDigest.
    pub data_digest: DigestChoice,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            queue_depth: 128,
            max_outstanding_r2t: 8,
            initial_r2t: false,
            immediate_data: true,
            max_burst_bytes: 1 << 20,
            first_burst_bytes: 256 << 10,
            max_recv_segment_bytes: 256 << 10,
            header_digest: DigestChoice::Any,
            data_digest: DigestChoice::Any,
        }
    }
}

/// What we say to a digest that the initiator offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DigestChoice {
    /// What the initiator likes best.
    #[default]
    Any,
    /// No digest.
    None,
    /// CRC32C if the initiator can.
    Crc32c,
}

impl std::str::FromStr for DigestChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "any" => Ok(Self::Any),
            "none" => Ok(Self::None),
            "crc32c" => Ok(Self::Crc32c),
            _ => Err("expected `any`, `none` or `crc32c`".into()),
        }
    }
}

/// A size with K, M, G or T behind it (powers of 1024).
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        Some((at, 't' | 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .filter(|_| digits.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("`{text}` is not a size (a number with K, M, G or T behind it)"))
}

/// Largest LUN in flat addressing.
const MAX_LUN: u16 = 0x3FFF;

impl std::str::FromStr for LunConfig {
    type Err = String;

    /// `mem:SIZE` or `file:PATH`, then `,read-only`, `,block-size=512|4096`, `,write-cache=on|off`, `,lun=N`,
    /// `,naa=HEX`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (kind, rest) = text
            .split_once(':')
            .ok_or_else(|| format!("`{text}`: expected mem:SIZE or file:PATH, then options"))?;
        let mut fields = rest.split(',');
        let place = fields.next().filter(|place| !place.is_empty()).ok_or("the medium is missing")?;
        let medium = match kind {
            "mem" => Medium::Memory(parse_size(place)?),
            "file" => Medium::File(place.into()),
            _ => return Err(format!("`{kind}` is no kind of medium: expected mem or file")),
        };
        let mut lun = Self { number: None, medium, options: Options::default(), naa: None };
        for field in fields {
            match field.split_once('=').unwrap_or((field, "")) {
                ("read-only", "") => lun.options.read_only = true,
                ("block-size", "512") => lun.options.block_bytes = 512,
                ("block-size", "4096") => lun.options.block_bytes = 4096,
                ("block-size", _) => return Err("block-size is 512 or 4096".into()),
                ("write-cache", "on") => lun.options.write_cache = true,
                ("write-cache", "off") => lun.options.write_cache = false,
                ("write-cache", _) => return Err("write-cache is on or off".into()),
                ("lun", number) => match number.parse() {
                    Ok(number @ 0..=MAX_LUN) => lun.number = Some(number),
                    _ => return Err(format!("lun is a number up to {MAX_LUN}")),
                },
                // The types with 8 bytes (SPC-4 7.8.6.6).
                ("naa", hex) => match u64::from_str_radix(hex, 16) {
                    Ok(naa) if hex.len() == 16 && matches!(naa >> 60, 2 | 3 | 5) => lun.naa = Some(naa),
                    _ => return Err("naa is 16 hexadecimal digits, the first of them 2, 3 or 5".into()),
                },
                (other, _) => {
                    return Err(format!(
                        "`{other}` is no option: there are read-only, block-size=, write-cache=, lun=, naa="
                    ));
                }
            }
        }
        if let Medium::Memory(bytes) = lun.medium
            && bytes < u64::from(lun.options.block_bytes)
        {
            return Err("the medium is smaller than a block".into());
        }
        Ok(lun)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("1G"), Ok(1 << 30));
        assert_eq!(parse_size("3t"), Ok(3 << 40));
        for bad in ["", "G", "-1", "+1", "1.5G", "99999999999T"] {
            assert!(parse_size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn portals() {
        let portal: PortalConfig = "127.0.0.1:3260".parse().unwrap();
        assert_eq!((portal.addr.port(), portal.group), (3260, 1));
        let portal: PortalConfig = "[::1]:0,group=65535".parse().unwrap();
        assert_eq!(portal.group, 65535);
        for bad in ["127.0.0.1", "127.0.0.1:1,group=0", "127.0.0.1:1,group=", "127.0.0.1:1,tag=1", ""] {
            assert!(bad.parse::<PortalConfig>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn luns() {
        let lun: LunConfig = "mem:1G,block-size=4096,lun=300".parse().unwrap();
        assert_eq!(
            (lun.medium, lun.number, lun.options.block_bytes),
            (Medium::Memory(1 << 30), Some(300), 4096)
        );
        let lun: LunConfig = "file:/a/b,read-only,write-cache=off".parse().unwrap();
        assert_eq!(lun.medium, Medium::File("/a/b".into()));
        assert!(lun.options.read_only && !lun.options.write_cache);
        for bad in [
            "",
            "mem",
            "mem:",
            "mem:x",
            "disk:1G",
            "mem:1G,nope",
            "mem:1G,lun=16384",
            "mem:100",
            "mem:1G,block-size=1",
            "mem:1G,naa=6000000000000001",
            "mem:1G,naa=3",
        ] {
            assert!(bad.parse::<LunConfig>().is_err(), "{bad:?}");
        }
    }
}
