//! System calls that a running process makes in a span of time, from strace's log.
//!
//! `strace -c` counts from its start to its end, and so counts what sets a load up and ends it. Here every call is logged with
//! its time, and those inside the span are counted.

use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

/// strace on a running process.
#[derive(Debug)]
pub(crate) struct Strace {
    child: Child,
    log: tempfile::NamedTempFile,
}

impl Strace {
    /// Attaches to all threads of a process; returns when logging has begun.
    ///
    /// # Errors
    /// strace is missing or may not attach.
    pub(crate) fn attach(pid: u32) -> Result<Self> {
        let log = tempfile::NamedTempFile::new()?;
        let mut child = Command::new("strace")
            // Seconds since 1970; arguments as numbers, which is the quickest.
            .args(["-f", "-ttt", "-e", "raw=all", "-p", &pid.to_string(), "-o"])
            .arg(log.path())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start strace")?;
        let stderr = child.stderr.take().context("strace has no standard error")?;
        let mut lines = BufReader::new(stderr).lines();
        let first = lines.next().transpose()?.unwrap_or_default();
        if !first.contains("attached") {
            bail!("strace did not attach to process {pid}: {first}");
        }
        // It reports every new thread; with nobody reading, the broken pipe would end it in the middle.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Ok(Self { child, log })
    }

    /// Detaches and returns the number of system calls that began in `span`, in seconds since 1970.
    ///
    /// # Errors
    /// strace left no log that covers the span.
    pub(crate) fn finish(mut self, span: &Range<f64>) -> Result<u64> {
        rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.child),
            rustix::process::Signal::INT,
        )?;
        self.child.wait()?;
        let log = std::fs::read_to_string(self.log.path()).context("strace left no log")?;
        let calls = log.lines().filter_map(call).filter(|at| span.contains(at)).count();
        if calls == 0 {
            bail!("strace saw no system call between {} and {}", span.start, span.end);
        }
        Ok(calls as u64)
    }
}

/// When the call of a line of the log began; none for signals, ends, and the second halves of calls.
fn call(line: &str) -> Option<f64> {
    let (_thread, rest) = line.split_once(' ')?;
    let (at, what) = rest.trim_start().split_once(' ')?;
    what.starts_with(|first: char| first.is_ascii_alphabetic()).then(|| at.parse().ok())?
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn lines_are_told_apart() {
        assert_eq!(call("12  1764252000.000100 read(0x3, 0x7f, 0x8) = 0x8"), Some(1_764_252_000.000_1));
        assert_eq!(call("12 1764252000.5 ppoll(0x1, 0x2 <unfinished ...>"), Some(1_764_252_000.5));
        for other in [
            "12 1764252000.6 <... ppoll resumed>) = 0x1",
            "12 1764252000.6 --- SIGCHLD {si_signo=SIGCHLD} ---",
            "12 1764252000.6 +++ exited with 0 +++",
            "",
        ] {
            assert_eq!(call(other), None, "{other}");
        }
    }

    /// A program that makes two calls for each line: what is before and after the span is not counted.
    #[test]
    fn calls_outside_the_span_are_not_counted() {
        let mut cat =
            Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("cat starts");
        let (mut to, mut from) = (cat.stdin.take().unwrap(), cat.stdout.take().unwrap());
        let mut lines = |n: usize| {
            for _ in 0..n {
                to.write_all(b"x").unwrap();
                from.read_exact(&mut [0]).unwrap();
            }
        };
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let strace = Strace::attach(cat.id()).unwrap();
        lines(20);
        let start = now();
        lines(50);
        let end = now();
        lines(20);
        let calls = strace.finish(&(start..end)).unwrap();
        // The read that it waits in at the start began before; the write that answered last may be noted late.
        assert!((98..=101).contains(&calls), "{calls}");
        cat.kill().unwrap();
        cat.wait().unwrap();
    }
}
