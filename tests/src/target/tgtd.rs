//! tgtd: a process of its own in the foreground, with a private control socket, set up by tgtadm.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::bail;

use super::{Config, START};
use crate::Result;
use crate::proc::{Cmd, Proc};

/// The number after the control socket's path; the path itself is private, so any number does.
const CONTROL: &str = "1";
const ADM: Duration = Duration::from_secs(10);

pub(super) fn start(config: &Config<'_>) -> Result<Proc> {
    let proc = Cmd::new("tgtd")
        .args(["-f", "-C", CONTROL, "--iscsi", &format!("portal={}", config.portal)])
        .env("TGT_IPC_SOCKET", config.dir.join("tgtd.sock"))
        .spawn()?;
    let end = Instant::now() + START;
    // tgtd prints nothing when it is ready; its control socket answers then.
    while adm(config.dir, &["--mode", "sys", "--op", "show"]).is_err() {
        if !proc.is_running() || Instant::now() > end {
            bail!("tgtd did not open its control socket: {}", proc.tail());
        }
        std::thread::yield_now();
    }
    // A portal that it cannot open is only logged.
    let portals = adm(config.dir, &["--mode", "portal", "--op", "show"])?;
    if !portals.contains(&config.portal.to_string()) {
        bail!("tgtd did not open its portal {}: {}", config.portal, proc.tail());
    }
    let adm = |args: &[&str]| adm(config.dir, args);
    adm(&["--mode", "target", "--op", "new", "--tid", "1", "--targetname", config.iqn])?;
    for digest in ["HeaderDigest", "DataDigest"].into_iter().filter(|_| config.spec.digests) {
        let update = ["--mode", "target", "--op", "update", "--tid", "1", "--name", digest];
        adm(&[&update[..], &["--value", "CRC32C,None"][..]].concat())?;
    }
    for lun in config.luns {
        let number = lun.number.to_string();
        let image = lun.image.display().to_string();
        let block = lun.spec.block_bytes.to_string();
        let unit = ["--mode", "logicalunit", "--tid", "1", "--lun", &number];
        let new = ["--op", "new", "--backing-store", &image, "--bstype", "rdwr", "--blocksize", &block];
        adm(&[&unit[..], &new[..]].concat())?;
        let read_only = u8::from(lun.spec.read_only);
        let params = format!("thin_provisioning=1,readonly={read_only}");
        adm(&[&unit[..], &["--op", "update", "--params", &params][..]].concat())?;
    }
    if let Some(chap) = &config.spec.chap {
        let new = ["--mode", "account", "--op", "new", "--user"];
        let bind = ["--mode", "account", "--op", "bind", "--tid", "1", "--user"];
        adm(&[&new[..], &[&chap.user, "--password", &chap.secret][..]].concat())?;
        adm(&[&bind[..], &[chap.user.as_str()][..]].concat())?;
        if let Some((user, secret)) = &chap.mutual {
            adm(&[&new[..], &[user, "--password", secret][..]].concat())?;
            adm(&[&bind[..], &[user, "--outgoing"][..]].concat())?;
        }
    }
    adm(&["--mode", "target", "--op", "bind", "--tid", "1", "--initiator-address", "ALL"])?;
    Ok(proc)
}

pub(super) fn show(dir: &Path) -> Result<String> {
    adm(dir, &["--mode", "target", "--op", "show"])
}

fn adm(dir: &Path, args: &[&str]) -> Result<String> {
    Cmd::new("tgtadm")
        .args(["-C", CONTROL, "--lld", "iscsi"])
        .args(args)
        .env("TGT_IPC_SOCKET", dir.join("tgtd.sock"))
        .output(ADM)
}
