//! `vcp ctl`: acts on a running guest through its monitor's API. One request, one line of an answer or of an error.

mod args;
mod table;

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use hyper::Method;

pub use self::args::{Action, CtlArgs};
use crate::api::client::{Client, ClientError};
use crate::api::types::{Added, GuestStatus, Limits, LogLevel, MemorySize, Pin, RestartVcp, Snapshot};
use crate::error::Error;

/// Does what the arguments say.
///
/// # Errors
/// What the monitor said, or why it could not be asked. [`is_usage`] tells what is the user's to correct.
pub fn run(args: &CtlArgs) -> Result<()> {
    let missing = || Error::Usage("no API socket is given: use --api-socket PATH".into());
    let socket = args.api_socket.as_deref().ok_or_else(missing)?;
    let client = Client::new(socket, Duration::from_secs(args.timeout_s))?;
    let none = None::<&()>;
    let post = |path: &str| client.send(Method::POST, path, none).map(drop);
    match &args.action {
        Action::Status { json } => return status(&client, *json),
        Action::Pause => post("/api/v1/pause")?,
        Action::Resume => post("/api/v1/resume")?,
        Action::Shutdown => post("/api/v1/shutdown")?,
        Action::Kill => post("/api/v1/kill")?,
        Action::AddDisk { spec } => {
            let spec = args::disk(spec).map_err(Error::Usage)?;
            added(&client.send(Method::POST, "/api/v1/disks", Some(&spec))?)?;
        }
        Action::AddNet { spec } => {
            let spec = args::net(spec).map_err(Error::Usage)?;
            added(&client.send(Method::POST, "/api/v1/nets", Some(&spec))?)?;
        }
        Action::RemoveDisk { name } => {
            client.send(Method::DELETE, &format!("/api/v1/disks/{name}"), none)?;
        }

        Action::RemoveNet { name } => {
            client.send(Method::DELETE, &format!("/api/v1/nets/{name}"), none)?;
        }

        Action::Resize { memory } => {
            client.send(Method::PUT, "/api/v1/memory", Some(&MemorySize { bytes: memory.0 }))?;
        }
        Action::Pin { target, cpus } => {
            let pin = Pin { target: target.0.clone(), cpus: cpus.0.clone() };
            client.send(Method::PUT, "/api/v1/pin", Some(&pin))?;
        }
        Action::RestartVcp { device, upgrade } => {
            let path = format!("/api/v1/devices/{device}/restart");
            client.send(Method::POST, &path, Some(&RestartVcp { upgrade: *upgrade }))?;
        }
        Action::Limit { device, iops, bps } => {
            let limits = Limits { iops: *iops, bytes_per_s: bps.map(|size| size.0) };
            client.send(Method::PUT, &format!("/api/v1/devices/{device}/limits"), Some(&limits))?;
        }
        Action::LogLevel { level, device } => {
            let level = LogLevel { level: level.clone(), device: device.as_ref().map(ToString::to_string) };
            client.send(Method::PUT, "/api/v1/log", Some(&level))?;
        }
        Action::Snapshot { file } => {
            // The monitor may be in another directory.
            let path = std::path::absolute(file).context("cannot make the path absolute")?;
            client.send(Method::POST, "/api/v1/snapshot", Some(&Snapshot { path }))?;
        }
    }
    Ok(())
}

/// Whether an error is the user's to correct (exit code 2): the monitor found the request wrong in itself.
pub fn is_usage(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<ClientError>(), Some(ClientError::Refused { is_usage: true, .. }))
}

fn status(client: &Client, json: bool) -> Result<()> {
    let status: GuestStatus = client.get("/api/v1/status")?;
    let mut text = if json { serde_json::to_string_pretty(&status)? } else { table::status(&status) };
    if !text.ends_with('\n') {
        text.push('\n');
    }
    print(&text)
}

fn added(answer: &[u8]) -> Result<()> {
    let Added { name } = serde_json::from_slice(answer).context("the answer cannot be read")?;
    print(&format!("{name}\n"))
}

/// Writes to standard output. What comes from a guest or a VCP cannot act on a terminal.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let shown: String = if out.is_terminal() {
        text.chars().map(|c| if c.is_control() && c != '\n' { '?' } else { c }).collect()
    } else {
        text.to_owned()
    };
    match out.write_all(shown.as_bytes()).and_then(|()| out.flush()) {
        // Who reads has seen enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}
