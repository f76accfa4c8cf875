//! A program of ours that the demo or a benchmark starts beside itself, on the test beds' processes: what it told in
//! its `ready:` line, and a sure end.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, anyhow};
use vcp_tests::proc::{Cmd, Proc, Stream};

/// How long a program may take until it is ready.
const READY_WITHIN: Duration = Duration::from_secs(20);

/// A running program that printed its `ready:` line; it is killed when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    proc: Proc,
    ready: String,
}

impl Server {
    /// Starts `program` and waits until it is ready.
    ///
    /// # Errors
    /// It cannot be started, ends, or is not ready within 20 s; the message has its last output.
    pub(crate) fn start(program: &Path, args: &[&str]) -> Result<Self> {
        let proc = Cmd::new(program).args(args).spawn()?;
        let ready = proc.wait_line(Stream::Out, "ready:", READY_WITHIN)?;
        Ok(Self { proc, ready })
    }

    /// VALUE of the word `key=VALUE` of the ready line.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn told(&self, key: &str) -> Result<&str> {
        self.ready
            .split_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
            .ok_or_else(|| anyhow!("no {key}= in `{}`", self.ready))
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.proc.pid()
    }
}
