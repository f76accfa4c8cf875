//! Just enough of an HTTP server for a page of metrics: `GET /metrics`, one request per connection.
//!
//! It runs on the set-up thread and never blocks it; a client that is slow, silent or sends too much is dropped. Requests
//! are parsed by `httparse`. A server with a runtime of its own (tokio, axum) would bring threads into a process that is
//! to be confined, and more code than the rest of this crate, for a page that is read four times a minute.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::handover::Fds;
use crate::handover::state::{BadState, PageState};
use crate::vu::listen::{ListenError, SocketFile};

/// Most clients at a time.
const MAX_CLIENTS: usize = 8;
/// Longest request head.
const MAX_HEAD_BYTES: usize = 8192;
/// Most header fields of a request.
const MAX_HEADERS: usize = 64;
/// A client is done within so long or dropped.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a page is served: `ADDR:PORT` or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(try_from = "String", into = "String")]
pub enum Endpoint {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("unix: needs a path behind it".into()),
            Some(path) => Ok(Self::Unix(path.into())),
            None => text
                .parse()
                .map(Self::Tcp)
                .map_err(|_| format!("`{text}` is neither ADDRESS:PORT (as 127.0.0.1:9100) nor unix:PATH")),
        }
    }
}

impl TryFrom<String> for Endpoint {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.to_string()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What is served: content type and text.
pub(crate) type Page = (&'static str, String);

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(SocketFile),
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn io(&mut self) -> &mut dyn ReadWrite {
        match self {
            Self::Tcp(stream) => stream,
            Self::Unix(stream) => stream,
        }
    }
}

trait ReadWrite: Read + Write {}
impl<T: Read + Write> ReadWrite for T {}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

#[derive(Debug)]
struct Client {
    stream: Stream,
    input: Vec<u8>,
    /// The answer and how much of it was sent, once there is one.
    output: Option<(Vec<u8>, usize)>,
    since: Instant,
}

/// The server.
#[derive(Debug)]
pub struct HttpServer {
    listener: Listener,
    endpoint: Endpoint,
    clients: Vec<Client>,
}

impl HttpServer {
    /// Listens.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn bind(endpoint: &Endpoint) -> Result<Self, ListenError> {
        let (listener, endpoint) = match endpoint {
            Endpoint::Unix(path) => (Listener::Unix(SocketFile::bind(path)?), endpoint.clone()),
            Endpoint::Tcp(address) => {
                let failed = |source| ListenError::Io { path: address.to_string().into(), source };
                let listener = TcpListener::bind(address).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let bound = listener.local_addr().map_err(failed)?;
                (Listener::Tcp(listener), Endpoint::Tcp(bound))
            }
        };
        Ok(Self { listener, endpoint, clients: Vec::new() })
    }

    /// For another process.
    pub(crate) fn export(&self, fds: &mut Fds) -> io::Result<PageState> {
        Ok(match &self.listener {
            Listener::Tcp(listener) => PageState::Tcp(fds.put_copy(listener)?),
            Listener::Unix(socket) => PageState::Unix(socket.export(fds)?),
        })
    }

    /// From another process, which goes on serving until it ends.
    pub(crate) fn import(state: PageState, fds: &mut Fds) -> Result<Self, BadState> {
        let failed = |source| BadState::System { what: "use a listening socket", source };
        let (listener, endpoint) = match state {
            PageState::Tcp(fd) => {
                let listener = TcpListener::from(fds.take(fd)?);
                listener.set_nonblocking(true).map_err(failed)?;
                let address = listener.local_addr().map_err(failed)?;
                (Listener::Tcp(listener), Endpoint::Tcp(address))
            }
            PageState::Unix(state) => {
                let socket = SocketFile::import(state, fds)?;
                let path = socket.path().to_owned();
                (Listener::Unix(socket), Endpoint::Unix(path))
            }
        };
        Ok(Self { listener, endpoint, clients: Vec::new() })
    }

    /// The socket file, if it has one.
    pub(crate) fn socket(&mut self) -> Option<&mut SocketFile> {
        match &mut self.listener {
            Listener::Unix(socket) => Some(socket),
            Listener::Tcp(_) => None,
        }
    }

    /// Where it listens; with the port that the system chose, if that was left to it.
    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let listener = match &self.listener {
            Listener::Tcp(listener) => listener.as_fd(),
            Listener::Unix(socket) => socket.as_fd(),
        };
        // One whose answer is being sent is tried again by time, so that a readable end does not spin.
        let reading = self.clients.iter().filter(|client| client.output.is_none());
        std::iter::once(listener).chain(reading.map(|client| client.stream.as_fd()))
    }

    /// When [`serve`](Self::serve) is to be called again at the latest.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        let sending = self.clients.iter().any(|client| client.output.is_some());
        let some = !self.clients.is_empty();
        some.then_some(if sending { Duration::from_millis(5) } else { Duration::from_secs(2) })
    }

    /// Accepts, reads, answers and writes what can be done without waiting.
    pub(crate) fn serve(&mut self, page: &mut dyn FnMut() -> Page) {
        while let Some(stream) = self.accept() {
            if self.clients.len() < MAX_CLIENTS {
                self.clients.push(Client { stream, input: Vec::new(), output: None, since: Instant::now() });
            }
        }
        self.clients.retain_mut(|client| serve_client(client, page).unwrap_or(false));
    }

    fn accept(&self) -> Option<Stream> {
        match &self.listener {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().ok()?;
                stream.set_nonblocking(true).ok()?;
                Some(Stream::Tcp(stream))
            }
            Listener::Unix(socket) => {
                let stream = socket.accept().ok()??;
                stream.set_nonblocking(true).ok()?;
                Some(Stream::Unix(stream))
            }
        }
    }
}

