//! seccomp filters as every confined process of the system has them, VCPs ([`super::confine`]) and the monitor alike: what any
//! thread may call, what ends the process, and how lists become filters. Which calls a kind of process or thread has
//! besides is its own matter.
//!
//! Three filters; the strictest answer counts. Calls that only an attacker makes end the process, so that whoever
//! supervises it hears of it. `clone3`, whose arguments a filter cannot see, does not exist, and the C library falls
//! back to `clone`, whose flags it can see: threads, no processes. Everything else that is not on the list is refused
//! with `EPERM`, which costs an unforeseen path of a library its result, not the guest its device.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op,
    SeccompCondition as If, SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

/// Allowed calls; with an empty list of rules for any arguments, else if one of the rules fits.
pub type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Memory, time, waiting, descriptors that are there: every thread. (`common` has more of it, with conditions.)
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
];

/// Older forms that the C library still uses on this architecture.
#[cfg(target_arch = "x86_64")]
const COMMON_HERE: &[i64] = &[libc::SYS_poll, libc::SYS_time];
#[cfg(not(target_arch = "x86_64"))]
const COMMON_HERE: &[i64] = &[];

/// Calls that end the process.
const DEADLY: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
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
#[cfg(target_arch = "x86_64")]
const DEADLY_HERE: &[i64] = &[libc::SYS_fork, libc::SYS_vfork];
#[cfg(not(target_arch = "x86_64"))]
const DEADLY_HERE: &[i64] = &[];

/// These calls, whatever their arguments.
pub fn any(calls: &[i64]) -> Rules {
    calls.iter().map(|&call| (call, Vec::new())).collect()
}

/// One rule for each of `values`: argument `arg` (0 to 5; its lower 32 bits) is that.
///
/// # Errors
/// There is no such argument.
pub fn one_of(arg: u8, values: impl IntoIterator<Item = u64>) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |value| SeccompRule::new(vec![If::new(arg, Len::Dword, Op::Eq, value)?]);
    values.into_iter().map(rule).collect()
}

/// One rule: the bits `mask` of argument `arg` (0 to 5; its lower 32 bits) are `value`.
///
/// # Errors
/// There is no such argument.
pub fn masked(arg: u8, mask: u64, value: u64) -> Result<Vec<SeccompRule>, BackendError> {
    Ok(vec![SeccompRule::new(vec![If::new(arg, Len::Dword, Op::MaskedEq(mask), value)?])?])
}

/// What every thread may call.
///
/// # Errors
/// None that the arguments here can cause.
pub fn common() -> Result<Rules, BackendError> {
    let mut rules = any(COMMON);
    rules.extend(any(COMMON_HERE));
    // No memory that is executable: code stays what was loaded.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, masked(2, libc::PROT_EXEC as u64, 0)?);
    }
    // Reading limits (the new ones are a null pointer), not setting them.
    let reads = SeccompRule::new(vec![If::new(2, Len::Qword, Op::Eq, 0)?])?;
    rules.insert(libc::SYS_prlimit64, vec![reads]);
    // To threads of this process, as `abort` does.
    rules.insert(libc::SYS_tgkill, one_of(0, [u64::from(std::process::id())])?);
    Ok(rules)
}

/// `clone` for threads, not for processes.
///
/// # Errors
/// None that the arguments here can cause.
pub fn threads() -> Result<Rules, BackendError> {
    let thread = libc::CLONE_THREAD as u64;
    Ok(Rules::from([(libc::SYS_clone, masked(0, thread, thread)?)]))
}

/// Allows the calling thread, and what it starts from now on, these calls and no others.
///
/// # Errors
/// The kernel has no such filters, or refuses them to this process.
pub fn install(allowed: Rules) -> Result<(), Error> {
    for filter in filters(allowed)? {
        apply_filter(&filter)?;
    }
    Ok(())
}

fn filters(mut allowed: Rules) -> Result<[BpfProgram; 3], BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = |rules, otherwise, on_match| -> Result<BpfProgram, BackendError> {
        SeccompFilter::new(rules, otherwise, on_match, arch)?.try_into()
    };
    let mut deadly = any(DEADLY);
    deadly.extend(any(DEADLY_HERE));
    // What ends the process must pass the last filter, or it would only be refused.
    allowed.extend(deadly.clone());
    // The list last: it refuses the calls that install a filter, unless it has them.
    Ok([
        filter(any(&[libc::SYS_clone3]), SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?,
        filter(deadly, SeccompAction::Allow, SeccompAction::KillProcess)?,
        filter(allowed, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)?,
    ])
}
