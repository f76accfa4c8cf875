//! System calls of a running process, from `strace -c`.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

/// `strace -c` on a running process.
#[derive(Debug)]
pub(crate) struct Strace {
    child: Child,
    summary: tempfile::NamedTempFile,
}

impl Strace {
    /// Attaches to all threads of a process; returns when counting has begun.
    ///
    /// # Errors
    /// strace is missing or may not attach.
    pub(crate) fn attach(pid: u32) -> Result<Self> {
        let summary = tempfile::NamedTempFile::new()?;
        let mut child = Command::new("strace")
            .args(["-c", "-f", "-p", &pid.to_string(), "-o"])
            .arg(summary.path())
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
        Ok(Self { child, summary })
    }

    /// Detaches and returns the number of system calls since [`Self::attach`].
    ///
    /// # Errors
    /// strace left no summary.
    pub(crate) fn finish(mut self) -> Result<u64> {
        rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.child),
            rustix::process::Signal::INT,
        )?;
        self.child.wait()?;
        total(self.summary.path())
    }
}

/// The `calls` column of the last line, which is the total.
fn total(path: &Path) -> Result<u64> {
    let text = std::fs::read_to_string(path)?;
    let line = text.lines().rev().find(|line| line.trim_end().ends_with("total"));
    line.and_then(|line| line.split_whitespace().nth(3)?.parse().ok())
        .with_context(|| format!("strace's summary has no total: {text}"))
}
