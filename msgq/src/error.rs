//! What can go wrong, and whose fault it is.
//!
//! A [`Violation`] names the rule of `docs/msgq.md` that the peer broke. It ends that channel, is counted by rule, and
//! concerns nobody else.

/// A rule that the peer broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// R1: flag bits that do not exist.
    #[error("unknown flag bits {0:#x}")]
    Flags(u16),
    /// R2: a region that was not announced.
    #[error("region {0} does not exist")]
    Region(u16),
    /// R2: a region that was, under another generation.
    #[error("region {region} has another generation than {generation}")]
    Generation {
        /// The region.
        region: u16,
        /// The generation named.
        generation: u16,
    },
    /// R3: bytes outside the region.
    #[error("range {offset:#x}+{len:#x} is outside region {region} of {size:#x} bytes")]
    Range {
        /// The region.
        region: u16,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u32,
        /// Size of the region.
        size: u64,
    },
    /// R3: no bytes, or more than agreed.
    #[error("length {0} is not in the range agreed")]
    Length(u32),
    /// R4: more inline bytes than a slot has.
    #[error("{0} inline bytes in one slot")]
    Inline(u32),
    /// R5: more slots in one message than agreed.
    #[error("a message of more than {0} slots")]
    ChainLength(u16),
    /// R5: a slot of another kind inside a message.
    #[error("a slot with flags {0:#x} inside a message")]
    ChainFlags(u16),
    /// R5: the rest of a message did not come in time.
    #[error("the rest of a message did not come")]
    ChainLate,
    /// R6: more requests without completion than agreed.
    #[error("more than {0} requests in flight")]
    Window(u32),
    /// R7: a completion for nothing.
    #[error("completion for unknown cookie {0:#x}")]
    Cookie(u64),
    /// R7: a completion with data or a chain.
    #[error("a completion with flags {0:#x}")]
    CompletionFlags(u16),
    /// R8: a head that goes back.
    #[error("head went back from {old} to {new}")]
    HeadBack {
        /// Where it was.
        old: u64,
        /// Where it is said to be.
        new: u64,
    },
    /// R8: a head beyond what was published.
    #[error("head {head} is beyond the last message {tail}")]
    HeadBeyond {
        /// Where it is said to be.
        head: u64,
        /// What was published.
        tail: u64,
    },
    /// R9: no room for a completion, which the peer has to keep.
    #[error("no room for a completion: the peer sent requests before it released completions")]
    Reserve,
    /// R10: a control message that makes no sense.
    #[error("control message {opcode} with value {value:#x}")]
    Control {
        /// Its opcode.
        opcode: u16,
        /// Its value.
        value: u64,
    },
    /// R11: a message on the control socket that makes no sense now.
    #[error("unexpected message {0} on the control socket")]
    Link(u16),
}

impl Violation {
    /// Number of rules.
    pub const RULES: usize = 11;

    /// Number of the rule in `docs/msgq.md`, from 1.
    #[must_use]
    pub fn rule(&self) -> usize {
        match self {
            Self::Flags(_) => 1,
            Self::Region(_) | Self::Generation { .. } => 2,
            Self::Range { .. } | Self::Length(_) => 3,
            Self::Inline(_) => 4,
            Self::ChainLength(_) | Self::ChainFlags(_) | Self::ChainLate => 5,
            Self::Window(_) => 6,
            Self::Cookie(_) | Self::CompletionFlags(_) => 7,
            Self::HeadBack { .. } | Self::HeadBeyond { .. } => 8,
            Self::Reserve => 9,
            Self::Control { .. } => 10,
            Self::Link(_) => 11,
        }
    }
}

/// Names of the rules for metrics, by number from 1.
pub const RULE_NAMES: [&str; Violation::RULES] = [
    "flags",
    "region",
    "range",
    "inline",
    "chain",
    "window",
    "completion",
    "head",
    "reserve",
    "control",
    "link",
];
