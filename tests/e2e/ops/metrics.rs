//! The page of metrics and its twin on the control socket.

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, ensure};
use serde_json::json;
use vcp_tests::bad_target::BadTarget;
use vcp_tests::load::Load;
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, pattern};

use super::{Page, Server};

#[test]
fn the_page_counts_what_was_done() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(8 << 20))?;
    let server = Server::start(&target.url(0), &[])?;
    let before = server.page()?;
    ensure!(before.disk("vcp_requests_total", "op=\"read\",result=\"ok\"")? == 0.0);
    let mut driver = server.driver()?;
    for n in 0..5 {
        driver.write(0, &pattern::make(n, 0, 512 << 10))?;
        driver.read(0, 4096)?;
    }
    driver.flush()?;
    ensure!(driver.read(8 << 20, 512).is_err());
    let page = server.page()?;
    for (op, result, count) in
        [("read", "ok", 5.0), ("read", "failed", 1.0), ("write", "ok", 5.0), ("flush", "ok", 1.0)]
    {
        let found = page.disk("vcp_requests_total", &format!("op=\"{op}\",result=\"{result}\""))?;
        ensure!(found == count, "{op} {result}: {found}");
    }
    ensure!(page.disk("vcp_request_bytes_total", "op=\"write\"")? == f64::from(5 << 19));
    // The parts of the time: each of them was recorded for each request, and they do not add up to more than the whole.
    for op in ["read", "write"] {
        let whole = page.disk("vcp_request_duration_seconds_sum", &format!("op=\"{op}\""))?;
        let part = |stage: &str, what: &str| {
            page.disk(&format!("vcp_request_stage_seconds_{what}"), &format!("op=\"{op}\",stage=\"{stage}\""))
        };
        ensure!(
            part("window", "count")? == 5.0
                && part("target", "count")? == 5.0
                && part("ring", "count")? >= 5.0
        );
        let parts = part("window", "sum")? + part("target", "sum")?;
        ensure!(parts <= whole, "{op}: {parts} s of {whole} s");
        ensure!(part("target", "sum")? > 0.0);
    }
    // 512 KiB are more than may be sent without asking.
    ensure!(page.disk("vcp_iscsi_r2ts_total", "path=\"0\"")? > 0.0);
    ensure!(page.disk("vcp_iscsi_sent_bytes_total", "path=\"0\"")? > f64::from(5 << 19));
    ensure!(page.disk("vcp_iscsi_path_up", "path=\"0\"")? == 1.0);
    ensure!(page.disk("vcp_iscsi_violations_total", "violation=\"data_sn_gap\"")? == 0.0);
    ensure!(page.number("vcp_loop_passes_total")? > 0.0 && page.number("process_cpu_seconds_total")? > 0.0);
    // The same numbers as JSON.
    let metrics = server.ask(&json!({"cmd": "metrics"}))?;
    let device = &metrics["devices"][0];
    ensure!(device["write"]["ok"] == 5 && device["name"] == "disk0", "{device}");
    let samples = device["samples"].as_array().context("samples")?;
    let r2ts = samples.iter().find(|s| s["name"] == "vcp_iscsi_r2ts_total").context("R2Ts")?;
    ensure!(r2ts["value"].as_u64() > Some(0) && r2ts["labels"]["path"] == "0", "{r2ts}");
    Ok(())
}

#[test]
fn violations_retries_and_lost_sessions_are_told_by_name() -> Result<()> {
    let target =
        BadTarget::start("option blocks 2048\nread#1 add data0 data-sn 1\nread#3 sense 0x6 0x2900\n")?;
    let server = Server::start(&target.url(), &[])?;
    let mut driver = server.driver()?;
    for _ in 0..3 {
        driver.read(0, 4096)?;
    }
    target.now("reset")?;
    let page = server.page_that("a new session", |page| {
        page.disk("vcp_iscsi_reconnects_total", "").is_ok_and(|count| count >= 1.0)
    })?;
    driver.read(0, 4096)?;
    ensure!(page.disk("vcp_iscsi_violations_total", "violation=\"data_sn_gap\"")? >= 1.0);
    ensure!(page.disk("vcp_iscsi_retries_total", "cause=\"unit_attention\"")? >= 1.0);
    ensure!(page.disk("vcp_iscsi_sessions_lost_total", "")? >= 1.0);
    ensure!(page.disk("vcp_iscsi_reconnects_total", "")? >= 1.0);
    let repeated = page.disk("vcp_iscsi_repeated_total", "")?;
    let retried = page.disk("vcp_iscsi_retries_total", "cause=\"violation\"")?;
    ensure!(repeated + retried >= 1.0, "the READ that was damaged was repeated: {repeated}, {retried}");
    Ok(())
}

/// A closed command window is a stall, and the wait for it is the window's, not the target's.
#[test]
fn a_closed_command_window_is_seen() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(8 << 20))?;
    let server = Server::start(&target.url(0), &[])?;
    let mut driver = server.driver()?;
    Load::new(3, 256).run(&mut driver, 0, 32, 2000, |_| Ok(()))?;
    let page = server.page()?;
    let count =
        |stage: &str| page.disk("vcp_request_stage_seconds_count", &format!("op=\"read\",stage=\"{stage}\""));
    ensure!(count("window")? == count("target")? && count("window")? > 100.0);
    ensure!(page.disk("vcp_iscsi_window_stalls_total", "path=\"0\"").is_ok());
    ensure!(page.disk("vcp_requests_in_flight", "")? == 0.0);
    Ok(())
}

#[test]
fn the_page_is_served_over_tcp_as_well() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(1 << 20))?;
    let dir = tempfile::tempdir()?;
    let control = dir.path().join("ctl");
    let proc = vcp_tests::backend::serve(&dir.path().join("s"))?
        .args(["--metrics", "127.0.0.1:0", "--control"])
        .arg(&control)
        .arg(target.url(0))
        .spawn()?;
    proc.wait_line(vcp_tests::proc::Stream::Out, "ready:", vcp_tests::backend::START)?;
    let mut stream = std::os::unix::net::UnixStream::connect(&control)?;
    stream.write_all(b"{\"cmd\":\"status\"}\n")?;
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stream), &mut line)?;
    let status: serde_json::Value = serde_json::from_str(&line)?;
    let address = status["metrics_at"].as_str().context("metrics_at")?;
    let mut http = TcpStream::connect(address)?;
    http.set_read_timeout(Some(super::ANSWER))?;
    http.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    http.read_to_string(&mut text)?;
    Page::parse(text.split_once("\r\n\r\n").context("no body")?.1)?;
    Ok(())
}
