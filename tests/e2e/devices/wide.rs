//! As many vCPUs as there can be, on PCI with as many queues as a disk can have: all are described to the guest, and the
//! disk works. The guest's kernel starts two of them only, for 64 at once are too many for the emulation.

use anyhow::ensure;
use guest_images::linux::Initramfs;
use guest_images::modules::Kernel;
use vcp_tests::guest::Outcome;
use vcp_tests::{Result, tool};

use crate::support::helper_vm;

const GUEST_JOB: &str = "
value() { name=$1; shift; echo \"@$name=$*\"; }
value CPUS $(cat /sys/devices/system/cpu/present) $(nproc)
value QUEUES $(ls /sys/block/vda/mq | wc -l)
dd if=/dev/urandom of=/tmp/bytes bs=64k count=16 2>/dev/null
dd if=/tmp/bytes of=/dev/vda bs=64k oflag=direct 2>/dev/null
dd if=/dev/vda bs=64k count=16 iflag=direct 2>/dev/null | cmp -s - /tmp/bytes
value DISK $?
# The last CPU of all is no worse than the others.
echo 1 >/sys/devices/system/cpu/cpu63/online && taskset -p 0x8000000000000000 $$ >/dev/null
value LAST $? $(awk '{print $39}' /proc/self/stat)
dd if=/dev/vda bs=64k count=16 iflag=direct 2>/dev/null | cmp -s - /tmp/bytes
value LAST_DISK $?
";

const HELPER_JOB: &str = "
value() { name=$1; shift; echo \"@$name=$*\"; }
t=iqn.2026-01.test.vcp:wide
iscsi-target serve --listen 127.0.0.1:3260 --target $t --lun mem:16M >/tmp/target.log 2>&1 &
for i in $(seq 300); do grep -q '^ready:' /tmp/target.log && break; sleep 0.1; done
timeout 300 vcp run --kernel /guest/vmlinuz --initrd /guest/wide --cmdline 'console=ttyS0 quiet maxcpus=2' --cpus 64 \
    --memory 1G --disk url=iscsi://127.0.0.1/$t/0,queues=16 </dev/null >/tmp/console 2>/tmp/errors
status=$?
cat /tmp/console /tmp/errors
again_if_kvm_failed $status /tmp/console /tmp/errors
value RUN $status
";

#[test]
fn a_guest_has_sixty_four_vcpus() -> Result<()> {
    if !tool::have(&["qemu-system-x86_64"]) {
        return Ok(());
    }
    let initrd = Initramfs::new().job(GUEST_JOB)?.build(&Kernel::find()?)?;
    let helper = helper_vm(&["vcp", "vcp-iscsi", "iscsi-target"])?.program_at(&initrd, "/guest/wide")?;
    let ended = helper.run(HELPER_JOB)?;
    let done = Outcome { status: ended.status, console: ended.output };
    ensure!(done.status == 0 && done.number("RUN")? == 0, "{}", done.console);
    assert_eq!(done.value("CPUS")?, "0-63 2", "{}", done.console);
    assert_eq!(done.value("LAST")?, "0 63", "{}", done.console);
    ensure!(done.number("QUEUES")? >= 1, "{}", done.console);
    for check in ["DISK", "LAST_DISK"] {
        assert_eq!(done.number(check)?, 0, "{check}:\n{}", done.console);
    }
    Ok(())
}
