//! Several ways to one unit: a path dies under a verifying load (cut, half-open, its target killed), comes back, changes
//! its access state, leads to another unit. Nothing may be lost whatever happens; how long it takes is printed.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;
use vcp_tests::backend::{self, Backend};
use vcp_tests::front::{Driver, Op, REQUEST};
use vcp_tests::load::Load;
use vcp_tests::proc::{Cmd, Proc, Stream};
use vcp_tests::proxy::Proxy;
use vcp_tests::target::{self, Kind, Spec, Target};
use vcp_tests::{Result, pattern, tool};

use crate::support::{COMMAND, one_error};

const IQN: &str = "iqn.2026-01.test.vcp:multipath";
const NAA: &str = "3000000000000001";
const SIZE: u64 = 32 << 20;
/// How long anything may take on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// Our target with arguments of its own; ends with its test.
struct Server {
    proc: Proc,
    portals: Vec<SocketAddr>,
}

impl Server {
    /// `listen`: the values of `--listen`; `lun`: that of `--lun`.
    fn start(iqn: &str, listen: &[String], lun: &str, more: &[&str]) -> Result<Self> {
        let mut cmd = Cmd::new(tool::ours("iscsi-target")?).args(["serve", "--log", "info", "--target", iqn]);
        for portal in listen {
            cmd = cmd.args(["--listen", portal]);
        }
        let proc = cmd.args(["--lun", lun]).args(more).spawn()?;
        let ready = proc.wait_line(Stream::Out, "ready:", SOON)?;
        let words = ready.split(' ');
        let all: Vec<_> = words.clone().filter_map(|word| word.strip_prefix("portals=")).collect();
        let all = match all.is_empty() {
            true => words.filter_map(|word| word.strip_prefix("addr=")).collect(),
            false => all,
        };
        let addr = |text: &&str| text.split(',').next().unwrap_or_default().parse();
        let portals = all
            .iter()
            .map(addr)
            .collect::<std::result::Result<_, std::net::AddrParseError>>()
            .with_context(|| ready.clone())?;
        Ok(Self { proc, portals })
    }
}

/// A vcp-iscsi over several paths, each through a proxy; two groups of portals of one target, or one.
struct Bed {
    dir: TempDir,
    /// Ends with the test.
    _server: Option<Server>,
    _target: Option<Target>,
    proxies: Vec<Proxy>,
    backend: Backend,
}

fn url(portal: SocketAddr) -> String {
    format!("iscsi://{portal}/{IQN}/0")
}

fn image(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("lun.img");
    std::fs::File::create(&path)?.set_len(SIZE)?;
    Ok(path)
}

impl Bed {
    fn new(groups: &[u16], target_args: &[&str], args: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("vcp-multipath-").tempdir()?;
        let listen: Vec<_> = groups.iter().map(|group| format!("127.0.0.1:0,group={group}")).collect();
        let lun = format!("file:{}", image(dir.path())?.display());
        let target_control = dir.path().join("target.sock").display().to_string();
        let more = [&["--control", &target_control], target_args].concat();
        let server = Server::start(IQN, &listen, &lun, &more)?;
        let proxies: Vec<_> =
            server.portals.iter().map(|portal| Proxy::start(*portal)).collect::<Result<_>>()?;
        let urls: Vec<_> = proxies.iter().map(|proxy| url(proxy.addr())).collect();
        let backend = serve(&dir, &urls, args)?;
        let bed = Self { dir, _server: Some(server), _target: None, proxies, backend };
        bed.all_up()?;
        Ok(bed)
    }

    /// Two ways to the only portal of a target.
    fn over(kind: Kind) -> Result<Option<Self>> {
        if !target::have(kind) {
            return Ok(None);
        }
        let target = Target::start(kind, &Spec::disk(SIZE))?;
        let dir = tempfile::Builder::new().prefix("vcp-multipath-").tempdir()?;
        let proxies: Vec<_> = (0..2).map(|_| Proxy::start(target.portal())).collect::<Result<_>>()?;
        let urls: Vec<_> = proxies.iter().map(|proxy| target.url_at(proxy.addr(), 0)).collect();
        let backend = serve(&dir, &urls, &[])?;
        let bed = Self { dir, _server: None, _target: Some(target), proxies, backend };
        bed.all_up()?;
        Ok(Some(bed))
    }

