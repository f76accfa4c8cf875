//! The whole front end against qemu-storage-daemon, a backend that we did not write.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use clap::Parser;
use rustix::io::{FdFlags, fcntl_setfd};

use super::args::{BenchArgs, BenchCommand, BlkArgs};
use super::report;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: BenchArgs,
}

fn parse(line: &str) -> BlkArgs {
    let BenchCommand::Blk(args) =
        Line::parse_from(["vcp", "blk"].into_iter().chain(line.split_whitespace())).args.command;
    args
}

/// A daemon that exports a sparse file of 16 MiB.
struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Daemon {
    fn start(options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.raw");
        File::create(&image).unwrap().set_len(16 << 20).unwrap();
        // It inherits a socket that listens already: nothing to wait for.
        let listener = UnixListener::bind(dir.path().join("disk.sock")).unwrap();
        fcntl_setfd(&listener, FdFlags::empty()).unwrap();
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "qemu-storage-daemon", "--blockdev"])
            .arg(format!("driver=file,node-name=disk,filename={}", image.display()))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,addr.type=fd,addr.str={},{options}",
                listener.as_raw_fd()
            ))
            .spawn()
            .expect("the Debian package qemu-system-common is installed");
        Self { child, dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("disk.sock")
    }

    fn image(&self) -> File {
        File::options().read(true).write(true).open(self.dir.path().join("disk.raw")).unwrap()
    }

    fn bench(&self, line: &str) -> anyhow::Result<serde_json::Value> {
        let args = parse(&format!("--socket {} {line}", self.socket().display()));
        Ok(serde_json::to_value(report::measure(&args)?).unwrap())
    }

    fn error(&self, line: &str) -> String {
        format!("{:#}", self.bench(line).unwrap_err())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn loads_and_verifies_with_all_ring_features() {
    let daemon = Daemon::start("writable=on,num-queues=2");
    for line in [
        "--rw verify --secs 0.1 --bs 16k",
        "--rw verify --secs 0.1 --bs 4k --qd 7 --no-indirect",
        "--rw verify --secs 0.1 --bs 8k --no-event-idx --queues 2",
        "--rw verify --secs 0.1 --bs 8k --wait poll",
    ] {
        let report = daemon.bench(line).unwrap_or_else(|e| panic!("{line}: {e:#}"));
        assert!(report["verified_rounds"].as_u64() >= Some(2), "{line}: {report}");
        assert_eq!(report["capacity_bytes"], 16 << 20);
    }
    let pid = daemon.child.id();
    let report = daemon.bench(&format!("--secs 0.3 --pid {pid}")).unwrap();
    assert!(report["ios"].as_u64() > Some(32) && report["writes"] == 0, "{report}");
    assert!(report["latency_us"]["p50"].as_f64() <= report["latency_us"]["p99"].as_f64(), "{report}");
    assert!(report["kicks"].as_u64() > Some(0) && report["calls"].as_u64() > Some(0), "{report}");
    assert!(report["backend_cpu_us_per_io"].is_f64(), "{report}");
}

/// What is counted is what happened after the warm-up, time and CPU time included.
#[test]
fn the_warm_up_is_not_counted() {
    let daemon = Daemon::start("writable=on");
    let pid = daemon.child.id();
    let before = super::cpu::time(pid).unwrap();
    let report = daemon.bench(&format!("--warm-up 0.6 --secs 0.2 --qd 4 --pid {pid}")).unwrap();
    let all = super::cpu::time(pid).unwrap() - before;
    let figure = |name: &str| report[name].as_f64().unwrap();
    let (from, to, secs) = (figure("counted_from"), figure("counted_to"), figure("secs"));
    assert!((to - from - secs).abs() < 1e-3 && (0.0..0.6).contains(&(secs - 0.2)), "{report}");
    assert!((figure("ios") / secs - figure("iops")).abs() < 1.0 && figure("iops") > 0.0, "{report}");
    let counted = figure("backend_cpu_us_per_io") * figure("ios") / 1e6;
    assert!(counted < 0.7 * all.as_secs_f64(), "{counted} of {all:?}: {report}");
    assert!(daemon.error("--rw verify --warm-up 1").contains("no --warm-up"));
}

#[test]
fn a_mixed_load_reads_more_than_it_writes() {
    let daemon = Daemon::start("writable=on");
    let report = daemon.bench("--rw randrw --secs 0.3").unwrap();
    let (reads, writes) = (report["reads"].as_u64().unwrap(), report["writes"].as_u64().unwrap());
    assert!(reads > writes && writes > 0 && report["flushes"] == 1, "{report}");
    assert_eq!(Some(reads + writes), report["ios"].as_u64());
}

#[test]
fn what_was_verified_is_in_the_file() {
    let daemon = Daemon::start("writable=on");
    daemon.bench("--rw verify --secs 0.01 --bs 4k --seed 77").unwrap();
    let mut sector = [0; 512];
    daemon.image().read_exact_at(&mut sector, 5 * 512).unwrap();
    let generation = u32::from_le_bytes(sector[16..20].try_into().unwrap());
    super::pattern::check(&sector, 77, 5, generation).unwrap();
}

#[test]
fn a_file_that_someone_else_writes_fails_verification() {
    let daemon = Daemon::start("writable=on");
    let image = daemon.image();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                image.write_all_at(&[0; 512], 1 << 20).unwrap();
            }
        });
        let error = daemon.error("--rw verify --secs 20");
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        error
    });
    assert!(error.contains("wrong data at sector 2048, byte "), "{error}");
}

#[test]
fn wishes_that_the_device_cannot_fulfil_are_refused() {
    let daemon = Daemon::start("writable=off");
    assert_eq!(daemon.error("--rw write"), "the device is read-only");
    assert_eq!(daemon.error("--queues 3"), "the backend has 1 queues, not --queues 3");
    assert!(daemon.error("--bs 1000").starts_with("--bs 1000 is not a multiple"));
    assert!(daemon.error("--region 1k").contains("have no request of 4096 bytes"));
}

#[test]
fn a_backend_that_dies_or_hangs_ends_the_run() {
    let mut daemon = Daemon::start("writable=on");
    let args = parse(&format!("--socket {} --secs 60", daemon.socket().display()));
    let run = std::thread::spawn(move || report::measure(&args).map(|_| ()));
    // The backend takes the connection before it can be killed in the middle of the load.
    let deadline = Instant::now() + Duration::from_secs(10);
    while super::cpu::time(daemon.child.id()).unwrap() < Duration::from_millis(100) {
        assert!(Instant::now() < deadline && !run.is_finished(), "no load arrives");
        std::thread::yield_now();
    }
    daemon.child.kill().unwrap();
    let error = format!("{:#}", run.join().unwrap().unwrap_err());
    assert!(error.contains("the backend closed the connection"), "{error}");

    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("silent.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let args = parse(&format!("--socket {} --timeout 0.2", socket.display()));
    let error = format!("{:#}", report::measure(&args).unwrap_err());
    assert_eq!(error, "the backend did not answer GET_FEATURES within 0.2 s");
}
