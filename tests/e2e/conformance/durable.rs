//! Durability, proven on the wire: what the guest may take as stable was made stable by the target.

use anyhow::ensure;
use vcp_tests::Result;
use vcp_tests::bad_target::{BadTarget, Entry};
use vcp_tests::front::all_features;
use vcp_tests::pattern;
use virtio_driver::{VirtioBlkFeatureFlags as Blk, VirtioFeatureFlags as Virtio};

use super::bed::{Bed, bed, bed_with};

const LEN: usize = 4096;

/// FUA of a WRITE (SBC-3: byte 1, bit 3 of the CDB).
fn fua(write: &Entry) -> bool {
    write.number(33, 1) & 0x08 != 0
}

/// What went out: `W` a WRITE, `F` one with FUA, `S` SYNCHRONIZE CACHE.
fn order(bed: &Bed) -> Result<String> {
    let log = bed.target.log()?;
    let letter = |e: &Entry| match e.label.as_str() {
        "write" if e.way == "in" => Some(if fua(e) { 'F' } else { 'W' }),
        "sync" if e.way == "in" => Some('S'),
        _ => None,
    };
    Ok(log.iter().filter_map(letter).collect())
}

/// A bed whose guest takes neither FLUSH nor CONFIG_WCE.
fn without_flush(script: &str) -> Result<Bed> {
    let features = all_features() & !(Blk::FLUSH | Blk::CONFIG_WCE).bits();
    let bed = bed_with(BadTarget::start(script)?, 0, &[], features)?;
    ensure!(bed.driver.features() & Virtio::VERSION_1.bits() != 0);
    Ok(bed)
}

/// Defect E: a volatile cache (mode page 08h, WCE) is told to the guest, and its FLUSH reaches the wire; WRITEs do not
/// carry FUA then, as the guest asks for durability where it wants it.
#[test]
fn flush_becomes_synchronize_cache() -> Result<()> {
    let mut bed = bed("option wce yes", &[])?;
    ensure!(bed.driver.config()?.write_cache && bed.driver.has(Blk::FLUSH));
    for n in 0..3 {
        bed.driver.write(0, &pattern::make(n, 0, LEN))?;
        bed.driver.flush()?;
    }
    ensure!(order(&bed)? == "WSWSWS", "{}", order(&bed)?);
    bed.finish()
}

/// A FLUSH is only answered when SYNCHRONIZE CACHE was: an error of it is the guest's to know.
#[test]
fn failed_flush_is_told() -> Result<()> {
    let mut bed = bed("option wce yes", &[])?;
    bed.target.script("sync sense 3 0x0c00")?;
    ensure!(
        bed.driver.request(0, &vcp_tests::front::Op::Flush)?.is_err(),
        "a failed flush was answered as done"
    );
    bed.driver.flush()?;
    bed.finish()
}

/// A unit without a cache is told as such.
#[test]
fn unit_without_cache_is_told_as_write_through() -> Result<()> {
    let mut bed = bed("option wce no", &[])?;
    ensure!(!bed.driver.config()?.write_cache, "the device tells of a cache that is not there");
    bed.driver.write(0, &pattern::make(1, 0, LEN))?;
    bed.finish()
}

/// A guest that cannot flush (virtio 1.2, 5.2.5.2: without VIRTIO_BLK_F_FLUSH the device writes through) gets FUA with
/// each WRITE.
#[test]
fn write_through_by_fua() -> Result<()> {
    let mut bed = without_flush("option wce yes\noption dpofua yes")?;
    for n in 0..3 {
        bed.writes(n, 0, LEN)?;
    }
    ensure!(order(&bed)? == "FFF", "{}", order(&bed)?);
    bed.target.judge()
}

/// The same on a unit without FUA: a SYNCHRONIZE CACHE behind each WRITE, before the answer.
#[test]
fn write_through_by_synchronize_cache() -> Result<()> {
    let mut bed = without_flush("option wce yes\noption dpofua no")?;
    for n in 0..3 {
        bed.writes(n, 0, LEN)?;
    }
    ensure!(order(&bed)? == "WSWSWS", "{}", order(&bed)?);
    // The WRITE is not done before that is: its failure is the WRITE's.
    bed.target.script("sync sense 3 0x0c00")?;
    ensure!(bed.try_write(9, 0, LEN)?.is_err(), "answered as done, but not stable");
    bed.target.judge()
}

/// A guest that turns the cache off (writeback = 0 in the configuration space, VIRTIO_BLK_F_CONFIG_WCE).
#[test]
fn cache_turned_off_by_the_guest() -> Result<()> {
    for (dpofua, expected) in [("yes", "WFW"), ("no", "WWSW")] {
        let mut bed = bed(&format!("option wce yes\noption dpofua {dpofua}"), &[])?;
        bed.target.forget()?;
        bed.driver.write(0, &pattern::make(1, 0, LEN))?;
        bed.driver.set_write_cache(false)?;
        ensure!(!bed.driver.config()?.write_cache);
        bed.driver.write(0, &pattern::make(2, 0, LEN))?;
        bed.driver.set_write_cache(true)?;
        bed.driver.write(0, &pattern::make(3, 0, LEN))?;
        ensure!(order(&bed)? == expected, "dpofua {dpofua}: {}", order(&bed)?);
        bed.finish()?;
    }
    Ok(())
}
