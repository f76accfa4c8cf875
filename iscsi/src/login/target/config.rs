//! What a target's login is made with, and how it can end.

use thiserror::Error;

use crate::chap::{Account, Algorithm, ChapError};
use crate::discovery::TargetAddress;
use crate::login::{LoginPdu, LoginStatus, MAX_LOGIN_PDUS, Nexus};
use crate::params::{Negotiated, ParamError, Params, SessionType};
use crate::pdu::{Isid, PduError};
use crate::text::TextError;

/// What proof a target wants of an initiator.
#[derive(Clone, Debug, Default)]
pub enum Auth {
    /// None.
    #[default]
    None,
    /// CHAP.
    Chap(Chap),
}

/// CHAP as a target uses it.
#[derive(Clone, Debug)]
pub struct Chap {
    /// Those who may log in.
    pub accounts: Vec<Account>,
    /// Our own name and secret, for initiators that want proof of us (mutual CHAP).
    pub own: Option<Account>,
    /// Algorithms allowed; the initiator's order decides.
    pub algorithms: Vec<Algorithm>,
}

impl Chap {
    /// With all algorithms.
    ///
    /// # Errors
    /// Our own secret is also one of the accounts' (9.2.1).
    pub fn new(accounts: Vec<Account>, own: Option<Account>) -> Result<Self, ChapError> {
        if let Some(own) = &own
            && accounts.iter().any(|account| account.secret() == own.secret())
        {
            return Err(ChapError::EqualSecrets);
        }
        Ok(Self { accounts, own, algorithms: Algorithm::STRONGEST_FIRST.to_vec() })
    }
}

/// A target that can be logged in to.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    /// TargetName.
    pub name: String,
    /// TargetAlias, for people.
    pub alias: Option<String>,
    /// Authentication.
    pub auth: Auth,
    /// Names of the initiators that may log in; `None` for all.
    pub initiators: Option<Vec<String>>,
    /// Where the target has moved, permanently or not.
    pub moved: Option<(bool, Vec<TargetAddress>)>,
}

impl TargetConfig {
    /// Open to everyone.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), alias: None, auth: Auth::None, initiators: None, moved: None }
    }
}

/// What the logins of a portal are made with.
#[derive(Clone, Debug)]
pub struct Config {
    /// The targets behind the portal.
    pub targets: Vec<TargetConfig>,
    /// The portal's group.
    pub portal_group_tag: u16,
    /// Authentication for discovery sessions.
    pub discovery_auth: Auth,
    /// What to grant.
    pub params: Params,
    /// Commands that a session takes at once: the size of the CmdSN window announced, at least 1.
    pub command_window: u32,
}

/// Who wants in, for the caller to look at its sessions (6.3.1).
///
/// With `tsih` 0: a session of the same initiator, ISID and target is reinstated, which ends the old one with all its
/// tasks (6.3.5); else it is new. Otherwise a connection is added to the session of that handle, or takes the
/// place of the one with the same CID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Normal or discovery.
    pub session_type: SessionType,
    /// InitiatorName.
    pub initiator_name: String,
    /// Which of [`Config::targets`]; none in discovery sessions.
    pub target: Option<usize>,
    /// The initiator's part of the session's name.
    pub isid: Isid,
    /// The session, or 0.
    pub tsih: u16,
    /// The connection in the session.
    pub cid: u16,
}

/// The caller's word on a [`Claim`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Let in, to the session of this handle. A session that is reinstated is gone by now.
    Accept {
        /// The handle, not 0.
        tsih: u16,
    },
    /// Keep out: [`LoginStatus::NO_SESSION`], [`LoginStatus::TOO_MANY_CONNECTIONS`], [`LoginStatus::OUT_OF_RESOURCES`]...
    Refuse(LoginStatus),
}

/// The end of a login that went well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedIn {
    /// Who logged in, and to what. Its `tsih` is the initiator's; `nexus` has the session's.
    pub claim: Claim,
    /// InitiatorAlias, for people.
    pub initiator_alias: Option<String>,
    /// The CHAP name that was proved.
    pub chap_name: Option<String>,
    /// What was agreed on.
    pub negotiated: Negotiated,
    /// The session, and where its counters are.
    pub nexus: Nexus,
}

