//! `bench vmm`: `vcp run` beside QEMU's microvm and q35, all with KVM in the helper VM: the same kernel, guest and disk (one
//! `vcp-iscsi` as vhost-user-blk). Time from start to the guest's init, memory of the monitor without the guest's, and exits
//! to the monitor per request; natively the exits of the bare-metal guest.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use guest_images::bare;
use guest_images::helper::HelperVm;
use guest_images::linux::Initramfs;
use guest_images::modules::Kernel;
use guest_images::tree::Tree;

use super::goals::Goal;
use super::report::{Metric, Report, Row};
use super::stats::{Summary, ratio};
use crate::server::Server;

const METRICS: &[Metric] = &[
    Metric { title: "start to init s", more_is_better: false, digits: 2 },
    Metric { title: "own memory MiB", more_is_better: false, digits: 1 },
];

const OURS: &str = "vcp run";
const CONTENDERS: [&str; 3] = [OURS, "qemu microvm", "qemu q35"];
const CASE: &str = "boot, 1 vCPU, 256 MiB";

/// The guest's first program: says that it is there, and waits to be killed.
const INIT: &str = "#!/bin/busybox sh\necho VCP-INIT\n/bin/busybox sleep 1000\n";

/// What the guest does for exits per request; with `vcp.rest` on the command line it only waits as long.
const LOAD: &str = "
case \"$(cat /proc/cmdline)\" in
*vcp.rest*) sleep 6 ;;
*) fio --name=load --filename=/dev/vda --direct=1 --ioengine=libaio --rw=randread --bs=4k --iodepth=32 --runtime=5 \
     --time_based --norandommap --minimal >/tmp/out; echo \"@READS=$(($(cut -d';' -f6 /tmp/out) / 4))\" ;;
esac
";

/// Prints `BOOT contender|start|end|KiB` for each boot, and `EXITS kind|exits|reads`.
const JOB: &str = r#"
set -e
ip link set lo up
T=iqn.2026-11.vcp:bench
/bench/iscsi-target serve --listen 127.0.0.1:3260 --target $T --lun mem:64M >/tmp/target 2>&1 &
ready() { for i in $(seq 300); do grep -q '^ready:' $1 && return; sleep 0.1; done; cat $1; exit 1; }
ready /tmp/target
/bench/vcp-iscsi serve --socket-path /tmp/a.sock iscsi://127.0.0.1:3260/$T/0 >/tmp/a 2>&1 &
ready /tmp/a
mkfifo /tmp/console
now() { cut -d' ' -f1 /proc/uptime; }
# Resident memory without mappings of memfds, which are the guest's.
own() { awk '/^[0-9a-f]+-[0-9a-f]+ /{guest = /memfd:/} /^Rss:/{if (!guest) sum += $2} END{print sum}' /proc/$1/smaps; }
boot() {
  who=$1; shift
  start=$(now)
  "$@" </dev/null >/tmp/console 2>/tmp/errors &
  pid=$!
  end=
  while read -r line; do
    case "$line" in *VCP-INIT*) end=$(now); break ;; esac
  done </tmp/console
  [ -n "$end" ] || { cat /tmp/errors; exit 1; }
  echo "BOOT $who|$start|$end|$(own $pid)"
  kill -9 $pid
  wait $pid || true
}
ARGS='console=ttyS0 quiet rdinit=/bench panic=-1'
QEMU="qemu-system-x86_64 -accel kvm -cpu host -smp 1 -m 256 -nodefaults -display none -no-reboot -serial stdio -kernel /bench/vmlinuz -initrd /bench/initrd -object memory-backend-memfd,id=mem,size=256M,share=on -chardev socket,id=c,path=/tmp/a.sock"
ours() { boot 'vcp run' /bench/vcp run --kernel /bench/vmlinuz --initrd /bench/initrd --cmdline "$ARGS" --memory 256M --cpus 1 --disk socket=/tmp/a.sock; }
microvm() { boot 'qemu microvm' $QEMU -M microvm,memory-backend=mem,acpi=on -device vhost-user-blk,chardev=c -append "$ARGS"; }
q35() { boot 'qemu q35' $QEMU -M q35,memory-backend=mem -device vhost-user-blk-pci,chardev=c -append "$ARGS"; }
exits() {
  /bench/vcp run --log info --kernel /bench/vmlinuz --initrd /bench/load --cmdline "console=ttyS0 quiet $2" --memory 512M --cpus 1 \
    --disk socket=/tmp/a.sock </dev/null >/tmp/console.log 2>/tmp/errors || { cat /tmp/console.log /tmp/errors; exit 1; }
  total=$(sed -n 's/.*exits to the monitor.* total=\([0-9]*\).*/\1/p' /tmp/errors)
  reads=$(tr -d '\r' </tmp/console.log | sed -n 's/^@READS=//p')
  echo "EXITS $1|$total|${reads:-0}"
}
"#;

