//! seccomp: the system calls that a VCP makes.
//!
//! Three filters; the strictest answer counts. Calls that only an attacker makes end the process, so that whoever
//! supervises it hears of it. `clone3`, whose arguments a filter cannot see, does not exist, and the C library falls
//! back to `clone`, whose flags it can see: threads, no processes. Everything else that is not on the list is refused
//! with `EPERM`, which costs an unforeseen path of a library its result, not the guest its disk.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as If,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

use super::{Confinement, Report};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Calls that are allowed with any arguments.
const ALLOWED: &[i64] = &[
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Files and descriptors; Landlock says which files.
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_memfd_create,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pread64,
    // A msgq bell that is shared with its waker.
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_statx,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
    // Sockets; which families, `rules` says.
    libc::SYS_accept4,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    // Threads; `rules` has `clone`.
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getcpu,
    libc::SYS_getpid,
    libc::SYS_getppid,
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
    // Time, and what tells nothing about others.
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_getuid,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// Older forms that the C library still uses on this architecture.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[i64] = &[
    libc::SYS_access,
    libc::SYS_dup2,
    libc::SYS_epoll_wait,
    libc::SYS_open,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_time,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[i64] = &[];

/// Of an io_uring instance that is there already; none can be made.
const RING: &[i64] = &[libc::SYS_io_uring_enter, libc::SYS_io_uring_register];

/// Calls that end the process.
const DEADLY: &[i64] = &[
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_delete_module,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setns,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];

/// `ioctl` requests: is it a terminal, how much is there to read, non-blocking mode.
const IOCTLS: [u64; 3] = [libc::TCGETS, libc::FIONREAD, libc::FIONBIO];

pub(super) fn apply(confinement: &Confinement, ring: bool, report: &mut Report) {
    let install = || -> Result<(), seccompiler::Error> {
        for filter in filters(confinement, ring)? {
            apply_filter(&filter)?;
        }
        Ok(())
    };
    report.note("system calls (seccomp)", install());
}

fn filters(confinement: &Confinement, ring: bool) -> Result<[BpfProgram; 3], seccompiler::BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = |rules, otherwise, on_match| -> Result<BpfProgram, seccompiler::BackendError> {
        SeccompFilter::new(rules, otherwise, on_match, arch)?.try_into()
    };
    let any = |calls: &[i64]| -> Rules { calls.iter().map(|&call| (call, Vec::new())).collect() };
    let mut allowed = any(ALLOWED);
    allowed.extend(any(ALLOWED_HERE));
    if ring {
        allowed.extend(any(RING));
    }
    allowed.extend(rules(confinement)?);
    // What ends the process must pass here, or it would only be refused.
    allowed.extend(any(DEADLY));
    // The list last: it refuses the calls that install a filter.
    Ok([
        filter(any(&[libc::SYS_clone3]), SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?,
        filter(any(DEADLY), SeccompAction::Allow, SeccompAction::KillProcess)?,
        filter(allowed, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)?,
    ])
}

/// Calls that are allowed with some arguments only.
fn rules(confinement: &Confinement) -> Result<Rules, seccompiler::BackendError> {
    let one = |conditions: Vec<If>| SeccompRule::new(conditions);
    let equal = |arg, value| If::new(arg, Len::Dword, Op::Eq, value);
    let mut rules = Rules::new();
    // No memory that is executable: code stays what was loaded.
    let exec = libc::PROT_EXEC as u64;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![one(vec![If::new(2, Len::Dword, Op::MaskedEq(exec), 0)?])?]);
    }
    // Threads, no processes.
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![one(vec![If::new(0, Len::Dword, Op::MaskedEq(thread), thread)?])?]);
    let mut families = Vec::new();
    if confinement.network {
        // To targets, and the netlink socket with which the resolver looks which address families there are.
        families.extend([libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK]);
        rules.insert(libc::SYS_bind, Vec::new());
    }
    if confinement.local_sockets {
        families.push(libc::AF_UNIX);
    }
    if families.is_empty() {
        // A socket that was connected by somebody else could be connected anew.
        let fast_open = libc::MSG_FASTOPEN as u64;
        for (call, flags) in [(libc::SYS_sendto, 3), (libc::SYS_sendmsg, 2), (libc::SYS_sendmmsg, 3)] {
            rules.insert(call, vec![one(vec![If::new(flags, Len::Dword, Op::MaskedEq(fast_open), 0)?])?]);
        }
    } else {
        rules.insert(libc::SYS_connect, Vec::new());
        for call in [libc::SYS_sendto, libc::SYS_sendmsg, libc::SYS_sendmmsg] {
            rules.insert(call, Vec::new());
        }
    }
    if !families.is_empty() {
        let families = families.into_iter().map(|family| one(vec![equal(0, family as u64)?]));
        rules.insert(libc::SYS_socket, families.collect::<Result<_, _>>()?);
    }
    if confinement.listens {
        rules.insert(libc::SYS_listen, Vec::new());
    }
    let ioctls = IOCTLS.map(|request| one(vec![equal(1, request)?]));
    rules.insert(libc::SYS_ioctl, ioctls.into_iter().collect::<Result<_, _>>()?);
    // Names of threads; that what is not dumpable stays so is not theirs to change.
    rules.insert(libc::SYS_prctl, vec![one(vec![equal(0, libc::PR_SET_NAME as u64)?])?]);
    // Reading limits (the new ones are a null pointer), not setting them.
    rules.insert(libc::SYS_prlimit64, vec![one(vec![If::new(2, Len::Qword, Op::Eq, 0)?])?]);
    // To itself, as `abort` does.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![one(vec![equal(0, own)?])?]);
    Ok(rules)
}
