//! Confinement: a VCP gives up what it does not need before it speaks to a target, a guest or a front end.
//!
//! It opens what it needs (sockets to listen on, secrets, log), then calls [`Confinement::apply`] on its only thread;
//! every thread that it starts later inherits the restrictions. In this order:
//!
//! 1. `limits`: descriptors, private memory, file size, no core dumps.
//! 2. `spaces`: own user, mount, IPC and UTS namespaces, a root directory with nothing but what it needs.
//! 3. `rights`: no capabilities, no new privileges, not traceable.
//! 4. `files`: Landlock - which files may be opened, no TCP port may be bound, no signals to others.
//! 5. `calls`: seccomp - the system calls that a VCP makes, and no others.
//!
//! A process namespace, a network namespace, a user that is nobody outside, and a control group are the business of
//! whoever starts the process: `vcp run` gives them to its VCPs.

mod calls;
mod files;
mod limits;
mod rights;
mod spaces;

use std::path::PathBuf;

/// What to do where the kernel cannot do everything.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Everything that this kernel and this user can, and say what could not be done
    #[default]
    Auto,
    /// Everything, or do not start
    Require,
    /// Nothing (for debuggers and profilers)
    Off,
}

/// What a VCP keeps.
#[derive(Clone, Debug)]
pub struct Confinement {
    /// Files, and directories with all below, that it may open for reading. What does not exist is left out.
    pub read: Vec<PathBuf>,
    /// Directories in which it may make, write, rename and remove files.
    pub write: Vec<PathBuf>,
    /// Directories from which it may remove files: those of its socket files.
    pub remove: Vec<PathBuf>,
    /// Whether it connects to local sockets from then on (of front ends that listen).
    pub local_sockets: bool,
    /// Whether it makes network sockets. If not, it uses those that it is given, which it cannot connect elsewhere.
    pub network: bool,
    /// Whether it listens on ports that are named later (of forwards that are added while it runs).
    pub listens: bool,
    /// Most descriptors at once.
    pub max_fds: u64,
    /// Most private memory in bytes: heap, stacks, anonymous mappings. Guest memory is shared and does not count.
    pub max_private_bytes: u64,
}

/// Why a process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// [`Mode::Require`], and something could not be done.
    #[error("cannot confine this process: {0} (`--confine auto` does without)")]
    Missing(String),
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Restrictions that hold.
    pub done: Vec<&'static str>,
    /// Restrictions that could not be had, with the reason.
    pub missing: Vec<String>,
}

impl Report {
    fn note<E: std::fmt::Display>(&mut self, what: &'static str, result: Result<(), E>) {
        match result {
            Ok(()) => self.done.push(what),
            Err(error) => self.missing.push(format!("{what}: {error}")),
        }
    }

    /// `yes`, `partly` or `no`, for the ready line.
    #[must_use]
    pub fn summary(&self) -> &'static str {
        match (self.done.is_empty(), self.missing.is_empty()) {
            (true, _) => "no",
            (false, true) => "yes",
            (false, false) => "partly",
        }
    }
}

impl Confinement {
    /// Files that name resolution needs. Only those that exist are opened up, so a resolver configuration that comes
    /// into being later takes effect with the next start or hand-over.
    #[must_use]
    pub fn resolver_files() -> Vec<PathBuf> {
        [
            "/etc/resolv.conf",
            "/etc/hosts",
            "/etc/nsswitch.conf",
            "/etc/host.conf",
            "/etc/gai.conf",
            "/etc/services",
        ]
        .map(PathBuf::from)
        .into()
    }

    /// Confines the calling thread and all that it will start. Call before there are other threads.
    ///
    /// # Errors
    /// With [`Mode::Require`], the first restriction that cannot be had; those before it hold all the same, so the
    /// process should end.
    pub fn apply(&self, mode: Mode) -> Result<Report, ConfineError> {
        self.apply_with(mode, false)
    }

    /// As [`apply`](Self::apply), with the two system calls of an io_uring instance where one was made before. None can be
    /// made afterwards, and what a [`Ring`](crate::uring::Ring) can do was restricted when it was made.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn apply_with(&self, mode: Mode, ring: bool) -> Result<Report, ConfineError> {
        let mut report = Report::default();
        if mode == Mode::Off {
            report.missing.push("everything: turned off".into());
            return Ok(report);
        }
        // What rustix reads from the kernel once, at its first use: it panics if that is refused then.
        let _ = rustix::param::page_size();
        limits::apply(self, &mut report);
        spaces::apply(self, &mut report);
        rights::apply(&mut report);
        files::apply(self, &mut report);
        calls::apply(self, ring, &mut report);
        match report.missing.first() {
            Some(missing) if mode == Mode::Require => Err(ConfineError::Missing(missing.clone())),
            _ => Ok(report),
        }
    }
}