/// Measures and reports.
///
/// # Errors
/// A program is missing, a guest did not boot, or the job in the helper VM failed.
pub(crate) fn run(bin: &Path, rounds: u32) -> Result<()> {
    let mut job = JOB.to_owned();
    for _ in 0..rounds {
        job.push_str("ours\nmicrovm\nq35\n");
    }
    job.push_str("exits rest vcp.rest\nexits load ''\n");
    let output = in_the_helper_vm(bin, &job, rounds)?;
    let mut rows: Vec<Row> = CONTENDERS
        .iter()
        .map(|who| Row {
            case: CASE.into(),
            contender: (*who).into(),
            rounds: vec![Vec::new(); METRICS.len()],
            summary: Vec::new(),
        })
        .collect();
    for line in output.lines().filter_map(|line| line.trim_end().strip_prefix("BOOT ")) {
        let (who, figures) = boot(line).with_context(|| format!("not as expected: {line}"))?;
        let row = rows.iter_mut().find(|row| row.contender == who).context("an unknown contender")?;
        row.rounds.iter_mut().zip(figures).for_each(|(all, figure)| all.push(figure));
    }
    if rows.iter().any(|row| row.rounds.iter().any(|all| all.len() != rounds as usize)) {
        bail!("not every boot came out of the helper VM:\n{output}");
    }
    let linux = exits_per_read(&output).with_context(|| format!("no exits in:\n{output}"))?;
    let native = native(bin)?;
    let mut preface = vec![
        format!(
            "monitors in the emulated helper VM, the same Debian kernel, initramfs and vhost-user-blk disk; {rounds} rounds"
        ),
        "own memory: resident without the guest's".into(),
        linux.say("to the monitor, Linux in the helper VM"),
    ];
    match native {
        Some(native) => {
            preface.push(native.say("to monitor or kernel, bare-metal guest, natively, two seconds more"));
        }
        None => preface.push("this host's KVM runs no bare-metal guest".into()),
    }
    Report { name: "vmm", preface, metrics: METRICS.to_vec(), rows, goals: Vec::new() }
        .finish(|rows| judge(rows, linux.figure(), native.map(PerRead::figure)))
}

fn in_the_helper_vm(bin: &Path, job: &str, rounds: u32) -> Result<String> {
    let kernel = Kernel::find()?;
    let mut tree = Tree::new();
    tree.bytes("bench", 0o755, INIT)?;
    let initrd = Initramfs::new().tree(&tree).build(&kernel)?;
    let mut tree = Tree::new();
    tree.program("usr/bin/fio", Path::new("/usr/bin/fio"))?;
    let load = Initramfs::new().tree(&tree).job(LOAD)?.build(&kernel)?;
    let mut vm = HelperVm::new()
        .deadline(Duration::from_secs(200 + u64::from(rounds) * 60))
        .program_at(&kernel.image, "/bench/vmlinuz")?
        .program_at(&initrd, "/bench/initrd")?
        .program_at(&load, "/bench/load")?
        .program("/usr/bin/qemu-system-x86_64")?;
    for dir in ["/usr/share/qemu", "/usr/share/seabios"] {
        for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read {dir}"))? {
            let path = entry?.path();
            let is_needed = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| {
                matches!(
                    name,
                    "bios-256k.bin"
                        | "bios-microvm.bin"
                        | "qboot.rom"
                        | "kvmvapic.bin"
                        | "linuxboot.bin"
                        | "linuxboot_dma.bin"
                        | "pvh.bin"
                )
            });
            if is_needed {
                vm = vm.program(&path)?;
            }
        }
    }
    for program in ["iscsi-target", "vcp-iscsi", "vcp"] {
        vm = vm.program_at(&bin.join(program), &format!("/bench/{program}"))?;
    }
    let done = vm.run(job)?;
    if done.status != 0 {
        let tail: Vec<&str> = done.output.lines().rev().take(15).collect();
        bail!(
            "the job ended with {}: {}",
            done.status,
            tail.into_iter().rev().collect::<Vec<_>>().join("\n")
        );
    }
    Ok(done.output)
}

/// Contender, seconds to init and MiB of a line of the job.
fn boot(line: &str) -> Option<(&str, [f64; 2])> {
    let mut fields = line.split('|');
    let who = fields.next()?;
    let mut number = || fields.next()?.trim().parse::<f64>().ok();
    let (start, end, kib) = (number()?, number()?, number()?);
    Some((who, [end - start, kib / 1024.0]))
}

/// Two runs whose difference is the load's.
#[derive(Clone, Copy, Debug, PartialEq)]
struct PerRead {
    resting: f64,
    loaded: f64,
    reads: f64,
}

impl PerRead {
    /// Exits per read. The runs differ by chance too: less than none is none.
    fn figure(self) -> f64 {
        (self.loaded - self.resting).max(0.0) / self.reads
    }

    fn say(self, what: &str) -> String {
        let Self { resting, loaded, reads } = self;
        format!("exits {what}: {loaded} with {reads} reads of 4 KiB at depth 32, {resting} without")
    }
}

