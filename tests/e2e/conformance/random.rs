//! One fault at random, under a verifying load: whatever a target does wrong once, the guest never sees wrong data, an
//! error, or a request without an answer; and we never answer a breach by one of ours.
//!
//! The fault is made from a seed. `VCP_RANDOM_FAULTS=FROM-TO` runs other seeds than the few of every run; a seed that
//! fails is told with its script.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, ensure};
use vcp_tests::load::Load;
use vcp_tests::{Result, pattern};

use super::bed::{FAST, bed, next_driver};

/// Seeds of every run.
const FEW: (u64, u64) = (1, 40);
/// Beds at once; they mostly wait.
const AT_ONCE: usize = 6;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = pattern::mix(self.0);
        self.0 % n
    }

    fn of<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A number for a field: one of those that are wrong in a way of their own, or any.
    fn number(&mut self) -> String {
        match self.below(3) {
            0 => self.of(&["0", "1", "0xffffffff", "0x80000000", "0x7fffffff", "512"]).into(),
            _ => format!("{:#x}", self.below(1 << 32)),
        }
    }

    /// A small step up or down.
    fn step(&mut self) -> &'static str {
        self.of(&["1", "-1", "2", "4", "-4", "512", "-512", "4096", "65536", "0x80000000"])
    }
}

/// A change to one header field that a target has no right to. What would only be another right answer (a smaller R2T,
/// another transfer tag, a status that means failure) is not among them.
fn field(random: &mut Random, event: &str) -> String {
    let which = match event {
        "read" => random.of(&["data0", "data1", "data2", "status"]),
        "write" => random.of(&["r2t0", "r2t1", "status", "status"]),
        _ => "status",
    };
    if which.starts_with("r2t") {
        return match random.below(4) {
            0 => format!("set {which} length {}", random.of(&["0", "0xffffffff", "0x1000000", "65540"])),
            1 => format!("add {which} offset {}", random.step()),
            2 => format!("add {which} r2t-sn {}", random.step()),
            _ => format!("set {which} itt {:#x}", 0x8000_8000 | random.below(1 << 32)),
        };
    }
    let fields = ["stat-sn", "exp-cmd-sn", "max-cmd-sn", "data-sn", "offset", "residual", "response"];
    match random.below(7) {
        0 => format!("set {which} itt {:#x}", 0x8000_8000 | random.below(1 << 32)),
        1 => format!("set {which} opcode {:#x}", random.below(64)),
        2 => format!("or {which} flags {:#x}", random.below(256)),
        3 => format!("add {which} dsl {}", random.of(&["1", "4", "-4", "512", "65536", "0x800000"])),
        4 => format!("set {which} {} {}", random.of(&fields), random.number()),
        _ => format!("add {which} {} {}", random.of(&fields), random.step()),
    }
}

/// Whether the session of a seed has digests.
fn digests(seed: u64) -> bool {
    seed.is_multiple_of(3)
}

