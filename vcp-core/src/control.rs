//! The control socket, one JSON object per line, in and out; and the page of metrics.
//!
//! ```text
//! > {"cmd":"status"}      < {"ok":true,"version":"0.1.0","pid":412,"loop":{...},"devices":[...],...}
//! > {"cmd":"metrics"}     < {"ok":true,"loop":{...},"devices":[{"name":...,"read":{...},"samples":[...],...}]}
//! > {"cmd":"version"}     < {"ok":true,"version":"0.1.0"}
//! > {"cmd":"log","level":"debug"}   < {"ok":true}
//! > {"cmd":ANYTHING,"device":"disk0",...}   < {"ok":true,"devices":[{"name":"disk0",...}]}
//! ```
//!
//! A command that is none of the first four is that of what joins the devices, if it knows it, or the devices' own: of the
//! one named, else of all of them.
//!
//! Served by the set-up thread without ever blocking it: a client that is slow, silent or sends too much is dropped.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Map, Value, json};

use crate::ask::{Ask, Told};
use crate::handover::Fds;
use crate::handover::state::{BadState, PageState, SocketState};
use crate::http::HttpServer;
use crate::metrics::{DeviceMetrics, LoopMetrics, Samples, families, page};
use crate::poll::FABRIC;
use crate::vu::listen::SocketFile;

/// Adds the application's own fields to `status`.
pub type StatusSource = Box<dyn FnMut() -> Map<String, Value> + Send>;

/// Asks a device, by its index; `None` if it does not answer in time.
pub type AskSource = Box<dyn FnMut(usize, Ask) -> Option<Told> + Send>;

/// Most clients at a time.
const MAX_CLIENTS: usize = 16;
/// Longest request line.
const MAX_LINE_BYTES: usize = 4096;
/// Most bytes of answers waiting for a client that does not read.
const MAX_PENDING_BYTES: usize = 1 << 20;
/// A client that sends nothing for so long is dropped.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    last: Instant,
    /// It wants to take over; with this `keep_pid`.
    successor: Option<bool>,
}

/// The control socket, the page of metrics and their clients; does nothing if none was asked for.
pub struct Control {
    socket: Option<SocketFile>,
    clients: Vec<Client>,
    http: Option<HttpServer>,
    state: State,
    take_over: TakeOver,
    wanted: Option<Wanted>,
}

/// Whether another process may take over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TakeOver {
    /// It may try.
    Free,
    /// One is trying.
    Busy,
    /// This process is not made for it.
    Never,
}

/// A process that wants to take over ([`crate::handover`]). It was told that it may try.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// The connection to it.
    pub(crate) stream: UnixStream,
    /// Whether this process is to stay as the anchor.
    pub(crate) keep_pid: bool,
}

/// What answers are made of.
struct State {
    loop_metrics: Arc<LoopMetrics>,
    devices: Vec<(Arc<str>, Arc<DeviceMetrics>)>,
    ask: AskSource,
    extra: StatusSource,
}

impl Control {
    /// Serves `socket` and the page behind `http`; neither, if none was asked for.
    pub fn new(
        socket: Option<SocketFile>,
        http: Option<HttpServer>,
        loop_metrics: Arc<LoopMetrics>,
        devices: Vec<(Arc<str>, Arc<DeviceMetrics>)>,
        ask: AskSource,
        mut extra: StatusSource,
    ) -> Self {
        if let Some(http) = &http {
            let endpoint = http.endpoint().to_string();
            tracing::info!(at = endpoint, "metrics are served");
            extra = Box::new(move || {
                let mut fields = extra();
                fields.insert("metrics_at".into(), endpoint.clone().into());
                fields
            });
        }
        let state = State { loop_metrics, devices, ask, extra };
        Self { socket, clients: Vec::new(), http, state, take_over: TakeOver::Never, wanted: None }
    }

    /// For another process: the sockets. Clients come again.
    pub(crate) fn export(&self, fds: &mut Fds) -> io::Result<(Option<SocketState>, Option<PageState>)> {
        let socket = self.socket.as_ref().map(|socket| socket.export(fds)).transpose()?;
        Ok((socket, self.http.as_ref().map(|http| http.export(fds)).transpose()?))
    }

