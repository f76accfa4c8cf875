//! `vcp check`: what this host can do. Facts are read or tried, never guessed from a name; each line says what to do
//! about what is missing.

mod host;
mod probe;

use serde::Serialize;

use crate::cli::CheckArgs;
use crate::error::{Error, Result};

/// How an item turned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Works, but less well than it could.
    Warn,
    /// Missing.
    No,
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Item {
    /// What was looked at.
    pub name: &'static str,
    /// How it turned out.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do about it; empty if nothing.
    pub advice: String,
}

impl Item {
    fn new(name: &'static str, status: Status, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, status, found: found.into(), advice: advice.into() }
    }

    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, Status::Ok, found, "")
    }
}

/// The whole report. The field names are an interface: scripts read them.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// `/dev/kvm` can be used.
    pub kvm: bool,
    /// An ordinary Linux guest runs.
    pub linux_guest: bool,
    /// A bare-metal guest in ring 3 runs at the processor's speed.
    pub ring3_guest: bool,
    /// Ring 0 of a guest is emulated instruction by instruction.
    pub ring0_emulated: bool,
    /// Why Linux guests run or do not.
    pub reason: String,
    /// The lines.
    pub items: Vec<Item>,
}

/// A guest's loop this slow beside ring 3 is being interpreted.
const EMULATED_RATIO: f64 = 10.0;
/// No interpreter reaches this, no processor and no translating emulator stays below it (million instructions a second).
const EMULATED_MIPS: f64 = 20.0;

/// Examines the host.
pub fn examine() -> Report {
    let mut items = host::processors();
    let (kvm_items, kvm) = host::kvm();
    items.extend(kvm_items);
    let mut report = Report {
        kvm,
        linux_guest: false,
        ring3_guest: false,
        ring0_emulated: false,
        reason: String::new(),
        items,
    };
    if kvm {
        probes(&mut report);
    } else {
        report.reason = "/dev/kvm cannot be used".into();
    }
    report.items.extend(host::memory());
    report.items.extend(host::rights());
    report
}

fn probes(report: &mut Report) {
    let ring3 = probe::measure(probe::Ring::Three, EMULATED_MIPS);
    let ring0 = probe::measure(probe::Ring::Zero, EMULATED_MIPS);
    let item = |name, result: &std::result::Result<f64, String>| match result {
        Ok(mips) => Item::ok(name, format!("ran at {mips:.0} million instructions/s")),
        Err(e) => Item::new(name, Status::No, e.as_str(), "see the kernel's log (dmesg) for KVM's messages"),
    };
    report.items.push(item("probe ring 3", &ring3));
    report.ring3_guest = matches!(ring3, Ok(mips) if mips >= EMULATED_MIPS);
    let mut ring0_item = item("probe ring 0", &ring0);
    report.ring0_emulated = match (&ring0, &ring3) {
        (Ok(zero), Ok(three)) => *zero < EMULATED_MIPS && zero * EMULATED_RATIO < *three,
        _ => false,
    };
    if report.ring0_emulated {
        ring0_item.status = Status::Warn;
        ring0_item.advice = "ring 0 is emulated: use bare-metal ring-3 guests here; for Linux guests use a host with hardware virtualisation, or the helper VM".into();
    }
    report.items.push(ring0_item);
    report.linux_guest = ring0.is_ok() && !report.ring0_emulated;
    report.reason = match (&ring0, report.ring0_emulated) {
        (Err(e), _) => format!("the ring-0 probe failed: {e}"),
        (Ok(mips), true) => format!("this host's KVM emulates ring 0 ({mips:.1} million instructions/s)"),
        (Ok(_), false) => "KVM runs ring 0 on the processor".into(),
    };
}

/// Runs the command.
pub fn run(args: &CheckArgs) -> Result<()> {
    let report = examine();
    let text = if args.json { json(&report)? } else { lines(&report) };
    use std::io::Write;
    std::io::stdout().lock().write_all(text.as_bytes()).map_err(Error::os("write to standard output"))
}

fn json(report: &Report) -> Result<String> {
    let text = serde_json::to_string_pretty(report)
        .map_err(|e| Error::Os { action: "write JSON", source: std::io::Error::other(e) })?;
    Ok(text + "\n")
}

fn lines(report: &Report) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    for item in &report.items {
        let mark = match item.status {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::No => "no",
        };
        let advice = if item.advice.is_empty() { String::new() } else { format!(" -> {}", item.advice) };
        let _ = writeln!(text, "{mark:<5} {:<16} {}{advice}", item.name, item.found);
    }
    let yes = |b: bool| if b { "yes" } else { "no" };
    let _ = writeln!(text, "linux guests: {} ({})", yes(report.linux_guest), report.reason);
    let ring3 = if report.ring3_guest {
        "they run at the processor's speed"
    } else {
        "the probe did not run, see above"
    };
    let _ = writeln!(text, "bare-metal ring-3 guests: {} ({ring3})", yes(report.ring3_guest));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_is_made_everywhere() {
        let report = examine();
        assert!(!report.reason.is_empty());
        // A Linux guest needs KVM and a ring 0 that runs; nothing else may claim it.
        assert!(!report.linux_guest || (report.kvm && !report.ring0_emulated));
        let value: serde_json::Value = serde_json::from_str(&json(&report).unwrap()).unwrap();
        for field in ["kvm", "linux_guest", "ring3_guest", "ring0_emulated"] {
            assert!(value[field].is_boolean(), "{field}");
        }
        assert!(value["reason"].is_string());
        assert_eq!(lines(&report).lines().count(), report.items.len() + 2);
    }
}
