//! What an operator does with running guests: `vcp ctl`, `vcp top`, metrics, logs, files. The guests are bare-metal ones,
//! which run at full speed wherever KVM runs ring 3.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use guest_images::bare;
use rustix::process::Signal;
use serde_json::Value;
use vcp_tests::proc::{Cmd, Output, Proc, Stream};
use vcp_tests::screen::Screen;
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, port, tool};

use crate::monitor::ring3;
use crate::support::{COMMAND, one_error, vcp};

/// A guest that reads at random until it is ended.
struct Guest {
    _target: Target,
    monitor: Proc,
    socket: PathBuf,
}

impl Guest {
    /// Starts it with its API socket at `socket`, and with more options.
    fn start(socket: &Path, name: &str, more: &[&str]) -> Result<Self> {
        Self::start_beside(socket, name, more, Path::new(""))
    }

    /// The same where switches are in this directory.
    fn start_beside(socket: &Path, name: &str, more: &[&str], switches: &Path) -> Result<Self> {
        let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
        let monitor =
            vcp(["run", "--cmdline", "job=bench rw=randread secs=3600 region=8M qd=8", "--name", name])?
                .args(["--disk", &format!("url={}", target.url(0)), "--kernel"])
                .arg(bare::build()?)
                .arg("--api-socket")
                .arg(socket)
                .args(more)
                .env("RUST_LOG", "info")
                .env("VCP_SWITCHES", switches)
                .spawn()?;
        monitor.wait_line(Stream::Out, "ready:", COMMAND)?;
        Ok(Self { _target: target, monitor, socket: socket.to_owned() })
    }

    fn ctl(&self, args: &[&str]) -> Result<Output> {
        vcp(["ctl", "--api-socket"])?.arg(&self.socket).args(args).run(COMMAND)
    }

    /// The same, which must do it.
    fn does(&self, args: &[&str]) -> Result<String> {
        vcp(["ctl", "--api-socket"])?.arg(&self.socket).args(args).output(COMMAND)
    }

    fn status(&self) -> Result<Value> {
        serde_json::from_str(&self.does(&["status", "--json"])?).context("status is no JSON")
    }

    /// Waits until the status is as wanted.
    fn wait(&self, what: &str, good: impl Fn(&Value) -> bool) -> Result<Value> {
        let end = Instant::now() + COMMAND;
        loop {
            let status = self.status()?;
            if good(&status) {
                return Ok(status);
            }
            ensure!(Instant::now() < end, "{what}: not so after {COMMAND:?}: {status}");
        }
    }
}

fn reads(status: &Value) -> u64 {
    status["vcps"][0]["read"]["ok"].as_u64().unwrap_or(0)
}

#[test]
fn ctl_shows_stops_and_ends_a_guest() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let guest = Guest::start(&dir.path().join("api"), "vm1", &[])?;
    let status = guest.wait("the guest reads", |status| reads(status) > 0)?;
    ensure!(status["name"] == "vm1" && status["machine"]["state"] == "running", "{status}");
    ensure!(status["machine"]["pid"] == guest.monitor.pid(), "{status}");
    let vcp = &status["vcps"][0];
    ensure!(vcp["answers"] == true && vcp["device"] == "disk0", "{status}");
    let table = guest.does(&["status"])?;
    ensure!(table.starts_with("vm1: running") && table.contains("connected"), "{table}");
    ensure!(table.lines().all(|line| line.chars().count() <= 80), "wider than 80:\n{table}");

    guest.does(&["pause"])?;
    guest.does(&["pause"])?;
    // What was in flight ends; then nothing is read.
    let rest = guest.wait("nothing in flight", |status| status["vcps"][0]["inflight"] == 0)?;
    ensure!(rest["machine"]["state"] == "paused", "{rest}");
    let still = guest.status()?;
    ensure!(
        reads(&still) == reads(&rest),
        "it reads while it is paused: {} and {}",
        reads(&rest),
        reads(&still)
    );
    guest.does(&["resume"])?;
    guest.wait("the guest goes on", |status| reads(status) > reads(&rest))?;

    one_error(&guest.ctl(&["remove-disk", "disk9"])?, 1, &["disk9"])?;
    one_error(&guest.ctl(&["pin", "vcpu7", "0"])?, 1, &["vCPU 7"])?;
    one_error(&guest.ctl(&["log-level", "[["])?, 2, &["log filter"])?;
    one_error(&guest.ctl(&["add-disk", "sokcet=/x"])?, 2, &["did you mean", "socket"])?;
    guest.does(&["log-level", "debug"])?;
    guest.does(&["pause"])?;
    guest.monitor.wait_line(Stream::Err, "command=Pause", COMMAND)?;

    // A paused guest can be ended, too.
    guest.does(&["kill"])?;
    let status = guest.monitor.wait(COMMAND)?;
    ensure!(status.success(), "{status}: {}", guest.monitor.tail());
    ensure!(!guest.socket.exists(), "its socket is left");
    one_error(&guest.ctl(&["status"])?, 1, &["--api-socket"])?;
    Ok(())
}

