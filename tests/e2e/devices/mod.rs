//! Devices that come and go under a stock Debian guest in the helper VM: PCI hot-plug and hot-unplug, balloon, snapshot and
//! restore, power button.

use anyhow::ensure;
use guest_images::linux::Initramfs;
use guest_images::modules::Kernel;
use vcp_tests::guest::Outcome;
use vcp_tests::{Result, tool};

use crate::support::helper_vm;

const GUEST_JOB: &str = include_str!("guest.sh");
const HELPER_JOB: &str = include_str!("helper.sh");

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
