//! Hand-over of a running `vcp-iscsi` to a new process under a verifying load: no login, no lost or repeated request, and
//! whatever goes wrong, the old process goes on.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;
use vcp_tests::backend::{START, serve};
use vcp_tests::front::REQUEST;
use vcp_tests::guest::QemuGuest;
use vcp_tests::proc::{Cmd, Output, Proc, Stream};
use vcp_tests::proxy::Proxy;
use vcp_tests::survivor::{Event, Survivor};
use vcp_tests::target::{self, Kind, Spec, Target};
use vcp_tests::{Result, tool};

use crate::kill::{FIO, Load, QUEUES};

/// How long an upgrade may take on a loaded machine, the start of the new process included.
const UPGRADE: Duration = Duration::from_secs(60);
/// Ends come within this.
const END: Duration = Duration::from_secs(20);

/// A `vcp-iscsi serve` with a control socket; the process that was started first.
struct Server {
    proc: Proc,
    socket: PathBuf,
    control: PathBuf,
    _dir: tempfile::TempDir,
}

impl Server {
    fn start(url: &str, args: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("vcp-upgrade-").tempdir()?;
        let (socket, control) = (dir.path().join("blk.sock"), dir.path().join("ctl.sock"));
        let proc = serve(&socket)?
            .env("RUST_LOG", "info")
            .env("NO_COLOR", "1")
            .args(["--queues", &QUEUES.to_string(), "--control"])
            .arg(&control)
            .args(args)
            .arg(url)
            .spawn()?;
        proc.wait_line(Stream::Out, "ready:", START)?;
        Ok(Self { proc, socket, control, _dir: dir })
    }

    /// `vcp-iscsi upgrade`, with further arguments.
    fn upgrade(&self, args: &[&str]) -> Result<Output> {
        Cmd::new(tool::ours("vcp-iscsi")?)
            .args(["upgrade", "--control"])
            .arg(&self.control)
            .args(args)
            .run(UPGRADE)
    }

