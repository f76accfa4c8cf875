//! `kill -9` of vcp-iscsi under a verifying load: started again on the same socket, it takes exactly what was in flight
//! again. Nothing is lost, nothing is answered twice, no interrupt is missing, and every block reads as the newest
//! acknowledged write.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use vcp_tests::backend::{START, serve};
use vcp_tests::guest::QemuGuest;
use vcp_tests::pattern;
use vcp_tests::proc::{Proc, Stream};
use vcp_tests::proxy::Proxy;
use vcp_tests::survivor::{Answer, Ask, CHUNK, DEPTH, Event, Survivor};
use vcp_tests::target::{self, Kind, Spec, Target};
use vcp_tests::tool;
use vcp_tests::{Result, front::REQUEST};

pub(crate) const QUEUES: usize = 2;
/// A new connection is there within this.
const BACK: Duration = Duration::from_secs(30);
/// Few, so that a block is written again soon after it was: an old write that came late would show.
const CHUNKS: usize = 96;

/// A `vcp-iscsi` that is started again and again on one socket.
struct Phoenix {
    proc: Proc,
    socket: PathBuf,
    url: String,
    args: Vec<String>,
    /// Requests that a new process said it took again.
    taken_again: u64,
    _dir: tempfile::TempDir,
}

impl Phoenix {
    fn start(url: &str, args: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("vcp-kill-").tempdir()?;
        let socket = dir.path().join("blk.sock");
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        let proc = spawn(&socket, url, &args)?;
        Ok(Self { proc, socket, url: url.to_owned(), args, taken_again: 0, _dir: dir })
    }

    /// Reaps the dead one and starts the next.
    fn rise(&mut self) -> Result<()> {
        self.proc.wait(Duration::from_secs(10))?;
        self.count();
        self.proc = spawn(&self.socket, &self.url, &self.args)?;
        Ok(())
    }

    /// How it ended, or that it runs, and the last that it said: for messages.
    fn last_words(&self) -> String {
        let end = match self.proc.is_running() {
            true => "it runs".to_owned(),
            false => match self.proc.wait(Duration::from_secs(10)) {
                Ok(status) => status.to_string(),
                Err(error) => format!("{error:#}"),
            },
        };
        format!("backend (pid {}): {end}; it said:\n{}", self.proc.pid(), self.proc.tail())
    }

    fn count(&mut self) {
        let text = self.proc.text();
        let lines = text.lines().filter(|line| line.contains("taking again"));
        let number = |line: &str| {
            let digits: String =
                line.split_once("inflight=")?.1.chars().filter(char::is_ascii_digit).collect();
            digits.parse::<u64>().ok()
        };
        self.taken_again += lines.filter_map(number).sum::<u64>();
    }
}

fn spawn(socket: &Path, url: &str, args: &[String]) -> Result<Proc> {
    let proc = serve(socket)?.env("RUST_LOG", "info").env("NO_COLOR", "1").args(args).arg(url).spawn()?;
    proc.wait_line(Stream::Out, "ready:", START)?;
    Ok(proc)
}

/// A chunk and, for a write, its version.
type Asked = (usize, Option<u32>);

/// What is known of the disk and of what is in flight.
pub(crate) struct Load {
    random: u64,
    /// Version of each chunk; 0: never written.
    versions: Vec<u32>,
    busy: Vec<bool>,
    /// By queue and slot.
    slots: Vec<Vec<Option<Asked>>>,
    started: u32,
    pub(crate) done: u64,
}

