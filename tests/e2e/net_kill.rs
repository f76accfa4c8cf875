//! `kill -9` of `vcp-net` under a stock Debian guest in stock QEMU, whose rings nobody resets: split and packed ones go on
//! where they stood.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::ensure;
use serde_json::json;
use vcp_tests::guest::QemuGuest;
use vcp_tests::switch::Switch;
use vcp_tests::{Result, tool};

/// How often both are killed.
const KILLS: u32 = 4;

/// Echoes are underway all the time. After each kill, the count of kills is fetched through either network.
const JOB: &str = r#"
ip link set lo up
for n in 0 1; do ip link set eth$n up; ip addr add 10.0.$((n + 2)).15/24 dev eth$n; done
fetch() { timeout 5 wget -q -O - http://$1:$port/ 2>&1; }
seen() {
    n=80; until [ "$(fetch $1)" = $2 ]; do
        n=$((n - 1)); [ $n -gt 0 ] || die "nothing comes through $1 after $2 kills: $(fetch $1 2>&1)"
        sleep 0.2
    done
}
for gateway in 10.0.2.2 10.0.3.2; do seen $gateway 0; ping -i 0.01 -s 1000 $gateway >/dev/null 2>&1 & done
for kill in $(seq $kills); do
    value READY$kill now
    for gateway in 10.0.2.2 10.0.3.2; do seen $gateway $kill; value ECHOES$kill.$gateway $(replies $gateway 3); done
done
value ERRORS $(dmesg | grep -ciE 'BUG:|call trace|NETDEV WATCHDOG')
"#;

/// Tells everybody how often the switches were killed.
fn count() -> Result<(u16, Arc<AtomicU32>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let kills = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&kills);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let count = Arc::clone(&count);
            // One that never says what it wants must not hold others up: it may be one of a switch that was killed.
            std::thread::spawn(move || {
                let _ = stream.read(&mut [0; 1024]);
                let count = count.load(Ordering::SeqCst);
                let _ = stream.write_all(format!("HTTP/1.0 200 OK\r\n\r\n{count}\n").as_bytes());
            });
        }
    });
    Ok((port, kills))
}

#[test]
fn rings_of_either_kind_survive_the_switch() -> Result<()> {
    if !tool::have(&["qemu-system-x86_64", "busybox"]) {
        return Ok(());
    }
    let (port, count) = count()?;
    let mut split = Switch::start(["", ""], &["--uplink", "user"])?;
    let mut packed = Switch::start(["", ""], &["--uplink", "user,net=10.0.3.0/24"])?;
    let job = format!("port={port}; kills={KILLS}\n{JOB}");
    let mut guest = QemuGuest::new()
        .net(&split.socket(0), "52:54:00:00:00:01", "")
        .net(&packed.socket(0), "52:54:00:00:00:02", ",packed=on")
        .start(&job)?;
    for kill in 1..=KILLS {
        guest.wait_value(&format!("READY{kill}"))?;
        split.kill_and_restart()?;
        packed.kill_and_restart()?;
        count.store(kill, Ordering::SeqCst);
    }
    let done = guest.wait()?;
    ensure!(done.status == 0, "{}\n{}\n{}", done.console, split.proc().tail(), packed.proc().tail());
    for kill in 1..=KILLS {
        for gateway in ["10.0.2.2", "10.0.3.2"] {
            assert_eq!(done.number(&format!("ECHOES{kill}.{gateway}"))?, 3, "{}", done.console);
        }
    }
    assert_eq!(done.number("ERRORS")?, 0, "{}", done.console);
    for switch in [&split, &packed] {
        for device in switch.ask(&json!({"cmd": "metrics"}))?["devices"].as_array().into_iter().flatten() {
            assert_eq!(device["broken_queues"], 0, "{device}\n{}", switch.proc().tail());
        }
        switch.counters()?;
    }
    Ok(())
}