    /// The ready line waits for one path only.
    fn all_up(&self) -> Result<()> {
        self.until("all paths are up", |engine| up(engine) == self.proxies.len())?;
        Ok(())
    }

    fn status(&self) -> Result<Value> {
        status(&self.dir.path().join("control.sock"))
    }

    /// Asks until the engine's status is as it should be.
    fn until(&self, what: &str, check: impl Fn(&Value) -> bool) -> Result<Value> {
        until(&self.dir.path().join("control.sock"), what, check)
    }

    fn set_group(&self, group: u16, state: &str) -> Result<()> {
        let control = self.dir.path().join("target.sock");
        let out = Cmd::new(tool::ours("iscsi-target")?)
            .args(["group", "--control"])
            .arg(&control)
            .args([&group.to_string(), state])
            .output(COMMAND)?;
        ensure!(out.trim() == "ok", "{out}");
        Ok(())
    }
}

/// `vcp-iscsi serve` over these paths.
fn serve(dir: &TempDir, urls: &[String], args: &[&str]) -> Result<Backend> {
    let control = dir.path().join("control.sock").display().to_string();
    let mut all = vec!["--control", &control, "--keepalive-ms", "2000"];
    urls[1..].iter().for_each(|path| all.extend(["--path", path]));
    all.extend(args);
    Backend::vcp_iscsi(&urls[0], &all)
}

/// The engine's part of the status.
fn status(control: &Path) -> Result<Value> {
    let mut socket = UnixStream::connect(control)?;
    socket.write_all(b"{\"cmd\":\"status\"}\n")?;
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line)?;
    let mut answer: Value = serde_json::from_str(&line)?;
    let engine = answer.pointer_mut("/devices/0/status/engine").map(Value::take);
    engine.with_context(|| format!("no engine in {line}"))
}

fn until(control: &Path, what: &str, check: impl Fn(&Value) -> bool) -> Result<Value> {
    let end = Instant::now() + SOON;
    loop {
        let engine = status(control)?;
        if check(&engine) {
            return Ok(engine);
        }
        if Instant::now() > end {
            bail!("{what}: not within {SOON:?}: {engine:#}");
        }
        std::thread::yield_now();
    }
}

fn paths(engine: &Value) -> &[Value] {
    engine["paths"].as_array().map_or(&[], Vec::as_slice)
}

fn up(engine: &Value) -> usize {
    paths(engine).iter().filter(|path| path["state"] == "up").count()
}

fn in_use(engine: &Value) -> Vec<usize> {
    paths(engine).iter().enumerate().filter(|(_, path)| path["in_use"] == true).map(|(n, _)| n).collect()
}

fn count(engine: &Value, what: &str) -> u64 {
    engine["stats"][what].as_u64().unwrap_or_default()
}

/// One path after the other is cut and refused for a while, under load: the longest pause between two answers is the
/// failover time.
fn survives_cuts(groups: &[u16], args: &[&str], rounds: usize) -> Result<()> {
    let bed = Bed::new(groups, &[], args)?;
    let mut driver = Driver::connect(bed.backend.socket(), 1)?;
    let mut load = Load::new(41, 1024);
    load.run(&mut driver, 0, 16, 500, |_| Ok(()))?;
    let mut longest = Duration::ZERO;
    for round in 0..rounds {
        let dying = round % bed.proxies.len();
        let mut last = Instant::now();
        load.run(&mut driver, 0, 16, 600, |done| {
            if done == 100 {
                bed.proxies[dying].refuse(true);
                bed.proxies[dying].cut_now(round % 3 == 2);
                last = Instant::now();
            } else if done > 100 {
                longest = longest.max(last.elapsed());
                last = Instant::now();
            }
            Ok(())
        })
        .with_context(|| format!("round {round}"))?;
        bed.until("the path is lost", |engine| in_use(engine) != (0..groups.len()).collect::<Vec<_>>())?;
        bed.proxies[dying].refuse(false);
        bed.until("the path is back", |engine| in_use(engine).len() == groups.len())?;
    }
    load.verify_all(&mut driver)?;
    let engine = bed.status()?;
    println!("cut path, groups {groups:?}: longest pause {longest:?}");
    ensure!(count(&engine, "failovers") > 0, "{engine:#}");
    ensure!(count(&engine, "failed") == 0, "{engine:#}");
    ensure!(longest < Duration::from_secs(15), "failover took {longest:?}");
    Ok(())
}

