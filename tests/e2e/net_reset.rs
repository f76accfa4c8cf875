//! Stock Debian guests in stock QEMU that are reset, and whose network card is taken away and brought again, while they send as
//! fast as they can: what they leave behind, and that they work afterwards.
//!
//! `VCP_SOAK_NET_GUESTS` says how often; `cargo xtask soak net` sets it.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use vcp_tests::guest::QemuGuest;
use vcp_tests::switch::Switch;
use vcp_tests::{Result, procfs, tool};

const PATIENCE: Duration = Duration::from_secs(120);
/// Of memory that the cycles may not add up to, KiB.
const GROWN_KIB: u64 = 4096;
const MAC: &str = "52:54:00:00:00:01";

/// Bulk data both ways over several connections, datagrams, and echoes, until the machine is reset or the card is gone.
const JOB: &str = r#"
ip link set lo up
start() {
    ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0
    n=100; until [ "$(replies 10.0.2.2 1)" = 1 ]; do n=$((n - 1)); [ $n -gt 0 ] || die "no way out"; done
    for n in 1 2 3; do while [ -e /sys/class/net/eth0 ]; do nc -w 5 10.0.2.2 $echo </dev/zero >/dev/null 2>&1; done & done
    ping -i 0.01 -s 1000 10.0.2.2 >/dev/null 2>&1 &
}
start
value UP now
cycle=0
while [ $cycle -lt $unplugs ]; do
    n=600; while [ -e /sys/class/net/eth0 ]; do n=$((n - 1)); [ $n -gt 0 ] || die "the card stays"; sleep 0.1; done
    value GONE$cycle now
    n=600; until [ -e /sys/class/net/eth0 ]; do n=$((n - 1)); [ $n -gt 0 ] || die "no card comes"; sleep 0.1; done
    start
    value BACK$cycle now
    cycle=$((cycle + 1))
done
value ERRORS $(dmesg | grep -ciE 'BUG:|call trace|NETDEV WATCHDOG')
sleep 1000
"#;

/// Echoes every connection for as long as the test runs.
fn echo() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let Ok(mut writer) = stream.try_clone() else { return };
                let _ = std::io::copy(&mut &stream, &mut writer);
            });
        }
    });
    Ok(port)
}

/// QEMU's monitor.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(path: &Path) -> Result<Self> {
        let end = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => ensure!(Instant::now() < end, "no monitor: {error}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut this = Self(BufReader::new(stream));
        this.ask(&json!({"execute": "qmp_capabilities"}))?;
        Ok(this)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("not from a monitor: {line:?}"))
    }

    /// The answer; events meanwhile are passed over.
    fn ask(&mut self, command: &Value) -> Result<Value> {
        self.0.get_mut().write_all(format!("{command}\n").as_bytes())?;
        loop {
            let line = self.line()?;
            ensure!(line.get("error").is_none(), "{command}: {line}");
            if let Some(answer) = line.get("return") {
                return Ok(answer.clone());
            }
        }
    }

    fn event(&mut self, name: &str) -> Result<()> {
        while self.line()?["event"] != name {}
        Ok(())
    }
}

/// What the stack of `switch` has of its guest.
fn flows(switch: &Switch) -> Result<u64> {
    let answer = switch.ask(&json!({"cmd": "flows"}))?;
    let flows = answer["flows"].as_array().or(answer["answer"].as_array());
    Ok(flows.with_context(|| format!("no flows: {answer}"))?.len() as u64)
}

#[test]
fn guests_that_are_reset_and_lose_their_card_leave_nothing() -> Result<()> {
    if !tool::have(&["qemu-system-x86_64", "busybox"]) {
        return Ok(());
    }
    let cycles =
        std::env::var("VCP_SOAK_NET_GUESTS").ok().and_then(|count| count.parse().ok()).unwrap_or(1u64);
    let switch = Switch::start(["", ""], &["--uplink", "user"])?;
    let idle = procfs::descriptors(switch.proc().pid())?;
    let qmp = switch.dir().join("qmp");
    let monitor = format!("unix:{},server=on,wait=off", qmp.display());
    let (port, socket) = (echo()?, switch.socket(0).display().to_string());
    // The card is behind a port of a bridge that has hot-plug. A reset is one, and not the end.
    let chardev = format!("socket,id=hot,path={socket},reconnect=1");
    let net = json!({"driver": "virtio-net-pci", "id": "card", "netdev": "hot", "mac": MAC, "vectors": 0, "romfile": "", "bus": "hot-slot"});
    let guest = QemuGuest::new()
        .arguments(&["-qmp", &monitor, "-action", "reboot=reset"])
        .arguments(&["-device", "pcie-root-port,id=hot-slot,chassis=1,slot=1", "-chardev", &chardev])
        .arguments(&["-netdev", "vhost-user,id=hot,chardev=hot", "-device", &net.to_string()])
        .deadline(Duration::from_secs(180 + 60 * cycles));
    let mut guest = guest.start(&format!("echo={port}; unplugs={cycles}\n{JOB}"))?;
    guest.wait_value("UP")?;
    let mut qmp = Qmp::connect(&qmp)?;
    let pid = switch.proc().pid();
    let mut before = None;
    let mut held = |when: &str| -> Result<()> {
        // The flows that belonged to the guest go when it has been away for a while; new ones are few and the same.
        let now = (procfs::descriptors(pid)?, procfs::private_kib(pid)?);
        let (descriptors, kib) = *before.get_or_insert(now);
        eprintln!("{when}: {} descriptors, {} KiB", now.0, now.1);
        ensure!(now.0 <= descriptors + 64, "{when}: {descriptors} descriptors became {}", now.0);
        ensure!(now.1 <= kib + GROWN_KIB, "{when}: {kib} KiB became {}", now.1);
        Ok(())
    };
    for cycle in 0..cycles {
        qmp.ask(&json!({"execute": "system_reset"}))?;
        guest.wait_value("UP")?;
        held(&format!("after reset {cycle}"))?;
    }
    for cycle in 0..cycles {
        qmp.ask(&json!({"execute": "device_del", "arguments": {"id": "card"}}))?;
        qmp.event("DEVICE_DELETED")?;
        guest.wait_value(&format!("GONE{cycle}"))?;
        held(&format!("without card {cycle}"))?;
        qmp.ask(&json!({"execute": "device_add", "arguments": net}))?;
        guest.wait_value(&format!("BACK{cycle}"))?;
    }
    guest.wait_value("ERRORS")?;
    // The machine is gone: nothing is left of it.
    drop(guest);
    let end = Instant::now() + PATIENCE;
    while flows(&switch)? != 0 {
        ensure!(
            Instant::now() < end,
            "flows of a guest that is gone: {}",
            switch.ask(&json!({"cmd": "flows"}))?
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    // Of a connection that ended, its descriptor and that of its gate are there until the next one.
    let idle = idle + 2;
    while procfs::descriptors(pid)? > idle {
        ensure!(Instant::now() < end, "{idle} descriptors became {}", procfs::descriptors(pid)?);
        std::thread::sleep(Duration::from_millis(50));
    }
    let macs = switch.ask(&json!({"cmd": "macs"}))?;
    ensure!(!macs.to_string().contains(MAC), "its station is left: {macs}");
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    ensure!(!maps.contains("memory-backend-memfd"), "it still has the guest's memory:\n{maps}");
    switch.counters()?;
    Ok(())
}
