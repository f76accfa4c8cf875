//! What the VCPs tell of themselves, through their control sockets. What a VCP says is data from another process: bounded,
//! read once, and believed as far as it concerns that VCP.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use super::types::{Load, Operations, VcpFigures};
use crate::machine::command::CommandError;
use crate::machine::status::Status;

/// How long a VCP may take to tell its figures: its set-up thread asks its data thread, which may be in a long batch.
const PATIENCE: Duration = Duration::from_millis(500);
/// Longest answer.
const MAX_ANSWER_BYTES: u64 = 1 << 20;
/// Most devices of a VCP that are looked at.
const MAX_DEVICES: usize = 64;
/// Buckets of a latency histogram.
pub(super) const BUCKETS: usize = 40;

/// The figures of all VCPs, asked side by side.
pub(super) async fn figures(status: &Status) -> Vec<VcpFigures> {
    let mut tasks = JoinSet::new();
    let ours = status.devices.iter().filter_map(|device| Some((&device.name, device.backend.as_ref()?)));
    let mut figures = Vec::new();
    for (device, backend) in ours.filter(|(_, backend)| backend.pid.is_some() || backend.control.is_some()) {
        let (at, control) = (figures.len(), backend.control.clone());
        figures.push(VcpFigures { device: device.clone(), ..VcpFigures::default() });
        tasks.spawn(async move {
            let told = tokio::time::timeout(PATIENCE, metrics(control?)).await;
            told.inspect_err(|_| tracing::debug!("a VCP did not tell its figures in time"))
                .ok()?
                .map(|told| (at, told))
        });
    }
    while let Some(done) = tasks.join_next().await {
        if let Ok(Some((at, told))) = done
            && let Some(place) = figures.get_mut(at)
        {
            told.fill(place);
        }
    }
    figures
}

/// Sends one command to the VCP of a device.
pub(super) async fn tell(
    status: &Status,
    device: &str,
    command: &serde_json::Value,
) -> Result<(), CommandError> {
    let missing = || CommandError::NotFound(format!("VCP of a device {device}"));
    let found = status.devices.iter().find(|found| found.name == device).ok_or_else(missing)?;
    let backend = found.backend.as_ref().ok_or_else(missing)?;
    let control = backend.control.clone().ok_or_else(missing)?;
    let failed = |reason: String| CommandError::Failed(format!("the VCP of {device}: {reason}"));
    let answer = tokio::time::timeout(PATIENCE, ask(&control, command))
        .await
        .map_err(|_| CommandError::Timeout(PATIENCE))?
        .map_err(|e| failed(e.to_string()))?;
    #[derive(Deserialize)]
    struct Answer {
        ok: bool,
        #[serde(default)]
        error: String,
    }
    match serde_json::from_slice::<Answer>(&answer) {
        Ok(Answer { ok: true, .. }) => Ok(()),
        Ok(Answer { error, .. }) => Err(CommandError::Invalid(error)),
        Err(error) => Err(failed(format!("its answer cannot be read: {error}"))),
    }
}

/// One request and its answer.
async fn ask(control: &Arc<OwnedFd>, command: &serde_json::Value) -> std::io::Result<Vec<u8>> {
    // The socket has no other name than the descriptor that leads to it.
    let mut stream = UnixStream::connect(format!("/proc/self/fd/{}", control.as_raw_fd())).await?;
    stream.write_all(format!("{command}\n").as_bytes()).await?;
    let mut line = Vec::new();
    BufReader::new(stream.take(MAX_ANSWER_BYTES)).read_until(b'\n', &mut line).await?;
    Ok(line)
}

async fn metrics(control: Arc<OwnedFd>) -> Option<Told> {
    let command = serde_json::json!({"cmd": "metrics"});
    let answer =
        ask(&control, &command).await.inspect_err(|e| tracing::debug!("a VCP's control socket: {e}")).ok()?;
    serde_json::from_slice(&answer)
        .inspect_err(|e| tracing::debug!("a VCP's figures cannot be read: {e}"))
        .ok()
}

/// The answer to `metrics` (see `vcp_core::control`), as far as it is used. Missing numbers are 0.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Told {
    ok: bool,
    r#loop: Loop,
    devices: Vec<Device>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Loop {
    sleeps: u64,
    busy_ns: u64,
    look_ns: u64,
    sleep_ns: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Device {
    read: Op,
    write: Op,
    flush: Op,
    other: Op,
    inflight: u64,
    broken_queues: u64,
    notifications: u64,
    resubmitted: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Op {
    ok: u64,
    failed: u64,
    bytes: u64,
    latency_buckets: Vec<u64>,
}

impl Told {
    fn fill(self, figures: &mut VcpFigures) {
        figures.answers = self.ok;
        let Loop { sleeps, busy_ns, look_ns, sleep_ns } = self.r#loop;
        figures.load = Load { busy_ns, look_ns, sleep_ns };
        figures.sleeps = sleeps;
        for device in self.devices.into_iter().take(MAX_DEVICES) {
            for (sum, number) in [
                (&mut figures.inflight, device.inflight),
                (&mut figures.broken_queues, device.broken_queues),
                (&mut figures.notifications, device.notifications),
                (&mut figures.resubmitted, device.resubmitted),
            ] {
                *sum = sum.saturating_add(number);
            }
            device.read.add_to(&mut figures.read);
            device.write.add_to(&mut figures.write);
            device.flush.add_to(&mut figures.flush);
            device.other.add_to(&mut figures.other);
        }
    }
}

impl Op {
    fn add_to(self, sum: &mut Operations) {
        sum.ok = sum.ok.saturating_add(self.ok);
        sum.failed = sum.failed.saturating_add(self.failed);
        sum.bytes = sum.bytes.saturating_add(self.bytes);
        let buckets = self.latency_buckets.len().min(BUCKETS).max(sum.latency_buckets.len());
        sum.latency_buckets.resize(buckets, 0);
        for (sum, number) in sum.latency_buckets.iter_mut().zip(self.latency_buckets) {
            *sum = sum.saturating_add(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_several_devices_are_summed_and_bounded() {
        let text = r#"{"ok":true,"loop":{"busy_ns":5,"passes":1},"new":[1],"devices":[
            {"name":"a","read":{"ok":1,"bytes":512,"latency_buckets":[0,1]},"inflight":18446744073709551615},
            {"name":"b","read":{"ok":2,"latency_buckets":[1,1,1]},"inflight":1}]}"#;
        let told: Told = serde_json::from_str(text).unwrap();
        let mut figures = VcpFigures::default();
        told.fill(&mut figures);
        assert!(figures.answers);
        assert_eq!((figures.read.ok, figures.read.bytes, figures.inflight), (3, 512, u64::MAX));
        assert_eq!(figures.read.latency_buckets, [1, 2, 1]);
        assert_eq!(figures.load.busy_ns, 5);
        let long = format!(r#"{{"devices":[{{"write":{{"latency_buckets":{:?}}}}}]}}"#, vec![1; 5000]);
        serde_json::from_str::<Told>(&long).unwrap().fill(&mut figures);
        assert_eq!(figures.write.latency_buckets.len(), BUCKETS);
    }
}
