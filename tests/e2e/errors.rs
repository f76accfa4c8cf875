//! Bad input: one clear line, the right exit code, in time.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use vcp_tests::backend::serve;
use vcp_tests::proc::Cmd;
use vcp_tests::proxy::{Proxy, Way};
use vcp_tests::target::{Kind, LunSpec, Spec, Target};
use vcp_tests::{Result, port, tool};

use crate::support::{COMMAND, one_error, vcp, vcp_iscsi};

/// A login that is not answered ends after the default limits: 5 s to connect, 10 s to log in.
const LOGIN_LIMIT: Duration = Duration::from_secs(15);

/// What is known to be wrong is told without waiting for any limit.
const AT_ONCE: Duration = Duration::from_secs(3);

fn target() -> Result<Target> {
    Target::start(Kind::Ours, &Spec::luns([LunSpec::new(1 << 20)]))
}

/// The same wrong URL by `info` and by `serve`, which must not become ready.
fn both_fail(url: &str, words: &[&str]) -> Result<()> {
    let out = vcp_iscsi(["info", url])?.run(COMMAND)?;
    one_error(&out, 1, words).with_context(|| format!("info {url}"))?;
    let dir = tempfile::tempdir()?;
    let out = serve(&dir.path().join("s"))?.arg(url).run(COMMAND)?;
    one_error(&out, 1, words).with_context(|| format!("serve {url}"))?;
    Ok(())
}

/// A listener that answers each connection with these bytes and then waits for its end.
fn answers(bytes: &'static [u8]) -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let addr = listener.local_addr()?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut stream = stream;
                let mut buf = [0; 4096];
                let _ = stream.read(&mut buf);
                let _ = stream.write_all(bytes);
                while stream.read(&mut buf).is_ok_and(|n| n > 0) {}
            });
        }
    });
    Ok(addr)
}

#[test]
fn portal_where_nothing_listens_is_named() -> Result<()> {
    let portal = format!("127.0.0.1:{}", port::free()?);
    both_fail(&format!("iscsi://{portal}/iqn.2026-01.test:x/0"), &[&portal, "connect"])?;
    let out = vcp_iscsi(["discover", &format!("iscsi://{portal}")])?.run(COMMAND)?;
    one_error(&out, 1, &[&portal])
}

#[test]
fn host_name_that_does_not_resolve_is_named() -> Result<()> {
    both_fail("iscsi://no-such-host.invalid/iqn.2026-01.test:x/0", &["no-such-host.invalid"])
}

#[test]
fn wrong_target_name_is_named() -> Result<()> {
    let target = target()?;
    both_fail(&format!("iscsi://{}/iqn.2026-01.test:nope/0", target.portal()), &["iqn.2026-01.test:nope"])
}

#[test]
fn wrong_lun_is_named() -> Result<()> {
    let target = target()?;
    both_fail(&format!("iscsi://{}/{}/7", target.portal(), target.iqn()), &[target.iqn(), "lun 7"])
}

#[test]
fn portal_that_never_answers_ends_in_time() -> Result<()> {
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let addr = silent.local_addr()?;
    let out = vcp_iscsi(["info", &format!("iscsi://{addr}/iqn.2026-01.test:x/0")])?.run(COMMAND)?;
    one_error(&out, 1, &["login", &addr.to_string()])?;
    ensure!(out.elapsed < LOGIN_LIMIT, "took {:?}", out.elapsed);
    Ok(())
}

#[test]
fn server_that_speaks_no_iscsi_is_told_apart() -> Result<()> {
    for bytes in [
        &b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"[..],
        b"\0",
        &[0xff; 512],
    ] {
        let addr = answers(bytes)?;
        let out = vcp_iscsi(["info", &format!("iscsi://{addr}/iqn.2026-01.test:x/0")])?.run(COMMAND)?;
        one_error(&out, 1, &[&addr.to_string()])?;
        ensure!(out.elapsed < AT_ONCE, "took {:?}", out.elapsed);
        let out = vcp_iscsi(["discover", &format!("iscsi://{addr}")])?.run(COMMAND)?;
        one_error(&out, 1, &[&addr.to_string()])?;
    }
    Ok(())
}

#[test]
fn target_that_closes_in_the_middle_is_told_at_every_place() -> Result<()> {
    let target = target()?;
    let proxy = Proxy::start(target.portal())?;
    proxy.record();
    let url = target.url_at(proxy.addr(), 0);
    vcp_iscsi(["info", &url])?.output(COMMAND)?;
    let whole = proxy.records().pop().context("nothing recorded")?.bytes(Way::ToInitiator).len() as u64;
    ensure!(whole > 500, "only {whole} bytes");
    // In the first header, between header and data of the login response, in each later answer; not in the logout,
    // after which nothing is left to fail.
    let mut places = vec![0, 1, 47, 48, 49, 60, 100];
    places.extend((1..8).map(|n| 200 + (whole - 400) * n / 8));
    for place in places {
        proxy.cut_after(Some((Way::ToInitiator, place)));
        let out = vcp_iscsi(["info", &url])?.run(COMMAND)?;
        one_error(&out, 1, &[&proxy.addr().to_string()])
            .with_context(|| format!("cut after {place} of {whole} bytes"))?;
        ensure!(out.elapsed < LOGIN_LIMIT, "cut after {place} bytes: took {:?}", out.elapsed);
    }
    Ok(())
}

