//! The flight recorder, judged by tshark's iSCSI decoder.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::json;
use vcp_tests::bad_target::BadTarget;
use vcp_tests::load::Load;
use vcp_tests::proc::Cmd;
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, pattern, tool};

use super::Server;

fn tshark(file: &Path, args: &[&str]) -> Result<String> {
    Cmd::new("tshark").arg("-r").arg(file).args(args).output(Duration::from_secs(60))
}

/// Opcodes in order, and what tshark makes of the capture: nothing malformed, no gap in the sequence numbers.
fn opcodes(file: &Path) -> Result<Vec<u8>> {
    let wrong = "_ws.malformed || iscsi.opcode.invalid || tcp.analysis.lost_segment || \
                 tcp.analysis.retransmission || tcp.analysis.out_of_order || tcp.analysis.ack_lost_segment";
    let found = tshark(file, &["-Y", wrong])?;
    ensure!(found.trim().is_empty(), "tshark does not like these packets:\n{found}");
    let text = tshark(file, &["-Y", "iscsi", "-T", "fields", "-e", "iscsi.opcode"])?;
    let parse = |word: &str| u8::from_str_radix(word.trim().trim_start_matches("0x"), 16).ok();
    Ok(text.split([',', '\n']).filter_map(parse).map(|opcode| opcode & 0x3f).collect())
}

#[test]
fn a_capture_on_request_is_read_by_tshark() -> Result<()> {
    if !tool::have(&["tshark"]) {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(8 << 20))?;
    let server = Server::start(&target.url(0), &[])?;
    let mut driver = server.driver()?;
    driver.write(0, &pattern::make(1, 0, 512 << 10))?;
    driver.read(0, 512 << 10)?;
    driver.flush()?;
    let answer = server.ask(&json!({"cmd": "dump"}))?;
    let file = answer["devices"][0]["files"][0].as_str().context("a file")?;
    let file = Path::new(file);
    ensure!(std::fs::metadata(file)?.permissions().mode() & 0o777 == 0o600, "others can read it");
    let seen = opcodes(file)?;
    let packets = tshark(file, &["-T", "fields", "-e", "frame.number"])?.lines().count();
    ensure!(seen.len() == packets, "{} iSCSI PDUs in {packets} packets", seen.len());
    // Command, Response, Data-In, R2T, Data-Out; no login.
    for opcode in [0x01, 0x21, 0x25, 0x31, 0x05] {
        ensure!(seen.contains(&opcode), "no PDU with opcode {opcode:#04x} in {seen:02x?}");
    }
    ensure!(!seen.contains(&0x03) && !seen.contains(&0x23), "a login is in it");
    let commands = tshark(file, &["-Y", "scsi_sbc.opcode", "-T", "fields", "-e", "scsi_sbc.opcode"])?;
    ensure!(commands.contains("0x2a") || commands.contains("0x8a"), "tshark sees no WRITE: {commands}");
    Ok(())
}

#[test]
fn what_goes_wrong_is_captured() -> Result<()> {
    if !tool::have(&["tshark"]) {
        return Ok(());
    }
    let target = BadTarget::start("option blocks 2048\nread#2 add data0 data-sn 1\n")?;
    let server = Server::start(&target.url(), &[])?;
    let mut driver = server.driver()?;
    driver.read(0, 4096)?;
    ensure!(server.captures()?.is_empty(), "nothing is written while all is well");
    driver.read(0, 4096)?;
    let file = server.capture_of("pcapng")?;
    ensure!(opcodes(&file)?.contains(&0x25));
    let comments = tshark(&file, &["-T", "fields", "-e", "frame.comment"])?;
    let last = comments.lines().last().unwrap_or_default();
    ensure!(last.contains("RFC 7143"), "the last packet says what was wrong: {comments:?}");
    // A further one is counted as well, whether it came soon enough to be left out or not.
    target.now("reset")?;
    let count = |page: &super::Page, result: &str| {
        page.disk("vcp_iscsi_captures_total", &format!("result=\"{result}\"")).unwrap_or_default()
    };
    server.page_that("the second anomaly is counted", |page| {
        count(page, "written") + count(page, "left_out") >= 2.0 && count(page, "failed") == 0.0
    })?;
    ensure!(server.proc.text().contains("the last PDUs were written"), "{}", server.proc.tail());
    Ok(())
}

#[test]
fn a_lost_session_is_captured() -> Result<()> {
    let target = BadTarget::start("option blocks 2048")?;
    let server = Server::start(&target.url(), &[])?;
    let mut driver = server.driver()?;
    driver.read(0, 4096)?;
    target.now("reset")?;
    server.capture_of("session-lost")?;
    driver.read(0, 4096)?;
    Ok(())
}

#[test]
fn the_ring_keeps_the_last_pdus_of_many() -> Result<()> {
    if !tool::have(&["tshark"]) {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(8 << 20))?;
    let server = Server::start(&target.url(0), &["--recorder-headers-only"])?;
    let mut driver = server.driver()?;
    Load::new(1, 256).run(&mut driver, 0, 32, 3000, |_| Ok(()))?;
    for _ in 0..20 {
        server.ask(&json!({"cmd": "dump"}))?;
    }
    let files = server.captures()?;
    ensure!(files.len() == 16, "{} files", files.len());
    let last = files.last().context("a file")?;
    ensure!(std::fs::metadata(last)?.len() < 512 << 10, "a file is bounded");
    ensure!(opcodes(last)?.len() == 1024);
    let data = tshark(last, &["-T", "fields", "-e", "frame.cap_len"])?;
    ensure!(data.lines().all(|len| len == "102"), "more than headers is in it");
    Ok(())
}

#[test]
fn a_directory_that_cannot_be_written_to_is_named() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(1 << 20))?;
    let dir = tempfile::tempdir()?;
    let out = vcp_tests::backend::serve(&dir.path().join("s"))?
        .args(["--recorder-dir", "/no/such/directory"])
        .arg(target.url(0))
        .run(crate::support::COMMAND)?;
    crate::support::one_error(&out, 1, &["--recorder-dir", "/no/such/directory"])
}