impl Load {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            random: seed,
            versions: vec![0; CHUNKS],
            busy: vec![false; CHUNKS],
            slots: vec![vec![None; DEPTH]; QUEUES],
            started: 0,
            done: 0,
        }
    }

    pub(crate) fn next(&mut self, below: usize) -> usize {
        // xorshift64*
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % below
    }

    /// Fills every free slot.
    pub(crate) fn fill(&mut self, front: &mut Survivor) -> Result<()> {
        for queue in 0..QUEUES {
            for slot in 0..DEPTH {
                if self.slots[queue][slot].is_some() {
                    continue;
                }
                let chunk = self.next(CHUNKS);
                if self.busy[chunk] {
                    continue;
                }
                self.started += 1;
                let offset = (chunk * CHUNK) as u64;
                let (ask, version) = if self.started.is_multiple_of(64) {
                    (Ask::Flush, None)
                } else if self.versions[chunk] == 0 || self.next(3) != 0 {
                    let data = pattern::make(self.started.into(), offset, CHUNK);
                    (Ask::Write(offset, data), Some(self.started))
                } else {
                    (Ask::Read(offset), None)
                };
                front.submit(queue, slot, &ask)?;
                self.busy[chunk] = true;
                self.slots[queue][slot] = Some((chunk, version));
            }
        }
        Ok(())
    }

    /// Takes the answers that are there and checks them.
    pub(crate) fn collect(&mut self, front: &mut Survivor) -> Result<()> {
        for queue in 0..QUEUES {
            for Answer { slot, status, data } in front.answers(queue)? {
                let asked = self.slots[queue][slot].take();
                let (chunk, version) = asked.with_context(|| format!("slot {slot} was answered twice"))?;
                self.busy[chunk] = false;
                self.done += 1;
                ensure!(status == 0, "queue {queue}, slot {slot}: status {status}");
                let offset = (chunk * CHUNK) as u64;
                match version {
                    Some(version) => self.versions[chunk] = version,
                    None if !data.is_empty() => {
                        let seed = u64::from(self.versions[chunk]);
                        pattern::check(seed, offset, &data).context("read under load")?;
                    }
                    None => {}
                }
            }
        }
        Ok(())
    }

    pub(crate) fn outstanding(&self) -> usize {
        self.slots.iter().flatten().flatten().count()
    }

    /// Waits for all that is in flight, then reads every chunk.
    pub(crate) fn finish(&mut self, front: &mut Survivor) -> Result<()> {
        self.drain(front)?;
        for chunk in (0..CHUNKS).filter(|&chunk| self.versions[chunk] != 0).collect::<Vec<_>>() {
            front.submit(0, 0, &Ask::Read((chunk * CHUNK) as u64))?;
            self.slots[0][0] = Some((chunk, None));
            self.drain(front).with_context(|| format!("chunk {chunk} at the end"))?;
        }
        Ok(())
    }

    fn drain(&mut self, front: &mut Survivor) -> Result<()> {
        loop {
            self.collect(front)?;
            if self.outstanding() == 0 {
                return Ok(());
            }
            ensure!(front.wait(REQUEST)? == Event::Answers, "the backend ended by itself");
        }
    }
}

/// Kills at random moments until there were `kills` of them.
fn survives(kind: Kind, packed: bool, kills: u32, args: &[&str]) -> Result<()> {
    if !target::have(kind) {
        return Ok(());
    }
    let target = Target::start(kind, &Spec::disk(16 << 20))?;
    let queues = QUEUES.to_string();
    let mut backend = Phoenix::start(&target.url(0), &[&["--queues", &queues], args].concat())?;
    let mut front = Survivor::new(QUEUES, packed)?;
    let mut load = Load::new(0x5eed + u64::from(kills) + u64::from(packed));
    let (mut longest, started) = (Duration::ZERO, Instant::now());
    for kill in 0..kills {
        // From before the first message to well into the load.
        let delay = Duration::from_micros(load.next(40_000) as u64);
        // Every fourth for sure with the load running, however slow the machine is; the others at any moment.
        let in_load = kill % 4 == 3;
        let proc = &backend.proc;
        let at = std::thread::scope(|scope| -> Result<Instant> {
            let (running, runs) = mpsc::channel();
            let killer = scope.spawn(move || {
                if in_load {
                    // Nothing comes where it ended by itself, which is told below.
                    let _ = runs.recv_timeout(BACK);
                }
                std::thread::sleep(delay);
                proc.signal(Signal::KILL).map(|()| Instant::now())
            });
            let lived = live(&mut front, &backend.socket, &mut load, &running);
            // It ended before it began to answer: nobody need wait.
            drop(running);
            let at = killer.join().expect("the killer does not panic")?;
            lived.with_context(|| {
                format!("kill {kill}, {delay:?} after the start; {}", backend.last_words())
            })?;
            Ok(at)
        })?;
        backend.rise()?;
        load.fill(&mut front).context("requests without a backend")?;
        longest = longest.max(at.elapsed());
    }
    front.connect(&backend.socket).with_context(|| backend.last_words())?;
    load.finish(&mut front).with_context(|| backend.last_words())?;
    backend.count();
    ensure!(kills < 10 || backend.taken_again > 0, "nothing was ever in flight");
    println!(
        "{kills} kills ({kind:?}, {} ring): {} requests verified, {} taken again, {:.1} s, away for {:.0} ms at most",
        if packed { "packed" } else { "split" },
        load.done,
        backend.taken_again,
        started.elapsed().as_secs_f64(),
        longest.as_secs_f64() * 1e3,
    );
    Ok(())
}