#[test]
fn a_path_of_the_same_portal_group_dies_and_loses_nothing() -> Result<()> {
    survives_cuts(&[1, 1], &[], 6)
}

#[test]
fn a_path_of_another_portal_group_dies_and_loses_nothing() -> Result<()> {
    survives_cuts(&[1, 2, 3], &["--path-policy", "round-robin"], 6)
}

/// A write is underway when its path stops carrying (no end of the connection is seen). It is repeated on the other path
/// and a newer one is answered; then the old link delivers it late, and it must be void: its session was ended by a login
/// in its name through the other portal, or the unit was reset.
///
/// `store`: what lies at that time somewhere between initiator and target arrives in the end, as if something stored it.
/// Only the login ends that as well; a reset is made for networks that forget what is not acknowledged.
fn half_open(bed: &Bed, store: bool) -> Result<Value> {
    let mut driver = Driver::connect(bed.backend.socket(), 1)?;
    let mut load = Load::new(43, 1024);
    load.run(&mut driver, 0, 16, 500, |_| Ok(()))?;
    // Nor can it be had again.
    bed.proxies[0].refuse(true);
    bed.proxies[0].hold(true);
    let start = Instant::now();
    // Some of these take the path that is dead.
    load.run(&mut driver, 0, 16, 100, |_| Ok(()))?;
    let took = start.elapsed();
    println!("half-open path: 100 requests in {took:?} with the failover in them");
    ensure!(took < Duration::from_secs(15), "failover took {took:?}");
    bed.until("commands have left the path", |engine| count(engine, "failovers") > 0)?;

    // Newer data in the places of all that was underway, then the old bytes come.
    load.run(&mut driver, 0, 16, 2000, |_| Ok(()))?;
    let old = bed.proxies[0].open();
    if !store {
        bed.proxies[0].cut_now(true);
    }
    bed.proxies[0].hold(false);
    bed.proxies[0].wait_finished(old, SOON).context("the end of the old connections")?;
    bed.proxies[0].refuse(false);
    bed.until("the path is back", |engine| in_use(engine).len() == bed.proxies.len())?;
    load.run(&mut driver, 0, 16, 500, |_| Ok(()))?;
    driver.flush()?;
    load.verify_all(&mut driver).context("an old write came after a newer one")?;
    let engine = bed.status()?;
    ensure!(count(&engine, "failed") == 0, "{engine:#}");
    Ok(engine)
}

#[test]
fn writes_of_a_half_open_path_are_ended_by_a_login_through_another_portal() -> Result<()> {
    let engine = half_open(&Bed::new(&[1, 1], &[], &[])?, true)?;
    ensure!(count(&engine, "fences") > 0 && count(&engine, "unit_resets") == 0, "{engine:#}");
    Ok(())
}

#[test]
fn writes_of_a_half_open_path_of_another_group_are_ended_by_a_reset() -> Result<()> {
    let engine = half_open(&Bed::new(&[1, 2], &[], &[])?, false)?;
    ensure!(count(&engine, "unit_resets") > 0 && count(&engine, "fences") == 0, "{engine:#}");
    Ok(())
}

