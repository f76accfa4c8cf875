//! `cargo xtask demo`: a guest whose disk is an iSCSI LUN behind a VCP, on whatever this machine can do.
//!
//! Where the host's KVM runs Linux, the Debian guest boots on it directly. Where it does not (KVM inside a virtual
//! machine that emulates ring 0, or no `/dev/kvm`), the bare-metal guest runs natively if ring-3 guests can, and the
//! Debian guest boots under our monitor in the helper VM, whose KVM is emulated. What was chosen is said, and why.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest_images::helper::HelperVm;
use guest_images::linux::{self, LinuxGuest};
use guest_images::rootfs::{self, RootFs};
use serde::Deserialize;

use crate::cmd;
use crate::packages::{self, Need};
use crate::server::Server;

const TARGET: &str = "iqn.2026-11.vcp:demo";
const ROOT_BYTES: u64 = 256 << 20;
const LINUX_DEADLINE: Duration = Duration::from_secs(420);

/// What the Debian guest does on its root disk. Printed lines with `demo:` are the user's proof.
const LINUX_JOB: &str = r#"set -e
echo "demo: $(uname -sr), $(nproc) CPUs, up in $(cut -d' ' -f1 /proc/uptime) s"
echo "demo: root file system $(awk '$2 == "/" && $1 ~ "^/dev" { print $1, $3, $4 }' /proc/mounts)"
d=/sys/block/vda
echo "demo: disk of $(($(cat $d/size) / 2048)) MiB, blocks of $(cat $d/queue/logical_block_size) bytes, $(cat $d/queue/write_cache), serial $(cat $d/serial)"
dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
start=$(cut -d' ' -f1 /proc/uptime)
dd if=/tmp/data of=/root/data bs=1M conv=fsync 2>/dev/null
wrote=$(cut -d' ' -f1 /proc/uptime)
echo 3 >/proc/sys/vm/drop_caches
reread=$(cut -d' ' -f1 /proc/uptime)
cmp /tmp/data /root/data || { echo "demo: READ BACK DIFFERS"; exit 1; }
done=$(cut -d' ' -f1 /proc/uptime)
echo "demo: 8 MiB written and flushed in $(echo "$wrote - $start" | bc) s, read back from the disk and equal in $(echo "$done - $reread" | bc) s"
fio --name=demo --filename=/root/fio --size=4M --bs=4k --rw=randwrite --ioengine=psync --direct=1 --fsync=32 \
    --verify=crc32c --do_verify=1 --verify_fatal=1 --minimal >/tmp/fio || { cat /tmp/fio; exit 1; }
echo "demo: fio wrote 1024 random 4 KiB blocks with a flush every 32, read and verified all of them"
"#;

/// The part of `vcp check --json` that decides.
#[derive(Debug, Deserialize)]
struct Check {
    linux_guest: bool,
    ring3_guest: bool,
    reason: String,
}

/// Installs, builds, boots, verifies, tells.
///
/// # Errors
/// Any step failed, or data read back was not what was written.
pub(crate) fn run() -> Result<()> {
    packages::ensure(Need::Demo)?;
    let bin = cmd::release_programs()?;
    let started = Instant::now();
    let text = cmd::output(Command::new(bin.join("vcp")).args(["check", "--json"]))?;
    let check: Check =
        serde_json::from_str(&text).with_context(|| format!("`vcp check` printed `{text}`"))?;
    let scratch = tempfile::tempdir().context("cannot make a scratch directory")?;

    let guest = linux::guest()?;
    let root = scratch.path().join("root.ext4");
    RootFs::new().size_bytes(ROOT_BYTES).fio()?.build_to(&root)?;
    if check.linux_guest {
        heading("A Debian guest on this machine's KVM, its root file system on an iSCSI LUN");
        linux_here(&bin, &guest, &root)?;
    } else {
        println!("This machine's KVM cannot run a Linux guest: {}.", check.reason);
        if check.ring3_guest {
            heading("A bare-metal guest on this machine's KVM at native speed, its disk an iSCSI LUN");
            bare(&bin)?;
        }
        heading(
            "A Debian guest under our monitor in a helper VM (emulated KVM), its root file system on an iSCSI LUN",
        );
        linux_in_helper(&bin, &guest, &root)?;
    }
    rootfs::check(&root).context("the LUN's file system is not clean after the guest's power-off")?;
    println!("\nThe LUN's file system is clean (e2fsck -fn).");
    println!(
        "Done in {:.0} s after the build: a guest booted from an iSCSI LUN behind a VCP, wrote, flushed,",
        started.elapsed().as_secs_f64()
    );
    println!("read back and verified. Next: docs/user-guide.md.");
    Ok(())
}

