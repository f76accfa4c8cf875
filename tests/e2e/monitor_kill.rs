//! Backends that die under `vcp run` while the guest works: nothing is lost, nothing is answered twice, the data is right,
//! and the monitor keeps nothing of the dead. The bare-metal guest verifies natively; a stock Debian guest does in the
//! helper VM.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use guest_images::bare;
use guest_images::rootfs::{self, RootFs};
use rustix::process::{Pid, Signal, kill_process};
use vcp_tests::backend::{self, Backend};
use vcp_tests::bad_target::BadTarget;
use vcp_tests::guest::Outcome;
use vcp_tests::proc::{Proc, Stream};
use vcp_tests::proxy::Proxy;
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, procfs, tool};

use crate::monitor::ring3;
use crate::support::{helper_vm, numbers, spread, vcp};

/// How long one step may take: a start, a recovery, an end.
const STEP: Duration = Duration::from_secs(60);
/// What the guest does until it is told to stop.
const CHURN: &str = "job=churn secs=3600 region=8M qd=32 timeout=60";
/// Kills without being asked for more.
const KILLS: usize = 5;
/// Private memory that the monitor may have more at the end than after its first restarts, KiB.
const GROWTH_KIB: u64 = 1024;

/// A running `vcp run` with the churning guest.
struct Run {
    proc: Proc,
}

impl Run {
    /// Starts it with these disks, and waits until the guest is at work.
    fn start(disk: &str, cmdline: &str) -> Result<Self> {
        let proc = vcp(["run", "--log", "info", "--cmdline", cmdline, "--disk", disk, "--kernel"])?
            .arg(bare::build()?)
            .keep_stdin()
            .spawn()?;
        proc.wait_line(Stream::Out, "churn: ", STEP)?;
        Ok(Self { proc })
    }

    /// The `vcp-iscsi` that serves now.
    fn backend(&self) -> Result<u32> {
        procfs::vcps(self.proc.pid())?.first().copied().context("there is no vcp-iscsi")
    }

    /// Waits until the monitor has said something so many times.
    fn said(&self, what: &str, times: usize) -> Result<()> {
        let end = Instant::now() + STEP;
        while self.proc.stream(Stream::Err).matches(what).count() < times {
            ensure!(Instant::now() < end, "not said {times} times: {what}\n{}", self.proc.tail());
            ensure!(self.proc.is_running(), "the run has ended:\n{}", self.proc.tail());
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn back(&self, times: usize) -> Result<()> {
        self.said("the backend is back", times)
    }

    /// Has the guest compare everything, and demands that all is right; returns what it said last.
    fn finish(self) -> Result<String> {
        let children = procfs::children(self.proc.pid())?;
        self.proc.say(b"q")?;
        let status = self.proc.wait(STEP)?;
        let out = self.proc.stream(Stream::Out);
        ensure!(status.success(), "{status}: {}", self.proc.tail());
        for child in children {
            ensure!(procfs::cmdline(child).map_or(true, |c| c.is_empty()), "process {child} is left behind");
        }
        let line = out.lines().find(|line| line.starts_with("churn: ok"));
        Ok(line.with_context(|| format!("no result in {out}"))?.to_owned())
    }
}

fn kill(pid: u32) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("no process id")?;
    Ok(kill_process(pid, Signal::KILL)?)
}

/// What the monitor holds.
#[derive(Debug)]
struct Held {
    descriptors: usize,
    threads: usize,
    private_kib: u64,
}

impl Held {
    fn by(pid: u32) -> Result<Self> {
        Ok(Self {
            descriptors: procfs::descriptors(pid)?,
            threads: procfs::threads(pid)?,
            private_kib: procfs::private_kib(pid)?,
        })
    }
}

/// Kills the `vcp-iscsi` of a disk so many times under the churning guest; returns a report.
fn killed_under_the_bare_guest(kills: usize, options: &str) -> Result<String> {
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let run = Run::start(&format!("url={},cpu=1{options}", target.url(0)), CHURN)?;
    run.proc.wait_line(Stream::Out, "blocks of", STEP)?;
    ensure!(run.proc.stream(Stream::Out).contains(" PACKED") == options.contains("packed=on"), "other rings");
    let mut early = None;
    for n in 0..kills {
        // Well for long enough to be started again at once, and then any moment of the load.
        std::thread::sleep(Duration::from_millis(1050 + (n as u64 * 37) % 250));
        kill(run.backend()?)?;
        run.back(n + 1)?;
        if n == 2 {
            early = Some(Held::by(run.proc.pid())?);
        }
    }
    // The dying, too, has been seen to by now.
    let late = Held::by(run.proc.pid())?;
    let early = early.context("too few kills")?;
    ensure!(
        late.descriptors <= early.descriptors
            && late.threads <= early.threads
            && late.private_kib <= early.private_kib + GROWTH_KIB,
        "the monitor keeps something of the dead: {early:?}, then {late:?}"
    );
    let said = run.proc.stream(Stream::Err);
    let parts = [
        ("loss to return", "away_us="),
        ("death", "death_us="),
        ("start", "start_us="),
        ("attach", "attach_us="),
    ];
    let away = parts.map(|(name, key)| {
        format!("{name}: {}", spread(numbers(&said, key).into_iter().map(|us| us / 1000.0).collect()))
    });
    let away = away.join("\n  ");
    let pauses = spread(numbers(&run.proc.stream(Stream::Out), " ms="));
    let result = run.finish()?;
    Ok(format!(
        "{kills} kills\nmonitor, {away}\nguest, pauses of 20 ms and more: {pauses}\n{result}\n{late:?}"
    ))
}

#[test]
fn killed_vcp_is_started_again_under_a_verifying_guest() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    println!("{}", killed_under_the_bare_guest(KILLS, "")?);
    Ok(())
}