    /// From another process, which goes on serving until it ends.
    pub(crate) fn import(
        (socket, page): (Option<SocketState>, Option<PageState>),
        fds: &mut Fds,
        loop_metrics: Arc<LoopMetrics>,
        devices: Vec<(Arc<str>, Arc<DeviceMetrics>)>,
        ask: AskSource,
        extra: StatusSource,
    ) -> Result<Self, BadState> {
        let socket = socket.map(|socket| SocketFile::import(socket, fds)).transpose()?;
        let http = page.map(|page| HttpServer::import(page, fds)).transpose()?;
        Ok(Self::new(socket, http, loop_metrics, devices, ask, extra))
    }

    fn files(&mut self) -> impl Iterator<Item = &mut SocketFile> {
        self.socket.iter_mut().chain(self.http.as_mut().and_then(HttpServer::socket))
    }

    /// Socket files stay: another process serves them.
    pub(crate) fn release(&mut self) {
        self.files().for_each(SocketFile::release);
    }

    /// Socket files are this process's, which took over.
    pub(crate) fn own(&mut self) {
        self.files().for_each(SocketFile::own);
    }

    /// Whether another process may ask to take over.
    pub(crate) fn allow_take_over(&mut self, allowed: TakeOver) {
        self.take_over = allowed;
    }

    /// The connection to a process that wants to take over, once.
    pub(crate) fn take_successor(&mut self) -> Option<Wanted> {
        self.wanted.take()
    }

    /// Descriptors to wait for.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let socket = self.socket.as_ref().map(AsFd::as_fd);
        let clients = self.clients.iter().map(|client| client.stream.as_fd());
        socket.into_iter().chain(clients).chain(self.http.iter().flat_map(HttpServer::fds))
    }

    /// How long to wait at most: a client with answers pending is tried again, an idle one is dropped some time.
    #[must_use]
    pub fn timeout(&self) -> Option<Timespec> {
        let pending = self.clients.iter().any(|client| !client.output.is_empty());
        let own = (!self.clients.is_empty()).then_some(if pending {
            Duration::from_millis(10)
        } else {
            Duration::from_secs(5)
        });
        let http = self.http.as_ref().and_then(HttpServer::timeout);
        let timeout = own.into_iter().chain(http).min()?;
        Some(Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() })
    }

    /// Accepts, reads, answers and writes what can be done without waiting.
    pub fn serve(&mut self) {
        while let Some(Ok(Some(stream))) = self.socket.as_ref().map(SocketFile::accept) {
            if self.clients.len() < MAX_CLIENTS && stream.set_nonblocking(true).is_ok() {
                let (input, output) = (Vec::new(), Vec::new());
                self.clients.push(Client { stream, input, output, last: Instant::now(), successor: None });
            }
        }
        let mut clients = std::mem::take(&mut self.clients);
        clients.retain_mut(|client| self.serve_client(client).is_ok());
        let told = |client: &Client| client.successor.is_some() && client.output.is_empty();
        if let Some(at) = clients.iter().position(told) {
            let Client { stream, successor, .. } = clients.swap_remove(at);
            self.wanted = Some(Wanted { stream, keep_pid: successor == Some(true) });
        }
        self.clients = clients;
        if let Some(http) = &mut self.http {
            let state = &mut self.state;
            http.serve(&mut || (page::CONTENT_TYPE, state.page()));
        }
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
                        let answer = match take_over_request(&line) {
                            Some(_) if self.take_over == TakeOver::Never => {
                                refused("this process cannot be taken over")
                            }
                            Some(_) if self.take_over == TakeOver::Busy => {
                                refused("another hand-over is under way")
                            }
                            Some(_) if !is_trusted(&client.stream) => {
                                refused("only root and the user of this process may take over")
                            }
                            Some(keep_pid) => {
                                client.successor = Some(keep_pid);
                                self.take_over = TakeOver::Busy;
                                json!({"ok": true})
                            }
                            None => self.state.answer(&line),
                        };
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
}

