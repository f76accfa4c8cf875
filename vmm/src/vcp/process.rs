//! One VCP process: starts it, hears what it says, tells how it ended, ends it. When to start another one is
//! [`super::keeper`]'s business.
//!
//! Everything that it needs is given to it as a descriptor, so that it works in namespaces that show it nothing: the URL
//! (standard input), the socket for its front end, its control socket, its pulse, and what lets a process that stands by
//! go on. None of these has a name in the file system.

use std::ffi::OsString;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};
use vcp_core::pulse::{Beat, PulsePage};

use super::cgroup::Group;
use super::hidden::HiddenSocket;
use super::spawn::{self, Plan, Spaces, Spawned};
use super::spec::VcpSpec;
use crate::error::{Error, Result};
use crate::virtio::vhost_user::link::Link;

/// How long the first VCP may take until it is ready. It has logged in to its target by then, which has limits of its own.
pub const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a VCP may take to end after SIGTERM.
pub const END_TIMEOUT: Duration = Duration::from_secs(2);
/// Number of the first descriptor after the standard ones.
const FIRST_FD: usize = 3;
/// Longest line that is read from a VCP's standard output.
const MAX_LINE_BYTES: usize = 4096;
/// What of the monitor's environment a VCP is given.
const ENVIRONMENT: [&str; 5] =
    ["RUST_LOG", "RUST_BACKTRACE", "LD_LIBRARY_PATH", "RES_OPTIONS", "LOCALDOMAIN"];
/// First of the users that VCPs are outside their own user namespace. Above it up to 2^31 nobody hands out numbers: not the
/// tools for accounts, nor those for containers.
const FIRST_USER: u32 = 0x7000_0000;
/// Devices of a monitor that have a user of their own.
const USERS_EACH: u32 = 32;

/// What a process is to do first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum First {
    /// Log in and serve.
    Serve,
    /// Get ready for that, and wait for [`VcpProcess::go`].
    StandBy,
}

/// What a process has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// It can be connected to, or has taken over.
    Ready,
    /// It stands by.
    StandsBy,
    /// Nothing more: it has closed its standard output.
    End,
}

/// A running VCP process. Dropping it ends the process.
#[derive(Debug)]
pub struct VcpProcess {
    device: String,
    /// Name of the program.
    program: &'static str,
    spawned: Spawned,
    /// How it ended, once that is known.
    ended: Option<String>,
    stdout: Option<std::fs::File>,
    line: Vec<u8>,
    front: HiddenSocket,
    control: HiddenSocket,
    pulse: Arc<PulsePage>,
    go: Option<OwnedFd>,
    /// It has said that it is ready, or that it stands by: it hears signals.
    spoke: bool,
    /// Removed after the last of its processes.
    cgroup: Option<Arc<Group>>,
}

