//! [`Message`]: what the two processes say to each other.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::state::ServerState;

/// The format of offers and states. Goes up by one with every change that an older or newer program would
/// misunderstand; the two sides of a hand-over must agree on it. A new field with a default in a part that is not
/// strict (metrics) is no such change.
pub const FORMAT: u32 = 1;

/// A message of either side. What a version does not know is refused, never skipped.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Message {
    /// New to old, first of all.
    Hello {
        /// [`FORMAT`] of the new process.
        format: u32,
        /// What it is: program and version, for people.
        program: String,
        /// Its process number.
        pid: u32,
    },
    /// Old to new: what does not change any more before the state, so that it can be built in advance.
    Offer {
        /// [`FORMAT`] of the old process.
        format: u32,
        /// What it is.
        program: String,
        /// The application's own part.
        app: Value,
    },
    /// New to old: built.
    Prepared {},
    /// Old to new, with descriptors: everything else.
    State(Box<ServerState>),
    /// New to old: the new process is the owner from here on.
    Owned {},
    /// Either side: it comes to nothing.
    Refused {
        /// Why, in words for people.
        why: String,
    },
}

impl Message {
    /// Its name, for errors.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "hello",
            Self::Offer { .. } => "offer",
            Self::Prepared {} => "prepared",
            Self::State(_) => "state",
            Self::Owned {} => "owned",
            Self::Refused { .. } => "refusal",
        }
    }
}