fn script(seed: u64) -> String {
    let mut random = Random(pattern::mix(seed ^ 0x5eed));
    let event = random.of(&["read", "read", "write", "write", "sync", "ping"]);
    let turn = 1 + random.below(if matches!(event, "sync" | "ping") { 2 } else { 30 });
    let pdus: &[&str] = match event {
        "read" => &["data0", "data1", "data3", "status"],
        "write" => &["r2t0", "r2t1", "status"],
        _ => &["status"],
    };
    let is_io = matches!(event, "read" | "write");
    let action = match random.below(12) {
        0 => format!("{} {}", random.of(&["drop", "repeat", "swap"]), random.of(pdus)),
        1 if digests(seed) => format!("{} {}", random.of(&["spoil-header", "spoil-data"]), random.of(pdus)),
        1 if event == "read" => format!("cut {} {}", random.of(&["data0", "data2"]), 4 + random.below(600)),
        2 if event == "read" => format!("{} {}", random.of(&["short", "missing"]), 1 + random.below(4096)),
        3 if is_io => format!("response {}", 1 + random.below(255)),
        4 if is_io => format!("reject {}", random.below(13)),
        5 => random.of(&["close", "reset", "close-after", "hang", "stall"]).into(),
        6 => format!("truncate {}", random.below(4300)),
        7 => {
            let extra = random.of(&[
                "nop 0x10",
                "nop none",
                "nop-both",
                "stray",
                "reject 4",
                "async 1 0 0 1",
                "async 2 0 0 0",
                "async 3 0 0 0",
                "async 4 0 0 1",
                "async 5",
                "async 255",
                "async-sense 6 0x2a09",
                "async-sense 6 0x3f0e",
            ]);
            format!("{} {extra}", random.of(&["first", "last"]))
        }
        8 if is_io => {
            random.of(&["status 0x08", "status 0x28", "status 0x30", "status 0x40", "early"]).into()
        }
        9 if is_io => {
            let code = random.of(&["6 0x2900", "6 0x2a09", "6 0x3f03", "2 0x0401", "11 0x4705", "11 0x0c0d"]);
            format!("sense {code}")
        }
        _ => field(&mut random, event),
    };
    let apart = if random.below(2) == 0 { "yes" } else { "no" };
    let r2t = if random.below(2) == 0 { "yes" } else { "no" };
    format!(
        "option apart {apart}\noption initial-r2t {r2t}\noption in-segment 1024\noption segment 2048
         option first-burst 2048\noption max-burst 2048\n{event}#{turn} {action}"
    )
}

fn holds(seed: u64) -> Result<()> {
    let script = script(seed);
    let options: String =
        script.lines().filter(|l| l.contains("option")).map(|l| l.to_owned() + "\n").collect();
    let rule = script.lines().last().unwrap_or_default();
    let with_digests = [FAST, &["--header-digest", "crc32c", "--data-digest", "crc32c"]].concat();
    let mut bed = bed(&options, if digests(seed) { &with_digests } else { FAST })?;
    bed.target.script(rule)?;
    let mut load = Load::new(seed, 64);
    load.run(&mut bed.driver, 0, 8, 200, |_| Ok(())).with_context(|| bed.story())?;
    load.verify_all(&mut bed.driver).with_context(|| bed.story())?;
    if rule.starts_with("ping") {
        bed.target.wait("in", "nop-out", 3)?;
    }
    ensure!(bed.stat("failed")? == 0);
    // A new front end finds a device that works.
    let super::bed::Bed { target, backend, driver, .. } = bed;
    drop(driver);
    let mut driver = next_driver(&backend)?;
    load.verify_all(&mut driver)?;
    target.judge()
}

#[test]
fn one_fault_at_random_is_never_seen_by_the_guest() -> Result<()> {
    let given = std::env::var("VCP_RANDOM_FAULTS").ok();
    let range = given.as_deref().and_then(|text| text.split_once('-'));
    let (from, to) = match range {
        Some((from, to)) => (from.parse()?, to.parse()?),
        None => FEW,
    };
    let next = AtomicU64::new(from);
    let failed = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > to {
                        return;
                    }
                    if let Err(error) = holds(seed) {
                        let text = format!("seed {seed}: {}\n{error:#}\n", script(seed));
                        failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(text);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    ensure!(failed.is_empty(), "{} seeds of {from} to {to} failed:\n{}", failed.len(), failed.join("\n"));
    Ok(())
}

/// The load has eyes: a target that says that it wrote and did not is found out.
#[test]
fn lie_of_the_target_is_seen_by_the_load() -> Result<()> {
    let mut bed = bed("write#20-40 pretend", &[])?;
    let mut load = Load::new(1, 64);
    let ran = load.run(&mut bed.driver, 0, 8, 300, |_| Ok(()));
    let verified = load.verify_all(&mut bed.driver);
    ensure!(ran.is_err() || verified.is_err(), "nobody noticed");
    Ok(())
}
