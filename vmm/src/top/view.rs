//! What two looks at a guest say about the time between them. Pure: times are passed in.

use std::time::Duration;

use super::Look;
use crate::api::types::{Operations, VcpFigures};
use crate::config::size::CpuList;
use crate::kvm::exits::Exits;
use crate::machine::status::{BackendStatus, DeviceStatus, RunState};
use crate::text;

/// A guest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GuestView {
    /// Its name.
    pub name: String,
    /// `running`, `paused`, or why nothing is known.
    pub state: String,
    /// Whether anything is known.
    pub answers: bool,
    /// Since the guest was started.
    pub uptime: String,
    /// Guest memory.
    pub memory: String,
    /// The monitor.
    pub pid: u32,
    /// By number.
    pub vcpus: Vec<VcpuView>,
    /// In the order of their devices.
    pub vcps: Vec<VcpView>,
}

/// A vCPU, with exits per second; `None` before the second look.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VcpuView {
    /// Its number.
    pub id: usize,
    /// Host CPUs that it may run on.
    pub cpus: String,
    /// All exits to the monitor.
    pub exits: Option<f64>,
    /// Exits by kind.
    pub by_kind: Vec<(&'static str, Option<f64>)>,
    /// What KVM counts: all exits, also those that the monitor does not see.
    pub kvm: Vec<(&'static str, Option<f64>)>,
}

impl VcpuView {
    /// The sum of some kinds; `None` if one is not known.
    pub fn kinds(&self, names: &[&str]) -> Option<f64> {
        self.by_kind.iter().filter(|(kind, _)| names.contains(kind)).map(|(_, rate)| *rate).sum()
    }

    /// One of KVM's counters.
    pub fn kvm(&self, name: &str) -> Option<f64> {
        self.kvm.iter().find(|(counter, _)| *counter == name)?.1
    }
}

/// A device and who serves it. Rates are per second; `None` where nothing is known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VcpView {
    /// The device.
    pub device: String,
    /// `up`, `mute` if it does not tell its figures, or `AWAY` and why.
    pub state: String,
    /// Its process, if the monitor has started it.
    pub pid: Option<u32>,
    /// Hardware thread of its data thread.
    pub cpu: Option<usize>,
    /// Times that another one took its place.
    pub restarts: u64,
    /// Useful work, looking and sleep, as shares of the time between the looks.
    pub load: Option<[f64; 3]>,
    /// Reads, or packets to the guest.
    pub reads: Option<f64>,
    /// Writes, or packets from the guest.
    pub writes: Option<f64>,
    /// Bytes of reads.
    pub read_bytes: Option<f64>,
    /// Bytes of writes.
    pub write_bytes: Option<f64>,
    /// Requests that ended with an error.
    pub failed: Option<f64>,
    /// Median of the latencies of reads and writes between the looks, nanoseconds, an upper bound.
    pub p50_ns: Option<u64>,
    /// 99th percentile of them.
    pub p99_ns: Option<u64>,
    /// Requests in flight.
    pub inflight: Option<u64>,
}

/// A guest about which nothing is known, and why.
pub fn gone(name: &str, why: &str) -> GuestView {
    GuestView { name: name.into(), state: why.into(), ..GuestView::default() }
}

