//! A target that errs, made from a real one by changing its PDUs on the way: what it does not carry out must never be
//! answered as done. The letters are those of the known defects of qemu-storage-daemon with libiscsi.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, ensure};
use vcp_tests::backend::Backend;
use vcp_tests::front::{Driver, Op};
use vcp_tests::proxy::Proxy;
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, pattern};

const SCSI_RESPONSE: u8 = 0x21;
const DATA_IN: u8 = 0x25;
/// Data-In bits (RFC 7143 11.7): F, A, O, U, S.
const ACKNOWLEDGE: u8 = 0x40;
const UNDERFLOW: u8 = 0x02;
const STATUS: u8 = 0x01;

/// Bytes of the reads and writes that are tampered with; the probing of the LUN reads less.
const LEN: usize = 512 << 10;

struct Bed {
    _target: Target,
    proxy: Proxy,
    _backend: Backend,
    driver: Driver,
}

fn bed(rewrite: impl FnMut(Vec<u8>) -> Option<Vec<u8>> + Send + 'static) -> Result<Bed> {
    let target = Target::start(Kind::Ours, &Spec::disk(4 << 20))?;
    let image = &target.luns()[0].image;
    std::fs::write(image, pattern::make(1, 0, 4 << 20))?;
    let proxy = Proxy::start(target.portal())?;
    proxy.rewrite(rewrite);
    let backend = Backend::vcp_iscsi(&target.url_at(proxy.addr(), 0), &["--command-timeout-ms", "3000"])?;
    let driver = Driver::connect(backend.socket(), 1)?;
    Ok(Bed { _target: target, proxy, _backend: backend, driver })
}

fn data_len(pdu: &[u8]) -> usize {
    usize::from(pdu[5]) << 16 | usize::from(pdu[6]) << 8 | usize::from(pdu[7])
}

/// Does a long read, which may fail but must not be wrong; returns whether it succeeded.
fn read_is_never_wrong(bed: &mut Bed) -> Result<bool> {
    match bed.driver.request(0, &Op::Read { offset: 0, len: LEN })? {
        Ok(data) => {
            pattern::check(1, 0, &data).context("a read was answered with wrong data")?;
            Ok(true)
        }
        Err(_) => Ok(false),
    }
}

#[test]
fn defect_a_failed_write_is_not_answered_as_done() -> Result<()> {
    // Response 1, "target failure", with status GOOD to whatever moved no data to us: writes.
    let armed = Arc::new(AtomicBool::new(false));
    let errs = Arc::clone(&armed);
    let mut bed = bed(move |mut pdu| {
        if errs.load(Ordering::Relaxed) && pdu[0] == SCSI_RESPONSE && pdu[3] == 0 && data_len(&pdu) == 0 {
            pdu[2] = 0x01;
        }
        Some(pdu)
    })?;
    // Not while the LUN is probed.
    armed.store(true, Ordering::Relaxed);
    let answer = bed.driver.request(0, &Op::Write { offset: 0, data: pattern::make(2, 0, 4096) })?;
    ensure!(answer.is_err(), "a write that the target failed was answered as done");
    Ok(())
}

#[test]
fn defect_b_short_read_with_residual_is_not_answered_as_done() -> Result<()> {
    // The last Data-In of a long read ends 2048 bytes early; the residual says so.
    let mut bed = bed(|mut pdu| {
        let len = data_len(&pdu);
        if pdu[0] == DATA_IN && pdu[1] & STATUS != 0 && len > 65536 {
            pdu[1] |= UNDERFLOW;
            pdu[44..48].copy_from_slice(&2048_u32.to_be_bytes());
            let short = len - 2048;
            pdu[5..8].copy_from_slice(&(short as u32).to_be_bytes()[1..]);
            pdu.truncate(48 + short);
        }
        Some(pdu)
    })?;
    ensure!(!read_is_never_wrong(&mut bed)?, "a short read was answered as done");
    Ok(())
}

#[test]
fn defect_c_hole_in_the_data_is_noticed_and_the_read_repeated() -> Result<()> {
    // One Data-In is lost, once.
    let mut lost = false;
    let mut bed = bed(move |pdu| {
        if pdu[0] == DATA_IN && data_len(&pdu) > 65536 && !lost {
            lost = true;
            return None;
        }
        Some(pdu)
    })?;
    ensure!(read_is_never_wrong(&mut bed)?, "a read that could be repeated failed");
    Ok(())
}

#[test]
fn defect_c_read_that_always_has_a_hole_is_not_answered_as_done() -> Result<()> {
    // The first half of a Data-In is missing, every time: the rest stands at its right place.
    let mut bed = bed(|mut pdu| {
        let len = data_len(&pdu);
        if pdu[0] == DATA_IN && len > 65536 {
            let offset = u32::from_be_bytes([pdu[40], pdu[41], pdu[42], pdu[43]]) + 4096;
            pdu[40..44].copy_from_slice(&offset.to_be_bytes());
            pdu[5..8].copy_from_slice(&((len - 4096) as u32).to_be_bytes()[1..]);
            pdu.drain(48..48 + 4096);
        }
        Some(pdu)
    })?;
    ensure!(!read_is_never_wrong(&mut bed)?, "a read with a hole was answered as done");
    // A read that is not tampered with is as good as ever.
    let data = bed.driver.read(1 << 20, 4096)?;
    pattern::check(1, 1 << 20, &data)?;
    Ok(())
}

#[test]
fn defect_g_acknowledgement_asked_for_at_level_0_is_ignored() -> Result<()> {
    let mut bed = bed(|mut pdu| {
        if pdu[0] == DATA_IN {
            pdu[1] |= ACKNOWLEDGE;
        }
        Some(pdu)
    })?;
    let connections = bed.proxy.accepted();
    for _ in 0..3 {
        ensure!(read_is_never_wrong(&mut bed)?, "a read failed");
    }
    ensure!(bed.proxy.accepted() == connections, "the session was dropped");
    Ok(())
}
