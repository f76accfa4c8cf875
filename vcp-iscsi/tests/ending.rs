//! `vcp-iscsi serve` ends at once on SIGTERM, whatever it waits for before it serves.

use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const DEADLINE: Duration = Duration::from_secs(20);

/// The process, killed if the test fails before it ended.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(args: &[&str]) -> Served {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vcp-iscsi"));
    Served(command.arg("serve").args(args).stdin(Stdio::null()).spawn().unwrap())
}

fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} did not happen in time");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn terminate(served: &mut Served) -> ExitStatus {
    kill_process(Pid::from_child(&served.0), Signal::TERM).unwrap();
    wait("the end", || served.0.try_wait().unwrap())
}

#[test]
fn while_it_waits_for_its_url() {
    let dir = tempfile::tempdir().unwrap();
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    let file = format!("/proc/{}/fd/{}", std::process::id(), reader.as_raw_fd());
    let socket = dir.path().join("s");
    let mut served = serve(&["--socket-path", socket.to_str().unwrap(), "--url-file", &file]);
    // Signals are taken care of from when SIGTERM (15) is blocked.
    let status = format!("/proc/{}/status", served.0.id());
    wait("signals are blocked", || {
        let text = std::fs::read_to_string(&status).ok()?;
        let mask = text.lines().find_map(|line| line.strip_prefix("SigBlk:"))?;
        let mask = u64::from_str_radix(mask.trim(), 16).unwrap();
        (mask & 1 << 14 != 0).then_some(())
    });
    assert!(terminate(&mut served).success());
}

#[test]
fn while_it_logs_in_and_no_socket_stays_behind() {
    let dir = tempfile::tempdir().unwrap();
    let target = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("iscsi://{}/iqn.2001-04.com.example:silent/0", target.local_addr().unwrap());
    let socket = dir.path().join("s");
    let mut served = serve(&["--socket-path", socket.to_str().unwrap(), &url]);
    let _connection = target.accept().unwrap();
    assert!(socket.exists());
    assert!(terminate(&mut served).success());
    assert!(!socket.exists(), "the socket file stays behind");
}
