//! Processes that say what a test has them say.

use std::path::PathBuf;

use rustix::event::{EventfdFlags, eventfd};

use super::*;

/// A program that takes a VCP's options; `then` is what it does with the URL in `$url`.
fn program(dir: &Path, then: &str) -> PathBuf {
    let path = dir.join("vcp-iscsi");
    let text = format!("#!/bin/sh\nhere={}\nurl=$(cat \"$5\")\n{then}\n", dir.display());
    // Written by another process: a descriptor open for writing that a test beside this one inherits by fork would
    // make it "text file busy".
    let mut write = std::process::Command::new("sh");
    write.args(["-c", "printf %s \"$1\" > \"$0\" && chmod 755 \"$0\""]).arg(&path).arg(text);
    assert!(write.status().unwrap().success());
    path
}

fn start_first(dir: &Path, then: &str, first: First) -> VcpProcess {
    let mut vcp = VcpSpec::new("disk0", "iscsi://user%secret@host/iqn.x:y/0".into(), 2).unwrap();
    // A user of its own could not reach the test's directory.
    vcp.paths.urls = vec!["iscsi://user%secret@other".into()];
    vcp.spaces = Spaces::NONE;
    VcpProcess::start(&program(dir, then), &vcp, first).unwrap()
}

fn start(dir: &Path, then: &str) -> VcpProcess {
    start_first(dir, then, First::Serve)
}

fn never() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(300);

#[test]
fn ready_with_the_secret_passed_aside_and_ended() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = start(
        dir.path(),
        "echo \"$url\" > $here/url; ls /proc/$$/fd >$here/fds; echo hello; echo ready: here; exec sleep 1000",
    );
    process.wait_ready(LONG, never()).unwrap();
    let arguments = std::fs::read(format!("/proc/{}/cmdline", process.pid())).unwrap();
    assert!(!String::from_utf8_lossy(&arguments).contains("secret"));
    let url = std::fs::read_to_string(dir.path().join("url")).unwrap();
    assert_eq!(url.trim(), "iscsi://user%secret@host/iqn.x:y/0\niscsi://user%secret@other");
    // Its own and no others; the shell keeps the script open at 10 or above.
    let fds = std::fs::read_to_string(dir.path().join("fds")).unwrap();
    let mut fds: Vec<u32> = fds.lines().map(|fd| fd.parse().unwrap()).filter(|fd| *fd < 10).collect();
    fds.sort_unstable();
    assert_eq!(fds, [0, 1, 2, 3, 4, 5]);
    let pid = process.pid();
    assert_eq!(process.ended(), None);
    drop(process);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn end_before_ready_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let error = start(dir.path(), "exit 3").wait_ready(LONG, never()).unwrap_err();
    assert!(error.to_string().contains("ended before it was ready: exit code 3"), "{error}");
}

#[test]
fn silence_is_an_error_and_a_stubborn_process_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = start(dir.path(), "trap '' TERM; while :; do sleep 0.1; done");
    let error = process.wait_ready(SHORT, never()).unwrap_err();
    assert!(error.to_string().contains("was not ready within"), "{error}");
    let pid = process.pid();
    drop(process);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn chatter_is_not_readiness() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = start(dir.path(), "exec yes");
    let error = process.wait_ready(SHORT, never()).unwrap_err();
    assert!(error.to_string().contains("was not ready within"), "{error}");
}

#[test]
fn a_signal_ends_the_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = start(dir.path(), "exec sleep 1000");
    let signal = eventfd(1, EventfdFlags::CLOEXEC).unwrap();
    assert!(matches!(process.wait_ready(LONG, signal), Err(Error::Interrupted)));
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let vcp = VcpSpec::new("disk0", "iscsi://h/i/0".into(), 1).unwrap();
    let error = VcpProcess::start(Path::new("/nonexistent/vcp"), &vcp, First::Serve).unwrap_err();
    assert!(error.to_string().contains("disk0: cannot find /nonexistent/vcp"), "{error}");
}

#[test]
fn one_that_stands_by_goes_on_when_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let then = "echo standby: x; read word <&6 || head -c 1 <&6 >/dev/null; echo ready: x; exec sleep 1000";
    let mut process = start_first(dir.path(), then, First::StandBy);
    let error = process.wait_ready(SHORT, never()).unwrap_err();
    assert!(error.to_string().contains("was not ready"), "{error}");
    process.go();
    process.wait_ready(LONG, never()).unwrap();
}
