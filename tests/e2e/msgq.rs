//! A disk for programs without a virtual machine: the `msgq-blk` client against the real `vcp-iscsi` and the embedded
//! target, with deaths and hostile clients.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use msgq::handshake::{Config, Link};
use msgq::region::{Access, Pool};
use msgq::{Channel, Head, Incoming, SendError};
use msgq_blk::{Disk, Options, proto};
use tempfile::TempDir;
use vcp_tests::proc::{Proc, Stream};
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, pattern};

use crate::support::{COMMAND, vcp, vcp_iscsi};

const SIZE: u64 = 8 << 20;

/// A `vcp-iscsi` that serves a LUN to msgq clients only.
struct Server {
    target: Target,
    proc: Proc,
    path: PathBuf,
    _dir: TempDir,
}

impl Server {
    fn start() -> Result<Self> {
        let target = Target::start(Kind::Ours, &Spec::disk(SIZE))?;
        let dir = tempfile::Builder::new().prefix("vcp-msgq-").tempdir()?;
        let path = dir.path().join("disk.msgq");
        let proc = spawn(&path, &target.url(0))?;
        Ok(Self { target, proc, path, _dir: dir })
    }

    fn restart(&mut self) -> Result<()> {
        self.proc.kill()?;
        self.proc = spawn(&self.path, &self.target.url(0))?;
        Ok(())
    }

    fn image(&self) -> Result<Vec<u8>> {
        Ok(std::fs::read(&self.target.luns()[0].image)?)
    }
}

fn spawn(path: &Path, url: &str) -> Result<Proc> {
    let proc = vcp_iscsi(["serve", "--exit-with-parent", "--msgq-path"])?.arg(path).arg(url).spawn()?;
    let line = proc.wait_line(Stream::Out, "ready:", COMMAND)?;
    ensure!(line.contains(&format!("msgq={}", path.display())), "{line}");
    Ok(proc)
}

fn options() -> Options {
    Options { deadline: COMMAND, ..Options::default() }
}

fn soon() -> Instant {
    Instant::now() + COMMAND
}

/// Waits for all that is in flight; `each` sees every completion.
fn finish(disk: &mut Disk, mut each: impl FnMut(&Disk, &msgq_blk::Done) -> Result<()>) -> Result<()> {
    let end = soon();
    while disk.inflight() > 0 {
        match disk.poll()? {
            Some(done) => each(disk, &done)?,
            None if Instant::now() > end => bail!("{} requests do not end", disk.inflight()),
            None => disk.wait(Some(end))?,
        }
    }
    Ok(())
}

#[test]
fn a_program_without_a_guest_reads_and_writes_a_disk() -> Result<()> {
    let server = Server::start()?;
    let mut disk = Disk::open(&server.path, &options())?;
    ensure!(disk.info().bytes() == SIZE && disk.info().block_bytes == 512, "{:?}", disk.info());
    // Longer than one request may be, at an odd place.
    let data = pattern::make(7, 512, 1 << 20);
    disk.write_at(1, &data)?;
    disk.flush()?;
    ensure!(server.image()?[512..512 + data.len()] == data[..], "the disk has other data");
    let mut back = vec![0; data.len()];
    disk.read_at(1, &mut back)?;
    ensure!(back == data, "other data comes back");
    // Many in flight, each checked by its tag.
    for round in 0..20u64 {
        for tag in 0..u64::from(disk.depth()) {
            disk.submit_read(1 + (tag * 13 + round) % 1024, 8 * 512, tag)?;
        }
        ensure!(matches!(disk.submit_read(0, 512, 99), Err(msgq_blk::Error::Full)));
        finish(&mut disk, |disk, done| {
            done.result?;
            let at = (done.tag * 13 + round) as usize % 1024 * 512;
            let mut part = [0; 8 * 512];
            disk.read_back(done, 0, &mut part)?;
            ensure!(part[..] == data[at..at + part.len()], "request {} has other data", done.tag);
            Ok(())
        })?;
    }
    // What cannot be is refused here or there, and harms nothing.
    for (sector, len) in [(SIZE / 512, 512), (0, 100), (0, 0), (u64::MAX, 512), (0, 1 << 30)] {
        ensure!(matches!(disk.submit_read(sector, len, 0), Err(msgq_blk::Error::Range { .. })));
    }
    if disk.info().write_zeroes_sectors != 0 {
        disk.submit_discard(1, 8, true, 5)?;
        finish(&mut disk, |_, done| Ok(done.result?))?;
        disk.read_at(1, &mut back[..4096])?;
        ensure!(back[..4096].iter().all(|byte| *byte == 0), "zeroes were not written");
    }
    Ok(())
}

