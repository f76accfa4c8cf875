//! The PDUs of iSCSI (RFC 7143 chapter 11): one small `Copy` struct for each opcode, which decodes from a
//! [`Bhs`] and encodes to one in constant time without allocation.
//!
//! A struct holds the header's fields; the data segment's length is one of them (`data_len_bytes`), its bytes are
//! not: [`framing`] receives and sends them without a copy. Additional header segments are in [`ahs`].
//!
//! Reserved bits are sent as zero and ignored when received (11, "Reserved fields"). Codes that a later document or a
//! vendor may define (reasons, functions, events) decode to an `Other` variant and encode back unchanged, since the
//! RFC has an answer for each of them that is not "format error". What *is* a format error (7.7) is refused by
//! `decode` with a [`PduError`] that names the field.
//!
//! Sequencing, windows, tags and limits belong to the machines ([`crate::initiator`], [`crate::target`]), text in
//! data segments to [`crate::text`].
//!
//! ```
//! use iscsi::pdu::{Itt, NopOut, Pdu, Ttt};
//! use iscsi::scsi::lun::Lun;
//! use iscsi::serial::Serial;
//!
//! let ping = NopOut {
//!     immediate: false,
//!     data_len_bytes: 0,
//!     lun: Lun::ZERO,
//!     itt: Itt(7),
//!     ttt: Ttt::NONE,
//!     cmd_sn: Serial(1),
//!     exp_stat_sn: Serial(9),
//! };
//! let header = ping.encode();
//! assert_eq!(NopOut::decode(&header), Ok(ping));
//! ```

use thiserror::Error;

use crate::serial::Serial;

pub mod ahs;
pub mod bhs;
mod data;
mod event;
pub mod framing;
mod login;
mod logout;
mod nop;
mod reject;
mod scsi;
mod snack;
mod task;
mod text;

pub use bhs::{BHS_BYTES, Bhs, MAX_DATA_SEGMENT_BYTES};
pub use data::{DataIn, DataInStatus, DataOut, R2t};
pub use event::{AsyncEvent, AsyncMessage};
pub use login::{Isid, LoginRequest, LoginResponse, Stage};
pub use logout::{LogoutReason, LogoutRequest, LogoutResponse, LogoutResponseCode};
pub use nop::{NopIn, NopOut};
pub use reject::{Reject, RejectReason};
pub use scsi::{Residual, ScsiCommand, ScsiResponse, ScsiResponseCode, TaskAttribute};
pub use snack::{Snack, SnackType};
pub use task::{TaskFunction, TaskManagementRequest, TaskManagementResponse, TaskResponseCode};
pub use text::{TextRequest, TextResponse};

/// The opcodes of RFC 7143 11.2.1.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Opcode {
    /// NOP-Out: ping, or the answer to the target's.
    NopOut = 0x00,
    /// SCSI Command.
    ScsiCommand = 0x01,
    /// SCSI Task Management Function Request.
    TaskManagementRequest = 0x02,
    /// Login Request.
    LoginRequest = 0x03,
    /// Text Request.
    TextRequest = 0x04,
    /// SCSI Data-Out.
    DataOut = 0x05,
    /// Logout Request.
    LogoutRequest = 0x06,
    /// SNACK Request.
    Snack = 0x10,
    /// NOP-In: ping, or the answer to the initiator's.
    NopIn = 0x20,
    /// SCSI Response.
    ScsiResponse = 0x21,
    /// SCSI Task Management Function Response.
    TaskManagementResponse = 0x22,
    /// Login Response.
    LoginResponse = 0x23,
    /// Text Response.
    TextResponse = 0x24,
    /// SCSI Data-In.
    DataIn = 0x25,
    /// Logout Response.
    LogoutResponse = 0x26,
    /// Ready To Transfer.
    R2t = 0x31,
    /// Asynchronous Message.
    AsyncMessage = 0x32,
    /// Reject.
    Reject = 0x3F,
}