#[test]
fn killed_vcp_goes_on_with_packed_rings() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    println!("{}", killed_under_the_bare_guest(KILLS, ",packed=on")?);
    Ok(())
}

/// A disk of several ways: one is cut off under the guest, then the VCP is killed and comes back by what is left.
#[test]
fn a_disk_with_several_paths_outlives_one_and_its_vcp() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let (first, second) = (Proxy::start(target.portal())?, Proxy::start(target.portal())?);
    // The further URL says only where it differs.
    let disk =
        format!("url={},path=iscsi://{},sessions=2,cpu=1", target.url_at(first.addr(), 0), second.addr());
    let run = Run::start(&disk, CHURN)?;
    first.wait_accepted(2, STEP)?;
    second.wait_accepted(2, STEP)?;
    first.refuse(true);
    first.cut_now(true);
    std::thread::sleep(Duration::from_millis(1050));
    kill(run.backend()?)?;
    run.back(1)?;
    // By the way that is left.
    second.wait_accepted(4, STEP)?;
    first.refuse(false);
    run.finish()?;
    Ok(())
}

/// `cargo xtask soak monitor`.
#[test]
#[ignore = "long: cargo xtask soak monitor"]
fn soak() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let kills = std::env::var("VCP_SOAK_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(100);
    for (name, options) in [("split", ""), ("packed", ",packed=on")] {
        println!("{name} rings: {}", killed_under_the_bare_guest(kills, options)?);
    }
    Ok(())
}

/// The target is away when the VCP is started again: it is waited for, and so does the guest.
#[test]
fn target_that_is_away_when_the_vcp_is_killed_is_waited_for() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let mut target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let run = Run::start(&format!("url={}", target.url(0)), CHURN)?;
    run.proc.wait_line(Stream::Out, "blocks of", STEP)?;
    target.kill()?;
    kill(run.backend()?)?;
    // Some attempts fail, and one line tells of them.
    run.said("the guest waits, and it is tried again", 1)?;
    std::thread::sleep(Duration::from_millis(500));
    target.start_again()?;
    run.back(1)?;
    let result = run.finish()?;
    ensure!(result.contains("pauses=1") || !result.contains("pauses=0"), "no pause: {result}");
    Ok(())
}

