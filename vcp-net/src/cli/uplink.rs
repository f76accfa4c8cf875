//! `--uplink`.

use std::str::FromStr;

/// An uplink of the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UplinkArg {
    /// None.
    None,
    /// A TAP device.
    Tap(String),
    /// A network interface.
    Packet(String),
}

impl FromStr for UplinkArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, rest) = text.split_once('=').unwrap_or((text, ""));
        match kind {
            "none" if rest.is_empty() => Ok(Self::None),
            "tap" if !rest.is_empty() => Ok(Self::Tap(rest.to_owned())),
            "packet" if !rest.is_empty() => Ok(Self::Packet(rest.to_owned())),
            "tap" | "packet" => Err(format!("`{text}`: the name of a network device is missing")),
            _ => Err(format!("`{text}` is no uplink (none, tap=NAME, packet=IFNAME)")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uplinks_are_read_as_they_are_written() {
        assert_eq!("none".parse(), Ok(UplinkArg::None));
        assert_eq!("tap=tap0".parse(), Ok(UplinkArg::Tap("tap0".into())));
        assert_eq!("packet=eth0".parse(), Ok(UplinkArg::Packet("eth0".into())));
        for bad in ["", "packet", "tap", "tap=", "none=1", "wire"] {
            assert!(bad.parse::<UplinkArg>().is_err(), "{bad}");
        }
    }
}
