//! What an initiator's login is made with, and how it can end.

use thiserror::Error;

use crate::chap::{Account, Algorithm, ChapError, Entropy};
use crate::discovery::TargetAddress;
use crate::login::{LoginPdu, LoginStatus, MAX_LOGIN_PDUS, Nexus};
use crate::params::{Negotiated, ParamError, Params};
use crate::pdu::{Isid, Itt, PduError, RejectReason};
use crate::serial::Serial;
use crate::text::TextError;

/// How this side proves who it is, and what proof it wants.
#[derive(Clone, Debug, Default)]
pub enum Auth {
    /// Neither side proves anything.
    #[default]
    None,
    /// CHAP; a target that lets us in without is refused.
    Chap(Chap),
}

/// CHAP as an initiator uses it.
#[derive(Clone, Debug)]
pub struct Chap {
    /// Our name and secret.
    pub account: Account,
    /// The target's name and secret, if it has to prove itself (mutual CHAP).
    pub target: Option<Account>,
    /// Algorithms offered, in order. Has to include MD5 (12.1.3). [`Algorithm::DEFAULT_OFFER`] is right for almost all.
    pub algorithms: Vec<Algorithm>,
    /// Random bytes for the challenge to the target, fresh for each login.
    pub entropy: Entropy,
}

/// What a login is made with.
#[derive(Clone, Debug)]
pub struct Config {
    /// InitiatorName.
    pub initiator_name: String,
    /// InitiatorAlias, for people.
    pub initiator_alias: Option<String>,
    /// TargetName; without one it is a discovery session.
    pub target_name: Option<String>,
    /// Our part of the session's name. Keep it when logging in again: that reinstates the session (6.3.5).
    pub isid: Isid,
    /// 0 for a new or reinstated session, else the session to add a connection to.
    pub tsih: u16,
    /// The connection in the session.
    pub cid: u16,
    /// The tag of the login.
    pub itt: Itt,
    /// The first CmdSN of the session.
    pub cmd_sn: Serial,
    /// Authentication.
    pub auth: Auth,
    /// What to offer.
    pub params: Params,
    /// The portal group that must answer: it is part of what names the session that is to be reinstated.
    pub portal_group_tag: Option<u16>,
}

impl Config {
    /// A new session without authentication, for discovery unless a target is named.
    #[must_use]
    pub fn new(initiator_name: impl Into<String>, isid: Isid) -> Self {
        Self {
            initiator_name: initiator_name.into(),
            initiator_alias: None,
            target_name: None,
            isid,
            tsih: 0,
            cid: 0,
            itt: Itt(0),
            cmd_sn: Serial(1),
            auth: Auth::None,
            params: Params::default(),
            portal_group_tag: None,
        }
    }
}

/// The end of a login that went well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedIn {
    /// What was agreed on.
    pub negotiated: Negotiated,
    /// The session, and where its counters are.
    pub nexus: Nexus,
    /// TargetPortalGroupTag; targets leave it out in discovery sessions.
    pub portal_group_tag: Option<u16>,
    /// TargetAlias, for people.
    pub target_alias: Option<String>,
    /// The CHAP algorithm in use, if we had to prove who we are.
    pub chap_algorithm: Option<Algorithm>,
}

/// The end of a login that goes on elsewhere (class 1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Whether the old address should be forgotten.
    pub permanently: bool,
    /// Where to log in, at least one. Who follows must bound the number of moves.
    pub addresses: Vec<TargetAddress>,
}

/// What a response leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Send this and wait for the next response.
    Send(LoginPdu),
    /// The full-feature phase has begun.
    Done(Box<LoggedIn>),
    /// Close the connection and log in elsewhere.
    Moved(Moved),
}

/// Why a login failed. The connection is to be closed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LoginError {
    /// The configuration cannot be used.
    #[error("{what} `{}` is not an iSCSI name", .name.escape_debug())]
    BadName {
        /// Which name.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// An alias with a zero byte or of more than 255 bytes.
    #[error("initiator alias is longer than 255 bytes or contains a zero byte")]
    BadAlias,
    /// The target says no.
    #[error("target refuses the login: {0}")]
    Refused(LoginStatus),
    /// The target rejects a login request.
    #[error("target rejects the login request: {0}")]
    Rejected(RejectReason),
    /// A PDU that cannot be.
    #[error("bad PDU during login")]
    Pdu(#[from] PduError),
    /// A text that cannot be read.
    #[error("bad text in a login response")]
    Text(#[from] TextError),
    /// A key that breaks the rules.
    #[error("parameter negotiation failed")]
    Param(#[from] ParamError),
    /// Authentication failed on our side of it.
    #[error("CHAP authentication failed")]
    Chap(#[from] ChapError),
    /// The target lets us in without the authentication that was asked for.
    #[error("target skips the authentication that this side requires")]
    AuthenticationSkipped,
    /// The target wants another way to authenticate than we offered.
    #[error("target answers AuthMethod={}, where {offered} was offered", .answer.escape_debug())]
    AuthMethod {
        /// What we offered.
        offered: &'static str,
        /// Its answer.
        answer: String,
    },
    /// Another portal group than expected.
    #[error("portal group {got} answers, where {expected} was expected")]
    PortalGroup {
        /// The tag in the response.
        got: u16,
        /// The tag in the configuration.
        expected: u16,
    },
    /// The target breaks the rules of the login phase.
    #[error("target breaks the login protocol: {0}")]
    Protocol(&'static str),
    /// The target keeps the login going.
    #[error("login does not end after {MAX_LOGIN_PDUS} responses")]
    Endless,
    /// Something is called after the end of the login.
    #[error("the login has already ended")]
    Ended,
}
