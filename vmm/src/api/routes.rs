//! Which request is which command. Each handler carries its own description; the document and the router are made from
//! the same list, so that neither can have what the other lacks.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::types::{Added, GuestStatus, Limits, LogLevel, MemorySize, Pin, Problem, RestartVcp, Snapshot};
use super::{Machine, page, vcps};
use crate::config::{DiskSpec, NetSpec};
use crate::machine::command::{Answer, Command, CommandError, Reply, Restart};
use crate::machine::status::Status;

/// How long a quick command may take.
const QUICK: Duration = Duration::from_secs(5);
/// How long it may take until vCPUs have stopped.
const STOP: Duration = Duration::from_secs(15);
/// How long a VCP may take to log in, a guest to let go of a device, a snapshot to be written.
pub(super) const SLOW: Duration = Duration::from_secs(100);
/// How long a client may take for the body of its request.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest name of a device.
const MAX_NAME: usize = 32;

/// What handlers share.
pub(super) struct Shared {
    /// Name of the guest.
    pub(super) name: String,
    pub(super) machine: Box<dyn Machine>,
}

type Ctx = State<Arc<Shared>>;

#[derive(OpenApi)]
#[openapi(info(
    title = "VCP monitor",
    description = "Acts on one running guest. Served by `vcp run --api-socket PATH` on a Unix socket; one request per \
                   connection. Requests that fail are answered with a `Problem`.",
    license(name = "Apache-2.0 OR BSD-3-Clause", identifier = "Apache-2.0 OR BSD-3-Clause")
))]
struct Description;

/// Router and description.
fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(status))
        .routes(routes!(metrics))
        .routes(routes!(description))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(shutdown))
        .routes(routes!(kill))
        .routes(routes!(add_disk))
        .routes(routes!(remove_disk))
        .routes(routes!(add_net))
        .routes(routes!(remove_net))
        .routes(routes!(resize))
        .routes(routes!(pin))
        .routes(routes!(restart_vcp))
        .routes(routes!(limit))
        .routes(routes!(log_level))
        .routes(routes!(snapshot))
}

/// The description of the API.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut document = routes().split_for_parts().1;
    // The document describes the interface, which has a version of its own in its paths.
    document.info.version = "1".into();
    document
}

/// Everything there is.
pub(super) fn router(shared: Arc<Shared>) -> axum::Router {
    let (router, _) = routes().split_for_parts();
    router
        .fallback(|request: Request| async move {
            Failure(
                StatusCode::NOT_FOUND,
                format!("there is no {}: see /api/v1/openapi.json", request.uri().path()),
            )
        })
        .method_not_allowed_fallback(|method: Method| async move {
            Failure(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("{method} is not what is done here: see /api/v1/openapi.json"),
            )
        })
        .layer(axum::extract::DefaultBodyLimit::max(super::server::MAX_BODY_BYTES))
        .with_state(shared)
}

/// Only the page of metrics, for a port that anybody may reach.
pub(super) fn metrics_router(shared: Arc<Shared>) -> axum::Router {
    axum::Router::new().route("/metrics", axum::routing::get(metrics)).with_state(shared)
}

/// A request that failed: status and text.
#[derive(Debug)]
pub(super) struct Failure(StatusCode, String);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let error = self.1.replace('\n', " ");
        (self.0, Json(Problem { error })).into_response()
    }
}

impl From<CommandError> for Failure {
    fn from(error: CommandError) -> Self {
        let status = match error {
            CommandError::NotYet(_) => StatusCode::NOT_IMPLEMENTED,
            CommandError::NotFound(_) => StatusCode::NOT_FOUND,
            CommandError::Invalid(_) => StatusCode::BAD_REQUEST,
            CommandError::Conflict(_) => StatusCode::CONFLICT,
            CommandError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
            CommandError::Ended => StatusCode::SERVICE_UNAVAILABLE,
            CommandError::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
        };
        Self(status, error.to_string())
    }
}

