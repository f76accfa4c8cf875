//! The view as plain rows: `time guest kind name=value ...`. Values are numbers in base units (bytes, nanoseconds, per
//! second), `-` where nothing is known; a value with a space is in quotes. Nothing is cut.

use std::fmt::Write;

use super::view::{GuestView, VcpView, VcpuView};

/// The rows of one interval; with a line that explains them before the first.
pub fn rows(guests: &[GuestView], time: &str, explain: bool) -> String {
    let mut out = String::new();
    if explain {
        out.push_str("# time guest kind name=value... (rates per second, load as shares of the time, latencies as upper bounds in ns)\n");
    }
    for guest in guests {
        let name = quoted(&guest.name);
        let start = format!("{time} {name}");
        let state = quoted(&guest.state);
        if !guest.answers {
            let _ = writeln!(out, "{start} guest state=gone reason={state}");
            continue;
        }
        let _ = writeln!(
            out,
            "{start} guest state={state} pid={} vcpus={} uptime={} memory={}",
            guest.pid,
            guest.vcpus.len(),
            quoted(&guest.uptime),
            quoted(&guest.memory)
        );
        guest.vcpus.iter().for_each(|vcpu| vcpu_row(&mut out, &start, vcpu));
        guest.vcps.iter().for_each(|vcp| vcp_row(&mut out, &start, vcp));
    }
    out
}

fn vcpu_row(out: &mut String, start: &str, vcpu: &VcpuView) {
    let _ = write!(out, "{start} vcpu id={} cpus={} exits={}", vcpu.id, vcpu.cpus, number(vcpu.exits));
    for (kind, rate) in &vcpu.by_kind {
        let _ = write!(out, " {kind}={}", number(*rate));
    }
    for (name, rate) in &vcpu.kvm {
        let _ = write!(out, " kvm_{name}={}", number(*rate));
    }
    out.push('\n');
}

fn vcp_row(out: &mut String, start: &str, vcp: &VcpView) {
    let share = |at: usize| vcp.load.map_or("-".into(), |load| format!("{:.3}", load[at]));
    let _ = writeln!(
        out,
        "{start} vcp device={} state={} pid={} cpu={} busy={} look={} sleep={} reads={} writes={} read_bytes={} \
         write_bytes={} failed={} p50_ns={} p99_ns={} inflight={} restarts={}",
        quoted(&vcp.device),
        quoted(&vcp.state),
        whole(vcp.pid.map(u64::from)),
        whole(vcp.cpu.map(|cpu| cpu as u64)),
        share(0),
        share(1),
        share(2),
        number(vcp.reads),
        number(vcp.writes),
        number(vcp.read_bytes),
        number(vcp.write_bytes),
        number(vcp.failed),
        whole(vcp.p50_ns),
        whole(vcp.p99_ns),
        whole(vcp.inflight),
        vcp.restarts,
    );
}

fn number(value: Option<f64>) -> String {
    value
        .map_or("-".into(), |value| if value >= 10.0 { format!("{value:.0}") } else { format!("{value:.1}") })
}

fn whole(value: Option<u64>) -> String {
    value.map_or("-".into(), |value| value.to_string())
}

/// A word as it is, anything else in quotes and without characters that could break the row.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:/,".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.into() } else { format!("{text:?}") }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::top::testing::look;
    use crate::top::view;

    #[test]
    fn rows_are_plain_and_whole() {
        let start = Instant::now();
        let (before, now) = (look(start, 0), look(start + Duration::from_secs(2), 1));
        let text =
            rows(&[view::guest(Some(&before), &now), view::gone("vm\n2", "gone away")], "12:00:00Z", true);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("# "));
        assert!(lines[1].starts_with("12:00:00Z vm1 guest state=running pid="), "{text}");
        assert!(lines[2].contains(" vcpu id=0 cpus=0-1 exits=50 io_in=0.0"), "{text}");
        assert!(lines[2].contains(" kvm_exits=500 "), "{text}");
        let vcp = lines.iter().find(|line| line.contains(" vcp device=disk0 ")).unwrap();
        for pair in ["state=up", "busy=0.250", "reads=1000", "p99_ns=131072", "inflight=7", "restarts=2"] {
            assert!(vcp.split(' ').any(|found| found == pair), "no {pair} in {vcp}");
        }
        assert_eq!(lines.last(), Some(&"12:00:00Z \"vm\\n2\" guest state=gone reason=\"gone away\""));
        assert!(!text.contains('\u{1b}'));
    }
}
