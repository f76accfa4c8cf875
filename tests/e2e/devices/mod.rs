//! Devices that come and go under a stock Debian guest in the helper VM: PCI hot-plug and hot-unplug, balloon, snapshot and
//! restore, power button.

mod nets;
mod shapes;
mod wide;

use std::time::Duration;

use anyhow::ensure;
use guest_images::bare;
use guest_images::linux::Initramfs;
use guest_images::modules::Kernel;
use vcp_tests::guest::Outcome;
use vcp_tests::proc::Stream;
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, tool};

use crate::monitor::ring3;
use crate::support::{COMMAND, helper_vm, vcp};

/// How long the bare-metal guest may take to start or to end.
const BARE: Duration = Duration::from_secs(60);

const GUEST_JOB: &str = concat!(include_str!("guest_common.sh"), include_str!("guest.sh"));
const HELPER_JOB: &str = concat!(include_str!("helper_common.sh"), include_str!("helper.sh"));

#[test]
fn disks_come_and_go_and_the_guest_moves_to_another_monitor() -> Result<()> {
    if !tool::have(&["qemu-system-x86_64"]) {
        return Ok(());
    }
    let initrd = ["button", "evdev", "virtio_balloon"]
        .into_iter()
        .fold(Initramfs::new(), Initramfs::module)
        .job(GUEST_JOB)?
        .build(&Kernel::find()?)?;
    let helper = helper_vm(&["vcp", "vcp-iscsi", "iscsi-target"])?.program_at(&initrd, "/guest/hot")?;
    let ended = helper.run(HELPER_JOB)?;
    let done = Outcome { status: ended.status, console: ended.output };

    ensure!(done.status == 0, "the helper VM's job failed:\n{}", done.console);
    assert_eq!(done.value("SLOTS")?, "31", "slots that the guest can hot-plug");
    assert_eq!(done.number("VECTORS")?, 1, "a vector for the queue of the one CPU");
    assert_eq!(done.value("CLOCK")?, "kvm-clock");
    assert_eq!(done.value("ADDED")?, "disk1");
    assert_eq!(done.number("HOT_VECTORS")?, 2, "the added disk has a vector of its own");
    assert_eq!(done.number("VCPS")?, 1, "the removed disk's VCP is gone");
    for check in ["BOOT_DISK", "HOT_DISK", "REMOVED", "AGAIN_DISK", "FIRST", "SECOND"] {
        assert_eq!(done.number(check)?, 0, "{check}:\n{}", done.console);
    }
    for check in ["BUTTON", "KEPT", "LAST_DISK", "ERRORS"] {
        assert_eq!(done.number(check)?, 0, "{check}, after the restore:\n{}", done.console);
    }
    Ok(())
}

/// The bare-metal guest on this host's KVM, saved in the middle of a load that checks each read, twice; then another monitor
/// goes on with the second snapshot under a VCP of its own, and every block must be what the guest knows it to be.
#[test]
fn a_loaded_guest_goes_on_from_its_snapshot_under_another_vcp() -> Result<()> {
    goes_on_under_another_vcp("")
}

/// The same, with rings whose position is nowhere in guest memory.
#[test]
fn a_loaded_guest_with_packed_rings_goes_on_from_its_snapshot_under_another_vcp() -> Result<()> {
    goes_on_under_another_vcp(",packed=on")
}

fn goes_on_under_another_vcp(options: &str) -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let dir = tempfile::tempdir()?;
    let (api, snapshot) = (dir.path().join("api"), dir.path().join("snapshot"));
    let disk = format!("url={}{options}", target.url(0));
    let first = vcp(["run", "--cmdline", "job=churn region=8M qd=16 secs=6", "--disk", &disk])?
        .arg("--kernel")
        .arg(bare::build()?)
        .arg("--api-socket")
        .arg(&api)
        .keep_stdin()
        .spawn()?;
    first.wait_line(Stream::Out, "blocks of 4096 bytes written", BARE)?;
    let ctl = |words: &[&str]| vcp(["ctl", "-S"])?.arg(&api).args(words).output(COMMAND);
    let path = snapshot.display().to_string();
    for _ in 0..2 {
        ctl(&["pause"])?;
        ctl(&["snapshot", &path])?;
        ctl(&["resume"])?;
    }
    // What the guest does after its snapshot would make the disk another one than it knows.
    ctl(&["pause"])?;
    ctl(&["snapshot", &path])?;
    ctl(&["kill"])?;
    first.wait(COMMAND)?;

    let damaged = dir.path().join("damaged");
    let mut bytes = std::fs::read(&snapshot)?;
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    std::fs::write(&damaged, bytes)?;
    let refused = vcp(["run", "--disk", &disk, "--restore"])?.arg(&damaged).run(COMMAND)?;
    ensure!(refused.status.code() == Some(1), "a damaged snapshot is taken: {}", refused.stdout);
    ensure!(refused.stderr.contains("its description is damaged (checksum)"), "{}", refused.stderr);

    let second = vcp(["run", "--disk", &disk, "--restore"])?.arg(&snapshot).keep_stdin().spawn()?;
    second.wait_line(Stream::Out, "churn: ok", BARE)?;
    let status = second.wait(COMMAND)?;
    ensure!(status.success(), "{status}: {}", second.tail());
    Ok(())
}