type Done = Result<StatusCode, Failure>;

impl Shared {
    /// Asks the machine.
    async fn ask(&self, command: Command, limit: Duration) -> Answer {
        let (sender, receiver) = oneshot::channel();
        self.machine.send(
            command,
            Box::new(move |answer| {
                // Fails only if nobody waits any more.
                let _ = sender.send(answer);
            }),
        );
        match tokio::time::timeout(limit, receiver).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(CommandError::Ended),
            Err(_) => Err(CommandError::Timeout(limit)),
        }
    }

    async fn act(&self, command: Command, limit: Duration) -> Done {
        self.ask(command, limit).await?;
        Ok(StatusCode::NO_CONTENT)
    }

    async fn add(&self, command: Command) -> Result<(StatusCode, Json<Added>), Failure> {
        match self.ask(command, SLOW).await? {
            Reply::Added(name) => Ok((StatusCode::CREATED, Json(Added { name }))),
            other => Err(unexpected(&other)),
        }
    }

    async fn machine_status(&self) -> Result<Status, Failure> {
        match self.ask(Command::Status, QUICK).await? {
            Reply::Status(status) => Ok(*status),
            other => Err(unexpected(&other)),
        }
    }

    async fn guest_status(&self) -> Result<GuestStatus, Failure> {
        let machine = self.machine_status().await?;
        let vcps = vcps::figures(&machine).await;
        Ok(GuestStatus { name: self.name.clone(), version: env!("CARGO_PKG_VERSION").into(), machine, vcps })
    }
}

fn unexpected(reply: &Reply) -> Failure {
    Failure(StatusCode::INTERNAL_SERVER_ERROR, format!("the machine answered something else: {reply:?}"))
}

/// The body of a request, as it came.
struct Body(Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        match tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, state)).await {
            Ok(bytes) => bytes.map(Self).map_err(|e| Failure(e.status(), e.body_text())),
            Err(_) => Err(Failure(StatusCode::REQUEST_TIMEOUT, "the body did not come in time".into())),
        }
    }
}

/// Reads a body. It is JSON, whatever the content type says: there is nothing else. An empty one is an empty object.
fn body<T: DeserializeOwned>(Body(bytes): &Body) -> Result<T, Failure> {
    let bytes = if bytes.is_empty() { b"{}".as_slice() } else { bytes };
    serde_json::from_slice(bytes)
        .map_err(|e| Failure(StatusCode::BAD_REQUEST, format!("the body is wrong: {e}")))
}

type Name = Result<Path<String>, axum::extract::rejection::PathRejection>;

/// The name of a device in a path.
fn name(path: Name) -> Result<String, Failure> {
    let Path(name) = path.map_err(|e| Failure(e.status(), e.body_text()))?;
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(good) {
        return Err(Failure(StatusCode::BAD_REQUEST, "this is not the name of a device, e.g. disk0".into()));
    }
    Ok(name)
}

fn checked(result: Result<(), String>) -> Result<(), Failure> {
    result.map_err(|reason| Failure(StatusCode::BAD_REQUEST, reason))
}

/// What is known about the guest.
#[utoipa::path(get, path = "/api/v1/status", responses(
    (status = 200, description = "State of machine, vCPUs, devices and VCPs", body = GuestStatus),
    (status = "default", description = "It failed", body = Problem)))]
async fn status(State(shared): Ctx) -> Result<Json<GuestStatus>, Failure> {
    shared.guest_status().await.map(Json)
}

/// The page of metrics, for Prometheus.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, description = "OpenMetrics text", body = String, content_type = "application/openmetrics-text"),
    (status = "default", description = "It failed", body = Problem)))]
async fn metrics(State(shared): Ctx) -> Result<Response, Failure> {
    let status = shared.guest_status().await?;
    let kind = HeaderValue::from_static(vcp_core::metrics::page::CONTENT_TYPE);
    Ok(([(header::CONTENT_TYPE, kind)], page::page(&status)).into_response())
}

