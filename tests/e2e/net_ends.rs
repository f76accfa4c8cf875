//! Ports whose guests reset their device, take it away and bring it again, under load: what they leave behind (nothing), and what
//! two others that send to each other all the time notice of it (nothing, to the frame).
//!
//! `VCP_SOAK_NET_KILLS` says how often; `cargo xtask soak net` sets it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::json;
use vcp_tests::proc::{Cmd, Proc, Stream};
use vcp_tests::switch::Switch;
use vcp_tests::{Result, procfs, tool};

/// How long traffic may take to get going, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Frames that each side must get after each cycle.
const SOME: u64 = 300;
/// Of memory that one cycle after another may not add up to, KiB.
const GROWN_KIB: u64 = 2048;
/// The ports under test are `p0` and `p1`, in a VLAN of their own; `p2` and `p3` are the bystanders.
const PORTS: [&str; 4] = [",vlan=5", ",vlan=5", ",vlan=6", ",vlan=6"];

fn cycles(few: u32) -> u32 {
    std::env::var("VCP_SOAK_NET_KILLS").ok().and_then(|count| count.parse().ok()).unwrap_or(few)
}

/// testpmd that takes commands.
struct Pmd(Proc);

fn mac(port: usize) -> String {
    format!("02:00:00:00:00:0{port}")
}

/// The device of `port`.
fn device(switch: &Switch, port: usize, at: usize) -> String {
    let socket = switch.socket(port);
    format!("net_virtio_user{at},path={},mac={},queues=1,queue_size=256", socket.display(), mac(port))
}

impl Pmd {
    /// With ports of the switch, each of which sends to the port `to`: one port as fast as it can, two by passing a hundred
    /// frames round and round.
    fn start(switch: &Switch, ports: &[(usize, usize)]) -> Result<Self> {
        // Tests of one process run beside each other.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("--file-prefix=ends{}-{number}", std::process::id());
        // Its lines come when they are said.
        let mut command = Cmd::new("stdbuf")
            .args(["-oL", "dpdk-testpmd", "--lcores", "0@0-1,1@0-1", "--no-huge", "-m", "128", "--no-pci"])
            .args(["--no-telemetry", &prefix]);
        for (at, &(port, _)) in ports.iter().enumerate() {
            command = command.arg(format!("--vdev={}", device(switch, port, at)));
        }
        let mode = if ports.len() == 1 { "--forward-mode=flowgen" } else { "--forward-mode=io" };
        command = command.args(["--", "-i", "--total-num-mbufs=4096", "--nb-cores=1", mode]);
        for (at, &(_, to)) in ports.iter().enumerate() {
            command = command.arg(format!("--eth-peer={at},{}", mac(to)));
        }
        let this = Self(command.keep_stdin().spawn()?);
        this.say(if ports.len() == 1 { "start" } else { "start tx_first 2" })?;
        Ok(this)
    }

    fn say(&self, command: &str) -> Result<()> {
        self.0.say(format!("{command}\n").as_bytes())
    }

