//! A LUN of each target as a virtio-blk device, driven by the third-party `virtio-driver` front end.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use anyhow::{Context, ensure};
use vcp_tests::backend::Backend;
use vcp_tests::front::{Driver, Failure, MAX_BYTES, Op};
use vcp_tests::load::Load;
use vcp_tests::proxy::{Proxy, Way};
use vcp_tests::target::{self, Kind, LunSpec, Spec, Target};
use vcp_tests::{Result, pattern};
use virtio_driver::VirtioBlkFeatureFlags as Blk;

const SIZE: u64 = 64 << 20;

/// Everything that a front end can ask of a writable disk, with the data checked in the target's own file.
fn verifies(kind: Kind, digest: &str) -> Result<()> {
    if !target::have(kind) {
        return Ok(());
    }
    let target = Target::start(kind, &Spec::disk(SIZE).digests(digest == "crc32c"))?;
    let proxy = Proxy::start(target.portal())?;
    proxy.record();
    let args = ["--queues", "2", "--header-digest", digest, "--data-digest", digest];
    let backend = Backend::vcp_iscsi(&target.url_at(proxy.addr(), 0), &args)?;
    let mut driver = Driver::connect(backend.socket(), 2)?;
    if digest == "crc32c" {
        negotiated(&proxy, b"HeaderDigest=CRC32C\0")?;
        negotiated(&proxy, b"DataDigest=CRC32C\0")?;
    }

    let config = driver.config()?;
    assert_eq!((config.size_bytes, config.block_bytes, config.queues), (SIZE, 512, 2));
    assert!(config.seg_max > 0 && config.size_max > 0, "{config:?}");
    assert!(
        driver.has(Blk::FLUSH) && driver.has(Blk::BLK_SIZE) && driver.has(Blk::MQ) && !driver.has(Blk::RO)
    );

    let image = File::open(&target.luns()[0].image)?;
    // Lengths around pages, bursts and segments, at places that divide nothing.
    for (n, len) in [512, 4096, 8192 + 512, 65536, 65536 + 1536, 262_144, MAX_BYTES].into_iter().enumerate() {
        let offset = (n as u64) * (2 << 20) + 512 * (n as u64 + 1);
        driver.set_pieces(1 + n * 3);
        driver.write(offset, &pattern::make(1, offset, len))?;
        driver.flush()?;
        pattern::check(1, offset, &driver.read(offset, len)?).with_context(|| format!("{len} bytes"))?;
        let mut stored = vec![0; len];
        image.read_exact_at(&mut stored, offset)?;
        pattern::check(1, offset, &stored).with_context(|| format!("{len} bytes in the target's file"))?;
    }
    driver.set_pieces(2);
    last_sector_and_beyond(&mut driver)?;
    zeroes(&mut driver)?;
    discard(&mut driver, kind, &image)?;
    both_queues(&mut driver)
}

fn negotiated(proxy: &Proxy, key: &[u8]) -> Result<()> {
    let records = proxy.records();
    let seen = records.iter().any(|r| {
        [Way::ToInitiator, Way::ToTarget]
            .iter()
            .all(|way| r.bytes(*way).windows(key.len() - 1).any(|w| w == &key[..key.len() - 1]))
    });
    ensure!(seen, "{} was not agreed on", String::from_utf8_lossy(key));
    Ok(())
}

fn last_sector_and_beyond(driver: &mut Driver) -> Result<()> {
    let last = SIZE - 512;
    driver.write(last, &pattern::make(2, last, 512))?;
    pattern::check(2, last, &driver.read(last, 512)?)?;
    for op in [
        Op::Read { offset: SIZE, len: 512 },
        Op::Read { offset: last, len: 1024 },
        Op::Write { offset: SIZE, data: vec![1; 512] },
        Op::Write { offset: last, data: vec![1; 1024] },
        Op::Read { offset: u64::MAX - 511, len: 512 },
    ] {
        let result = driver.request(0, &op)?;
        assert_eq!(result, Err(Failure::Io), "beyond the end of the disk");
    }
    pattern::check(2, last, &driver.read(last, 512)?).context("a refused write changed the last sector")?;
    Ok(())
}

fn zeroes(driver: &mut Driver) -> Result<()> {
    if !driver.has(Blk::WRITE_ZEROES) {
        return Ok(());
    }
    for (at, unmap) in [(32 << 20, false), (34 << 20, true)] {
        let (len, from, until) = (1 << 20, 64 << 10, 768 << 10);
        driver.write(at, &pattern::make(3, at, len))?;
        driver.write_zeroes(at + from, until - from, unmap)?;
        driver.flush()?;
        let data = driver.read(at, len)?;
        let (from, until) = (from as usize, until as usize);
        ensure!(data[from..until].iter().all(|b| *b == 0), "not all zeroes (unmap {unmap})");
        pattern::check(3, at, &data[..from]).context("before the zeroes")?;
        pattern::check(3, at + until as u64, &data[until..]).context("behind the zeroes")?;
    }
    Ok(())
}

