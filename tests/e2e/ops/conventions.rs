//! QEMU's conventions for vhost-user backends (docs/interop/vhost-user.rst, "Backend program conventions"), and what
//! service managers expect.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use vcp_tests::backend::START;
use vcp_tests::front::Driver;
use vcp_tests::proc::{Cmd, Stream};
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, pattern, tool};

use crate::support::{COMMAND, one_error, vcp_iscsi};

fn contrib(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib").join(name)
}

#[test]
fn capabilities_are_printed_whatever_else_is_given() -> Result<()> {
    for args in [
        &["--print-capabilities"][..],
        &["serve", "--print-capabilities"],
        &["--socket-path=/no/such/dir/s", "--print-capabilities", "nonsense"],
    ] {
        let text = vcp_iscsi(args)?.output(COMMAND)?;
        let value: Value = serde_json::from_str(&text)?;
        ensure!(value == json!({"type": "block", "features": ["read-only"]}), "{args:?}: {text}");
    }
    Ok(())
}

#[test]
fn the_description_is_what_qemu_documents() -> Result<()> {
    let text = std::fs::read_to_string(contrib("vhost-user/50-vcp-iscsi.json"))?;
    let value: Value = serde_json::from_str(&text)?;
    ensure!(value["type"] == "block" && value["description"].is_string(), "{text}");
    let binary = value["binary"].as_str().context("binary")?;
    ensure!(Path::new(binary).is_absolute() && binary.ends_with("/vcp-iscsi"), "{binary}");
    let known = ["description", "type", "binary", "tags"];
    let object = value.as_object().context("object")?;
    ensure!(object.keys().all(|key| known.contains(&key.as_str())), "{text}");
    Ok(())
}

#[test]
fn the_libvirt_example_is_valid_by_libvirts_schema() -> Result<()> {
    if !tool::have(&["virt-xml-validate", "xmllint"]) {
        return Ok(());
    }
    let example = contrib("libvirt/vcp-iscsi-disk.xml");
    let validate = |file: &Path| Cmd::new("virt-xml-validate").arg(file).arg("domain").run(COMMAND);
    let out = validate(&example)?;
    ensure!(out.status.success(), "{}{}", out.stdout, out.stderr);
    // And that it looks at all.
    let dir = tempfile::tempdir()?;
    let wrong = dir.path().join("wrong.xml");
    std::fs::write(&wrong, std::fs::read_to_string(&example)?.replace("'vhostuser'", "'vhost'"))?;
    ensure!(!validate(&wrong)?.status.success(), "any disk is valid");
    Ok(())
}

/// `vcp-iscsi --socket-path=S URL`, without a command: how a management layer starts a backend.
#[test]
fn the_command_may_be_left_out() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(1 << 20))?;
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("s");
    let arg = format!("--socket-path={}", socket.display());
    let proc = vcp_iscsi([&arg, "--read-only", &target.url(0)])?.spawn()?;
    proc.wait_line(Stream::Out, "ready:", START)?;
    let mut driver = Driver::connect(&socket, 1)?;
    driver.read(0, 4096)?;
    ensure!(driver.write(0, &[1; 512]).is_err(), "--read-only");
    drop(driver);
    let (status, _) = proc.terminate(COMMAND)?;
    ensure!(status.success(), "{status}");
    Ok(())
}

#[test]
fn a_listening_socket_is_taken_from_its_descriptor() -> Result<()> {
    if !tool::have(&["systemd-socket-activate"]) {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(1 << 20))?;
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("s");
    // It starts the program with the listening socket as descriptor 3 when the first connection waits.
    let proc = Cmd::new("systemd-socket-activate")
        .arg("-l")
        .arg(&socket)
        .arg(tool::ours("vcp-iscsi")?)
        .args(["serve", "--fd", "3", &target.url(0)])
        .spawn()?;
    proc.wait_line(Stream::Err, "Listening on", START)?;
    for n in 0..2 {
        let mut driver = Driver::connect(&socket, 1)?;
        driver.write(0, &pattern::make(n, 0, 4096))?;
        pattern::check(n, 0, &driver.read(0, 4096)?)?;
    }
    ensure!(proc.is_running(), "another front end may come");
    let (status, _) = proc.terminate(COMMAND)?;
    ensure!(status.success() && socket.exists(), "{status}; the file is not its own");
    Ok(())
}