impl Opcode {
    /// All of them.
    pub const ALL: [Self; 18] = [
        Self::NopOut,
        Self::ScsiCommand,
        Self::TaskManagementRequest,
        Self::LoginRequest,
        Self::TextRequest,
        Self::DataOut,
        Self::LogoutRequest,
        Self::Snack,
        Self::NopIn,
        Self::ScsiResponse,
        Self::TaskManagementResponse,
        Self::LoginResponse,
        Self::TextResponse,
        Self::DataIn,
        Self::LogoutResponse,
        Self::R2t,
        Self::AsyncMessage,
        Self::Reject,
    ];

    /// The opcode with these six bits; `None` for vendor-specific and reserved ones.
    #[inline]
    #[must_use]
    pub const fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits {
            0x00 => Self::NopOut,
            0x01 => Self::ScsiCommand,
            0x02 => Self::TaskManagementRequest,
            0x03 => Self::LoginRequest,
            0x04 => Self::TextRequest,
            0x05 => Self::DataOut,
            0x06 => Self::LogoutRequest,
            0x10 => Self::Snack,
            0x20 => Self::NopIn,
            0x21 => Self::ScsiResponse,
            0x22 => Self::TaskManagementResponse,
            0x23 => Self::LoginResponse,
            0x24 => Self::TextResponse,
            0x25 => Self::DataIn,
            0x26 => Self::LogoutResponse,
            0x31 => Self::R2t,
            0x32 => Self::AsyncMessage,
            0x3F => Self::Reject,
            _ => return None,
        })
    }

    /// Whether initiators send it.
    #[inline]
    #[must_use]
    pub const fn is_from_initiator(self) -> bool {
        (self as u8) < 0x20
    }

    /// Its name in the RFC.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NopOut => "NOP-Out",
            Self::ScsiCommand => "SCSI Command",
            Self::TaskManagementRequest => "Task Management Function Request",
            Self::LoginRequest => "Login Request",
            Self::TextRequest => "Text Request",
            Self::DataOut => "SCSI Data-Out",
            Self::LogoutRequest => "Logout Request",
            Self::Snack => "SNACK Request",
            Self::NopIn => "NOP-In",
            Self::ScsiResponse => "SCSI Response",
            Self::TaskManagementResponse => "Task Management Function Response",
            Self::LoginResponse => "Login Response",
            Self::TextResponse => "Text Response",
            Self::DataIn => "SCSI Data-In",
            Self::LogoutResponse => "Logout Response",
            Self::R2t => "Ready To Transfer",
            Self::AsyncMessage => "Asynchronous Message",
            Self::Reject => "Reject",
        }
    }
}

impl std::fmt::Display for Opcode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// An initiator task tag (11.2.1.8): the initiator's name for a task, unique in the session while the task lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Itt(pub u32);

impl Itt {
    /// "No tag"; never given to a task.
    pub const NONE: Self = Self(0xFFFF_FFFF);

    /// Whether this is [`NONE`](Self::NONE).
    #[inline]
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.0 == Self::NONE.0
    }
}

/// A target transfer tag: the target's name for a data sequence, a ping or a text negotiation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ttt(pub u32);

impl Ttt {
    /// "No tag".
    pub const NONE: Self = Self(0xFFFF_FFFF);

    /// Whether this is [`NONE`](Self::NONE).
    #[inline]
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.0 == Self::NONE.0
    }
}

/// Why a header is not a PDU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PduError {
    /// The opcode is reserved or vendor-specific.
    #[error("unknown opcode {0:#04x}")]
    UnknownOpcode(u8),
    /// A PDU of another kind, or of the other direction, than the caller can take.
    #[error("opcode {got:#04x} where {expected} was expected")]
    UnexpectedOpcode {
        /// The opcode's bits.
        got: u8,
        /// What was expected.
        expected: &'static str,
    },
    /// A field has a value that the RFC forbids (a format error, 7.7).
    #[error("format error in {pdu}: {what}")]
    Format {
        /// The PDU.
        pdu: Opcode,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// What all PDU structs can do.
pub trait Pdu: Copy {
    /// Its opcode.
    const OPCODE: Opcode;

    /// Reads the header.
    ///
    /// # Errors
    /// The opcode is another, or a field has a value that the RFC forbids.
    fn decode(bhs: &Bhs) -> Result<Self, PduError>;

    /// Writes the header, with reserved bits zero.
    fn encode(&self) -> Bhs;
}

/// Checks the opcode at the start of each `decode`.
#[inline]
fn expect(bhs: &Bhs, opcode: Opcode) -> Result<(), PduError> {
    if bhs.opcode_bits() == opcode as u8 {
        Ok(())
    } else {
        Err(PduError::UnexpectedOpcode { got: bhs.opcode_bits(), expected: opcode.name() })
    }
}

/// The target's counters, in every PDU with a status (11.4.6 to 11.4.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetSn {
    /// StatSN. See each PDU for whether it takes one, or only names the next.
    pub stat_sn: Serial,
    /// ExpCmdSN: the next CmdSN that the target expects.
    pub exp_cmd_sn: Serial,
    /// MaxCmdSN: the last CmdSN that the target has room for.
    pub max_cmd_sn: Serial,
}

