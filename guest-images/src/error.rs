//! The one error type of this crate.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// What went wrong while an image was built or a virtual machine ran.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A program or file of the host is not there.
    #[error("{what} not found; install the Debian package {package}")]
    Missing {
        /// The program or file.
        what: String,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A kernel module is neither built in nor installed.
    #[error("kernel module {module} is not in /lib/modules/{version}")]
    NoModule {
        /// Name of the module.
        module: String,
        /// Kernel release.
        version: String,
    },
    /// A file operation failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A path cannot be part of an image.
    #[error("{path:?} cannot be a path in an image: {reason}")]
    Path {
        /// The path.
        path: String,
        /// Why.
        reason: &'static str,
    },
    /// A file is too large for the cpio format (4 GiB - 1).
    #[error("{path} has {len_bytes} bytes; the cpio format ends at 4 GiB")]
    TooLarge {
        /// Path in the archive.
        path: String,
        /// Its size.
        len_bytes: u64,
    },
    /// A program was started and failed.
    #[error("{program} failed ({status}): {output}")]
    Program {
        /// Name of the program.
        program: String,
        /// Its exit status.
        status: String,
        /// The end of what it printed.
        output: String,
    },
    /// A virtual machine did not finish in time and was killed.
    #[error("{what} did not end within {} s; last output: {tail}", deadline.as_secs_f32())]
    Deadline {
        /// Which machine.
        what: String,
        /// The time it had.
        deadline: Duration,
        /// The end of its console output.
        tail: String,
    },
    /// A virtual machine ended without the line that carries the job's exit status.
    #[error("{what} ended ({status}) without telling the exit status of its job; last output: {tail}")]
    NoStatus {
        /// Which machine.
        what: String,
        /// Exit status of its process.
        status: String,
        /// The end of its console output.
        tail: String,
    },
}

impl Error {
    /// Returns a closure for `map_err` that says what was done to which file.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

/// Returns the last `lines` lines of `text` on one line, for an error message.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().map(str::trim_end).filter(|l| !l.is_empty()).collect();
    all[all.len().saturating_sub(lines)..].join(" | ")
}