/// Two programs and a front end of a guest at once, each with its own part of the disk.
#[test]
fn clients_and_a_guest_share_a_vcp() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(SIZE))?;
    let dir = tempfile::tempdir()?;
    let (path, socket) = (dir.path().join("disk.msgq"), dir.path().join("blk.sock"));
    let mut command = vcp_iscsi(["serve", "--exit-with-parent", "--msgq-path"])?.arg(&path);
    command = command.arg("--socket-path").arg(&socket).arg(target.url(0));
    let proc = command.spawn()?;
    proc.wait_line(Stream::Out, "ready:", COMMAND)?;
    let mut guest = vcp_tests::front::Driver::connect(&socket, 1)?;
    let mut disks = [Disk::open(&path, &options())?, Disk::open(&path, &options())?];
    for round in 0..30u64 {
        for (n, disk) in disks.iter_mut().enumerate() {
            let sector = n as u64 * 2048;
            for tag in 0..16 {
                disk.submit_write(sector + tag * 8, &pattern::make(round, tag, 4096), tag)?;
            }
        }
        guest.write(4 << 20, &pattern::make(round, 99, 65536))?;
        for disk in &mut disks {
            finish(disk, |_, done| Ok(done.result?))?;
        }
    }
    for (n, disk) in disks.iter_mut().enumerate() {
        let mut back = vec![0; 4096];
        for tag in 0..16 {
            disk.read_at(n as u64 * 2048 + tag * 8, &mut back)?;
            ensure!(back == pattern::make(29, tag, 4096), "client {n}, block {tag}");
        }
    }
    ensure!(guest.read(4 << 20, 65536)? == pattern::make(29, 99, 65536), "the guest's data");
    Ok(())
}

/// The VCP is killed under load, again and again: the client goes on where it was, and every write is there.
#[test]
fn a_killed_vcp_costs_the_client_nothing() -> Result<()> {
    let mut server = Server::start()?;
    let mut disk = Disk::open(&server.path, &options())?;
    let mut written = vec![0u64; 64];
    for round in 1..=5u64 {
        for block in 0..64 {
            disk.submit_write(block * 8, &pattern::make(round, block, 4096), block)?;
            written[block as usize] = round;
        }
        // Some are under way, some are done, some have not been looked at.
        for _ in 0..round * 7 {
            if let Some(done) = disk.poll()? {
                done.result?;
            }
        }
        server.restart()?;
        let end = soon();
        while disk.inflight() > 0 {
            match disk.poll() {
                Ok(Some(done)) => done.result?,
                Ok(None) => {
                    ensure!(Instant::now() < end, "{} requests do not end", disk.inflight());
                    disk.wait(Some(end))?;
                }
                Err(msgq_blk::Error::Channel(msgq::Error::Gone)) => disk.reconnect(&server.path)?,
                Err(error) => return Err(error).context(format!("round {round}")),
            }
        }
    }
    let stats = disk.channel().context("a channel")?.stats().clone();
    ensure!(stats.replays > 0, "nothing was in flight when the VCP died");
    let mut back = vec![0; 4096];
    for (block, round) in written.iter().enumerate() {
        if let Err(msgq_blk::Error::Channel(msgq::Error::Gone)) = disk.read_at(block as u64 * 8, &mut back) {
            disk.reconnect(&server.path)?;
            disk.read_at(block as u64 * 8, &mut back)?;
        }
        ensure!(back == pattern::make(*round, block as u64, 4096), "block {block}");
    }
    Ok(())
}