impl TargetSn {
    #[inline]
    fn decode(bhs: &Bhs) -> Self {
        Self { stat_sn: bhs.sn_at(24), exp_cmd_sn: bhs.sn_at(28), max_cmd_sn: bhs.sn_at(32) }
    }

    #[inline]
    fn encode(self, bhs: &mut Bhs) {
        bhs.put_sn(24, self.stat_sn);
        bhs.put_sn(28, self.exp_cmd_sn);
        bhs.put_sn(32, self.max_cmd_sn);
    }
}

/// Defines an enum over a code byte, with `Other` for values without a name here.
macro_rules! codes {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $value:literal: $words:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$vmeta])* #[doc = concat!($words, " (", $value, ")")] $variant,)*
            /// A code that this crate has no name for.
            Other(u8),
        }

        impl $name {
            /// The meaning of a code.
            #[inline]
            #[must_use]
            pub const fn from_code(code: u8) -> Self {
                match code {
                    $($value => Self::$variant,)*
                    other => Self::Other(other),
                }
            }

            /// The code.
            #[inline]
            #[must_use]
            pub const fn code(self) -> u8 {
                match self {
                    $(Self::$variant => $value,)*
                    Self::Other(code) => code,
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self {
                    $(Self::$variant => f.write_str($words),)*
                    Self::Other(code) => write!(f, "code {code:#04x}"),
                }
            }
        }
    };
}
use codes;

/// Defines a sum of PDUs with its decoder.
macro_rules! pdus {
    ($(#[$meta:meta])* $name:ident, $who:literal, $($(#[$vmeta:meta])* $variant:ident($ty:ty),)*) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $(#[doc = concat!("[`", stringify!($ty), "`]")] $variant($ty),)*
        }

        impl $name {
            /// Decodes a header by its opcode.
            ///
            /// # Errors
            /// The opcode is unknown or of the other direction, or the header has a format error.
            #[inline]
            pub fn decode(bhs: &Bhs) -> Result<Self, PduError> {
                match bhs.opcode() {
                    $(Some(Opcode::$variant) => <$ty>::decode(bhs).map(Self::$variant),)*
                    Some(_) => Err(PduError::UnexpectedOpcode { got: bhs.opcode_bits(), expected: $who }),
                    None => Err(PduError::UnknownOpcode(bhs.opcode_bits())),
                }
            }

            /// Encodes the header.
            #[inline]
            #[must_use]
            pub fn encode(&self) -> Bhs {
                match self {
                    $(Self::$variant(pdu) => pdu.encode(),)*
                }
            }
        }
    };
}

pdus! {
    /// Any PDU that an initiator sends.
    InitiatorPdu, "an initiator's PDU",
    NopOut(NopOut),
    ScsiCommand(ScsiCommand),
    TaskManagementRequest(TaskManagementRequest),
    LoginRequest(LoginRequest),
    TextRequest(TextRequest),
    DataOut(DataOut),
    LogoutRequest(LogoutRequest),
    Snack(Snack),
}

pdus! {
    /// Any PDU that a target sends.
    TargetPdu, "a target's PDU",
    NopIn(NopIn),
    ScsiResponse(ScsiResponse),
    TaskManagementResponse(TaskManagementResponse),
    LoginResponse(LoginResponse),
    TextResponse(TextResponse),
    DataIn(DataIn),
    LogoutResponse(LogoutResponse),
    R2t(R2t),
    AsyncMessage(AsyncMessage),
    Reject(Reject),
}

#[cfg(test)]
mod tests;
