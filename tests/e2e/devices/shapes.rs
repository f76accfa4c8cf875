//! Guests of many shapes in the helper VM: vCPUs, memory beyond the hole for devices, both transports, huge pages.

use std::time::Duration;

use anyhow::ensure;
use guest_images::linux::Initramfs;
use guest_images::modules::Kernel;
use vcp_tests::guest::Outcome;
use vcp_tests::{Result, tool};

use crate::support::helper_vm;

/// vCPUs, MiB, further options; and how many virtio devices the guest must see (entropy, and a balloon on small pages).
/// 16 vCPUs boot too, in 44 s; when the host is busy, the emulation takes longer for them than a test should.
const SHAPES: [(u32, u64, &str, u32); 5] = [
    (1, 128, "", 2),
    (2, 512, "--transport mmio", 2),
    (1, 512, "--hugepages", 1),
    (1, 8192, "", 2),
    (8, 512, "", 2),
];

const GUEST_JOB: &str = "
echo \"@SEEN=$(nproc) $(awk '/^MemTotal/{print int($2 / 1024)}' /proc/meminfo) $(ls /sys/bus/virtio/devices | wc -l)\"
";

#[test]
fn guests_of_every_size_boot() -> Result<()> {
    if !tool::have(&["qemu-system-x86_64"]) {
        return Ok(());
    }
    let initrd = Initramfs::new().job(GUEST_JOB)?.build(&Kernel::find()?)?;
    let mut job = String::from("echo 300 >/proc/sys/vm/nr_hugepages\n");
    let most = SHAPES.iter().map(|shape| shape.0).max().unwrap_or(1);
    for (n, (vcpus, mib, options, _)) in SHAPES.iter().enumerate() {
        let last = vcpus - 1;
        job.push_str(&format!(
            "timeout 240 vcp run --kernel /guest/vmlinuz --initrd /guest/shape --cmdline 'console=ttyS0 quiet' \
             --cpus {vcpus} --vcpu-cpus 0-{last} --memory {mib}M {options} </dev/null >/tmp/console 2>/tmp/errors\n\
             status=$?; cat /tmp/errors; echo \"shape {n} after $(cut -d' ' -f1 /proc/uptime) s\"; again_if_kvm_failed $status /tmp/console /tmp/errors\n\
             echo \"@SHAPE{n}=$status $(tr -d '\\r' </tmp/console | sed -n 's/^@SEEN=//p')\"\n"
        ));
    }
    // Five guests, one after the other, each of which may be slow. A CPU for every vCPU: guests crash or stand still on
    // emulated CPUs that go from one vCPU to another.
    let helper = helper_vm(&["vcp"])?.cpus(most + 1).deadline(Duration::from_secs(900));
    let ended = helper.program_at(&initrd, "/guest/shape")?.run(&job)?;
    let done = Outcome { status: ended.status, console: ended.output };
    for (n, (vcpus, mib, options, devices)) in SHAPES.iter().enumerate() {
        let shape = format!("{vcpus} vCPUs, {mib} MiB {options}");
        let seen: Vec<u64> = done
            .value(&format!("SHAPE{n}"))?
            .split_whitespace()
            .filter_map(|number| number.parse().ok())
            .collect();
        let [status, cpus, memory_mib, count] = seen[..] else {
            anyhow::bail!("{shape}: the guest said {seen:?}:\n{}", done.console);
        };
        ensure!(status == 0 && cpus == u64::from(*vcpus), "{shape}: status {status}, {cpus} CPUs");
        // What the kernel keeps for itself does not count in MemTotal.
        ensure!(memory_mib <= *mib && memory_mib + 64 + mib / 16 >= *mib, "{shape}: {memory_mib} MiB seen");
        ensure!(count == u64::from(*devices), "{shape}: {count} virtio devices");
    }
    Ok(())
}
