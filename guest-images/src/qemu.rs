//! A QEMU process: started with its serial console on our pipes, its output captured, killed at its deadline, on drop
//! and (by the kernel) when the thread that started it ends.

use std::env;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::error::tail;
use crate::{Error, Result};

/// Name of the emulator.
pub const PROGRAM: &str = "qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";

/// A running QEMU.
#[derive(Debug)]
pub struct Qemu {
    what: String,
    child: Child,
    pidfd: OwnedFd,
    chunks: Receiver<Vec<u8>>,
    output: Vec<u8>,
    /// Where [`Qemu::wait_for`] goes on looking.
    seen: usize,
    deadline: Duration,
    end: Instant,
    echo: bool,
    held: Vec<File>,
}

/// How a QEMU process ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Exit status of the process.
    pub status: ExitStatus,
    /// All that it printed, console and error messages.
    pub output: String,
}

/// Returns the path of a program in `$PATH`, else an error that names its Debian package.
pub fn find_program(name: &str, package: &'static str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .ok_or_else(|| Error::Missing { what: name.to_owned(), package })
}

impl Qemu {
    /// Starts QEMU with `args`; `-serial stdio -display none -no-reboot` or the like is for the caller to give.
    /// `what` names the machine in errors; after `deadline` it is killed; `echo` copies its output to our stderr.
    pub fn start<S: AsRef<OsStr>>(what: &str, args: &[S], deadline: Duration, echo: bool) -> Result<Self> {
        let qemu = find_program(PROGRAM, PACKAGE)?;
        // A test that is itself killed must not leave a machine behind.
        let setpriv = find_program("setpriv", "util-linux")?;
        let mut child = Command::new(setpriv)
            .args(["--pdeathsig", "KILL", "--"])
            .arg(qemu)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(Error::io("start", PROGRAM))?;
        let (sender, chunks) = channel();
        if let Some(out) = child.stdout.take() {
            pump(out, sender.clone());
        }
        if let Some(err) = child.stderr.take() {
            pump(err, sender);
        }
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let pidfd = pidfd.map_err(|e| Error::io("watch", PROGRAM)(e.into()));
        let pidfd = match pidfd {
            Ok(pidfd) => pidfd,
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(e);
            }
        };
        let end = Instant::now() + deadline;
        let what = what.to_owned();
        let (output, held) = (Vec::new(), Vec::new());
        Ok(Self { what, child, pidfd, chunks, output, seen: 0, deadline, end, echo, held })
    }

    /// Keeps a file open while the process runs, one that its arguments name by our descriptor.
    #[must_use]
    pub fn holding(mut self, file: File) -> Self {
        self.held.push(file);
        self
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Types `text` on the serial console.
    pub fn send(&mut self, text: &str) -> Result<()> {
        match self.child.stdin.as_mut() {
            Some(stdin) => stdin.write_all(text.as_bytes()).map_err(Error::io("write to", "the console")),
            None => Ok(()),
        }
    }

    /// Waits until `text` appears on the console, after what an earlier call found.
    pub fn wait_for(&mut self, text: &str) -> Result<()> {
        loop {
            if let Some(at) = find(&self.output[self.seen..], text.as_bytes()) {
                self.seen += at + text.len();
                return Ok(());
            }
            if !self.receive()? {
                let status = self.reap()?.to_string();
                return Err(Error::NoStatus { what: self.what.clone(), status, tail: self.tail() });
            }
        }
    }

    /// Waits until QEMU ends and returns its output.
    pub fn wait(mut self) -> Result<Ended> {
        while self.receive()? {}
        let status = self.reap()?;
        Ok(Ended { status, output: self.text() })
    }

    /// Returns the console output so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }

    /// Takes one chunk of output; false at its end.
    fn receive(&mut self) -> Result<bool> {
        match self.chunks.recv_timeout(self.end.saturating_duration_since(Instant::now())) {
            Ok(chunk) => {
                if self.echo {
                    let _ = std::io::stderr().write_all(&chunk);
                }
                self.output.extend_from_slice(&chunk);
                Ok(true)
            }
            Err(RecvTimeoutError::Disconnected) => Ok(false),
            Err(RecvTimeoutError::Timeout) => Err(self.late()),
        }
    }

    fn reap(&mut self) -> Result<ExitStatus> {
        let left = self.end.saturating_duration_since(Instant::now());
        let timeout =
            rustix::time::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let ready = poll(&mut fds, Some(&timeout)).map_err(|e| Error::io("watch", PROGRAM)(e.into()))?;
        if ready == 0 {
            return Err(self.late());
        }
        self.child.wait().map_err(Error::io("watch", PROGRAM))
    }

    fn late(&mut self) -> Error {
        let _ = self.child.kill();
        Error::Deadline { what: self.what.clone(), deadline: self.deadline, tail: self.tail() }
    }

    fn tail(&self) -> String {
        tail(&self.text(), 5)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only if the process has been waited for already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pump(mut from: impl Read + Send + 'static, to: Sender<Vec<u8>>) {
    thread::spawn(move || {
        let mut buf = vec![0; 16 << 10];
        while let Ok(n) = from.read(&mut buf) {
            if n == 0 || to.send(buf[..n].to_vec()).is_err() {
                break;
            }
        }
    });
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}
