//! Guest to guest beside vhost-net: TCP between two Debian guests under QEMU with KVM in the helper VM. Each guest has
//! cards at the ports of a `vcp-net`, and others at vhost-net, a TAP device and the kernel's bridge, all with whatever
//! offloads their back ends agree to. A boot for each round measures them in turn: nothing differs but what is between the
//! cards.
//!
//! Everything is emulated, twice: only ratios mean something. Processor time of a back end is that of `vcp-net`'s threads,
//! or of the kernel's `vhost-` threads, in whose time the bridge runs too. That of a virtual CPU has the time for which KVM
//! looks whether a halted one is to go on.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use guest_images::helper::HelperVm;
use guest_images::linux::Initramfs;
use guest_images::modules::Kernel;
use guest_images::tree::Tree;

use super::super::goals::Goal;
use super::super::report::{Metric, Report, Row};
use super::super::stats::ratio;
use super::guests::IPERF;

const METRICS: &[Metric] = &[
    Metric { title: "Mbit/s", more_is_better: true, digits: 0 },
    Metric { title: "CPU s per GB", more_is_better: false, digits: 2 },
    Metric { title: "sender's vCPU %", more_is_better: false, digits: 0 },
    Metric { title: "receiver's vCPU %", more_is_better: false, digits: 0 },
    Metric { title: "sent again", more_is_better: false, digits: 0 },
];

/// In the order of a guest's cards. As they come, and each with the other's way to wait.
const CONTENDERS: [&str; 4] = ["vcp-net", "vcp-net poll-us=0", "vhost-net", "vhost-net poll-us=100"];
/// A load, and the arguments of iperf3.
const LOADS: [(&str, &str); 2] = [("one connection", "-P 1"), ("four connections", "-P 4")];

/// How often a round is begun whose machine stands still (`docs/decisions/emulated-kvm.md`).
const STARTS: u32 = 3;

/// What QEMU loads besides itself.
const FIRMWARE: [&str; 3] =
    ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/kvmvapic.bin", "/usr/share/qemu/linuxboot_dma.bin"];

