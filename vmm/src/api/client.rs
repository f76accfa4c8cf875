//! The other end of the API: one request on a connection of its own, within a time limit.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use super::types::Problem;

/// Longest answer.
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers there.
    #[error("cannot connect to {path}: {hint}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What to try.
        hint: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The monitor said why.
    #[error("{text}")]
    Refused {
        /// The request was wrong in itself.
        is_usage: bool,
        /// What it said.
        text: String,
    },
    /// No answer in time.
    #[error("{path} did not answer within {limit:?}")]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// The time it had.
        limit: Duration,
    },
    /// Something else answers there, or the monitor has ended meanwhile.
    #[error("{path}: {what}")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What was seen.
        what: String,
    },
    /// This process could not do its part.
    #[error("cannot {action}")]
    Os {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

/// A way to the API of one monitor.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    limit: Duration,
    runtime: Runtime,
}

impl Client {
    /// Requests to `socket`, each with `limit` of time. Nothing is connected yet.
    ///
    /// # Errors
    /// No runtime could be had.
    pub fn new(socket: &Path, limit: Duration) -> Result<Self, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|source| ClientError::Os { action: "start a runtime", source })?;
        Ok(Self { socket: socket.to_owned(), limit, runtime })
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A request without a body whose answer is read as `T`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let answer = self.request(Method::GET, path, Bytes::new())?;
        serde_json::from_slice(&answer).map_err(|e| self.broken(format!("the answer cannot be read: {e}")))
    }

    /// A request that has a body, if it is given one; the answer's text.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Bytes, ClientError> {
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|e| self.broken(e.to_string()))?.into(),
            None => Bytes::new(),
        };
        self.request(method, path, body)
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        self.runtime.block_on(async {
            match tokio::time::timeout(self.limit, self.exchange(method, path, body)).await {
                Ok(done) => done,
                Err(_) => Err(ClientError::Timeout { path: self.socket.clone(), limit: self.limit }),
            }
        })
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|source| ClientError::Connect {
            path: self.socket.clone(),
            hint: hint(source.kind()),
            source,
        })?;
        let broken = |e: hyper::Error| self.broken(crate::chain(&e));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "vcp")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|e| self.broken(e.to_string()))?;
        let exchange = async {
            let (head, body) = sender.send_request(request).await.map_err(broken)?.into_parts();
            let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
            Ok((head.status, body.map_err(|e| self.broken(e.to_string()))?.to_bytes()))
        };
        // The connection is done when the answer is, or ends with an error that the exchange tells, too.
        let (status, body) = tokio::select! {
            done = exchange => done?,
            Err(e) = connection => return Err(broken(e)),
        };
        if status.is_success() { Ok(body) } else { Err(self.refused(status, &body)) }
    }

    fn refused(&self, status: StatusCode, body: &[u8]) -> ClientError {
        match serde_json::from_slice::<Problem>(body) {
            Ok(Problem { error }) => ClientError::Refused {
                is_usage: status == StatusCode::BAD_REQUEST,
                text: error.chars().map(|c| if c.is_control() { ' ' } else { c }).collect(),
            },
            Err(_) => self.broken(format!("{status}: this is no monitor's API")),
        }
    }

    fn broken(&self, what: String) -> ClientError {
        ClientError::Broken { path: self.socket.clone(), what }
    }
}

fn hint(kind: std::io::ErrorKind) -> &'static str {
    use std::io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
    match kind {
        NotFound => "there is no such socket: was the guest started with --api-socket?",
        ConnectionRefused => "the monitor has ended",
        PermissionDenied => "it belongs to another user",
        _ => "is it a monitor's API socket?",
    }
}
