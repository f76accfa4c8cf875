//! Stock Debian guests in stock QEMU on `vcp-net`: the drivers and the programs that users have. One boot does many checks.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::json;
use vcp_tests::guest::{Outcome, QemuGuest};
use vcp_tests::proc::{Cmd, Proc, Stream};
use vcp_tests::switch::Switch;
use vcp_tests::{Result, tool};

pub(crate) const IPERF: &str = "/usr/bin/iperf3";
/// The file that is fetched.
const FILE_BYTES: usize = 64 << 20;
const START: Duration = Duration::from_secs(20);
/// How long the host's side waits for a guest, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Shell functions: megabits per second at the receiver, and datagrams lost there, of a run of iperf3.
pub(crate) const IPERF_JOB: &str = r#"
iperf() {
    name=$1; shift
    # A server that has just ended one run says that it is busy.
    n=20; until iperf3 "$@" -t 1 -f m >/tmp/iperf 2>&1; do
        n=$((n - 1)); [ $n -gt 0 ] || { cat /tmp/iperf; die iperf3 $name; }; sleep 0.2
    done
    value $name $(grep receiver /tmp/iperf | grep -v SUM | awk '{ for (i = 1; i <= NF; i++) if ($i ~ /bits.sec/) sum += $(i - 1) } END { printf "%d", sum }')
}
"#;

const USER_JOB: &str = r#"
lease guest1; value LEASE $(cat /tmp/lease)
value PING $(replies 10.0.2.2 5)
value BIG $(replies 10.0.2.2 3 "-s 1400")
# An address is the guest's when nobody else has claimed it for a second.
for n in 1 2 3 4 5 6 7 8 9 10; do [ "$(replies fd76:6370:6e65:7400::2 1)" = 1 ] && break; sleep 0.3; done
value PING6 $(replies fd76:6370:6e65:7400::2 3)
value NAME $(nslookup gateway.internal 10.0.2.3 | grep -o 'Address: *10.0.2.2$' | grep -c .)
value OWN $(nslookup guest1.internal 10.0.2.3 | grep -o 'Address: *10.0.2.15$' | grep -c .)
value REFUSED $(nc -w 3 10.0.2.2 $closed </dev/null >/dev/null 2>&1; echo $?)
value SUM $(wget -q -O - http://10.0.2.2:$http/file | md5sum | cut -d' ' -f1)
dd if=/dev/urandom of=/tmp/up bs=64k count=128 2>/dev/null
value UP $(md5sum </tmp/up | cut -d' ' -f1)
value BACK $(nc 10.0.2.2 $echo </tmp/up | md5sum | cut -d' ' -f1)
iperf TCP_UP -c 10.0.2.2 -p $iperf
iperf TCP_DOWN -c 10.0.2.2 -p $iperf -R
iperf TCP_FOUR -c 10.0.2.2 -p $iperf -P 4
iperf TCP_BOTH -c 10.0.2.2 -p $iperf --bidir
iperf TCP6_DOWN -c fd76:6370:6e65:7400::2 -p $iperf6 -R
iperf UDP_UP -c 10.0.2.2 -p $iperf -u -b 50M -l 1400
value UDP_UP_LOST $(grep receiver /tmp/iperf | grep -o '([0-9.e+-]*%)' | tr -d '(%)')
iperf UDP_DOWN -c 10.0.2.2 -p $iperf -u -b 50M -l 1400 -R
value UDP_DOWN_LOST $(grep receiver /tmp/iperf | grep -o '([0-9.e+-]*%)' | tr -d '(%)')
for mtu in 1280 9000 65535; do
    ip link set eth0 mtu $mtu || die mtu $mtu
    value MTU_$mtu $(nc 10.0.2.2 $echo </tmp/up | md5sum | cut -d' ' -f1)
done
ip link set eth0 mtu 1500
{ echo one; nc 10.0.2.2 $gate </dev/null; echo two; } | nc 10.0.2.2 $echo >/tmp/kept
value KEPT $(cat /tmp/kept)
value KNOWN $(nslookup guest1.internal 10.0.2.3 | grep -o 'Address: *10.0.2.15$' | grep -c .)
value AFTER $(nc 10.0.2.2 $echo </tmp/up | md5sum | cut -d' ' -f1)
nc -l -p 80 -e /bin/cat & first=$!
value LISTENING yes
wait $first; value SERVED $?
value ERRORS $(cat /sys/class/net/eth0/statistics/rx_errors) 
"#;

/// Serves every connection with `job`, for as long as the test runs.
fn serve(job: impl Fn(TcpStream) + Send + Sync + 'static) -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let job = std::sync::Arc::new(job);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let job = std::sync::Arc::clone(&job);
            std::thread::spawn(move || job(stream));
        }
    });
    Ok(port)
}