#[test]
fn a_vcp_that_is_killed_or_restarted_shows_in_status() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let guest = Guest::start(&dir.path().join("api"), "vm1", &[])?;
    let backend = |status: &Value| status["machine"]["devices"][0]["backend"].clone();
    let first = backend(&guest.wait("the guest reads", |status| reads(status) > 0)?);
    let pid = first["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).context("no pid")?;
    let pid = rustix::process::Pid::from_raw(pid).context("no pid")?;
    rustix::process::kill_process(pid, Signal::KILL)?;
    let second =
        guest.wait("another VCP reads", |status| backend(status)["restarts"] == 1 && reads(status) > 0)?;
    ensure!(backend(&second)["pid"] != first["pid"] && backend(&second)["connected"] == true, "{second}");
    ensure!(
        guest.does(&["status"])?.contains("last lost: "),
        "the table does not say why: {}",
        guest.does(&["status"])?
    );

    // Limits hold for the process that serves, and for the one after it.
    let limited = |guest: &Guest| -> Result<f64> {
        // Beyond what a bucket that is full lets pass at once.
        let start = reads(&guest.status()?);
        let before = reads(&guest.wait("the first reads", |status| reads(status) > start + 120)?);
        let begun = Instant::now();
        let after = reads(&guest.wait("some reads", |status| reads(status) > before + 30)?);
        Ok((after - before) as f64 / begun.elapsed().as_secs_f64())
    };
    let free = limited(&guest)?;
    guest.does(&["limit", "disk0", "--iops", "50"])?;
    let held = limited(&guest)?;
    ensure!(held < 120.0 && held < free, "not limited to 50 a second: {held} after {free}");
    guest.does(&["restart-vcp", "disk0"])?;
    guest.wait("a third one reads", |status| backend(status)["restarts"] == 2 && reads(status) > 0)?;
    let held = limited(&guest)?;
    ensure!(held < 120.0, "the new process is not limited: {held}");
    guest.does(&["limit", "disk0", "--iops", "0"])?;
    one_error(&guest.ctl(&["limit", "net9", "--iops", "1"])?, 1, &["net9"])?;
    let upgraded = guest.does(&["restart-vcp", "disk0", "--upgrade"]).and_then(|_| guest.status())?;
    ensure!(backend(&upgraded)["restarts"] == 2 && backend(&upgraded)["upgrades"] == 1, "{upgraded}");
    let (status, _) = guest.monitor.terminate(COMMAND)?;
    ensure!(status.success() && !guest.socket.exists(), "{status}: {}", guest.monitor.tail());
    Ok(())
}

