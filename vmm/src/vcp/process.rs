//! One `vcp-iscsi`: starts it, waits until it is ready, tells how it ended, ends it. When to start another one is
//! [`super::keeper`]'s business.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::config::SecretUrl;
use crate::error::{Error, Result};

/// How long the first VCP may take until it is ready. It has logged in to its target by then, which has limits of its own.
pub const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a VCP may take to end after SIGTERM.
pub const END_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest line that is read from a VCP's standard output.
const MAX_LINE_BYTES: usize = 4096;

/// What a disk's VCP is started with.
#[derive(Clone, Debug)]
pub struct IscsiVcp {
    /// Device name, e.g. `disk0`.
    pub device: String,
    /// The URL, with secrets; it never becomes an argument.
    pub url: SecretUrl,
    /// What the disk is to its target, the same for every process that serves it: a new one takes over the session of
    /// the one before, so that nothing of that one is carried out later.
    pub instance: String,
    /// Offer the disk read-only.
    pub read_only: bool,
    /// Number of request queues.
    pub queues: u16,
    /// Hardware thread of its own.
    pub cpu: Option<usize>,
    /// Further ways to the unit.
    pub paths: VcpPaths,
}

/// Ways to a disk's unit besides its URL.
#[derive(Clone, Debug, Default)]
pub struct VcpPaths {
    /// Further URLs, with secrets.
    pub urls: Vec<SecretUrl>,
    /// Every portal that the target names as well.
    pub all: bool,
    /// Sessions with each portal, if more than one.
    pub sessions: Option<u16>,
}

/// Finds the program: what the user names, the variable `VCP_ISCSI`, the directory of this executable, the path.
pub fn find_program(given: Option<&Path>) -> PathBuf {
    const NAME: &str = "vcp-iscsi";
    if let Some(path) = given {
        return path.to_owned();
    }
    if let Some(path) = std::env::var_os("VCP_ISCSI").filter(|v| !v.is_empty()) {
        return path.into();
    }
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(NAME)));
    beside.filter(|p| p.is_file()).unwrap_or_else(|| NAME.into())
}

/// A running VCP process. Dropping it ends the process.
#[derive(Debug)]
pub struct VcpProcess {
    device: String,
    child: Child,
    pidfd: OwnedFd,
    stdout: Option<ChildStdout>,
}

