//! The API from outside: a server on a real socket, a machine that answers as it is told.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::client::{Client, ClientError};
use super::server::{MAX_BODY_BYTES, Server, Sockets};
use super::types::GuestStatus;
use super::{Machine, Reply};
use crate::config::{VmConfig, VmFile};
use crate::machine::command::{Answer, Command, CommandError, Reply as Brings};
use crate::machine::status::Status;

/// Longest that a test waits for anything.
const LIMIT: Duration = Duration::from_secs(20);

/// Answers each command with what the test says, and keeps the commands.
#[derive(Clone, Default)]
struct Fake {
    seen: Arc<Mutex<Vec<String>>>,
    error: Option<CommandError>,
    mute: bool,
}

impl Machine for Fake {
    fn send(&self, command: Command, reply: Reply) {
        self.seen.lock().unwrap().push(format!("{command:?}"));
        if self.mute {
            return;
        }
        reply(match (&self.error, &command) {
            (Some(error), _) => Err(error.clone()),
            (None, Command::Status) => status(),
            (None, Command::AddDisk(_)) => Ok(Brings::Added("disk7".into())),
            (None, Command::AddNet(_)) => Ok(Brings::Added("net7".into())),
            _ => Ok(Brings::Done),
        });
    }
}

fn status() -> Answer {
    let status: Status = serde_json::from_value(json!({
        "state": "paused", "pid": 1, "uptime_ms": 1500, "memory_bytes": 4096, "panicked": false,
        "vcpus": [{"id": 0, "thread_id": 2, "cpus": null, "exits":
            {"io_in": 1, "io_out": 2, "mmio_read": 3, "mmio_write": 4, "interrupted": 5, "other": 6}}],
        "devices": [{"name": "disk0", "kind": "disk", "address": "mmio 0xd0000000", "active": true,
            "backend": {"connected": true, "pid": 3, "restarts": 4}}],
    }))
    .unwrap();
    Ok(Brings::Status(Box::new(status)))
}

struct Bed {
    _dir: tempfile::TempDir,
    path: PathBuf,
    server: Option<Server>,
    fake: Fake,
}

fn config(path: &Path) -> VmConfig {
    let text = format!("kernel='k'\nname='vm1'\napi-socket={path:?}\nmetrics='unix:{}.m'\n", path.display());
    VmFile::parse(&text).unwrap().finish().unwrap()
}

fn bed(fake: Fake) -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    let server = Sockets::bind(&config(&path)).unwrap().serve("vm1", fake.clone()).unwrap();
    Bed { _dir: dir, path, server, fake }
}

impl Bed {
    /// Sends bytes as they are, and reads until the server closes.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        // A server that has heard enough may close before all is sent.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// A request with a body: status, and the JSON that came back.
    fn request(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let len = body.len();
        let answer = self.raw(
            format!("{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len}\r\n\r\n{body}").as_bytes(),
        );
        let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.fake.seen.lock().unwrap())
    }
}