#[test]
fn a_network_device_has_a_vcp_of_its_own() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let forward = port::free()?;
    let net = format!("user,hostfwd=tcp:127.0.0.1:{forward}-22");
    let guest = Guest::start(&dir.path().join("api"), "vm1", &["--net", &net])?;
    let backend = |status: &Value| {
        let devices = status["machine"]["devices"].as_array().cloned().unwrap_or_default();
        devices.into_iter().find(|device| device["name"] == "net0").unwrap_or_default()["backend"].clone()
    };
    let status = guest.wait("figures of the network VCP", |status| status["vcps"][1]["answers"] == true)?;
    ensure!(backend(&status)["connected"] == true && status["vcps"][1]["device"] == "net0", "{status}");
    TcpStream::connect(("127.0.0.1", forward)).context("the forwarded port is not listened on")?;
    let pid = |status: &Value| backend(status)["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    let first = pid(&status).and_then(rustix::process::Pid::from_raw).context("no pid")?;
    rustix::process::kill_process(first, Signal::KILL)?;
    let again = |status: &Value| backend(status)["restarts"] == 1 && backend(status)["connected"] == true;
    let status = guest.wait("another network VCP", again)?;
    ensure!(pid(&status) != Some(first.as_raw_nonzero().get()), "{status}");
    let (status, _) = guest.monitor.terminate(COMMAND)?;
    ensure!(status.success(), "{status}: {}", guest.monitor.tail());

    let kernel = bare::build()?;
    let run = |net: &str, more: &[&str]| -> Result<Output> {
        vcp(["run", "--net", net])?.args(more).arg("--kernel").arg(&kernel).run(COMMAND)
    };
    one_error(&run("user", &["--vcp-net", "/nowhere/vcp-net"])?, 1, &["net0", "--vcp-net"])?;
    one_error(&run("switch=no-such", &[])?, 1, &["net0", "vcp-net serve --switch no-such", "socket="])?;
    Ok(())
}

#[test]
fn guests_join_a_switch_by_its_name() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let switches = dir.path().join("switches");
    let serve = || -> Result<Proc> {
        let switch = Cmd::new(tool::ours("vcp-net")?)
            .args(["serve", "--switch", "lan,ports=2"])
            .env("VCP_SWITCHES", &switches)
            .spawn()?;
        switch.wait_line(Stream::Out, "ready:", COMMAND)?;
        Ok(switch)
    };
    let switch = serve()?;
    let start =
        |name: &str| Guest::start_beside(&dir.path().join(name), name, &["--net", "switch=lan"], &switches);
    let connected = |status: &Value| {
        let devices = status["machine"]["devices"].as_array().cloned().unwrap_or_default();
        devices.iter().any(|device| device["name"] == "net0" && device["backend"]["connected"] == true)
    };
    let (first, second) = (start("a")?, start("b")?);
    for guest in [&first, &second] {
        ensure!(connected(&guest.status()?), "{}", guest.status()?);
    }
    let out = vcp(["run", "--net", "switch=lan", "--kernel"])?
        .arg(bare::build()?)
        .env("VCP_SWITCHES", &switches)
        .run(COMMAND)?;
    one_error(&out, 1, &["net0", "no port of the switch lan is free", "it has 2"])?;
    // A port is free again when its guest is gone, however that went.
    first.monitor.kill()?;
    let end = Instant::now() + COMMAND;
    let third = loop {
        match start("c") {
            Ok(guest) => break guest,
            Err(e) => ensure!(Instant::now() < end, "the port is not given back: {e:#}"),
        }
    };
    // The switch dies, and another one takes its place: both go on.
    switch.kill()?;
    let _switch = serve()?;
    for guest in [&second, &third] {
        guest.wait("the net is back", |status| {
            let devices = status["machine"]["devices"].as_array().cloned().unwrap_or_default();
            connected(status) && devices.iter().any(|d| d["name"] == "net0" && d["backend"]["restarts"] == 1)
        })?;
    }
    Ok(())
}

