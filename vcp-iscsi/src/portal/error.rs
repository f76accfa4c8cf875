//! Why there is no session, in words that say what to do.

use std::io;
use std::time::Duration;

use super::probe::ProbeError;
use super::wire::WireError;

/// Why a session could not be opened, or what it was opened for could not be done.
#[derive(Debug, thiserror::Error)]
pub enum PortalError {
    /// The name of the portal has no address.
    #[error("cannot resolve portal {portal} (check the host name)")]
    Resolve {
        /// The portal.
        portal: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// No connection.
    #[error("cannot connect to portal {portal} (is the target running and the port right?)")]
    Connect {
        /// The portal.
        portal: String,
        /// What the system said.
        source: io::Error,
    },
    /// No connection in time.
    #[error("portal {portal} did not answer within {} ms (check address, port and firewall, or --connect-timeout-ms)", .timeout.as_millis())]
    ConnectTimeout {
        /// The portal.
        portal: String,
        /// The limit.
        timeout: Duration,
    },
    /// The login failed.
    #[error("login to {target} at {portal} failed: {why}")]
    Login {
        /// The portal.
        portal: String,
        /// The target, or "discovery".
        target: String,
        /// Reason and advice.
        why: String,
        /// Whether the same login may succeed later without a change of anything on this side.
        may_retry: bool,
        /// Whether the connection broke off or something else than a login came, in place of an answer.
        broken: bool,
        /// Whether the target knows no such authentication as was offered.
        wants_no_chap: bool,
    },
    /// The login did not end in time.
    #[error("login to {target} at {portal} did not end within {} ms (--login-timeout-ms)", .timeout.as_millis())]
    LoginTimeout {
        /// The portal.
        portal: String,
        /// The target, or "discovery".
        target: String,
        /// The limit.
        timeout: Duration,
    },
    /// The target sends from one portal to the next.
    #[error("portal {portal} redirects in circles")]
    Redirects {
        /// The portal of the URL.
        portal: String,
    },
    /// The session broke off.
    #[error("the session with {portal} broke off")]
    Wire {
        /// The portal.
        portal: String,
        /// Why.
        source: WireError,
    },
    /// An answer took too long.
    #[error("no answer from {portal} to {what} within {} ms", .timeout.as_millis())]
    Timeout {
        /// The portal.
        portal: String,
        /// What was asked.
        what: &'static str,
        /// The limit.
        timeout: Duration,
    },
    /// The target has no such logical unit.
    #[error("target {target} at {portal} has no LUN {lun} ({there})")]
    NoLun {
        /// The portal.
        portal: String,
        /// The target.
        target: String,
        /// The LUN asked for.
        lun: String,
        /// Which there are.
        there: String,
    },
    /// The unit cannot be used.
    #[error("LUN {lun} of {target} at {portal} cannot be used")]
    Probe {
        /// The portal.
        portal: String,
        /// The target.
        target: String,
        /// The LUN.
        lun: String,
        /// Why.
        source: Box<ProbeError>,
    },
    /// It is not the unit that it was before the connection was lost, or that the other paths lead to.
    #[error("LUN {lun} of {target} at {portal} is another unit: {why}; not touching it")]
    OtherUnit {
        /// The target.
        target: String,
        /// The LUN.
        lun: String,
        /// The portal.
        portal: String,
        /// Which unit is there, and which one should be.
        why: String,
    },
    /// The URL leaves something out.
    #[error(transparent)]
    Url(#[from] crate::url::UrlError),
    /// Discovery failed.
    #[error("discovery at {portal} failed: {why}")]
    Discovery {
        /// The portal.
        portal: String,
        /// Why.
        why: String,
    },
    /// The system refused something.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
}

impl PortalError {
    /// Whether trying again without a change on this side may help.
    pub fn may_retry(&self) -> bool {
        match self {
            Self::Login { may_retry, .. } => *may_retry,
            Self::Url(_) => false,
            _ => true,
        }
    }
}