/// A guest, from a look and the one before.
pub fn guest(before: Option<&Look>, now: &Look) -> GuestView {
    let machine = &now.status.machine;
    // Another monitor at the same socket is another guest.
    let before = before.filter(|before| {
        before.status.machine.pid == machine.pid && before.status.machine.uptime_ms <= machine.uptime_ms
    });
    let elapsed = before.map(|before| now.at.saturating_duration_since(before.at));
    let state = match (machine.state, machine.panicked) {
        (_, true) => "PANICKED",
        (RunState::Running, false) => "running",
        (RunState::Paused, false) => "paused",
    };
    let vcpus = machine.vcpus.iter().enumerate().map(|(at, vcpu)| {
        let before = before.and_then(|before| before.status.machine.vcpus.get(at));
        let earlier = before.map(|vcpu| vcpu.exits);
        let kvm_earlier = before.and_then(|vcpu| vcpu.kvm).map(|kvm| kvm.by_name());
        let kvm = vcpu.kvm.iter().flat_map(crate::kvm::stats::KvmExits::by_name).enumerate();
        VcpuView {
            id: vcpu.id,
            cpus: vcpu.cpus.clone().map_or("any".into(), |cpus| CpuList(cpus).to_string()),
            exits: rate(earlier.map(|e| e.total()), vcpu.exits.total(), elapsed),
            by_kind: kinds(earlier, vcpu.exits, elapsed),
            kvm: kvm
                .map(|(at, (name, count))| (name, rate(kvm_earlier.map(|kvm| kvm[at].1), count, elapsed)))
                .collect(),
        }
    });
    let vcps = machine.devices.iter().filter(|device| device.backend.is_some()).map(|device| {
        let of = |look: &Look| look.status.vcps.iter().find(|vcp| vcp.device == device.name).cloned();
        let now = of(now).filter(|vcp| vcp.answers);
        let before = before.and_then(of).filter(|vcp| vcp.answers);
        vcp(device, before.as_ref(), now.as_ref(), elapsed)
    });
    GuestView {
        name: now.status.name.clone(),
        state: state.into(),
        answers: true,
        uptime: text::duration(machine.uptime_ms.saturating_mul(1_000_000)),
        memory: text::bytes(machine.memory_bytes),
        pid: machine.pid,
        vcpus: vcpus.collect(),
        vcps: vcps.collect(),
    }
}

fn vcp(
    device: &DeviceStatus,
    before: Option<&VcpFigures>,
    now: Option<&VcpFigures>,
    elapsed: Option<Duration>,
) -> VcpView {
    let mut view = VcpView { device: device.name.clone(), ..VcpView::default() };
    if let Some(backend) = &device.backend {
        let ours = backend.pid.is_some();
        view.state = match (backend.connected, now.is_some() || !ours) {
            (true, true) => "up".into(),
            (true, false) => "mute".into(),
            (false, _) => away(backend),
        };
        (view.pid, view.cpu, view.restarts) = (backend.pid, backend.cpu, backend.restarts);
    }
    let Some(now) = now else { return view };
    view.inflight = Some(now.inflight);
    let (Some(before), Some(elapsed)) = (before, elapsed) else { return view };
    // Another process counts from 0 on.
    let is_new = now.load.busy_ns < before.load.busy_ns || now.load.sleep_ns < before.load.sleep_ns;
    let nothing = VcpFigures::default();
    let before = if is_new { &nothing } else { before };
    let per_s = |before: u64, now: u64| rate(Some(before), now, Some(elapsed));
    view.reads = per_s(before.read.ok, now.read.ok);
    view.writes = per_s(before.write.ok, now.write.ok);
    view.read_bytes = per_s(before.read.bytes, now.read.bytes);
    view.write_bytes = per_s(before.write.bytes, now.write.bytes);
    let failed = |f: &VcpFigures| f.read.failed + f.write.failed + f.flush.failed + f.other.failed;
    view.failed = per_s(failed(before), failed(now));
    let parts = [
        now.load.busy_ns.saturating_sub(before.load.busy_ns),
        now.load.look_ns.saturating_sub(before.load.look_ns),
        now.load.sleep_ns.saturating_sub(before.load.sleep_ns),
    ];
    let told: u64 = parts.iter().sum();
    let elapsed_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
    // What a thread that sleeps has not told yet is sleep.
    let [busy, look, sleep] = parts;
    let sleep = if is_new { sleep } else { sleep.saturating_add(elapsed_ns.saturating_sub(told)) };
    let whole = (busy + look).saturating_add(sleep).max(1) as f64;
    view.load = Some([busy, look, sleep].map(|part| part as f64 / whole));
    let latencies = latencies([(&before.read, &now.read), (&before.write, &now.write)]);
    (view.p50_ns, view.p99_ns) = (quantile(&latencies, 0.5), quantile(&latencies, 0.99));
    view
}

/// Why a device has no backend, and when there will be an attempt to get it one.
fn away(backend: &BackendStatus) -> String {
    let mut text = "AWAY".to_owned();
    if let Some(ms) = backend.next_start_ms {
        text.push_str(&format!(", next start in {ms} ms"));
    }
    if let Some(why) = &backend.last_death {
        text.push_str(&format!(": {why}"));
    }
    text
}