/// Exits per read in Linux: those of a run with load less those of one that rests as long.
fn exits_per_read(output: &str) -> Option<PerRead> {
    let line = |kind: &str| {
        let line = output.lines().find_map(|line| line.trim_end().strip_prefix(&format!("EXITS {kind}|")))?;
        let (exits, reads) = line.split_once('|')?;
        Some((exits.parse::<f64>().ok()?, reads.parse::<f64>().ok()?))
    };
    let (resting, (loaded, reads)) = (line("rest")?.0, line("load")?);
    (reads > 0.0).then_some(PerRead { resting, loaded, reads })
}

/// Exits per read of the bare-metal guest on this host; none where it does not run.
fn native(bin: &Path) -> Result<Option<PerRead>> {
    let check =
        Command::new(bin.join("vcp")).args(["check", "--json"]).output().context("cannot start vcp")?;
    let report: serde_json::Value = serde_json::from_slice(&check.stdout).context("vcp check --json")?;
    if report["ring3_guest"] != true {
        return Ok(None);
    }
    const TARGET: &str = "iqn.2026-11.vcp:bench";
    let words = ["serve", "--listen", "127.0.0.1:0", "--target", TARGET, "--lun", "mem:64M"];
    let target = Server::start(&bin.join("iscsi-target"), &words)?;
    let dir = tempfile::tempdir().context("no temporary directory")?;
    let socket = dir.path().join("disk.sock").display().to_string();
    let url = format!("iscsi://{}/{TARGET}/0", target.told("addr")?);
    let words = ["serve", "--poll-us", "always", "--socket-path", &socket, &url];
    let _vcp = Server::start(&bin.join("vcp-iscsi"), &words)?;
    let run = |words: &str| -> Result<(f64, f64)> {
        let out = Command::new(bin.join("vcp"))
            .args(["run", "--log", "info", "--cmdline", words, "--kernel"])
            .arg(bare::build()?)
            .arg("--disk")
            .arg(format!("socket={socket}"))
            .stdin(std::process::Stdio::null())
            .output()
            .context("cannot start vcp")?;
        let (said, logged) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        let figures = native_figures(&said, &logged);
        figures.with_context(|| format!("the bare-metal guest ended with {}: {said}{logged}", out.status))
    };
    let (short, few) = run("job=bench rw=randread qd=32 secs=1")?;
    let (long, many) = run("job=bench rw=randread qd=32 secs=3")?;
    Ok(Some(PerRead { resting: short, loaded: long, reads: (many - few).max(1.0) }))
}

/// Exits (also for notifications, which the kernel handles) and reads of a run of the bare-metal guest.
fn native_figures(said: &str, logged: &str) -> Option<(f64, f64)> {
    let after = |text: &str, key: &str| -> Option<f64> {
        let rest = text.split_once(key)?.1;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    let exits = after(logged.lines().find(|line| line.contains("exits to the monitor"))?, "total=")?;
    let load = said.lines().find(|line| line.contains("randread"))?;
    Some((exits + after(load, "kicks=")?, after(load, "ios=")?))
}

fn judge(rows: &[Row], linux: f64, native: Option<f64>) -> Vec<Goal> {
    let median = |who: &str, metric: usize| {
        let row = rows.iter().find(|row| row.contender == who)?;
        row.summary.get(metric).map(|summary: &Summary| summary.median)
    };
    let goal =
        |what: &str, measured: f64, bound: f64| Goal { what: what.into(), measured, bound, at_least: false };
    let mut goals = Vec::new();
    for peer in &CONTENDERS[1..] {
        if let (Some(ours), Some(theirs)) = (median(OURS, 0), median(peer, 0)) {
            goals.push(goal(&format!("start to init, of {peer}'s"), ratio(ours, theirs), 0.6));
        }
    }
    if let Some(mib) = median(OURS, 1) {
        goals.push(goal("own memory of the monitor, MiB", mib, 16.0));
    }
    goals.push(goal("Linux in the helper VM: exits to the monitor per 4 KiB read at depth 32", linux, 0.05));
    if let Some(native) = native {
        goals.push(goal("bare-metal guest, natively: the same", native, 0.0));
    }
    goals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bare_metal_guests_figures_are_understood() {
        let said = "disk 0: x\nbench: rw=randread bs=4096 qd=32 secs=1.00 ios=5000 iops=5000 kicks=7\n";
        let logged = "INFO vmm: exits to the monitor vcpu=0 total=30 io_in=1\n";
        assert_eq!(native_figures(said, logged), Some((37.0, 5000.0)));
    }

    #[test]
    fn lines_of_the_job_are_understood() {
        assert_eq!(boot("vcp run|10.00|12.50|2048"), Some(("vcp run", [2.5, 2.0])));
        assert_eq!(boot("vcp run||12.50|2048"), None);
        let exits = "EXITS rest|100|0\r\nEXITS load|150|1000\r\n";
        assert_eq!(exits_per_read(exits).map(PerRead::figure), Some(0.05));
        assert_eq!(exits_per_read("EXITS rest|100|0\nEXITS load|150|0\n"), None);
    }
}
