//! `vcp-net` as a process, between front ends that nobody here wrote: DPDK's virtio_user in all its ring variants, and
//! the network interfaces of the kernel.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::json;
use vcp_tests::proc::Cmd;
use vcp_tests::switch::Switch;
use vcp_tests::testpmd::{Options, Testpmd};
use vcp_tests::{Result, tool};

/// How long traffic may take to get going, on a busy machine.
const TRAFFIC: Duration = Duration::from_secs(60);
/// Frames that are enough to go around every ring several times.
const MANY: u64 = 8000;

fn have_dpdk() -> bool {
    tool::have(&["dpdk-testpmd"])
}

/// Waits until frames go both ways.
fn both_ways(switch: &Switch, more: u64) -> Result<()> {
    let before: Vec<u64> =
        switch.counters()?.iter().map(|port| port["out_frames"].as_u64().unwrap_or(0)).collect();
    for (at, before) in before.iter().take(2).enumerate() {
        switch.wait_for(&format!("p{at}"), "out_frames", before + more, TRAFFIC)?;
    }
    Ok(())
}

/// How often something is done that is done more often in a soak.
fn soak(name: &str, few: u32) -> u32 {
    std::env::var(name).ok().and_then(|count| count.parse().ok()).unwrap_or(few)
}

fn no_broken_queue(switch: &Switch) -> Result<()> {
    let metrics = switch.ask(&json!({"cmd": "metrics"}))?;
    for device in metrics["devices"].as_array().context("no devices")? {
        ensure!(device["broken_queues"] == 0, "a queue broke: {device}\n{}", switch.proc().tail());
    }
    Ok(())
}

/// A kind of ring, with two ports of their own defaults.
fn variant(port: &str) -> Result<()> {
    passes(["", ""], &Options { port: port.into(), ..Options::default() })
}

/// Frames go both ways between two ports, and no queue breaks.
fn passes(ports: [&str; 2], options: &Options) -> Result<()> {
    if !have_dpdk() {
        return Ok(());
    }
    let switch = Switch::start(ports, &[])?;
    let testpmd = Testpmd::start([&switch.socket(0), &switch.socket(1)], options)?;
    both_ways(&switch, MANY)?;
    no_broken_queue(&switch)?;
    testpmd.end(TRAFFIC)?;
    Ok(())
}

#[test]
fn dpdk_split_rings_in_order() -> Result<()> {
    variant("")
}

/// A second thread takes part in what many frames do, and the books of the process balance.
#[test]
fn a_second_thread_takes_part_under_load() -> Result<()> {
    if !have_dpdk() {
        return Ok(());
    }
    for port in ["", ",packed_vq=1,in_order=0"] {
        let switch = Switch::start(["", ""], &["--second-cpu", "0"])?;
        let options = Options { port: port.into(), ..Options::default() };
        let testpmd = Testpmd::start([&switch.socket(0), &switch.socket(1)], &options)?;
        let end = Instant::now() + TRAFFIC;
        loop {
            both_ways(&switch, MANY)?;
            let told = switch.ask(&json!({"cmd": "ports"}))?;
            let passes = told["second_thread"]["passes"].as_u64().context("no second thread")?;
            if passes > 100 {
                break;
            }
            ensure!(Instant::now() < end, "it took part in {passes} passes: {told}");
        }
        no_broken_queue(&switch)?;
        testpmd.end(TRAFFIC)?;
        let counters = switch.ask(&json!({"cmd": "counters"}))?;
        ensure!(counters["switches"][0]["balanced"] == true, "{counters}");
    }
    Ok(())
}

#[test]
fn dpdk_split_rings() -> Result<()> {
    variant(",in_order=0")
}

#[test]
fn dpdk_split_rings_without_mergeable_buffers() -> Result<()> {
    variant(",mrg_rxbuf=0,in_order=0,vectorized=1")
}

#[test]
fn dpdk_packed_rings() -> Result<()> {
    variant(",packed_vq=1,in_order=0")
}

#[test]
fn dpdk_packed_rings_in_order() -> Result<()> {
    variant(",packed_vq=1")
}

#[test]
fn dpdk_packed_rings_in_order_without_mergeable_buffers() -> Result<()> {
    variant(",packed_vq=1,mrg_rxbuf=0,in_order=1,vectorized=1")
}

#[test]
fn dpdk_with_several_queues() -> Result<()> {
    let options = Options { port: ",cq=1".into(), queues: 2, ..Options::default() };
    passes([",queues=2", ",queues=2"], &options)
}

/// The front end listens and the switch connects; when the switch is killed, the next one goes on.
#[test]
fn dpdk_that_listens_survives_the_switch() -> Result<()> {
    if !have_dpdk() {
        return Ok(());
    }
    let mut switch = Switch::start_dialing(["", ""], &[])?;
    let options = Options { port: ",server=1".into(), ..Options::default() };
    let testpmd = Testpmd::start([&switch.socket(0), &switch.socket(1)], &options)?;
    both_ways(&switch, MANY)?;
    for _ in 0..soak("VCP_SOAK_NET_KILLS", 2) {
        switch.kill_and_restart()?;
        both_ways(&switch, MANY / 4)?;
        no_broken_queue(&switch)?;
    }
    testpmd.end(TRAFFIC)?;
    Ok(())
}