/// As with our target: the login in the name of the lost session ends it with others, too.
fn half_open_to(kind: Kind) -> Result<()> {
    let Some(bed) = Bed::over(kind)? else { return Ok(()) };
    let engine = half_open(&bed, true)?;
    ensure!(count(&engine, "fences") > 0 && count(&engine, "unit_resets") == 0, "{engine:#}");
    Ok(())
}

#[test]
fn writes_of_a_half_open_path_to_tgtd_are_void() -> Result<()> {
    half_open_to(Kind::Tgtd)
}

#[test]
fn writes_of_a_half_open_path_to_istgt_are_void() -> Result<()> {
    half_open_to(Kind::Istgt)
}

/// The same medium behind two servers with targets of their own; one is killed with commands underway, and comes back.
#[test]
fn a_killed_target_is_survived_by_another() -> Result<()> {
    let dir = tempfile::Builder::new().prefix("vcp-multipath-").tempdir()?;
    let image = image(dir.path())?;
    let lun = format!("file:{},naa={NAA}", image.display());
    let iqns = [format!("{IQN}-a"), format!("{IQN}-b")];
    let any = ["127.0.0.1:0".to_owned()];
    let mut servers = [Server::start(&iqns[0], &any, &lun, &[])?, Server::start(&iqns[1], &any, &lun, &[])?];
    let urls: Vec<_> =
        iqns.iter().zip(&servers).map(|(iqn, s)| format!("iscsi://{}/{iqn}/0", s.portals[0])).collect();
    let control = dir.path().join("control.sock");
    let control_arg = control.display().to_string();
    let id = format!("naa.{NAA}");
    let args = ["--control", &control_arg, "--path", &urls[1], "--unit-id", &id];
    let backend = Backend::vcp_iscsi(&urls[0], &args)?;
    until(&control, "both paths are in use", |engine| in_use(engine).len() == 2)?;
    let mut driver = Driver::connect(backend.socket(), 1)?;
    let mut load = Load::new(47, 1024);
    let mut longest = Duration::ZERO;
    for round in 0..4 {
        let dying = round % 2;
        let mut last = Instant::now();
        load.run(&mut driver, 0, 16, 400, |done| {
            if done == 100 {
                servers[dying].proc.kill()?;
                last = Instant::now();
            } else if done > 100 {
                longest = longest.max(last.elapsed());
                last = Instant::now();
            }
            Ok(())
        })?;
        let addr = [servers[dying].portals[0].to_string()];
        servers[dying] = Server::start(&iqns[dying], &addr, &lun, &[])?;
        until(&control, "the path is back", |engine| in_use(engine).len() == 2)?;
    }
    load.verify_all(&mut driver)?;
    println!("killed target: longest pause {longest:?}");
    ensure!(longest < Duration::from_secs(15), "failover took {longest:?}");
    let engine = status(&control)?;
    ensure!(count(&engine, "failed") == 0 && count(&engine, "failovers") > 0, "{engine:#}");
    Ok(())
}

/// Access states change under load: commands follow the best one, and go back when a better one returns.
#[test]
fn access_states_are_followed_under_load() -> Result<()> {
    let bed = Bed::new(&[1, 2], &["--group", "2=non-optimized"], &[])?;
    let mut driver = Driver::connect(bed.backend.socket(), 1)?;
    let mut load = Load::new(53, 1024);
    ensure!(in_use(&bed.status()?) == [0], "not the optimized path");
    let steps: [(u16, &str, &[usize]); 8] = [
        (2, "optimized", &[0, 1]),
        (1, "standby", &[1]),
        (1, "transitioning", &[1]),
        (1, "optimized", &[0, 1]),
        (2, "unavailable", &[0]),
        (2, "non-optimized", &[0]),
        (1, "non-optimized", &[0, 1]),
        (1, "optimized", &[0]),
    ];
    for (group, state, wanted) in steps {
        load.run(&mut driver, 0, 16, 150, |done| match done {
            50 => bed.set_group(group, state),
            _ => Ok(()),
        })?;
        bed.until(&format!("group {group} {state}"), |engine| in_use(engine) == wanted)?;
        // With commands by these paths alone.
        let before = bed.status()?;
        load.run(&mut driver, 0, 8, 50, |_| Ok(()))?;
        let after = bed.status()?;
        for (n, (before, after)) in paths(&before).iter().zip(paths(&after)).enumerate() {
            let moved = before["stats"]["commands"] != after["stats"]["commands"];
            ensure!(moved == wanted.contains(&n), "{group} {state}: path {n} moved: {moved}");
        }
    }
    // Nothing is accessible for a while: requests wait, and none fails.
    bed.set_group(2, "standby")?;
    bed.set_group(1, "transitioning")?;
    load.fill(&mut driver, 0, 8)?;
    bed.until("no path is in use", |engine| in_use(engine).is_empty())?;
    bed.set_group(2, "optimized")?;
    load.run(&mut driver, 0, 8, 50, |_| Ok(()))?;
    load.verify_all(&mut driver)?;
    let engine = bed.status()?;
    ensure!(count(&engine, "failed") == 0 && count(&engine, "sessions_lost") == 0, "{engine:#}");
    ensure!(count(&engine, "failbacks") > 0, "{engine:#}");
    Ok(())
}

