//! CHAP, one-way and mutual: the right secrets log in, wrong ones are refused, none is ever shown.

use anyhow::{Context, ensure};
use vcp_tests::backend::{Backend, serve};
use vcp_tests::front::Driver;
use vcp_tests::proc::Stream;
use vcp_tests::target::{self, Chap, Kind, Spec, Target};
use vcp_tests::{Result, pattern, procfs};

use crate::support::{COMMAND, SecretFiles, one_error, vcp_iscsi};

fn with(kind: Kind, chap: &Chap) -> Result<Option<Target>> {
    if !target::have(kind) {
        return Ok(None);
    }
    Target::start(kind, &Spec::disk(8 << 20).chap(chap.clone())).map(Some)
}

fn secrets(chap: &Chap) -> Vec<&str> {
    let mutual = chap.mutual.iter().map(|(_, secret)| secret.as_str());
    std::iter::once(chap.secret.as_str()).chain(mutual).collect()
}

fn logs_in(kind: Kind, chap: &Chap) -> Result<()> {
    let Some(target) = with(kind, chap)? else { return Ok(()) };
    let files = SecretFiles::new(chap)?;
    let mut args = files.args();
    args.extend(["--log", "trace"]);
    let backend = Backend::vcp_iscsi(&target.url(0), &args)?;
    let mut driver = Driver::connect(backend.socket(), 1)?;
    driver.write(0, &pattern::make(1, 0, 65536))?;
    pattern::check(1, 0, &driver.read(0, 65536)?)?;
    drop(driver);
    let (status, _) = backend.proc().terminate(COMMAND)?;
    ensure!(status.success(), "{status}");
    let log = backend.proc().text();
    for secret in secrets(chap) {
        ensure!(!log.contains(secret), "{kind}: the secret is in the log");
    }
    Ok(())
}

/// Runs `info` with these secrets; it must be refused in one line that shows none of them.
fn refused(target: &Target, offered: &Chap, words: &[&str]) -> Result<()> {
    let files = SecretFiles::new(offered)?;
    let out = vcp_iscsi(["info"])?.args(files.args()).arg(target.url(0)).run(COMMAND)?;
    one_error(&out, 1, words).with_context(|| format!("{} as {offered:?}", target.kind()))?;
    for secret in secrets(offered) {
        ensure!(!out.stderr.contains(secret) && !out.stdout.contains(secret), "the secret is in the error");
    }
    Ok(())
}

fn refuses(kind: Kind, chap: &Chap) -> Result<()> {
    let Some(target) = with(kind, chap)? else { return Ok(()) };
    let wrong = Chap { secret: "WrongSecret999".into(), ..chap.clone() };
    refused(&target, &wrong, &["login", target.iqn(), "authentication"])?;
    let nobody = Chap { user: "nobody".into(), ..chap.clone() };
    refused(&target, &nobody, &["login", target.iqn()])?;
    // No secret at all.
    let out = vcp_iscsi(["info", &target.url(0)])?.run(COMMAND)?;
    one_error(&out, 1, &["login", target.iqn()])?;
    if let Some((user, _)) = &chap.mutual {
        // The target cannot prove that it knows ours.
        let wrong = Chap { mutual: Some((user.clone(), "WrongMutual999".into())), ..chap.clone() };
        refused(&target, &wrong, &["login", target.iqn()])?;
    }
    Ok(())
}

/// By the name that standards and people use.
#[test]
fn info_names_the_algorithm() -> Result<()> {
    let chap = Chap::one_way();
    let Some(target) = with(Kind::Ours, &chap)? else { return Ok(()) };
    let files = SecretFiles::new(&chap)?;
    let text = vcp_iscsi(["info", "--json"])?.args(files.args()).arg(target.url(0)).output(COMMAND)?;
    let value: serde_json::Value = serde_json::from_str(&text)?;
    ensure!(value["session"]["chap"] == "SHA3-256", "{text}");
    Ok(())
}

#[test]
fn chap_logs_in_at_tgtd() -> Result<()> {
    logs_in(Kind::Tgtd, &Chap::one_way())
}

#[test]
fn chap_logs_in_at_istgt() -> Result<()> {
    logs_in(Kind::Istgt, &Chap::one_way())
}

#[test]
fn chap_logs_in_at_our_target() -> Result<()> {
    logs_in(Kind::Ours, &Chap::one_way())
}

/// Line 40 of the checklist, RFC 7143 12.1.3.
#[test]
fn mutual_chap_logs_in_at_tgtd() -> Result<()> {
    logs_in(Kind::Tgtd, &Chap::mutual())
}

#[test]
fn mutual_chap_logs_in_at_istgt() -> Result<()> {
    logs_in(Kind::Istgt, &Chap::mutual())
}

#[test]
fn mutual_chap_logs_in_at_our_target() -> Result<()> {
    logs_in(Kind::Ours, &Chap::mutual())
}

#[test]
fn wrong_chap_secret_is_refused_by_tgtd() -> Result<()> {
    refuses(Kind::Tgtd, &Chap::one_way())
}

#[test]
fn wrong_chap_secret_is_refused_by_istgt() -> Result<()> {
    refuses(Kind::Istgt, &Chap::one_way())
}

#[test]
fn wrong_chap_secret_is_refused_by_our_target() -> Result<()> {
    refuses(Kind::Ours, &Chap::one_way())
}

#[test]
fn wrong_mutual_chap_secret_is_refused_with_tgtd() -> Result<()> {
    refuses(Kind::Tgtd, &Chap::mutual())
}

#[test]
fn wrong_mutual_chap_secret_is_refused_with_istgt() -> Result<()> {
    refuses(Kind::Istgt, &Chap::mutual())
}

/// Line 40 of the checklist, RFC 7143 12.1.3 and 9.2.1: the target has to prove itself before full feature phase.
#[test]
fn wrong_mutual_chap_secret_is_refused_with_our_target() -> Result<()> {
    refuses(Kind::Ours, &Chap::mutual())
}

#[test]
fn secret_in_a_url_file_is_in_no_process_list() -> Result<()> {
    let chap = Chap::one_way();
    let target = Target::start(Kind::Ours, &Spec::disk(8 << 20).chap(chap.clone()))?;
    let dir = tempfile::tempdir()?;
    let url = target.url(0).replace("iscsi://", &format!("iscsi://{}%{}@", chap.user, chap.secret));
    let file = dir.path().join("url");
    std::fs::write(&file, url)?;
    let socket = dir.path().join("blk.sock");
    let proc = serve(&socket)?.arg("--url-file").arg(&file).spawn()?;
    proc.wait_line(Stream::Out, "ready:", COMMAND)?;
    let mut driver = Driver::connect(&socket, 1)?;
    driver.write(0, &pattern::make(1, 0, 4096))?;
    let line = procfs::cmdline(proc.pid())?;
    ensure!(!line.contains(&chap.secret), "the secret is in {line}");
    ensure!(!proc.text().contains(&chap.secret), "the secret is in the log");
    Ok(())
}
