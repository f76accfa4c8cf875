//! The control socket: one JSON object per line, in and out.
//!
//! ```text
//! > {"cmd":"status"}      < {"ok":true,"version":"0.1.0","pid":412,"loop":{...},"devices":[...],...}
//! > {"cmd":"metrics"}     < {"ok":true,"loop":{...},"devices":[{"name":...,"read":{...},...}]}
//! > {"cmd":"version"}     < {"ok":true,"version":"0.1.0"}
//! > {"cmd":"log","level":"debug"}   < {"ok":true}
//! ```
//!
//! Served by the set-up thread without ever blocking it: a client that is slow, silent or sends too much is dropped.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::metrics::{DeviceMetrics, LoopMetrics};
use crate::vu::listen::{ListenError, SocketFile};

/// Adds the application's own fields to `status`.
pub type StatusSource = Box<dyn FnMut() -> Map<String, Value> + Send>;

/// Gives a device's own status, by its index.
pub type DetailSource = Box<dyn FnMut(usize) -> Value + Send>;

/// Most clients at a time.
const MAX_CLIENTS: usize = 16;
/// Longest request line.
const MAX_LINE_BYTES: usize = 4096;
/// Most bytes of answers waiting for a client that does not read.
const MAX_PENDING_BYTES: usize = 1 << 20;
/// A client that sends nothing for so long is dropped.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// A request.
#[derive(Debug, Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase")]
enum Request {
    Status,
    Metrics,
    Version,
    Log { level: String },
}

struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    last: Instant,
}

/// The control socket and its clients; does nothing if none was asked for.
pub struct Control {
    socket: Option<SocketFile>,
    clients: Vec<Client>,
    loop_metrics: Arc<LoopMetrics>,
    devices: Vec<(Arc<str>, Arc<DeviceMetrics>)>,
    details: DetailSource,
    extra: StatusSource,
}