/// A path that leads to another unit is never used; nor one whose unit was exchanged while the session was away.
#[test]
fn a_path_to_another_unit_is_refused() -> Result<()> {
    let dir = tempfile::Builder::new().prefix("vcp-multipath-").tempdir()?;
    let lun = |naa: &str, name: &str| -> Result<String> {
        let path = dir.path().join(name);
        std::fs::OpenOptions::new().create(true).append(true).open(&path)?.set_len(SIZE)?;
        Ok(format!("file:{},naa={naa}", path.display()))
    };
    let (ours, theirs) = (lun(NAA, "ours.img")?, lun("3000000000000002", "theirs.img")?);
    let any = ["127.0.0.1:0".to_owned()];
    let right = Server::start(IQN, &any, &ours, &[])?;
    let mut other = Server::start(IQN, &any, &theirs, &[])?;
    let control = dir.path().join("control.sock");
    let control_arg = control.display().to_string();
    let path = url(other.portals[0]);
    let backend = Backend::vcp_iscsi(&url(right.portals[0]), &["--control", &control_arg, "--path", &path])?;
    let engine = until(&control, "the unit is refused", |engine| count(engine, "wrong_units") > 0)?;
    ensure!(in_use(&engine) == [0], "{engine:#}");
    let problem = engine["paths"][1]["problem"].as_str().unwrap_or_default();
    ensure!(problem.contains("another unit") && problem.contains("naa.3000000000000002"), "{problem}");
    let mut driver = Driver::connect(backend.socket(), 1)?;
    let mut load = Load::new(59, 512);
    load.run(&mut driver, 0, 8, 300, |_| Ok(()))?;

    // The right unit appears there: it is taken. Then it is exchanged again, under load.
    let addr = [other.portals[0].to_string()];
    other.proc.kill()?;
    other = Server::start(IQN, &addr, &ours, &[])?;
    until(&control, "the path is in use", |engine| in_use(engine) == [0, 1])?;
    let refused = count(&status(&control)?, "wrong_units");
    load.run(&mut driver, 0, 8, 300, |done| {
        if done == 100 {
            other.proc.kill()?;
            other = Server::start(IQN, &addr, &theirs, &[])?;
        }
        Ok(())
    })?;
    until(&control, "it is refused again", |engine| count(engine, "wrong_units") > refused)?;
    load.run(&mut driver, 0, 8, 100, |_| Ok(()))?;
    load.verify_all(&mut driver)?;
    let written = std::fs::read(dir.path().join("theirs.img"))?;
    ensure!(written.iter().all(|&byte| byte == 0), "the other unit was written to");
    Ok(())
}

