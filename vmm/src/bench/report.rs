//! Runs the load on all queues and puts the figures together.

use std::fmt;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::args::{BlkArgs, Rw, WaitMode};
use super::disk::{LoadQueue, Queue, sectors};
use super::front::{Device, Front};
use super::load::{self, Job, Outcome};
use super::msgq::MsgqQueue;
use super::ring::{Layout, Ring};
use super::shared::Shared;
use super::{cpu, verify};

/// `verify` uses no more of the disk unless it is told to.
const VERIFY_REGION_BYTES: u64 = 64 << 20;
/// The largest request: the data of all slots lies in shared memory.
const MAX_REQUEST_BYTES: u64 = 16 << 20;

/// The result of a run. Times are in microseconds, sizes in bytes where nothing else is said.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    socket: String,
    rw: Rw,
    bs_bytes: u64,
    qd: u16,
    queues: u16,
    wait: WaitMode,
    capacity_bytes: u64,
    block_bytes: u32,
    region_bytes: u64,
    indirect: bool,
    event_idx: bool,
    warm_up_secs: f64,
    warm_up_ios: u64,
    secs: f64,
    /// When what was counted began and ended, in seconds since 1970, for whoever watches the backend meanwhile.
    counted_from: f64,
    counted_to: f64,
    ios: u64,
    reads: u64,
    writes: u64,
    flushes: u64,
    verified_rounds: Option<u32>,
    iops: f64,
    mib_per_s: f64,
    latency_us: Latency,
    kicks: u64,
    calls: u64,
    /// CPU time of the backend per request; only with `--pid`.
    backend_cpu_us_per_io: Option<f64>,
    /// CPU time of the backend in a second of the run, 1.0 for one thread; only with `--pid`.
    backend_cpus: Option<f64>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Latency {
    min: f64,
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    #[serde(rename = "p99.9")]
    p99_9: f64,
    max: f64,
}

/// Connects, runs the load and stops.
pub(super) fn measure(args: &BlkArgs) -> Result<Report> {
    if args.msgq {
        let (device, mut queues) = MsgqQueue::connect(args)?;
        let region = region(args, &device)?;
        return loaded(args, &device, region, &mut queues);
    }
    let mut front = Front::connect(args)?;
    let device = front.device;
    let len = usize::try_from(args.bs).context("--bs is too large")?;
    let region = region(args, &device)?;
    let (memory, mut queues) = queues(args, &device, len, &front)?;
    front.start(&memory, &queues)?;
    let report = loaded(args, &device, region, &mut queues)?;
    front.stop(queues.len())?;
    Ok(report)
}

/// Runs the load, and measures what the backend takes for it.
fn loaded(args: &BlkArgs, device: &Device, region: u64, queues: &mut [impl LoadQueue]) -> Result<Report> {
    let len = usize::try_from(args.bs).context("--bs is too large")?;
    let (outcome, cpu_before) = run(args, device, region, len, queues)?;
    let cpu = match (args.pid, cpu_before) {
        (Some(pid), Some(before)) => Some(cpu::time(pid)?.saturating_sub(before)),
        _ => None,
    };
    Ok(report(args, device, region, queues, &outcome, cpu))
}

/// Checks the request size and returns the bytes of the disk that are used.
fn region(args: &BlkArgs, device: &Device) -> Result<u64> {
    let block = u64::from(device.block_bytes);
    if args.bs == 0 || !args.bs.is_multiple_of(block) || args.bs > MAX_REQUEST_BYTES {
        bail!(
            "--bs {} is not a multiple of the device's block size {block} up to {MAX_REQUEST_BYTES}",
            args.bs
        );
    }
    if let Some(max) = device.size_max.filter(|max| *max != 0 && args.bs > u64::from(*max)) {
        bail!("--bs {} is more than the device's largest segment of {max} bytes (SIZE_MAX)", args.bs);
    }
    if args.rw.writes() && device.has(VIRTIO_BLK_F_RO) {
        bail!("the device is read-only");
    }
    let default = if args.rw == Rw::Verify { VERIFY_REGION_BYTES } else { u64::MAX };
    let region = args.region.unwrap_or(default).min(device.len_bytes);
    let blocks = region / args.bs / u64::from(args.queues);
    if blocks == 0 {
        bail!("{region} bytes of the disk have no request of {} bytes for each queue", args.bs);
    }
    Ok(blocks * u64::from(args.queues) * args.bs)
}

fn queues(args: &BlkArgs, device: &Device, len: usize, front: &Front) -> Result<(Arc<Shared>, Vec<Queue>)> {
    let indirect = device.has(VIRTIO_RING_F_INDIRECT_DESC);
    let event_idx = device.has(VIRTIO_RING_F_EVENT_IDX);
    let mut layouts = Vec::new();
    let mut end = 0;
    for _ in 0..args.queues {
        let layout = Layout::new(end, args.qd, len, indirect)?;
        end = layout.end();
        layouts.push(layout);
    }
    let memory = Arc::new(Shared::new(end)?);
    let timeout = Duration::from_secs_f64(args.timeout);
    let queue = |layout| {
        let ring = Ring::new(Arc::clone(&memory), layout, event_idx);
        Queue::new(ring, Arc::clone(&memory), args.qd, args.wait, timeout, front.fd())
    };
    let queues = layouts.into_iter().map(queue).collect::<Result<Vec<_>>>()?;
    Ok((memory, queues))
}