#[test]
fn an_upgrade_under_traffic_loses_nothing_of_what_it_keeps() -> Result<()> {
    if !have_dpdk() {
        return Ok(());
    }
    let switch = Switch::start(["", ""], &[])?;
    let testpmd = Testpmd::start([&switch.socket(0), &switch.socket(1)], &Options::default())?;
    both_ways(&switch, MANY)?;
    for _ in 0..2 {
        let said = Cmd::new(tool::ours("vcp-net")?)
            .arg("upgrade")
            .arg("--control")
            .arg(switch.control())
            .output(TRAFFIC)?;
        ensure!(said.contains("upgraded: pid="), "{said}");
        let pause: u64 = said
            .split_whitespace()
            .find_map(|word| word.strip_prefix("stopped_us="))
            .and_then(|us| us.parse().ok())
            .with_context(|| format!("it does not say how long it took: {said}"))?;
        eprintln!("stood still for {pause} us");
        // Counters and stations (both ports of testpmd send as one) came along, the front ends noticed nothing, and traffic goes on.
        let macs = switch.ask(&json!({"cmd": "macs"}))?;
        ensure!(macs["macs"].as_array().is_some_and(|macs| !macs.is_empty()), "{macs}");
        both_ways(&switch, MANY)?;
        no_broken_queue(&switch)?;
    }
    ensure!(testpmd.proc().is_running());
    testpmd.end(TRAFFIC)?;
    // The process that was started stands for the new one.
    switch.proc().signal(Signal::TERM)?;
    ensure!(switch.proc().wait(TRAFFIC)?.success());
    Ok(())
}

/// A pair of virtual interfaces; both go when one does.
struct Veth(String, String);

impl Veth {
    fn new(name: &str) -> Result<Option<Self>> {
        if !tool::have(&["ip"]) || !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        let (a, b) = (
            format!("{name}{}a", std::process::id() % 10_000),
            format!("{name}{}b", std::process::id() % 10_000),
        );
        if ip(&["link", "add", &a, "type", "veth", "peer", "name", &b]).is_err() {
            tool::note_skip("this kernel makes no veth interfaces");
            return Ok(None);
        }
        let this = Self(a, b);
        for end in [&this.0, &this.1] {
            ip(&["link", "set", end, "up"])?;
        }
        Ok(Some(this))
    }
}

impl Drop for Veth {
    fn drop(&mut self) {
        let _ = ip(&["link", "del", &self.0]);
    }
}

fn ip(args: &[&str]) -> Result<()> {
    let done = Command::new("ip").env("PATH", tool::search_path()).args(args).output()?;
    ensure!(done.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

#[test]
fn a_packet_uplink_joins_two_switches_through_the_kernel() -> Result<()> {
    if !have_dpdk() {
        return Ok(());
    }
    let Some(veth) = Veth::new("vn")? else { return Ok(()) };
    // Port 0 of one switch and port 0 of the other; each other port stays empty.
    let first = Switch::start(["", ""], &["--uplink", &format!("packet={}", veth.0)])?;
    let second = Switch::start(["", ""], &["--uplink", &format!("packet={}", veth.1)])?;
    let testpmd = Testpmd::start([&first.socket(0), &second.socket(0)], &Options::default())?;
    for switch in [&first, &second] {
        switch.wait_for("p0", "out_frames", 500, TRAFFIC)?;
        switch.wait_for("uplink", "in_frames", 500, TRAFFIC)?;
        no_broken_queue(switch)?;
    }
    testpmd.end(TRAFFIC)?;
    Ok(())
}

#[test]
fn a_tap_uplink_reaches_the_host() -> Result<()> {
    if !have_dpdk() || !tool::have(&["ip"]) || !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let name = format!("vt{}", std::process::id() % 100_000);
    let switch = Switch::start(["", ""], &["--uplink", &format!("tap={name}")])?;
    ip(&["link", "set", &name, "up"])?;
    let testpmd = Testpmd::start([&switch.socket(0), &switch.socket(1)], &Options::default())?;
    both_ways(&switch, MANY)?;
    // The first frames, for stations that nobody knew yet, and the host's own multicast.
    switch.wait_for("uplink", "out_frames", 1, TRAFFIC)?;
    switch.wait_for("uplink", "in_frames", 1, TRAFFIC)?;
    testpmd.end(TRAFFIC)?;
    Ok(())
}

/// Frames for stations that nobody knows go everywhere, but not to another switch of the same process.
#[test]
fn switches_of_one_process_are_apart() -> Result<()> {
    if !have_dpdk() {
        return Ok(());
    }
    let switch = Switch::start(["", ",switch=1"], &["--uplink", "none", "--uplink", "none"])?;
    let testpmd = Testpmd::start([&switch.socket(0), &switch.socket(1)], &Options::default())?;
    switch.wait_for("p0", "in_frames", MANY, TRAFFIC)?;
    testpmd.end(TRAFFIC)?;
    let answer = switch.ask(&json!({"cmd": "counters"}))?;
    let switches = answer["switches"].as_array().context("no switches")?;
    assert_eq!(switches.len(), 2);
    for (switch, name) in switches.iter().zip(["p0", "p1"]) {
        ensure!(switch["balanced"] == true, "{switch}");
        let ports = switch["ports"].as_array().context("no ports")?;
        let port = ports.iter().find(|port| port["port"] == name).context("not its port")?;
        ensure!(port["in_frames"].as_u64() > Some(0) && port["out_frames"] == 0, "{port}");
    }
    Ok(())
}

/// A front end that is killed in the middle of its frames takes nothing with it.
#[test]
fn a_killed_front_end_disturbs_nobody() -> Result<()> {
    if !have_dpdk() {
        return Ok(());
    }
    let switch = Switch::start(["", ""], &[])?;
    for _ in 0..soak("VCP_SOAK_NET_KILLS", 3) {
        let testpmd = Testpmd::start([&switch.socket(0), &switch.socket(1)], &Options::default())?;
        both_ways(&switch, MANY / 4)?;
        testpmd.proc().kill()?;
        testpmd.proc().wait(TRAFFIC)?;
    }
    no_broken_queue(&switch)
}
