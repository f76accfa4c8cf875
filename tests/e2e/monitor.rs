//! `vcp run`: the bare-metal guest on this machine's KVM, and a stock Debian guest in the helper VM, where KVM is
//! whole. Root, disk and power-off are the guest's own.

use std::time::Duration;

use anyhow::{Context, ensure};
use guest_images::bare;
use guest_images::rootfs::{self, RootFs};
use serde_json::Value;
use vcp_tests::backend::Backend;
use vcp_tests::guest::Outcome;
use vcp_tests::proc::{Cmd, Stream};
use vcp_tests::target::{Chap, Kind, Spec, Target};
use vcp_tests::{Result, procfs, tool};

use crate::support::{COMMAND, helper_vm, vcp};

/// How long the bare-metal guest may take: a boot and four loads of a second.
const BARE: Duration = Duration::from_secs(60);

/// What `vcp check` tells.
pub(crate) fn check() -> Result<Value> {
    let out = vcp(["check", "--json"])?.run(COMMAND)?;
    serde_json::from_str(&out.stdout)
        .with_context(|| format!("vcp check --json: {}{}", out.stdout, out.stderr))
}

#[test]
fn check_tells_what_this_host_can() -> Result<()> {
    let report = check()?;
    for key in ["kvm", "linux_guest", "ring3_guest", "ring0_emulated"] {
        ensure!(report[key].is_boolean(), "no {key} in {report}");
    }
    ensure!(report["reason"].as_str().is_some_and(|r| !r.is_empty()), "no reason in {report}");
    let text = vcp(["check"])?.run(COMMAND)?;
    ensure!(text.stdout.lines().count() > 4, "{}", text.stdout);
    Ok(())
}

/// Whether a bare-metal guest runs here; says why not.
pub(crate) fn ring3() -> Result<bool> {
    let report = check()?;
    let can = report["ring3_guest"] == true;
    if !can {
        tool::note_skip(&format!("this host runs no ring-3 guest: {}", report["reason"]));
    }
    Ok(can)
}

#[test]
fn bare_metal_guest_verifies_and_loads_its_iscsi_disk() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let kernel = bare::build()?;
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let out = vcp(["run", "--cmdline", "job=all secs=1 region=8M qd=16", "--disk"])?
        .arg(format!("url={},cpu=1", target.url(0)))
        .arg("--kernel")
        .arg(&kernel)
        .run(BARE)?;
    ensure!(out.status.success(), "{}: {}{}", out.status, out.stdout, out.stderr);
    ensure!(out.stdout.contains("guest: done"), "{}", out.stdout);
    ensure!(
        out.stdout.contains("verify: ok") && out.stdout.contains("iops="),
        "no figures in:\n{}",
        out.stdout
    );
    Ok(())
}

#[test]
fn bare_metal_guest_runs_on_a_backend_that_already_runs() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let kernel = bare::build()?;
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let backend = Backend::vcp_iscsi(&target.url(0), &[])?;
    for _ in 0..2 {
        // The backend outlives its guests.
        let out = vcp(["run", "--cmdline", "job=verify region=4M", "--disk"])?
            .arg(format!("socket={}", backend.socket().display()))
            .arg("--kernel")
            .arg(&kernel)
            .run(BARE)?;
        ensure!(out.status.success(), "{}: {}{}", out.status, out.stdout, out.stderr);
    }
    ensure!(backend.proc().is_running(), "the backend ended with its guest");
    Ok(())
}

#[test]
fn failing_guest_is_exit_code_1() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    // No disk to identify.
    let out = vcp(["run", "--cmdline", "job=verify", "--kernel"])?.arg(bare::build()?).run(BARE)?;
    ensure!(out.status.code() == Some(1), "{}: {}{}", out.status, out.stdout, out.stderr);
    Ok(())
}

#[test]
fn sigterm_ends_guest_and_vcp_and_the_secret_is_in_no_process_list() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let chap = Chap::one_way();
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20).chap(chap.clone()))?;
    let url = target.url(0).replace("iscsi://", &format!("iscsi://{}%{}@", chap.user, chap.secret));
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("vm.toml");
    let kernel = bare::build()?.display().to_string();
    std::fs::write(
        &file,
        format!(
            "kernel = {kernel:?}\ncmdline = \"job=bench rw=randread secs=60 region=8M\"\n[[disk]]\nurl = {url:?}\n"
        ),
    )?;
    let proc = vcp(["run", "--log", "trace"])?.arg(&file).spawn()?;
    proc.wait_line(Stream::Out, "disk 0:", BARE)?;
    let children = procfs::children(proc.pid())?;
    ensure!(!children.is_empty(), "vcp run started no vcp-iscsi");
    for pid in children.iter().chain([&proc.pid()]) {
        let line = procfs::cmdline(*pid)?;
        ensure!(!line.contains(&chap.secret), "the secret is in the process list: {line}");
    }
    let (status, took) = proc.terminate(COMMAND)?;
    ensure!(took < Duration::from_secs(5), "took {took:?}");
    ensure!(status.code().is_some(), "killed by a signal: {status}");
    ensure!(!proc.text().contains(&chap.secret), "the secret is in the log");
    for child in children {
        ensure!(procfs::cmdline(child).map_or(true, |c| c.is_empty()), "process {child} is left behind");
    }
    Ok(())
}

