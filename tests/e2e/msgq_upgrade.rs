//! Clients by `msgq` while the process that serves them is replaced: by a hand-over, by a restart, after a death; started by
//! hand, and by the monitor beside a guest that uses the same disk. Clients connect anew by themselves and lose nothing.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use guest_images::bare;
use msgq_blk::{Disk, Options};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vcp_tests::proc::{Cmd, Proc, Stream};
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, pattern, procfs, tool};

use crate::monitor::ring3;
use crate::support::{COMMAND, vcp, vcp_iscsi};

/// Requests in flight.
const DEPTH: u64 = 32;
/// Where the client works: beyond what the guest uses.
const FIRST_SECTOR: u64 = (32 << 20) / 512;

/// What a client did.
struct Worked {
    epoch: u64,
    rounds: u64,
}

/// Writes every block of its part anew, round after round, and reads each back before the next round; until `end`.
fn work(path: &Path, end: &AtomicBool, done: &AtomicU64) -> Result<Worked> {
    let mut disk = Disk::open(path, &Options { deadline: COMMAND, reattach: COMMAND, ..Options::default() })?;
    let at = |tag: u64| FIRST_SECTOR + tag * 8;
    let mut rounds = 0;
    while !end.load(Ordering::Relaxed) {
        rounds += 1;
        for tag in 0..DEPTH {
            submit(&mut disk, |disk| disk.submit_write(at(tag), &pattern::make(rounds, tag, 4096), tag))?;
        }
        finish(&mut disk, done, |_, _| Ok(()))?;
        for tag in 0..DEPTH {
            submit(&mut disk, |disk| disk.submit_read(at(tag), 4096, tag))?;
        }
        finish(&mut disk, done, |disk, finished| {
            let mut back = [0; 4096];
            disk.read_back(finished, 0, &mut back)?;
            let tag = finished.tag;
            ensure!(back[..] == pattern::make(rounds, tag, 4096), "round {rounds}, block {tag}: other data");
            Ok(())
        })?;
    }
    let epoch = disk.channel().context("no channel")?.agreed().epoch;
    Ok(Worked { epoch, rounds })
}

type Submitted = std::result::Result<(), msgq_blk::Error>;

/// While the server is away, there is no room.
fn submit(disk: &mut Disk, mut one: impl FnMut(&mut Disk) -> Submitted) -> Result<()> {
    let end = Instant::now() + COMMAND;
    loop {
        match one(disk) {
            Ok(()) => return Ok(()),
            Err(msgq_blk::Error::Full) if Instant::now() < end => disk.wait(Some(end))?,
            Err(error) => return Err(error.into()),
        }
    }
}

fn finish(
    disk: &mut Disk,
    count: &AtomicU64,
    mut each: impl FnMut(&Disk, &msgq_blk::Done) -> Result<()>,
) -> Result<()> {
    let end = Instant::now() + COMMAND;
    while disk.inflight() > 0 {
        match disk.poll()? {
            Some(done) => {
                done.result?;
                each(disk, &done)?;
                count.fetch_add(1, Ordering::Relaxed);
            }
            None if Instant::now() > end => bail!("{} requests do not end", disk.inflight()),
            None => disk.wait(Some(end))?,
        }
    }
    Ok(())
}

/// Runs `act` beside a working client; it gets what waits for the client to get on.
fn beside_a_client<T>(
    path: &Path,
    act: impl FnOnce(&dyn Fn() -> Result<()>) -> Result<T>,
) -> Result<(Worked, T)> {
    let (end, done) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let client = scope.spawn(|| work(path, &end, &done));
        let gets_on = || -> Result<()> {
            let (from, by) = (done.load(Ordering::Relaxed), Instant::now() + COMMAND);
            while done.load(Ordering::Relaxed) < from + 500 {
                ensure!(!client.is_finished(), "the client has ended");
                ensure!(Instant::now() < by, "the client does not get on");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            Ok(())
        };
        let acted = gets_on().and_then(|()| act(&gets_on));
        end.store(true, Ordering::Relaxed);
        let worked = client.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        // What it says is the cause of what `act` saw.
        Ok((worked?, acted?))
    })
}

