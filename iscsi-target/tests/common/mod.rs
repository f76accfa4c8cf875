//! A running target, and the tools of libiscsi.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Name of the target under test.
pub(crate) const TARGET: &str = "iqn.2026-01.org.vcp:test";

/// The program under test, on a free port.
pub(crate) struct Target {
    child: Child,
    /// `127.0.0.1:PORT`.
    pub(crate) addr: String,
}

impl Target {
    /// Starts it with these options behind `--target`, and waits until it is ready.
    pub(crate) fn start(options: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_iscsi-target"))
            .args(["serve", "--listen", "127.0.0.1:0", "--log", "warn", "--target", TARGET])
            .args(options)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the target starts");
        let stdout = child.stdout.take().expect("piped");
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let mut reader = BufReader::new(stdout);
            let _ = reader.read_line(&mut line);
            let _ = sender.send(line);
            // Keeps the pipe open until the end.
            let _ = reader.read_to_end(&mut Vec::new());
        });
        let line = receiver.recv_timeout(Duration::from_secs(20)).expect("a ready line in time");
        let addr = line
            .strip_prefix("ready: addr=")
            .and_then(|rest| rest.split(' ').next())
            .unwrap_or_else(|| panic!("not a ready line: {line:?}"));
        assert!(line.contains(&format!(" target={TARGET}")) && line.contains(" luns="), "{line:?}");
        Self { addr: addr.into(), child }
    }

    /// The URL of a LUN.
    #[allow(dead_code, reason = "not all tests use it")]
    pub(crate) fn url(&self, lun: u32) -> String {
        format!("iscsi://{}/{TARGET}/{lun}", self.addr)
    }

    /// Its process.
    #[allow(dead_code, reason = "not all tests use it")]
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Ends it with a signal and checks that it ends cleanly.
    pub(crate) fn stop(mut self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("the target is alive");
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                assert!(status.success(), "{status}");
                return;
            }
            assert!(Instant::now() < deadline, "the target does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a tool; `None` if it is not installed, which is a failure where `VCP_REQUIRE_TOOLS=1` says that it must be.
#[allow(dead_code, reason = "not all tests use it")]
pub(crate) fn tool(name: &str, args: &[&str]) -> Option<Output> {
    // The kernel ends what hangs: `timeout` is part of coreutils.
    match Command::new("timeout").arg("240").arg(name).args(args).output() {
        Ok(output) if output.status.code() == Some(127) => {
            let required = std::env::var("VCP_REQUIRE_TOOLS").is_ok_and(|value| value == "1");
            assert!(!required, "{name} is not installed (Debian package libiscsi-bin)");
            eprintln!("SKIPPED: {name} is not installed (Debian package libiscsi-bin)");
            None
        }
        Ok(output) => Some(output),
        Err(error) => panic!("{name}: {error}"),
    }
}