impl Control {
    /// Listens on `path`, if given.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn new(
        path: Option<&Path>,
        loop_metrics: Arc<LoopMetrics>,
        devices: Vec<(Arc<str>, Arc<DeviceMetrics>)>,
        details: DetailSource,
        extra: StatusSource,
    ) -> Result<Self, ListenError> {
        let socket = path.map(SocketFile::bind).transpose()?;
        Ok(Self { socket, clients: Vec::new(), loop_metrics, devices, details, extra })
    }

    /// Descriptors to wait for.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let socket = self.socket.as_ref().map(AsFd::as_fd);
        socket.into_iter().chain(self.clients.iter().map(|client| client.stream.as_fd()))
    }

    /// How long to wait at most: a client with answers pending is tried again, an idle one is dropped some time.
    #[must_use]
    pub fn timeout(&self) -> Option<Timespec> {
        if self.clients.is_empty() {
            return None;
        }
        let pending = self.clients.iter().any(|client| !client.output.is_empty());
        Some(if pending {
            Timespec { tv_sec: 0, tv_nsec: 10_000_000 }
        } else {
            Timespec { tv_sec: 5, tv_nsec: 0 }
        })
    }

    /// Accepts, reads, answers and writes what can be done without waiting.
    pub fn serve(&mut self) {
        while let Some(Ok(Some(stream))) = self.socket.as_ref().map(SocketFile::accept) {
            if self.clients.len() < MAX_CLIENTS && stream.set_nonblocking(true).is_ok() {
                let (input, output) = (Vec::new(), Vec::new());
                self.clients.push(Client { stream, input, output, last: Instant::now() });
            }
        }
        let mut clients = std::mem::take(&mut self.clients);
        clients.retain_mut(|client| self.serve_client(client).is_ok());
        self.clients = clients;
    }

    /// One client; an error means that it goes.
    fn serve_client(&mut self, client: &mut Client) -> io::Result<()> {
        let mut chunk = [0; 1024];
        let mut eof = false;
        loop {
            match client.stream.read(&mut chunk) {
                Ok(0) => {
                    eof = true;
                    break;
                }
                Ok(len) => {
                    client.last = Instant::now();
                    client.input.extend_from_slice(&chunk[..len]);
                    while let Some(end) = client.input.iter().position(|&byte| byte == b'\n') {
                        let line: Vec<u8> = client.input.drain(..=end).collect();
                        let answer = self.answer(&line);
                        serde_json::to_writer(&mut client.output, &answer)?;
                        client.output.push(b'\n');
                    }
                    if client.input.len() > MAX_LINE_BYTES || client.output.len() > MAX_PENDING_BYTES {
                        return Err(io::ErrorKind::InvalidData.into());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        while !client.output.is_empty() {
            match client.stream.write(&client.output) {
                Ok(len) => drop(client.output.drain(..len)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if eof || client.last.elapsed() > IDLE_TIMEOUT {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    fn answer(&mut self, line: &[u8]) -> Value {
        match serde_json::from_slice(line) {
            Ok(Request::Status) => {
                let mut status = Map::new();
                status.insert("ok".into(), true.into());
                status.insert("version".into(), env!("CARGO_PKG_VERSION").into());
                status.insert("pid".into(), std::process::id().into());
                status.insert("loop".into(), json!(self.loop_metrics.snapshot()));
                let details = &mut self.details;
                let device = |(index, (name, _)): (usize, &(Arc<str>, _))| json!({"name": &**name, "status": details(index)});
                let devices: Vec<Value> = self.devices.iter().enumerate().map(device).collect();
                status.insert("devices".into(), devices.into());
                status.append(&mut (self.extra)());
                Value::Object(status)
            }
            Ok(Request::Metrics) => {
                let device = |(name, metrics): &(Arc<str>, Arc<DeviceMetrics>)| {
                    let mut value = json!(metrics.snapshot());
                    value["name"] = json!(&**name);
                    value
                };
                let devices: Vec<Value> = self.devices.iter().map(device).collect();
                json!({"ok": true, "loop": self.loop_metrics.snapshot(), "devices": devices})
            }
            Ok(Request::Version) => json!({"ok": true, "version": env!("CARGO_PKG_VERSION")}),
            Ok(Request::Log { level }) => match crate::process::set_log_level(&level) {
                Ok(()) => json!({"ok": true}),
                Err(error) => json!({"ok": false, "error": error}),
            },
            Err(error) => json!({"ok": false, "error": format!("not a request: {error}")}),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    #[test]
    fn requests_are_answered_line_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        let device = Arc::new(DeviceMetrics::default());
        device.read.ok.add(7);
        let extra: StatusSource = Box::new(|| Map::from_iter([("more".to_owned(), json!(1))]));
        let parts = vec![(Arc::from("disk0"), device)];
        let mut control =
            Control::new(Some(&path), Arc::default(), parts, Box::new(|index| json!(index + 40)), extra)
                .unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"{\"cmd\":\"status\"}\n{\"cmd\":\"metrics\"}\nnonsense\n").unwrap();
        control.serve();
        let mut lines = BufReader::new(client).lines().map(|line| line.unwrap());
        let mut next = || serde_json::from_str::<Value>(&lines.next().unwrap()).unwrap();
        let status = next();
        assert_eq!((&status["ok"], &status["more"]), (&json!(true), &json!(1)));
        assert_eq!(status["devices"], json!([{"name": "disk0", "status": 40}]));
        assert_eq!(next()["devices"][0]["read"]["ok"], json!(7));
        assert_eq!(next()["ok"], json!(false));
    }

    #[test]
    fn an_endless_line_ends_the_client() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        let mut control = Control::new(
            Some(&path),
            Arc::default(),
            Vec::new(),
            Box::new(|_| Value::Null),
            Box::new(Map::new),
        )
        .unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(&[b'x'; MAX_LINE_BYTES + 1]).unwrap();
        control.serve();
        assert!(control.clients.is_empty());
    }
}