fn refused(error: &str) -> Value {
    json!({"ok": false, "error": error})
}

/// `{"cmd":"take-over","keep_pid":true}`: what follows on this connection is a hand-over. Its `keep_pid`.
fn take_over_request(line: &[u8]) -> Option<bool> {
    #[derive(serde::Deserialize)]
    #[serde(tag = "cmd", rename_all = "kebab-case", deny_unknown_fields)]
    enum Request {
        TakeOver {
            #[serde(default)]
            keep_pid: bool,
        },
    }
    serde_json::from_slice(line).ok().map(|Request::TakeOver { keep_pid }| keep_pid)
}

/// Whether the process behind a connection may have everything that this one has.
fn is_trusted(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    crate::sock::peer_uid(stream.as_fd()).is_ok_and(|peer| peer == 0 || peer == own)
}

impl State {
    fn answer(&mut self, line: &[u8]) -> Value {
        let mut request: Map<String, Value> = match serde_json::from_slice(line) {
            Ok(request) => request,
            Err(error) => return refused(&format!("not a request: {error}")),
        };
        let Some(Value::String(cmd)) = request.remove("cmd") else {
            return refused("not a request: `cmd` is missing");
        };
        let answered = match cmd.as_str() {
            "status" => Ok(self.status()),
            "metrics" => Ok(self.metrics()),
            "version" => Ok(Map::from_iter([("version".to_owned(), env!("CARGO_PKG_VERSION").into())])),
            "log" => match request.get("level") {
                Some(Value::String(level)) => crate::process::set_log_level(level).map(|()| Map::new()),
                _ => Err("`level` is missing".into()),
            },
            _ => self.command(&cmd, request),
        };
        match answered {
            Ok(mut answer) => {
                answer.insert("ok".into(), true.into());
                answer.into()
            }
            Err(error) => refused(&error),
        }
    }

    fn status(&mut self) -> Map<String, Value> {
        let mut status = Map::new();
        status.insert("version".into(), env!("CARGO_PKG_VERSION").into());
        status.insert("pid".into(), std::process::id().into());
        status.insert("loop".into(), json!(self.loop_metrics.snapshot()));
        let ask = &mut self.ask;
        let device = |(index, (name, _)): (usize, &(Arc<str>, _))| {
            let status = match ask(index, Ask::Status) {
                Some(Told::Status(status)) => status,
                _ => Value::Null,
            };
            json!({"name": &**name, "status": status})
        };
        let devices: Vec<Value> = self.devices.iter().enumerate().map(device).collect();
        status.insert("devices".into(), devices.into());
        if let Some(Told::Status(fabric)) = ask(FABRIC, Ask::Status)
            && !fabric.is_null()
        {
            status.insert("fabric".into(), fabric);
        }
        status.append(&mut (self.extra)());
        status
    }

    fn metrics(&mut self) -> Map<String, Value> {
        let mut devices = Vec::new();
        for (index, (name, metrics)) in self.devices.iter().enumerate() {
            let mut value = json!(metrics.snapshot());
            value["name"] = json!(&**name);
            if let Some(Told::Samples(samples)) = (self.ask)(index, Ask::Samples) {
                value["samples"] = samples.json();
            }
            devices.push(value);
        }
        let mut all = Map::from_iter([
            ("loop".to_owned(), json!(self.loop_metrics.snapshot())),
            ("devices".to_owned(), devices.into()),
        ]);
        if let Some(Told::Samples(samples)) = (self.ask)(FABRIC, Ask::Samples)
            && !samples.list().is_empty()
        {
            all.insert("samples".into(), samples.json());
        }
        all
    }