/// One life of the backend, from the first message to its end; tells when it answers requests.
fn live(front: &mut Survivor, socket: &Path, load: &mut Load, running: &Sender<()>) -> Result<()> {
    // It may be dead before it answered all messages.
    if front.connect(socket).is_err() {
        return Ok(());
    }
    loop {
        load.fill(front)?;
        let event = front.wait(REQUEST)?;
        load.collect(front)?;
        if event == Event::Gone {
            return Ok(());
        }
        // The killer may not wait for it.
        let _ = running.send(());
    }
}

/// The end of a connection is not taken for that of the next one, even if a child that is being started still has it.
#[test]
fn an_old_connection_that_lingers_is_not_the_new_ones_end() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(16 << 20))?;
    let mut backend = Phoenix::start(&target.url(0), &["--queues", "2"])?;
    let mut front = Survivor::new(QUEUES, false)?;
    front.connect(&backend.socket)?;
    let lingers = front.duplicate()?;
    backend.proc.kill()?;
    backend.rise()?;
    front.connect(&backend.socket)?;
    write(&mut front, 0, 1).with_context(|| backend.last_words())?;
    drop(lingers);
    Ok(())
}

#[test]
fn a_killed_backend_of_split_rings_loses_nothing() -> Result<()> {
    survives(Kind::Ours, false, 20, &[])
}

#[test]
fn a_killed_backend_of_packed_rings_loses_nothing() -> Result<()> {
    survives(Kind::Ours, true, 20, &["--poll-us", "0"])
}

/// Which of the dead process's sessions a write was on, nobody knows: all of them end before it is repeated.
#[test]
fn a_killed_backend_with_several_sessions_loses_nothing() -> Result<()> {
    survives(Kind::Ours, true, 10, &["--sessions", "2"])?;
    survives(Kind::Tgtd, false, 5, &["--sessions", "2"])
}

#[test]
fn a_killed_backend_of_tgtd_loses_nothing() -> Result<()> {
    survives(Kind::Tgtd, false, 8, &[])
}

#[test]
fn a_killed_backend_of_istgt_loses_nothing() -> Result<()> {
    survives(Kind::Istgt, true, 8, &[])
}

