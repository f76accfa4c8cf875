//! Starts the process of a VCP: one `clone3` that gives it namespaces of its own, a user of its own and a control group,
//! and a descriptor by which it is known (a process id can be used again; a pidfd cannot).
//!
//! All processes are started by one thread that lives as long as the monitor. A child asks to be killed when its parent
//! dies, and the kernel means the *thread* that made it. The same thread is the only one that needs `execve`.
//!
//! What happens in the child before `execve` is in `child`: system calls, and nothing else. It is a copy of a process
//! with many threads, of which it has one: a lock that another one held, the allocator's for instance, is never released.
#![allow(unsafe_code)] // clone3 and what a child does before execve have no safe wrappers.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::fs::{Mode, OFlags};

mod child;

/// Which namespaces of its own a process gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spaces {
    /// Users: what is root in it is nobody outside.
    pub user: bool,
    /// Mounts.
    pub mount: bool,
    /// Process ids: it sees itself, and nobody.
    pub pid: bool,
    /// System V IPC and POSIX message queues.
    pub ipc: bool,
    /// Host name.
    pub uts: bool,
    /// Network: without any interface that is up.
    pub net: bool,
}

impl Spaces {
    /// None.
    pub const NONE: Self = Self { user: false, mount: false, pid: false, ipc: false, uts: false, net: false };
    /// All but the network.
    pub const LOCAL: Self = Self { user: true, mount: true, pid: true, ipc: true, uts: true, net: false };

    fn flags(self) -> u64 {
        let pairs = [
            (self.user, libc::CLONE_NEWUSER),
            (self.mount, libc::CLONE_NEWNS),
            (self.pid, libc::CLONE_NEWPID),
            (self.ipc, libc::CLONE_NEWIPC),
            (self.uts, libc::CLONE_NEWUTS),
            (self.net, libc::CLONE_NEWNET),
        ];
        pairs.iter().filter(|(on, _)| *on).fold(0, |flags, (_, flag)| flags | *flag as u64)
    }

    /// The names of those it has.
    pub fn names(self) -> Vec<&'static str> {
        let pairs = [
            (self.user, "user"),
            (self.mount, "mount"),
            (self.pid, "pid"),
            (self.ipc, "ipc"),
            (self.uts, "uts"),
            (self.net, "net"),
        ];
        pairs.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect()
    }
}

/// What a process is started with.
#[derive(Debug)]
pub struct Plan {
    /// The program; a name without a slash is looked for on the PATH.
    pub program: std::path::PathBuf,
    /// Its arguments, without its name.
    pub args: Vec<std::ffi::OsString>,
    /// Its whole environment.
    pub env: Vec<(std::ffi::OsString, std::ffi::OsString)>,
    /// Its descriptors, numbered from 0. It has no others.
    pub fds: Vec<OwnedFd>,
    /// Namespaces that it should have. Those that the kernel refuses are left out.
    pub spaces: Spaces,
    /// The network's is not left out: the process is not started without.
    pub needs_net: bool,
    /// With a user namespace: the user and group that it is outside, if the monitor is root; else it is the monitor's.
    pub outer_id: u32,
    /// NUMA node that its memory comes from, as long as that has some.
    pub node: Option<usize>,
    /// Directory of its control group.
    pub cgroup: Option<OwnedFd>,
    /// How many steps its priority is below the monitor's, 0 to 19; 19 is the lowest there is.
    pub nice: i32,
}

/// A process that was started. Its end must be waited for by [`Spawned::status`], or it stays as a zombie.
#[derive(Debug)]
pub struct Spawned {
    /// Its number, as the monitor sees it.
    pub pid: u32,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// The namespaces that it has.
    pub spaces: Spaces,
    /// Whether it is in the control group that it was to be in.
    pub in_cgroup: bool,
    /// What could not be had, with the reason.
    pub missing: Vec<String>,
}

/// A plan, and the way back to who has it.
pub type Order = (Plan, SyncSender<io::Result<Spawned>>);