/// A backend of somebody else's that is killed, and started again on the same socket.
#[test]
fn backend_behind_a_socket_is_sought_again_unless_the_user_does_not_want_that() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("s");
    let serve = || -> Result<Proc> {
        let proc = backend::serve(&socket)?.arg(target.url(0)).spawn()?;
        proc.wait_line(Stream::Out, "ready:", STEP)?;
        Ok(proc)
    };
    let first = serve()?;
    let run = Run::start(&format!("socket={}", socket.display()), CHURN)?;
    run.proc.wait_line(Stream::Out, "blocks of", STEP)?;
    first.kill()?;
    run.said("cannot connect to the vhost-user socket", 1)?;
    let second = serve()?;
    run.back(1)?;
    run.finish()?;
    ensure!(second.is_running(), "the backend ended with its guest");

    let run = Run::start(&format!("socket={},reconnect=no", socket.display()), CHURN)?;
    second.kill()?;
    let status = run.proc.wait(STEP)?;
    ensure!(status.code() == Some(1), "{status}");
    let err = run.proc.stream(Stream::Err);
    ensure!(
        err.contains("disk0: the vhost-user backend closed its connection; the guest was stopped"),
        "{err}"
    );
    Ok(())
}

/// A backend that keeps no log dies at work: nobody knows what it had begun, and no successor may guess.
#[test]
fn backend_without_a_log_ends_the_run_if_it_dies_at_work() -> Result<()> {
    if !ring3()? || !tool::have(&["qemu-storage-daemon"]) {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let backend = Backend::qsd(&target, 0, 1)?;
    let run = Run::start(&format!("socket={}", backend.socket().display()), CHURN)?;
    run.proc.wait_line(Stream::Out, "blocks of", STEP)?;
    backend.proc().kill()?;
    // The next one must be there to be refused.
    run.said("cannot connect to the vhost-user socket", 1)?;
    let serve = backend::serve(backend.socket())?.arg(target.url(0)).spawn()?;
    serve.wait_line(Stream::Out, "ready:", STEP)?;
    let status = run.proc.wait(STEP)?;
    let err = run.proc.stream(Stream::Err);
    ensure!(
        status.code() == Some(1) && err.contains("requests in flight and kept no log of them"),
        "{status}: {err}"
    );
    Ok(())
}

/// The run ends at once while a backend is away, and while it is being started.
#[test]
fn sigterm_ends_a_run_whose_backend_is_away() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let run = Run::start(&format!("url={}", target.url(0)), CHURN)?;
    target.kill()?;
    kill(run.backend()?)?;
    run.said("the guest waits, and it is tried again", 1)?;
    let (status, took) = run.proc.terminate(STEP)?;
    ensure!(status.code().is_some() && took < Duration::from_secs(5), "{status} after {took:?}");
    ensure!(run.backend().is_err(), "a vcp-iscsi is left");
    Ok(())
}