    fn ask(&self, cmd: &str) -> Result<Value> {
        use std::io::{BufRead, BufReader, Write};
        let mut stream = std::os::unix::net::UnixStream::connect(&self.control)?;
        stream.set_read_timeout(Some(END))?;
        writeln!(stream, "{}", serde_json::json!({ "cmd": cmd }))?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    /// Sessions that stand.
    fn paths_up(&self) -> Result<u64> {
        let status = self.ask("status")?;
        let paths = status["devices"][0]["status"]["engine"]["paths"].as_array().context("paths")?;
        Ok(paths.iter().filter(|path| path["state"] == "up").count() as u64)
    }

    /// The process that owns the disk now.
    fn owner(&self) -> Result<u64> {
        self.ask("status")?["pid"].as_u64().context("pid")
    }
}

/// What was measured of one hand-over, in milliseconds.
struct Pause {
    stopped: f64,
    gap: f64,
}

/// Runs `work` beside a verifying load. Nothing may come between the front end and its backend. Returns what `work` did
/// and the longest time without an answer.
fn under_load<T>(
    server: &Server,
    packed: bool,
    work: impl FnOnce(&dyn Fn() -> Result<()>) -> Result<T>,
) -> Result<(T, Duration, u64)> {
    let mut front = Survivor::new(QUEUES, packed)?;
    front.connect(&server.socket)?;
    let mut load = Load::new(0x0dd_5eed);
    let (end, answers) = (AtomicBool::new(false), std::sync::atomic::AtomicU64::new(0));
    let (front, load, end, answers) = (&mut front, &mut load, &end, &answers);
    let (result, longest) = std::thread::scope(|scope| -> Result<(T, Duration)> {
        let loading = scope.spawn(move || -> Result<Duration> {
            let (mut longest, mut last) = (Duration::ZERO, Instant::now());
            while !end.load(Ordering::Relaxed) {
                load.fill(front)?;
                ensure!(front.wait(REQUEST)? == Event::Answers, "the front end lost its backend");
                load.collect(front)?;
                longest = longest.max(last.elapsed());
                last = Instant::now();
                answers.store(load.done, Ordering::Relaxed);
            }
            load.finish(front)?;
            answers.store(load.done, Ordering::Relaxed);
            Ok(longest)
        });
        let progress = || -> Result<()> {
            let (from, by) = (answers.load(Ordering::Relaxed), Instant::now() + REQUEST);
            while answers.load(Ordering::Relaxed) < from + 500 {
                ensure!(!loading.is_finished() && Instant::now() < by, "the load makes no progress");
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        };
        let result = work(&progress);
        end.store(true, Ordering::Relaxed);
        let longest = loading.join().expect("the load does not panic").context("under load");
        Ok((result?, longest?))
    })?;
    Ok((result, longest, answers.load(Ordering::Relaxed)))
}

fn quantile(sorted: &[f64], quantile: f64) -> f64 {
    let at = ((sorted.len() - 1) as f64 * quantile).round() as usize;
    sorted[at]
}

/// `count` hand-overs one after the other, each to a process of its own.
fn in_a_row(kind: Kind, packed: bool, count: usize, args: &[&str]) -> Result<()> {
    in_a_row_by(1, kind, packed, count, args)
}

/// As [`in_a_row`], with this many sessions through one portal.
fn in_a_row_by(sessions: u64, kind: Kind, packed: bool, count: usize, args: &[&str]) -> Result<()> {
    if !target::have(kind) {
        return Ok(());
    }
    let target = Target::start(kind, &Spec::disk(16 << 20))?;
    // It counts connections, each of which is a login.
    let proxy = Proxy::start(target.portal())?;
    let server = Server::start(&target.url_at(proxy.addr(), 0), args)?;
    // The ready line waits for the first only.
    let by = Instant::now() + START;
    while server.paths_up()? < sessions {
        ensure!(Instant::now() < by, "not all sessions come up: {}", server.proc.tail());
        std::thread::sleep(Duration::from_millis(5));
    }
    let logins = proxy.accepted();
    ensure!(logins as u64 == sessions, "{logins} logins for {sessions} sessions");
    let ((pauses, read), longest, done) = under_load(&server, packed, |progress| {
        progress()?;
        let mut owner = server.owner()?;
        ensure!(owner == u64::from(server.proc.pid()));
        let mut pauses = Vec::new();
        let mut read = 0;
        for n in 0..count {
            let out = server.upgrade(&[]).with_context(|| format!("hand-over {n}"))?;
            ensure!(out.status.success(), "hand-over {n}: {}{}", out.stdout, out.stderr);
            progress().with_context(|| format!("after hand-over {n}: {}", server.proc.tail()))?;
            let now = server.owner()?;
            ensure!(now != owner, "the same process owns the disk");
            owner = now;
            let metrics = server.ask("metrics")?;
            let on_loop = |name: &str| metrics["loop"][name].as_u64().context("a number");
            ensure!(on_loop("take_overs")? == n as u64 + 1);
            let ms = |name: &str| on_loop(name).map(|ns| ns as f64 / 1e6);
            pauses.push(Pause { stopped: ms("take_over_stopped_ns")?, gap: ms("take_over_gap_ns")? });
            // Counters go on.
            let now = metrics["devices"][0]["read"]["ok"].as_u64().context("reads")?;
            ensure!(now > read, "{now} reads after {read}");
            read = now;
        }
        let status = server.ask("status")?;
        let stats = &status["devices"][0]["status"]["engine"]["stats"];
        ensure!(stats["sessions_lost"] == 0 && stats["repeated"] == 0, "{status}");
        ensure!(server.paths_up()? == sessions, "{status}");
        Ok((pauses, read))
    })?;
    ensure!(proxy.accepted() == logins, "{} logins, {logins} of them at the start", proxy.accepted());
    ensure!(read > 0);
    for (name, of) in [("stopped", (|p| p.stopped) as fn(&Pause) -> f64), ("gap", |p| p.gap)] {
        let mut sorted: Vec<f64> = pauses.iter().map(of).collect();
        sorted.sort_by(f64::total_cmp);
        println!(
            "{kind:?}, {} rings, {count} hand-overs: {name} p50 {:.2} ms, p90 {:.2} ms, max {:.2} ms",
            if packed { "packed" } else { "split" },
            quantile(&sorted, 0.5),
            quantile(&sorted, 0.9),
            quantile(&sorted, 1.0),
        );
    }
    println!(
        "longest time without an answer {:.1} ms, {done} requests verified",
        longest.as_secs_f64() * 1e3
    );
    // The number that was started is still there, and its signal ends the disk, in order.
    ensure!(server.proc.is_running(), "{}", server.proc.tail());
    let (status, _) = server.proc.terminate(END)?;
    ensure!(status.success(), "{status}: {}", server.proc.tail());
    ensure!(!server.socket.exists() && !server.control.exists(), "the last owner cleans up");
    Ok(())
}

#[test]
fn twenty_in_a_row_with_split_rings() -> Result<()> {
    in_a_row(Kind::Ours, false, 20, &[])
}

#[test]
fn ten_in_a_row_with_packed_rings() -> Result<()> {
    in_a_row(Kind::Ours, true, 10, &["--poll-us", "0"])
}

/// Commands are spread over three sessions, all of which go along.
#[test]
fn with_three_sessions() -> Result<()> {
    in_a_row_by(3, Kind::Ours, false, 10, &["--sessions", "3"])
}

/// The two ways of the data thread to do its calls understand each other's state.
#[test]
fn with_plain_system_calls() -> Result<()> {
    in_a_row_by(2, Kind::Ours, true, 5, &["--sessions", "2", "--io", "plain"])
}

#[test]
fn with_tgtd() -> Result<()> {
    in_a_row(Kind::Tgtd, false, 5, &[])
}

#[test]
fn with_istgt_and_digests() -> Result<()> {
    in_a_row(Kind::Istgt, true, 5, &["--header-digest", "crc32c", "--data-digest", "crc32c"])
}

/// Stock QEMU and a stock guest, which sees nothing of it; no `reconnect=`, for there is nothing to connect again.
#[test]
fn a_guest_of_qemu_does_not_notice() -> Result<()> {
    if !target::have(Kind::Ours) || !tool::have(&["qemu-system-x86_64", "fio"]) {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(16 << 20))?;
    let server = Server::start(&target.url(0), &[])?;
    let guest = QemuGuest::new().program("/usr/bin/fio").disk(&server.socket, 2).property("packed=on");
    let mut guest = guest.start(&FIO.replace("SECONDS", "12"))?;
    guest.wait_value("running")?;
    for n in 0..5 {
        std::thread::sleep(Duration::from_millis(500));
        let out = server.upgrade(&[]).with_context(|| format!("hand-over {n}"))?;
        ensure!(out.status.success(), "hand-over {n}: {}{}", out.stdout, out.stderr);
    }
    let outcome = guest.wait()?;
    ensure!(outcome.status == 0 && outcome.number("fio")? == 0, "fio failed:\n{}", outcome.console);
    ensure!(outcome.number("issued")? == 8, "fio did nothing:\n{}", outcome.console);
    ensure!(outcome.number("mq")? == 2 && outcome.number("packed")? == 1, "not as asked for");
    ensure!(outcome.number("errors")? == 0, "the guest complains:\n{}", outcome.console);
    let metrics = server.ask("metrics")?;
    ensure!(metrics["loop"]["take_overs"] == 5, "{metrics}");
    Ok(())
}

/// With `--new-pid` the old process ends, well, and nothing of the disk does.
#[test]
fn the_old_process_may_end() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(16 << 20))?;
    let server = Server::start(&target.url(0), &[])?;
    let (owner, _, _) = under_load(&server, false, |progress| {
        progress()?;
        let out = server.upgrade(&["--new-pid"])?;
        ensure!(out.status.success(), "{}{}", out.stdout, out.stderr);
        progress()?;
        ensure!(server.proc.wait(END)?.success());
        server.owner()
    })?;
    let pid = i32::try_from(owner)?;
    let pid = rustix::process::Pid::from_raw(pid).context("a process number")?;
    rustix::process::kill_process(pid, Signal::TERM)?;
    let by = Instant::now() + END;
    while server.socket.exists() {
        ensure!(Instant::now() < by, "the new process does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// What cannot take over leaves everything as it was, and says why.
#[test]
fn failures_leave_the_old_process_running() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(16 << 20))?;
    let proxy = Proxy::start(target.portal())?;
    let server = Server::start(&target.url_at(proxy.addr(), 0), &[])?;
    under_load(&server, false, |progress| {
        progress()?;
        let pid = server.owner()?;
        for (binary, words) in [
            ("/nonexistent/vcp-iscsi", "cannot start"),
            ("/bin/true", "the old process goes on"),
            ("/bin/false", "the old process goes on"),
        ] {
            let out = server.upgrade(&["--binary", binary])?;
            ensure!(out.status.code() == Some(1), "{binary}: {}", out.status);
            ensure!(out.stderr.contains(words) && out.stderr.lines().count() == 1, "{}", out.stderr);
            progress()?;
            ensure!(server.owner()? == pid);
        }
        Ok(())
    })?;
    ensure!(proxy.accepted() == 1, "{} logins", proxy.accepted());
    Ok(())
}

/// The target does not answer for a while: the hand-over waits for a moment with nothing in flight, and comes.
#[test]
fn a_slow_target_delays_the_hand_over() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(16 << 20))?;
    let proxy = Proxy::start(target.portal())?;
    let server = Server::start(&target.url_at(proxy.addr(), 0), &[])?;
    under_load(&server, false, |progress| {
        progress()?;
        proxy.hold(true);
        let upgraded = std::thread::scope(|scope| {
            let upgrade = scope.spawn(|| server.upgrade(&[]));
            // The old process says that it tried and went on.
            std::thread::sleep(Duration::from_millis(1500));
            let early = upgrade.is_finished();
            proxy.hold(false);
            let out = upgrade.join().expect("no panic")?;
            if early {
                bail!("handed over with requests in flight: {}{}", out.stdout, out.stderr);
            }
            Ok(out)
        })?;
        ensure!(upgraded.status.success(), "{}{}", upgraded.stdout, upgraded.stderr);
        progress()
    })?;
    ensure!(proxy.accepted() == 1, "{} logins", proxy.accepted());
    Ok(())
}

/// The anchor's death is the disk's: whoever kills the number that was started may start the disk again at once.
#[test]
fn a_killed_anchor_takes_the_owner_along() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(16 << 20))?;
    let server = Server::start(&target.url(0), &[])?;
    let out = server.upgrade(&[])?;
    ensure!(out.status.success(), "{}{}", out.stdout, out.stderr);
    let owner = server.owner()?;
    server.proc.kill()?;
    let by = Instant::now() + END;
    // A process that is gone, or one that its new parent has not waited for yet.
    let gone = || {
        let stat = std::fs::read_to_string(format!("/proc/{owner}/stat"));
        stat.map_or(true, |stat| {
            stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
        })
    };
    while !gone() {
        ensure!(Instant::now() < by, "the owner outlives its anchor");
        std::thread::sleep(Duration::from_millis(1));
    }
    let again = serve(&server.socket)?.arg(target.url(0)).spawn()?;
    again.wait_line(Stream::Out, "ready:", START)?;
    Ok(())
}
