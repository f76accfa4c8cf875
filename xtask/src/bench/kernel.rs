//! `bench kernel`: `vcp-iscsi` beside the kernel's initiator (`iscsi_tcp`), both in the helper VM on LUNs of one target:
//! `vcp bench blk` on the one, fio with libaio on the raw device of the other. The VM is emulated, so only the ratios say
//! anything, and even those are of a machine on which computing is slow and interrupts are cheap.
//!
//! The VM has a CPU for each hardware thread used, and its idle CPUs do not halt. Otherwise every wake-up of one waits until
//! the host's scheduler lets its thread run, which with more CPUs than hardware threads takes a whole time slice of some
//! milliseconds: then that is what is measured (`docs/decisions/bench-kernel.md`).

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use guest_images::helper::HelperVm;
use serde_json::Value;

use super::report::{Metric, Report, Row};

const CASES: &[(&str, &str, u32)] = &[
    ("randread", "4k", 1),
    ("randread", "4k", 32),
    ("randwrite", "4k", 32),
    ("read", "128k", 8),
    ("write", "128k", 8),
];

const METRICS: &[Metric] = &[
    Metric { title: "IOPS", more_is_better: true, digits: 0 },
    Metric { title: "p50 us", more_is_better: false, digits: 1 },
    Metric { title: "machine CPU us/IO", more_is_better: false, digits: 1 },
];

const OURS: [&str; 2] = ["vcp-iscsi", "vcp-iscsi poll=0"];
const KERNEL: &str = "kernel iscsi_tcp";
/// The backend's, and that of target and load.
const CPUS: u32 = 2;
/// Microseconds in a second of one busy CPU.
const SECOND_US: f64 = 1e6;

/// What every run of the job prints: `BENCH contender|case|busy/elapsed|JSON of the load`.
const JOB: &str = r#"
set -e
ip link set lo up
T=iqn.2026-11.vcp:bench
taskset 1 /bench/iscsi-target serve --listen 127.0.0.1:3260 --target $T --lun mem:64M --lun mem:64M --lun mem:64M >/tmp/target 2>&1 &
ready() { for i in $(seq 300); do grep -q '^ready:' $1 && return; sleep 0.1; done; cat $1; exit 1; }
ready /tmp/target
/bench/vcp-iscsi serve --cpu 1 --socket-path /tmp/a.sock iscsi://127.0.0.1:3260/$T/1 >/tmp/a 2>&1 &
/bench/vcp-iscsi serve --cpu 1 --poll-us 0 --socket-path /tmp/b.sock iscsi://127.0.0.1:3260/$T/2 >/tmp/b 2>&1 &
ready /tmp/a
ready /tmp/b
iscsistart -i iqn.2026-11.vcp:kernel -t $T -g 1 -a 127.0.0.1 -p 3260
for i in $(seq 100); do [ -b /dev/sda ] && break; sleep 0.1; done
[ -b /dev/sda ]
echo none > /sys/block/sda/queue/scheduler
# Hundredths of a second: since the start, and of them busy ones of both CPUs.
clock() { awk '{printf "%d", $1 * 100}' /proc/uptime; }
busy() { awk '/^cpu /{print $2+$3+$4+$7+$8}' /proc/stat; }
# load CONTENDER RW BS DEPTH SECS
load() {
  case "$1" in
    vcp-iscsi) taskset 1 /bench/vcp bench blk --json --socket /tmp/a.sock --rw $2 --bs $3 --qd $4 --secs $5 >/tmp/out ;;
    "vcp-iscsi poll=0") taskset 1 /bench/vcp bench blk --json --socket /tmp/b.sock --rw $2 --bs $3 --qd $4 --secs $5 >/tmp/out ;;
    *) taskset 1 fio --name=load --filename=/dev/sda --direct=1 --ioengine=libaio --rw=$2 --bs=$3 --iodepth=$4 --runtime=$5 \
         --time_based --norandommap --output-format=json --output=/tmp/out >/dev/null ;;
  esac
}
# measure CONTENDER RW BS DEPTH SECS: CPU time from the middle of the load, for fio takes seconds to start in here
measure() {
  load "$1" $2 $3 $4 $(($5 + 5)) &
  pid=$!
  sleep 4
  b=$(busy); c=$(clock)
  sleep $5
  b=$(($(busy) - b)); c=$(($(clock) - c))
  wait $pid
  echo "BENCH $1|$2 $3 $4|$b/$c|$(tr -d '\n' </tmp/out)"
}
for who in vcp-iscsi "vcp-iscsi poll=0" kernel; do load "$who" write 128k 8 2; done
"#;

