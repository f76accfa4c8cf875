//! `--uplink`.

use std::str::FromStr;

use crate::user::UserConfig;

/// An uplink of the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UplinkArg {
    /// None.
    None,
    /// A TAP device.
    Tap(String),
    /// A network interface.
    Packet(String),
    /// The user-mode stack.
    User(Box<UserConfig>),
}

impl FromStr for UplinkArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(options) = text.strip_prefix("user").filter(|it| it.is_empty() || it.starts_with(',')) {
            return Ok(Self::User(Box::new(options.parse()?)));
        }
        let (kind, rest) = text.split_once('=').unwrap_or((text, ""));
        match kind {
            "none" if rest.is_empty() => Ok(Self::None),
            "tap" if !rest.is_empty() => Ok(Self::Tap(rest.to_owned())),
            "packet" if !rest.is_empty() => Ok(Self::Packet(rest.to_owned())),
            "tap" | "packet" => Err(format!("`{text}`: the name of a network device is missing")),
            _ => Err(format!("`{text}` is no uplink (none, tap=NAME, packet=IFNAME, user)")),
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
        let Ok(UplinkArg::User(user)) = "user,hostfwd=tcp:127.0.0.1:8080-80".parse() else { panic!() };
        assert_eq!((user.forwards.len(), user.forwards[0].port), (1, 80));
        for bad in ["", "user,x", "user=", "userx", "packet", "tap", "tap=", "none=1", "wire"] {
            assert!(bad.parse::<UplinkArg>().is_err(), "{bad}");
        }
    }
}
