//! istgt: a process of its own in the foreground, with a configuration directory of its own.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::Context;

use super::{Config, START};
use crate::Result;
use crate::proc::{Cmd, Proc, Stream};

pub(super) fn start(config: &Config<'_>) -> Result<Proc> {
    let dir = config.dir.display();
    let (base, name) = config.iqn.split_once(':').context("the target's name has no colon")?;
    let method = match &config.spec.chap {
        None => "None",
        Some(chap) if chap.mutual.is_none() => "CHAP",
        Some(_) => "CHAP Mutual",
    };
    let mut conf = format!(
        "[Global]\n  NodeBase \"{base}\"\n  PidFile {dir}/istgt.pid\n  AuthFile {dir}/auth.conf\n  \
         MediaDirectory {dir}\n  LogFacility \"local7\"\n  Timeout 30\n  NopInInterval 20\n  \
         DiscoveryAuthMethod None\n  MaxSessions 32\n  MaxConnections 4\n  MaxR2T 32\n  \
         MaxOutstandingR2T 16\n  DefaultTime2Wait 2\n  DefaultTime2Retain 60\n  FirstBurstLength 262144\n  \
         MaxBurstLength 1048576\n  MaxRecvDataSegmentLength 262144\n  InitialR2T Yes\n  ImmediateData Yes\n  \
         DataPDUInOrder Yes\n  DataSequenceInOrder Yes\n  ErrorRecoveryLevel 0\n\
         [UnitControl]\n  AuthMethod None\n  Netmask 127.0.0.1\n\
         [PortalGroup1]\n  Portal DA1 {}\n\
         [InitiatorGroup1]\n  InitiatorName \"ALL\"\n  Netmask 127.0.0.1\n\
         [LogicalUnit1]\n  TargetName {name}\n  TargetAlias \"test\"\n  Mapping PortalGroup1 InitiatorGroup1\n  \
         AuthMethod {method}\n  AuthGroup AuthGroup1\n  UseDigest Auto\n  UnitType Disk\n  QueueDepth 32\n",
        config.portal
    );
    if let Some(lun) = config.luns.first() {
        writeln!(conf, "  BlockLength {}", lun.spec.block_bytes)?;
    }
    for lun in config.luns {
        writeln!(conf, "  LUN{} Storage {} Auto", lun.number, lun.image.display())?;
        if lun.spec.read_only {
            writeln!(conf, "  LUN{} Option ReadOnly", lun.number)?;
        }
    }
    let mut auth = "[AuthGroup1]\n".to_owned();
    if let Some(chap) = &config.spec.chap {
        write!(auth, "  Auth \"{}\" \"{}\"", chap.user, chap.secret)?;
        if let Some((user, secret)) = &chap.mutual {
            write!(auth, " \"{user}\" \"{secret}\"")?;
        }
        auth.push('\n');
    }
    let conf_file = config.dir.join("istgt.conf");
    fs::write(&conf_file, conf)?;
    write_private(&config.dir.join("auth.conf"), &auth)?;
    let proc = Cmd::new("istgt").arg("-D").arg("-c").arg(&conf_file).spawn()?;
    ready(&proc, config)?;
    Ok(proc)
}

/// istgt says what it serves before it listens; the portal itself is the only sign that it does.
fn ready(proc: &Proc, config: &Config<'_>) -> Result<()> {
    if let Some(lun) = config.luns.last() {
        let line = format!("LUN{} command queuing", lun.number);
        proc.wait_line(Stream::Out, &line, START)
            .or_else(|_| proc.wait_line(Stream::Err, &line, std::time::Duration::ZERO))?;
    }
    let end = std::time::Instant::now() + START;
    while std::net::TcpStream::connect(config.portal).is_err() {
        if !proc.is_running() || std::time::Instant::now() > end {
            anyhow::bail!("istgt did not open its portal {}: {}", config.portal, proc.tail());
        }
        std::thread::yield_now();
    }
    Ok(())
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(())
}