fn heading(text: &str) {
    println!("\n== {text}");
}

fn target(bin: &Path, lun: &str) -> Result<Server> {
    let args = ["serve", "--listen", "127.0.0.1:0", "--target", TARGET, "--lun", lun];
    Server::start(&bin.join("iscsi-target"), &args)
}

fn url(target: &Server) -> Result<String> {
    Ok(format!("url=iscsi://{}/{TARGET}/0", target.told("addr")?))
}

fn linux_cmdline() -> String {
    format!("console=ttyS0 quiet panic=-1 root=/dev/vda {}", linux::job_arg(LINUX_JOB))
}

fn linux_here(bin: &Path, guest: &LinuxGuest, root: &Path) -> Result<()> {
    let target = target(bin, &format!("file:{}", root.display()))?;
    let mut vcp = Command::new(bin.join("vcp"));
    vcp.args(["run", "--cpus", "2", "--memory", "512M", "--kernel"]).arg(&guest.kernel);
    vcp.arg("--initrd").arg(&guest.initramfs).args(["--cmdline", &linux_cmdline(), "--disk", &url(&target)?]);
    let console = cmd::output(&mut vcp)?;
    judge(&console)
}

fn bare(bin: &Path) -> Result<()> {
    let elf = guest_images::bare::build()?;
    let target = target(bin, "mem:1G")?;
    let mut vcp = Command::new(bin.join("vcp"));
    vcp.args(["run", "--memory", "128M", "--kernel"]).arg(elf);
    vcp.args(["--cmdline", "job=all secs=2 qd=32", "--disk", &url(&target)?]);
    cmd::run(&mut vcp)
}

fn linux_in_helper(bin: &Path, guest: &LinuxGuest, root: &Path) -> Result<()> {
    let kernel = "/guest/vmlinuz";
    let initramfs = "/guest/initramfs";
    let names = ["vcp", "vcp-iscsi", "iscsi-target"];
    let mut vm = HelperVm::new().disk(root).deadline(LINUX_DEADLINE).memory_mib(2048);
    for name in names {
        vm = vm.program_at(&bin.join(name), &format!("/usr/bin/{name}"))?;
    }
    vm = vm.program_at(&guest.kernel, kernel)?.program_at(&guest.initramfs, initramfs)?;
    let script = format!(
        r#"
iscsi-target serve --listen 127.0.0.1:3260 --target {TARGET} --lun file:/dev/vda >/tmp/target &
until grep -q ^ready: /tmp/target; do kill -0 $! || exit 1; usleep 10000; done
timeout 240 vcp run --vcpu-cpus 0-1 --cpus 2 --memory 512M --kernel {kernel} --initrd {initramfs} --cmdline '{}' \
    --disk url=iscsi://127.0.0.1:3260/{TARGET}/0 >/tmp/guest 2>/tmp/vcp
status=$?
cat /tmp/guest /tmp/vcp
again_if_kvm_failed $status /tmp/guest /tmp/vcp
exit $status
"#,
        linux_cmdline()
    );
    let outcome = vm.run(&script)?;
    if outcome.status != 0 {
        bail!("the helper VM's job ended with {}:\n{}", outcome.status, outcome.output);
    }
    judge(&outcome.output)
}

/// Shows the guest's own lines and requires that it came to its end without an error.
fn judge(console: &str) -> Result<()> {
    for line in console.lines().filter_map(|line| line.trim().strip_prefix("demo: ")) {
        println!("  guest: {line}");
    }
    match linux::job_status(console) {
        // In the helper VM both guests print a status; the helper's own is the last and was looked at before.
        Some(0) if console.contains("demo: fio wrote") => Ok(()),
        status => bail!("the guest did not finish (status {status:?}); its console:\n{console}"),
    }
}