#[test]
fn several_guests_each_have_their_monitor() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let first = Guest::start(&dir.path().join("a.sock"), "vm-a", &[])?;
    let second = Guest::start(&dir.path().join("b.sock"), "vm-b", &[])?;
    for guest in [&first, &second] {
        guest.wait("the guest reads", |status| reads(status) > 0)?;
    }
    // Somebody else's socket is not taken.
    let out =
        vcp(["run", "--api-socket"])?.arg(&first.socket).arg("--kernel").arg(bare::build()?).run(COMMAND)?;
    one_error(&out, 1, &["in use", "a.sock"])?;
    ensure!(first.status()?["name"] == "vm-a", "the first one's socket is another's now");

    let rows = vcp(["top", "-d", "0.5", "-n", "2", "-S"])?.arg(dir.path()).output(COMMAND)?;
    ensure!(!rows.contains('\u{1b}'), "escape sequences in a pipe: {rows:?}");
    for name in ["vm-a", "vm-b"] {
        let of = |what: &str| {
            rows.lines().filter(|line| line.contains(&format!(" {name} {what} "))).collect::<Vec<_>>()
        };
        ensure!(of("guest").len() == 2 && of("vcpu").len() == 2, "{rows}");
        for row in of("vcp") {
            let value = |key: &str| row.split(' ').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
            let reads: f64 =
                value("reads").and_then(|v| v.parse().ok()).with_context(|| format!("no reads: {row}"))?;
            ensure!(reads > 0.0 && value("state") == Some("up") && value("p99_ns") != Some("-"), "{row}");
            let load = ["busy", "look", "sleep"]
                .map(|part| value(part).and_then(|v| v.parse::<f64>().ok()).unwrap_or(9.0));
            ensure!((load.iter().sum::<f64>() - 1.0).abs() < 0.01, "the load is not a whole: {row}");
        }
    }

    // One monitor dies without a word: the other is as it was, and its name can be used again.
    first.monitor.kill()?;
    ensure!(
        std::fs::symlink_metadata(&first.socket)?.file_type().is_socket(),
        "a killed process has removed a file"
    );
    let out = vcp(["top", "-n", "1", "-d", "0.1", "-S"])?.arg(dir.path()).output(COMMAND)?;
    ensure!(out.contains(" vm-b guest ") && !out.contains(" vm-a guest state=running"), "{out}");
    let third = Guest::start(&first.socket, "vm-c", &[])?;
    ensure!(third.status()?["name"] == "vm-c");
    Ok(())
}

#[test]
fn top_is_a_live_view_of_80_columns() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let guest = Guest::start(&dir.path().join("vm1.sock"), "vm1", &[])?;
    let command = format!("{} top -d 0.3 -S {}", tool::ours("vcp")?.display(), dir.path().display());
    let Some(screen) = Screen::start(&command)? else { return Ok(()) };
    let line = |lines: &[String], start: &str| lines.iter().find(|line| line.starts_with(start)).cloned();
    let is_live = |lines: &[String]| line(lines, " disk0").is_some_and(|line| line.matches('%').count() == 3);
    let lines = screen.wait("a line with the VCP's load", COMMAND, is_live)?;
    ensure!(lines[0].starts_with("vcp top") && lines[0].contains("1 of 1 guests"), "{lines:#?}");
    ensure!(line(&lines, "vm1  running").is_some() && line(&lines, " vCPU").is_some(), "{lines:#?}");
    let vcp = line(&lines, " disk0").unwrap_or_default();
    let columns: Vec<&str> = vcp.split_whitespace().collect();
    ensure!(columns.len() == 13, "not 13 columns: {vcp}");
    ensure!(columns[5] != "0" && columns[10].ends_with('s'), "no reads or no latency: {vcp}");

    screen.press("v")?;
    screen
        .wait("the view without vCPUs", COMMAND, |lines| line(lines, " vCPU").is_none() && is_live(lines))?;
    screen.press("Space")?;
    screen.wait("the view that stands still", COMMAND, |lines| lines[0].contains("STOPPED"))?;
    screen.press("Space")?;
    guest.does(&["pause"])?;
    screen.wait("the guest paused", COMMAND, |lines| line(lines, "vm1  paused").is_some())?;
    screen.press("q")?;
    let lines = screen.wait("its exit code", COMMAND, |lines| line(lines, "exit code").is_some())?;
    ensure!(line(&lines, "exit code 0").is_some() && line(&lines, "vcp top").is_none(), "{lines:#?}");
    Ok(())
}

