//! Operational parameters (RFC 7143 chapter 13): what each side wants, how the two are joined, what comes out.
//!
//! [`Negotiation`] is the part of a login that both sides share: it writes offers, reads answers and offers, and checks
//! them against each key's rules. When texts are exchanged, and the keys of security and naming, are
//! [`crate::login`]'s.

use std::collections::BTreeSet;

use thiserror::Error;

use self::keys::{BURST, DEFS, Def, KEYS, Key, MAX_RECV_DATA_SEGMENT_LENGTH, Rule, is_marker};
use crate::pdu::framing;
use crate::text::{self, IRRELEVANT, NONE, NOT_UNDERSTOOD, Outgoing, REJECT};

mod keys;

pub use keys::is_operational;

/// MaxRecvDataSegmentLength before either side declares another, and during login (13.12, 6.3).
pub const DEFAULT_MAX_RECV_DATA_SEGMENT_BYTES: u32 = 8192;
/// Name of the digest, and of the key that both sides declare.
const CRC32C: &str = "CRC32C";
/// Keys of the peer that are remembered to notice repetition.
const MAX_KEYS: usize = 512;

/// SessionType (13.21).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum SessionType {
    /// SCSI commands to one target.
    #[default]
    Normal,
    /// Only to ask which targets there are.
    Discovery,
}

impl SessionType {
    /// The key's value.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Discovery => "Discovery",
        }
    }
}

/// What a side wants of a digest (13.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum DigestPolicy {
    /// No digest.
    Off,
    /// As the peer likes; none if it is for us to say.
    #[default]
    Optional,
    /// CRC32C if the peer has it.
    Prefer,
    /// CRC32C or no login.
    Require,
}

impl DigestPolicy {
    const fn list(self) -> &'static [&'static str] {
        match self {
            Self::Off => &[NONE],
            Self::Optional => &[NONE, CRC32C],
            Self::Prefer => &[CRC32C, NONE],
            Self::Require => &[CRC32C],
        }
    }
}

/// TaskReporting (13.23): what a target promises about the order of responses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum TaskReporting {
    /// As in RFC 3720.
    #[default]
    Rfc3720,
    /// With response fences (4.2.2.3.3).
    ResponseFence,
    /// With fast multi-task aborts (4.2.3.4), too.
    FastAbort,
}

impl TaskReporting {
    const ALL: [Self; 3] = [Self::Rfc3720, Self::ResponseFence, Self::FastAbort];

    const fn name(self) -> &'static str {
        match self {
            Self::Rfc3720 => "RFC3720",
            Self::ResponseFence => "ResponseFence",
            Self::FastAbort => "FastAbort",
        }
    }
}

/// What a side wants: offered if it makes the first step, the limit of what it grants if it answers.
///
/// Values outside a key's range are brought into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Params {
    /// HeaderDigest.
    pub header_digest: DigestPolicy,
    /// DataDigest.
    pub data_digest: DigestPolicy,
    /// MaxRecvDataSegmentLength of this side: the longest data segment that it takes, 512 to 2^24-1 bytes.
    pub max_recv_data_segment_bytes: u32,
    /// MaxBurstLength: longest sequence of data, 512 to 2^24-1 bytes.
    pub max_burst_bytes: u32,
    /// FirstBurstLength: most unsolicited data of a command, 512 to 2^24-1 bytes.
    pub first_burst_bytes: u32,
    /// InitialR2T: data beyond immediate data only when asked for.
    pub initial_r2t: bool,
    /// ImmediateData: data may come with the command.
    pub immediate_data: bool,
    /// MaxOutstandingR2T for one task, at least 1.
    pub max_outstanding_r2t: u16,
    /// DefaultTime2Wait in seconds, up to 3600.
    pub time2wait_s: u16,
    /// DefaultTime2Retain in seconds, up to 3600.
    pub time2retain_s: u16,
    /// DataPDUInOrder.
    pub data_pdu_in_order: bool,
    /// DataSequenceInOrder.
    pub data_sequence_in_order: bool,
    /// ErrorRecoveryLevel, 0 to 2.
    pub error_recovery_level: u8,
    /// MaxConnections, at least 1.
    pub max_connections: u16,
    /// The most of TaskReporting that this side can do. Offered only if more than RFC 3720's.
    pub task_reporting: TaskReporting,
}

