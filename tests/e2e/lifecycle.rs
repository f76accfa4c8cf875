//! The monitor's start and its sudden end: nobody is troubled for a run that cannot be, and nothing is left of one that
//! was killed.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use guest_images::{bare, linux};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use vcp_tests::proc::{Proc, Stream};
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, procfs};

use crate::monitor::{check, ring3};
use crate::support::{COMMAND, one_error, vcp};

/// How long a guest may take until it uses its disk.
const GUEST: Duration = Duration::from_secs(60);
/// How long a VCP may outlive its monitor.
const ORPHAN: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Directories of runs in `base`.
fn runtime_dirs(base: &Path) -> Result<usize> {
    let entries = std::fs::read_dir(base)?.collect::<std::io::Result<Vec<_>>>()?;
    Ok(entries.iter().filter(|e| e.file_name().to_string_lossy().starts_with("vcp-")).count())
}

#[test]
fn bad_initrd_is_told_before_a_vcp_is_started() -> Result<()> {
    if check()?["kvm"] != true {
        vcp_tests::tool::note_skip("no KVM here");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let program = dir.path().join("program");
    std::fs::write(&program, format!("#!/bin/sh\n: >{}\n", dir.path().join("started").display()))?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    let kernel = linux::guest()?.kernel;
    // No such file; more than there is room for.
    let large = dir.path().join("large");
    std::fs::File::create(&large)?.set_len(200 << 20)?;
    for (initrd, words) in [(dir.path().join("none"), ["initrd", "none"]), (large, ["too small", "initrd"])] {
        let out =
            vcp(["run", "--memory", "128M", "--disk", "url=iscsi://127.0.0.1:1/iqn.2026-01.test.vcp:x/0"])?
                .arg("--kernel")
                .arg(&kernel)
                .arg("--initrd")
                .arg(&initrd)
                .arg("--vcp-iscsi")
                .arg(&program)
                .env("XDG_RUNTIME_DIR", dir.path())
                .run(COMMAND)?;
        one_error(&out, 1, &words)?;
        ensure!(!dir.path().join("started").exists(), "a VCP was started for {}", initrd.display());
        assert_eq!(runtime_dirs(dir.path())?, 0);
    }
    Ok(())
}

/// A bare-metal guest that loads its disk for a minute, and the process id of its VCP.
fn loaded(target: &Target, runtime_dir: &Path) -> Result<(Proc, Pid)> {
    let proc = vcp(["run", "--cmdline", "job=bench rw=randread secs=60 region=8M", "--disk"])?
        .arg(format!("url={}", target.url(0)))
        .arg("--kernel")
        .arg(bare::build()?)
        .env("XDG_RUNTIME_DIR", runtime_dir)
        .spawn()?;
    proc.wait_line(Stream::Out, "disk 0:", GUEST)?;
    let children = procfs::vcps(proc.pid())?;
    ensure!(children.len() == 1, "vcp run has the VCPs {children:?}");
    let pid = Pid::from_raw(children[0] as i32).context("no process id")?;
    Ok((proc, pid))
}

#[test]
fn killed_monitor_leaves_no_vcp_and_no_directory() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    // With a target that answers, and with one that has stopped answering: nobody waits for a logout.
    for silent in [false, true] {
        let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
        let dir = tempfile::tempdir()?;
        let (proc, vcp) = loaded(&target, dir.path())?;
        let pidfd = pidfd_open(vcp, PidfdFlags::empty())?;
        let children = procfs::children(proc.pid())?;
        if silent {
            target.proc().signal(Signal::STOP)?;
        }
        proc.signal(Signal::KILL)?;
        proc.wait(COMMAND)?;
        let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&ORPHAN));
        if silent {
            target.proc().signal(Signal::CONT)?;
        }
        ensure!(ended? == 1, "vcp-iscsi lives 1 s after its monitor (target silent: {silent})");
        // One that stood by has gone, too.
        for child in children {
            ensure!(procfs::cmdline(child).map_or(true, |line| line.is_empty()), "process {child} is left");
        }
        assert_eq!(runtime_dirs(dir.path())?, 0, "target silent: {silent}");
    }
    Ok(())
}