/// The file, and its MD5 sum as the host's own program has it.
fn file() -> Result<(Vec<u8>, String)> {
    let bytes: Vec<u8> =
        (0..FILE_BYTES as u32 / 4).flat_map(|at| at.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("file"), &bytes)?;
    let sum = Cmd::new("md5sum").arg(dir.path().join("file")).output(START)?;
    Ok((bytes, sum.split_whitespace().next().context("no sum")?.to_owned()))
}

/// Answers any HTTP request with the file.
fn web(bytes: Vec<u8>) -> Result<u16> {
    serve(move |mut stream| {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            if !matches!(stream.read(&mut byte), Ok(1)) {
                return;
            }
            request.push(byte[0]);
        }
        let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len());
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&bytes));
    })
}

pub(crate) fn echo() -> Result<u16> {
    serve(|stream| {
        let mut reader = stream;
        let Ok(mut writer) = reader.try_clone() else { return };
        let _ = std::io::copy(&mut reader, &mut writer);
        let _ = writer.shutdown(std::net::Shutdown::Write);
    })
}

/// A port at which every connection has the switch replaced by a new process, and then a capture begun, before it ends.
fn upgrade(switch: &Switch) -> Result<u16> {
    let control = switch.control();
    let program = tool::ours("vcp-net")?;
    serve(move |stream| {
        let said = Cmd::new(&program).arg("upgrade").arg("--control").arg(&control).output(PATIENCE);
        eprintln!("{said:?}");
        let begun = vcp_tests::switch::ask(&control, &json!({"cmd": "capture", "port": "p0", "snap": 256}));
        eprintln!("{begun:?}");
        drop(stream);
    })
}

/// Ends the capture; tshark finds in it what the guest did, and nothing that is wrong.
fn looked_at(switch: &Switch) -> Result<()> {
    let answer = switch.ask(&json!({"cmd": "capture-stop"}))?;
    let file = answer["file"].as_str().with_context(|| format!("no file: {answer}"))?;
    if !tool::have(&["tshark"]) {
        return Ok(());
    }
    let count = |filter: &str| -> Result<usize> {
        let text = Cmd::new("tshark").args(["-r", file, "-Y", filter]).output(PATIENCE)?;
        Ok(text.lines().count())
    };
    assert_eq!(answer["lost"], 0, "{answer}");
    assert_eq!(count("frame")?, answer["frames"].as_u64().unwrap_or(0) as usize);
    ensure!(count("dns.qry.name == \"guest1.internal\"")? >= 2, "no question, or no answer, in {file}");
    ensure!(count("frame.comment contains \"gso=tcp4\"")? > 0, "no row of segments in {file}");
    ensure!(count("frame.comment contains \"to the uplink\"")? > 0, "no decision in {file}");
    assert_eq!(count("_ws.malformed")?, 0);
    Ok(())
}

/// An iperf3 server of the host, on a port that was free.
pub(crate) fn iperf(bind: &str) -> Result<(Proc, u16)> {
    let port = TcpListener::bind((bind, 0))?.local_addr()?.port();
    let proc = Cmd::new(IPERF).args(["-s", "--forceflush", "-B", bind, "-p", &port.to_string()]).spawn()?;
    proc.wait_line(Stream::Out, "Server listening", START)?;
    Ok((proc, port))
}

pub(crate) fn have() -> bool {
    tool::have(&["qemu-system-x86_64", "iperf3", "busybox", "md5sum"])
}

pub(crate) fn sound(switch: &Switch, done: &Outcome) -> Result<()> {
    ensure!(done.status == 0, "the guest's job failed:\n{}\n{}", done.console, switch.proc().tail());
    let metrics = switch.ask(&json!({"cmd": "metrics"}))?;
    for device in metrics["devices"].as_array().context("no devices")? {
        ensure!(device["broken_queues"] == 0, "a queue broke: {device}\n{}", switch.proc().tail());
    }
    switch.counters()?;
    Ok(())
}

