//! Child processes: output captured by line, every wait has a deadline, and none outlives its test.
//!
//! A child leads a process group of its own, which is killed on drop. It also asks the kernel (through `setpriv`) to be
//! killed with its parent. That is tied to the *thread* that forked it, so all children are forked by one thread that
//! lives as long as this process.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};

use crate::{Result, tool};

/// How long output may still come after the end of a process: a grandchild can hold the pipe.
const DRAIN: Duration = Duration::from_secs(2);
/// How many lines of output an error message carries.
const TAIL_LINES: usize = 15;

/// Which stream a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// What to start.
#[derive(Debug)]
pub struct Cmd {
    name: String,
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    stdin: Vec<u8>,
    keep_stdin: bool,
    stdin_fd: Option<OwnedFd>,
    user: Option<u32>,
}

impl Cmd {
    /// A program by path or by name in `$PATH` (and the system directories).
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let program = program.as_ref();
        let name =
            std::path::Path::new(program).file_name().unwrap_or(program).to_string_lossy().into_owned();
        let mut env = Vec::new();
        if std::env::var_os("RUST_BACKTRACE").is_none() {
            env.push(("RUST_BACKTRACE".into(), "1".into()));
        }
        Self {
            name,
            program: program.to_owned(),
            args: Vec::new(),
            env,
            stdin: Vec::new(),
            keep_stdin: false,
            stdin_fd: None,
            user: None,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Feeds bytes to its standard input, which is then closed.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Makes this descriptor its standard input.
    #[must_use]
    pub fn stdin_fd(mut self, fd: OwnedFd) -> Self {
        self.stdin_fd = Some(fd);
        self
    }

    /// Keeps its standard input open, for [`Proc::say`].
    #[must_use]
    pub fn keep_stdin(mut self) -> Self {
        self.keep_stdin = true;
        self
    }

    /// Runs it under this user and group number, without supplementary groups and capabilities.
    #[must_use]
    pub fn user(mut self, uid: u32) -> Self {
        self.user = Some(uid);
        self
    }

    /// Starts it.
    pub fn spawn(self) -> Result<Proc> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if let Some(uid) = self.user {
            let id = uid.to_string();
            command.args(["--reuid", &id, "--regid", &id, "--clear-groups"]);
        }
        command.arg("--").arg(&self.program).args(&self.args);
        command.envs(self.env.iter().map(|(k, v)| (k, v)));
        command.env("PATH", tool::search_path());
        command.stdin(self.stdin_fd.map_or_else(Stdio::piped, Stdio::from));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = fork(command).with_context(|| format!("start {}", self.name))?;
        let log = Arc::new(Log::default());
        let mut stdin = child.stdin.take();
        if let Some(stdin) = &mut stdin {
            // A process that does not read its input closes the pipe; that is its right.
            let _ = stdin.write_all(&self.stdin);
        }
        let stdin = Mutex::new(stdin.filter(|_| self.keep_stdin));
        if let Some(out) = child.stdout.take() {
            pump(Stream::Out, out, Arc::clone(&log));
        }
        if let Some(err) = child.stderr.take() {
            pump(Stream::Err, err, Arc::clone(&log));
        }
        let pid = Pid::from_child(&child);
        let watch = Arc::clone(&log);
        thread::spawn(move || {
            // The process stays a zombie until `Proc` reaps it, so its number is not given to another meanwhile.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            while matches!(waitid(WaitId::Pid(pid), options), Err(rustix::io::Errno::INTR)) {}
            watch.update(|s| s.exited = Some(Instant::now()));
        });
        Ok(Proc { name: self.name, child: Mutex::new(child), stdin, pid, log, started: Instant::now() })
    }

    /// Starts it and waits for its end.
    pub fn run(self, deadline: Duration) -> Result<Output> {
        let proc = self.spawn()?;
        let status = proc.wait(deadline)?;
        Ok(Output {
            status,
            stdout: proc.stream(Stream::Out),
            stderr: proc.stream(Stream::Err),
            elapsed: proc.log.lock().exited.map_or(deadline, |at| at - proc.started),
        })
    }

    /// Starts it, waits for its end and demands success; returns its standard output.
    pub fn output(self, deadline: Duration) -> Result<String> {
        let line = format!("{} {}", self.name, self.args.join(OsStr::new(" ")).to_string_lossy());
        let out = self.run(deadline)?;
        if !out.status.success() {
            bail!("{line}: {}: {}{}", out.status, out.stdout, out.stderr);
        }
        Ok(out.stdout)
    }
}

/// How a process ended.
#[derive(Debug)]
pub struct Output {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// How long it lived.
    pub elapsed: Duration,
}

/// A running (or ended) child process.
#[derive(Debug)]
pub struct Proc {
    name: String,
    child: Mutex<Child>,
    stdin: Mutex<Option<ChildStdin>>,
    pid: Pid,
    log: Arc<Log>,
    started: Instant,
}

impl Proc {
    /// Writes to its standard input, which [`Cmd::keep_stdin`] has kept open.
    pub fn say(&self, bytes: &[u8]) -> Result<()> {
        let mut stdin = self.stdin.lock().unwrap_or_else(PoisonError::into_inner);
        let stdin = stdin.as_mut().context("its standard input is closed")?;
        stdin.write_all(bytes).with_context(|| format!("write to {}", self.name))
    }

