//! `vcp ctl status` for people: tables that fit 80 columns.

use crate::api::types::{GuestStatus, VcpFigures};
use crate::config::size::CpuList;
use crate::machine::status::{DeviceStatus, RunState};
use crate::text::{self, Table};

/// Everything that is known.
pub(super) fn status(status: &GuestStatus) -> String {
    let machine = &status.machine;
    let state = match machine.state {
        RunState::Running => "running",
        RunState::Paused => "paused",
    };
    let panicked = if machine.panicked { ", PANICKED" } else { "" };
    let mut out = format!(
        "{}: {state}{panicked}, up {}, {} vCPUs, {}, pid {}, vcp {}\n",
        status.name,
        text::duration(machine.uptime_ms.saturating_mul(1_000_000)),
        machine.vcpus.len(),
        text::bytes(machine.memory_bytes),
        machine.pid,
        status.version,
    );
    out.push('\n');
    let mut table = Table::new(&["vCPU", "thread", "CPUs", "exits", "port", "mmio", "signal", "other"]);
    for vcpu in &machine.vcpus {
        let exits = &vcpu.exits;
        table.row([
            vcpu.id.to_string(),
            vcpu.thread_id.to_string(),
            vcpu.cpus.clone().map_or("any".into(), |cpus| CpuList(cpus).to_string()),
            exits.total().to_string(),
            (exits.io_in + exits.io_out).to_string(),
            (exits.mmio_read + exits.mmio_write).to_string(),
            exits.interrupted.to_string(),
            exits.other.to_string(),
        ]);
    }
    out.push_str(&table.to_string());
    out.push('\n');
    let mut table =
        Table::new(&["device", "driver", "backend", "pid", "CPU", "restarts", "address"]).left(&[1, 2, 6]);
    for device in &machine.devices {
        let backend = device.backend.as_ref();
        table.row([
            device.name.clone(),
            if device.active { "active" } else { "-" }.into(),
            backend.map_or("-", |b| if b.connected { "connected" } else { "AWAY" }).into(),
            backend.and_then(|b| b.pid).map_or("-".into(), |pid| pid.to_string()),
            backend.and_then(|b| b.cpu).map_or("-".into(), |cpu| cpu.to_string()),
            backend.map_or("-".into(), |b| b.restarts.to_string()),
            device.address.clone(),
        ]);
    }
    out.push_str(&table.to_string());
    for device in &machine.devices {
        let Some(death) = device.backend.as_ref().and_then(|backend| backend.last_death.as_ref()) else {
            continue;
        };
        out.push_str(&text::sentence(&format!("{}, last lost: {death}", device.name)));
    }
    out.push_str(&confinement(&machine.devices));
    if !status.vcps.is_empty() {
        out.push('\n');
        out.push_str(&vcps(&status.vcps));
    }
    out
}

/// Control groups of the VCPs, and what of their confinement could not be had.
fn confinement(devices: &[DeviceStatus]) -> String {
    let backends = || devices.iter().filter_map(|device| Some((&device.name, device.backend.as_ref()?)));
    let mut table = Table::new(&["group", "CPU max", "weight", "stopped", "memory", "of", "tasks", "of"]);
    let mut groups = 0;
    for (name, group) in backends().filter_map(|(name, b)| Some((name, b.control_group.as_ref()?))) {
        groups += 1;
        table.row([
            name.clone(),
            group.cpu_max_percent.map_or("-".into(), |percent| format!("{percent}%")),
            group.cpu_weight.to_string(),
            text::duration(group.throttled_us.saturating_mul(1000)),
            text::bytes(group.memory_bytes),
            text::bytes(group.memory_max_bytes),
            group.pids.to_string(),
            group.pids_max.to_string(),
        ]);
    }
    let mut out = if groups == 0 { String::new() } else { format!("\n{table}") };
    for (name, backend) in backends() {
        if let Some(network) = &backend.network {
            let own =
                if backend.namespaces.is_empty() { "none".into() } else { backend.namespaces.join(", ") };
            out.push_str(&text::sentence(&format!(
                "{name}, namespaces of its own: {own}; reaches: {network}"
            )));
        }
        for missing in &backend.not_confined {
            out.push_str(&text::sentence(&format!("{name}, not confined: {missing}")));
        }
    }
    out
}

fn vcps(vcps: &[VcpFigures]) -> String {
    let mut table =
        Table::new(&["VCP", "busy", "look", "sleep", "reads", "writes", "read", "written", "failed", "now"]);
    for vcp in vcps {
        if !vcp.answers {
            table.row([vcp.device.clone(), "does not answer".into()]);
            continue;
        }
        let load = vcp.load;
        let all = load.busy_ns.saturating_add(load.look_ns).saturating_add(load.sleep_ns);
        let failed = [&vcp.read, &vcp.write, &vcp.flush, &vcp.other].iter().map(|op| op.failed).sum::<u64>();
        table.row([
            vcp.device.clone(),
            text::percent(load.busy_ns, all),
            text::percent(load.look_ns, all),
            text::percent(load.sleep_ns, all),
            text::count(vcp.read.ok),
            text::count(vcp.write.ok),
            text::bytes(vcp.read.bytes),
            text::bytes(vcp.write.bytes),
            failed.to_string(),
            vcp.inflight.to_string(),
        ]);
    }
    table.to_string()
}