/// This description.
#[utoipa::path(get, path = "/api/v1/openapi.json", responses(
    (status = 200, description = "The OpenAPI document", body = Object)))]
async fn description() -> Json<utoipa::openapi::OpenApi> {
    Json(openapi())
}

/// Stop all vCPUs. Nothing happens if they are stopped.
#[utoipa::path(post, path = "/api/v1/pause", responses(
    (status = 204, description = "They have stopped"),
    (status = "default", description = "It failed", body = Problem)))]
async fn pause(State(shared): Ctx) -> Done {
    shared.act(Command::Pause, STOP).await
}

/// Let the vCPUs go on. Nothing happens if they run.
#[utoipa::path(post, path = "/api/v1/resume", responses(
    (status = 204, description = "They run"),
    (status = "default", description = "It failed", body = Problem)))]
async fn resume(State(shared): Ctx) -> Done {
    shared.act(Command::Resume, STOP).await
}

/// Press the ACPI power button. The guest shuts down if it listens to it.
#[utoipa::path(post, path = "/api/v1/shutdown", responses(
    (status = 204, description = "It is pressed"),
    (status = "default", description = "It failed", body = Problem)))]
async fn shutdown(State(shared): Ctx) -> Done {
    shared.act(Command::Shutdown, QUICK).await
}

/// End the guest at once, as a power cut does. The monitor ends, and the API with it.
#[utoipa::path(post, path = "/api/v1/kill", responses(
    (status = 204, description = "It ends"),
    (status = "default", description = "It failed", body = Problem)))]
async fn kill(State(shared): Ctx) -> Done {
    shared.act(Command::Kill, QUICK).await
}

/// Add a block device.
#[utoipa::path(post, path = "/api/v1/disks", request_body = DiskSpec, responses(
    (status = 201, description = "Its backend serves it and the guest was told", body = Added),
    (status = "default", description = "It failed", body = Problem)))]
async fn add_disk(State(shared): Ctx, bytes: Body) -> Result<(StatusCode, Json<Added>), Failure> {
    let spec: DiskSpec = body(&bytes)?;
    checked(spec.validate())?;
    shared.add(Command::AddDisk(spec)).await
}

/// Take a block device away.
#[utoipa::path(delete, path = "/api/v1/disks/{name}", params(("name" = String, Path, description = "E.g. `disk1`")), responses(
    (status = 204, description = "The guest has let go of it, and its VCP has ended"),
    (status = "default", description = "It failed", body = Problem)))]
async fn remove_disk(State(shared): Ctx, path: Name) -> Done {
    shared.act(Command::RemoveDisk(name(path)?), SLOW).await
}

/// Add a network device.
#[utoipa::path(post, path = "/api/v1/nets", request_body = NetSpec, responses(
    (status = 201, description = "Its backend serves it and the guest was told", body = Added),
    (status = "default", description = "It failed", body = Problem)))]
async fn add_net(State(shared): Ctx, bytes: Body) -> Result<(StatusCode, Json<Added>), Failure> {
    let spec: NetSpec = body(&bytes)?;
    checked(spec.validate())?;
    shared.add(Command::AddNet(spec)).await
}

/// Take a network device away.
#[utoipa::path(delete, path = "/api/v1/nets/{name}", params(("name" = String, Path, description = "E.g. `net1`")), responses(
    (status = 204, description = "The guest has let go of it, and its VCP has ended"),
    (status = "default", description = "It failed", body = Problem)))]
async fn remove_net(State(shared): Ctx, path: Name) -> Done {
    shared.act(Command::RemoveNet(name(path)?), SLOW).await
}

/// Set how much memory the guest may use.
#[utoipa::path(put, path = "/api/v1/memory", request_body = MemorySize, responses(
    (status = 204, description = "The guest was told; `status` shows how far it is"),
    (status = "default", description = "It failed", body = Problem)))]