/// `cargo xtask soak kill`.
#[test]
#[ignore = "takes long; run by cargo xtask soak kill"]
fn soak() -> Result<()> {
    let kills = std::env::var("VCP_SOAK_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(100);
    for packed in [false, true] {
        survives(Kind::Ours, packed, kills, &[])?;
        survives(Kind::Tgtd, packed, kills / 4, &["--poll-us", "0"])?;
    }
    Ok(())
}

/// The process is killed while its write is on the way. The next one repeats it and is answered, and so is a newer write to
/// the same place. Then the network delivers what the dead process sent. It must find its session gone: the new process
/// logged in under the same name (RFC 7143 6.3.5), or the old data would overwrite the newer.
fn late_write_of_a_killed_process_is_void(kind: Kind) -> Result<()> {
    if !target::have(kind) {
        return Ok(());
    }
    let target = Target::start(kind, &Spec::disk(16 << 20))?;
    let proxy = Proxy::start(target.portal())?;
    let mut backend = Phoenix::start(&target.url_at(proxy.addr(), 0), &["--queues", "2"])?;
    let mut front = Survivor::new(QUEUES, false)?;
    front.connect(&backend.socket)?;
    write(&mut front, 0, 1)?;
    let connections = proxy.accepted();
    let arrived = proxy.arrived();
    proxy.hold(true);
    front.submit(0, 0, &Ask::Write(0, pattern::make(2, 0, CHUNK)))?;
    // A command at least; its data with it if the target takes immediate data.
    proxy.wait_arrived(arrived + 48, BACK).context("the write is on its way")?;
    backend.proc.kill()?;
    backend.rise()?;
    proxy.wait_accepted(connections + 1, BACK)?;
    front.connect(&backend.socket)?;
    answer(&mut front).context("the repeated write")?;
    write(&mut front, 0, 3)?;
    proxy.hold(false);
    proxy.wait_finished(connections, BACK).context("the old connection")?;
    front.submit(0, 1, &Ask::Flush)?;
    answer(&mut front)?;
    front.submit(0, 1, &Ask::Read(0))?;
    let data = answer(&mut front)?;
    pattern::check(3, 0, &data).context("a write of the dead process came after a newer one was answered")?;
    Ok(())
}

fn write(front: &mut Survivor, offset: u64, seed: u64) -> Result<()> {
    front.submit(0, 0, &Ask::Write(offset, pattern::make(seed, offset, CHUNK)))?;
    answer(front).map(drop)
}

/// Waits for the only request in flight.
fn answer(front: &mut Survivor) -> Result<Vec<u8>> {
    loop {
        if let Some(Answer { status, data, .. }) = front.answers(0)?.pop() {
            ensure!(status == 0, "status {status}");
            return Ok(data);
        }
        ensure!(front.wait(REQUEST)? == Event::Answers, "the backend ended by itself");
    }
}

#[test]
fn late_write_of_a_killed_process_to_our_target_is_void() -> Result<()> {
    late_write_of_a_killed_process_is_void(Kind::Ours)
}

#[test]
fn late_write_of_a_killed_process_to_tgtd_is_void() -> Result<()> {
    late_write_of_a_killed_process_is_void(Kind::Tgtd)
}

#[test]
fn late_write_of_a_killed_process_to_istgt_is_void() -> Result<()> {
    late_write_of_a_killed_process_is_void(Kind::Istgt)
}

/// Writes at random and reads back what it wrote, with checksums, over and over while the backend dies.
pub(crate) const FIO: &str = r#"
wait_disk vda
value mq $(ls /sys/block/vda/mq | wc -l)
# VIRTIO_F_RING_PACKED is bit 34.
value packed $(cut -c35 /sys/block/vda/device/features)
(fio --name=v --filename=/dev/vda --direct=1 --ioengine=psync --thread --numjobs=8 --offset_increment=1m --size=1m \
    --rw=randwrite --bs=4k --verify=crc32c --verify_fatal=1 --verify_backlog=32 --time_based --runtime=SECONDS \
    --eta=never --output=/tmp/fio.log; echo $? >/tmp/fio.status) &
sleep 1
value running yes
wait
value fio $(cat /tmp/fio.status)
[ $(cat /tmp/fio.status) = 0 ] || cat /tmp/fio.log
value issued $(grep -c 'issued rwts: total=[1-9]' /tmp/fio.log)
value errors $(dmesg | grep -ciE 'i/o error|vda.*error|hung|virtio.*not a head|reset')
"#;

/// Stock QEMU and a stock guest, which sees nothing of it but a pause.
fn qemu_guest_survives(packed: bool, kills: u32) -> Result<()> {
    if !target::have(Kind::Ours) || !tool::have(&["qemu-system-x86_64", "fio"]) {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(16 << 20))?;
    let proxy = Proxy::start(target.portal())?;
    let mut backend = Phoenix::start(&target.url_at(proxy.addr(), 0), &["--queues", "2"])?;
    let mut guest = QemuGuest::new().program("/usr/bin/fio").disk(&backend.socket, 2).reconnects();
    if packed {
        guest = guest.property("packed=on");
    }
    let mut guest = guest.start(&FIO.replace("SECONDS", &(5 + 3 * kills).to_string()))?;
    guest.wait_value("running")?;
    for kill in 0..kills {
        if kill == 0 {
            // One for sure with a request in flight: the target does not get it.
            let arrived = proxy.arrived();
            proxy.hold(true);
            proxy.wait_arrived(arrived + 48, BACK).context("a command of the guest's")?;
        } else {
            // The others at any moment.
            std::thread::sleep(Duration::from_millis(300 + 137 * u64::from(kill)));
        }
        backend.proc.kill()?;
        proxy.hold(false);
        backend.rise()?;
        backend.proc.wait_line(Stream::Err, "front end connected", BACK)?;
    }
    let outcome = guest.wait()?;
    backend.count();
    println!("QEMU, {kills} kills, packed {packed}: {} requests taken again", backend.taken_again);
    ensure!(outcome.status == 0 && outcome.number("fio")? == 0, "fio failed:\n{}", outcome.console);
    ensure!(outcome.number("issued")? == 8, "fio did nothing:\n{}", outcome.console);
    ensure!(outcome.number("mq")? == 2 && outcome.number("packed")? == u64::from(packed), "not as asked for");
    ensure!(outcome.number("errors")? == 0, "the guest complains:\n{}", outcome.console);
    ensure!(backend.taken_again > 0, "nothing was ever in flight");
    Ok(())
}

#[test]
fn a_guest_of_qemu_survives_kills_with_split_rings() -> Result<()> {
    qemu_guest_survives(false, 5)
}

#[test]
fn a_guest_of_qemu_survives_kills_with_packed_rings() -> Result<()> {
    qemu_guest_survives(true, 5)
}