impl Default for Params {
    /// What the machines of this crate can do, with long bursts and as little waiting as possible.
    fn default() -> Self {
        Self {
            header_digest: DigestPolicy::Optional,
            data_digest: DigestPolicy::Optional,
            max_recv_data_segment_bytes: 256 * 1024,
            max_burst_bytes: 1024 * 1024,
            first_burst_bytes: 256 * 1024,
            initial_r2t: false,
            immediate_data: true,
            max_outstanding_r2t: 8,
            time2wait_s: 2,
            time2retain_s: 0,
            data_pdu_in_order: true,
            data_sequence_in_order: true,
            error_recovery_level: 0,
            max_connections: 1,
            task_reporting: TaskReporting::Rfc3720,
        }
    }
}

/// What both sides have agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Normal or discovery.
    pub session_type: SessionType,
    /// HeaderDigest and DataDigest, in force from the first PDU of the full-feature phase on.
    pub digests: framing::Digests,
    /// Our MaxRecvDataSegmentLength: the peer sends no longer data segment.
    pub max_recv_data_segment_bytes: u32,
    /// The peer's MaxRecvDataSegmentLength: we send no longer data segment.
    pub max_send_data_segment_bytes: u32,
    /// MaxBurstLength in bytes.
    pub max_burst_bytes: u32,
    /// FirstBurstLength in bytes, at most `max_burst_bytes`.
    pub first_burst_bytes: u32,
    /// InitialR2T.
    pub initial_r2t: bool,
    /// ImmediateData.
    pub immediate_data: bool,
    /// MaxOutstandingR2T.
    pub max_outstanding_r2t: u16,
    /// DefaultTime2Wait in seconds.
    pub time2wait_s: u16,
    /// DefaultTime2Retain in seconds.
    pub time2retain_s: u16,
    /// DataPDUInOrder.
    pub data_pdu_in_order: bool,
    /// DataSequenceInOrder.
    pub data_sequence_in_order: bool,
    /// ErrorRecoveryLevel.
    pub error_recovery_level: u8,
    /// MaxConnections.
    pub max_connections: u16,
    /// TaskReporting.
    pub task_reporting: TaskReporting,
    /// iSCSIProtocolLevel (RFC 7144).
    pub protocol_level: u8,
}

impl Negotiated {
    /// What a framing [`Receiver`](framing::Receiver) is configured with in the full-feature phase.
    #[must_use]
    pub const fn limits(&self, ahs_bytes: usize) -> framing::Limits {
        framing::Limits { ahs_bytes, data_bytes: self.max_recv_data_segment_bytes }
    }
}

/// A key that breaks the rules. Each is a protocol error: the login fails.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ParamError {
    /// A key came again (6.3: must be noticed).
    #[error("peer sent {0} twice in one login")]
    Repeated(String),
    /// More keys than any login has.
    #[error("peer sent more than {MAX_KEYS} different keys in one login")]
    TooManyKeys,
    /// A declared value that cannot be, or one that only answers may have (6.2).
    #[error("peer sent {key}={}, which is not a possible value", .value.escape_debug())]
    BadValue {
        /// The key.
        key: String,
        /// The value, shortened.
        value: String,
    },
    /// The answer to an offer is not one that the key's result function allows (6.2.2).
    #[error("peer answered our {key}={offered} with {}", .answer.escape_debug())]
    BadAnswer {
        /// The key.
        key: &'static str,
        /// What we offered.
        offered: String,
        /// The answer, shortened.
        answer: String,
    },
    /// A key that every implementation must know was answered with NotUnderstood (6.2).
    #[error("peer does not understand {0}, which RFC 7143 requires")]
    NotUnderstood(String),
    /// An offer was not answered though its outcome is open.
    #[error("peer did not answer our offer of {0}")]
    Unanswered(&'static str),
    /// Something that this side requires was refused.
    #[error("peer refuses {key}={value}, which this side requires")]
    Refused {
        /// The key.
        key: &'static str,
        /// The value.
        value: &'static str,
    },
}

fn shorten(value: &str) -> String {
    value.chars().take(64).collect()
}

/// The keys that a peer has sent, to notice when one comes again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen(BTreeSet<String>);