/// Runs one thread per queue. Random loads use the whole region from each queue, the others a part of it. Also returns the
/// CPU time of the backend as it was when the warm-up ended.
fn run(
    args: &BlkArgs,
    device: &Device,
    region: u64,
    len: usize,
    queues: &mut [impl LoadQueue],
) -> Result<(Outcome, Option<Duration>)> {
    let warm_up = Duration::from_secs_f64(args.warm_up);
    if args.rw == Rw::Verify && !warm_up.is_zero() {
        bail!("--rw verify counts all that it does: no --warm-up");
    }
    let count = queues.len() as u64;
    let all = region / args.bs;
    let is_shared = matches!(args.rw, Rw::Randread | Rw::Randwrite | Rw::Randrw);
    let barrier = Barrier::new(queues.len() + 1);
    let (results, cpu): (Vec<Result<Outcome>>, _) = thread::scope(|scope| {
        let threads: Vec<_> = queues
            .iter_mut()
            .zip(0u64..)
            .map(|(queue, n)| {
                let job = Job {
                    rw: args.rw,
                    len,
                    first: if is_shared { 0 } else { all / count * n },
                    blocks: if is_shared { all } else { all / count },
                    time: Duration::from_secs_f64(args.secs),
                    warm_up,
                    seed: args.seed.wrapping_add(if is_shared { n << 32 } else { 0 }),
                    flush: device.has(VIRTIO_BLK_F_FLUSH),
                };
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    if args.rw == Rw::Verify { verify::run(queue, &job) } else { load::run(queue, &job) }
                })
            })
            .collect();
        barrier.wait();
        // No waiting for something to happen: the warm-up is a length of time.
        thread::sleep(warm_up);
        let cpu = args.pid.map(cpu::time).transpose();
        let results =
            threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(anyhow!("a load thread panicked"))));
        (results.collect(), cpu)
    });
    let mut total = Outcome::new()?;
    for (n, result) in results.into_iter().enumerate() {
        total.merge(&result.with_context(|| format!("queue {n}"))?)?;
    }
    Ok((total, cpu?))
}

fn report(
    args: &BlkArgs,
    device: &Device,
    region: u64,
    queues: &[impl LoadQueue],
    total: &Outcome,
    cpu: Option<Duration>,
) -> Report {
    let secs = total.elapsed.as_secs_f64();
    let counted_to = total.ended.and_then(|at| at.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    let ios = total.reads + total.writes;
    let us = |ns: u64| ns as f64 / 1000.0;
    let latency = &total.latency;
    debug_assert_eq!(sectors(args.bs) * 512, args.bs);
    Report {
        socket: args.socket.display().to_string(),
        rw: args.rw,
        bs_bytes: args.bs,
        qd: args.qd,
        queues: args.queues,
        wait: args.wait,
        capacity_bytes: device.len_bytes,
        block_bytes: device.block_bytes,
        region_bytes: region,
        indirect: device.has(VIRTIO_RING_F_INDIRECT_DESC),
        event_idx: device.has(VIRTIO_RING_F_EVENT_IDX),
        warm_up_secs: args.warm_up,
        warm_up_ios: total.warm_up,
        secs,
        counted_from: counted_to.saturating_sub(total.elapsed).as_secs_f64(),
        counted_to: counted_to.as_secs_f64(),
        ios,
        reads: total.reads,
        writes: total.writes,
        flushes: total.flushes,
        verified_rounds: (args.rw == Rw::Verify).then_some(total.rounds),
        iops: ios as f64 / secs,
        mib_per_s: (ios * args.bs) as f64 / secs / f64::from(1 << 20),
        latency_us: Latency {
            min: us(latency.min()),
            mean: latency.mean() / 1000.0,
            p50: us(latency.value_at_quantile(0.5)),
            p90: us(latency.value_at_quantile(0.9)),
            p99: us(latency.value_at_quantile(0.99)),
            p99_9: us(latency.value_at_quantile(0.999)),
            max: us(latency.max()),
        },
        kicks: queues.iter().map(|queue| queue.signals().0).sum(),
        calls: queues.iter().map(|queue| queue.signals().1).sum(),
        backend_cpu_us_per_io: cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / ios.max(1) as f64),
        backend_cpus: cpu.map(|cpu| cpu.as_secs_f64() / secs),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rw = format!("{:?}", self.rw).to_lowercase();
        let wait = format!("{:?}", self.wait).to_lowercase();
        let per_io = |n: u64| n as f64 / self.ios.max(1) as f64;
        writeln!(
            f,
            "load       {rw}, {} bytes, depth {}, {} queue(s), wait {wait}",
            self.bs_bytes, self.qd, self.queues
        )?;
        writeln!(
            f,
            "device     {} MiB, block {} bytes, used {} MiB",
            self.capacity_bytes >> 20,
            self.block_bytes,
            self.region_bytes >> 20
        )?;
        if let Some(rounds) = self.verified_rounds {
            let Self { reads, writes, flushes, .. } = self;
            writeln!(
                f,
                "verified   {rounds} round(s): {writes} writes, {flushes} flushes, {reads} reads, all right"
            )?;
        }
        writeln!(f, "rate       {:.0} IOPS, {:.1} MiB/s in {:.2} s", self.iops, self.mib_per_s, self.secs)?;
        let l = &self.latency_us;
        writeln!(
            f,
            "latency    p50 {:.1} us, p90 {:.1} us, p99 {:.1} us, p99.9 {:.1} us, max {:.1} us",
            l.p50, l.p90, l.p99, l.p99_9, l.max
        )?;
        let (kicks, calls) = (self.kicks, self.calls);
        writeln!(
            f,
            "signals    {kicks} kicks ({:.3} per I/O), {calls} calls ({:.3} per I/O)",
            per_io(kicks),
            per_io(calls)
        )?;
        if let (Some(us), Some(cpus)) = (self.backend_cpu_us_per_io, self.backend_cpus) {
            writeln!(f, "backend    {us:.2} us of CPU per I/O, {:.0} % of a hardware thread", cpus * 100.0)?;
        }
        Ok(())
    }
}
