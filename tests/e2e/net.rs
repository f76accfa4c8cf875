//! `vcp run --net socket=PATH` against DPDK's vhost library, which we did not write: testpmd answers ARP and echo
//! requests of a stock Debian guest; and `--net user`. All of it in the helper VM, where KVM is whole.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use guest_images::linux::{self, Initramfs};
use guest_images::modules::Kernel;
use vcp_tests::guest::Outcome;
use vcp_tests::{Result, tool};

use crate::support::helper_vm;

/// What the guest does. The second half comes after a reset of the device in the middle of its life.
const GUEST_JOB: &str = r#"
value() { name=$1; shift; echo "@$name=$*"; }
value MAC $(cat /sys/class/net/eth0/address)
start() { ip link set eth0 up; ip addr add 10.1.2.3/24 dev eth0; }
replies() { ping -q -c $3 -i 0.1 -s $2 $1 | grep -o '[0-9]* packets received' | cut -d' ' -f1; }
start
value FIRST $(replies 10.1.2.1 56 1)
value SMALL $(replies 10.1.2.1 56 30)
value LARGE $(replies 10.1.2.1 1400 30)
value NEIGHBOUR $(arp -n 10.1.2.1 | grep -o '56:48:4f:53:54:..')
device=$(basename $(readlink /sys/class/net/eth0/device))
echo $device >/sys/bus/virtio/drivers/virtio_net/unbind; [ -e /sys/class/net/eth0 ]; value GONE $?
echo $device >/sys/bus/virtio/drivers/virtio_net/bind
start
value AGAIN $(replies 10.1.2.9 56 10)
value ERRORS $(cat /sys/class/net/eth0/statistics/rx_errors)
"#;

/// What the helper VM does. testpmd takes its commands from a pipe: it ends at the end of its input.
const HELPER_JOB: &str = r#"
value() { name=$1; shift; echo "@$name=$*"; }
mkdir -p /var/run
mkfifo /tmp/commands
dpdk-testpmd --lcores '0@0,1@1' --no-huge -m 128 --no-shconf --no-pci --no-telemetry \
    -d /pmds/librte_net_vhost.so -d /pmds/librte_mempool_ring.so --vdev net_vhost0,iface=/tmp/net.sock,queues=1 \
    -- --forward-mode=icmpecho --auto-start --total-num-mbufs=2048 --disable-link-check \
    </tmp/commands >/tmp/testpmd.log 2>&1 &
testpmd=$!
exec 3>/tmp/commands
left=300
until grep -q '00010000 .*/tmp/net.sock' /proc/net/unix; do
    left=$((left - 1))
    [ $left -gt 0 ] && kill -0 $testpmd || { cat /tmp/testpmd.log; exit 1; }
    sleep 0.1
done
timeout 240 vcp run --vcpu-cpus 0-1 --kernel /guest/vmlinuz --initrd /guest/initrd --cmdline "console=ttyS0 quiet $(cat /guest/job)" \
    --memory 256M --net socket=/tmp/net.sock,mac=52:54:00:12:34:56 </dev/null >/tmp/guest.log 2>/tmp/vcp.log
status=$?
value RUN $status
cat /tmp/guest.log; cat /tmp/vcp.log
again_if_kvm_failed $status /tmp/guest.log /tmp/vcp.log
value STOPPED $(grep -c GET_VRING_BASE /tmp/testpmd.log)
exec 3>&-
wait $testpmd
value TESTPMD $?
cat /tmp/testpmd.log
"#;

/// A driver of DPDK: testpmd loads those that it is told to.
fn driver(name: &str) -> Option<PathBuf> {
    let dirs = std::fs::read_dir("/usr/lib/x86_64-linux-gnu/dpdk").ok()?;
    dirs.flatten().map(|dir| dir.path().join(name)).find(|path| path.is_file())
}

#[test]
fn debian_guest_pings_through_dpdk() -> Result<()> {
    if !tool::have(&["qemu-system-x86_64", "dpdk-testpmd"]) {
        return Ok(());
    }
    let mut helper = helper_vm(&["vcp"])?
        .program_at(&tool::find("dpdk-testpmd").context("dpdk-testpmd")?, "/usr/bin/dpdk-testpmd")?
        .content("/guest/job", 0o644, linux::job_arg(GUEST_JOB))?
        .memory_mib(2048);
    for name in ["librte_net_vhost.so", "librte_mempool_ring.so"] {
        let file = driver(name).with_context(|| format!("DPDK has no {name}"))?;
        helper = helper.program_at(&file, &Path::new("/pmds").join(name).display().to_string())?;
    }
    let ended = helper.run(HELPER_JOB)?;
    let done = Outcome { status: ended.status, console: ended.output };

    ensure!(done.status == 0, "the helper VM's job failed:\n{}", done.console);
    ensure!(done.number("RUN")? == 0, "vcp run failed:\n{}", done.console);
    assert_eq!(done.value("MAC")?, "52:54:00:12:34:56");
    assert_eq!(done.number("FIRST")?, 1, "{}", done.console);
    assert_eq!(done.number("SMALL")?, 30, "{}", done.console);
    assert_eq!(done.number("LARGE")?, 30, "{}", done.console);
    ensure!(done.value("NEIGHBOUR")?.starts_with("56:48:4f"), "the peer's address:\n{}", done.console);
    // The device was reset, and started again on the same connection.
    assert_eq!(done.number("GONE")?, 1, "{}", done.console);
    assert_eq!(done.number("AGAIN")?, 10, "{}", done.console);
    assert_eq!(done.number("ERRORS")?, 0, "{}", done.console);
    // Both rings were stopped twice: at the reset and at power-off.
    assert_eq!(done.number("STOPPED")?, 4, "{}", done.console);
    assert_eq!(done.number("TESTPMD")?, 0, "{}", done.console);
    Ok(())
}

const USER_GUEST_JOB: &str =
    concat!(include_str!("devices/guest_common.sh"), include_str!("net/user_guest.sh"));
const USER_HELPER_JOB: &str =
    concat!(include_str!("devices/helper_common.sh"), include_str!("net/user_helper.sh"));

/// A lease, names, echo, connections both ways: what a guest of people without rights on the host gets, under our monitor.
#[test]
fn debian_guest_on_the_user_mode_stack() -> Result<()> {
    if !tool::have(&["qemu-system-x86_64"]) {
        return Ok(());
    }
    let initrd = Initramfs::new().job(USER_GUEST_JOB)?.build(&Kernel::find()?)?;
    let helper = helper_vm(&["vcp", "vcp-net"])?.program_at(&initrd, "/guest/user")?;
    let ended = helper.run(USER_HELPER_JOB)?;
    let done = Outcome { status: ended.status, console: ended.output };

    ensure!(done.status == 0, "the helper VM's job failed:\n{}", done.console);
    assert_eq!(done.number("RUN")?, 0, "{}", done.console);
    assert_eq!(done.value("LEASE")?, "10.0.2.15 10.0.2.2 10.0.2.3", "{}", done.console);
    assert_eq!((done.number("PING")?, done.number("BIG")?), (3, 3), "{}", done.console);
    assert_eq!((done.number("NAME")?, done.number("OWN")?), (1, 1), "{}", done.console);
    assert_eq!(done.value("SUM")?, done.value("FILE")?, "the file that the guest fetched");
    assert_eq!(done.value("BACK")?, done.value("UP")?, "what the guest sent");
    for count in ["FAILED", "RX_ERRORS", "ERRORS", "KILLED"] {
        assert_eq!(done.number(count)?, 0, "{count}:\n{}", done.console);
    }
    Ok(())
}