#[test]
fn hand_overs_cost_clients_nothing() -> Result<()> {
    for io in ["plain", "auto"] {
        let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
        let dir = tempfile::Builder::new().prefix("vcp-msgq-").tempdir()?;
        let (path, control) = (dir.path().join("disk.msgq"), dir.path().join("ctl"));
        let command =
            vcp_iscsi(["serve", "--io", io, "--msgq-path"])?.arg(&path).arg("--control").arg(&control);
        let proc = command.arg(target.url(0)).spawn()?;
        let line = proc.wait_line(Stream::Out, "ready:", COMMAND)?;
        println!("{line}");
        let inode = path.symlink_metadata()?.ino();
        let (worked, ()) = beside_a_client(&path, |gets_on| {
            for _ in 0..3 {
                let out = Cmd::new(tool::ours("vcp-iscsi")?).args(["upgrade", "--control"]).arg(&control);
                let out = out.run(COMMAND)?;
                ensure!(out.status.success(), "{}", out.stderr);
                gets_on()?;
            }
            Ok(())
        })?;
        println!("--io {io}: epoch {}, {} rounds", worked.epoch, worked.rounds);
        ensure!(
            worked.epoch == 4,
            "the client was in epoch {}: it did not connect anew each time",
            worked.epoch
        );
        ensure!(path.symlink_metadata()?.ino() == inode, "the socket file is another one");
        proc.signal(Signal::TERM)?;
        proc.wait(COMMAND)?;
        ensure!(!path.exists(), "the socket file stays");
    }
    Ok(())
}

/// A running guest that uses the disk, and the socket for programs beside it.
struct Bed {
    proc: Proc,
    api: PathBuf,
    path: PathBuf,
    _dir: tempfile::TempDir,
    _target: Target,
}

impl Bed {
    fn start() -> Result<Self> {
        let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
        let dir = tempfile::tempdir()?;
        let (api, path) = (dir.path().join("api"), dir.path().join("disk.msgq"));
        let proc =
            vcp(["run", "--log", "info", "--cmdline", "job=churn secs=3600 region=8M qd=8 timeout=60"])?
                .arg("--api-socket")
                .arg(&api)
                .arg("--disk")
                .arg(format!("url={},msgq={}", target.url(0), path.display()))
                .arg("--kernel")
                .arg(bare::build()?)
                .keep_stdin()
                .spawn()?;
        proc.wait_line(Stream::Out, "blocks of", COMMAND)?;
        Ok(Self { proc, api, path, _dir: dir, _target: target })
    }

    fn ctl(&self, args: &[&str]) -> Result<String> {
        vcp(["ctl", "--api-socket"])?.arg(&self.api).args(args).output(COMMAND)
    }

    fn restarts(&self) -> Result<u64> {
        let status: Value = serde_json::from_str(&self.ctl(&["status", "--json"])?)?;
        let devices = status["machine"]["devices"].as_array().context("no devices")?;
        let disk = devices.iter().find(|device| device["name"] == "disk0").context("no disk0")?;
        disk["backend"]["restarts"].as_u64().context("no restarts")
    }
}

#[test]
fn the_monitor_lets_programs_reach_a_guests_disk() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let bed = Bed::start()?;
    ensure!(bed.path.symlink_metadata()?.permissions().mode() & 0o777 == 0o600, "others may connect");
    let (worked, ()) = beside_a_client(&bed.path, |gets_on| {
        bed.ctl(&["restart-vcp", "disk0", "--upgrade"])?;
        gets_on()?;
        bed.ctl(&["restart-vcp", "disk0"])?;
        gets_on()?;
        let before = bed.restarts()?;
        let vcp = procfs::vcps(bed.proc.pid())?.first().copied().context("no VCP")?;
        kill_process(Pid::from_raw(vcp as i32).context("no pid")?, Signal::KILL)?;
        gets_on()?;
        ensure!(bed.restarts()? == before + 1, "another process was killed");
        Ok(())
    })?;
    println!("epoch {}, {} rounds", worked.epoch, worked.rounds);
    ensure!(worked.epoch >= 4, "epoch {}", worked.epoch);
    bed.proc.say(b"q")?;
    let status = bed.proc.wait(COMMAND)?;
    ensure!(status.success(), "{status}: {}", bed.proc.tail());
    ensure!(bed.proc.stream(Stream::Out).contains("churn: ok"), "{}", bed.proc.tail());
    ensure!(!bed.path.exists(), "the socket file stays");
    Ok(())
}