/// One client; false or an error means that it goes.
fn serve_client(client: &mut Client, page: &mut dyn FnMut() -> Page) -> io::Result<bool> {
    if client.since.elapsed() > CLIENT_TIMEOUT {
        return Ok(false);
    }
    let mut chunk = [0; 2048];
    while client.output.is_none() {
        match client.stream.io().read(&mut chunk) {
            Ok(0) => return Ok(false),
            Ok(len) => {
                client.input.extend_from_slice(&chunk[..len]);
                client.output = answer(&client.input, page).map(|answer| (answer, 0));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let Some((output, sent)) = &mut client.output else { return Ok(true) };
    while *sent < output.len() {
        match client.stream.io().write(&output[*sent..]) {
            Ok(0) => return Ok(false),
            Ok(len) => *sent += len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    // A close with unread input would reset the connection and could take the answer with it.
    loop {
        match client.stream.io().read(&mut chunk) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    Ok(false)
}

/// The answer to a request; `None` while its head is not complete.
fn answer(input: &[u8], page: &mut dyn FnMut() -> Page) -> Option<Vec<u8>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let plain = "text/plain; charset=utf-8";
    match request.parse(input) {
        Ok(httparse::Status::Partial) if input.len() <= MAX_HEAD_BYTES => return None,
        Ok(httparse::Status::Partial) => {
            return Some(response(
                "431 Request Header Fields Too Large",
                plain,
                "",
                "request too long\n",
                true,
            ));
        }
        Ok(httparse::Status::Complete(_)) => {}
        Err(_) => return Some(response("400 Bad Request", plain, "", "this is no HTTP request\n", true)),
    }
    let with_body = match request.method {
        Some("GET") => true,
        Some("HEAD") => false,
        _ => {
            let allow = "Allow: GET, HEAD\r\n";
            return Some(response("405 Method Not Allowed", plain, allow, "only GET\n", true));
        }
    };
    let path = request.path.unwrap_or_default();
    Some(match path.split('?').next().unwrap_or_default() {
        "/metrics" => {
            let (content_type, text) = page();
            response("200 OK", content_type, "", &text, with_body)
        }
        "/" => response("200 OK", plain, "", "the metrics are at /metrics\n", with_body),
        _ => response("404 Not Found", plain, "", "there is only /metrics\n", with_body),
    })
}

fn response(status: &str, content_type: &str, more: &str, body: &str, with_body: bool) -> Vec<u8> {
    let mut out = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n{more}Connection: close\r\n\r\n",
        body.len()
    );
    if with_body {
        out.push_str(body);
    }
    out.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Page {
        ("text/x-test", "a page\n".to_owned())
    }

    fn ask(input: &str) -> Option<String> {
        answer(input.as_bytes(), &mut page).map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn requests_get_the_status_that_they_deserve() {
        for (input, status) in [
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "200"),
            ("GET /metrics?x=1 HTTP/1.0\r\n\r\n", "200"),
            ("GET / HTTP/1.1\r\n\r\n", "200"),
            ("GET /else HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "405"),
            ("\0\u{1}nonsense\r\n\r\n", "400"),
            (&format!("GET /metrics HTTP/1.1\r\nX: {}", "y".repeat(MAX_HEAD_BYTES)), "431"),
        ] {
            let answer = ask(input).unwrap();
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{input:?}: {answer}");
        }
        assert_eq!(ask("GET /metrics HTTP/1.1\r\nHost"), None, "more is to come");
        let head = ask("HEAD /metrics HTTP/1.1\r\n\r\n").unwrap();
        assert!(head.contains("Content-Length: 7\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    }

    #[test]
    fn a_page_larger_than_the_socket_buffer_arrives_whole() {
        let mut server = HttpServer::bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let Endpoint::Tcp(address) = *server.endpoint() else { panic!("not TCP") };
        let client = std::thread::spawn(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        });
        let body = "0123456789\n".repeat(1 << 20);
        let mut page = || ("text/plain", body.clone());
        let start = Instant::now();
        while !client.is_finished() {
            server.serve(&mut page);
            assert!(start.elapsed() < Duration::from_secs(60), "the page does not arrive");
            std::thread::yield_now();
        }
        assert!(client.join().unwrap().ends_with(&body));
    }

    #[test]
    fn a_silent_client_keeps_nobody_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        let mut server = HttpServer::bind(&Endpoint::Unix(path.clone())).unwrap();
        let _silent: Vec<_> = (0..MAX_CLIENTS - 1).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let mut asking = UnixStream::connect(&path).unwrap();
        asking.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        server.serve(&mut page);
        let mut text = String::new();
        asking.read_to_string(&mut text).unwrap();
        assert!(text.ends_with("a page\n"), "{text}");
        for client in &mut server.clients {
            client.since -= CLIENT_TIMEOUT + Duration::from_secs(1);
        }
        server.serve(&mut page);
        assert!(server.clients.is_empty());
    }

    #[test]
    fn endpoints_are_read_as_written() {
        assert_eq!("unix:/run/m".parse(), Ok(Endpoint::Unix("/run/m".into())));
        assert_eq!("[::1]:9100".parse::<Endpoint>().unwrap().to_string(), "[::1]:9100");
        for wrong in ["", "unix:", "9100", "host:9100", "127.0.0.1"] {
            assert!(wrong.parse::<Endpoint>().is_err(), "{wrong}");
        }
    }
}
