//! SendTargets (RFC 7143 appendix C): how an initiator learns which targets there are, over Text PDUs.
//!
//! [`Query`] is the initiator's side, [`Answer`] the target's; both leave the counters of the PDUs to the session that
//! sends them.

use std::fmt;

use thiserror::Error;

use crate::pdu::{TextRequest, TextResponse, Ttt};
use crate::scsi::lun::Lun;
use crate::text::{self, Assembler, Outgoing, TextError};

/// The port of iSCSI where none is said.
pub const DEFAULT_PORT: u16 = 3260;
/// Most text that a query collects: some thousand targets.
pub const MAX_LIST_BYTES: usize = 1024 * 1024;
/// Most pairs of which a list consists.
const MAX_LIST_PAIRS: usize = 16 * 1024;
const KEY: &str = "SendTargets";

/// Where a target can be reached (13.8): `host[:port][,tag]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TargetAddress {
    /// Host name, IPv4 address or IPv6 address (without brackets).
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Target portal group tag; left out in redirections.
    pub portal_group_tag: Option<u16>,
}

impl TargetAddress {
    /// Reads the key's value.
    #[must_use]
    pub fn parse(value: &str) -> Option<Self> {
        let number = |digits: &str| text::parse_number_in(digits, &(0..=0xFFFF)).map(|number| number as u16);
        let (address, portal_group_tag) = match value.rsplit_once(',') {
            Some((address, tag)) => (address, Some(number(tag)?)),
            None => (value, None),
        };
        let (host, port) = if let Some(rest) = address.strip_prefix('[') {
            let (host, port) = rest.split_once(']')?;
            // A zone may follow the address.
            host.split('%').next()?.parse::<std::net::Ipv6Addr>().ok()?;
            (host, if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
        } else {
            match address.split_once(':') {
                // Without brackets only in the wild: an IPv6 address has more than one colon.
                Some((_, port)) if port.contains(':') => {
                    address.parse::<std::net::Ipv6Addr>().ok()?;
                    (address, None)
                }
                Some((host, port)) => (host, Some(port)),
                None => (address, None),
            }
        };
        let port = match port {
            Some(port) => number(port).filter(|&port| port != 0)?,
            None => DEFAULT_PORT,
        };
        let plain = |b: u8| b.is_ascii_alphanumeric() || b".-_:%".contains(&b);
        let fits = !host.is_empty() && host.len() <= 255 && host.bytes().all(plain);
        fits.then(|| Self { host: host.to_owned(), port, portal_group_tag })
    }
}

impl fmt::Display for TargetAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)?;
        } else {
            write!(f, "{}:{}", self.host, self.port)?;
        }
        match self.portal_group_tag {
            Some(tag) => write!(f, ",{tag}"),
            None => Ok(()),
        }
    }
}

/// A target and where it can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundTarget {
    /// Its name.
    pub name: String,
    /// Its portals; none means: the address at which one asked (appendix C).
    pub addresses: Vec<TargetAddress>,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted<'a> {
    /// All targets; in discovery sessions only.
    All,
    /// The target of this name.
    Named(&'a str),
    /// The target of the session; in normal sessions only.
    Current,
}

impl<'a> Wanted<'a> {
    /// The key's value.
    #[must_use]
    pub const fn value(self) -> &'a str {
        match self {
            Self::All => "All",
            Self::Named(name) => name,
            Self::Current => "",
        }
    }

    /// Reads the key's value.
    #[must_use]
    pub fn parse(value: &'a str) -> Option<Self> {
        match value {
            "All" => Some(Self::All),
            "" => Some(Self::Current),
            name => text::is_iscsi_name(name).then_some(Self::Named(name)),
        }
    }
}

/// Why a list of targets cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DiscoveryError {
    /// A text that cannot be read.
    #[error("bad text in a list of targets")]
    Text(#[from] TextError),
    /// The peer refuses to tell.
    #[error("target answers SendTargets={0}")]
    Refused(String),
    /// A key that has no place in a list of targets.
    #[error("unexpected key `{0}` in a list of targets")]
    UnexpectedKey(String),
    /// A name that is none.
    #[error("`{}` in a list of targets is not an iSCSI name", .0.escape_debug())]
    BadName(String),
    /// An address that is none.
    #[error("`{}` in a list of targets is not an address", .0.escape_debug())]
    BadAddress(String),
    /// The peer breaks the rules of text exchange.
    #[error("target breaks the text protocol: {0}")]
    Protocol(&'static str),
}

/// Reads a list of targets.
///
/// # Errors
/// The text is not such a list.
pub fn parse_list(text: &[u8]) -> Result<Vec<FoundTarget>, DiscoveryError> {
    let mut targets: Vec<FoundTarget> = Vec::new();
    let shorten = |value: &str| value.chars().take(64).collect::<String>();
    for (key, value) in text::parse_up_to(text, MAX_LIST_PAIRS)? {
        match (key, targets.last_mut()) {
            ("TargetName", _) if text::is_iscsi_name(value) => {
                targets.push(FoundTarget { name: value.to_owned(), addresses: Vec::new() });
            }
            ("TargetName", _) => return Err(DiscoveryError::BadName(shorten(value))),
            ("TargetAddress", Some(target)) => {
                let address = TargetAddress::parse(value);
                target.addresses.push(address.ok_or_else(|| DiscoveryError::BadAddress(shorten(value)))?);
            }
            // For people; not asked for, and no harm.
            ("TargetAlias", Some(_)) => {}
            (KEY, _) => return Err(DiscoveryError::Refused(shorten(value))),
            _ => return Err(DiscoveryError::UnexpectedKey(shorten(key))),
        }
    }
    Ok(targets)
}

/// Writes a list of targets.
pub fn write_list<'a>(targets: impl IntoIterator<Item = &'a FoundTarget>, out: &mut Outgoing) {
    for target in targets {
        out.push("TargetName", &target.name);
        for address in &target.addresses {
            out.push("TargetAddress", &address.to_string());
        }
    }
}