/// Starts a process, on the thread that does that.
///
/// # Errors
/// It could not be started: no such program, no right to run it, no namespace that it must have.
pub fn spawn(plan: Plan) -> io::Result<Spawned> {
    let (reply, answer) = sync_channel(1);
    let gone = || io::Error::other("the thread that starts processes is gone");
    prepare().lock().unwrap_or_else(PoisonError::into_inner).send((plan, reply)).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

/// Starts the thread that starts processes, if it was not yet. It keeps what the caller may do now.
pub fn prepare() -> &'static Mutex<Sender<Order>> {
    static SPAWNER: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (sender, orders) = channel::<Order>();
        let started = std::thread::Builder::new().name("vcp-spawn".into()).spawn(move || {
            for (plan, reply) in orders {
                let _ = reply.send(start(&plan));
            }
        });
        if let Err(error) = started {
            tracing::error!(%error, "the thread that starts processes cannot be started");
        }
        Mutex::new(sender)
    })
}

/// What the child reads, made before it exists: it must not allocate.
struct Prepared {
    program: Option<OwnedFd>,
    path: CString,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    /// Copies of the descriptors, with numbers that none of their places in the child has.
    fds: Vec<OwnedFd>,
    go: OwnedFd,
    report: OwnedFd,
    own_user: bool,
    /// Nodes as bits; 0: none is preferred.
    nodes: u64,
    nice: i32,
    _strings: Vec<CString>,
}

fn start(plan: &Plan) -> io::Result<Spawned> {
    let path = find(&plan.program)?;
    // By descriptor: a user of its own may run what it may not reach.
    let program = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok();
    let string = |text: &OsStr| CString::new(text.as_bytes()).map_err(io::Error::other);
    let mut strings = vec![string(path.as_os_str())?];
    for arg in &plan.args {
        strings.push(string(arg)?);
    }
    let args = strings.len();
    for (name, value) in &plan.env {
        let pair = [name.as_bytes(), b"=", value.as_bytes()].concat();
        strings.push(CString::new(pair).map_err(io::Error::other)?);
    }
    let pointers = |strings: &[CString]| -> Vec<_> {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(&strings[..args]), pointers(&strings[args..]));
    // Above every number that they will have in the child.
    let least = plan.fds.len() as RawFd + 3;
    let fds = plan.fds.iter().map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, least));
    let fds = fds.collect::<Result<Vec<_>, _>>()?;
    let high = |fd: OwnedFd| rustix::io::fcntl_dupfd_cloexec(&fd, least);
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let (go, let_go) = pipe()?;
    let (report, reporter) = pipe()?;
    let mut prepared = Prepared {
        program: program.map(high).transpose()?,
        path: string(path.as_os_str())?,
        argv,
        envp,
        fds,
        go: high(go)?,
        report: high(reporter)?,
        own_user: false,
        nodes: plan.node.filter(|node| *node < 64).map_or(0, |node| 1 << node),
        nice: plan.nice,
        _strings: strings,
    };
    let spawned = clone_with(&mut prepared, plan)?;
    drop(prepared);
    let result = if spawned.spaces.user { map_users(spawned.pid, plan.outer_id) } else { Ok(()) };
    if let Err(error) = &result {
        tracing::debug!(%error, "cannot map the users of a process");
    } else {
        // Its parent is there and has done its part.
        rustix::io::write(&let_go, &[1])?;
    }
    drop(let_go);
    // Closed by `execve`; else it says why there was none.
    let mut why = [0u8; 4];
    let failed = match rustix::io::read(&report, &mut why) {
        Ok(4) => Some(io::Error::from_raw_os_error(i32::from_ne_bytes(why))),
        Ok(_) => result.err(),
        Err(error) => Some(error.into()),
    };
    match failed {
        None => Ok(spawned),
        Some(error) => {
            let _ = spawned.status(true);
            Err(error)
        }
    }
}