impl Seen {
    /// Notes a key.
    pub(crate) fn note(&mut self, key: &str) -> Result<(), ParamError> {
        if self.0.len() == MAX_KEYS {
            return Err(ParamError::TooManyKeys);
        }
        if self.0.insert(key.to_owned()) { Ok(()) } else { Err(ParamError::Repeated(key.to_owned())) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Untouched,
    /// We offered it and wait for the answer.
    Offered,
    Done,
}

/// The negotiation of operational parameters in one login, on either side.
#[derive(Clone, Debug)]
pub struct Negotiation {
    session_type: SessionType,
    wants: Params,
    progress: [Progress; KEYS],
    values: [u64; KEYS],
    peer_max_recv: Option<u32>,
    declared: bool,
    seen: Seen,
}

impl Negotiation {
    /// Nothing said yet.
    #[must_use]
    pub fn new(session_type: SessionType, wants: Params) -> Self {
        let mut values = [0; KEYS];
        for (value, def) in values.iter_mut().zip(&DEFS) {
            *value = def.default;
        }
        Self {
            session_type,
            wants,
            progress: [Progress::Untouched; KEYS],
            values,
            peer_max_recv: None,
            declared: false,
            seen: Seen::default(),
        }
    }

    /// What this side wants of a key, within the key's range.
    fn want(&self, def: &Def) -> u64 {
        let wants = &self.wants;
        let value = match def.key {
            Key::HeaderDigest | Key::DataDigest => 0,
            Key::MaxConnections => u64::from(wants.max_connections),
            Key::InitialR2T => u64::from(wants.initial_r2t),
            Key::ImmediateData => u64::from(wants.immediate_data),
            Key::MaxBurstLength => u64::from(wants.max_burst_bytes),
            Key::FirstBurstLength => u64::from(wants.first_burst_bytes.min(wants.max_burst_bytes)),
            Key::DefaultTime2Wait => u64::from(wants.time2wait_s),
            Key::DefaultTime2Retain => u64::from(wants.time2retain_s),
            Key::MaxOutstandingR2T => u64::from(wants.max_outstanding_r2t),
            Key::DataPduInOrder => u64::from(wants.data_pdu_in_order),
            Key::DataSequenceInOrder => u64::from(wants.data_sequence_in_order),
            // 13.21: discovery sessions have no recovery.
            Key::ErrorRecoveryLevel if self.session_type == SessionType::Discovery => 0,
            Key::ErrorRecoveryLevel => u64::from(wants.error_recovery_level),
            Key::TaskReporting => wants.task_reporting as u64,
            Key::ProtocolLevel => 1,
        };
        match &def.rule {
            Rule::Minimum(range) | Rule::Maximum(range) => value.clamp(*range.start(), *range.end()),
            Rule::And | Rule::Or | Rule::Digest | Rule::TaskReporting => value,
        }
    }

    fn digest_policy(&self, key: Key) -> DigestPolicy {
        if key == Key::HeaderDigest { self.wants.header_digest } else { self.wants.data_digest }
    }

    /// Declares our MaxRecvDataSegmentLength, once.
    pub fn declare(&mut self, out: &mut Outgoing) {
        if !std::mem::replace(&mut self.declared, true) {
            out.push_number(MAX_RECV_DATA_SEGMENT_LENGTH, u64::from(self.max_recv()));
        }
    }

    fn max_recv(&self) -> u32 {
        self.wants.max_recv_data_segment_bytes.clamp(*BURST.start() as u32, *BURST.end() as u32)
    }

    /// Offers every key that was not touched yet, and declares our MaxRecvDataSegmentLength.
    pub fn offer(&mut self, out: &mut Outgoing) {
        for (index, def) in DEFS.iter().enumerate() {
            let wanted = match def.key {
                // Unknown to implementations of RFC 3720, and of no use unless we have something to gain.
                Key::TaskReporting => self.wants.task_reporting != TaskReporting::Rfc3720,
                Key::ProtocolLevel => false,
                _ => true,
            };
            let relevant = self.session_type == SessionType::Normal || !def.normal_only;
            if wanted && relevant && self.progress[index] == Progress::Untouched {
                out.push(def.name, &self.offer_text(def));
                self.progress[index] = Progress::Offered;
            }
        }
        self.declare(out);
    }

    fn offer_text(&self, def: &Def) -> String {
        let want = self.want(def);
        match def.rule {
            Rule::And | Rule::Or => if want == 1 { "Yes" } else { "No" }.to_owned(),
            Rule::Minimum(_) | Rule::Maximum(_) => want.to_string(),
            Rule::Digest => self.digest_policy(def.key).list().join(","),
            // At least the first two must be offered.
            Rule::TaskReporting => {
                let best = self.wants.task_reporting.max(TaskReporting::ResponseFence);
                let list = TaskReporting::ALL.iter().rev().filter(|&&level| level <= best);
                list.map(|level| level.name()).collect::<Vec<_>>().join(",")
            }
        }
    }

    /// Takes a pair of the peer's: the answer to an offer, an offer (the answer is written to `out`), a declaration or
    /// an unknown key.
    ///
    /// # Errors
    /// The pair breaks the rules of its key.
    pub fn take(&mut self, key: &str, value: &str, out: &mut Outgoing) -> Result<(), ParamError> {
        self.seen.note(key)?;
        let bad_value = || ParamError::BadValue { key: key.to_owned(), value: shorten(value) };
        if let Some(index) = DEFS.iter().position(|def| def.name == key) {
            return if self.progress[index] == Progress::Offered {
                self.take_answer(index, value)
            } else {
                self.take_offer(index, value, out)
            };
        }
        if value == NOT_UNDERSTOOD {
            return Err(ParamError::NotUnderstood(key.to_owned()));
        }
        if value == REJECT || value == IRRELEVANT {
            return Err(bad_value());
        }
        if key == MAX_RECV_DATA_SEGMENT_LENGTH {
            let value = text::parse_number_in(value, &BURST).ok_or_else(bad_value)?;
            self.peer_max_recv = Some(value as u32);
        } else if is_marker(key) {
            out.push(key, REJECT);
        } else if key != "X#NodeArchitecture" {
            // That one is a declaration for people to read, and may be passed over in silence (13.26.2).
            out.push(key, NOT_UNDERSTOOD);
        }
        Ok(())
    }

    fn take_answer(&mut self, index: usize, answer: &str) -> Result<(), ParamError> {
        let def = &DEFS[index];
        let bad_answer = || ParamError::BadAnswer {
            key: def.name,
            offered: self.offer_text(def),
            answer: shorten(answer),
        };
        if matches!(def.rule, Rule::Digest)
            && answer == NONE
            && self.digest_policy(def.key) == DigestPolicy::Require
        {
            // Not one of the values offered, but what some targets say in place of Reject.
            return Err(ParamError::Refused { key: def.name, value: CRC32C });
        }
        let want = self.want(def);
        let value = match answer {
            // The key keeps its value, here its default (6.2); `finish` knows whether that will do.
            REJECT | IRRELEVANT => Some(def.default),
            // RFC 3720 did not have this key.
            NOT_UNDERSTOOD if def.key == Key::TaskReporting => Some(def.default),
            NOT_UNDERSTOOD => return Err(ParamError::NotUnderstood(def.name.to_owned())),
            _ => match &def.rule {
                Rule::And => text::parse_bool(answer).map(u64::from).filter(|&value| value <= want),
                Rule::Or => text::parse_bool(answer).map(u64::from).filter(|&value| value >= want),
                Rule::Minimum(range) => text::parse_number_in(answer, &(*range.start()..=want)),
                Rule::Maximum(range) => text::parse_number_in(answer, &(want..=*range.end())),
                Rule::Digest => {
                    let offered = self.digest_policy(def.key).list();
                    offered.contains(&answer).then(|| u64::from(answer == CRC32C))
                }
                Rule::TaskReporting => {
                    let best = self.wants.task_reporting.max(TaskReporting::ResponseFence);
                    let chosen = TaskReporting::ALL.into_iter().find(|level| level.name() == answer);
                    chosen.filter(|&level| level <= best).map(|level| level as u64)
                }
            },
        };
        self.values[index] = value.ok_or_else(bad_answer)?;
        self.progress[index] = Progress::Done;
        Ok(())
    }

    fn take_offer(&mut self, index: usize, offer: &str, out: &mut Outgoing) -> Result<(), ParamError> {
        let def = &DEFS[index];
        if matches!(offer, REJECT | IRRELEVANT | NOT_UNDERSTOOD) {
            return Err(ParamError::BadValue { key: def.name.to_owned(), value: offer.to_owned() });
        }
        self.progress[index] = Progress::Done;
        if def.normal_only && self.session_type == SessionType::Discovery {
            out.push(def.name, IRRELEVANT);
            return Ok(());
        }
        let want = self.want(def);
        let value = match &def.rule {
            Rule::And => text::parse_bool(offer).map(|offer| u64::from(offer) & want),
            Rule::Or => text::parse_bool(offer).map(|offer| u64::from(offer) | want),
            Rule::Minimum(range) => text::parse_number_in(offer, range).map(|offer| offer.min(want)),
            Rule::Maximum(range) => text::parse_number_in(offer, range).map(|offer| offer.max(want)),
            Rule::Digest => {
                let allowed = self.digest_policy(def.key).list();
                let chosen = offer.split(',').find(|name| allowed.contains(name));
                chosen.map(|name| u64::from(name == CRC32C))
            }
            Rule::TaskReporting => {
                let level = |name| TaskReporting::ALL.into_iter().find(|level| level.name() == name);
                let able = |level: &TaskReporting| *level <= self.wants.task_reporting;
                offer.split(',').filter_map(level).find(able).map(|level| level as u64)
            }
        };
        let Some(value) = value else {
            out.push(def.name, REJECT);
            return Ok(());
        };
        self.values[index] = value;
        match def.rule {
            Rule::And | Rule::Or => out.push_bool(def.name, value == 1),
            Rule::Minimum(_) | Rule::Maximum(_) => out.push_number(def.name, value),
            Rule::Digest => out.push(def.name, if value == 1 { CRC32C } else { NONE }),
            Rule::TaskReporting => out.push(def.name, TaskReporting::ALL[value as usize].name()),
        }
        Ok(())
    }

    /// The outcome, once the last text was exchanged.
    ///
    /// # Errors
    /// An offer has no answer, or something that this side requires was refused.
    pub fn finish(&self) -> Result<Negotiated, ParamError> {
        let mut values = self.values;
        for (index, def) in DEFS.iter().enumerate() {
            if self.progress[index] == Progress::Offered {
                // Answers to boolean offers that determine the outcome are optional (6.2.2).
                values[index] = match (&def.rule, self.want(def)) {
                    (Rule::And, 0) => 0,
                    (Rule::Or, 1) => 1,
                    _ => return Err(ParamError::Unanswered(def.name)),
                };
            }
            if matches!(def.rule, Rule::Digest)
                && self.digest_policy(def.key) == DigestPolicy::Require
                && values[index] == 0
            {
                return Err(ParamError::Refused { key: def.name, value: CRC32C });
            }
        }
        // All values are within their keys' ranges, so that none of the casts cuts anything off.
        let value = |key: Key| values[key as usize];
        let max_burst_bytes = value(Key::MaxBurstLength) as u32;
        let error_recovery_level = value(Key::ErrorRecoveryLevel) as u8;
        let data_sequence_in_order = value(Key::DataSequenceInOrder) == 1;
        // 13.19: with recovery, sequences in order allow one R2T only.
        let one_r2t = error_recovery_level != 0 && data_sequence_in_order;
        Ok(Negotiated {
            session_type: self.session_type,
            digests: framing::Digests {
                header: value(Key::HeaderDigest) == 1,
                data: value(Key::DataDigest) == 1,
            },
            // Not declared means the default, whatever we would have liked.
            max_recv_data_segment_bytes: if self.declared {
                self.max_recv()
            } else {
                DEFAULT_MAX_RECV_DATA_SEGMENT_BYTES
            },
            max_send_data_segment_bytes: self.peer_max_recv.unwrap_or(DEFAULT_MAX_RECV_DATA_SEGMENT_BYTES),
            max_burst_bytes,
            // 13.14: it must not exceed MaxBurstLength, which may have been settled later.
            first_burst_bytes: (value(Key::FirstBurstLength) as u32).min(max_burst_bytes),
            initial_r2t: value(Key::InitialR2T) == 1,
            immediate_data: value(Key::ImmediateData) == 1,
            max_outstanding_r2t: if one_r2t { 1 } else { value(Key::MaxOutstandingR2T) as u16 },
            time2wait_s: value(Key::DefaultTime2Wait) as u16,
            time2retain_s: value(Key::DefaultTime2Retain) as u16,
            data_pdu_in_order: value(Key::DataPduInOrder) == 1,
            data_sequence_in_order,
            error_recovery_level,
            max_connections: value(Key::MaxConnections) as u16,
            task_reporting: TaskReporting::ALL[value(Key::TaskReporting) as usize],
            protocol_level: value(Key::ProtocolLevel) as u8,
        })
    }
}

#[cfg(test)]
mod tests;