impl VcpProcess {
    /// Starts a process; [`VcpProcess::wait_ready`] or [`VcpProcess::listen`] tell when it can be used.
    pub fn start(program: &Path, vcp: &VcpSpec, first: First) -> Result<Self> {
        let (front, front_listens) = HiddenSocket::create(&vcp.device)?;
        let (control, control_listens) = HiddenSocket::create("control")?;
        // The URL may hold a secret: it goes through a descriptor that only this child has, its standard input. The child
        // opens it anew by its name, and so reads it from the start.
        let url = rustix::fs::memfd_create("url", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(Error::os("create a memfd"))?;
        let mut url = std::fs::File::from(url);
        let pulse = PulsePage::create().map_err(Error::os("create a memfd"))?;
        if let Some(port) = &vcp.net {
            let mut args: Vec<OsString> =
                ["serve", "--control-fd", "4", "--pulse-fd", "5"].map(Into::into).into();
            args.push("--exit-with-parent".into());
            let (device, mac, pairs) = (&vcp.device, &port.mac, vcp.pairs);
            args.extend(["--port".into(), format!("fd=3,name={device},mac={mac},queues={pairs}").into()]);
            args.extend(["--uplink".into(), port.uplink.clone().into()]);
            if let Some(cpu) = vcp.cpu {
                args.extend(["--cpu".into(), cpu.to_string().into()]);
            }
            args.extend(vcp.options.iter().map(Into::into));
            let fds = vec![front_listens, control_listens, dup(&pulse)?];
            return Self::spawn(program, vcp, url.into(), args, fds, (front, control, pulse, None));
        }
        for line in std::iter::once(&vcp.url).chain(&vcp.paths.urls) {
            writeln!(url, "{}", line.expose()).map_err(Error::os("write a memfd"))?;
        }
        let mut args: Vec<OsString> =
            ["serve", "--fd", "3", "--url-file", "/proc/self/fd/0"].map(Into::into).into();
        args.extend(["--control-fd", "4", "--pulse-fd", "5", "--exit-with-parent"].map(Into::into));
        args.extend(["--instance".into(), vcp.instance.clone().into()]);
        args.extend(["--queues".into(), vcp.queues.to_string().into()]);
        if vcp.paths.all {
            args.extend(["--paths".into(), "all".into()]);
        }
        if let Some(sessions) = vcp.paths.sessions {
            args.extend(["--sessions".into(), sessions.to_string().into()]);
        }
        if vcp.read_only {
            args.push("--read-only".into());
        }
        if let Some(cpu) = vcp.cpu {
            args.extend(["--cpu".into(), cpu.to_string().into()]);
        }
        args.extend(vcp.options.iter().map(Into::into));
        let mut fds = vec![front_listens, control_listens];
        let mut go = None;
        if first == First::StandBy {
            args.extend(["--standby-fd".into(), "6".into()]);
        }
        fds.push(dup(&pulse)?);
        if first == First::StandBy {
            let (theirs, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
                .map_err(Error::os("create a pipe"))?;
            fds.push(theirs);
            go = Some(ours);
        }
        if let Some(msgq) = &vcp.msgq {
            args.extend(["--msgq-fd".into(), (FIRST_FD + fds.len()).to_string().into()]);
            fds.push(dup(&**msgq)?);
        }
        dial(vcp, &mut args, &mut fds)?;
        Self::spawn(program, vcp, url.into(), args, fds, (front, control, pulse, go))
    }

    /// Starts the successor of `old`, which takes over from it ([`Said::Ready`]) or ends.
    pub fn take_over(program: &Path, vcp: &VcpSpec, old: &Self) -> Result<Self> {
        let nothing = rustix::fs::memfd_create("nothing", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(Error::os("create a memfd"))?;
        let pulse = PulsePage::create().map_err(Error::os("create a memfd"))?;
        let mut fds = vec![dup(&old.control)?, dup(&pulse)?];
        let args = ["take-over", "--control", "/proc/self/fd/3", "--pulse-fd", "4", "--exit-with-parent"];
        let mut args = args.map(Into::into).into();
        dial(vcp, &mut args, &mut fds)?;
        let parts = (old.front.clone(), old.control.clone(), pulse, None);
        Self::spawn(program, vcp, nothing, args, fds, parts)
    }

    fn spawn(
        program: &Path,
        vcp: &VcpSpec,
        stdin: OwnedFd,
        args: Vec<OsString>,
        more: Vec<OwnedFd>,
        (front, control, pulse, go): (HiddenSocket, HiddenSocket, PulsePage, Option<OwnedFd>),
    ) -> Result<Self> {
        let fail = |reason: String| Error::Vcp { device: vcp.device.clone(), reason };
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        let (stdout, theirs) = pipe().map_err(Error::os("create a pipe"))?;
        rustix::io::ioctl_fionbio(&stdout, true).map_err(Error::os("set up a pipe"))?;
        let mut fds = vec![stdin, theirs, dup(std::io::stderr())?];
        fds.extend(more);
        let cgroup = vcp.cgroup.as_deref().and_then(Group::open);
        let plan = Plan {
            program: program.to_owned(),
            args,
            env: environment(),
            fds,
            spaces: vcp.spaces,
            needs_net: vcp.needs_net,
            outer_id: user_of(vcp.number),
            node: vcp.node,
            cgroup,
            nice: vcp.nice,
        };
        let spawned = spawn::spawn(plan).map_err(|e| match e.kind() {
            ErrorKind::NotFound => fail(format!(
                "cannot find {}: install it beside vcp, put it on the PATH, or give {} FILE",
                program.display(),
                vcp.program().1
            )),
            _ => fail(format!("cannot start {}: {e}", program.display())),
        })?;
        for missing in &spawned.missing {
            tracing::warn!(device = vcp.device, "not confined: {missing}");
        }
        Ok(Self {
            device: vcp.device.clone(),
            program: vcp.program().0,
            spawned,
            ended: None,
            stdout: Some(stdout.into()),
            line: Vec::new(),
            front,
            control,
            pulse: Arc::new(pulse),
            go,
            spoke: false,
            cgroup: vcp.cgroup.clone(),
        })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.spawned.pid
    }

    /// The namespaces that it has.
    pub fn spaces(&self) -> Spaces {
        self.spawned.spaces
    }

    /// What of its confinement could not be had, with the reasons.
    pub fn missing(&self) -> &[String] {
        &self.spawned.missing
    }

    /// Its control group, if it is in one.
    pub fn cgroup(&self) -> Option<Arc<Group>> {
        self.cgroup.clone().filter(|_| self.spawned.in_cgroup)
    }

    /// Lets a process that stands by go on. One that is not there yet finds the word when it is.
    pub fn go(&mut self) {
        if let Some(go) = self.go.take() {
            // One that has ended is noticed elsewhere. Rust programs ignore the signal of a broken pipe.
            let _ = rustix::io::write(&go, &[1]);
        }
    }

    /// Connects a front end to it.
    pub fn connect(&self, queues: u16) -> Result<Link> {
        Link::connect(&self.device, &self.front.path(), queues)
    }

    /// The way to its front end's socket.
    pub fn front(&self) -> HiddenSocket {
        self.front.clone()
    }

    /// The way to its control socket.
    pub fn control(&self) -> HiddenSocket {
        self.control.clone()
    }

    /// What its data thread does.
    pub fn beat(&self) -> Beat {
        self.pulse.read()
    }

    /// The page that its data thread writes.
    pub fn pulse(&self) -> Arc<PulsePage> {
        self.pulse.clone()
    }

    /// Waits for the line `ready:`, at most as long as `timeout` says, or until `interrupt` becomes readable (a signal).
    pub fn wait_ready(&mut self, timeout: Duration, interrupt: impl AsFd) -> Result<()> {
        let (device, program, pid) = (self.device.clone(), self.program, self.pid());
        let fail = |reason: String| Error::Vcp { device: device.clone(), reason };
        let interrupt = interrupt.as_fd();
        let deadline = Instant::now() + timeout;
        loop {
            let left = left_until(deadline);
            let Some(stdout) = &self.stdout else { return Err(fail("has no standard output".into())) };
            let mut fds = [PollFd::new(stdout, PollFlags::IN), PollFd::new(&interrupt, PollFlags::IN)];
            let ready = match poll(&mut fds, Some(&left)) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.map_err(Error::os("wait for a VCP"))?,
            };
            // A process that never stops talking is not ready either.
            if ready == 0 || Instant::now() >= deadline {
                return Err(fail(format!(
                    "{program} (pid {pid}) was not ready within {timeout:?}: is what it connects to reachable?"
                )));
            }
            if !fds[1].revents().is_empty() {
                return Err(Error::Interrupted);
            }
            match self.listen() {
                Some(Said::Ready) => return Ok(()),
                Some(Said::End) => {
                    let status = self.wait_end();
                    return Err(fail(format!(
                        "{program} (pid {pid}) ended before it was ready: {status}; its message is above"
                    )));
                }
                Some(Said::StandsBy) | None => {}
            }
        }
    }

    /// Reads what it has said, without waiting, up to the next thing that matters.
    pub fn listen(&mut self) -> Option<Said> {
        let stdout = self.stdout.as_mut()?;
        let mut byte = [0u8; 1];
        // Some bytes, not an endless stream: the caller has more to do.
        for _ in 0..MAX_LINE_BYTES {
            match stdout.read(&mut byte) {
                Ok(0) => {
                    self.stdout = None;
                    return Some(Said::End);
                }
                Ok(_) if byte[0] == b'\n' => {
                    let text = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
                    tracing::debug!(device = self.device, "{} says: {text}", self.program);
                    if text.starts_with("ready:") {
                        self.spoke = true;
                        return Some(Said::Ready);
                    }
                    if text.starts_with("standby:") {
                        self.spoke = true;
                        return Some(Said::StandsBy);
                    }
                }
                Ok(_) if self.line.len() < MAX_LINE_BYTES => self.line.push(byte[0]),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
        None
    }

    /// Readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.spawned.pidfd.as_fd()
    }

    /// Another descriptor that names the process.
    pub fn try_clone_pidfd(&self) -> Result<OwnedFd> {
        dup(&self.spawned.pidfd)
    }

    /// Readable when it has something to [say](Self::listen).
    pub fn stdout(&self) -> Option<BorrowedFd<'_>> {
        self.stdout.as_ref().map(AsFd::as_fd)
    }

    /// How the process ended, if it has.
    pub fn ended(&mut self) -> Option<String> {
        if self.ended.is_none() {
            let text = match self.spawned.status(false) {
                Ok(None) => return None,
                Ok(Some(how)) => how.to_string(),
                Err(error) => error.to_string(),
            };
            self.ended = Some(format!("its {} (pid {}) ended: {text}", self.program, self.pid()));
        }
        self.ended.clone()
    }

    /// Kills it; when it is gone is told by [`VcpProcess::pidfd`].
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.spawned.pidfd, Signal::KILL);
    }