fn discard(driver: &mut Driver, kind: Kind, image: &File) -> Result<()> {
    assert_eq!(driver.has(Blk::DISCARD), kind.unmaps(), "discard is offered if and only if the LUN can");
    if !driver.has(Blk::DISCARD) {
        return Ok(());
    }
    let config = driver.config()?;
    assert!(config.max_discard_sectors > 0 && config.max_discard_segments > 0, "{config:?}");
    let (at, len) = (40 << 20, 1 << 20);
    driver.write(at, &pattern::make(4, at, len))?;
    driver.flush()?;
    let before = image.metadata()?.blocks();
    driver.discard(at + (256 << 10), 512 << 10)?;
    driver.flush()?;
    let freed = before.saturating_sub(image.metadata()?.blocks()) * 512;
    ensure!(freed >= 256 << 10, "the target's file gave back only {freed} bytes");
    let data = driver.read(at, len)?;
    pattern::check(4, at, &data[..256 << 10]).context("before the discarded range")?;
    pattern::check(4, at + (768 << 10), &data[768 << 10..]).context("behind the discarded range")?;
    Ok(())
}

fn both_queues(driver: &mut Driver) -> Result<()> {
    // Interleaved submissions on both queues, each with its own answers.
    let place = |queue: usize, n: u64| (16 << 20) + (queue as u64) * (1 << 20) + n * 8192;
    for queue in [0, 1] {
        for n in 0..16 {
            let offset = place(queue, n);
            driver.submit(queue, &Op::Write { offset, data: pattern::make(5, offset, 8192) })?;
        }
    }
    for queue in [1, 0] {
        for _ in 0..16 {
            let done = driver.wait(queue, vcp_tests::front::REQUEST)?;
            done.result.with_context(|| format!("write on queue {queue}"))?;
        }
    }
    for queue in [0, 1] {
        for n in 0..16 {
            let offset = place(queue, n);
            // Written on the other queue.
            let data = driver.request(1 - queue, &Op::Read { offset, len: 8192 })??;
            pattern::check(5, offset, &data)?;
        }
    }
    for queue in [0, 1] {
        let mut load = Load::new(7 + queue as u64, 512);
        load.run(driver, queue, 24, 400, |_| Ok(()))?;
        load.verify_all(driver)?;
    }
    Ok(())
}

#[test]
fn tgtd_disk_verifies_without_digests() -> Result<()> {
    verifies(Kind::Tgtd, "none")
}

#[test]
fn tgtd_disk_verifies_with_digests() -> Result<()> {
    verifies(Kind::Tgtd, "crc32c")
}

#[test]
fn istgt_disk_verifies_without_digests() -> Result<()> {
    verifies(Kind::Istgt, "none")
}

#[test]
fn istgt_disk_verifies_with_digests() -> Result<()> {
    verifies(Kind::Istgt, "crc32c")
}

#[test]
fn our_target_disk_verifies_without_digests() -> Result<()> {
    verifies(Kind::Ours, "none")
}

#[test]
fn our_target_disk_verifies_with_digests() -> Result<()> {
    verifies(Kind::Ours, "crc32c")
}

/// A disk that is read-only, by the LUN or by our option, says so and refuses every change.
fn refuses_changes(target: &Target, args: &[&str]) -> Result<()> {
    let image = &target.luns()[0].image;
    File::options().write(true).open(image)?.write_all_at(&pattern::make(1, 0, 4096), 0)?;
    let backend = Backend::vcp_iscsi(&target.url(0), args)?;
    let mut driver = Driver::connect(backend.socket(), 1)?;
    ensure!(driver.has(Blk::RO), "VIRTIO_BLK_F_RO is not offered");
    ensure!(!driver.has(Blk::DISCARD) && !driver.has(Blk::WRITE_ZEROES), "offers to change a read-only disk");
    pattern::check(1, 0, &driver.read(0, 4096)?)?;
    for op in [
        Op::Write { offset: 0, data: vec![9; 4096] },
        Op::Discard { offset: 0, len: 4096 },
        Op::WriteZeroes { offset: 0, len: 4096, unmap: true },
    ] {
        let result = driver.request(0, &op)?;
        ensure!(result.is_err(), "{op:?} succeeded");
    }
    pattern::check(1, 0, &driver.read(0, 4096)?).context("a refused change was made")?;
    Ok(())
}