impl VcpProcess {
    /// Starts the process, which will listen at `socket`; [`VcpProcess::wait_ready`] tells when it can be used.
    pub fn start(program: &Path, vcp: &IscsiVcp, socket: &Path) -> Result<Self> {
        let fail = |reason: String| Error::Vcp { device: vcp.device.clone(), reason };
        // The URL may hold a secret: it goes through a descriptor that only this child has, its standard input. The child
        // opens it anew by its name, and so reads it from the start.
        let url = rustix::fs::memfd_create("url", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(Error::os("create a memfd"))?;
        let mut url = std::fs::File::from(url);
        for line in std::iter::once(&vcp.url).chain(&vcp.paths.urls) {
            writeln!(url, "{}", line.expose())
                .map_err(|error| fail(format!("its URL cannot be passed on: {error}")))?;
        }
        let mut command = Command::new(program);
        command.arg("serve").arg("--socket-path").arg(socket);
        command.arg("--url-file").arg("/proc/self/fd/0");
        command.arg("--instance").arg(&vcp.instance);
        command.arg("--exit-with-parent").arg("--queues").arg(vcp.queues.to_string());
        if vcp.paths.all {
            command.args(["--paths", "all"]);
        }
        if let Some(sessions) = vcp.paths.sessions {
            command.arg("--sessions").arg(sessions.to_string());
        }
        if vcp.read_only {
            command.arg("--read-only");
        }
        if let Some(cpu) = vcp.cpu {
            command.arg("--cpu").arg(cpu.to_string());
        }
        // A process group of its own: Ctrl-C at the monitor's terminal is for the monitor, which ends its VCPs in order.
        command.process_group(0).stdin(url).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().map_err(|e| match e.kind() {
            ErrorKind::NotFound => fail(format!(
                "cannot find {}: install it beside vcp, put it on the PATH, or give --vcp-iscsi FILE",
                program.display()
            )),
            _ => fail(format!("cannot start {}: {e}", program.display())),
        })?;
        let stdout = child.stdout.take();
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pidfd = pid.ok_or_else(|| fail("has no process id".into())).and_then(|pid| {
            pidfd_open(pid, PidfdFlags::empty()).map_err(|e| fail(format!("cannot be watched: {e}")))
        });
        match pidfd {
            Ok(pidfd) => Ok(Self { device: vcp.device.clone(), child, pidfd, stdout }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e)
            }
        }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the line `ready:`, at most as long as `timeout` says, or until `interrupt` becomes readable (a signal).
    pub fn wait_ready(&mut self, timeout: Option<Duration>, interrupt: impl AsFd) -> Result<()> {
        let (device, pid) = (self.device.clone(), self.pid());
        let fail = |reason: String| Error::Vcp { device: device.clone(), reason };
        let interrupt = interrupt.as_fd();
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let Some(mut stdout) = self.stdout.take() else { return Err(fail("has no standard output".into())) };
        let mut line = Vec::new();
        loop {
            let left = deadline.map(left_until);
            let mut fds = [PollFd::new(&stdout, PollFlags::IN), PollFd::new(&interrupt, PollFlags::IN)];
            let ready = match poll(&mut fds, left.as_ref()) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.map_err(Error::os("wait for a VCP"))?,
            };
            // A process that never stops talking is not ready either.
            if let Some(timeout) = timeout
                && (ready == 0 || deadline.is_some_and(|deadline| Instant::now() >= deadline))
            {
                return Err(fail(format!(
                    "vcp-iscsi (pid {pid}) was not ready within {timeout:?}: is the target reachable?"
                )));
            }
            if !fds[1].revents().is_empty() {
                return Err(Error::Interrupted);
            }
            let mut byte = [0u8; 1];
            match stdout.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => {
                    let text = String::from_utf8_lossy(&line);
                    tracing::debug!(device = self.device, "vcp-iscsi says: {text}");
                    if text.starts_with("ready:") {
                        break;
                    }
                    line.clear();
                }
                Ok(1) if line.len() < MAX_LINE_BYTES => line.push(byte[0]),
                Ok(1) => {}
                Ok(_) => {
                    let status = self.child.wait().map_err(Error::os("wait for a VCP"))?;
                    return Err(fail(format!(
                        "vcp-iscsi (pid {pid}) ended before it was ready: {}; its message is above",
                        describe(status)
                    )));
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(fail(format!("cannot read from vcp-iscsi (pid {pid}): {e}"))),
            }
        }
        self.stdout = Some(stdout);
        Ok(())
    }

    /// Readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Another descriptor that names the process.
    pub fn try_clone_pidfd(&self) -> Result<OwnedFd> {
        self.pidfd.try_clone().map_err(Error::os("duplicate a descriptor"))
    }

    /// What the process still writes to its standard output, for who waits for it.
    pub fn stdout(&self) -> Option<BorrowedFd<'_>> {
        self.stdout.as_ref().map(AsFd::as_fd)
    }

    /// Reads from its standard output, so that it never blocks there. Called when there is something.
    pub fn drain(&mut self) {
        let Some(stdout) = &mut self.stdout else { return };
        let mut buffer = [0u8; 512];
        match stdout.read(&mut buffer) {
            Ok(0) => self.stdout = None,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => self.stdout = None,
            Ok(n) => tracing::debug!(
                device = self.device,
                "vcp-iscsi says: {}",
                String::from_utf8_lossy(&buffer[..n]).trim_end()
            ),
        }
    }

    /// How the process ended, if it has.
    pub fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok().flatten()?;
        Some(format!("its vcp-iscsi (pid {}) ended: {}", self.pid(), describe(status)))
    }

    fn end(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
        let deadline = Instant::now() + END_TIMEOUT;
        loop {
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut fds, Some(&left_until(deadline))) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(1..) => break,
                _ => {
                    tracing::warn!(
                        device = self.device,
                        pid = self.pid(),
                        "vcp-iscsi does not end: killing it"
                    );
                    let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
                    break;
                }
            }
        }
        let _ = self.child.wait();
    }
}

