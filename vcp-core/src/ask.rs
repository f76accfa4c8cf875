//! What the set-up thread asks a device, and what it is told: through the mailbox, between two batches.
//!
//! A command that has more to do than the data thread may wait for (writing a file, say) does on the data thread what
//! belongs there, such as taking a copy, and leaves a [`Rest`] for the thread that asked.

use std::fmt;
use std::time::Instant;

use serde_json::{Map, Value};

use crate::device::RingDevice;
use crate::metrics::Samples;

/// A question.
#[derive(Debug)]
pub enum Ask {
    /// What people want to know of it.
    Status,
    /// Its own metrics, besides [`DeviceMetrics`](crate::metrics::DeviceMetrics).
    Samples,
    /// A command of the control socket that the device knows.
    Command {
        /// `cmd`.
        name: String,
        /// The other members of the request.
        args: Map<String, Value>,
    },
}

/// An answer, of the kind of the question.
#[derive(Debug)]
pub enum Told {
    /// See [`Ask::Status`].
    Status(Value),
    /// See [`Ask::Samples`].
    Samples(Samples),
    /// See [`Ask::Command`]; an error is in words for the user.
    Command(Result<Rest, String>),
    /// Nobody there knows the command.
    Unknown,
}

/// What is left to do of a command, on the thread that asked.
pub struct Rest(Box<dyn FnOnce() -> Result<Value, String> + Send>);

impl Rest {
    /// Something left to do; it gives the answer.
    pub fn new(rest: impl FnOnce() -> Result<Value, String> + Send + 'static) -> Self {
        Self(Box::new(rest))
    }

    /// Nothing left to do: the answer is there.
    #[must_use]
    pub fn done(answer: Value) -> Self {
        Self::new(|| Ok(answer))
    }

    /// Does it.
    ///
    /// # Errors
    /// What failed, in words for the user.
    pub fn finish(self) -> Result<Value, String> {
        (self.0)()
    }
}

impl fmt::Debug for Rest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rest")
    }
}

/// Puts a question to a device; on the data thread.
pub(crate) fn tell<D: RingDevice>(device: &mut D, ask: Ask, now: Instant) -> Told {
    match ask {
        Ask::Status => Told::Status(device.status()),
        Ask::Samples => {
            let mut samples = Samples::default();
            device.collect(&mut samples);
            Told::Samples(samples)
        }
        Ask::Command { name, args } => Told::Command(
            device.command(&name, &args, now).unwrap_or_else(|| Err(format!("unknown command `{name}`"))),
        ),
    }
}