#[test]
fn a_connected_socket_is_taken_from_its_descriptor() -> Result<()> {
    if !tool::have(&["systemd-socket-activate"]) {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(1 << 20))?;
    let dir = tempfile::tempdir()?;
    let (socket, log) = (dir.path().join("s"), dir.path().join("log"));
    let script = format!(
        "{} serve --fd 3 {} >{log} 2>&1; echo ended $? >>{log}",
        tool::ours("vcp-iscsi")?.display(),
        target.url(0),
        log = log.display()
    );
    // It starts the program for each connection, as descriptor 3.
    let proc = Cmd::new("systemd-socket-activate")
        .args(["--accept", "-l"])
        .arg(&socket)
        .args(["sh", "-c", &script])
        .spawn()?;
    proc.wait_line(Stream::Err, "Listening on", START)?;
    let mut driver = Driver::connect(&socket, 1)?;
    driver.write(0, &pattern::make(5, 0, 4096))?;
    pattern::check(5, 0, &driver.read(0, 4096)?)?;
    drop(driver);
    let end = std::time::Instant::now() + Duration::from_secs(20);
    loop {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        if text.contains("ended 0") {
            return Ok(());
        }
        ensure!(std::time::Instant::now() < end, "it does not end with its only front end: {text}");
        std::thread::yield_now();
    }
}

#[test]
fn a_descriptor_that_is_no_socket_is_named() -> Result<()> {
    let out = vcp_iscsi(["serve", "--fd", "77", "iscsi://127.0.0.1/iqn.2026-01.test:x/0"])?.run(COMMAND)?;
    one_error(&out, 1, &["descriptor 77"])
}

#[test]
fn the_service_manager_is_told() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(1 << 20))?;
    let dir = tempfile::tempdir()?;
    let manager = UnixDatagram::bind(dir.path().join("n"))?;
    manager.set_read_timeout(Some(START))?;
    let proc = vcp_tests::backend::serve(&dir.path().join("s"))?
        .env("NOTIFY_SOCKET", dir.path().join("n"))
        .arg(target.url(0))
        .spawn()?;
    let mut buf = [0; 256];
    let len = manager.recv(&mut buf).context("nothing was told")?;
    ensure!(&buf[..len] == b"READY=1", "{:?}", String::from_utf8_lossy(&buf[..len]));
    proc.wait_line(Stream::Out, "ready:", START)?;
    Ok(())
}

/// The unit template as the service manager itself reads it.
#[test]
fn the_unit_template_is_valid() -> Result<()> {
    if !tool::have(&["systemd-analyze"]) {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let text = std::fs::read_to_string(contrib("systemd/vcp-iscsi@.service"))?;
    // The program has to exist where the unit says.
    let text = text.replace("/usr/bin/vcp-iscsi", &tool::ours("vcp-iscsi")?.display().to_string());
    let unit = dir.path().join("vcp-iscsi@.service");
    std::fs::write(&unit, text)?;
    let out = Cmd::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit).run(COMMAND)?;
    let ours = out.stderr.lines().filter(|line| line.contains("vcp-iscsi")).collect::<Vec<_>>();
    ensure!(out.status.success() && ours.is_empty(), "{}: {}", out.status, out.stderr);
    Ok(())
}

/// What was negotiated is told once, before the line that says `ready`.
#[test]
fn the_negotiated_parameters_are_told_once() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(1 << 20).digests(true))?;
    let dir = tempfile::tempdir()?;
    let proc = vcp_tests::backend::serve(&dir.path().join("s"))?
        .args(["--header-digest", "crc32c", &target.url(0)])
        .spawn()?;
    proc.wait_line(Stream::Out, "ready:", START)?;
    let text = proc.stream(Stream::Out);
    let lines: Vec<&str> = text.lines().collect();
    ensure!(lines.len() == 2 && lines[1].starts_with("ready: "), "{text}");
    let wanted = [
        "session: disk0 ",
        target.iqn(),
        &target.portal().to_string(),
        "HeaderDigest CRC32C",
        "DataDigest none",
        "InitialR2T",
        "MaxBurstLength",
        "commands at once",
    ];
    for word in wanted {
        ensure!(lines[0].contains(word), "no {word:?} in {}", lines[0]);
    }
    Ok(())
}

/// Errors about a unit name portal, target and LUN.
#[test]
fn a_missing_lun_is_named_with_its_portal() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(1 << 20))?;
    let portal = target.portal().to_string();
    let out = vcp_iscsi(["info", &format!("iscsi://{portal}/{}/9", target.iqn())])?.run(COMMAND)?;
    one_error(&out, 1, &[target.iqn(), &portal, "no LUN 9", "it has 0"])
}
