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

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as If,
    SeccompFilter, SeccompRule, TargetArch,
};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

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

/// Memory, time, waiting, descriptors that are there: every thread.
const COMMON: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_eventfd2,
    libc::SYS_restart_syscall,
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getcpu,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_geteuid,
    libc::SYS_getegid,
    libc::SYS_getuid,
    libc::SYS_getgid,
    libc::SYS_getrandom,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_time,
];

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

/// Calls that end the process.
const DEADLY: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_open_by_handle_at,
    libc::SYS_userfaultfd,
    libc::SYS_setuid,
    libc::SYS_setresuid,
    libc::SYS_setgid,
    libc::SYS_setresgid,
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
    fn calls(self) -> Vec<&'static [i64]> {
        match self {
            Self::Vcpu => vec![COMMON, TALK, VCPU],
            Self::Main => vec![COMMON, TALK, VCPU, CONNECT, KEEP, SERVE],
            Self::Keeper => vec![COMMON, TALK, KEEP, CONNECT],
            Self::Attach => vec![COMMON, TALK, CONNECT],
            Self::Api => vec![COMMON, TALK, SERVE, CONNECT, KEEP],
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
    let install = || -> Result<(), seccompiler::Error> {
        for filter in filters(kind)? {
            seccompiler::apply_filter(&filter)?;
        }
        Ok(())
    };
    match install() {
        Ok(()) => tracing::debug!(?kind, "system calls of the thread are confined"),
        Err(error) => tracing::warn!(?kind, %error, "not confined: system calls (seccomp)"),
    }
}

fn filters(kind: Kind) -> Result<[BpfProgram; 3], seccompiler::BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = |rules, otherwise, on_match| -> Result<BpfProgram, seccompiler::BackendError> {
        SeccompFilter::new(rules, otherwise, on_match, arch)?.try_into()
    };
    let any = |calls: &[i64]| -> Rules { calls.iter().map(|&call| (call, Vec::new())).collect() };
    let mut allowed = Rules::new();
    for calls in kind.calls() {
        allowed.extend(any(calls));
    }
    allowed.extend(rules(kind)?);
    // What ends the process must pass here, or it would only be refused.
    allowed.extend(any(DEADLY));
    // `clone3`, whose arguments a filter cannot see, does not exist: the C library falls back to `clone`. The list last: it
    // refuses the calls that install a filter, unless the thread starts others that are narrower still.
    Ok([
        filter(any(&[libc::SYS_clone3]), SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?,
        filter(any(DEADLY), SeccompAction::Allow, SeccompAction::KillProcess)?,
        filter(allowed, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)?,
    ])
}

fn rules(kind: Kind) -> Result<Rules, seccompiler::BackendError> {
    let one = |conditions: Vec<If>| SeccompRule::new(conditions);
    let equal = |arg, value| If::new(arg, Len::Dword, Op::Eq, value);
    let mut rules = Rules::new();
    let exec = libc::PROT_EXEC as u64;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![one(vec![If::new(2, Len::Dword, Op::MaskedEq(exec), 0)?])?]);
    }
    let mut ioctls: Vec<SeccompRule> =
        IOCTLS.iter().map(|request| one(vec![equal(1, *request)?])).collect::<Result<_, _>>()?;
    if kind.has_kvm() {
        ioctls.push(one(vec![If::new(1, Len::Dword, Op::MaskedEq(0xff00), KVM_IO)?])?);
    }
    rules.insert(libc::SYS_ioctl, ioctls);
    // Threads, no processes; a vCPU starts neither.
    if kind != Kind::Vcpu {
        let thread = libc::CLONE_THREAD as u64;
        rules
            .insert(libc::SYS_clone, vec![one(vec![If::new(0, Len::Dword, Op::MaskedEq(thread), thread)?])?]);
        let unix = libc::AF_UNIX as u64;
        rules.insert(libc::SYS_socket, vec![one(vec![equal(0, unix)?])?]);
    }
    // Names of threads, and what another filter needs.
    let options = [libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS, libc::PR_GET_NO_NEW_PRIVS];
    let options = options.map(|option| one(vec![equal(0, option as u64)?]));
    rules.insert(libc::SYS_prctl, options.into_iter().collect::<Result<_, _>>()?);
    // A filter can only make it less.
    if kind != Kind::Vcpu {
        rules.insert(libc::SYS_seccomp, Vec::new());
    }
    // Reading limits, not setting them.
    rules.insert(libc::SYS_prlimit64, vec![one(vec![If::new(2, Len::Qword, Op::Eq, 0)?])?]);
    // To threads of this process: kicks of vCPUs, and `abort`.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![one(vec![equal(0, own)?])?]);
    Ok(rules)
}

#[cfg(test)]
#[path = "confine_tests.rs"]
mod tests;
