//! What the conformance tests share: a misbehaving target, `vcp-iscsi serve` on it, and a driver.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;
use vcp_tests::backend::Backend;
use vcp_tests::bad_target::{BadTarget, Entry};
use vcp_tests::front::{Driver, Failure, Op, all_features};
use vcp_tests::{Result, pattern};

/// How long anything may take that has no other limit.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// The three of them.
pub(super) struct Bed {
    pub(super) target: BadTarget,
    pub(super) backend: Backend,
    pub(super) driver: Driver,
    control: PathBuf,
    _dir: tempfile::TempDir,
}

/// Starts them; the script is in force from the login on, so probing sees it.
pub(super) fn bed(script: &str, args: &[&str]) -> Result<Bed> {
    bed_of(BadTarget::start(script)?, 0, args)
}

/// The same on a target that runs.
pub(super) fn bed_of(target: BadTarget, lun: u64, args: &[&str]) -> Result<Bed> {
    bed_with(target, lun, args, all_features())
}

/// The same with a driver that takes these features at most.
pub(super) fn bed_with(target: BadTarget, lun: u64, args: &[&str], features: u64) -> Result<Bed> {
    let dir = tempfile::Builder::new().prefix("vcp-bad-").tempdir()?;
    let control = dir.path().join("ctl");
    let control_arg = control.display().to_string();
    let mut all = vec!["--control", &control_arg];
    all.extend(args);
    let backend = Backend::vcp_iscsi(&target.url_of(lun), &all)
        .with_context(|| format!("bad-target:\n{}", target.story().unwrap_or_default()))?;
    let driver = Driver::connect_with(backend.socket(), 1, features)?;
    Ok(Bed { target, backend, driver, control, _dir: dir })
}

/// Options that have the time limits of tests: commands 1 s, pings 2 s.
pub(super) const FAST: &[&str] = &["--command-timeout-ms", "1000", "--keepalive-ms", "2000"];

impl Bed {
    /// Writes the pattern of `seed` over the first `len` bytes, then gives the target its rules.
    pub(super) fn prepare(&mut self, seed: u64, len: usize, rules: &str) -> Result<()> {
        for at in (0..len).step_by(64 << 10) {
            let part = (len - at).min(64 << 10);
            self.driver.write(at as u64, &pattern::make(seed, at as u64, part))?;
        }
        self.target.script(rules)
    }

    /// Reads; the data must be the pattern of `seed`.
    pub(super) fn reads(&mut self, seed: u64, offset: u64, len: usize) -> Result<()> {
        let data = self.driver.read(offset, len).with_context(|| self.story())?;
        pattern::check(seed, offset, &data).with_context(|| self.story())
    }

    /// Writes the pattern of `seed`, and reads it back.
    pub(super) fn writes(&mut self, seed: u64, offset: u64, len: usize) -> Result<()> {
        self.driver.write(offset, &pattern::make(seed, offset, len)).with_context(|| self.story())?;
        self.reads(seed, offset, len)
    }

    /// Reads; the answer.
    pub(super) fn try_read(
        &mut self,
        offset: u64,
        len: usize,
    ) -> Result<std::result::Result<Vec<u8>, Failure>> {
        self.driver.request(0, &Op::Read { offset, len }).with_context(|| self.story())
    }

    /// Writes the pattern of `seed`; the answer.
    pub(super) fn try_write(
        &mut self,
        seed: u64,
        offset: u64,
        len: usize,
    ) -> Result<std::result::Result<(), Failure>> {
        let op = Op::Write { offset, data: pattern::make(seed, offset, len) };
        let answer = self.driver.request(0, &op).with_context(|| self.story())?;
        Ok(answer.map(|_| ()))
    }

    /// What the target saw, for messages.
    pub(super) fn story(&self) -> String {
        format!(
            "bad-target:\n{}\nvcp-iscsi:\n{}",
            self.target.story().unwrap_or_default(),
            self.backend.proc().tail()
        )
    }

    /// Full feature sessions so far.
    pub(super) fn sessions(&self) -> Result<usize> {
        self.target.count("event", "full-feature")
    }

    /// Demands that there were so many sessions.
    pub(super) fn had_sessions(&self, count: usize) -> Result<()> {
        let had = self.sessions()?;
        ensure!(had == count, "{had} sessions in place of {count}\n{}", self.story());
        Ok(())
    }

    /// PDUs of ours with this label.
    pub(super) fn sent(&self, label: &str) -> Result<Vec<Entry>> {
        self.target.seen("in", label)
    }

    /// What `vcp-iscsi` says of its engine.
    pub(super) fn status(&self) -> Result<Value> {
        let mut stream = UnixStream::connect(&self.control)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.write_all(b"{\"cmd\":\"status\"}\n")?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        let all: Value = serde_json::from_str(&line)?;
        Ok(all["devices"][0]["status"]["engine"].clone())
    }

    /// A number of the engine's statistics.
    pub(super) fn stat(&self, name: &str) -> Result<u64> {
        let status = self.status()?;
        status["stats"][name].as_u64().with_context(|| format!("no {name} in {status}"))
    }

    /// How often the engine counted a violation whose words contain `words`.
    pub(super) fn violations(&self, words: &str) -> Result<u64> {
        let status = self.status()?;
        let list = status["stats"]["violations"].as_array().cloned().unwrap_or_default();
        let counted =
            |v: &Value| v[0].as_str().is_some_and(|t| t.contains(words)).then(|| v[1].as_u64()).flatten();
        Ok(list.iter().filter_map(counted).sum())
    }

    /// Demands that the engine counted this violation.
    pub(super) fn noticed(&self, words: &str) -> Result<()> {
        ensure!(self.violations(words)? > 0, "{words:?} was not counted: {}", self.status()?["stats"]);
        Ok(())
    }

    /// The end: the initiator broke no rule, is still able to work, and obeys SIGTERM.
    pub(super) fn finish(mut self) -> Result<()> {
        self.writes(99, 0, 4096).context("the device is no longer of use")?;
        self.target.judge()?;
        let (status, took) = self.backend.proc().terminate(DEADLINE)?;
        ensure!(status.success(), "vcp-iscsi ended with {status}");
        ensure!(took < Duration::from_secs(6), "the end took {took:?}");
        self.target.judge()
    }
}

/// Connects a driver after the one before went. A process that another test starts just then holds that one's socket for a
/// moment (between fork and exec), and as long as it is open a second front end is refused.
pub(super) fn next_driver(backend: &Backend) -> Result<Driver> {
    let end = Instant::now() + DEADLINE;
    loop {
        match Driver::connect(backend.socket(), 1) {
            Err(_) if backend.proc().is_running() && Instant::now() < end => {}
            result => return result,
        }
    }
}

/// Does something for each case, all at once: for cases that mostly wait.
pub(super) fn each<T: Sync + std::fmt::Debug>(
    cases: &[T],
    check: impl Fn(&T) -> Result<()> + Sync,
) -> Result<()> {
    let check = &check;
    std::thread::scope(|scope| {
        let threads: Vec<_> = cases.iter().map(|case| scope.spawn(move || check(case))).collect();
        // All are joined, whatever the first says.
        let results: Vec<_> = threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        for (case, result) in cases.iter().zip(results) {
            match result {
                Ok(result) => result.with_context(|| format!("case {case:?}"))?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(())
    })
}

/// Waits for something that is only to be seen by looking.
pub(super) fn eventually(what: &str, mut look: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    while !look()? {
        ensure!(Instant::now() < end, "{what} did not happen within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
