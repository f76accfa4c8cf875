//! How a session fails, and what a target did that the RFC forbids.

use std::fmt;
use std::time::Duration;

use crate::pdu::PduError;

macro_rules! violations {
    ($($(#[$meta:meta])* $name:ident: $section:literal, $words:literal;)*) => {
        /// Something a target did against RFC 7143.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Violation {
            $($(#[$meta])* #[doc = concat!($words, " (RFC 7143 ", $section, ")")] $name,)*
        }

        impl Violation {
            /// All of them, in the order of [`Counters`].
            pub const ALL: &'static [Violation] = &[$(Violation::$name,)*];

            /// Section of RFC 7143 that says how it should have been.
            pub const fn section(self) -> &'static str {
                match self { $(Self::$name => $section,)* }
            }

            /// What it did, in words.
            pub const fn words(self) -> &'static str {
                match self { $(Self::$name => $words,)* }
            }
        }
    };
}

violations! {
    UnknownTask: "11.2.1.8", "a PDU for a task that does not exist";
    WrongDirection: "4.2.5.3", "data for a command that has none in this direction";
    DataSnGap: "7.9", "a gap in the Data-In numbers";
    DataSnRepeat: "7.9", "a Data-In whose number came before";
    DataOffset: "11.7.6", "Data-In that does not continue where the last one ended";
    DataOutOfBounds: "11.7.6", "Data-In beyond the end of the command's buffer";
    DataBurst: "11.7.1", "a Data-In sequence longer than MaxBurstLength";
    SegmentTooLong: "13.12", "a data segment longer than our MaxRecvDataSegmentLength";
    ShortData: "11.4.5.1", "status GOOD, but bytes are missing";
    Residual: "11.4.5.1", "a residual count that does not fit the data transferred";
    ExpDataSn: "11.4.8", "fewer Data-In or R2T PDUs arrived than the response counts";
    Unfetched: "11.4.5.1", "status GOOD for a write of which not all data was fetched";
    DataDigest: "11.2.3", "a data digest that does not match";
    HeaderDigest: "11.2.3", "a header digest that does not match";
    R2tSnGap: "7.9", "a gap in the R2T numbers";
    R2tSnRepeat: "7.9", "an R2T whose number came before";
    R2tOutOfBounds: "11.8.4", "an R2T beyond the end of the command's data";
    R2tOverlap: "11.8.4", "an R2T that does not continue where the last one ended";
    R2tTooLong: "11.8.4", "an R2T longer than MaxBurstLength";
    R2tTooMany: "13.17", "more R2Ts at once than MaxOutstandingR2T";
    R2tLun: "4.2.5.3", "an R2T with another LUN than the command";
    StatSnGap: "4.2.2.2", "a gap or repetition in the status numbers";
    CmdSnAhead: "4.2.2.1", "an ExpCmdSN ahead of the commands sent";
    SenseLength: "11.4.7.1", "sense data longer than the segment that carries it";
    UnexpectedPdu: "11.2.1.2", "a PDU that has no place in full feature phase";
    UnexpectedAnswer: "11.2.1.8", "an answer to nothing that was asked";
    Rejected: "11.17", "a Reject";
    PingFlood: "11.19", "more pings than can be answered";
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (RFC 7143 {})", self.words(), self.section())
    }
}

/// How often each [`Violation`] was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters([u64; Violation::ALL.len()]);

impl Default for Counters {
    fn default() -> Self {
        Self([0; Violation::ALL.len()])
    }
}

impl Counters {
    /// How often this one was seen.
    pub fn get(&self, violation: Violation) -> u64 {
        self.0[violation as usize]
    }

    /// All of them together.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Counts one more.
    pub fn count(&mut self, violation: Violation) {
        self.0[violation as usize] += 1;
    }

    /// Of counts by description, as an earlier process wrote them. Descriptions that this version has no counter for are
    /// left out.
    pub fn of_text(violations: &[(String, u64)]) -> Self {
        let mut counters = Self::default();
        for violation in Violation::ALL {
            let name = violation.to_string();
            if let Some((_, n)) = violations.iter().find(|(what, _)| *what == name) {
                counters.set(*violation, *n);
            }
        }
        counters
    }

    /// Sets one, as an earlier process counted it.
    fn set(&mut self, violation: Violation, n: u64) {
        self.0[violation as usize] = n;
    }

    /// Adds another set of counters, as of an earlier session.
    pub fn add(&mut self, other: &Counters) {
        for (sum, n) in self.0.iter_mut().zip(other.0) {
            *sum += n;
        }
    }

    /// Those that were seen.
    pub fn seen(&self) -> impl Iterator<Item = (Violation, u64)> + '_ {
        Violation::ALL.iter().map(|&v| (v, self.get(v))).filter(|&(_, n)| n > 0)
    }
}

/// Why the session cannot go on. The connection must be closed; what is unanswered may be repeated on a session that
/// reinstates this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The target broke the protocol in a way that leaves its state in doubt.
    #[error("protocol violation by the target: {violation}")]
    Violation {
        /// What it did.
        violation: Violation,
        /// The task concerned, if there is one: a caller that repeats it for ever would never recover.
        slot: Option<u16>,
    },
    /// A header that is not a PDU.
    #[error("protocol violation by the target: {error} (RFC 7143 7.7)")]
    Format {
        /// What is wrong with it.
        error: PduError,
        /// The task concerned, if there is one.
        slot: Option<u16>,
    },
    /// Nothing was received, not even the answer to a ping.
    #[error("the target did not answer a ping within {} ms", .timeout.as_millis())]
    Silent {
        /// How long it had.
        timeout: Duration,
    },
    /// A command took too long, and task management did not help.
    #[error("a command timed out and {step} failed: {why}")]
    Stuck {
        /// The last step tried.
        step: &'static str,
        /// What came of it.
        why: &'static str,
    },
    /// The reset that [`Session::reset_unit`](super::Session::reset_unit) asked for.
    #[error("LOGICAL UNIT RESET failed: {why}")]
    ResetFailed {
        /// What came of it.
        why: &'static str,
    },
    /// The target takes no commands.
    #[error("the command window stayed closed for longer than a command's time limit")]
    WindowClosed,
    /// The target ended the session (Async events 2 and 3, 11.9.1).
    #[error("the target dropped the session")]
    Dropped {
        /// Seconds to wait before the next login.
        time2wait_s: u16,
    },
    /// The target rejected a PDU in a way that needs a new session.
    #[error("the target rejected a PDU: {0}")]
    Rejected(crate::pdu::RejectReason),
    /// A logout stayed unanswered.
    #[error("the target did not answer a logout within {} ms", .timeout.as_millis())]
    LogoutTimeout {
        /// How long it had.
        timeout: Duration,
    },
}

impl SessionError {
    /// The task to blame, if one is.
    pub fn slot(&self) -> Option<u16> {
        match self {
            Self::Violation { slot, .. } | Self::Format { slot, .. } => *slot,
            _ => None,
        }
    }
}
