//! The API's thread: sockets, and what one client may take of it. A client that is slow, silent or sends too much is dropped;
//! one request per connection, so that nobody keeps one without using it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, oneshot};
use vcp_core::vu::listen::SocketFile;

use super::Machine;
use super::routes::{self, SLOW, Shared};
use crate::config::{Endpoint, VmConfig};
use crate::error::{Error, Result};

/// Longest body of a request.
pub const MAX_BODY_BYTES: usize = 64 << 10;
/// Longest head of a request.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// How long a client may take for the head of its request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may last: the slowest command, and something for body and answer.
const CONNECTION_TIMEOUT: Duration = SLOW.saturating_add(Duration::from_secs(10));
/// The same for the page of metrics.
const PAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most connections at a time at each socket; more wait until one has ended.
const MAX_CONNECTIONS: usize = 32;
/// How long answers may take that are under way at the end.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// Sockets that are listened on; nobody is answered yet.
#[derive(Debug)]
pub struct Sockets {
    api: Option<SocketFile>,
    page: Option<Page>,
}

#[derive(Debug)]
enum Page {
    Tcp(std::net::TcpListener),
    Unix(SocketFile),
}

impl Sockets {
    /// Listens where the configuration says. A socket file that nobody listens on is replaced; one in use is an error.
    pub fn bind(config: &VmConfig) -> Result<Self> {
        let api = config.api_socket.as_deref().map(bind_private).transpose()?;
        let page = match &config.metrics {
            None => None,
            Some(Endpoint::Unix(path)) => Some(Page::Unix(bind_private(path)?)),
            Some(Endpoint::Tcp(address)) => {
                let listener = std::net::TcpListener::bind(address)
                    .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
                    .map_err(|source| Error::Listen { at: address.to_string(), source })?;
                Some(Page::Tcp(listener))
            }
        };
        Ok(Self { api, page })
    }

    /// Answers requests about a machine from now on, on a thread of its own. `None` if nothing is listened on.
    pub fn serve(self, name: &str, machine: impl Machine) -> Result<Option<Server>> {
        if self.api.is_none() && self.page.is_none() {
            return Ok(None);
        }
        let shared = Arc::new(Shared { name: name.to_owned(), machine: Box::new(machine) });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            // Nothing here blocks; what the runtime itself would hand over is little.
            .max_blocking_threads(1)
            .build()
            .map_err(Error::os("start the API's runtime"))?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("api".into())
            .spawn(move || {
                crate::confine::thread(crate::confine::Kind::Api);
                runtime.block_on(serve_all(&self, shared, stopped));
                runtime.shutdown_background();
            })
            .map_err(Error::os("start a thread"))?;
        Ok(Some(Server { stop: Some(stop), thread: Some(thread) }))
    }
}

/// A socket that only its owner may connect to.
fn bind_private(path: &Path) -> Result<SocketFile> {
    let listen = |source: std::io::Error| Error::Listen { at: path.display().to_string(), source };
    // Between the making of the file and the change of its mode, nobody else can connect.
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let socket = SocketFile::bind(path);
    rustix::process::umask(mask);
    let socket = socket.map_err(|e| match e {
        vcp_core::vu::listen::ListenError::Io { source, .. } => listen(source),
        other => listen(std::io::Error::other(other.to_string())),
    })?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(listen)?;
    Ok(socket)
}

/// The API while it is served. Dropped, it ends, and its socket files are removed.
#[derive(Debug)]
pub struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Fails only if the thread has ended.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve_all(sockets: &Sockets, shared: Arc<Shared>, stopped: oneshot::Receiver<()>) {
    let busy = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let page_busy = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let api = async {
        let Some(socket) = &sockets.api else { return std::future::pending().await };
        let Some(listener) = unix(socket) else { return std::future::pending().await };
        let router = routes::router(shared.clone());
        loop {
            let permit = busy.clone().acquire_owned().await;
            match listener.accept().await {
                Ok((stream, _)) => connection(stream, router.clone(), CONNECTION_TIMEOUT, permit),
                Err(e) => pause(&e).await,
            }
        }
    };
    let page = async {
        let router = routes::metrics_router(shared.clone());
        match &sockets.page {
            None => std::future::pending().await,
            Some(Page::Unix(socket)) => {
                let Some(listener) = unix(socket) else { return std::future::pending().await };
                loop {
                    let permit = page_busy.clone().acquire_owned().await;
                    match listener.accept().await {
                        Ok((stream, _)) => connection(stream, router.clone(), PAGE_TIMEOUT, permit),
                        Err(e) => pause(&e).await,
                    }
                }
            }
            Some(Page::Tcp(listener)) => {
                let listener = listener.try_clone().and_then(TcpListener::from_std);
                let Ok(listener) = listener.inspect_err(|e| tracing::error!("metrics are not served: {e}"))
                else {
                    return std::future::pending().await;
                };
                loop {
                    let permit = page_busy.clone().acquire_owned().await;
                    match listener.accept().await {
                        Ok((stream, _)) => connection(stream, router.clone(), PAGE_TIMEOUT, permit),
                        Err(e) => pause(&e).await,
                    }
                }
            }
        }
    };
    tokio::select! {
        biased;
        _ = stopped => {}
        () = api => {}
        () = page => {}
    }
    // What was asked and is being answered, `kill` for one, is answered to its end.
    let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
    let done = async { tokio::join!(busy.acquire_many(all), page_busy.acquire_many(all)) };
    if tokio::time::timeout(LAST_ANSWERS, done).await.is_err() {
        tracing::debug!("the API ends with requests under way");
    }
}

fn unix(socket: &SocketFile) -> Option<UnixListener> {
    let listener = socket.try_clone_listener().and_then(UnixListener::from_std);
    listener.inspect_err(|e| tracing::error!("the API is not served: {e}")).ok()
}

/// After a failed accept: nobody waits, or there are no descriptors left, which may take a while.
async fn pause(error: &std::io::Error) {
    tracing::debug!("the API cannot accept a connection: {error}");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

type Permit = std::result::Result<tokio::sync::OwnedSemaphorePermit, tokio::sync::AcquireError>;

/// Serves one connection to its end, within `limit`.
fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    limit: Duration,
    permit: Permit,
) {
    tokio::spawn(async move {
        let _permit = permit;
        let served = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .keep_alive(false)
            .max_buf_size(MAX_HEAD_BYTES)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
        match tokio::time::timeout(limit, served).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => tracing::debug!("a client of the API: {}", crate::chain(&e)),
            Err(_) => tracing::debug!("a client of the API was too slow"),
        }
    });
}

/// What the server says to these bytes of a client, on a connection without a socket: for tests and fuzzing.
#[doc(hidden)]
pub fn answer(bytes: &[u8], machine: impl Machine) -> Vec<u8> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return Vec::new();
    };
    runtime.block_on(async {
        let shared = Arc::new(Shared { name: "guest".into(), machine: Box::new(machine) });
        let (mut client, server) = tokio::io::duplex(1 << 16);
        let permit = Arc::new(Semaphore::new(1)).acquire_owned().await;
        connection(server, routes::router(shared), CONNECTION_TIMEOUT, permit);
        let mut answer = Vec::new();
        // A client that has said all it has to say.
        let _ = client.write_all(bytes).await;
        let _ = client.shutdown().await;
        let _ = client.read_to_end(&mut answer).await;
        answer
    })
}
