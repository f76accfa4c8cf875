//! The one error type of this crate. Messages say what failed and on what; the binary prints the chain as one line.

use std::path::PathBuf;
use std::time::Duration;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in the monitor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A command-line option or configuration value is not usable; the text says which and what to write instead.
    #[error("{0}")]
    Usage(String),
    /// A file named by the user cannot be used.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried, e.g. `open the kernel`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The TOML file of the virtual machine is wrong.
    #[error("cannot read the configuration {path}: {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// Line and reason, on one line.
        reason: String,
    },
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm: {hint}")]
    KvmOpen {
        /// What to do about it.
        hint: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// A KVM call failed.
    #[error("KVM refused to {action}")]
    Kvm {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// Guest memory cannot be had.
    #[error("cannot get {bytes} bytes of guest memory: {hint}")]
    Memory {
        /// Size asked for.
        bytes: u64,
        /// What to do about it.
        hint: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// An access to guest memory by the monitor failed: an address outside of it.
    #[error("guest memory at {addr:#x} cannot be accessed")]
    GuestMemory {
        /// Guest physical address.
        addr: u64,
    },
    /// The kernel file is not something that can be booted.
    #[error("{path} is not a bootable kernel ({reason}): give an x86-64 bzImage or ELF file")]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Kernel, initrd and command line do not fit.
    #[error(
        "{memory_mib} MiB of memory is too small for {what}: it needs at least {needed_mib} MiB, give --memory {needed_mib}M or more"
    )]
    TooSmall {
        /// Memory below 3 GiB, MiB.
        memory_mib: u64,
        /// What has no room.
        what: &'static str,
        /// What would do, MiB.
        needed_mib: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the kernel command line has {len_bytes} bytes, the kernel takes at most {max_bytes}")]
    CmdlineTooLong {
        /// Its length.
        len_bytes: usize,
        /// The kernel's limit.
        max_bytes: usize,
    },
    /// An operating-system call failed.
    #[error("cannot {action}")]
    Os {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// Nothing can be listened on there.
    #[error("cannot listen on {at}")]
    Listen {
        /// Address or path.
        at: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A vhost-user backend cannot be reached.
    #[error("{device}: cannot connect to the vhost-user socket {path}: {hint}")]
    Connect {
        /// Device name, e.g. `disk0`.
        device: String,
        /// The socket.
        path: PathBuf,
        /// What to try.
        hint: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// A vhost-user backend answered with an error or broke the connection.
    #[error("{device}: the vhost-user backend failed at {request}")]
    Backend {
        /// Device name.
        device: String,
        /// The vhost-user request.
        request: &'static str,
        /// What came back.
        source: vhost::Error,
    },
    /// A vhost-user backend did not answer.
    #[error(
        "{device}: the vhost-user backend did not answer {request} within {timeout:?}: is it hung, or serving another front end?"
    )]
    BackendTimeout {
        /// Device name.
        device: String,
        /// The vhost-user request.
        request: &'static str,
        /// How long it had.
        timeout: Duration,
    },
    /// A vhost-user backend lacks something that the device needs.
    #[error("{device}: the vhost-user backend {reason}")]
    BackendLacks {
        /// Device name.
        device: String,
        /// What it lacks.
        reason: String,
    },
    /// A vhost-user backend is gone, and none can take its place.
    #[error("{device}: the vhost-user backend {reason}")]
    Unrecoverable {
        /// Device name.
        device: String,
        /// Why not.
        reason: String,
    },
    /// A VCP process could not be started.
    #[error("{device}: {reason}")]
    Vcp {
        /// Device name.
        device: String,
        /// What happened.
        reason: String,
    },
    /// A snapshot cannot be written, or is not one that can be restored; the text says why.
    #[error("snapshot: {0}")]
    Snapshot(String),
    /// A signal asked the run to end before it began; no failure.
    #[error("interrupted while the virtual machine was starting")]
    Interrupted,
    /// The driver set up its device wrongly.
    #[error("{device}: the guest's driver {reason}")]
    Driver {
        /// Device name.
        device: String,
        /// What it did.
        reason: String,
    },
    /// The guest ended in a way that is not success.
    #[error("{0}")]
    GuestFailed(String),
}

impl Error {
    /// A failed KVM call.
    pub fn kvm(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
        move |source| Error::Kvm { action, source: std::io::Error::from_raw_os_error(source.errno()) }
    }

    /// A failed operating-system call.
    pub fn os<E: Into<std::io::Error>>(action: &'static str) -> impl FnOnce(E) -> Error {
        move |source| Error::Os { action, source: source.into() }
    }

    /// True where the user wrote something wrong (exit code 2).
    pub fn is_usage(&self) -> bool {
        matches!(self, Error::Usage(_) | Error::Config { .. })
    }
}
