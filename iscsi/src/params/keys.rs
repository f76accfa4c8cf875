//! The table of negotiated keys (RFC 7143 13.1 to 13.24): names, rules, defaults.

use std::ops::RangeInclusive;

/// The one key that both sides declare without an answer.
pub(super) const MAX_RECV_DATA_SEGMENT_LENGTH: &str = "MaxRecvDataSegmentLength";

/// Negotiated keys, in the order in which they are offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    HeaderDigest,
    DataDigest,
    MaxConnections,
    InitialR2T,
    ImmediateData,
    MaxBurstLength,
    FirstBurstLength,
    DefaultTime2Wait,
    DefaultTime2Retain,
    MaxOutstandingR2T,
    DataPduInOrder,
    DataSequenceInOrder,
    ErrorRecoveryLevel,
    TaskReporting,
    ProtocolLevel,
}

/// How a key's outcome follows from the two sides' values.
#[derive(Clone, Debug)]
pub(super) enum Rule {
    And,
    Or,
    Minimum(RangeInclusive<u64>),
    Maximum(RangeInclusive<u64>),
    Digest,
    TaskReporting,
}

pub(super) struct Def {
    pub(super) key: Key,
    pub(super) name: &'static str,
    pub(super) rule: Rule,
    /// Booleans as 0 and 1, digests as 0 for none, TaskReporting as its place in the list.
    pub(super) default: u64,
    /// Irrelevant when SessionType=Discovery.
    pub(super) normal_only: bool,
}

pub(super) const KEYS: usize = 15;
pub(super) const BURST: RangeInclusive<u64> = 512..=0xFF_FFFF;

/// Sections 13.1 to 13.24.
pub(super) static DEFS: [Def; KEYS] = {
    const fn def(key: Key, name: &'static str, rule: Rule, default: u64, normal_only: bool) -> Def {
        Def { key, name, rule, default, normal_only }
    }
    [
        def(Key::HeaderDigest, "HeaderDigest", Rule::Digest, 0, false),
        def(Key::DataDigest, "DataDigest", Rule::Digest, 0, false),
        def(Key::MaxConnections, "MaxConnections", Rule::Minimum(1..=0xFFFF), 1, true),
        def(Key::InitialR2T, "InitialR2T", Rule::Or, 1, true),
        def(Key::ImmediateData, "ImmediateData", Rule::And, 1, true),
        def(Key::MaxBurstLength, "MaxBurstLength", Rule::Minimum(BURST), 262_144, true),
        def(Key::FirstBurstLength, "FirstBurstLength", Rule::Minimum(BURST), 65_536, true),
        def(Key::DefaultTime2Wait, "DefaultTime2Wait", Rule::Maximum(0..=3600), 2, false),
        def(Key::DefaultTime2Retain, "DefaultTime2Retain", Rule::Minimum(0..=3600), 20, false),
        def(Key::MaxOutstandingR2T, "MaxOutstandingR2T", Rule::Minimum(1..=0xFFFF), 1, true),
        def(Key::DataPduInOrder, "DataPDUInOrder", Rule::Or, 1, true),
        def(Key::DataSequenceInOrder, "DataSequenceInOrder", Rule::Or, 1, true),
        def(Key::ErrorRecoveryLevel, "ErrorRecoveryLevel", Rule::Minimum(0..=2), 0, false),
        def(Key::TaskReporting, "TaskReporting", Rule::TaskReporting, 0, true),
        def(Key::ProtocolLevel, "iSCSIProtocolLevel", Rule::Minimum(0..=31), 1, false),
    ]
};

/// Whether the key is one of chapter 13 that belongs to the operational stage only (and to no earlier one).
#[must_use]
pub fn is_operational(key: &str) -> bool {
    key == MAX_RECV_DATA_SEGMENT_LENGTH || is_marker(key) || DEFS.iter().any(|def| def.name == key)
}

/// Obsolete keys, which are answered with Reject (13.25).
pub(super) fn is_marker(key: &str) -> bool {
    matches!(key, "IFMarker" | "OFMarker" | "IFMarkInt" | "OFMarkInt")
}