/// What the Debian guest does meanwhile: a file on its root disk, and a disk with packed rings, both verified.
const GUEST_JOB: &str = r#"
value() { name=$1; shift; echo "@$name=$*"; }
value SIZES $(cat /sys/block/vda/size /sys/block/vdb/size)
# VIRTIO_F_RING_PACKED is bit 34; the string has bit 0 first.
value PACKED $(cut -c35 /sys/block/vda/device/features)$(cut -c35 /sys/block/vdb/device/features)
# Until a line comes over the console: a guest that goes on slowly is worked on for as long as its killer needs.
( read line; : >/tmp/enough ) </dev/ttyS0 &
verify() {
    until [ -e /tmp/enough ]; do
        fio --name=$1 --size=4M --rw=randwrite --bs=4k --ioengine=psync --fsync=64 --time_based --runtime=4 \
            --verify=crc32c --verify_backlog=32 --verify_fatal=1 --minimal "$2" >/tmp/$1.log 2>&1 || return
    done
}
# Shows a guest that stands still for what it is: in flight, and done so far.
( while sleep 10; do for d in vda vdb; do echo $d $(cat /sys/block/$d/inflight /sys/block/$d/stat); done; done ) &
verify root --directory=/root &
root=$!
value LOAD started
verify raw --filename=/dev/vdb
value RAW $?
wait $root
value FIO $?
tail -n 3 /tmp/root.log /tmp/raw.log | cut -c1-200
value DONE yes
rm -f /root/root*
dd if=/dev/urandom of=/root/data bs=64k count=32 2>/dev/null
sync; echo 3 >/proc/sys/vm/drop_caches
sha256sum /root/data >/root/sum && (cd / && sha256sum -c /root/sum)
value SUM $?
value ERRORS $(dmesg | grep -ciE 'i/o error|ext4-fs error|vd[ab].*error')
"#;

/// What the helper VM does: target, monitor, guest, and a killer of VCPs.
const HELPER_JOB: &str = r#"
value() { name=$1; shift; echo "@$name=$*"; }
mkfifo /tmp/ready /tmp/keys
iscsi-target serve --listen 127.0.0.1:3260 --target iqn.2026-01.test.vcp:root --lun file:/dev/vda --lun mem:16M \
    >/tmp/ready 2>/tmp/target.log &