    /// Whether [`VcpProcess::ended`] has found that it has.
    pub fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    fn wait_end(&mut self) -> String {
        let text = match self.spawned.status(true) {
            Ok(Some(how)) => how.to_string(),
            Ok(None) => "unknown".into(),
            Err(error) => error.to_string(),
        };
        self.ended.get_or_insert_with(|| text.clone());
        text
    }

    fn end(&mut self) {
        if self.ended().is_some() {
            return;
        }
        // One that stands by has nothing to put in order.
        self.go = None;
        if self.spoke {
            let _ = pidfd_send_signal(&self.spawned.pidfd, Signal::TERM);
        } else {
            // The first process of a namespace does not hear a signal that it has not asked for.
            self.kill();
        }
        let deadline = Instant::now() + END_TIMEOUT;
        loop {
            let mut fds = [PollFd::new(&self.spawned.pidfd, PollFlags::IN)];
            match poll(&mut fds, Some(&left_until(deadline))) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(1..) => break,
                _ => {
                    tracing::warn!(
                        device = self.device,
                        pid = self.pid(),
                        "{} does not end: killing it",
                        self.program
                    );
                    self.kill();
                    break;
                }
            }
        }
        self.wait_end();
    }
}

impl Drop for VcpProcess {
    fn drop(&mut self) {
        self.end();
    }
}

