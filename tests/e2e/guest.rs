//! Stock QEMU with stock Debian's kernel on our vhost-user sockets: the drivers that users run. One boot per target,
//! with everything in it.

use anyhow::{Context, ensure};
use guest_images::rootfs;
use vcp_tests::Result;
use vcp_tests::backend::Backend;
use vcp_tests::guest::QemuGuest;
use vcp_tests::target::{self, Kind, LunSpec, Spec, Target};
use vcp_tests::tool;

use crate::support::output;

const MIB: u64 = 1 << 20;
const FILE_SYSTEM: u64 = 64 * MIB;
const RAW: u64 = 32 * MIB;

/// vda gets a file system, vdb raw patterns.
const SCRIPT: &str = r#"
wait_disk vda; wait_disk vdb
for d in vda vdb; do
    value $d.size $(cat /sys/block/$d/size)
    value $d.ro $(cat /sys/block/$d/ro)
    value $d.serial $(cat /sys/block/$d/serial)
    value $d.mq $(ls /sys/block/$d/mq | wc -l)
    for q in logical_block_size physical_block_size write_cache discard_max_bytes discard_granularity \
        write_zeroes_max_bytes max_segments max_sectors_kb; do queue $d $q; done
done

# Raw: data at the start, in the middle and at the end, read back from the disk and not from the cache.
dd if=/dev/urandom of=/tmp/random bs=64k count=32 2>/dev/null
dd if=/tmp/random of=/tmp/half bs=64k skip=16 2>/dev/null
size=$(($(cat /sys/block/vdb/size) / 128))
for at in 0 $((size / 2)) $((size - 32)); do
    dd if=/tmp/random of=/dev/vdb bs=64k seek=$at conv=notrunc,fsync 2>/dev/null || die write at $at
done
drop_caches
for at in 0 $((size / 2)) $((size - 32)); do
    dd if=/dev/vdb bs=64k skip=$at count=32 2>/dev/null | cmp - /tmp/random || die compare at $at
done
dd if=/tmp/random of=/dev/vdb bs=64k seek=64 conv=notrunc oflag=direct 2>/dev/null || die direct write
dd if=/dev/vdb bs=64k skip=64 count=32 iflag=direct 2>/dev/null | cmp - /tmp/random || die direct compare
if [ $(cat /sys/block/vdb/queue/write_zeroes_max_bytes) -gt 0 ]; then
    /usr/sbin/blkdiscard -z -o 4194304 -l 1048576 /dev/vdb || die zero
    drop_caches
    dd if=/dev/vdb bs=64k skip=64 count=16 2>/dev/null | cmp -n 1048576 - /dev/zero || die zeroes
    dd if=/dev/vdb bs=64k skip=80 count=16 2>/dev/null | cmp - /tmp/half || die behind the zeroes
fi
if [ $(cat /sys/block/vdb/queue/discard_max_bytes) -gt 0 ]; then
    /usr/sbin/blkdiscard -o 8388608 -l 4194304 /dev/vdb || die discard
    value discarded yes
fi

# A file system: files, a trim, a remount from cold caches.
mkfs.ext4 -q -F /dev/vda || die mkfs
mkdir -p /mnt; mount -t ext4 /dev/vda /mnt || die mount
for n in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=/mnt/file$n bs=64k count=$((n * 8)) 2>/dev/null || die file $n; done
(cd /mnt && sha256sum file*) >/tmp/sums; cp /tmp/sums /mnt/sums; sync
rm /mnt/file3; sync
if [ $(cat /sys/block/vda/queue/discard_max_bytes) -gt 0 ]; then fstrim /mnt || die fstrim; fi
umount /mnt || die umount
drop_caches
mount -t ext4 /dev/vda /mnt || die mount again
grep -v file3 /tmp/sums >/tmp/left; (cd /mnt && sha256sum -c /tmp/left >/dev/null) || die checksums
umount /mnt || die umount again
errors=$(dmesg | grep -ciE 'i/o error|vda.*error|vdb.*error'); value errors $errors
"#;

fn boots(kind: Kind) -> Result<()> {
    if !target::have(kind) || !tool::have(&["qemu-system-x86_64", "mkfs.ext4", "blkdiscard", "e2fsck"]) {
        return Ok(());
    }
    // istgt has one block size for all its LUNs.
    let raw_block = if kind == Kind::Istgt { 512 } else { 4096 };
    let luns = vec![LunSpec::new(FILE_SYSTEM), LunSpec { block_bytes: raw_block, ..LunSpec::new(RAW) }];
    let target = Target::start(kind, &Spec::luns(luns))?;
    let backends = [
        Backend::vcp_iscsi(&target.url(0), &["--queues", "2"])?,
        Backend::vcp_iscsi(&target.url(1), &["--queues", "1"])?,
    ];
    let mkfs = tool::find("mkfs.ext4").context("mkfs.ext4")?;
    let done = QemuGuest::new()
        .disk(backends[0].socket(), 2)
        .disk(backends[1].socket(), 1)
        .program(&mkfs.display().to_string())
        .program("/usr/sbin/blkdiscard")
        .run(SCRIPT)?;
    ensure!(done.status == 0, "the job failed:\n{}", done.console);

    assert_eq!(done.number("errors")?, 0, "{}", done.console);
    assert_eq!(done.number("vda.size")?, FILE_SYSTEM / 512);
    assert_eq!(done.number("vdb.size")?, RAW / 512);
    assert_eq!(done.number("vda.logical_block_size")?, 512);
    assert_eq!(done.number("vdb.logical_block_size")?, u64::from(raw_block));
    assert_eq!(done.number("vda.mq")?, 2);
    for disk in ["vda", "vdb"] {
        assert_eq!(done.number(&format!("{disk}.ro"))?, 0);
        assert_eq!(done.value(&format!("{disk}.write_cache"))?, "write back");
        assert_eq!(done.number(&format!("{disk}.discard_max_bytes"))? > 0, kind.unmaps());
        ensure!(done.number(&format!("{disk}.max_segments"))? > 1, "one segment only");
    }
    for (index, disk) in ["vda", "vdb"].into_iter().enumerate() {
        let serial = done.value(&format!("{disk}.serial"))?;
        let info = output(&["info", &target.url(index)])?;
        ensure!(serial.len() > 3 && info.contains(serial), "serial {serial:?} is not the LUN's:\n{info}");
    }
    ensure!(
        done.value("vda.serial")? != done.value("vdb.serial")?,
        "both disks have the serial number {}",
        done.value("vda.serial")?
    );
    rootfs::check(&target.luns()[0].image).context("the file system on the target")?;
    Ok(())
}

#[test]
fn stock_guest_verifies_tgtd_disks() -> Result<()> {
    boots(Kind::Tgtd)
}

#[test]
fn stock_guest_verifies_istgt_disks() -> Result<()> {
    boots(Kind::Istgt)
}

#[test]
fn stock_guest_verifies_our_targets_disks() -> Result<()> {
    boots(Kind::Ours)
}