    /// A command that is the devices' own.
    fn command(&mut self, cmd: &str, mut args: Map<String, Value>) -> Result<Map<String, Value>, String> {
        let wanted = match args.remove("device") {
            None => None,
            Some(Value::String(name)) => Some(name),
            Some(_) => return Err("`device` must be a name".into()),
        };
        let names = || self.devices.iter().map(|(name, _)| &**name);
        if let Some(wanted) = &wanted
            && !names().any(|name| name == wanted)
        {
            let there: Vec<&str> = names().collect();
            return Err(format!("no device `{wanted}` (there is {})", there.join(", ")));
        }
        if wanted.is_none() {
            let told = (self.ask)(FABRIC, Ask::Command { name: cmd.to_owned(), args: args.clone() });
            // A fabric that is slow is not one that does not know the command.
            let told = told.ok_or("the data thread does not answer")?;
            if let Told::Command(rest) = told {
                return match rest.and_then(crate::ask::Rest::finish)? {
                    Value::Object(fields) => Ok(fields),
                    Value::Null => Ok(Map::new()),
                    other => Ok(Map::from_iter([("answer".to_owned(), other)])),
                };
            }
        }
        let mut devices = Vec::new();
        for (index, (name, _)) in self.devices.iter().enumerate() {
            if wanted.as_ref().is_some_and(|wanted| **wanted != **name) {
                continue;
            }
            let told = (self.ask)(index, Ask::Command { name: cmd.to_owned(), args: args.clone() });
            let answer = match told {
                Some(Told::Command(rest)) => rest.and_then(crate::ask::Rest::finish),
                _ => Err("the data thread does not answer".into()),
            };
            let mut device = match answer.map_err(|error| format!("{name}: {error}"))? {
                Value::Object(fields) => fields,
                Value::Null => Map::new(),
                other => Map::from_iter([("answer".to_owned(), other)]),
            };
            device.insert("name".into(), json!(&**name));
            devices.push(Value::Object(device));
        }
        Ok(Map::from_iter([("devices".to_owned(), devices.into())]))
    }

    /// The page of metrics.
    fn page(&mut self) -> String {
        let mut samples = Samples::default();
        samples.add(&families::BUILD, &[("version", env!("CARGO_PKG_VERSION"))], 1);
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        let cpu = Duration::new(cpu.tv_sec.unsigned_abs(), cpu.tv_nsec.unsigned_abs() as u32);
        samples.add(&families::CPU, &[], u64::try_from(cpu.as_nanos()).unwrap_or(u64::MAX));
        self.loop_metrics.collect(&mut samples);
        for (index, (name, metrics)) in self.devices.iter().enumerate() {
            let told = (self.ask)(index, Ask::Samples);
            samples.within("device", name, |samples| {
                metrics.collect(samples);
                let answers = matches!(told, Some(Told::Samples(_)));
                samples.add(&families::ANSWERS, &[], answers.into());
                if let Some(Told::Samples(own)) = told {
                    samples.append(own);
                }
            });
        }
        if let Some(Told::Samples(fabric)) = (self.ask)(FABRIC, Ask::Samples) {
            samples.append(fabric);
        }
        page::page(samples)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::path::Path;

    use super::*;
    use crate::ask::Rest;
    use crate::http::Endpoint;
    use crate::metrics::{Family, Unit};

    static PARTS: Family = Family::counter("vcp_test_parts", Unit::None, "Parts");

    /// Two devices that know `add`, which fails on the first one from 100 on.
    fn ask() -> AskSource {
        Box::new(|index, ask| {
            if index == FABRIC {
                return Some(Told::Unknown);
            }
            Some(match ask {
                Ask::Status => Told::Status(json!(index + 40)),
                Ask::Samples => {
                    let mut samples = Samples::default();
                    samples.add(&PARTS, &[], index as u64);
                    Told::Samples(samples)
                }
                Ask::Command { name, args } => Told::Command(match args.get("n").and_then(Value::as_u64) {
                    _ if name != "add" => Err(format!("unknown command `{name}`")),
                    None => Err("`n` is missing".into()),
                    Some(n) => Ok(Rest::new(move || match n {
                        100.. => Err("too much".into()),
                        _ => Ok(json!({"sum": n + index as u64})),
                    })),
                }),
            })
        })
    }

    fn control(socket: &Path, metrics: Option<&Endpoint>) -> Control {
        let device = Arc::new(DeviceMetrics::default());
        device.read.ok.add(7);
        let extra: StatusSource = Box::new(|| Map::from_iter([("more".to_owned(), json!(1))]));
        let parts = vec![(Arc::from("disk0"), device), (Arc::from("disk1"), Arc::default())];
        let http = metrics.map(|endpoint| HttpServer::bind(endpoint).unwrap());
        Control::new(Some(SocketFile::bind(socket).unwrap()), http, Arc::default(), parts, ask(), extra)
    }

    fn answers(control: &mut Control, path: &Path, requests: &str) -> Vec<Value> {
        let mut client = UnixStream::connect(path).unwrap();
        client.write_all(requests.as_bytes()).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        control.serve();
        let lines = BufReader::new(client).lines();
        lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
    }

    #[test]
    fn requests_are_answered_line_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        let mut control = control(&path, None);
        let requests = "{\"cmd\":\"status\"}\n{\"cmd\":\"metrics\"}\nnonsense\n[]\n{\"level\":\"x\"}\n";
        let answers = answers(&mut control, &path, requests);
        assert_eq!((&answers[0]["ok"], &answers[0]["more"]), (&json!(true), &json!(1)));
        assert_eq!(
            answers[0]["devices"],
            json!([{"name": "disk0", "status": 40}, {"name": "disk1", "status": 41}])
        );
        assert_eq!(answers[1]["devices"][0]["read"]["ok"], json!(7));
        assert_eq!(
            answers[1]["devices"][1]["samples"],
            json!([{"name": "vcp_test_parts_total", "labels": {}, "value": 1}])
        );
        assert_eq!(answers.len(), 5);
        for answer in &answers[2..] {
            assert_eq!(answer["ok"], json!(false), "{answer}");
        }
    }