    /// Frames that its ports have received and sent since they began, by port.
    fn figures(&self) -> Result<BTreeMap<u64, (u64, u64)>> {
        let blocks = |text: &str| text.matches("NIC statistics for port").count();
        let before = blocks(&self.0.stream(Stream::Out));
        self.say("show port stats all")?;
        let end = Instant::now() + PATIENCE;
        loop {
            let text = self.0.stream(Stream::Out);
            let all = text.split("NIC statistics for port ").skip(1 + before);
            let figures: Option<BTreeMap<_, _>> = all.map(figures).collect();
            if let Some(figures) = figures.filter(|figures| figures.len() == 2) {
                return Ok(figures);
            }
            ensure!(Instant::now() < end && self.0.is_running(), "no figures: {}", self.0.tail());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn quit(self) -> Result<()> {
        self.say("stop")?;
        self.say("quit")?;
        ensure!(self.0.wait(PATIENCE)?.success(), "testpmd failed: {}", self.0.tail());
        Ok(())
    }
}

/// A port's number, what it has received and what it has sent.
fn figures(block: &str) -> Option<(u64, (u64, u64))> {
    let number = |name: &str| block.split(name).nth(1)?.split_whitespace().next()?.parse().ok();
    let port = block.split_whitespace().next()?.parse().ok()?;
    // The last line of a block.
    block.contains("Tx-pps").then_some(())?;
    Some((port, (number("RX-packets:")?, number("TX-packets:")?)))
}

/// A switch of four ports, two of which are loaded all the time and are none of the test's business.
struct Bed {
    switch: Switch,
    bystanders: Pmd,
}

/// What a process holds: descriptors, and memory of its own in KiB.
type Held = (usize, u64);

impl Bed {
    fn start() -> Result<Self> {
        let switch = Switch::start_ports(&PORTS, &[])?;
        let bystanders = Pmd::start(&switch, &[(2, 3), (3, 2)])?;
        let this = Self { switch, bystanders };
        this.moves(&["p2", "p3"])?;
        Ok(this)
    }

    /// Waits until these ports have got frames.
    fn moves(&self, ports: &[&str]) -> Result<()> {
        let before = self.switch.counters()?;
        for name in ports {
            let got = before.iter().find(|port| port["port"] == *name);
            let got = got.and_then(|port| port["out_frames"].as_u64()).context("no such port")?;
            self.switch.wait_for(name, "out_frames", got + SOME, PATIENCE)?;
        }
        Ok(())
    }

    /// Waits until `port` has a front end, or none.
    fn attached(&self, port: usize, wanted: bool) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let answer = self.switch.ask(&json!({"cmd": "status"}))?;
            let devices = answer["devices"].as_array().context("no devices")?;
            if devices.get(port).is_some_and(|device| device["status"]["attached"] == wanted) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "port {port} is not as it should be: {answer}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn held(&self) -> Result<Held> {
        let pid = self.switch.proc().pid();
        Ok((procfs::descriptors(pid)?, procfs::private_kib(pid)?))
    }

    /// No more than before, and nobody is known at a port that has no front end.
    fn leaves_nothing(&self, before: &mut Option<Held>, gone: &[&str]) -> Result<()> {
        let now = self.held()?;
        let before = before.get_or_insert(now);
        let end = Instant::now() + PATIENCE;
        // A connection's thread may take a moment to end.
        while self.held()?.0 > before.0 {
            ensure!(Instant::now() < end, "{} descriptors became {}", before.0, self.held()?.0);
            std::thread::sleep(Duration::from_millis(5));
        }
        let (descriptors, kib) = self.held()?;
        before.0 = descriptors;
        ensure!(kib <= before.1 + GROWN_KIB, "{} KiB became {kib}", before.1);
        let macs = self.switch.ask(&json!({"cmd": "macs"}))?;
        for station in macs["macs"].as_array().context("no stations")? {
            ensure!(!gone.iter().any(|port| station["port"] == *port), "left behind: {station}");
        }
        Ok(())
    }

    /// The bystanders have got what they have sent, to the frame; no queue broke, nothing was dropped.
    fn ends(self) -> Result<()> {
        self.moves(&["p2", "p3"])?;
        self.bystanders.say("stop")?;
        self.bystanders.say("set fwd rxonly")?;
        self.bystanders.say("start")?;
        let end = Instant::now() + PATIENCE;
        let lost = |all: &BTreeMap<u64, (u64, u64)>| all[&0].1 != all[&1].0 || all[&1].1 != all[&0].0;
        loop {
            let all = self.bystanders.figures()?;
            if !lost(&all) {
                eprintln!("of {} and {} frames none was lost", all[&0].1, all[&1].1);
                break;
            }
            ensure!(
                Instant::now() < end,
                "received and sent by port: {all:?}: {:#?}",
                self.switch.counters()?
            );
        }
        for port in self.switch.counters()?.iter().filter(|port| port["port"] == "p2" || port["port"] == "p3")
        {
            // That other VLANs' floods do not come there is counted, too.
            let drops = port["drops"].as_object().context("no drops")?;
            ensure!(drops.keys().all(|reason| reason == "to.enqueue.target_vlan"), "dropped: {port}");
        }
        let metrics = self.switch.ask(&json!({"cmd": "metrics"}))?;
        for device in metrics["devices"].as_array().context("no devices")? {
            ensure!(device["broken_queues"] == 0, "a queue broke: {device}\n{}", self.switch.proc().tail());
        }
        self.bystanders.quit()
    }
}

fn have() -> bool {
    tool::have(&["dpdk-testpmd", "stdbuf"])
}

/// The driver stops its device, negotiates other features and starts it again, while the other one sends to it.
#[test]
fn resets_under_load_leave_nothing() -> Result<()> {
    if !have() {
        return Ok(());
    }
    let bed = Bed::start()?;
    let (tested, sender) = (Pmd::start(&bed.switch, &[(0, 1)])?, Pmd::start(&bed.switch, &[(1, 0)])?);
    bed.moves(&["p0", "p1"])?;
    let mut before = None;
    for cycle in 0..cycles(2) {
        // Another set of features, without which it would not reset.
        let checksum = ["on", "off"][cycle as usize % 2];
        for command in [
            "stop",
            "port stop 0",
            &format!("port config 0 rx_offload udp_cksum {checksum}"),
            "port start 0",
            "start",
        ] {
            tested.say(command)?;
        }
        bed.moves(&["p0", "p1"])?;
        bed.leaves_nothing(&mut before, &[])?;
    }
    let starts = tested.0.stream(Stream::Out).matches("Configuring Port 0").count();
    ensure!(starts > cycles(2) as usize, "{starts} starts");
    tested.quit()?;
    sender.quit()?;
    bed.ends()
}

/// The device is taken away and comes again, while the other one sends to it.
#[test]
fn unplugs_under_load_leave_nothing() -> Result<()> {
    if !have() {
        return Ok(());
    }
    let bed = Bed::start()?;
    let (tested, sender) = (Pmd::start(&bed.switch, &[(0, 1)])?, Pmd::start(&bed.switch, &[(1, 0)])?);
    bed.moves(&["p0", "p1"])?;
    let mut before = None;
    for _ in 0..cycles(2) {
        for command in ["stop", "port stop 0", "port detach 0"] {
            tested.say(command)?;
        }
        bed.attached(0, false)?;
        bed.leaves_nothing(&mut before, &["p0"])?;
        tested.say(&format!("port attach {}", device(&bed.switch, 0, 0)))?;
        tested.say("port start 0")?;
        tested.say(&format!("set eth-peer 0 {}", mac(1)))?;
        tested.say("start")?;
        bed.moves(&["p0", "p1"])?;
    }
    tested.quit()?;
    sender.quit()?;
    bed.ends()
}

/// The front end is killed in the middle of its frames.
#[test]
fn kills_under_load_leave_nothing() -> Result<()> {
    if !have() {
        return Ok(());
    }
    let bed = Bed::start()?;
    let sender = Pmd::start(&bed.switch, &[(1, 0)])?;
    let mut before = None;
    for _ in 0..cycles(1) {
        let tested = Pmd::start(&bed.switch, &[(0, 1)])?;
        bed.moves(&["p0", "p1"])?;
        tested.0.kill()?;
        bed.attached(0, false)?;
        bed.leaves_nothing(&mut before, &["p0"])?;
    }
    sender.quit()?;
    bed.ends()
}

#[test]
fn figures_are_read() {
    let block =
        "1  ####\n  RX-packets: 12         RX-missed: 0\n  TX-packets: 34  TX-errors: 0\n  Tx-pps: 0\n";
    assert_eq!(figures(block), Some((1, (12, 34))));
    assert_eq!(figures(&block[..40]), None);
}