/// What the Debian guest does with its root on the LUN.
const GUEST_JOB: &str = r#"
value() { name=$1; shift; echo "@$name=$*"; }
value CPUS $(nproc)
value ROOT "$(grep ' / ' /proc/mounts | grep -v rootfs)"
value RNG "$(cat /sys/class/misc/hw_random/rng_current)"
dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c | { read n; value RNG_BYTES $n; }
value WRITE_CACHE "$(cat /sys/block/vda/queue/write_cache)"
value CMDLINE "$(cat /proc/cmdline)"
fio --name=verify --directory=/root --size=8M --rw=randrw --bs=4k --ioengine=psync --numjobs=2 --fsync=64 \
    --verify=crc32c --do_verify=1 --verify_fatal=1 --group_reporting --minimal >/tmp/fio.log 2>&1
value FIO $?
tail -n 3 /tmp/fio.log | cut -c1-200
rm -f /root/verify*
dd if=/dev/urandom of=/root/data bs=64k count=64 2>/dev/null
sync; echo 3 >/proc/sys/vm/drop_caches
sha256sum /root/data >/root/sum && (cd / && sha256sum -c /root/sum)
value SUM $?
echo "written by the guest" >/root/marker
value ERRORS $(dmesg | grep -ciE 'i/o error|ext4-fs error|vda.*error')
"#;

/// What the helper VM does: target, monitor, guest.
const HELPER_JOB: &str = r#"
value() { name=$1; shift; echo "@$name=$*"; }
mkfifo /tmp/ready
iscsi-target serve --listen 127.0.0.1:3260 --target iqn.2026-01.test.vcp:root --lun file:/dev/vda >/tmp/ready 2>/tmp/target.log &
target=$!
exec 3</tmp/ready
read line <&3 || { cat /tmp/target.log; exit 1; }
echo "$line"
vcp check --json >/tmp/check.json; value LINUX_GUEST $(grep -o '"linux_guest":[ ]*[a-z]*' /tmp/check.json)
timeout 240 vcp run --vcpu-cpus 0-1 --kernel /guest/vmlinuz --initrd /guest/initrd --cmdline 'console=ttyS0 quiet root=/dev/vda rw' \
    --memory 512M --cpus 2 --disk url=iscsi://127.0.0.1:3260/iqn.2026-01.test.vcp:root/0 </dev/null >/tmp/guest.log 2>/tmp/vcp.log
status=$?
value RUN $status
cat /tmp/guest.log; cat /tmp/vcp.log
again_if_kvm_failed $status /tmp/guest.log /tmp/vcp.log
# Nothing of the monitor's is left.
value LEFT $(ps | grep -c '[v]cp-iscsi')
kill $target; wait $target
value TARGET $?
sync
"#;

#[test]
fn debian_guest_with_its_root_on_iscsi_under_our_monitor() -> Result<()> {
    if !tool::have(&["qemu-system-x86_64", "mke2fs", "e2fsck", "debugfs", "fio"]) {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("root.ext4");
    RootFs::new().size_bytes(192 << 20).fio()?.job(GUEST_JOB)?.build_to(&image)?;
    let ended = helper_vm(&["vcp", "vcp-iscsi", "iscsi-target"])?.disk(&image).run(HELPER_JOB)?;
    let done = Outcome { status: ended.status, console: ended.output };

    ensure!(done.status == 0, "the helper VM's job failed:\n{}", done.console);
    ensure!(
        done.value("LINUX_GUEST")?.ends_with("true"),
        "vcp check says that no Linux guest runs in the helper VM"
    );
    ensure!(done.number("RUN")? == 0, "vcp run failed:\n{}", done.console);
    assert_eq!(done.number("CPUS")?, 2, "{}", done.console);
    let root = done.value("ROOT")?;
    ensure!(root.starts_with("/dev/vda / ext4 rw"), "root is {root}");
    ensure!(done.value("RNG")?.contains("virtio"), "hardware random numbers from {:?}", done.value("RNG")?);
    assert_eq!(done.number("RNG_BYTES")?, 64);
    assert_eq!(done.value("WRITE_CACHE")?, "write back");
    ensure!(done.number("FIO")? == 0, "fio --verify failed:\n{}", done.console);
    assert_eq!(done.number("SUM")?, 0, "{}", done.console);
    assert_eq!(done.number("ERRORS")?, 0, "{}", done.console);
    ensure!(done.console.contains("VCP-ROOT-CLEAN"), "no clean power-off:\n{}", done.console);
    assert_eq!(done.number("LEFT")?, 0, "vcp-iscsi outlived vcp run");
    assert_eq!(done.number("TARGET")?, 0, "the target's exit status after SIGTERM");

    rootfs::check(&image).context("e2fsck of the LUN's image")?;
    let marker = Cmd::new("debugfs").args(["-R", "cat /root/marker"]).arg(&image).output(COMMAND)?;
    assert_eq!(marker, "written by the guest\n", "what the guest wrote is not on the LUN");
    Ok(())
}