#[test]
fn wrong_usage_is_exit_code_2() -> Result<()> {
    for args in [
        &["serve"][..],
        &["serve", "--socket-path", "/tmp/x"],
        &["info"],
        &["info", "http://127.0.0.1/x"],
        &["discover", "--no-such-option"],
        &["frobnicate"],
        &["serve", "--queues", "none", "--socket-path", "/tmp/x", "iscsi://127.0.0.1/iqn.2026-01.test:x/0"],
        &["info", "--header-digest", "md5", "iscsi://127.0.0.1/iqn.2026-01.test:x/0"],
    ] {
        let out = vcp_iscsi(args)?.run(COMMAND)?;
        ensure!(out.status.code() == Some(2), "{args:?}: {}: {}", out.status, out.stderr);
        ensure!(!out.stderr.is_empty() && out.stdout.is_empty(), "{args:?}: {}{}", out.stdout, out.stderr);
    }
    for args in
        [&["run", "--disk", "sokcet=x"][..], &["run", "--memory", "much"], &["bench", "blk"], &["nope"]]
    {
        let out = vcp(args)?.run(COMMAND)?;
        ensure!(out.status.code() == Some(2), "{args:?}: {}: {}", out.status, out.stderr);
    }
    Ok(())
}

#[test]
fn every_command_has_help_with_an_example() -> Result<()> {
    let commands = [
        ("vcp-iscsi", &["serve", "discover", "info"][..]),
        ("vcp", &["run", "check", "bench blk"]),
        ("iscsi-target", &["serve"]),
    ];
    for (program, subcommands) in commands {
        for subcommand in subcommands {
            let cmd = Cmd::new(tool::ours(program)?).args(subcommand.split(' ')).arg("--help");
            let help = cmd.output(COMMAND)?;
            ensure!(
                help.to_lowercase().contains("example"),
                "{program} {subcommand} --help has no example:\n{help}"
            );
        }
    }
    Ok(())
}

#[test]
fn socket_path_that_cannot_be_bound_is_named() -> Result<()> {
    let target = target()?;
    let path = Path::new("/no/such/directory/blk.sock");
    let out = serve(path)?.arg(target.url(0)).run(COMMAND)?;
    one_error(&out, 1, &["/no/such/directory/blk.sock"])
}

/// `vcp run` with a kernel that cannot be one.
#[test]
fn kernel_that_is_none_is_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let text = dir.path().join("text");
    std::fs::write(&text, "this is no kernel\n")?;
    let cut = dir.path().join("cut");
    // An ELF header and nothing behind it.
    std::fs::write(
        &cut,
        [&b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0"[..], &[0xff; 40]].concat(),
    )?;
    let empty = dir.path().join("empty");
    std::fs::write(&empty, "")?;
    for kernel in [&text, &cut, &empty, &dir.path().join("missing"), &dir.path().to_owned()] {
        let name = kernel.display().to_string();
        let out = vcp(["run", "--kernel", &name])?.run(COMMAND)?;
        one_error(&out, 1, &[&name])?;
    }
    Ok(())
}

#[test]
fn disk_socket_that_is_missing_is_named() -> Result<()> {
    let kernel = guest_images::bare::build()?;
    let out = vcp(["run", "--disk", "socket=/no/such/blk.sock", "--kernel"])?.arg(kernel).run(COMMAND)?;
    one_error(&out, 1, &["/no/such/blk.sock"])?;
    let out = vcp(["bench", "blk", "--socket", "/no/such/blk.sock"])?.run(COMMAND)?;
    one_error(&out, 1, &["/no/such/blk.sock"])
}

#[test]
fn disk_url_that_fails_is_named_by_the_monitor() -> Result<()> {
    let kernel = guest_images::bare::build()?;
    let portal = format!("127.0.0.1:{}", port::free()?);
    let disk = format!("url=iscsi://{portal}/iqn.2026-01.test:x/0");
    let out = vcp(["run", "--disk", &disk, "--kernel"])?.arg(kernel).run(COMMAND)?;
    ensure!(out.status.code() == Some(1), "{}: {}", out.status, out.stderr);
    ensure!(out.stderr.contains(&portal), "no {portal} in: {}", out.stderr);
    Ok(())
}

#[test]
fn refused_dev_kvm_is_told_with_what_to_do() -> Result<()> {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        tool::note_skip("needs root to become another user");
        return Ok(());
    }
    if !Path::new("/dev/kvm").exists() {
        tool::note_skip("there is no /dev/kvm to be refused");
        return Ok(());
    }
    if std::fs::metadata("/dev/kvm")?.permissions().mode() & 0o006 != 0 {
        tool::note_skip("/dev/kvm is open to everyone");
        return Ok(());
    }
    // The build directory may be closed to others.
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
    let program = dir.path().join("vcp");
    std::fs::copy(tool::ours("vcp")?, &program)?;
    let kernel = dir.path().join("kernel");
    std::fs::copy(guest_images::bare::build()?, &kernel)?;
    let out = Cmd::new(&program).args(["run", "--kernel"]).arg(&kernel).user(NOBODY).run(COMMAND)?;
    one_error(&out, 1, &["/dev/kvm"])?;
    let check = Cmd::new(&program).args(["check", "--json"]).user(NOBODY).run(COMMAND)?;
    let report: serde_json::Value = serde_json::from_str(&check.stdout).context("vcp check --json")?;
    ensure!(report["kvm"] == false, "{report}");
    Ok(())
}