#[test]
fn read_only_option_refuses_changes() -> Result<()> {
    refuses_changes(&Target::start(Kind::Ours, &Spec::disk(SIZE))?, &["--read-only"])
}

#[test]
fn read_only_lun_refuses_changes() -> Result<()> {
    for kind in [Kind::Tgtd, Kind::Ours].into_iter().filter(|k| target::have(*k)) {
        let lun = LunSpec { read_only: true, ..LunSpec::new(SIZE) };
        let target = Target::start(kind, &Spec::luns([lun]))?;
        refuses_changes(&target, &[]).with_context(|| kind.to_string())?;
    }
    Ok(())
}

#[test]
fn blocks_of_4096_bytes_are_addressed_rightly() -> Result<()> {
    for kind in Kind::ALL.into_iter().filter(|k| target::have(*k)) {
        let lun = LunSpec { block_bytes: 4096, ..LunSpec::new(SIZE) };
        let target = Target::start(kind, &Spec::luns([lun]))?;
        let backend = Backend::vcp_iscsi(&target.url(0), &[])?;
        let mut driver = Driver::connect(backend.socket(), 1)?;
        let config = driver.config()?;
        assert_eq!((config.size_bytes, config.block_bytes), (SIZE, 4096), "{kind}");
        let offset = SIZE - 65536;
        driver.write(offset, &pattern::make(1, offset, 65536))?;
        driver.flush()?;
        let mut stored = vec![0; 65536];
        File::open(&target.luns()[0].image)?.read_exact_at(&mut stored, offset)?;
        pattern::check(1, offset, &stored).with_context(|| format!("{kind}'s file"))?;
        pattern::check(1, offset, &driver.read(offset, 65536)?)?;
        // Half a block can be neither read nor written.
        let half = driver.request(0, &Op::Write { offset: 512, data: vec![1; 512] })?;
        assert_eq!(half, Err(Failure::Io), "{kind}: half a block written");
        driver.read(0, 4096).with_context(|| format!("{kind} after a refused request"))?;
    }
    Ok(())
}

#[test]
fn lun_300_is_reached() -> Result<()> {
    for kind in [Kind::Tgtd, Kind::Ours].into_iter().filter(|k| target::have(*k)) {
        // LUN 44 is what a bare 300 means in peripheral addressing (bus 1, LUN 44).
        let lun = |number, size| LunSpec { number: Some(number), ..LunSpec::new(size) };
        let luns = vec![lun(1, 1 << 20), lun(44, 2 << 20), lun(300, 3 << 20)];
        let target = Target::start(kind, &Spec::luns(luns))?;
        let backend = Backend::vcp_iscsi(&target.url(2), &[])?;
        let mut driver = Driver::connect(backend.socket(), 1)?;
        assert_eq!(driver.config()?.size_bytes, 3 << 20, "{kind}");
        driver.write(0, &pattern::make(300, 0, 65536))?;
        driver.flush()?;
        let mut stored = vec![0; 65536];
        File::open(&target.luns()[2].image)?.read_exact_at(&mut stored, 0)?;
        pattern::check(300, 0, &stored).with_context(|| format!("{kind}'s LUN 300"))?;
    }
    Ok(())
}

#[test]
fn disk_of_3_tib_is_addressed_to_its_end() -> Result<()> {
    const SIZE: u64 = 3 << 40;
    for kind in [Kind::Tgtd, Kind::Ours].into_iter().filter(|k| target::have(*k)) {
        let target = Target::start(kind, &Spec::disk(SIZE))?;
        let backend = Backend::vcp_iscsi(&target.url(0), &[])?;
        let mut driver = Driver::connect(backend.socket(), 1)?;
        assert_eq!(driver.config()?.size_bytes, SIZE, "{kind}");
        let image = File::open(&target.luns()[0].image)?;
        // The last block, and both sides of 2 TiB, where a 32-bit block address wraps to 0.
        for offset in [SIZE - 65536, (2 << 40) - 65536, 2 << 40] {
            driver.write(offset, &pattern::make(1, offset, 65536))?;
            driver.flush()?;
            let mut stored = vec![0; 65536];
            image.read_exact_at(&mut stored, offset)?;
            pattern::check(1, offset, &stored).with_context(|| format!("{kind}'s file at {offset}"))?;
            pattern::check(1, offset, &driver.read(offset, 65536)?)?;
        }
        ensure!(driver.read(0, 65536)?.iter().all(|b| *b == 0), "{kind}: the start of the disk was written");
    }
    Ok(())
}
