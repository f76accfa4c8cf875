//! The page of metrics: what the monitor knows of its guest, and what its VCPs tell, as OpenMetrics text. A VCP that is
//! asked directly (`vcp-iscsi serve --metrics`) tells more of itself.

use vcp_core::metrics::page::page as write;
use vcp_core::metrics::{Family, Samples, Unit};

use super::types::{GuestStatus, VcpFigures};
use crate::machine::status::{ControlGroup, RunState};

static BUILD: Family = Family::gauge(
    "vcp_monitor_build",
    Unit::None,
    "Always 1; the labels say which version runs, and which guest",
);
static RUNNING: Family =
    Family::gauge("vcp_guest_running", Unit::None, "1 while the vCPUs run, 0 while they are paused");
static UPTIME: Family = Family::gauge("vcp_guest_uptime", Unit::Seconds, "Time since the guest was started");
static MEMORY: Family = Family::gauge("vcp_guest_memory", Unit::Bytes, "Guest memory");
static PANICKED: Family =
    Family::gauge("vcp_guest_panicked", Unit::None, "1 if the guest's kernel said that it has panicked");
static EXITS: Family = Family::counter(
    "vcp_vcpu_exits",
    Unit::None,
    "Exits of a vCPU to the monitor, by kind; those that KVM handles by itself are not among them",
);
static KVM_EXITS: Family = Family::counter(
    "vcp_vcpu_kvm",
    Unit::None,
    "What KVM counts of a vCPU: all its exits, and those of some kinds",
);
static CONNECTED: Family =
    Family::gauge("vcp_device_backend_connected", Unit::None, "1 while the device has a backend");
static RESTARTS: Family = Family::counter(
    "vcp_device_backend_restarts",
    Unit::None,
    "Times that another backend took the place of a lost one",
);
static GROUP_MEMORY: Family =
    Family::gauge("vcp_control_group_memory", Unit::Bytes, "Memory charged to the VCP's control group");
static GROUP_TASKS: Family =
    Family::gauge("vcp_control_group_tasks", Unit::None, "Processes and threads in the VCP's control group");
static GROUP_CPU: Family =
    Family::counter("vcp_control_group_cpu", Unit::Seconds, "Processor time of the VCP's control group");
static GROUP_STOPPED: Family = Family::counter(
    "vcp_control_group_throttled",
    Unit::Seconds,
    "Time for which the VCP was stopped because of cpu.max",
);
static GROUP_REFUSALS: Family = Family::counter(
    "vcp_control_group_refusals",
    Unit::None,
    "What the VCP's control group did not let happen: memory (a process was killed), tasks (one was not started)",
);
static NOT_CONFINED: Family = Family::gauge(
    "vcp_not_confined",
    Unit::None,
    "Restrictions of the VCP's process that could not be had; the status says which and why",
);
static ANSWERS: Family = Family::gauge(
    "vcp_device_answers",
    Unit::None,
    "1 if the device's VCP told its figures in time; else they are missing here",
);
static TIME: Family = Family::counter(
    "vcp_loop_time",
    Unit::Seconds,
    "What the data thread did with its time: busy (something moved), look (for work that was not there), sleep",
);
static SLEEPS: Family = Family::counter("vcp_loop_sleeps", Unit::None, "Times the data thread went to sleep");
static REQUESTS: Family =
    Family::counter("vcp_requests", Unit::None, "Requests that ended, by kind and result");
static BYTES: Family = Family::counter("vcp_request", Unit::Bytes, "Payload of requests that ended well");
static IN_FLIGHT: Family =
    Family::gauge("vcp_requests_in_flight", Unit::None, "Requests taken and not given back");
static BROKEN: Family =
    Family::counter("vcp_broken_queues", Unit::None, "Queues stopped because their driver broke a rule");
static RESUBMITTED: Family =
    Family::counter("vcp_resubmitted", Unit::None, "Requests in flight of an earlier process, taken again");

/// The page.
pub fn page(status: &GuestStatus) -> String {
    let mut samples = Samples::default();
    samples.within("guest", &status.name, |samples| collect(samples, status));
    write(samples)
}

fn collect(samples: &mut Samples, status: &GuestStatus) {
    let machine = &status.machine;
    samples.add(&BUILD, &[("version", &status.version)], 1);
    samples.add(&RUNNING, &[], u64::from(machine.state == RunState::Running));
    samples.add(&UPTIME, &[], machine.uptime_ms.saturating_mul(1_000_000));
    samples.add(&MEMORY, &[], machine.memory_bytes);
    samples.add(&PANICKED, &[], machine.panicked.into());
    for vcpu in &machine.vcpus {
        samples.within("vcpu", &vcpu.id.to_string(), |samples| {
            for (kind, count) in vcpu.exits.by_kind() {
                samples.add(&EXITS, &[("kind", kind)], count);
            }
            for (name, count) in vcpu.kvm.iter().flat_map(crate::kvm::stats::KvmExits::by_name) {
                samples.add(&KVM_EXITS, &[("counter", name)], count);
            }
        });
    }
    for device in &machine.devices {
        let Some(backend) = &device.backend else { continue };
        samples.within("device", &device.name, |samples| {
            samples.add(&CONNECTED, &[], backend.connected.into());
            samples.add(&RESTARTS, &[], backend.restarts);
            samples.add(&NOT_CONFINED, &[], backend.not_confined.len() as u64);
            if let Some(group) = &backend.control_group {
                of_group(samples, group);
            }
        });
    }
    for vcp in &status.vcps {
        samples.within("device", &vcp.device, |samples| of_vcp(samples, vcp));
    }
}

fn of_group(samples: &mut Samples, group: &ControlGroup) {
    samples.add(&GROUP_MEMORY, &[], group.memory_bytes);
    samples.add(&GROUP_TASKS, &[], group.pids);
    samples.add(&GROUP_CPU, &[], group.cpu_us.saturating_mul(1000));
    samples.add(&GROUP_STOPPED, &[], group.throttled_us.saturating_mul(1000));
    samples.add(&GROUP_REFUSALS, &[("of", "memory")], group.oom_kills);
    samples.add(&GROUP_REFUSALS, &[("of", "tasks")], group.refused_pids);
}

fn of_vcp(samples: &mut Samples, vcp: &VcpFigures) {
    samples.add(&ANSWERS, &[], vcp.answers.into());
    if !vcp.answers {
        return;
    }
    for (part, ns) in [("busy", vcp.load.busy_ns), ("look", vcp.load.look_ns), ("sleep", vcp.load.sleep_ns)] {
        samples.add(&TIME, &[("part", part)], ns);
    }
    samples.add(&SLEEPS, &[], vcp.sleeps);
    for (op, of) in [("read", &vcp.read), ("write", &vcp.write), ("flush", &vcp.flush), ("other", &vcp.other)]
    {
        samples.add(&REQUESTS, &[("op", op), ("result", "ok")], of.ok);
        samples.add(&REQUESTS, &[("op", op), ("result", "failed")], of.failed);
        samples.add(&BYTES, &[("op", op)], of.bytes);
    }
    samples.add(&IN_FLIGHT, &[], vcp.inflight);
    samples.add(&BROKEN, &[], vcp.broken_queues);
    samples.add(&RESUBMITTED, &[], vcp.resubmitted);
}
