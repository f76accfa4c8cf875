//! A CHAP secret is seen nowhere: process list, environment, logs, status, metrics, captures.

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::json;
use vcp_tests::front::Op;
use vcp_tests::target::{Chap, Kind, Spec, Target};
use vcp_tests::{Result, pattern};

use super::{Server, get};
use crate::support::{COMMAND, SecretFiles, vcp_iscsi};

/// All files below a directory.
fn contents(dir: &Path) -> Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)? {
        all.push(fs::read(entry?.path())?);
    }
    Ok(all)
}

fn has(haystack: &[u8], needle: &str) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle.as_bytes())
}

#[test]
fn a_secret_is_nowhere_to_be_seen() -> Result<()> {
    let chap = Chap::mutual();
    let target = Target::start(Kind::Ours, &Spec::disk(8 << 20).chap(chap.clone()))?;
    let files = SecretFiles::new(&chap)?;
    let mut args = files.args();
    args.extend(["--log", "trace"]);
    let server = Server::start(&target.url(0), &args)?;
    let mut driver = server.driver()?;
    driver.write(0, &pattern::make(1, 0, 65536))?;
    // The session is lost and regained: another login, at trace level, and a capture of what led to it.
    let mut target = target;
    target.restart()?;
    driver.submit(0, &Op::Read { offset: 0, len: 4096 })?;
    driver.wait(0, COMMAND)?;
    server.ask(&json!({"cmd": "dump"}))?;
    let proc = format!("/proc/{}", server.proc.pid());
    let mut seen: Vec<(&str, Vec<u8>)> = vec![
        ("the process list", fs::read(format!("{proc}/cmdline"))?),
        ("the environment", fs::read(format!("{proc}/environ"))?),
        ("the log", server.proc.text().into_bytes()),
        ("the status", server.ask(&json!({"cmd": "status"}))?.to_string().into_bytes()),
        ("the metrics", server.ask(&json!({"cmd": "metrics"}))?.to_string().into_bytes()),
        ("the page", get(&server.dir.path().join("metrics.sock"), "/metrics")?.into_bytes()),
    ];
    let captures = contents(&server.dir.path().join("captures"))?;
    ensure!(!captures.is_empty(), "no capture");
    seen.extend(captures.into_iter().map(|bytes| ("a capture", bytes)));
    let mutual = chap.mutual.as_ref().context("mutual")?.1.clone();
    for (place, bytes) in &seen {
        for secret in [&chap.secret, &mutual] {
            ensure!(!has(bytes, secret), "a secret is in {place}");
        }
    }
    // Nor is what is computed from them: no login is recorded.
    for (_, bytes) in seen.iter().filter(|(place, _)| *place == "a capture") {
        ensure!(!has(bytes, "CHAP_") && !has(bytes, "AuthMethod"), "a login is in a capture");
    }
    Ok(())
}

/// A URL that a user types stays in the process list, which no program can prevent for the time of its start; it is
/// told, once, what to do instead.
#[test]
fn a_password_on_the_command_line_is_warned_of() -> Result<()> {
    let chap = Chap::one_way();
    let target = Target::start(Kind::Ours, &Spec::disk(1 << 20).chap(chap.clone()))?;
    let url = target.url(0).replace("iscsi://", &format!("iscsi://{}%{}@", chap.user, chap.secret));
    let out = vcp_iscsi(["info", &url])?.run(COMMAND)?;
    ensure!(out.status.success(), "{}", out.stderr);
    ensure!(
        out.stderr.contains("process list") && out.stderr.contains("--chap-secret-file"),
        "{}",
        out.stderr
    );
    ensure!(out.stderr.lines().count() == 1 && !out.stderr.contains(&chap.secret), "{}", out.stderr);
    ensure!(!out.stdout.contains(&chap.secret));
    let server = Server::start(&url, &[])?;
    ensure!(server.proc.text().contains("process list"), "{}", server.proc.tail());
    ensure!(!server.proc.text().contains(&chap.secret));
    Ok(())
}