/// Makes the child with as many of the wanted namespaces as the kernel allows.
fn clone_with(prepared: &mut Prepared, plan: &Plan) -> io::Result<Spawned> {
    let wanted = plan.spaces;
    // Without a user namespace the others need rights that the monitor may have.
    let rootless = Spaces { user: false, ..wanted };
    let net = |spaces: Spaces| Spaces { net: wanted.net, ..spaces };
    let no_net = |spaces: Spaces| Spaces { net: false, ..spaces };
    let mut tries = vec![wanted, rootless, no_net(wanted), no_net(rootless), net(Spaces::NONE), Spaces::NONE];
    tries.retain(|spaces| spaces.net == wanted.net || !plan.needs_net);
    let mut tried = Vec::new();
    let mut first = None;
    for spaces in tries {
        if tried.contains(&spaces) {
            continue;
        }
        tried.push(spaces);
        prepared.own_user = spaces.user;
        for cgroup in plan.cgroup.iter().map(Some).chain([None]) {
            match child::clone(prepared, spaces.flags(), cgroup) {
                Ok((pid, pidfd)) => {
                    let mut missing = Vec::new();
                    if cgroup.is_none() && plan.cgroup.is_some() {
                        missing.push("control group: the kernel refuses to start a process in it".into());
                    }
                    if let Some(error) = first.filter(|_| spaces != wanted) {
                        missing.push(without(wanted, spaces, &error));
                    }
                    return Ok(Spawned { pid, pidfd, spaces, in_cgroup: cgroup.is_some(), missing });
                }
                Err(error) => {
                    // What was wanted, and not what was tried instead.
                    if cgroup.is_none() {
                        first.get_or_insert(error);
                    }
                }
            }
        }
    }
    let error = first.unwrap_or_else(|| io::Error::other("nothing was tried"));
    Err(io::Error::new(error.kind(), format!("cannot start a process with namespaces of its own: {error}")))
}

/// What a process lacks, why, and what would help.
fn without(wanted: Spaces, has: Spaces, error: &io::Error) -> String {
    let lacking: Vec<_> = wanted.names().into_iter().filter(|name| !has.names().contains(name)).collect();
    let help = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            " (users may not make user namespaces here: see the sysctls kernel.unprivileged_userns_clone and \
             kernel.apparmor_restrict_unprivileged_userns)"
        }
        // ENOSPC.
        io::ErrorKind::StorageFull => {
            " (as many as the sysctls user.max_*_namespaces allow are there already)"
        }
        _ => "",
    };
    format!("own namespaces ({}): {error}{help}", lacking.join(", "))
}

/// Makes root of the child's user namespace somebody outside: `outer_id` if we may choose, else our own user.
fn map_users(pid: u32, outer_id: u32) -> io::Result<()> {
    let write = |file: &str, text: String| std::fs::write(format!("/proc/{pid}/{file}"), text);
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    // Only who has rights in the outer namespace may map another one than itself; nobody is told beforehand.
    if write("uid_map", format!("0 {outer_id} 1\n")).is_ok() {
        return write("gid_map", format!("0 {outer_id} 1\n"));
    }
    write("setgroups", "deny".into())?;
    write("uid_map", format!("0 {uid} 1\n"))?;
    write("gid_map", format!("0 {gid} 1\n"))
}

/// As `execvp` finds a program.
fn find(program: &Path) -> io::Result<std::path::PathBuf> {
    if program.as_os_str().as_bytes().contains(&b'/') {
        return Ok(program.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.is_file());
    found.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

impl Spawned {
    /// How it ended; waits for that if `wait`, else `None` as long as it lives. Only the first caller is told.
    ///
    /// # Errors
    /// What `waitid` reports: it was waited for already.
    pub fn status(&self, wait: bool) -> io::Result<Option<Ended>> {
        use rustix::process::{WaitId, WaitIdOptions, waitid};
        let options =
            if wait { WaitIdOptions::EXITED } else { WaitIdOptions::EXITED | WaitIdOptions::NOHANG };
        let fd = std::os::fd::AsFd::as_fd(&self.pidfd);
        let status = waitid(WaitId::PidFd(fd), options)?;
        Ok(status.map(|status| match status.exit_status() {
            Some(code) => Ended::Code(code),
            None => Ended::Signal(status.terminating_signal().unwrap_or(0)),
        }))
    }
}

#[cfg(test)]
#[path = "spawn_tests.rs"]
mod tests;
