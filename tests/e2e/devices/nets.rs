//! Network devices that come and go under a stock Debian guest in the helper VM: one queue and several, split rings and
//! packed ones, a VCP of the monitor's and a port of a switch among guests, which is killed.

use anyhow::ensure;
use guest_images::linux::Initramfs;
use guest_images::modules::Kernel;
use vcp_tests::guest::Outcome;
use vcp_tests::{Result, tool};

use crate::support::helper_vm;

const GUEST_JOB: &str = concat!(include_str!("guest_common.sh"), include_str!("nets_guest.sh"));
const HELPER_JOB: &str = concat!(include_str!("helper_common.sh"), include_str!("nets_helper.sh"));

#[test]
fn nets_come_and_go() -> Result<()> {
    if !tool::have(&["qemu-system-x86_64"]) {
        return Ok(());
    }
    let initrd = Initramfs::new().job(GUEST_JOB)?.build(&Kernel::find()?)?;
    let helper = helper_vm(&["vcp", "vcp-net"])?.program_at(&initrd, "/guest/hot")?;
    let ended = helper.run(HELPER_JOB)?;
    let done = Outcome { status: ended.status, console: ended.output };

    ensure!(done.status == 0, "the helper VM's job failed:\n{}", done.console);
    assert_eq!(done.value("ADDED")?, "net0");
    assert_eq!(done.number("QUEUES")?, 1);
    assert_eq!(done.number("VCPS")?, 0, "the removed device's VCP is gone");
    assert_eq!(
        done.value("PLACES")?,
        "2 and 0-1 0-1",
        "a device that comes later has the core that it wants"
    );
    assert_eq!(done.number("MULTI_QUEUES")?, 2);
    assert_eq!(done.number("MULTI_VECTORS")?, 2, "each queue has a vector of its own");
    assert_eq!(done.value("SUMS")?, done.value("BIG")?, "what came over the queues is not what was sent");
    assert_eq!(done.number("REFUSED")?, 1, "{}", done.console);
    ensure!(
        done.value("MAC")?.starts_with("52:54:56:"),
        "not an address of the switch: {}",
        done.value("MAC")?
    );
    assert_eq!(done.number("PACKED")?, 1, "the guest was not offered packed rings, or did not take them");
    assert_eq!(done.number("KILLED")?, 0, "a VCP that had nothing to do was killed:\n{}", done.console);
    assert_eq!(done.number("ERRORS")?, 0, "{}", done.console);
    assert_eq!(done.number("RUN")?, 0, "{}", done.console);
    Ok(())
}
