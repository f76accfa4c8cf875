//! DPDK's testpmd with virtio_user ports: front ends that nobody here wrote, in all of DPDK's ring variants.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::ensure;
use rustix::process::Signal;

use crate::Result;
use crate::proc::{Cmd, Proc, Stream};

/// How long it may take to start, on a busy machine.
const START: Duration = Duration::from_secs(60);

/// A running testpmd with two ports that send to each other.
#[derive(Debug)]
pub struct Testpmd {
    proc: Proc,
    /// It prints statistics from time to time.
    prints: bool,
}

/// What its ports are like.
#[derive(Clone, Debug)]
pub struct Options {
    /// More options of each virtio_user port, with a comma in front.
    pub port: String,
    /// How frames are forwarded.
    pub mode: &'static str,
    /// Bytes of a frame, with its checksum.
    pub frame_bytes: usize,
    /// Hardware threads, as `--lcores` has them.
    pub lcores: String,
    /// Pairs of queues of each port.
    pub queues: u16,
    /// Seconds between its figures; 0: none before its end.
    pub stats_period_s: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            port: String::new(),
            mode: "flowgen",
            frame_bytes: 64,
            lcores: "0@0,1@0".into(),
            queues: 1,
            stats_period_s: 0,
        }
    }
}

impl Testpmd {
    /// Starts it on the sockets of two ports.
    pub fn start(sockets: [&Path; 2], options: &Options) -> Result<Self> {
        let mut command = Self::command(&format!("fe{}", unique()), &options.lcores);
        for (at, socket) in sockets.iter().enumerate() {
            command = command.arg(format!(
                "--vdev=net_virtio_user{at},path={},mac=02:00:00:00:00:0{},queues={},queue_size=1024{}",
                socket.display(),
                at + 1,
                options.queues,
                options.port
            ));
        }
        let proc = command
            .arg("--")
            .args(["--total-num-mbufs=16384", "--mbuf-size=2176", "--nb-cores=1", "--auto-start"])
            .arg(format!("--forward-mode={}", options.mode))
            .arg(format!("--txpkts={}", options.frame_bytes))
            .arg(format!("--stats-period={}", options.stats_period_s))
            .args(["--eth-peer=0,02:00:00:00:00:02", "--eth-peer=1,02:00:00:00:00:01"])
            .args([format!("--rxq={}", options.queues), format!("--txq={}", options.queues)])
            .keep_stdin()
            .spawn()?;
        // It does not say when it begins before it ends: its output is not a terminal. Its traffic says so.
        Ok(Self { proc, prints: options.stats_period_s != 0 })
    }

    /// Starts DPDK's own vhost back end on two sockets, which passes frames from one to the other.
    pub fn back_end(sockets: [&Path; 2], lcores: &str) -> Result<Self> {
        let mut command = Self::command(&format!("be{}", unique()), lcores);
        for (at, socket) in sockets.iter().enumerate() {
            command = command.arg(format!("--vdev=net_vhost{at},iface={},queues=1", socket.display()));
        }
        let proc = command
            .arg("--")
            .args(["--forward-mode=io", "--total-num-mbufs=16384", "--nb-cores=1", "--auto-start"])
            .keep_stdin()
            .spawn()?;
        let end = Instant::now() + START;
        while !sockets.iter().all(|socket| socket.exists()) {
            ensure!(proc.is_running() && Instant::now() < end, "no back end: {}", proc.tail());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Self { proc, prints: false })
    }

    fn command(prefix: &str, lcores: &str) -> Cmd {
        Cmd::new("dpdk-testpmd")
            .args(["--lcores", lcores, "--no-huge", "-m", "512", "--no-pci", "--no-telemetry"])
            .arg(format!("--file-prefix={prefix}"))
    }

    /// Its process.
    pub fn proc(&self) -> &Proc {
        &self.proc
    }

    /// Ends it; what it says at the end.
    pub fn end(self, deadline: Duration) -> Result<String> {
        if self.prints {
            // It reads nothing while it prints statistics.
            self.proc.signal(Signal::INT)?;
        } else {
            // It ends at the end of its input.
            self.proc.say(b"\n")?;
            self.proc.close_stdin();
        }
        self.proc.wait(deadline)?;
        Ok(self.proc.stream(Stream::Out))
    }
}

/// Where DPDK's drivers are, if they are installed.
#[must_use]
pub fn driver(name: &str) -> Option<PathBuf> {
    let dirs = std::fs::read_dir("/usr/lib/x86_64-linux-gnu/dpdk").ok()?;
    dirs.flatten().map(|dir| dir.path().join(name)).find(|path| path.is_file())
}

fn unique() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