    #[test]
    fn other_commands_go_to_the_devices() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        let mut control = control(&path, None);
        let requests = [
            json!({"cmd": "add", "n": 5}),
            json!({"cmd": "add", "n": 5, "device": "disk1"}),
            json!({"cmd": "add", "device": "disk1"}),
            json!({"cmd": "add", "n": 5, "device": "disk7"}),
            json!({"cmd": "add", "n": 100, "device": "disk0"}),
            json!({"cmd": "nonsense"}),
        ];
        let text: String = requests.iter().map(|request| format!("{request}\n")).collect();
        let answers = answers(&mut control, &path, &text);
        assert_eq!(
            answers[0],
            json!({"ok": true, "devices": [{"name": "disk0", "sum": 5}, {"name": "disk1", "sum": 6}]})
        );
        assert_eq!(answers[1], json!({"ok": true, "devices": [{"name": "disk1", "sum": 6}]}));
        for (answer, words) in answers[2..].iter().zip(["`n`", "disk0, disk1", "disk0: too much", "nonsense"])
        {
            assert_eq!(answer["ok"], json!(false));
            assert!(answer["error"].as_str().unwrap().contains(words), "{answer}");
        }
    }

    #[test]
    fn the_page_has_the_numbers_of_all_devices() {
        let dir = tempfile::tempdir().unwrap();
        let (path, page) = (dir.path().join("c"), dir.path().join("m"));
        let mut control = control(&path, Some(&Endpoint::Unix(page.clone())));
        let mut client = UnixStream::connect(&page).unwrap();
        client.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        control.serve();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        for line in [
            "vcp_requests_total{device=\"disk0\",op=\"read\",result=\"ok\"} 7",
            "vcp_test_parts_total{device=\"disk1\"} 1",
            "vcp_device_answers{device=\"disk1\"} 1",
            "vcp_loop_sleeping 0",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line:?} in:\n{text}");
        }
        let status = answers(&mut control, &path, "{\"cmd\":\"status\"}\n");
        assert_eq!(status[0]["metrics_at"], json!(format!("unix:{}", page.display())));
    }

    #[test]
    fn an_endless_line_ends_the_client() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        let mut control = control(&path, None);
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(&[b'x'; MAX_LINE_BYTES + 1]).unwrap();
        control.serve();
        assert!(control.clients.is_empty());
    }
}
