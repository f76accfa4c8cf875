//! Commands to a running machine, from any thread: what can be asked, what is answered, and the way there and back.
//!
//! The machine belongs to the thread of the event loop. Another thread (the API's, a signal's) sends a [`Command`] through
//! its [`Control`], which wakes the loop, and gets the [`Answer`] on a channel of its own. A command that takes long
//! (a VCP that logs in) is answered when it is done; the loop goes on meanwhile.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::status::Status;
use crate::config::{DiskSpec, NetSpec};
use crate::error::{Error, Result};

/// What can be asked of a running machine.
#[derive(Clone, Debug)]
pub enum Command {
    /// What is known about machine, vCPUs and devices.
    Status,
    /// Stop all vCPUs. The VCPs go on and rest when their rings are empty. No error if it is paused already.
    Pause,
    /// Let the vCPUs go on. No error if they run already.
    Resume,
    /// Press the ACPI power button: the guest shuts down if it listens to it.
    Shutdown,
    /// End the run at once, as SIGTERM does.
    Kill,
    /// Add a block device; answered with its name when its backend serves it and the guest was told.
    AddDisk(DiskSpec),
    /// Take a block device away; answered when the guest has let go of it.
    RemoveDisk(String),
    /// Add a network device.
    AddNet(NetSpec),
    /// Take a network device away.
    RemoveNet(String),
    /// Set how much memory the guest may use, bytes (by its balloon): at most what it was started with.
    Resize {
        /// The size, bytes.
        memory_bytes: u64,
    },
    /// Move a thread to other hardware threads.
    Pin {
        /// Which.
        target: PinTarget,
        /// Host CPUs that it may run on from now on; not empty.
        cpus: Vec<usize>,
    },
    /// Replace a device's VCP by a new process.
    RestartVcp {
        /// Name of the device.
        device: String,
        /// How.
        how: Restart,
    },
    /// Have the VCPs that a device gets from now on keep to these limits. The one that it has is told through its control
    /// socket, which the event loop does not wait for.
    RateLimits {
        /// Name of the device.
        device: String,
        /// The limits.
        limits: RateLimits,
    },
    /// Write the paused machine to a file that `vcp run --restore` takes.
    Snapshot(PathBuf),
}

/// Whose thread is pinned.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PinTarget {
    /// The vCPU of this number.
    Vcpu(usize),
    /// The VCP of the device of this name.
    Device(String),
}

/// How a VCP is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// It is killed; its successor repeats what was in flight.
    Kill,
    /// It hands everything over to a new process between two batches.
    Upgrade,
}

/// Rate limits of a block device; `None` leaves a limit as it is, 0 takes it away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Requests per second.
    pub iops: Option<u64>,
    /// Bytes per second.
    pub bytes_per_s: Option<u64>,
}

/// What a command that succeeded brings.
#[derive(Clone, Debug)]
pub enum Reply {
    /// It is done.
    Done,
    /// Answer to [`Command::Status`].
    Status(Box<Status>),
    /// A device was added under this name.
    Added(String),
}

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// This version does not do it.
    #[error("{0} is not there yet in this version")]
    NotYet(&'static str),
    /// Nothing of that name.
    #[error("there is no {0}")]
    NotFound(String),
    /// What was asked for is not possible; the text says why and what to do.
    #[error("{0}")]
    Invalid(String),
    /// It cannot be done in the state that the machine is in.
    #[error("{0}")]
    Conflict(String),
    /// It was tried and failed.
    #[error("{0}")]
    Failed(String),
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
    /// No answer within the time that the caller gave it.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

impl From<Error> for CommandError {
    fn from(error: Error) -> Self {
        let text = crate::chain(&error);
        if error.is_usage() { Self::Invalid(text) } else { Self::Failed(text) }
    }
}

/// How a command ends.
pub type Answer = std::result::Result<Reply, CommandError>;

/// The way back to who asked. If it is dropped, the answer is [`CommandError::Ended`].
pub struct ReplyTo(Box<dyn FnOnce(Answer) + Send>);

impl std::fmt::Debug for ReplyTo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplyTo").finish_non_exhaustive()
    }
}

impl ReplyTo {
    /// Answers.
    pub fn give(self, answer: Answer) {
        (self.0)(answer);
    }
}

/// What the event loop's thread is sent.
#[allow(clippy::large_enum_variant)] // Few are underway at a time.
pub(super) enum Message {
    /// A command from outside.
    Command(Command, ReplyTo),
    /// Work that another thread has prepared and that ends on the loop's.
    Work(Box<dyn FnOnce(&mut super::Machine) + Send>),
}

/// Sends commands to a machine. Cheap to clone.
#[derive(Clone)]
pub struct Control {
    sender: mpsc::Sender<Message>,
    wake: Arc<EventFd>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

/// The machine's end.
pub(super) struct Commands {
    pub(super) receiver: Receiver<Message>,
    pub(super) wake: Arc<EventFd>,
}

impl Control {
    /// A new way to a machine.
    pub(super) fn new() -> Result<(Self, Commands)> {
        let wake =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::os("create an eventfd"))?;
        let (sender, receiver) = mpsc::channel();
        let wake = Arc::new(wake);
        Ok((Self { sender, wake: wake.clone() }, Commands { receiver, wake }))
    }

    /// Sends a command; its answer comes on the channel.
    pub fn send(&self, command: Command) -> Receiver<Answer> {
        let (sender, receiver) = mpsc::sync_channel(1);
        // Fails only if nobody waits any more.
        self.send_with(command, move |answer| drop(sender.send(answer)));
        receiver
    }

    /// Sends a command; `reply` is called with its answer on another thread, where it must not block, or dropped if the
    /// machine has ended.
    pub fn send_with(&self, command: Command, reply: impl FnOnce(Answer) + Send + 'static) {
        self.post(Message::Command(command, ReplyTo(Box::new(reply))));
    }

    /// Sends a command and waits for its answer.
    pub fn call(&self, command: Command, timeout: Duration) -> Answer {
        match self.send(command).recv_timeout(timeout) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => Err(CommandError::Timeout(timeout)),
            Err(RecvTimeoutError::Disconnected) => Err(CommandError::Ended),
        }
    }

    /// Sends; what cannot be sent any more is dropped, and who waits for it is told so.
    pub(super) fn post(&self, message: Message) {
        if self.sender.send(message).is_ok() {
            // Fails only if the counter is full, and then the loop is awake.
            let _ = self.wake.write(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_wakes_the_loop_and_is_answered() {
        let (control, commands) = Control::new().unwrap();
        let answer = control.send(Command::Pause);
        assert_eq!(commands.wake.read().unwrap(), 1);
        match commands.receiver.recv().unwrap() {
            Message::Command(Command::Pause, reply) => reply.give(Ok(Reply::Done)),
            _ => panic!("another message"),
        }
        assert!(matches!(answer.recv(), Ok(Ok(Reply::Done))));
    }

    #[test]
    fn nobody_waits_for_a_machine_that_has_ended() {
        let (control, commands) = Control::new().unwrap();
        let waiting = control.send(Command::Status);
        drop(commands);
        assert!(waiting.recv().is_err());
        let limit = Duration::from_secs(10);
        assert_eq!(control.call(Command::Status, limit).unwrap_err(), CommandError::Ended);
    }

    #[test]
    fn patience_ends() {
        let (control, _commands) = Control::new().unwrap();
        let limit = Duration::from_millis(10);
        assert_eq!(control.call(Command::Status, limit).unwrap_err(), CommandError::Timeout(limit));
    }
}