#[test]
fn stock_guest_on_the_user_mode_stack() -> Result<()> {
    if !have() {
        return Ok(());
    }
    let (bytes, sum) = file()?;
    let (_iperf, iperf_port) = iperf("127.0.0.1")?;
    let (_iperf6, iperf6_port) = iperf("::1")?;
    let closed = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let uplink = "user,hostfwd=tcp:127.0.0.1:0-80";
    let captures = tempfile::tempdir()?;
    let captures = captures.path().display().to_string();
    let switch = Switch::start(["", ""], &["--uplink", uplink, "--capture-dir", &captures])?;
    let ports = format!(
        "http={}; echo={}; gate={}; iperf={iperf_port}; iperf6={iperf6_port}; closed={closed}\n",
        web(bytes)?,
        echo()?,
        upgrade(&switch)?,
    );
    let mut guest = QemuGuest::new()
        .net(&switch.socket(0), "52:54:00:00:00:01", "")
        .program(IPERF)
        .start(&format!("{IPERF_JOB}{ports}{USER_JOB}"))?;
    guest.wait_value("LISTENING")?;
    looked_at(&switch)?;
    let forwards = switch.ask(&json!({"cmd": "forwards"}))?;
    let bound = forwards.pointer("/answer/0/bound");
    let bound = bound.and_then(|it| it.as_str()).with_context(|| format!("no forward: {forwards}"))?;
    let mut stream = TcpStream::connect(bound)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"to the guest and back")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut back = String::new();
    stream.read_to_string(&mut back)?;
    assert_eq!(back, "to the guest and back");
    let done = guest.wait()?;
    sound(&switch, &done)?;
    let values: Vec<&str> = done.console.lines().filter(|line| line.starts_with('@')).collect();
    eprintln!("{}", values.join("\n"));

    assert_eq!(done.value("LEASE")?, "10.0.2.15 10.0.2.2 10.0.2.3");
    assert_eq!(
        (done.number("PING")?, done.number("BIG")?, done.number("PING6")?),
        (5, 3, 3),
        "{}",
        done.console
    );
    assert_eq!((done.number("NAME")?, done.number("OWN")?), (1, 1), "{}", done.console);
    assert_eq!(done.number("REFUSED")?, 1);
    assert_eq!(done.value("SUM")?, sum, "the file that the guest fetched");
    // A connection that was open while the process was replaced went on, and so did what the stack knew.
    assert_eq!((done.value("KEPT")?, done.number("KNOWN")?), ("one two", 1), "{}", done.console);
    for way in ["BACK", "AFTER", "MTU_1280", "MTU_9000", "MTU_65535"] {
        assert_eq!(done.value(way)?, done.value("UP")?, "what came back: {way}");
    }
    for way in ["TCP_UP", "TCP_DOWN", "TCP_FOUR", "TCP_BOTH", "TCP6_DOWN", "UDP_UP", "UDP_DOWN"] {
        ensure!(done.number(way)? > 0, "{way}: nothing arrived\n{}", done.console);
    }
    assert_eq!((done.number("SERVED")?, done.number("ERRORS")?), (0, 0));
    let status = switch.ask(&json!({"cmd": "ports"}))?;
    let uplink = status.pointer("/switches/0/uplink").with_context(|| format!("no uplink: {status}"))?;
    for reason in ["malformed", "checksum", "no_flow", "no_socket", "no_room", "not_sent"] {
        assert_eq!(uplink["counters"]["drops"][reason], 0, "{uplink:#}");
    }
    Ok(())
}

const VLAN_JOB: &str = r#"
ip link set lo up; ip link set eth0 up; ip addr add 10.9.0.$me/24 dev eth0
rx() { cat /sys/class/net/eth0/statistics/rx_packets; }
"#;

const SERVER_JOB: &str = r#"
iperf3 -s -D >/dev/null 2>&1; value UP yes
nc -l -p 98 >/tmp/before; value RX_BEFORE $(rx)
nc -l -p 97 >/tmp/noted
nc -l -p 99 >/tmp/after; value RX $(rx)
"#;