/// The user of device number `number` outside, if the monitor is root.
pub(crate) fn user_of(number: u32) -> u32 {
    FIRST_USER + std::process::id() % (1 << 22) * USERS_EACH + number % USERS_EACH
}

/// The whole environment of a process that the monitor starts.
pub(super) fn environment() -> Vec<(OsString, OsString)> {
    let env = ENVIRONMENT.iter().filter_map(|name| Some(((*name).into(), std::env::var_os(name)?)));
    // What comes out of our standard error is of one kind.
    let json = vcp_core::process::log_format() == vcp_core::process::LogFormat::Json;
    env.chain(json.then(|| (vcp_core::process::LOG_FORMAT_VARIABLE.into(), "json".into()))).collect()
}

/// Gives a process that is about to be started its channel to the one that connects, if there is one.
fn dial(vcp: &VcpSpec, args: &mut Vec<OsString>, fds: &mut Vec<OwnedFd>) -> Result<()> {
    let Some(dialer) = &vcp.dialer else { return Ok(()) };
    // The first three are the standard ones.
    args.extend(["--dial-fd".into(), (3 + fds.len()).to_string().into()]);
    fds.push(dialer.channel()?);
    Ok(())
}

pub(super) fn dup(fd: impl AsFd) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, 0).map_err(Error::os("duplicate a descriptor"))
}

/// The time until `deadline`, for `poll`.
pub(super) fn left_until(deadline: Instant) -> Timespec {
    let left = deadline.saturating_duration_since(Instant::now());
    Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
}

#[cfg(test)]
#[path = "process_tests.rs"]
mod tests;
