//! A terminal of 80 columns and 24 lines, by tmux, and what stands on it.

use std::time::{Duration, Instant};

use anyhow::bail;

use crate::proc::Cmd;
use crate::{Result, tool};

/// How long one command of tmux may take.
const TMUX: Duration = Duration::from_secs(20);
/// How often the screen is looked at while something is waited for.
const LOOK: Duration = Duration::from_millis(50);

/// A terminal with one program in it; both end on drop.
#[derive(Debug)]
pub struct Screen {
    dir: tempfile::TempDir,
}

impl Screen {
    /// Runs a shell command in a new terminal. `None`, with a word about it, where there is no tmux.
    pub fn start(command: &str) -> Result<Option<Self>> {
        if !tool::have(&["tmux"]) {
            return Ok(None);
        }
        let screen = Self { dir: tempfile::Builder::new().prefix("vcp-screen-").tempdir()? };
        // What it leaves behind stays to be read: its exit code, and that the terminal is as it was.
        let command = format!("{command}; echo exit code $?; exec sleep 1000");
        screen.tmux(&[
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-s",
            "s",
            "-x",
            "80",
            "-y",
            "24",
            &command,
        ])?;
        Ok(Some(screen))
    }

    fn tmux(&self, args: &[&str]) -> Result<String> {
        let socket = self.dir.path().join("tmux");
        Cmd::new("tmux").arg("-S").arg(socket).args(args).env("TERM", "xterm-256color").output(TMUX)
    }

    /// Presses keys, by their tmux names.
    pub fn press(&self, keys: &str) -> Result<()> {
        self.tmux(&["send-keys", "-t", "s", keys]).map(drop)
    }

    /// The lines on the screen.
    pub fn lines(&self) -> Result<Vec<String>> {
        Ok(self.tmux(&["capture-pane", "-p", "-t", "s"])?.lines().map(str::to_owned).collect())
    }

    /// Waits until `good` finds what it wants on the screen.
    pub fn wait(
        &self,
        what: &str,
        deadline: Duration,
        good: impl Fn(&[String]) -> bool,
    ) -> Result<Vec<String>> {
        let end = Instant::now() + deadline;
        loop {
            let lines = self.lines()?;
            if good(&lines) {
                return Ok(lines);
            }
            if Instant::now() > end {
                bail!("{what} did not appear within {deadline:?}:\n{}", lines.join("\n"));
            }
            std::thread::sleep(LOOK);
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]);
    }
}
