//! seccomp: the system calls that a VCP makes, besides those of every thread (`process::seccomp`, which also has what the
//! filters do with the others).

use seccompiler::BackendError;

use super::{Confinement, Report};
use crate::process::seccomp::{self, Rules, any, masked, one_of};

/// Calls that are allowed with any arguments.
const ALLOWED: &[i64] = &[
    // Files and descriptors; Landlock says which files.
    libc::SYS_dup3,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_memfd_create,
    libc::SYS_openat,
    // A msgq bell that is shared with its waker.
    libc::SYS_preadv2,
    libc::SYS_readlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_statx,
    libc::SYS_unlinkat,
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
    libc::SYS_pipe2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    // What tells nothing about others.
    libc::SYS_getppid,
    libc::SYS_getrusage,
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
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[i64] = &[];

/// Of an io_uring instance that is there already; none can be made.
const RING: &[i64] = &[libc::SYS_io_uring_enter, libc::SYS_io_uring_register];

/// `ioctl` requests: is it a terminal, how much is there to read, non-blocking mode.
const IOCTLS: [u64; 3] = [libc::TCGETS, libc::FIONREAD, libc::FIONBIO];

pub(super) fn apply(confinement: &Confinement, ring: bool, report: &mut Report) {
    let installed = rules(confinement, ring).map_err(Into::into).and_then(seccomp::install);
    report.note("system calls (seccomp)", installed);
}

fn rules(confinement: &Confinement, ring: bool) -> Result<Rules, BackendError> {
    let mut rules = seccomp::common()?;
    rules.extend(any(ALLOWED));
    rules.extend(any(ALLOWED_HERE));
    if ring {
        rules.extend(any(RING));
    }
    rules.extend(seccomp::threads()?);
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
            rules.insert(call, masked(flags, fast_open, 0)?);
        }
    } else {
        rules.extend(any(&[libc::SYS_connect, libc::SYS_sendto, libc::SYS_sendmsg, libc::SYS_sendmmsg]));
        rules.insert(libc::SYS_socket, one_of(0, families.into_iter().map(|family| family as u64))?);
    }
    if confinement.listens {
        rules.insert(libc::SYS_listen, Vec::new());
    }
    rules.insert(libc::SYS_ioctl, one_of(1, IOCTLS)?);
    // Names of threads; that what is not dumpable stays so is not theirs to change.
    rules.insert(libc::SYS_prctl, one_of(0, [libc::PR_SET_NAME as u64])?);
    Ok(rules)
}
