//! A guest at native speed beside a back end that is measured: `native-guest rings|plain|stream SOCKET MTU PID SECS`. Says on one
//! line, as JSON, what came of it; PID is the back end, of which the processor time is told. For `cargo xtask bench net`,
//! which builds it for speed.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use vcp_tests::Result;
use vcp_tests::native::{Bed, Guest, Link, Transfer, pin};
use vcp_tests::procfs::cpu_time;

/// The hardware thread of guest and server.
const CPU: usize = 0;
/// Pauses before requests to a back end that sleeps when it has nothing to do: longer than any looks.
const GAP: Duration = Duration::from_micros(1500);
/// Requests are short.
const REQUESTS: Duration = Duration::from_millis(700);

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kind, socket, mtu, pid, secs] = &args[..] else {
        bail!("usage: native-guest rings|plain|stream SOCKET MTU PID SECS");
    };
    let (pid, time): (u32, Duration) = (pid.parse()?, Duration::from_secs_f64(secs.parse()?));
    pin(CPU)?;
    let socket = Path::new(socket);
    let link = match kind.as_str() {
        "rings" => Link::rings(socket, true)?,
        "plain" => Link::rings(socket, false)?,
        "stream" => Link::stream(socket)?,
        other => bail!("`{other}` is no way to a back end"),
    };
    let (address, gateway) = (Ipv4Addr::new(10, 0, 2, 15), Ipv4Addr::new(10, 0, 2, 2));
    let mut bed = Bed::connect(link, Guest { address, gateway, mtu: mtu.parse()? })?;
    // The first bytes of either direction bring windows to their size.
    bed.from_guest(time / 8)?;
    bed.to_guest(time / 8)?;
    let from = transfer(pid, || bed.from_guest(time)).context("from the guest")?;
    let to = transfer(pid, || bed.to_guest(time)).context("to the guest")?;
    let at_once = times(&bed.requests(REQUESTS, Duration::ZERO).context("requests")?);
    let after_gaps = times(&bed.requests(REQUESTS, GAP).context("requests after gaps")?);
    println!("{}", json!({ "from": from, "to": to, "at_once": at_once, "after_gaps": after_gaps }));
    Ok(())
}

/// Mbit/s, and processor seconds of the back end per gigabyte.
fn transfer(pid: u32, run: impl FnOnce() -> Result<Transfer>) -> Result<Value> {
    let before = cpu_time(pid)?;
    let Transfer { bytes, took, resent } = run()?;
    let used = (cpu_time(pid)? - before).as_secs_f64();
    ensure!(bytes > 0, "nothing arrived");
    Ok(json!([bytes as f64 * 8e-6 / took.as_secs_f64(), used / (bytes as f64 / 1e9), resent]))
}

/// Medians and 99th percentiles in microseconds.
fn times(took: &[Duration]) -> Value {
    let at = |part: f64| took[((took.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e6;
    json!([at(0.5), at(0.99)])
}
