//! The monitor's API: any bytes of a client, and well-formed requests with any path and body. Whatever comes, there is an
//! answer in HTTP with a body that is JSON, and no command reaches the machine that is not valid in itself.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::api::{Machine, Reply, server};
use vmm::machine::command::{Command, CommandError};

/// A machine that checks what it is sent.
struct Checks;

impl Machine for Checks {
    fn send(&self, command: Command, reply: Reply) {
        match &command {
            Command::AddDisk(spec) => spec.validate().expect("a disk that is none"),
            Command::AddNet(spec) => spec.validate().expect("a net that is none"),
            Command::Pin { cpus, .. } => assert!(!cpus.is_empty() && cpus.iter().all(|cpu| *cpu < 1024)),
            Command::RemoveDisk(name) | Command::RemoveNet(name) => {
                assert!(!name.is_empty() && name.len() <= 32 && !name.contains(['/', '\\', '\0']));
            }
            Command::Snapshot(path) => assert!(path.is_absolute()),
            _ => {}
        }
        reply(Err(CommandError::Failed("not here".into())));
    }
}

const METHODS: [&str; 5] = ["GET", "POST", "PUT", "DELETE", "PATCH"];
const PATHS: [&str; 12] = [
    "/api/v1/status",
    "/metrics",
    "/api/v1/pause",
    "/api/v1/disks",
    "/api/v1/nets",
    "/api/v1/memory",
    "/api/v1/pin",
    "/api/v1/log",
    "/api/v1/snapshot",
    "/api/v1/devices/disk0/restart",
    "/api/v1/devices/disk0/limits",
    "",
];

fuzz_target!(|input: &[u8]| {
    let [kind, rest @ ..] = input else { return };
    if *kind == 0 {
        check(&server::answer(rest, Checks));
        return;
    }
    let method = METHODS[usize::from(*kind) % METHODS.len()];
    let path = PATHS[usize::from(*kind >> 4) % PATHS.len()];
    let (path, body) = match rest.iter().position(|byte| *byte == b'\n') {
        // A path of its own, or the name of a device.
        Some(at) if path.is_empty() => (String::from_utf8_lossy(&rest[..at]).into_owned(), &rest[at + 1..]),
        _ => (path.to_owned(), rest),
    };
    let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    let answer = server::answer(&[head.as_bytes(), body].concat(), Checks);
    check(&answer);
});

fn check(answer: &[u8]) {
    if answer.is_empty() {
        return;
    }
    assert!(answer.starts_with(b"HTTP/1."), "{}", String::from_utf8_lossy(answer));
    let split = answer.windows(4).position(|window| window == b"\r\n\r\n").expect("no end of the head");
    let (head, body) = (String::from_utf8_lossy(&answer[..split]).to_lowercase(), &answer[split + 4..]);
    if head.contains("content-type: application/json") {
        serde_json::from_slice::<serde_json::Value>(body).expect("a body that is no JSON");
    }
    assert!(!head.starts_with("http/1.1 500") || body.windows(8).any(|w| w == b"not here"), "{head}");
}