async fn resize(State(shared): Ctx, bytes: Body) -> Done {
    let MemorySize { bytes } = body(&bytes)?;
    shared.act(Command::Resize { memory_bytes: bytes }, QUICK).await
}

/// Move the thread of a vCPU or a VCP to other host CPUs.
#[utoipa::path(put, path = "/api/v1/pin", request_body = Pin, responses(
    (status = 204, description = "It runs there"),
    (status = "default", description = "It failed", body = Problem)))]
async fn pin(State(shared): Ctx, bytes: Body) -> Done {
    let Pin { target, mut cpus } = body(&bytes)?;
    cpus.sort_unstable();
    cpus.dedup();
    if cpus.is_empty() || cpus.iter().any(|cpu| *cpu >= crate::config::size::MAX_CPU) {
        return Err(Failure(
            StatusCode::BAD_REQUEST,
            "cpus: at least one number of a host CPU is needed".into(),
        ));
    }
    shared.act(Command::Pin { target, cpus }, QUICK).await
}

/// Replace a device's VCP by a new process.
#[utoipa::path(post, path = "/api/v1/devices/{name}/restart", request_body = RestartVcp,
    params(("name" = String, Path, description = "E.g. `disk0`")), responses(
    (status = 204, description = "The new process serves the device"),
    (status = "default", description = "It failed", body = Problem)))]
async fn restart_vcp(State(shared): Ctx, path: Name, bytes: Body) -> Done {
    let device = name(path)?;
    let RestartVcp { upgrade } = body(&bytes)?;
    let how = if upgrade { Restart::Upgrade } else { Restart::Kill };
    shared.act(Command::RestartVcp { device, how }, SLOW).await
}

/// Change the rate limits of a device.
#[utoipa::path(put, path = "/api/v1/devices/{name}/limits", request_body = Limits,
    params(("name" = String, Path, description = "E.g. `disk0`")), responses(
    (status = 204, description = "They hold from now on"),
    (status = "default", description = "It failed", body = Problem)))]
async fn limit(State(shared): Ctx, path: Name, bytes: Body) -> Done {
    let device = name(path)?;
    let limits: Limits = body(&bytes)?;
    if limits == Limits::default() {
        return Err(Failure(StatusCode::BAD_REQUEST, "no limit is given: iops or bytes_per_s".into()));
    }
    let mut command = serde_json::json!({"cmd": "limit"});
    for (name, limit) in [("iops", limits.iops), ("bps", limits.bytes_per_s)] {
        if let Some(limit) = limit {
            command[name] = limit.into();
        }
    }
    // The one that serves first: it knows what limits there can be.
    vcps::tell(&shared.machine_status().await?, &device, &command).await?;
    shared.act(Command::RateLimits { device, limits: limits.into() }, QUICK).await
}

/// Change what is logged.
#[utoipa::path(put, path = "/api/v1/log", request_body = LogLevel, responses(
    (status = 204, description = "It is logged from now on"),
    (status = "default", description = "It failed", body = Problem)))]
async fn log_level(State(shared): Ctx, bytes: Body) -> Done {
    let LogLevel { level, device } = body(&bytes)?;
    match device {
        None => checked(vcp_core::process::set_log_level(&level))?,
        Some(device) => {
            let status = shared.machine_status().await?;
            let text = serde_json::json!({"cmd": "log", "level": level});
            vcps::tell(&status, &device, &text).await.map_err(Failure::from)?;
        }
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Write the paused machine to a file that `vcp run --restore` takes.
#[utoipa::path(post, path = "/api/v1/snapshot", request_body = Snapshot, responses(
    (status = 204, description = "It is written"),
    (status = "default", description = "It failed", body = Problem)))]
async fn snapshot(State(shared): Ctx, bytes: Body) -> Done {
    let Snapshot { path } = body(&bytes)?;
    if !path.is_absolute() {
        return Err(Failure(StatusCode::BAD_REQUEST, "path: an absolute path is needed".into()));
    }
    shared.act(Command::Snapshot(path), SLOW).await
}
