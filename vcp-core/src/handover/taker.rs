//! The new process's side.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::Value;

use super::state::ServerState;
use super::{Channel, ChannelError, FORMAT, Fds, Message};

/// How long the old process may take for its offer.
const OFFER_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take until it is quiet. It gives up itself long before.
const STATE_LIMIT: Duration = Duration::from_secs(600);
/// How long a message may take to be sent.
const SEND_LIMIT: Duration = Duration::from_secs(2);

/// Why nothing was taken over. The old process goes on, if it still lives.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// The old process did not do its part.
    #[error("the old process {what}")]
    Peer {
        /// What it was to do, in the negative.
        what: &'static str,
        /// Why.
        #[source]
        source: ChannelError,
    },
    /// It speaks another format.
    #[error("{program} hands over in format {theirs}, this program takes over in format {FORMAT}")]
    Format {
        /// What it is.
        program: String,
        /// Its format.
        theirs: u32,
    },
    /// It gave up.
    #[error("the old process gave up: {0}")]
    Refused(String),
    /// It said what does not belong there.
    #[error("the old process sent a {0} where none belongs")]
    Order(&'static str),
}

/// A process that is about to take over.
#[derive(Debug)]
pub struct Taker {
    channel: Channel,
}

impl Taker {
    /// Says hello as `program` and takes the offer: what can be built now.
    ///
    /// # Errors
    /// [`TakeError`].
    pub fn begin(stream: UnixStream, program: String) -> Result<(Self, Value), TakeError> {
        let channel = Channel::new(stream)
            .map_err(|error| TakeError::Peer { what: "is not there", source: error.into() })?;
        let taker = Self { channel };
        taker.send(&Message::Hello { format: FORMAT, program, pid: std::process::id() }, "is not there")?;
        match taker.receive("made no offer", OFFER_LIMIT)?.0 {
            Message::Offer { format, app, .. } if format == FORMAT => Ok((taker, app)),
            Message::Offer { format: theirs, program, .. } => Err(TakeError::Format { program, theirs }),
            other => Err(TakeError::Order(other.name())),
        }
    }

    /// Says that it can be done now, and waits for the state.
    ///
    /// # Errors
    /// [`TakeError`].
    pub fn state(&self) -> Result<(ServerState, Fds), TakeError> {
        self.send(&Message::Prepared {}, "went away")?;
        match self.receive("gave no state", STATE_LIMIT)? {
            (Message::State(state), fds) => Ok((*state, fds)),
            (other, _) => Err(TakeError::Order(other.name())),
        }
    }

    /// Becomes the owner. With an error it is not, and must touch nothing.
    ///
    /// # Errors
    /// [`TakeError`].
    pub fn own(self) -> Result<(), TakeError> {
        self.send(&Message::Owned {}, "gave up")
    }

    /// Tells the old process why nothing comes of it.
    pub fn refuse(&self, why: String) {
        // If it does not listen any more it knows already.
        let _ = self.channel.send(&Message::Refused { why }, &Fds::default(), SEND_LIMIT);
    }

    fn send(&self, message: &Message, what: &'static str) -> Result<(), TakeError> {
        let sent = self.channel.send(message, &Fds::default(), SEND_LIMIT);
        sent.map_err(|source| TakeError::Peer { what, source })
    }

    fn receive(&self, what: &'static str, limit: Duration) -> Result<(Message, Fds), TakeError> {
        match self.channel.receive(limit) {
            Ok((Message::Refused { why }, _)) => Err(TakeError::Refused(why)),
            Ok(message) => Ok(message),
            Err(source) => Err(TakeError::Peer { what, source }),
        }
    }
}
