//! The old process's side: answers a new process that wants to take over, up to the step in which the owner changes.
//!
//! It starts nothing: a confined process has no right to. Whoever wants the upgrade starts the new program, which
//! connects to the control socket of the old one.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::state::ServerState;
use super::{Channel, ChannelError, FORMAT, Fds, Message};

/// How long the new process may take until it can take over. Nothing stands still meanwhile.
const PREPARE_LIMIT: Duration = Duration::from_secs(20);
/// How long it may take from the state to `Owned`. The guest's requests wait meanwhile; a healthy one needs a
/// millisecond, and one that needs longer than this does not get it.
const TAKE_LIMIT: Duration = Duration::from_millis(500);
/// How long a message may take to be sent.
const SEND_LIMIT: Duration = Duration::from_millis(500);

/// What the application puts into a hand-over.
#[derive(Clone, Debug)]
pub struct Giving {
    /// Program and version, for people.
    pub program: String,
    /// What the new process can build in advance.
    pub offer: Value,
}

/// Why a hand-over came to nothing. The old process goes on.
#[derive(Debug, thiserror::Error)]
pub enum GiveError {
    /// The new process did not do its part.
    #[error("the new process {what}")]
    Peer {
        /// What it was to do, in the negative.
        what: &'static str,
        /// Why.
        #[source]
        source: ChannelError,
    },
    /// The new process said no.
    #[error("the new process refused: {0}")]
    Refused(String),
    /// It speaks another format.
    #[error("{program} hands over in format {theirs}, this process in format {FORMAT}; restart it instead")]
    Format {
        /// What it is.
        program: String,
        /// Its format.
        theirs: u32,
    },
    /// It said what does not belong there.
    #[error("the new process sent a {0} where none belongs")]
    Order(&'static str),
}

/// A new process that can take over at any time.
#[derive(Debug)]
pub struct Successor {
    channel: Channel,
    /// What it is.
    pub program: String,
    /// Its process number, as it says.
    pub pid: u32,
}

impl Successor {
    /// Makes the offer to the process behind `stream` and waits until it is ready to take over, which takes as long as it
    /// needs for its start.
    ///
    /// # Errors
    /// [`GiveError`].
    pub fn accept(stream: UnixStream, giving: &Giving) -> Result<Self, GiveError> {
        let channel = Channel::new(stream)
            .map_err(|error| GiveError::Peer { what: "is not there", source: error.into() })?;
        let mut successor = Self { channel, program: String::new(), pid: 0 };
        match successor.prepare(giving) {
            Ok(()) => Ok(successor),
            Err(error) => {
                successor.refuse(&crate::process::chain(&error));
                Err(error)
            }
        }
    }

    fn prepare(&mut self, giving: &Giving) -> Result<(), GiveError> {
        let by = Instant::now() + PREPARE_LIMIT;
        let (program, theirs) = match self.receive("did not say what it is", PREPARE_LIMIT)? {
            Message::Hello { format, program, pid } => {
                self.pid = pid;
                (program, format)
            }
            other => return Err(GiveError::Order(other.name())),
        };
        self.program.clone_from(&program);
        let offer =
            Message::Offer { format: FORMAT, program: giving.program.clone(), app: giving.offer.clone() };
        if theirs != FORMAT {
            return Err(GiveError::Format { program, theirs });
        }
        self.send(&offer, &Fds::default())?;
        match self.receive("did not get ready", by.saturating_duration_since(Instant::now()))? {
            Message::Prepared {} => Ok(()),
            other => Err(GiveError::Order(other.name())),
        }
    }

    /// Gives it the state. When this returns without an error, the new process is the owner; with one, it is not and
    /// never will be.
    ///
    /// # Errors
    /// [`GiveError`]; the new process is of no use any more.
    pub fn give(&self, state: ServerState, fds: &Fds) -> Result<(), GiveError> {
        self.send(&Message::State(Box::new(state)), fds)?;
        let answer = self.channel.receive(TAKE_LIMIT);
        let answer = match answer {
            Ok(answer) => Ok(answer),
            Err(ChannelError::Late(limit)) => {
                // From here on it cannot say `Owned` any more. It may have done so just before.
                self.channel.close_door();
                match self.channel.receive(Duration::ZERO) {
                    Err(ChannelError::Closed) => Err(ChannelError::Late(limit)),
                    other => other,
                }
            }
            Err(error) => Err(error),
        };
        match answer {
            Ok((Message::Owned {}, _)) => Ok(()),
            Ok((Message::Refused { why }, _)) => Err(GiveError::Refused(why)),
            Ok((other, _)) => {
                self.channel.close_door();
                Err(GiveError::Order(other.name()))
            }
            Err(source) => {
                self.channel.close_door();
                Err(GiveError::Peer { what: "did not take over", source })
            }
        }
    }

    /// Whether it ended or closed the channel: what it was to say next will not come.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.channel.is_hung_up()
    }

    fn send(&self, message: &Message, fds: &Fds) -> Result<(), GiveError> {
        let sent = self.channel.send(message, fds, SEND_LIMIT);
        sent.map_err(|source| GiveError::Peer { what: "went away", source })
    }

    fn receive(&self, what: &'static str, limit: Duration) -> Result<Message, GiveError> {
        match self.channel.receive(limit) {
            Ok((Message::Refused { why }, _)) => Err(GiveError::Refused(why)),
            Ok((message, _)) => Ok(message),
            Err(source) => Err(GiveError::Peer { what, source }),
        }
    }

    /// Tells it that it does not become the owner.
    pub fn refuse(self, why: &str) {
        // If it does not listen any more it knows already.
        let why = why.to_owned();
        let _ = self.channel.send(&Message::Refused { why }, &Fds::default(), Duration::ZERO);
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        // If it is not the owner by now it never will be.
        self.channel.close_door();
    }
}
