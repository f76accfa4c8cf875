//! What we put on the wire, judged by tshark's iSCSI decoder.

use anyhow::ensure;
use vcp_tests::backend::Backend;
use vcp_tests::front::Driver;
use vcp_tests::load::Load;
use vcp_tests::proxy::{Proxy, Way, pdu_len};
use vcp_tests::target::{Kind, LunSpec, Spec, Target};
use vcp_tests::{Result, pattern, pcap, tool};

use crate::support::COMMAND;

fn decodes(kind: Kind, digest: &str) -> Result<()> {
    if !vcp_tests::target::have(kind) || !tool::have(&["tshark"]) {
        return Ok(());
    }
    let target = Target::start(kind, &Spec::disk(8 << 20).digests(digest == "crc32c"))?;
    let proxy = Proxy::start(target.portal())?;
    proxy.record();
    let args = ["--header-digest", digest, "--data-digest", digest];
    let backend = Backend::vcp_iscsi(&target.url_at(proxy.addr(), 0), &args)?;
    let mut driver = Driver::connect(backend.socket(), 1)?;
    driver.write(0, &pattern::make(1, 0, 512 << 10))?;
    pattern::check(1, 0, &driver.read(0, 512 << 10)?)?;
    Load::new(1, 64).run(&mut driver, 0, 8, 120, |_| Ok(()))?;
    drop(driver);
    backend.proc().terminate(COMMAND)?;
    proxy.wait_open(0, COMMAND)?;
    let dir = tempfile::tempdir()?;
    let (mut seen, mut digests) = ([false; 64], 0);
    for record in proxy.records() {
        let decoded = pcap::decode(&record, dir.path())?;
        decoded.opcodes.iter().for_each(|opcode| seen[usize::from(*opcode)] = true);
        digests += decoded.digests;
    }
    ensure!((digests > 0) == (digest == "crc32c"), "{digests} digests on the wire");
    // Login, command, response, data in and logout of both sides.
    for opcode in [0x03, 0x23, 0x01, 0x21, 0x25, 0x06, 0x26] {
        ensure!(seen[opcode], "tshark saw no PDU with opcode {opcode:#04x}");
    }
    Ok(())
}

#[test]
fn tshark_finds_our_pdus_well_formed() -> Result<()> {
    decodes(Kind::Tgtd, "none")
}

#[test]
fn tshark_finds_our_digests_right() -> Result<()> {
    decodes(Kind::Ours, "crc32c")
}

/// Defect H of libiscsi: LUN 300 is not 0x012c on the wire but, in flat addressing, 0x412c (SAM-5 4.7.7.3).
#[test]
fn lun_300_goes_out_in_flat_addressing() -> Result<()> {
    let lun = LunSpec { number: Some(300), ..LunSpec::new(1 << 20) };
    let target = Target::start(Kind::Ours, &Spec::luns([lun]))?;
    let proxy = Proxy::start(target.portal())?;
    proxy.record();
    let backend = Backend::vcp_iscsi(&target.url_at(proxy.addr(), 0), &[])?;
    let mut driver = Driver::connect(backend.socket(), 1)?;
    driver.write(0, &pattern::make(1, 0, 4096))?;
    driver.read(0, 4096)?;
    let commands = commands(&proxy);
    let writes: Vec<_> = commands.iter().filter(|c| matches!(c[32], 0x2a | 0x8a)).collect();
    ensure!(!writes.is_empty(), "no WRITE on the wire");
    for write in writes {
        ensure!(write[8..16] == [0x41, 0x2c, 0, 0, 0, 0, 0, 0], "LUN field {:02x?}", &write[8..16]);
    }
    Ok(())
}

/// The headers of all SCSI Commands of the last connection that was recorded.
fn commands(proxy: &Proxy) -> Vec<[u8; 48]> {
    let bytes = proxy.records().last().map(|r| r.bytes(Way::ToTarget)).unwrap_or_default();
    let (mut at, mut found) = (0, Vec::new());
    while let Some(len) = bytes.get(at..).and_then(pdu_len) {
        if bytes[at] & 0x3f == 0x01 {
            found.extend(<[u8; 48]>::try_from(&bytes[at..at + 48]));
        }
        at += len;
    }
    found
}

/// Defect E of qemu-storage-daemon: the guest is told that there is no cache, and what it wrote is not durable.
#[test]
fn flush_reaches_a_lun_with_a_write_cache() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(1 << 20))?;
    let proxy = Proxy::start(target.portal())?;
    proxy.record();
    let backend = Backend::vcp_iscsi(&target.url_at(proxy.addr(), 0), &[])?;
    let mut driver = Driver::connect(backend.socket(), 1)?;
    ensure!(driver.config()?.write_cache, "the device does not tell of the LUN's write cache");
    let syncs = |proxy: &Proxy| commands(proxy).iter().filter(|c| matches!(c[32], 0x35 | 0x91)).count();
    for n in 1..=3 {
        driver.write(0, &pattern::make(n, 0, 4096))?;
        driver.flush()?;
        ensure!(syncs(&proxy) == n as usize, "{} SYNCHRONIZE CACHE after {n} flushes", syncs(&proxy));
    }
    Ok(())
}

/// Without a cache in the LUN there is nothing to flush, and the device says so.
#[test]
fn lun_without_write_cache_is_told_as_write_through() -> Result<()> {
    let lun = LunSpec { write_cache: false, ..LunSpec::new(1 << 20) };
    let target = Target::start(Kind::Ours, &Spec::luns([lun]))?;
    let backend = Backend::vcp_iscsi(&target.url(0), &[])?;
    let mut driver = Driver::connect(backend.socket(), 1)?;
    ensure!(!driver.config()?.write_cache, "the device tells of a write cache that the LUN has not");
    driver.write(0, &pattern::make(1, 0, 4096))?;
    driver.flush()
}