#[test]
fn each_request_is_its_command() {
    let bed = bed(Fake::default());
    for (method, path, body, code, command) in [
        ("POST", "/api/v1/pause", "", 204, "Pause"),
        ("POST", "/api/v1/resume", "", 204, "Resume"),
        ("POST", "/api/v1/shutdown", "", 204, "Shutdown"),
        ("POST", "/api/v1/kill", "", 204, "Kill"),
        ("POST", "/api/v1/disks", r#"{"socket":"/s","queues":2}"#, 201, "AddDisk(DiskSpec"),
        ("DELETE", "/api/v1/disks/disk1", "", 204, r#"RemoveDisk("disk1")"#),
        ("POST", "/api/v1/nets", r#"{"user":true,"hostfwd":["tcp::1-2"]}"#, 201, "AddNet(NetSpec"),
        ("DELETE", "/api/v1/nets/net0", "", 204, r#"RemoveNet("net0")"#),
        ("PUT", "/api/v1/memory", r#"{"bytes":4096}"#, 204, "Resize { memory_bytes: 4096 }"),
        (
            "PUT",
            "/api/v1/pin",
            r#"{"target":{"vcpu":1},"cpus":[3,2,3]}"#,
            204,
            "Pin { target: Vcpu(1), cpus: [2, 3] }",
        ),
        (
            "PUT",
            "/api/v1/pin",
            r#"{"target":{"device":"disk0"},"cpus":[0]}"#,
            204,
            "Pin { target: Device(\"disk0\")",
        ),
        ("POST", "/api/v1/devices/disk0/restart", "", 204, "how: Kill"),
        ("POST", "/api/v1/devices/disk0/restart", r#"{"upgrade":true}"#, 204, "how: Upgrade"),
        ("POST", "/api/v1/snapshot", r#"{"path":"/x"}"#, 204, r#"Snapshot("/x")"#),
    ] {
        let (got, answer) = bed.request(method, path, body);
        assert_eq!(got, code, "{method} {path}: {answer}");
        let seen = bed.seen();
        assert!(seen.len() == 1 && seen[0].contains(command), "{method} {path}: {seen:?}");
        if code == 201 {
            assert!(answer["name"].as_str().unwrap().ends_with('7'), "{answer}");
        }
    }
}

#[test]
fn wrong_requests_are_told_what_is_wrong_and_reach_nobody() {
    let bed = bed(Fake::default());
    for (method, path, body, code, words) in [
        ("GET", "/", "", 404, "openapi"),
        ("GET", "/api/v1/pause", "", 405, "GET"),
        ("POST", "/api/v1/disks", "{", 400, "EOF"),
        ("POST", "/api/v1/disks", r#"{"socket":"/s","que":1}"#, 400, "que"),
        ("POST", "/api/v1/disks", r#"{"socket":"/s","url":"iscsi://h/i/0"}"#, 400, "not both"),
        ("POST", "/api/v1/disks", "", 400, "socket=PATH"),
        ("POST", "/api/v1/nets", r#"{"user":true,"hostfwd":["x"]}"#, 400, "forwarded port"),
        ("DELETE", "/api/v1/disks/a%2Fb", "", 400, "disk0"),
        ("DELETE", "/api/v1/disks/%ff", "", 400, "UTF-8"),
        ("PUT", "/api/v1/memory", r#"{"bytes":-1}"#, 400, "-1"),
        ("PUT", "/api/v1/memory", "", 400, "bytes"),
        ("PUT", "/api/v1/pin", r#"{"target":{"vcpu":0},"cpus":[]}"#, 400, "at least one"),
        ("PUT", "/api/v1/pin", r#"{"target":{"vcpu":0},"cpus":[99999]}"#, 400, "cpus"),
        ("PUT", "/api/v1/devices/disk0/limits", "{}", 400, "iops"),
        ("PUT", "/api/v1/log", r#"{"level":"[["}"#, 400, "log filter"),
        ("POST", "/api/v1/snapshot", r#"{"path":"x"}"#, 400, "absolute"),
    ] {
        let (got, answer) = bed.request(method, path, body);
        let error = answer["error"].as_str().unwrap_or_default();
        assert!(
            got == code && error.contains(words) && !error.contains('\n'),
            "{method} {path} {body}: {got} {answer}"
        );
        assert!(bed.seen().is_empty(), "{method} {path}");
    }
}

#[test]
fn a_body_that_is_too_long_is_refused() {
    let bed = bed(Fake::default());
    let body = format!("{{\"socket\":\"{}\"}}", "x".repeat(MAX_BODY_BYTES));
    assert_eq!(bed.request("POST", "/api/v1/disks", &body).0, 413);
    let endless = bed
        .raw(b"POST /api/v1/disks HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffffff\r\n");
    assert!(endless.is_empty() || endless.starts_with("HTTP/1.1 4"), "{endless}");
    assert!(bed.seen().is_empty());
}

#[test]
fn failures_have_the_code_of_their_kind() {
    for (error, code) in [
        (CommandError::NotYet("this"), 501),
        (CommandError::NotFound("disk9".into()), 404),
        (CommandError::Invalid("no".into()), 400),
        (CommandError::Conflict("paused".into()), 409),
        (CommandError::Failed("broken\nin two".into()), 500),
        (CommandError::Ended, 503),
    ] {
        let bed = bed(Fake { error: Some(error.clone()), ..Fake::default() });
        let (got, answer) = bed.request("POST", "/api/v1/pause", "");
        assert_eq!(
            (got, answer["error"].as_str()),
            (code, Some(error.to_string().replace('\n', " ").as_str()))
        );
        let client = Client::new(&bed.path, LIMIT).unwrap();
        let refused = client.send(hyper::Method::POST, "/api/v1/pause", None::<&()>).unwrap_err();
        assert!(
            matches!(&refused, ClientError::Refused { is_usage, .. } if *is_usage == (code == 400)),
            "{refused:?}"
        );
    }
}

#[test]
fn the_client_reads_what_the_server_writes() {
    let bed = bed(Fake::default());
    let client = Client::new(&bed.path, LIMIT).unwrap();
    let status: GuestStatus = client.get("/api/v1/status").unwrap();
    assert_eq!((status.name.as_str(), status.machine.uptime_ms), ("vm1", 1500));
    // It was said to have a process, which has no control socket here.
    assert_eq!((status.vcps.len(), status.vcps[0].answers), (1, false));
}

#[test]
fn a_machine_that_has_ended_or_does_not_answer_is_no_hang() {
    let bed = bed(Fake { mute: true, ..Fake::default() });
    // Its reply was dropped.
    assert_eq!(bed.request("POST", "/api/v1/pause", "").0, 503);
}

#[test]
fn the_page_of_metrics_is_on_both_sockets() {
    let bed = bed(Fake::default());
    let ask = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n";
    let page_socket = PathBuf::from(format!("{}.m", bed.path.display()));
    let mut stream = UnixStream::connect(&page_socket).unwrap();
    stream.write_all(ask).unwrap();
    let mut other = String::new();
    stream.read_to_string(&mut other).unwrap();
    for text in [bed.raw(ask), other] {
        assert!(text.contains("content-type: application/openmetrics-text"), "{text}");
        for line in [
            r#"vcp_guest_running{guest="vm1"} 0"#,
            r#"vcp_vcpu_exits_total{guest="vm1",vcpu="0",kind="mmio_write"} 4"#,
            r#"vcp_device_backend_restarts_total{guest="vm1",device="disk0"} 4"#,
            r#"vcp_device_answers{guest="vm1",device="disk0"} 0"#,
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found.trim() == line), "no {line} in {text}");
        }
    }
    // The page's socket has nothing else.
    let mut stream = UnixStream::connect(&page_socket).unwrap();
    stream.write_all(b"POST /api/v1/kill HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    assert!(!bed.seen().iter().any(|command| command == "Kill"));
}

#[test]
fn the_socket_is_private_replaced_if_stale_and_removed() {
    let mut bed = bed(Fake::default());
    let mode = std::fs::metadata(&bed.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = Sockets::bind(&config(&bed.path)).unwrap_err();
    assert!(crate::chain(&error).contains("in use"), "{error:?}");
    drop(bed.server.take());
    assert!(!bed.path.exists());
    // Left from a process that died.
    drop(std::os::unix::net::UnixListener::bind(&bed.path).unwrap());
    assert!(bed.path.exists());
    drop(Sockets::bind(&config(&bed.path)).unwrap());
    assert!(!bed.path.exists());
    std::fs::write(&bed.path, "a file").unwrap();
    assert!(Sockets::bind(&config(&bed.path)).is_err());
    assert_eq!(std::fs::read_to_string(&bed.path).unwrap(), "a file");
}

#[test]
fn slow_and_silent_clients_are_dropped_and_do_not_disturb_others() {
    let bed = bed(Fake::default());
    let mut slow: Vec<UnixStream> = (0..20).map(|_| UnixStream::connect(&bed.path).unwrap()).collect();
    for stream in &mut slow {
        stream.write_all(b"GET /api/v1/status HT").unwrap();
    }
    let begun = Instant::now();
    assert_eq!(bed.request("GET", "/api/v1/status", "").0, 200);
    assert!(begun.elapsed() < Duration::from_secs(4), "others had to wait for {:?}", begun.elapsed());
    for mut stream in slow {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut answer = Vec::new();
        // Closed, with or without a word.
        stream.read_to_end(&mut answer).unwrap();
        assert!(
            answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"),
            "{}",
            String::from_utf8_lossy(&answer)
        );
    }
}

#[test]
fn a_client_without_a_server_says_what_to_try() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none");
    let error = Client::new(&path, LIMIT).unwrap().get::<Value>("/api/v1/status").unwrap_err();
    assert!(error.to_string().contains("--api-socket"), "{error}");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let limit = Duration::from_millis(200);
    let error = Client::new(&path, limit).unwrap().get::<Value>("/api/v1/status").unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    drop(listener);
    let error = Client::new(&path, LIMIT).unwrap().get::<Value>("/api/v1/status").unwrap_err();
    assert!(error.to_string().contains("has ended"), "{error}");
}

#[test]
fn something_else_at_the_socket_is_an_error_on_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    for answer in [
        "SSH-2.0-x\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nyes",
        "HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n",
        "",
    ] {
        let client = Client::new(&path, LIMIT).unwrap();
        let error = std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(answer.as_bytes());
            });
            client.get::<GuestStatus>("/api/v1/status").unwrap_err()
        });
        assert!(
            matches!(&error, ClientError::Broken { .. }) && !crate::chain(&error).contains('\n'),
            "{answer:?}: {error:?}"
        );
    }
}
