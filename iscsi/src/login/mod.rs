//! The login phase (RFC 7143 6.3, 11.12, 11.13) of both sides, as state machines without I/O: a login PDU in, a login
//! PDU out, until both sides know who the other is and how they will talk.
//!
//! [`initiator::Login`] and [`target::Login`] take each PDU as header and data segment, which a
//! [`crate::pdu::framing::Receiver`] delivers: without digests and with at most 8192 bytes of data (6.3). Time limits are
//! the caller's; the number of PDUs and the amount of text are limited here, so that no peer can keep a login going.

use std::fmt;

use crate::pdu::framing::{self, Digests};
use crate::pdu::{Bhs, Isid};
use crate::serial::Serial;

pub mod initiator;
pub mod target;

/// Most bytes of text in one login PDU: the default MaxRecvDataSegmentLength is in force during login (6.3).
pub const MAX_LOGIN_DATA_BYTES: usize = crate::params::DEFAULT_MAX_RECV_DATA_SEGMENT_BYTES as usize;
/// Most PDUs that either side takes in one login. A login with mutual CHAP takes four; the RFC wants six to be
/// possible.
pub const MAX_LOGIN_PDUS: u32 = 64;

/// A login PDU to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoginPdu {
    /// Its header.
    pub header: Bhs,
    /// Its data segment: text, which can hold CHAP responses but never a secret.
    pub data: Vec<u8>,
}

impl LoginPdu {
    /// Appends it to `out` as it goes on the wire.
    pub fn write(&self, out: &mut Vec<u8>) {
        framing::append_pdu(out, &self.header, &self.data, Digests::default());
    }
}

/// Status-Class and Status-Detail of a Login Response (11.13.5).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LoginStatus {
    /// 0 success, 1 redirection, 2 initiator error, 3 target error.
    pub class: u8,
    /// What exactly.
    pub detail: u8,
}

macro_rules! statuses {
    ($($(#[$meta:meta])* $name:ident = $class:literal, $detail:literal, $words:literal;)*) => {
        impl LoginStatus {
            $($(#[$meta])* #[doc = $words] pub const $name: Self = Self { class: $class, detail: $detail };)*

            /// What the target says with it, in words.
            #[must_use]
            pub const fn words(self) -> &'static str {
                match (self.class, self.detail) {
                    $(($class, $detail) => $words,)*
                    (0, _) => "success",
                    (1, _) => "the target has moved",
                    (2, _) => "initiator error, with a detail that RFC 7143 does not define",
                    (3, _) => "target error, with a detail that RFC 7143 does not define",
                    _ => "a status that RFC 7143 does not define",
                }
            }
        }
    };
}

statuses! {
    SUCCESS = 0, 0, "login is proceeding";
    MOVED_TEMPORARILY = 1, 1, "the target has temporarily moved to another address";
    MOVED_PERMANENTLY = 1, 2, "the target has permanently moved to another address";
    INITIATOR_ERROR = 2, 0, "miscellaneous initiator error";
    AUTHENTICATION_FAILURE = 2, 1, "authentication failed: wrong name or secret, or target authentication is not supported";
    AUTHORIZATION_FAILURE = 2, 2, "this initiator is not allowed access to the target";
    NOT_FOUND = 2, 3, "there is no target of this name at this address";
    TARGET_REMOVED = 2, 4, "the target has been removed, without a forwarding address";
    UNSUPPORTED_VERSION = 2, 5, "the target does not support this protocol version";
    TOO_MANY_CONNECTIONS = 2, 6, "too many connections in this session";
    MISSING_PARAMETER = 2, 7, "a parameter is missing (initiator or target name)";
    CANNOT_INCLUDE = 2, 8, "the session cannot span to this address";
    SESSION_TYPE_UNSUPPORTED = 2, 9, "the target does not support this type of session";
    NO_SESSION = 2, 10, "there is no such session to add a connection to";
    INVALID_DURING_LOGIN = 2, 11, "invalid request during login";
    TARGET_ERROR = 3, 0, "target hardware or software error";
    SERVICE_UNAVAILABLE = 3, 1, "the service or target is not operational now";
    OUT_OF_RESOURCES = 3, 2, "the target is out of resources";
}

impl LoginStatus {
    /// Whether the same login may succeed later (class 3).
    #[must_use]
    pub const fn may_retry(self) -> bool {
        self.class == 3
    }
}

impl fmt::Display for LoginStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (status {:02x}{:02x})", self.words(), self.class, self.detail)
    }
}

impl fmt::Debug for LoginStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LoginStatus({:02x}{:02x})", self.class, self.detail)
    }
}

/// Names of a session and where its counters are when the full-feature phase begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nexus {
    /// The initiator's part of the session's name.
    pub isid: Isid,
    /// The target's handle for the session.
    pub tsih: u16,
    /// The connection in the session.
    pub cid: u16,
    /// CmdSN of the first non-immediate command: that of the login requests (11.12.8).
    pub cmd_sn: Serial,
    /// The last CmdSN that the target has room for.
    pub max_cmd_sn: Serial,
    /// StatSN of the first response in the full-feature phase: one after that of the last Login Response.
    pub stat_sn: Serial,
}

#[cfg(test)]
mod tests;