/// The part of a Text Request that a query decides; tags of the task and counters are the session's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueryPdu {
    /// F.
    pub final_bit: bool,
    /// C.
    pub continues: bool,
    /// LUN, copied from the last response.
    pub lun: Lun,
    /// Target transfer tag, copied from the last response.
    pub ttt: Ttt,
    /// Text.
    pub data: Vec<u8>,
}

/// What a response leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueryProgress {
    /// Ask on.
    Send(QueryPdu),
    /// The whole list.
    Done(Vec<FoundTarget>),
}

/// An initiator's SendTargets under way.
#[derive(Clone, Debug)]
pub struct Query {
    assembler: Assembler,
}

impl Query {
    /// The first request.
    #[must_use]
    pub fn start(wanted: Wanted<'_>) -> (Self, QueryPdu) {
        let mut out = Outgoing::new();
        out.push(KEY, wanted.value());
        let (data, continues) = out.next_segment(usize::MAX);
        let query = Self { assembler: Assembler::new(MAX_LIST_BYTES) };
        (query, QueryPdu { final_bit: true, continues, lun: Lun::ZERO, ttt: Ttt::NONE, data })
    }

    /// Takes a response. It ends after [`MAX_LIST_BYTES`] at the latest: every response but the last brings text.
    ///
    /// # Errors
    /// The answer is not a list of targets.
    pub fn receive(&mut self, response: &TextResponse, data: &[u8]) -> Result<QueryProgress, DiscoveryError> {
        if !response.final_bit && data.is_empty() {
            return Err(DiscoveryError::Protocol("an empty response that is not final"));
        }
        // A list may come with or without C bits; only F ends it (11.11.1).
        let done = self.assembler.push(data, !response.final_bit)?;
        match (done, response.ttt) {
            (Some(text), _) => parse_list(text).map(QueryProgress::Done),
            (None, Ttt::NONE) => Err(DiscoveryError::Protocol("a response that is not final has no tag")),
            (None, ttt) => Ok(QueryProgress::Send(QueryPdu {
                // 6.2: an unfinished text is answered by an empty PDU, and F stays set: we have no more to say.
                final_bit: true,
                continues: false,
                lun: response.lun,
                ttt,
                data: Vec::new(),
            })),
        }
    }
}

/// The part of a Text Response that an answer decides; counters are the session's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerPdu {
    /// F.
    pub final_bit: bool,
    /// C.
    pub continues: bool,
    /// The tag to be given back, unless final.
    pub ttt: Ttt,
    /// Text.
    pub data: Vec<u8>,
}

/// A target's side of text exchanges: SendTargets, over as many PDUs as it takes. One per connection; a request
/// without a tag starts a new exchange (11.10.4).
#[derive(Clone, Debug, Default)]
pub struct Answer {
    assembler: Assembler,
    out: Outgoing,
    ttt: Option<Ttt>,
    next_ttt: u32,
}

impl Answer {
    /// No exchange under way.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a request and makes its response with at most `limit_bytes` of text (the initiator's
    /// MaxRecvDataSegmentLength). `list` says which targets to tell of, or `None` if it refuses what is
    /// wanted. Keys other than SendTargets are answered with NotUnderstood, or Reject where RFC 7143 defines them.
    ///
    /// # Errors
    /// The request breaks the rules; it is to be rejected with "protocol error", and the exchange is over.
    pub fn receive(
        &mut self,
        request: &TextRequest,
        data: &[u8],
        limit_bytes: u32,
        list: impl FnMut(Wanted<'_>) -> Option<Vec<FoundTarget>>,
    ) -> Result<AnswerPdu, DiscoveryError> {
        let result = self.take(request, data, limit_bytes, list);
        if result.is_err() {
            self.reset();
        }
        result
    }

    /// Forgets the exchange under way.
    pub fn reset(&mut self) {
        *self = Self { next_ttt: self.next_ttt, ..Self::default() };
    }

    fn take(
        &mut self,
        request: &TextRequest,
        data: &[u8],
        limit_bytes: u32,
        mut list: impl FnMut(Wanted<'_>) -> Option<Vec<FoundTarget>>,
    ) -> Result<AnswerPdu, DiscoveryError> {
        if request.ttt.is_none() {
            self.reset();
        } else if self.ttt != Some(request.ttt) {
            return Err(DiscoveryError::Protocol("a request with a tag that is not ours"));
        }
        if !self.out.is_empty() && !data.is_empty() {
            return Err(DiscoveryError::Protocol("a request with text while ours is unfinished"));
        }
        if let Some(text) = self.assembler.push(data, request.continues)? {
            for (key, value) in text::parse(text)? {
                if key != KEY {
                    let known = crate::params::is_operational(key);
                    self.out.push(key, if known { text::REJECT } else { text::NOT_UNDERSTOOD });
                    continue;
                }
                match Wanted::parse(value).and_then(&mut list) {
                    Some(targets) => write_list(&targets, &mut self.out),
                    None => self.out.push(KEY, text::REJECT),
                }
            }
        }
        let (data, continues) = self.out.next_segment(limit_bytes as usize);
        let final_bit = request.final_bit && !continues;
        self.ttt = (!final_bit).then(|| {
            self.next_ttt = if self.next_ttt >= Ttt::NONE.0 - 1 { 1 } else { self.next_ttt + 1 };
            Ttt(self.next_ttt)
        });
        Ok(AnswerPdu { final_bit, continues, ttt: self.ttt.unwrap_or(Ttt::NONE), data })
    }
}

#[cfg(test)]
mod tests;
