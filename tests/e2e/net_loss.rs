//! A stock Debian guest whose network delays and loses what it sends and what it gets (netem, on the device and behind it):
//! TCP through the user-mode stack goes on, keeps what comes behind a gap, and tells the guest so. The guest's TCP, which
//! has the congestion control, is Linux's own.
//!
//! netem loses frames as they are: whole rows of segments of up to 64 KiB, which is harder than to lose single ones.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::json;
use vcp_tests::guest::QemuGuest;
use vcp_tests::switch::Switch;
use vcp_tests::{Result, tool};

use crate::net_guest::{IPERF, IPERF_JOB, echo, have, iperf, sound};

const TC: &str = "/usr/sbin/tc";

/// Round-trip time that is added, and percent lost.
const STAGES: [(u32, &str); 5] = [(0, "0"), (0, "1"), (10, "1"), (50, "0.1"), (200, "1")];

const JOB: &str = r#"
tc() { /usr/sbin/tc "$@"; }
lease guest1
ip link set ifb0 up || die ifb0
tc qdisc add dev eth0 handle ffff: ingress || die ingress
tc filter add dev eth0 parent ffff: matchall action mirred egress redirect dev ifb0 || die mirred
stage() {
    for dev in eth0 ifb0; do tc qdisc replace dev $dev root netem limit 20000 delay $1ms loss $2% || die netem $dev; done
}
dd if=/dev/urandom of=/tmp/up bs=64k count=64 2>/dev/null
value SUM $(md5sum </tmp/up | cut -d' ' -f1)
"#;

#[test]
fn delay_and_loss_in_the_guest_stop_no_connection() -> Result<()> {
    if !have() || !tool::have(&["tc"]) {
        return Ok(());
    }
    let (_iperf, port) = iperf("127.0.0.1")?;
    let switch = Switch::start(["", ""], &["--uplink", "user"])?;
    let mut job = format!("{IPERF_JOB}{JOB}");
    for (at, (rtt_ms, loss)) in STAGES.iter().enumerate() {
        job.push_str(&format!(
            "stage {} {loss}; iperf UP{at} -c 10.0.2.2 -p {port}; iperf DOWN{at} -c 10.0.2.2 -p {port} -R\n",
            rtt_ms / 2
        ));
    }
    job.push_str(&format!(
        "stage 5 1; value BACK $(nc 10.0.2.2 {} </tmp/up | md5sum | cut -d' ' -f1)\n",
        echo()?
    ));
    let mut guest = QemuGuest::new()
        .net(&switch.socket(0), "52:54:00:00:00:01", "")
        .program(IPERF)
        .program(TC)
        .deadline(Duration::from_secs(300));
    for module in ["sch_netem", "ifb", "sch_ingress", "cls_matchall", "act_mirred"] {
        guest = guest.module(module);
    }
    let done = guest.run(&job)?;
    sound(&switch, &done)?;
    let values: Vec<&str> = done.console.lines().filter(|line| line.starts_with('@')).collect();
    eprintln!("{}", values.join("\n"));
    assert_eq!(done.value("BACK")?, done.value("SUM")?, "what came back");
    for at in 0..STAGES.len() {
        for way in ["UP", "DOWN"] {
            // A rate below one megabit per second would be a stall here: the run is a second long.
            ensure!(done.number(&format!("{way}{at}"))? > 0, "{way}{at}: nothing arrived\n{}", done.console);
        }
    }
    let status = switch.ask(&json!({"cmd": "ports"}))?;
    let uplink = status.pointer("/switches/0/uplink").with_context(|| format!("no uplink: {status}"))?;
    let count = |name: &str| uplink["counters"][name].as_u64().unwrap_or(0);
    eprintln!("{}", uplink["counters"]);
    ensure!(
        count("tcp_kept_bytes") > 0 && count("tcp_filled_bytes") > 0 && count("tcp_sacks") > 0,
        "{uplink:#}"
    );
    Ok(())
}
