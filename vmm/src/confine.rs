//! The monitor confines itself once it has started: each kind of thread makes the system calls that it needs, and no
//! others (seccomp). What only an attacker calls ends the process.
//!
//! A thread inherits the filters of the one that starts it, so that a later one can only be narrower: [`Kind::Main`] has
//! what all threads that come later have. The one thread that starts processes ([`crate::vcp::spawn`]) comes first and has
//! no filter, since a filter cannot be taken off again and its children need other calls; nobody can make it do anything
//! but start one of its programs.
//!
//! Threads share their memory. A filter on one of them does not hold somebody who can write anywhere; it holds somebody
//! who has found one wrong call, and the list of all together is what the process can do to the host.

use seccompiler::BackendError;
use vcp_core::process::seccomp::{self, Rules, any, masked, one_of};

/// Whether to confine; by `VCP_CONFINE=off` for debuggers and profilers not.
const SWITCH: &str = "VCP_CONFINE";

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Runs a vCPU, and handles its exits.
    Vcpu,
    /// The event loop, and what it starts: threads that plug devices in, keepers, those that write snapshots.
    Main,
    /// Watches VCPs.
    Keeper,
    /// Talks to backends.
    Attach,
    /// The HTTP interface.
    Api,
}

/// Messages on connections that are there.
const TALK: &[i64] = &[
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_socketpair,
];

/// A vCPU thread sets devices up, stops their queues, and kills a backend that would touch them afterwards.
const VCPU: &[i64] = &[libc::SYS_pidfd_send_signal, libc::SYS_fallocate];

/// Connections to backends.
const CONNECT: &[i64] = &[
    libc::SYS_connect,
    libc::SYS_pidfd_send_signal,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_statx,
];

/// Sockets without a name, descriptors for processes, their threads and their end.
const KEEP: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_open,
    libc::SYS_getdents64,
    libc::SYS_statx,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_chmod,
    libc::SYS_fchmodat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_flock,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_pipe2,
    libc::SYS_waitid,
    libc::SYS_pidfd_open,
    libc::SYS_umask,
];

/// An event loop, files of snapshots, clients.
const SERVE: &[i64] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getcwd,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_msync,
    libc::SYS_mincore,
];

/// Type of KVM's ioctl requests, bits 8 to 15.
const KVM_IO: u64 = 0xae00;
/// Terminal and socket requests: is it one, raw mode and back (in both generations), how much is there to read, blocking or
/// not.
const IOCTLS: [u64; 11] = [
    libc::TCGETS,
    libc::TCSETS,
    libc::TCSETSW,
    libc::TCSETSF,
    libc::TCGETS2,
    libc::TCSETS2,
    libc::TCSETSW2,
    libc::TCSETSF2,
    libc::TIOCGWINSZ,
    libc::FIONREAD,
    libc::FIONBIO,
];

impl Kind {
    /// What it may call besides what every thread may.
    fn calls(self) -> Vec<&'static [i64]> {
        match self {
            Self::Vcpu => vec![TALK, VCPU],
            Self::Main => vec![TALK, VCPU, CONNECT, KEEP, SERVE],
            Self::Keeper => vec![TALK, KEEP, CONNECT],
            Self::Attach => vec![TALK, CONNECT],
            Self::Api => vec![TALK, SERVE, CONNECT, KEEP],
        }
    }

    /// Whether it talks to KVM.
    fn has_kvm(self) -> bool {
        matches!(self, Self::Vcpu | Self::Main | Self::Attach)
    }
}

/// Confines the calling thread, and all that it starts from now on. What a kernel cannot do is said once.
pub fn thread(kind: Kind) {
    if std::env::var(SWITCH).is_ok_and(|value| value == "off") {
        return;
    }
    match rules(kind).map_err(Into::into).and_then(seccomp::install) {
        Ok(()) => tracing::debug!(?kind, "system calls of the thread are confined"),
        Err(error) => tracing::warn!(?kind, %error, "not confined: system calls (seccomp)"),
    }
}

fn rules(kind: Kind) -> Result<Rules, BackendError> {
    let mut rules = seccomp::common()?;
    for calls in kind.calls() {
        rules.extend(any(calls));
    }
    let mut ioctls = one_of(1, IOCTLS)?;
    if kind.has_kvm() {
        ioctls.extend(masked(1, 0xff00, KVM_IO)?);
    }
    rules.insert(libc::SYS_ioctl, ioctls);
    // Names of threads, and what another filter needs.
    let options = [libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS, libc::PR_GET_NO_NEW_PRIVS];
    rules.insert(libc::SYS_prctl, one_of(0, options.map(|option| option as u64))?);
    // A vCPU starts no thread, opens no socket, and has no filter after this one.
    if kind != Kind::Vcpu {
        rules.extend(seccomp::threads()?);
        rules.insert(libc::SYS_socket, one_of(0, [libc::AF_UNIX as u64])?);
        // A filter can only make it less.
        rules.insert(libc::SYS_seccomp, Vec::new());
    }
    Ok(rules)
}

#[cfg(test)]
#[path = "confine_tests.rs"]
mod tests;