/// A client that breaks every rule of the protocol, or of the queue: refused or cut off; others do not notice.
#[test]
fn a_hostile_client_harms_only_itself() -> Result<()> {
    let server = Server::start()?;
    let mut good = Disk::open(&server.path, &options())?;
    good.write_at(0, &pattern::make(1, 0, 4096))?;
    // One that connects and says nothing keeps nobody waiting.
    let _silent = Link::dial(&server.path)?;
    // One without the protocol's feature is not set up.
    let plain = Config { deadline: COMMAND, ..Config::default() };
    ensure!(Channel::connect(Link::dial(&server.path)?, &plain, &[]).is_err(), "set up without the feature");

    let config = Config { features: proto::FEATURE, deadline: COMMAND, ..Config::default() };
    let fill = Pool::new(0, 1, 8192, 4, Access::Both)?;
    let data = Pool::new(1, 1, 8192, 4, Access::Owner)?;
    let mut channel = Channel::connect(Link::dial(&server.path)?, &config, &[fill.clone(), data.clone()])?;
    let cases = [
        // A read into memory that the VCP may not write.
        (proto::READ, 0, false, 4096, proto::INVALID),
        (proto::READ, SIZE / 512, true, 4096, proto::IO_ERROR),
        (proto::READ, u64::MAX, true, 4096, proto::IO_ERROR),
        (proto::WRITE, u64::MAX - 7, false, 4096, proto::IO_ERROR),
        (proto::READ, 0, true, 100, proto::IO_ERROR),
        (proto::FLUSH, 0, false, 512, proto::INVALID),
        (proto::CONFIG, 0, false, 512, proto::INVALID),
        (99, 0, true, 512, proto::UNSUPPORTED),
        (proto::READ, 0, true, 4096, proto::OK),
    ];
    for (opcode, sector, writable, len, code) in cases {
        let parcel = if writable {
            fill.blank()?.context("a buffer")?.freeze(0..len)
        } else {
            data.loan()?.context("a buffer")?.freeze(0..len)
        };
        let head = Head { opcode, value: Some(sector), ..Head::default() };
        channel.request_one(head, parcel).map_err(|(error, _)| error)?;
        let done = loop {
            match channel.receive()? {
                Some(Incoming::Completion(done)) => break done,
                _ => ensure!(channel.wait(Some(soon()))?, "opcode {opcode} is not answered"),
            }
        };
        ensure!(done.code == code, "opcode {opcode} at {sector}: code {}, not {code}", done.code);
    }
    // Messages that nobody asked for, without end: taken and dropped.
    let end = Instant::now() + Duration::from_secs(1);
    let mut sent = 0u64;
    while Instant::now() < end {
        match channel.send(0, 3, b"nobody asked") {
            Ok(()) => sent += 1,
            Err(SendError::Full) => {
                channel.wait(Some(soon()))?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    ensure!(sent > 1000, "{sent} messages");
    let mut back = vec![0; 4096];
    good.read_at(0, &mut back)?;
    ensure!(back == pattern::make(1, 0, 4096), "the other client's data");
    ensure!(server.proc.is_running(), "the VCP ended");
    Ok(())
}

/// Everything that a channel counts is on the VCP's control socket, by channel; the client's own side is in its control memory,
/// for whoever holds that.
#[test]
fn a_channel_tells_what_it_does() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(SIZE))?;
    let dir = tempfile::tempdir()?;
    let (path, control) = (dir.path().join("disk.msgq"), dir.path().join("ctl"));
    let command = vcp_iscsi(["serve", "--exit-with-parent", "--msgq-path"])?.arg(&path);
    let proc = command.arg("--control").arg(&control).arg(target.url(0)).spawn()?;
    proc.wait_line(Stream::Out, "ready:", COMMAND)?;
    let mut disk = Disk::open(&path, &options())?;
    for tag in 0..40 {
        disk.submit_read(tag * 8, 4096, tag)?;
        finish(&mut disk, |_, done| Ok(done.result?))?;
    }
    let channel = disk.channel().context("a channel")?;
    let keepsake = channel.keepsake();
    let number = format!("{:032x}", keepsake.channel);
    let metrics = vcp_tests::switch::ask(&control, &serde_json::json!({"cmd": "metrics"}))?;
    let devices = metrics["devices"].as_array().context("devices")?;
    let device = devices.iter().find(|device| device["name"] == "msgq0").context("msgq0")?;
    let samples = device["samples"].as_array().context("samples")?;
    let find = |name: &str, label: &str, value: &str| {
        let fits = |sample: &&serde_json::Value| {
            let labels = &sample["labels"];
            sample["name"] == name && labels["channel"] == number.as_str() && labels[label] == value
        };
        samples.iter().find(fits).with_context(|| format!("no {name} with {label}={value} in {device}"))
    };
    // One more: what the disk is.
    for (event, count) in [("rx_messages", 41), ("tx_messages", 41), ("replays", 0), ("replays_merged", 0)] {
        ensure!(find("vcp_msgq_events_total", "event", event)?["value"] == count, "{event}: {device}");
    }
    for event in msgq::COUNTERS {
        if !["spin_ns", "epoch", "in_flight_high"].contains(&event) {
            find("vcp_msgq_events_total", "event", event)?;
        }
    }
    for rule in msgq::error::RULE_NAMES {
        ensure!(find("vcp_msgq_violations_total", "rule", rule)?["value"] == 0, "{device}");
    }
    for name in
        ["vcp_msgq_in_flight", "vcp_msgq_in_flight_high", "vcp_msgq_epoch", "vcp_msgq_spin_seconds_total"]
    {
        find(name, "channel", &number)?;
    }
    let service = find("vcp_msgq_service_seconds", "channel", &number)?;
    ensure!(service["count"] == 41 && service["sum_seconds"].as_f64() > Some(0.0), "{service}");
    find("vcp_msgq_latency_seconds", "channel", &number)?;
    let status = vcp_tests::switch::ask(&control, &serde_json::json!({"cmd": "status"}))?;
    ensure!(status.to_string().contains("\"service_ns\":{\"count\":41"), "{status}");
    // A request cannot take less time than what the VCP needs for it.
    let stats = channel.stats();
    ensure!(stats.latency.count() == 41, "{stats:?}");
    let whole = stats.latency.sum_ns as f64 / 1e9;
    ensure!(Some(whole) >= service["sum_seconds"].as_f64(), "{whole} s, and {service} of that in the VCP");
    // It was written before the last sleep.
    let seen = msgq::Observed::read(keepsake.control)?;
    ensure!(seen.latency.count() <= 41 && seen.counters[0] > 0, "{seen:?}");
    Ok(())
}

/// `vcp bench blk --msgq` verifies data through the same path.
#[test]
fn the_load_generator_speaks_msgq() -> Result<()> {
    let server = Server::start()?;
    let socket = server.path.display().to_string();
    let args = ["bench", "blk", "--msgq", "--json", "--socket", &socket, "--rw", "verify", "--region", "2M"];
    let text = vcp(args)?.args(["--secs", "0.2", "--queues", "2"]).output(COMMAND)?;
    let report: serde_json::Value = serde_json::from_str(&text)?;
    ensure!(report["verified_rounds"].as_u64() >= Some(2), "{text}");
    let args = ["bench", "blk", "--msgq", "--json", "--socket", &socket, "--secs", "0.2"];
    let report: serde_json::Value = serde_json::from_str(&vcp(args)?.output(COMMAND)?)?;
    ensure!(report["ios"].as_u64() > Some(100), "{report}");
    Ok(())
}
