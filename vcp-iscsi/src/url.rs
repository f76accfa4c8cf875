//! iSCSI URLs, `iscsi://[USER[%PASSWORD]@]HOST[:PORT][/TARGET-IQN[/LUN]]`, in the form of libiscsi, and secrets.

use std::fmt;
use std::str::FromStr;

use iscsi::scsi::Lun;
use percent_encoding::percent_decode_str;

/// Port of iSCSI registered with IANA (RFC 7143 14).
pub const DEFAULT_PORT: u16 = 3260;

/// A text that no log, error or debug output shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps `text` from being shown.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself: for the authentication only.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

/// Where a portal is: host name or address, and port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Portal {
    /// Host name, IPv4 address, or IPv6 address without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl Portal {
    /// Parses `HOST[:PORT]`, IPv6 addresses in brackets; as in URLs and in a target's TargetAddress (RFC 7143 13.8).
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        let (host, rest) = if let Some(inner) = text.strip_prefix('[') {
            inner.split_once(']').ok_or(UrlError::Bracket)?
        } else {
            // Two colons without brackets can only be an address whose end cannot be told from a port.
            if text.matches(':').count() > 1 {
                return Err(UrlError::BareIpv6);
            }
            text.split_at(text.find(':').unwrap_or(text.len()))
        };
        if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(UrlError::Host);
        }
        let port = match rest.strip_prefix(':') {
            Some(port) => port.parse().ok().filter(|&p| p != 0).ok_or(UrlError::Port)?,
            None if rest.is_empty() => DEFAULT_PORT,
            None => return Err(UrlError::Host),
        };
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for Portal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// A portal, perhaps with a target and a logical unit on it, and credentials.
///
/// `Display` and `Debug` leave the password out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// CHAP name.
    pub user: Option<String>,
    /// CHAP secret.
    pub password: Option<Secret>,
    /// Where to connect.
    pub portal: Portal,
    /// iSCSI name of the target.
    pub target: Option<String>,
    /// Logical unit of the target.
    pub lun: Option<Lun>,
}

/// Why a text is not an iSCSI URL. Never contains the text, which may hold a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// It does not begin with `iscsi://`.
    #[error("an iSCSI URL begins with iscsi:// (iscsi://[USER[%PASSWORD]@]HOST[:PORT]/TARGET-IQN/LUN)")]
    Scheme,
    /// The host is missing or impossible.
    #[error("the URL has no usable host")]
    Host,
    /// The port is not a number from 1 to 65535.
    #[error("the URL's port is not a number from 1 to 65535")]
    Port,
    /// An opening bracket without the closing one.
    #[error("the URL's host has an opening bracket without the closing one")]
    Bracket,
    /// An IPv6 address without brackets.
    #[error("an IPv6 address in a URL stands in brackets, as in iscsi://[::1]:3260/")]
    BareIpv6,
    /// The target name is missing or does not begin as the RFC asks.
    #[error("the URL's target is not an iSCSI name (iqn.YYYY-MM.DOMAIN:ID, eui.HEX or naa.HEX)")]
    Target,
    /// The LUN is not a number.
    #[error("the URL's LUN is not a number")]
    Lun,
    /// The target or the LUN is needed here and missing.
    #[error("the URL needs {0} (iscsi://HOST[:PORT]/TARGET-IQN/LUN)")]
    Missing(&'static str),
    /// User or password are not UTF-8 after decoding, or there is a password without a user.
    #[error("the URL's user and password cannot be decoded (percent-encode special characters)")]
    Credentials,
}

impl Url {
    /// Portal, target and unit: where it leads, whoever asks.
    pub fn without_secrets(&self) -> (&Portal, Option<&str>, Option<Lun>) {
        (&self.portal, self.target.as_deref(), self.lun)
    }

    /// The target name.
    ///
    /// # Errors
    /// The URL names none.
    pub fn require_target(&self) -> Result<&str, UrlError> {
        self.target.as_deref().ok_or(UrlError::Missing("a target"))
    }

    /// The logical unit.
    ///
    /// # Errors
    /// The URL names none.
    pub fn require_lun(&self) -> Result<Lun, UrlError> {
        self.lun.ok_or(UrlError::Missing("a LUN"))
    }
}

/// Whether `name` has the form of an iSCSI name (RFC 7143 4.2.7): type, no blanks, at most 223 bytes.
pub fn is_iscsi_name(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    ["iqn.", "eui.", "naa."].iter().any(|t| lower.starts_with(t) && lower.len() > t.len())
        && name.len() <= 223
        && !name.contains(|c: char| c.is_whitespace() || c.is_control() || c == '/')
}

impl FromStr for Url {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let rest = text.strip_prefix("iscsi://").ok_or(UrlError::Scheme)?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (credentials, portal) = match authority.rsplit_once('@') {
            Some((credentials, portal)) => (Some(credentials), portal),
            None => (None, authority),
        };
        let (user, password) = match credentials {
            Some(text) => credentials_of(text)?,
            None => (None, None),
        };
        let (target, lun) = match path.split_once('/') {
            Some((target, lun)) => {
                (target, Some(lun.strip_suffix('/').unwrap_or(lun)).filter(|l| !l.is_empty()))
            }
            None => (path, None),
        };
        let target = decode(target).ok_or(UrlError::Target)?;
        let target = if target.is_empty() { None } else { Some(target) };
        if target.as_deref().is_some_and(|t| !is_iscsi_name(t)) || (target.is_none() && lun.is_some()) {
            return Err(UrlError::Target);
        }
        Ok(Self {
            user,
            password,
            portal: Portal::parse(portal)?,
            target,
            lun: lun.map(|l| Lun::parse(l).ok_or(UrlError::Lun)).transpose()?,
        })
    }
}