target=$!
exec 3</tmp/ready
read line <&3 || { cat /tmp/target.log; exit 1; }
: >/tmp/guest.log
# Both VCPs are killed while the guest loads them, again and again; then the guest is told that it was enough.
( exec 4>/tmp/keys
  until grep -q @LOAD /tmp/guest.log; do sleep 1; done
  for n in $(seq ROUNDS); do
    sleep 2
    if grep -q @DONE /tmp/guest.log; then break; fi
    for comm in /proc/[0-9]*/comm; do
      read name <$comm || continue
      pid=${comm#/proc/}; [ "$name" = vcp-iscsi ] && kill -9 ${pid%/comm}
    done
    echo kill >>/tmp/kills
    until [ $(grep -c 'the backend is back' /tmp/vcp.log) = $((2 * n)) ]; do sleep 1; done
    # One more stands by for each of the two: only then is what the monitor holds the same every time.
    until [ $(cat /proc/[0-9]*/comm | grep -cx vcp-iscsi) = 4 ]; do sleep 0.2; done
    for comm in /proc/[0-9]*/comm; do
      read name <$comm || continue
      pid=${comm%/comm}; [ "$name" = vcp ] && [ $n != 1 ] && echo $(ls $pid/fd | wc -l) $(ls $pid/task | wc -l) >>/tmp/held
    done
  done
  echo enough >&4; until grep -q @DONE /tmp/guest.log; do sleep 1; done ) 2>/dev/null &
killer=$!
url=iscsi://127.0.0.1:3260/iqn.2026-01.test.vcp:root
timeout LIMIT vcp run --vcpu-cpus 0-1 --kernel /guest/vmlinuz --initrd /guest/initrd \
    --cmdline 'console=ttyS0 quiet root=/dev/vda rw' --memory 512M --cpus 2 \
    --disk url=$url/0 --disk url=$url/1,packed=on,queues=2 </tmp/keys >/tmp/guest.log 2>/tmp/vcp.log
status=$?
kill $killer 2>/dev/null
value RUN $status
cat /tmp/guest.log; cat /tmp/vcp.log
again_if_kvm_failed $status /tmp/guest.log /tmp/vcp.log
value KILLS $(grep -c kill /tmp/kills)
value BACK $(grep -c 'the backend is back' /tmp/vcp.log)
# Descriptors and threads of the monitor after the first rounds, and at the end.
value HELD $(head -n 1 /tmp/held) then $(tail -n 1 /tmp/held)
value LEFT $(ps | grep -c '[v]cp-iscsi')
kill $target; wait $target
value TARGET $?
sync
"#;

#[test]
fn debian_guest_verifies_while_its_vcps_are_killed() -> Result<()> {
    debian(3)
}

/// `cargo xtask soak monitor --linux`.
#[test]
#[ignore = "long: cargo xtask soak monitor --linux"]
fn soak_linux() -> Result<()> {
    let kills: usize = std::env::var("VCP_SOAK_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(100);
    // Two VCPs at a time; the boots in between are part of it, since one guest does not live for hours there.
    const ROUNDS: usize = 25;
    for part in 0..kills.div_ceil(2 * ROUNDS) {
        println!("part {part}");
        debian(ROUNDS.min(kills.div_ceil(2) - part * ROUNDS))?;
    }
    Ok(())
}

/// Kills both VCPs of a Debian guest so many times.
fn debian(rounds: usize) -> Result<()> {
    if !tool::have(&["qemu-system-x86_64", "mke2fs", "e2fsck", "fio"]) {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("root.ext4");
    // A round takes about five seconds there, and on a busy host several times that.
    let seconds = 20 * rounds;
    let helper_job =
        HELPER_JOB.replace("ROUNDS", &rounds.to_string()).replace("LIMIT", &(330 + seconds).to_string());
    RootFs::new().size_bytes(192 << 20).fio()?.job(GUEST_JOB)?.build_to(&image)?;
    let helper = helper_vm(&["vcp", "vcp-iscsi", "iscsi-target"])?;
    let helper = helper.deadline(Duration::from_secs(450 + seconds as u64));
    let ended = helper.disk(&image).run(&helper_job)?;
    let done = Outcome { status: ended.status, console: ended.output };
    ensure!(done.status == 0, "the helper VM's job failed:\n{}", done.console);
    ensure!(done.number("RUN")? == 0, "vcp run failed:\n{}", done.console);
    assert_eq!(done.value("PACKED")?, "01", "{}", done.console);
    for check in ["FIO", "RAW", "SUM", "ERRORS", "LEFT", "TARGET"] {
        assert_eq!(done.number(check)?, 0, "{check}:\n{}", done.console);
    }
    let kills = done.number("KILLS")?;
    ensure!(kills == rounds as u64, "{kills} of {rounds} rounds:\n{}", done.console);
    // One may still have been away when the guest was done with its disk.
    ensure!(done.number("BACK")? + 1 >= 2 * kills, "{kills} kills of two VCPs:\n{}", done.console);
    ensure!(done.console.contains("VCP-ROOT-CLEAN"), "no clean power-off:\n{}", done.console);
    rootfs::check(&image).context("e2fsck of the LUN's image")?;
    let held = done.value("HELD")?;
    let halves = held.split_once(" then ").context("what the monitor holds")?;
    let counts =
        |text: &str| -> Vec<u32> { text.split_whitespace().filter_map(|n| n.parse().ok()).collect() };
    let (early, late) = (counts(halves.0), counts(halves.1));
    ensure!(
        early.len() == 2 && early.iter().zip(&late).all(|(early, late)| late <= early),
        "the monitor keeps descriptors or threads of the dead: {held}"
    );
    let away = numbers(&done.console, "away_us=").into_iter().map(|us| us / 1000.0).collect();
    println!("{} kills, loss to return: {}; held: {held}", 2 * kills, spread(away));
    Ok(())
}

/// A unit that grows while the guest runs: the driver sees it in its configuration space.
#[test]
fn capacity_change_reaches_the_guest() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let target = BadTarget::start("option blocks 20480")?;
    let run = Run::start(&format!("url={}", target.url()), CHURN)?;
    run.proc.wait_line(Stream::Out, "blocks of", STEP)?;
    target.now("resize 40960")?;
    target.now("async-sense 6 0x2a09")?;
    run.proc.wait_line(Stream::Out, "churn: the disk has 40960 sectors now", STEP)?;
    run.finish()?;
    Ok(())
}
