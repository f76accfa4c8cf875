//! `clone3`, and the child between it and `execve`.
//!
//! UNSAFE: everything after `clone3` runs in a copy of a process with many threads. It may only make system calls and
//! read what was prepared. No allocation, no lock, no panic, no destructor.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::Prepared;

/// `struct clone_args` of Linux 5.7.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// Threads and processes of a VCP at most, counted in its own user namespace.
const MAX_TASKS: libc::rlim_t = 64;
const CLOSE_RANGE_CLOEXEC: libc::c_uint = 1 << 2;

/// Makes the child; it waits for a byte before it does anything.
pub(super) fn clone(prepared: &Prepared, flags: u64, cgroup: Option<&OwnedFd>) -> io::Result<(u32, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    let args = CloneArgs {
        flags: flags
            | libc::CLONE_PIDFD as u64
            | CLONE_CLEAR_SIGHAND
            | if cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 },
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: cgroup.map_or(0, |cgroup| cgroup.as_raw_fd() as u64),
        ..CloneArgs::default()
    };
    // No handler of the monitor may run in the child: it would speak for the monitor.
    let masked = Masked::all();
    // SAFETY: without CLONE_VM the child has a copy of everything and runs on in it; with `stack` 0 on a copy of this
    // stack. `args` and `pidfd` live until the call returns. In the child nothing but `run` follows, which never returns.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    if pid == 0 {
        run(prepared)
    }
    let result = match u32::try_from(pid) {
        // SAFETY: the kernel has stored a new descriptor that nobody else owns.
        Ok(pid) => Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) })),
        Err(_) => Err(io::Error::last_os_error()),
    };
    drop(masked);
    result
}

/// All signals blocked, until dropped.
struct Masked(libc::sigset_t);

impl Masked {
    fn all() -> Self {
        // SAFETY: both sets are valid storage for the calls, which initialise them.
        unsafe {
            let (mut all, mut old) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
            Self(old)
        }
    }
}

impl Drop for Masked {
    fn drop(&mut self) {
        // SAFETY: the set was filled in by the kernel.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

/// The child.
fn run(prepared: &Prepared) -> ! {
    // SAFETY: system calls with descriptors and memory that `prepared` holds and that this copy of the process keeps until
    // `execve` replaces it; nothing of it is dropped, because this never returns.
    unsafe {
        // Before the wait: who dies from here on takes the child along.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let mut byte = 0u8;
        if libc::read(prepared.go.as_raw_fd(), (&raw mut byte).cast(), 1) != 1 {
            libc::_exit(127);
        }
        if prepared.own_user {
            // From here on it is who it was mapped to be. Where groups may not be changed, they are not ours.
            libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>());
            if libc::syscall(libc::SYS_setresgid, 0, 0, 0) != 0
                || libc::syscall(libc::SYS_setresuid, 0, 0, 0) != 0
            {
                fail(prepared);
            }
            let tasks = libc::rlimit { rlim_cur: MAX_TASKS, rlim_max: MAX_TASKS };
            libc::setrlimit(libc::RLIMIT_NPROC, &raw const tasks);
            // Forgotten by the kernel with a change of user.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        }
        // A process group of its own: Ctrl-C at the monitor's terminal is for the monitor, which ends its VCPs in order.
        libc::setpgid(0, 0);
        if prepared.nodes != 0 {
            // A preference, kept across `execve`. A kernel without NUMA refuses it and has one node.
            let bits = libc::c_ulong::BITS as libc::c_ulong + 1;
            libc::syscall(libc::SYS_set_mempolicy, libc::MPOL_PREFERRED, &raw const prepared.nodes, bits);
        }
        if prepared.nice != 0 {
            // Below the monitor's own, whatever that is: what counts are the steps between those that share a thread.
            libc::nice(prepared.nice);
        }
        let mut place: RawFd = 0;
        for fd in &prepared.fds {
            if libc::dup2(fd.as_raw_fd(), place) < 0 {
                fail(prepared);
            }
            place += 1;
        }
        // Whatever else is open without close-on-exec ends with `execve`.
        libc::syscall(libc::SYS_close_range, place as libc::c_uint, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        // Rust programs ignore it, and what is ignored stays so.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let (argv, envp) = (prepared.argv.as_ptr(), prepared.envp.as_ptr());
        if let Some(program) = &prepared.program {
            let flags = libc::AT_EMPTY_PATH;
            libc::syscall(libc::SYS_execveat, program.as_raw_fd(), c"".as_ptr(), argv, envp, flags);
        }
        // A script: its interpreter opens it by name.
        libc::execve(prepared.path.as_ptr(), argv, envp);
        fail(prepared)
    }
}

/// Says why there was no `execve`.
///
/// # Safety
/// As [`run`].
unsafe fn fail(prepared: &Prepared) -> ! {
    let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO).to_ne_bytes();
    // SAFETY: the buffer is four bytes on this stack.
    unsafe {
        libc::write(prepared.report.as_raw_fd(), errno.as_ptr().cast(), errno.len());
        libc::_exit(127)
    }
}