impl Drop for VcpProcess {
    fn drop(&mut self) {
        self.end();
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown status".into(),
    }
}

/// The time until `deadline`, for `poll`.
pub(super) fn left_until(deadline: Instant) -> Timespec {
    let left = deadline.saturating_duration_since(Instant::now());
    Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    /// A program that takes a VCP's options; `then` is what it does with the URL in `$url` and the socket in `$socket`.
    fn program(dir: &Path, then: &str) -> PathBuf {
        let path = dir.join("vcp-iscsi");
        let text = format!("#!/bin/sh\nsocket=$3\nurl=$(cat \"$5\")\n{then}\n");
        // Written by another process: a descriptor open for writing that a test beside this one inherits by fork would
        // make it "text file busy".
        let mut write = Command::new("sh");
        write.args(["-c", "printf %s \"$1\" > \"$0\" && chmod 755 \"$0\""]).arg(&path).arg(text);
        assert!(write.status().unwrap().success());
        path
    }

    fn start(dir: &Path, then: &str) -> VcpProcess {
        let url = "iscsi://user%secret@host/iqn.x:y/0".into();
        let vcp = IscsiVcp {
            device: "disk0".into(),
            url,
            instance: "test".into(),
            read_only: true,
            queues: 2,
            cpu: None,
            paths: VcpPaths { urls: vec!["iscsi://user%secret@other".into()], ..VcpPaths::default() },
        };
        VcpProcess::start(&program(dir, then), &vcp, &dir.join("s")).unwrap()
    }

    fn never() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn ready_with_the_secret_passed_aside_and_ended() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = start(
            dir.path(),
            "echo \"$url\" > \"$socket.url\"; echo hello; echo ready: here; exec sleep 1000",
        );
        process.wait_ready(Some(Duration::from_secs(10)), never()).unwrap();
        let arguments = std::fs::read(format!("/proc/{}/cmdline", process.pid())).unwrap();
        assert!(!String::from_utf8_lossy(&arguments).contains("secret"));
        let url = std::fs::read_to_string(dir.path().join("s.url")).unwrap();
        assert_eq!(url.trim(), "iscsi://user%secret@host/iqn.x:y/0\niscsi://user%secret@other");
        let pid = process.pid();
        assert_eq!(process.ended(), None);
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn end_before_ready_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let error =
            start(dir.path(), "exit 3").wait_ready(Some(Duration::from_secs(10)), never()).unwrap_err();
        assert!(error.to_string().contains("ended before it was ready: exit code 3"), "{error}");
    }

    #[test]
    fn silence_is_an_error_and_a_stubborn_process_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = start(dir.path(), "trap '' TERM; while :; do sleep 0.1; done");
        let error = process.wait_ready(Some(Duration::from_millis(300)), never()).unwrap_err();
        assert!(error.to_string().contains("was not ready within"), "{error}");
        let pid = process.pid();
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn chatter_is_not_readiness() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = start(dir.path(), "exec yes");
        let error = process.wait_ready(Some(Duration::from_millis(300)), never()).unwrap_err();
        assert!(error.to_string().contains("was not ready within"), "{error}");
    }

    #[test]
    fn a_signal_ends_the_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let signal = eventfd(1, EventfdFlags::CLOEXEC).unwrap();
        let error = start(dir.path(), "exec sleep 1000")
            .wait_ready(Some(Duration::from_secs(10)), &signal)
            .unwrap_err();
        assert!(matches!(error, Error::Interrupted));
    }
}