/// Measures and reports.
///
/// # Errors
/// A program is missing, or the job in the helper VM failed.
pub(crate) fn run(bin: &Path, rounds: u32, secs: u32) -> Result<()> {
    let mut job = JOB.to_owned();
    for _ in 0..rounds {
        for (rw, bs, depth) in CASES {
            for who in [OURS[0], OURS[1], KERNEL] {
                job.push_str(&format!("measure '{who}' {rw} {bs} {depth} {secs}\n"));
            }
        }
    }
    let runs = u64::from(rounds) * CASES.len() as u64 * 3;
    let vm = HelperVm::new().cpus(CPUS).kernel_argument("idle=poll");
    let mut vm = vm.deadline(Duration::from_secs(300 + runs * u64::from(secs + 12)));
    for program in ["iscsi-target", "vcp-iscsi", "vcp"] {
        // Not where they lie: /tmp is empty in there.
        vm = vm.program_at(&bin.join(program), &format!("/bench/{program}"))?;
    }
    vm = vm.program("/usr/sbin/iscsistart")?.program("/usr/bin/fio")?;
    let done = vm.module("iscsi_tcp").module("sd_mod").run(&job)?;
    if done.status != 0 {
        let tail: Vec<&str> = done.output.lines().rev().take(15).collect();
        bail!(
            "the job ended with {}: {}",
            done.status,
            tail.into_iter().rev().collect::<Vec<_>>().join("\n")
        );
    }
    let mut rows: Vec<Row> = Vec::new();
    for line in done.output.lines().filter_map(|line| line.trim_end().strip_prefix("BENCH ")) {
        let figures = figures(line).with_context(|| format!("not as expected: {line}"))?;
        let (contender, case) = line
            .split_once('|')
            .and_then(|(who, rest)| Some((who, rest.split_once('|')?.0)))
            .unwrap_or_default();
        let known = rows.iter_mut().find(|row| row.case == case && row.contender == contender);
        let row = match known {
            Some(row) => row,
            None => {
                let rounds = vec![Vec::new(); METRICS.len()];
                rows.push(Row {
                    case: case.into(),
                    contender: contender.into(),
                    rounds,
                    summary: Vec::new(),
                });
                rows.last_mut().context("just pushed")?
            }
        };
        row.rounds.iter_mut().zip(figures).for_each(|(all, figure)| all.push(figure));
    }
    if rows.len() != CASES.len() * 3 {
        bail!("{} of {} results came out of the helper VM", rows.len(), CASES.len() * 3);
    }
    let preface = vec![
        format!(
            "initiators in the emulated helper VM ({CPUS} CPUs that never halt, TCG), LUNs of one embedded target; \
             {rounds} rounds of {secs} s"
        ),
        "vcp-iscsi on CPU 1; target and load on CPU 0; the kernel's initiator where the kernel runs it"
            .into(),
        "only the ratios say anything; CPU time is that of the whole machine: target, initiator and load"
            .into(),
        "load: vcp bench blk on vcp-iscsi, fio with libaio and O_DIRECT on the kernel's disk".into(),
    ];
    Report { name: "kernel", preface, metrics: METRICS.to_vec(), rows, goals: Vec::new() }
        .finish(|_| Vec::new())
}

/// IOPS, p50 and CPU per I/O of a line of the job.
fn figures(line: &str) -> Option<[f64; 3]> {
    let mut fields = line.splitn(4, '|').skip(2);
    let (busy, elapsed) = fields.next()?.split_once('/')?;
    let cpus = busy.parse::<f64>().ok()? / elapsed.parse::<f64>().ok()?;
    let load: Value = serde_json::from_str(fields.next()?).ok()?;
    let (iops, p50) = match load.get("jobs") {
        None => (load["iops"].as_f64()?, load["latency_us"]["p50"].as_f64()?),
        Some(jobs) => {
            let kinds = [&jobs[0]["read"], &jobs[0]["write"]];
            let kind = kinds.into_iter().find(|kind| kind["total_ios"].as_u64() > Some(0))?;
            let p50_ns = kind["clat_ns"]["percentile"]["50.000000"].as_f64()?;
            (kind["iops"].as_f64()?, p50_ns / 1000.0)
        }
    };
    Some([iops, p50, cpus * SECOND_US / iops.max(1.0)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_loads_are_understood() {
        let ours = r#"vcp-iscsi|randread 4k 1|50/200|{"iops":500.0,"latency_us":{"p50":12.5}}"#;
        assert_eq!(figures(ours), Some([500.0, 12.5, 500.0]));
        let fio = r#"kernel iscsi_tcp|write 128k 8|20/200|{"jobs":[{"read":{"total_ios":0},"write":{"total_ios":100,"iops":50.0,"clat_ns":{"percentile":{"50.000000":9000}}}}]}"#;
        assert_eq!(figures(fio), Some([50.0, 9.0, 2000.0]));
        assert_eq!(figures("vcp-iscsi|x|1/2|{}"), None);
    }
}