#[test]
fn a_wrong_unit_id_ends_the_start_with_one_error() -> Result<()> {
    let dir = tempfile::Builder::new().prefix("vcp-multipath-").tempdir()?;
    let lun = format!("file:{},naa={NAA}", image(dir.path())?.display());
    let server = Server::start(IQN, &["127.0.0.1:0".to_owned()], &lun, &[])?;
    let out = backend::serve(&dir.path().join("blk.sock"))?
        .args([&url(server.portals[0]), "--unit-id", "naa.3000000000000009"])
        .run(COMMAND)?;
    one_error(&out, 1, &["another unit", "naa.3000000000000001", "naa.3000000000000009"])
}

/// `--paths all` takes every portal that SendTargets names, `--sessions` several sessions with each; all have names of
/// their own, which are the same after a restart.
#[test]
fn all_portals_with_several_sessions_each() -> Result<()> {
    let dir = tempfile::Builder::new().prefix("vcp-multipath-").tempdir()?;
    let lun = format!("file:{}", image(dir.path())?.display());
    let listen = ["127.0.0.1:0,group=1", "127.0.0.1:0,group=1", "127.0.0.1:0,group=2"].map(str::to_owned);
    let server = Server::start(IQN, &listen, &lun, &[])?;
    let control = dir.path().join("control.sock");
    let control_arg = control.display().to_string();
    let args = [
        "--control",
        &control_arg,
        "--paths",
        "all",
        "--sessions",
        "2",
        "--instance",
        "test",
        "--queues",
        "4",
    ];
    let mut before: Option<Vec<_>> = None;
    for round in 0..2 {
        let backend = Backend::vcp_iscsi(&url(server.portals[0]), &args)?;
        let engine = until(&control, "six paths are in use", |engine| in_use(engine).len() == 6)?;
        let isids: Vec<_> = paths(&engine).iter().map(|path| path["isid"].to_string()).collect();
        let mut distinct = isids.clone();
        distinct.sort();
        distinct.dedup();
        ensure!(distinct.len() == 6, "{isids:?}");
        ensure!(before.as_ref().is_none_or(|before| *before == isids), "{before:?} {isids:?}");
        before = Some(isids);
        let session = &engine["session"];
        ensure!(session["max_outstanding_r2t"] == 8 && session["initial_r2t"] == false, "{session}");
        ensure!(session["immediate_data"] == true, "{session}");
        let mut driver = Driver::connect(backend.socket(), 1)?;
        let mut load = Load::new(61 + round, 512);
        load.run(&mut driver, 0, 32, 1000, |_| Ok(()))?;
        load.verify_all(&mut driver)?;
        let used = paths(&status(&control)?).iter().filter(|path| path["stats"]["commands"] != 0).count();
        ensure!(used == 6, "only {used} paths were used");
        if round == 0 {
            // Not in order: the sessions stay with the target until the next process replaces them.
            backend.proc().kill()?;
        }
    }
    Ok(())
}

/// With the only other path dead at the start, a former process's writes may still be underway on it: the unit is reset
/// once before anything is written.
#[test]
fn a_start_with_a_dead_path_is_made_sure_of() -> Result<()> {
    let dir = tempfile::Builder::new().prefix("vcp-multipath-").tempdir()?;
    let lun = format!("file:{}", image(dir.path())?.display());
    let server = Server::start(IQN, &["127.0.0.1:0".to_owned()], &lun, &[])?;
    let dead = Proxy::start(server.portals[0])?;
    dead.refuse(true);
    let control = dir.path().join("control.sock");
    let control_arg = control.display().to_string();
    let path = url(dead.addr());
    let backend = Backend::vcp_iscsi(&url(server.portals[0]), &["--control", &control_arg, "--path", &path])?;
    let mut driver = Driver::connect(backend.socket(), 1)?;
    driver.submit(0, &Op::Write { offset: 0, data: pattern::make(1, 0, 4096) })?;
    driver.wait(0, REQUEST)?.result.context("the first write")?;
    let engine = status(&control)?;
    ensure!(count(&engine, "unit_resets") == 1, "{engine:#}");
    pattern::check(1, 0, &driver.read(0, 4096)?)?;
    dead.refuse(false);
    until(&control, "both paths are in use", |engine| in_use(engine) == [0, 1])?;
    Ok(())
}