    /// Closes its standard input.
    pub fn close_stdin(&self) {
        self.stdin.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Returns its process id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Waits for a line of `stream` that contains `text`. Fails at once if the process ends without it.
    pub fn wait_line(&self, stream: Stream, text: &str, deadline: Duration) -> Result<String> {
        let end = Instant::now() + deadline;
        let mut state = self.log.lock();
        loop {
            if let Some((_, line)) = state.lines.iter().find(|(s, l)| *s == stream && l.contains(text)) {
                return Ok(line.clone());
            }
            if state.ended() {
                drop(state);
                bail!("{} ended before it printed {text:?}: {}", self.name, self.tail());
            }
            state = match self.log.wait(state, end) {
                Ok(state) => state,
                Err(state) => {
                    drop(state);
                    bail!("{} did not print {text:?} within {deadline:?}: {}", self.name, self.tail());
                }
            };
        }
    }

    /// Waits for its end and the end of its output.
    pub fn wait(&self, deadline: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + deadline;
        let mut state = self.log.lock();
        while !state.ended() {
            let until = state.exited.map_or(end, |at| at + DRAIN);
            state = match self.log.wait(state, until) {
                Ok(state) => state,
                Err(state) if state.exited.is_some() => break,
                Err(state) => {
                    drop(state);
                    bail!("{} did not end within {deadline:?}: {}", self.name, self.tail());
                }
            };
        }
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        child.wait().with_context(|| format!("wait for {}", self.name))
    }

    /// Whether it still runs.
    pub fn is_running(&self) -> bool {
        self.log.lock().exited.is_none()
    }

    /// Sends a signal to it (not to its group).
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // It is not reaped while it runs, so the number is its own.
        if self.is_running() {
            kill_process(self.pid, signal).with_context(|| format!("signal {}", self.name))?;
        }
        Ok(())
    }

    /// Sends SIGTERM, waits for its end; returns its status and how long it took.
    pub fn terminate(&self, deadline: Duration) -> Result<(ExitStatus, Duration)> {
        let asked = Instant::now();
        self.signal(Signal::TERM)?;
        let status = self.wait(deadline)?;
        let exited = self.log.lock().exited.unwrap_or_else(Instant::now);
        Ok((status, exited.saturating_duration_since(asked)))
    }

    /// Kills it and waits for its end.
    pub fn kill(&self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.wait(Duration::from_secs(10)).map(|_| ())
    }

    /// Returns all lines of one stream.
    pub fn stream(&self, stream: Stream) -> String {
        let state = self.log.lock();
        let lines = state.lines.iter().filter(|(s, _)| *s == stream);
        lines.flat_map(|(_, l)| [l.as_str(), "\n"]).collect()
    }

    /// Returns all output, both streams in the order of arrival.
    pub fn text(&self) -> String {
        self.log.lock().lines.iter().flat_map(|(_, l)| [l.as_str(), "\n"]).collect()
    }

    /// Returns the last lines of its output, for messages.
    pub fn tail(&self) -> String {
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        // Not reaped yet or reaped by `wait`: in the second case its group may live on, and if not, its number is free,
        // so only a group that still has the zombie or a member is signalled.
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(None) = child.try_wait() {
            let _ = kill_process_group(self.pid, Signal::KILL);
            let _ = child.wait();
        }
        if thread::panicking() {
            let text = self.log.lock().lines.iter().fold(String::new(), |t, (_, l)| t + "  " + l + "\n");
            eprintln!("--- output of {} (pid {}):\n{text}---", self.name, self.pid());
        }
    }
}

#[derive(Debug, Default)]
struct Log {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<(Stream, String)>,
    closed: usize,
    exited: Option<Instant>,
}

impl State {
    /// Gone, and all it said is here.
    fn ended(&self) -> bool {
        self.exited.is_some_and(|at| self.closed == 2 || at.elapsed() > DRAIN)
    }
}

impl Log {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits for a change until `end`; `Err` when it is past.
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        end: Instant,
    ) -> std::result::Result<MutexGuard<'a, State>, MutexGuard<'a, State>> {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(state);
        }
        // At most DRAIN at a time: the end of a process whose pipe stays open is no change.
        let left = left.min(DRAIN);
        Ok(self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0)
    }
}

fn pump(stream: Stream, from: impl Read + Send + 'static, log: Arc<Log>) {
    thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while from.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned();
            log.update(|s| s.lines.push((stream, text)));
            line.clear();
        }
        log.update(|s| s.closed += 1);
    });
}

type Job = (Command, Sender<std::io::Result<Child>>);

/// Forks on the thread that never ends.
fn fork(command: Command) -> Result<Child> {
    static FORKER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let forker = FORKER.get_or_init(|| {
        let (sender, jobs) = channel::<Job>();
        thread::spawn(move || {
            for (mut command, reply) in jobs {
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    let (reply, child) = channel();
    let sent = forker.lock().unwrap_or_else(PoisonError::into_inner).send((command, reply));
    sent.map_err(|_| anyhow!("the forking thread is gone"))?;
    Ok(child.recv().context("the forking thread is gone")??)
}
