//! Connections cut at random bytes, in either direction, by FIN or RST, under a load that verifies itself: in the login, in the
//! look at the unit, in headers, data and answers. Nothing is lost, nobody notices.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use vcp_tests::backend::Backend;
use vcp_tests::front::Driver;
use vcp_tests::load::Load;
use vcp_tests::proxy::{OwnCut, Proxy, Way};
use vcp_tests::target::{self, Kind, Spec, Target};
use vcp_tests::{Result, pattern};

/// Requests between two looks at the count.
const ROUND: usize = 100;
const DEPTH: usize = 16;
/// A lost connection is back within this.
const BACK: Duration = Duration::from_secs(30);

/// Where the next connection is cut. A third of them in the login and the look at the unit, which together take some
/// thousand bytes; the others live longer, so that the load gets on.
fn chooser(seed: u64) -> impl FnMut() -> OwnCut + Send + 'static {
    let mut random = seed;
    move || {
        let mut next = |below: u64| {
            random = pattern::mix(random);
            random % below
        };
        let way = if next(2) == 0 { Way::ToTarget } else { Way::ToInitiator };
        let reset = next(2) == 0;
        let magnitude = 8 + next(11);
        let after = if next(3) == 0 { next(2500) } else { 2500 + next(1 << magnitude) };
        OwnCut { way, after, reset }
    }
}

fn survives(kind: Kind, cuts: usize, seed: u64, args: &[&str]) -> Result<()> {
    if !target::have(kind) {
        return Ok(());
    }
    let target = Target::start(kind, &Spec::disk(16 << 20))?;
    let proxy = Proxy::start(target.portal())?;
    let backend = Backend::vcp_iscsi(&target.url_at(proxy.addr(), 0), args)?;
    let mut driver = Driver::connect(backend.socket(), 1)?;
    let mut load = Load::new(seed, 1024);
    proxy.cut_each(Some(chooser(seed)));
    // The connection that is there was made before.
    proxy.cut_now(false);
    let (mut requests, mut told) = (0, 0);
    while proxy.own_cuts() < cuts {
        load.run(&mut driver, 0, DEPTH, ROUND, |_| Ok(()))
            .with_context(|| format!("{kind:?}, seed {seed}, after {} cuts", proxy.own_cuts()))?;
        requests += ROUND;
        if proxy.own_cuts() >= told + 1000 {
            told = proxy.own_cuts();
            println!("{kind:?}: {told} cuts, {requests} requests");
        }
    }
    let cut = proxy.own_cuts();
    proxy.cut_each(None::<fn() -> OwnCut>);
    proxy.cut_now(true);
    load.run(&mut driver, 0, DEPTH, ROUND, |_| Ok(()))?;
    load.verify_all(&mut driver).with_context(|| format!("{kind:?}, seed {seed}"))?;
    if args.is_empty() {
        proxy.wait_open(1, BACK)?;
    }
    ensure!(backend.proc().is_running(), "the backend died");
    println!("{kind:?} {args:?}: {cut} cuts, {requests} requests, all data verified");
    Ok(())
}

#[test]
fn connections_to_our_target_cut_at_random_bytes_lose_nothing() -> Result<()> {
    survives(Kind::Ours, 50, 1, &[])
}

#[test]
fn connections_to_tgtd_cut_at_random_bytes_lose_nothing() -> Result<()> {
    survives(Kind::Tgtd, 25, 2, &[])
}

/// Two sessions at once, each cut in its own time: commands go from one to the other and back.
#[test]
fn two_sessions_cut_at_random_bytes_lose_nothing() -> Result<()> {
    survives(Kind::Ours, 25, 3, &["--sessions", "2"])
}

/// `cargo xtask soak cut`.
#[test]
#[ignore = "takes long; run by cargo xtask soak cut"]
fn soak() -> Result<()> {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    let cuts = number("VCP_SOAK_CUTS").unwrap_or(200) as usize;
    let seed = number("VCP_SOAK_SEED").unwrap_or(1);
    match std::env::var("VCP_SOAK_TARGET").as_deref() {
        Ok("ours") => survives(Kind::Ours, cuts, seed, &[]),
        Ok("tgtd") => survives(Kind::Tgtd, cuts, seed, &[]),
        Ok(other) => bail!("VCP_SOAK_TARGET={other}: ours or tgtd"),
        Err(_) => {
            survives(Kind::Ours, cuts, seed, &[])?;
            survives(Kind::Tgtd, cuts / 4, seed + 1, &[])?;
            survives(Kind::Ours, cuts / 4, seed + 2, &["--sessions", "2"])
        }
    }
}