/// Frames of the generator, which are counted on the other side.
const FRAMES: u64 = 20_000;

const CLIENT_JOB: &str = r#"
value SAME $(replies 10.9.0.2 5)
iperf TCP -c 10.9.0.2
iperf TCP_BACK -c 10.9.0.2 -R
iperf TCP_BOTH -c 10.9.0.2 -P 2 --bidir
value APART now
n=60; until [ "$(replies 10.9.0.2 1)" = 0 ] || [ $n = 0 ]; do n=$((n - 1)); done
value ALONE $(replies 10.9.0.2 1)
n=30; until [ "$(replies 10.9.0.2 1)" = 1 ] || [ $n = 0 ]; do n=$((n - 1)); done
value AGAIN $(replies 10.9.0.2 3)
nc 10.9.0.2 98 </dev/null
# Nothing is sent before the other one has noted what it has: on a busy host that may take a while.
n=150; until nc 10.9.0.2 97 </dev/null || [ $n = 0 ]; do n=$((n - 1)); sleep 0.2; done
pg() { echo "$2" >/proc/net/pktgen/$1 || die pktgen $2; }
pg kpktgend_0 "add_device eth0"
for it in "count $frames" "pkt_size 60" "delay 0" "dst 10.9.0.2" "dst_mac 52:54:00:00:00:02"; do pg eth0 "$it"; done
pg pgctrl start
for it in tx_packets tx_dropped tx_fifo_errors; do value $it $(cat /sys/class/net/eth0/statistics/$it); done
value PKTGEN $(grep -o 'pkts-sofar: [0-9]*' /proc/net/pktgen/eth0 | cut -d' ' -f2)
nc 10.9.0.2 99 </dev/null
"#;

#[test]
fn stock_guests_reach_each_other_in_their_vlan() -> Result<()> {
    if !have() {
        return Ok(());
    }
    let switch = Switch::start([",vlan=5", ",vlan=5"], &[])?;
    let job = |me: u8, job: &str| format!("{IPERF_JOB}me={me}; frames={FRAMES}{VLAN_JOB}{job}");
    let mut server = QemuGuest::new()
        .net(&switch.socket(1), "52:54:00:00:00:02", "")
        .program(IPERF)
        .start(&job(2, SERVER_JOB))?;
    let client = QemuGuest::new()
        .net(&switch.socket(0), "52:54:00:00:00:01", ",packed=on")
        .module("pktgen")
        .program(IPERF);
    server.wait_value("UP")?;
    let mut client = client.start(&job(1, CLIENT_JOB))?;
    client.wait_value("APART")?;
    // Another VLAN: as if there were no one.
    switch.ask(&json!({"cmd": "set", "port": "p1", "vlan": {"access": 6}}))?;
    client.wait_value("ALONE")?;
    switch.ask(&json!({"cmd": "set", "port": "p1", "vlan": {"access": 5}}))?;
    let done = client.wait()?;
    let served = server.wait()?;
    sound(&switch, &done)?;
    sound(&switch, &served)?;
    let values: Vec<&str> = done.console.lines().filter(|line| line.starts_with('@')).collect();
    eprintln!("{}", values.join("\n"));

    assert_eq!((done.number("SAME")?, done.number("AGAIN")?), (5, 3), "{}", done.console);
    assert_eq!(done.number("ALONE")?, 0, "guests of two VLANs reach each other");
    for way in ["TCP", "TCP_BACK", "TCP_BOTH"] {
        ensure!(done.number(way)? > 0, "{way}: nothing arrived\n{}", done.console);
    }
    // Of what the generator says that it sent, the other guest has got every frame, but those that are counted as dropped
    // because it stood still for longer than it may: everything is emulated, and others use this machine.
    let (sent, got) = (done.number("PKTGEN")?, served.number("RX")?);
    assert_eq!(sent, FRAMES, "{}", done.console);
    let (before, counters) = (served.number("RX_BEFORE")?, switch.counters()?);
    let server = counters.iter().find(|port| port["port"] == "p1").context("no p1")?;
    let dropped = server["drops"]["to.enqueue.full"].as_u64().unwrap_or(0);
    ensure!(
        got + dropped >= before + sent,
        "{sent} sent, {before} became {got}, {dropped} dropped: {counters:#?}\n{}",
        done.console
    );
    Ok(())
}