/// Both guests: `vcp.me=1` measures, 2 serves. Card n has the address 10.n.0.ME.
const GUEST: &str = r#"
me=$(sed 's/.*vcp.me=\([12]\).*/\1/' /proc/cmdline)
for dir in /sys/class/net/*; do
    case $(cat $dir/address) in
    52:54:00:00:0*) n=$(cut -c14 $dir/address) ;;
    *) continue ;;
    esac
    echo "@FEATURES $n $(cat $dir/device/features)"
    ip link set ${dir##*/} up
    ip addr add 10.$n.0.$me/24 dev ${dir##*/}
done
if [ $me = 2 ]; then echo @UP; exec iperf3 -s >/dev/null; fi
# measure CARD LOAD ARGS
measure() {
    card=$1; load=$2; shift 2; left=20; echo "@START $card"
    # A server that has just ended one run says that it is busy, and one that is not up yet refuses.
    until iperf3 -c 10.$card.0.2 -f m "$@" >/tmp/out 2>&1; do
        left=$((left - 1)); [ $left -gt 0 ] || { cat /tmp/out; exit 1; }
        sleep 0.5; echo "@START $card"
    done
    rate=$(grep receiver /tmp/out | grep -v SUM | awk '{ for (i = 1; i <= NF; i++) if ($i ~ /bits.sec/) sum += $(i - 1) } END { printf "%.1f", sum }')
    again=$(grep sender /tmp/out | grep -v SUM | awk '{ sum += $(NF - 1) } END { print sum + 0 }')
    echo "@DONE $card $load $rate $again"
}
"#;

/// Prints `FEATURES card bits`, and for each run `PAIR card|load|Mbit/s|sent again|` with nanoseconds of the back end, the
/// sender's and the receiver's virtual CPU, and of time.
const JOB: &str = r#"
set -e
# switch NAME ARGS: a vcp-net whose process goes to $net
switch() {
  name=$1; shift
  /bench/vcp-net serve --control /tmp/control$name --port socket=/tmp/$name.1 --port socket=/tmp/$name.2 "$@" >/tmp/net$name 2>&1 &
  net=$!
  for i in $(seq 300); do if grep -q '^ready:' /tmp/net$name; then return; fi; sleep 0.1; done
  cat /tmp/net$name; exit 1
}
switch 0; net0=$net
switch 1 --poll-us 0; net1=$net
for n in 2 3; do brctl addbr br$n; ip link set br$n up; done
# One CPU, and cards of which 0 and 1 are at a vcp-net, 2 and 3 at vhost-net.
guest() {
  exec qemu-system-x86_64 -name guest$1,debug-threads=on -accel kvm -cpu host -M q35,memory-backend=mem -smp 1 -m 256 \
    -nodefaults -display none -no-reboot -serial stdio -kernel /bench/vmlinuz -initrd /bench/initrd \
    -append "console=ttyS0 quiet panic=-1 vcp.me=$1" \
    -object memory-backend-memfd,id=mem,size=256M,share=on \
    -chardev socket,id=c0,path=/tmp/0.$1 -netdev vhost-user,id=n0,chardev=c0 \
    -chardev socket,id=c1,path=/tmp/1.$1 -netdev vhost-user,id=n1,chardev=c1 \
    -netdev tap,id=n2,ifname=tap2.$1,script=/bench/join,downscript=no,vhost=on \
    -netdev tap,id=n3,ifname=tap3.$1,script=/bench/join,downscript=no,vhost=on,poll-us=100 \
    $(for n in 0 1 2 3; do echo "-device virtio-net-pci,netdev=n$n,mac=52:54:00:00:0$n:0$1,romfile="; done)
}
again() { echo "$1"; tail -c 600 /tmp/console2; cat /tmp/errors1 /tmp/errors2 /tmp/net0 /tmp/net1; exit 75; }
mkfifo /tmp/console1
guest 2 </dev/null >/tmp/console2 2>/tmp/errors2 & two=$!
guest 1 </dev/null >/tmp/console1 2>/tmp/errors1 & one=$!
exec 3</tmp/console1
# A CPU of the helper VM for each of the virtual ones.
pin() {
  for task in /proc/$2/task/*; do
    if grep -q KVM $task/comm; then taskset -p $1 ${task##*/} >/dev/null; fi
  done
}
# The threads with this name among these, and the nanoseconds that they ran.
ran() {
  for comm in $(grep -l "$@" 2>/dev/null); do cat ${comm%comm}schedstat; done | awk '{ sum += $1 } END { printf "%.0f ", sum }'
}
look() {
  case $1 in
  0) ran . /proc/$net0/task/*/comm ;;
  1) ran . /proc/$net1/task/*/comm ;;
  *) ran '^vhost-' /proc/[0-9]*/task/*/comm ;;
  esac
  ran KVM /proc/$one/task/*/comm
  ran KVM /proc/$two/task/*/comm
  awk '{ printf "%.0f ", $1 * 1e9 }' /proc/uptime
}
while :; do
  read -t 60 -r line <&3 || again 'the guest that measures has ended, or stands still'
  line=$(echo "$line" | tr -d '\r')
  set -- $line
  case "$line" in
  @FEATURES*) pin 1 $one; pin 2 $two; echo "FEATURES $2 $3" ;;
  @START*) before=$(look $2) ;;
  @DONE*)
    echo "PAIR $2|$3|$4|$5|$(echo $before $(look $2) | awk '{ printf "%.0f|%.0f|%.0f|%.0f", $5 - $1, $6 - $2, $7 - $3, $8 - $4 }')"
    ;;
  VCP-JOB-EXIT=0) break ;;
  VCP-JOB-EXIT=*) echo "the guest's job failed: $line"; exit 1 ;;
  *) if [ -n "$line" ]; then echo "guest: $line"; fi ;;
  esac
done
kill -9 $two
"#;

/// What QEMU runs for a TAP device that it has made: `tap2.1` goes to `br2`.
const JOIN: &str = "#!/bin/busybox sh\nn=${1%.*}; brctl addif br${n#tap} $1 && ip link set $1 up\n";

/// Measures and reports.
///
/// # Errors
/// A program is missing, or the job in the helper VM failed.
pub(super) fn run(bin: &Path, rounds: u32, secs: u32) -> Result<()> {
    let mut output = String::new();
    for round in 0..rounds {
        output.push_str(&one(bin, round, secs)?);
        eprintln!("measured: round {}", round + 1);
    }
    let mut rows: Vec<Row> = Vec::new();
    for (load, _) in LOADS {
        rows.extend(CONTENDERS.map(|who| Row {
            case: load.into(),
            contender: who.into(),
            rounds: vec![Vec::new(); METRICS.len()],
            summary: Vec::new(),
        }));
    }
    for line in output.lines().filter_map(|line| line.trim_end().strip_prefix("PAIR ")) {
        let (at, figures) = pair(line, secs).with_context(|| format!("not as expected: {line}"))?;
        let row = rows.get_mut(at).context("an unknown load")?;
        row.rounds.iter_mut().zip(figures).for_each(|(all, figure)| all.push(figure));
    }
    let complete = |row: &Row| row.rounds.iter().all(|all| all.len() == rounds as usize);
    ensure!(rows.iter().all(complete), "not every run came out of the helper VM:\n{output}");
    let mut preface = vec![
        format!(
            "TCP between two guests under QEMU with KVM in the emulated helper VM (iperf3); {rounds} boots, in each {secs} s a run"
        ),
        "1 vCPU each, MTU 1500; CPU: vcp-net's threads, the kernel's vhost threads; each as it waits by default, and the other \
         way (vcp-net without looking on before it sleeps, vhost-net with)"
            .into(),
    ];
    for (card, who) in CONTENDERS.iter().enumerate() {
        preface.push(format!("{who}: features {}", features(&output, card)?));
    }
    Report { name: "net-pairs", preface, metrics: METRICS.to_vec(), rows, goals: Vec::new() }.finish(judge)
}

/// A round, which is thrown away whole and begun again where the helper VM stands still in it.
fn one(bin: &Path, round: u32, secs: u32) -> Result<String> {
    for start in 1.. {
        match helper_vm(bin, round, secs)?.run(JOB) {
            Ok(done) if done.status == 0 => return Ok(done.output),
            Ok(done) => bail!("the job ended with {}: {}", done.status, done.output),
            Err(late @ guest_images::Error::Deadline { .. }) if start < STARTS => {
                eprintln!("round {} is begun again: {late}", round + 1);
            }
            Err(error) => return Err(error.into()),
        }
    }
    unreachable!("the last start returns")
}

/// The machine, with the guests' load in the order of this round.
fn helper_vm(bin: &Path, round: u32, secs: u32) -> Result<HelperVm> {
    let kernel = Kernel::find()?;
    let mut tree = Tree::new();
    tree.program("usr/bin/iperf3", Path::new(IPERF))?;
    let mut guest = GUEST.to_owned();
    let mut runs = 0;
    for (load, (_, args)) in LOADS.iter().enumerate() {
        for at in 0..CONTENDERS.len() {
            // Every other round the other way round: nobody is always first.
            let card = if round.is_multiple_of(2) { at } else { CONTENDERS.len() - 1 - at };
            guest.push_str(&format!("measure {card} {load} -t {secs} {args}\n"));
            runs += 1;
        }
    }
    let initrd = Initramfs::new().tree(&tree).job(&guest)?.build(&kernel)?;
    let mut vm = HelperVm::new()
        // One for each vCPU, one for each of two vhost threads, and one for all others.
        .cpus(5)
        .deadline(Duration::from_secs(120 + runs * u64::from(secs + 5)))
        .module("bridge")
        .module("vhost_net")
        .program_at(&kernel.image, "/bench/vmlinuz")?
        .program_at(&initrd, "/bench/initrd")?
        .program_at(&bin.join("vcp-net"), "/bench/vcp-net")?
        .program("/usr/bin/qemu-system-x86_64")?
        .content("/bench/join", 0o755, JOIN)?;
    for file in FIRMWARE {
        vm = vm.program(file)?;
    }
    Ok(vm)
}

/// Which row a line of the job belongs to, and its figures.
fn pair(line: &str, secs: u32) -> Option<(usize, [f64; METRICS.len()])> {
    let mut fields = line.split('|');
    let (card, load) = (fields.next()?.parse::<usize>().ok()?, fields.next()?.parse::<usize>().ok()?);
    let mut number = || fields.next()?.trim().parse::<f64>().ok();
    let (rate, again) = (number()?, number()?);
    let (back_end, sender, receiver, time) = (number()?, number()?, number()?, number()?);
    let gigabytes = rate * f64::from(secs) / 8000.0;
    let of_time = |spent: f64| 100.0 * spent / time;
    let figures = [rate, back_end / 1e9 / gigabytes, of_time(sender), of_time(receiver), again];
    (card < CONTENDERS.len() && rate > 0.0 && time > 0.0).then_some((load * CONTENDERS.len() + card, figures))
}

/// The features of virtio that a card's driver and back end agreed to, by their bits.
fn features(output: &str, card: usize) -> Result<String> {
    let found = output.lines().find_map(|line| line.trim_end().strip_prefix(&format!("FEATURES {card} ")));
    let bits = found.with_context(|| format!("no features of card {card}:\n{output}"))?;
    let set = bits.chars().enumerate().filter(|(_, bit)| *bit == '1');
    Ok(set.map(|(at, _)| at.to_string()).collect::<Vec<_>>().join(" "))
}

fn judge(rows: &[Row]) -> Vec<Goal> {
    let of = |case: &str, contender: &str| {
        let row = rows.iter().find(|row| row.case == case && row.contender == contender)?;
        row.summary.first().map(|summary| summary.median)
    };
    let mut goals = Vec::new();
    for (case, _) in LOADS {
        for peer in &CONTENDERS[2..] {
            let (Some(ours), Some(theirs)) = (of(case, CONTENDERS[0]), of(case, peer)) else { continue };
            let what = format!("guest to guest, {case}: rate, of {peer}'s");
            goals.push(Goal { what, measured: ratio(ours, theirs), bound: 1.0, at_least: true });
        }
    }
    goals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_job_are_understood() {
        // 800 Mbit/s for 5 s are half a gigabyte.
        let line = "1|1|800.0|3|2000000000|4000000000|1000000000|5000000000";
        assert_eq!(pair(line, 5), Some((5, [800.0, 4.0, 80.0, 20.0, 3.0])));
        assert_eq!(pair("4|0|800.0|3|1|1|1|5000000000", 5), None);
        assert_eq!(pair("0|0|0.0|0|1|1|1|5000000000", 5), None);
        assert_eq!(pair("0|0||0|1|1|1|1", 5), None);
        assert_eq!(pair("0|0|800.0|3|2000000000", 5), None);
        assert_eq!(features("x\nFEATURES 1 1100000100\r\n", 1).unwrap(), "0 1 7");
        assert!(features("FEATURES 1 11", 0).is_err());
    }
}