/// What a request leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Send this and wait for the next request.
    Send(LoginPdu),
    /// Look at the sessions and call [`Login::decide`](super::Login::decide).
    Decide(Claim),
    /// Send this; the full-feature phase begins behind it.
    Done(LoginPdu, Box<LoggedIn>),
    /// Send this and close the connection.
    Failed(LoginPdu, LoginError),
}

/// Why a login failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LoginError {
    /// A PDU that cannot be, or is no Login Request.
    #[error("bad PDU during login")]
    Pdu(#[from] PduError),
    /// A text that cannot be read.
    #[error("bad text in a login request")]
    Text(#[from] TextError),
    /// A key that breaks the rules.
    #[error("parameter negotiation failed")]
    Param(#[from] ParamError),
    /// Authentication failed.
    #[error("CHAP authentication failed")]
    Chap(#[from] ChapError),
    /// A name without an account.
    #[error("there is no CHAP account `{}`", .0.escape_debug())]
    UnknownAccount(String),
    /// The initiator does without the authentication that the target wants, or offers no method that we know.
    #[error("initiator does not offer the authentication that is required")]
    AuthenticationRequired,
    /// The initiator wants proof of who we are, and there is no account of ours.
    #[error("initiator asks for mutual CHAP, for which this target has no name and secret")]
    MutualUnsupported,
    /// There is no such target.
    #[error("there is no target `{}`", .0.escape_debug())]
    NoTarget(String),
    /// The initiator may not log in to this target.
    #[error("initiator `{}` is not allowed here", .0.escape_debug())]
    NotAllowed(String),
    /// The target is elsewhere.
    #[error("the target has moved")]
    Moved {
        /// Whether for good.
        permanently: bool,
    },
    /// A name is missing.
    #[error("initiator did not send {0}")]
    Missing(&'static str),
    /// A name that is none, or another value that cannot be.
    #[error("initiator sent {key}={}, which is not a possible value", .value.escape_debug())]
    BadValue {
        /// The key.
        key: &'static str,
        /// The value, shortened.
        value: String,
    },
    /// No common version.
    #[error("initiator wants protocol version {min} to {max}, where only 0 is supported")]
    Version {
        /// Version-min.
        min: u8,
        /// Version-max.
        max: u8,
    },
    /// The caller refused.
    #[error("login refused: {0}")]
    Refused(LoginStatus),
    /// The initiator breaks the rules of the login phase.
    #[error("initiator breaks the login protocol: {0}")]
    Protocol(&'static str),
    /// The initiator keeps the login going.
    #[error("login does not end after {MAX_LOGIN_PDUS} requests")]
    Endless,
}

impl LoginError {
    /// The status that tells the initiator.
    #[must_use]
    pub const fn status(&self) -> LoginStatus {
        match self {
            Self::Pdu(PduError::UnknownOpcode(_) | PduError::UnexpectedOpcode { .. }) => {
                LoginStatus::INVALID_DURING_LOGIN
            }
            Self::Pdu(PduError::Format { .. })
            | Self::Text(_)
            | Self::Param(_)
            | Self::BadValue { .. }
            | Self::Protocol(_)
            | Self::Endless => LoginStatus::INITIATOR_ERROR,
            Self::Chap(_)
            | Self::UnknownAccount(_)
            | Self::AuthenticationRequired
            | Self::MutualUnsupported => LoginStatus::AUTHENTICATION_FAILURE,
            Self::NoTarget(_) => LoginStatus::NOT_FOUND,
            Self::NotAllowed(_) => LoginStatus::AUTHORIZATION_FAILURE,
            Self::Moved { permanently: true } => LoginStatus::MOVED_PERMANENTLY,
            Self::Moved { permanently: false } => LoginStatus::MOVED_TEMPORARILY,
            Self::Missing(_) => LoginStatus::MISSING_PARAMETER,
            Self::Version { .. } => LoginStatus::UNSUPPORTED_VERSION,
            Self::Refused(status) => *status,
        }
    }
}