#[test]
fn metrics_are_served_to_prometheus() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let address = format!("127.0.0.1:{}", port::free()?);
    let guest = Guest::start(&dir.path().join("api"), "vm1", &["--metrics", &address])?;
    let page = || -> Result<String> {
        let mut stream = TcpStream::connect(&address)?;
        stream.set_read_timeout(Some(COMMAND))?;
        write!(stream, "GET /metrics HTTP/1.1\r\nhost: {address}\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    let value = |page: &str, name: &str| -> Option<f64> {
        let line = page.lines().find(|line| line.starts_with(name))?;
        line.rsplit(' ').next()?.parse().ok()
    };
    guest.wait("the guest reads", |status| reads(status) > 0)?;
    let (before, end) = (page()?, Instant::now() + COMMAND);
    let reads = r#"vcp_requests_total{guest="vm1",device="disk0",op="read",result="ok"}"#;
    let first = value(&before, reads).with_context(|| format!("no {reads} in {before}"))?;
    while value(&page()?, reads).is_none_or(|now| now <= first) {
        ensure!(Instant::now() < end, "the counter does not grow");
    }
    for name in [
        r#"vcp_vcpu_exits_total{guest="vm1",vcpu="0",kind="io_out"}"#,
        r#"vcp_loop_time_seconds_total{guest="vm1",device="disk0",part="busy"}"#,
    ] {
        ensure!(value(&before, name).is_some_and(|value| value > 0.0), "no {name} in {before}");
    }
    Ok(())
}

#[test]
fn a_printed_configuration_gives_the_same_guest() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let disk = format!("url={},read-only", target.url(0));
    let kernel = bare::build()?;
    let run = |more: &[&str]| -> Result<Cmd> {
        let cmd = vcp([
            "run",
            "--cmdline",
            "job=bench rw=randread secs=1 region=8M",
            "--memory",
            "64M",
            "--disk",
            &disk,
        ])?;
        Ok(cmd.args(more).arg("--kernel").arg(&kernel))
    };
    let text = run(&["--print-config"])?.output(COMMAND)?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("vm.toml");
    std::fs::write(&file, &text)?;
    let again = vcp(["run", "--print-config"])?.arg(&file).output(COMMAND)?;
    ensure!(again == text, "{again}\n---\n{text}");
    let out = vcp(["run"])?.arg(&file).run(COMMAND)?;
    ensure!(out.status.success() && out.stdout.contains("64 MiB, 1 disks"), "{}{}", out.stdout, out.stderr);

    std::fs::write(&file, text.replace("memory", "memroy"))?;
    one_error(&vcp(["run"])?.arg(&file).run(COMMAND)?, 2, &["vm.toml", "line", "did you mean `memory`"])?;
    one_error(&vcp(["run", "--kernel", "/k", "--net", "usr"])?.run(COMMAND)?, 2, &["did you mean", "user"])?;
    Ok(())
}

#[test]
fn logs_can_be_json_of_monitor_and_vcps() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let guest = Guest::start(&dir.path().join("api"), "vm1", &["--log-json"])?;
    guest.wait("the guest reads", |status| reads(status) > 0)?;
    guest.does(&["kill"])?;
    guest.monitor.wait(COMMAND)?;
    let text = guest.monitor.stream(Stream::Err);
    let mut targets = Vec::new();
    for line in text.lines() {
        let Ok(entry) = serde_json::from_str::<Value>(line) else { bail!("not JSON: {line}") };
        ensure!(
            entry["timestamp"].is_string() && entry["level"].is_string() && entry["message"].is_string(),
            "{line}"
        );
        targets.push(entry["target"].as_str().unwrap_or_default().to_owned());
    }
    for program in ["vmm", "vcp_"] {
        ensure!(
            targets.iter().any(|target| target.starts_with(program)),
            "nothing of {program}: {targets:?}"
        );
    }
    Ok(())
}
