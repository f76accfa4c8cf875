//! The beds themselves, with nothing of ours between: third-party front ends and back ends against third-party targets.

use vcp_tests::backend::Backend;
use vcp_tests::front::Driver;
use vcp_tests::guest::QemuGuest;
use vcp_tests::load::Load;
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, pattern, tool};

#[test]
fn virtio_driver_verifies_qemu_storage_daemon_on_tgtd() -> Result<()> {
    if !tool::have(&["tgtd", "tgtadm", "qemu-storage-daemon"]) {
        return Ok(());
    }
    let target = Target::start(Kind::Tgtd, &Spec::disk(64 << 20))?;
    let backend = Backend::qsd(&target, 0, 2)?;
    let mut driver = Driver::connect(backend.socket(), 2)?;
    assert_eq!(driver.config()?.size_bytes, 64 << 20);
    driver.set_pieces(3);
    driver.write(1 << 20, &pattern::make(1, 1 << 20, 64 << 10))?;
    driver.flush()?;
    pattern::check(1, 1 << 20, &driver.read(1 << 20, 64 << 10)?)?;
    let mut load = Load::new(1, 256);
    load.run(&mut driver, 1, 16, 500, |_| Ok(()))?;
    load.verify_all(&mut driver)
}

#[test]
fn stock_guest_reads_qemu_storage_daemon_on_istgt() -> Result<()> {
    if !tool::have(&["istgt", "qemu-storage-daemon", "qemu-system-x86_64"]) {
        return Ok(());
    }
    let target = Target::start(Kind::Istgt, &Spec::disk(32 << 20))?;
    let backend = Backend::qsd(&target, 0, 1)?;
    let script = "wait_disk vda; queue vda logical_block_size; value SIZE $(cat /sys/block/vda/size)
        dd if=/dev/urandom of=/tmp/r bs=64k count=16 2>/dev/null; dd if=/tmp/r of=/dev/vda conv=fsync 2>/dev/null || die write
        drop_caches; dd if=/dev/vda bs=64k count=16 2>/dev/null | cmp - /tmp/r || die compare";
    let done = QemuGuest::new().disk(backend.socket(), 1).run(script)?;
    assert_eq!(done.status, 0, "{}", done.console);
    assert_eq!((done.number("SIZE")?, done.number("vda.logical_block_size")?), (65536, 512));
    Ok(())
}
