//! What every VCP binary does as a process: logging, signals, the parent's death, and how errors are printed.

pub mod confine;
mod log;
pub mod named;
pub mod notify;
pub mod seccomp;
mod signals;

pub use log::{LOG_FORMAT_VARIABLE, LogError, LogFormat, init_log, init_log_as, log_format, set_log_level};
pub use signals::Signals;

use std::error::Error;

use rustix::process::{Signal, getppid, getsid, set_parent_process_death_signal};

/// An error and its causes in one line. A cause whose text its parent already ends with is not repeated.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    // One line, whatever a peer put into a message.
    text.replace(['\n', '\r'], " ")
}

/// `--exit-with-parent`: SIGTERM when the parent dies. False if it is already gone, and the caller should end at once.
///
/// # Errors
/// The system refused.
pub fn exit_with_parent() -> rustix::io::Result<bool> {
    let parent = getppid();
    set_parent_process_death_signal(Some(Signal::TERM))?;
    // It may have died before the call, and then we have a new parent; or even before we first looked, and then we
    // have init for a parent, whose session is not ours (unless init really started us, as in a container).
    let orphan = parent.is_some_and(|pid| pid.is_init() && getsid(Some(pid)).ok() != getsid(None).ok());
    Ok(getppid() == parent && !orphan)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_chain_is_one_line() {
        let error = Outer(std::io::Error::other("inner\nwith a break"));
        assert_eq!(chain(&error), "outer: inner with a break");
    }
}