fn kinds(before: Option<Exits>, now: Exits, elapsed: Option<Duration>) -> Vec<(&'static str, Option<f64>)> {
    let before = before.map(|exits| exits.by_kind());
    let one = |(at, (kind, count)): (usize, (&'static str, u64))| {
        (kind, rate(before.map(|b| b[at].1), count, elapsed))
    };
    now.by_kind().into_iter().enumerate().map(one).collect()
}

/// Per second. A counter that went back has begun anew.
fn rate(before: Option<u64>, now: u64, elapsed: Option<Duration>) -> Option<f64> {
    let seconds = elapsed?.as_secs_f64();
    let grown = now.checked_sub(before?).unwrap_or(now);
    (seconds > 0.0).then(|| grown as f64 / seconds)
}

/// How many latencies lie in each bucket, of those between two looks.
fn latencies(operations: [(&Operations, &Operations); 2]) -> Vec<u64> {
    let mut sum = Vec::new();
    for (before, now) in operations {
        sum.resize(sum.len().max(now.latency_buckets.len()), 0);
        for (at, count) in now.latency_buckets.iter().enumerate() {
            let before = before.latency_buckets.get(at).copied().unwrap_or(0);
            sum[at] += count.saturating_sub(before);
        }
    }
    sum
}

/// Upper bound of a quantile; `None` without any latency.
fn quantile(buckets: &[u64], quantile: f64) -> Option<u64> {
    let total: u64 = buckets.iter().sum();
    let rank = ((total as f64 * quantile).ceil() as u64).max(1);
    let mut seen = 0;
    let at = buckets.iter().position(|count| {
        seen += count;
        seen >= rank
    })?;
    Some(1u64 << at.min(63))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::top::testing::look;

    #[test]
    fn rates_are_per_second_and_shares_of_the_time() {
        let start = Instant::now();
        let before = look(start, 0);
        let mut now = look(start + Duration::from_secs(2), 1);
        let view = guest(Some(&before), &now);
        assert_eq!((view.name.as_str(), view.state.as_str()), ("vm1", "running"));
        assert_eq!(view.vcpus[0].exits, Some(50.0));
        assert_eq!((view.vcpus[0].kvm("exits"), view.vcpus[0].kvm("halt_exits")), (Some(500.0), Some(10.0)));
        let vcp = &view.vcps[0];
        assert_eq!((vcp.reads, vcp.read_bytes), (Some(1000.0), Some(4_096_000.0)));
        assert_eq!((vcp.p50_ns, vcp.p99_ns), (Some(1 << 15), Some(1 << 17)));
        let load = vcp.load.unwrap();
        assert!((load[0] - 0.25).abs() < 1e-9 && (load[2] - 0.5).abs() < 1e-9, "{load:?}");
        // A thread that sleeps tells of it when it wakes up.
        now.status.vcps[0].load = before.status.vcps[0].load;
        assert_eq!(guest(Some(&before), &now).vcps[0].load, Some([0.0, 0.0, 1.0]));
    }

    #[test]
    fn the_first_look_and_one_at_another_monitor_have_no_rates() {
        let start = Instant::now();
        let now = look(start + Duration::from_secs(1), 1);
        assert_eq!(guest(None, &now).vcps[0].reads, None);
        let mut before = look(start, 0);
        before.status.machine.pid += 1;
        assert_eq!(guest(Some(&before), &now).vcpus[0].exits, None);
    }

    #[test]
    fn counters_of_a_new_process_begin_at_0() {
        let start = Instant::now();
        let (before, mut now) = (look(start, 5), look(start + Duration::from_secs(1), 0));
        now.status.machine.uptime_ms = before.status.machine.uptime_ms;
        now.status.vcps[0].read.ok = 10;
        let vcp = &guest(Some(&before), &now).vcps[0];
        assert_eq!((vcp.reads, vcp.state.as_str()), (Some(10.0), "up"));
    }

    #[test]
    fn one_that_does_not_answer_has_a_state_and_no_figures() {
        let mut now = look(Instant::now(), 0);
        now.status.vcps[0].answers = false;
        let vcp = guest(None, &now).vcps.remove(0);
        assert_eq!((vcp.state.as_str(), vcp.inflight), ("mute", None));
        now.status.machine.devices[0].backend.as_mut().unwrap().connected = false;
        assert_eq!(guest(None, &now).vcps[0].state, "AWAY");
        let backend = now.status.machine.devices[0].backend.as_mut().unwrap();
        (backend.next_start_ms, backend.last_death) = (Some(50), Some("signal 9".into()));
        assert_eq!(guest(None, &now).vcps[0].state, "AWAY, next start in 50 ms: signal 9");
    }
}