/// `USER%PASSWORD` as libiscsi writes it: the first `%` that does not begin an escape (two hexadecimal digits) divides,
/// else the first that does. `USER:PASSWORD` works as well. Both parts are then decoded.
fn credentials_of(text: &str) -> Result<(Option<String>, Option<Secret>), UrlError> {
    let percents = text.match_indices('%').map(|(at, _)| at);
    let is_escape =
        |at: usize| text.as_bytes().get(at + 1..at + 3).is_some_and(|d| d.iter().all(u8::is_ascii_hexdigit));
    let colon = text.find(':');
    let divider = percents.clone().find(|&at| !is_escape(at)).or(colon).or_else(|| percents.clone().next());
    let (user, password) = match divider {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    };
    let user = decode(user).filter(|u| !u.is_empty()).ok_or(UrlError::Credentials)?;
    let password = password
        .map(|p| decode(p).filter(|p| !p.is_empty()).map(Secret).ok_or(UrlError::Credentials))
        .transpose()?;
    Ok((Some(user), password))
}

fn decode(text: &str) -> Option<String> {
    percent_decode_str(text).decode_utf8().ok().map(std::borrow::Cow::into_owned)
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "iscsi://{}", self.portal)?;
        if let Some(target) = &self.target {
            write!(f, "/{target}")?;
            if let Some(lun) = self.lun {
                write!(f, "/{lun}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Url {
        text.parse().unwrap()
    }

    #[test]
    fn plain() {
        let url = parse("iscsi://10.0.0.1/iqn.2026-01.org.example:disk/3");
        assert_eq!((url.portal.host.as_str(), url.portal.port), ("10.0.0.1", 3260));
        assert_eq!(url.require_target().unwrap(), "iqn.2026-01.org.example:disk");
        assert_eq!(url.require_lun().unwrap(), Lun::from_number(3));
        assert_eq!(url.to_string(), "iscsi://10.0.0.1:3260/iqn.2026-01.org.example:disk/3");
    }

    #[test]
    fn ipv6_and_port() {
        let url = parse("iscsi://[::1]:860/iqn.2026-01.org.example:disk/0x12c");
        assert_eq!((url.portal.host.as_str(), url.portal.port), ("::1", 860));
        assert_eq!(url.require_lun().unwrap(), Lun::from_number(300));
        assert_eq!(url.to_string(), "iscsi://[::1]:860/iqn.2026-01.org.example:disk/300");
    }

    #[test]
    fn portal_only() {
        let url = parse("iscsi://storage");
        assert_eq!(url.require_target(), Err(UrlError::Missing("a target")));
        assert_eq!(parse("iscsi://storage/").portal, url.portal);
        assert_eq!(parse("iscsi://storage/iqn.a:b").require_lun(), Err(UrlError::Missing("a LUN")));
    }

    #[test]
    fn credentials_in_the_forms_of_the_field() {
        for (text, user, password) in [
            ("alice", "alice", None),
            ("alice%secretsecret", "alice", Some("secretsecret")),
            ("alice:secret%40secret", "alice", Some("secret@secret")),
            ("alice%se%40cret", "alice", Some("se@cret")),
            // Here only an escape can divide: the password begins with two hexadecimal digits.
            ("alice%deadbeef0000", "alice", Some("deadbeef0000")),
            ("al%40ice%secretsecret", "al@ice", Some("secretsecret")),
        ] {
            let url = parse(&format!("iscsi://{text}@host/iqn.a:b/0"));
            assert_eq!(url.user.as_deref(), Some(user), "{text}");
            assert_eq!(url.password.as_ref().map(Secret::reveal), password, "{text}");
        }
    }

    #[test]
    fn secrets_do_not_show() {
        let url = parse("iscsi://alice%topsecrettop@host/iqn.a:b/0");
        assert!(!format!("{url} {url:?} {url:#?}").contains("topsecret"));
        let error = "iscsi://alice%topsecrettop@host:99999/".parse::<Url>().unwrap_err();
        assert!(!format!("{error} {error:?}").contains("topsecret"));
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (text, error) in [
            ("http://host/", UrlError::Scheme),
            ("iscsi:///iqn.a:b/0", UrlError::Host),
            ("iscsi://host:0/iqn.a:b/0", UrlError::Port),
            ("iscsi://host:x/iqn.a:b/0", UrlError::Port),
            ("iscsi://[::1/iqn.a:b/0", UrlError::Bracket),
            ("iscsi://::1/iqn.a:b/0", UrlError::BareIpv6),
            ("iscsi://[::1]x/iqn.a:b/0", UrlError::Host),
            ("iscsi://host/disk/0", UrlError::Target),
            ("iscsi://host/iqn./0", UrlError::Target),
            ("iscsi://host//0", UrlError::Target),
            ("iscsi://host/iqn.a:b/first", UrlError::Lun),
            ("iscsi://host/iqn.a:b/0/1", UrlError::Lun),
            ("iscsi://@host/", UrlError::Credentials),
            ("iscsi://%secret@host/", UrlError::Credentials),
            ("iscsi://u%ff%zz%ff@host/", UrlError::Credentials),
        ] {
            assert_eq!(text.parse::<Url>(), Err(error), "{text}");
        }
    }
}
