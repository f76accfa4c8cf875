//! Installs the Debian packages that a task needs and the machine lacks. Looks only at dpkg's own database, asks
//! apt by name, changes nothing when everything is there.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cmd;

/// What a task needs: building, showing, testing or comparing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Need {
    /// `cargo xtask demo`: a guest's kernel and userland, and the virtual machine that stands in where the host's KVM
    /// cannot run Linux.
    Demo,
    /// `cargo xtask test` and `bench`: also the peers.
    Test,
    /// `cargo xtask bench kernel`: also what starts the kernel's initiator.
    Kernel,
    /// `cargo xtask bench net`: also what the front end is built with, the other user-mode stacks, and what measures times.
    Net,
}

const DEMO: &[&str] = &[
    "gcc",
    "libc6-dev",
    "qemu-system-x86",
    "linux-image-cloud-amd64",
    "busybox-static",
    "e2fsprogs",
    "kmod",
    "fio",
];

const TEST: &[&str] = &[
    "tgt",
    "istgt",
    "libiscsi-bin",
    "qemu-utils",
    "qemu-block-extra",
    "cpio",
    "strace",
    "tshark",
    "tmux",
    "procps",
    "dpdk-dev",
    "librte-net-vhost23",
    "iproute2",
    "iperf3",
    "curl",
    "libvirt-clients",
    "libxml2-utils",
];

const KERNEL: &[&str] = &["open-iscsi"];

const NET: &[&str] = &["libdpdk-dev", "pkgconf", "passt", "sockperf"];

/// Versions of these must agree, or qemu-storage-daemon cannot load its iSCSI driver.
const QEMU_TOOLS: &str = "qemu-utils";
const QEMU_DRIVERS: &str = "qemu-block-extra";

fn installed(package: &str) -> Option<String> {
    let query = Command::new("dpkg-query")
        .args(["-W", "-f=${db:Status-Status} ${Version}", package])
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&query.stdout).into_owned();
    text.strip_prefix("installed ").map(str::to_owned)
}

fn candidate(package: &str) -> Result<String> {
    let policy = cmd::output(Command::new("apt-cache").args(["madison", package]))?;
    policy
        .lines()
        .next()
        .and_then(|line| line.split('|').nth(1))
        .map(|version| version.trim().to_owned())
        .with_context(|| format!("no Debian package named {package} is known; is this Debian 12?"))
}

fn apt(arguments: &[String]) -> Result<()> {
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new("apt-get")
    } else {
        let mut sudo = Command::new("sudo");
        sudo.arg("apt-get");
        sudo
    };
    cmd::run(
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-q", "-o", "Dpkg::Use-Pty=0"])
            .args(arguments),
    )
}

/// Installs what is missing for `need`.
///
/// # Errors
/// This is no Debian, or apt fails; the message names the packages to install by hand.
pub(crate) fn ensure(need: Need) -> Result<()> {
    let lists = match need {
        Need::Demo => vec![DEMO],
        Need::Test => vec![DEMO, TEST],
        Need::Kernel => vec![DEMO, TEST, KERNEL],
        Need::Net => vec![DEMO, TEST, NET],
    };
    let wanted = lists.concat();
    let missing: Vec<&str> = wanted.iter().copied().filter(|package| installed(package).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if Command::new("dpkg-query").arg("--version").output().is_err() {
        bail!("this is no Debian system; install these yourself: {}", missing.join(" "));
    }
    eprintln!("installing Debian packages: {}", missing.join(" "));
    apt(&["update".into()]).context("cannot update the package lists")?;
    let mut arguments = vec!["install".into(), "-y".into(), "--no-install-recommends".into()];
    arguments.extend(missing.iter().map(|&package| package.to_owned()));
    if missing.contains(&QEMU_DRIVERS)
        && let Some(present) = installed(QEMU_TOOLS)
    {
        let version = candidate(QEMU_DRIVERS)?;
        if version != present {
            // A newer qemu-utils (backports) does not load the drivers of the release's qemu-block-extra.
            if std::env::var_os("CI").is_none() {
                bail!(
                    "{QEMU_TOOLS} {present} and {QEMU_DRIVERS} {version} do not fit together; install the same \
                     version of both, for example `apt-get install --allow-downgrades {QEMU_TOOLS}={version}`"
                );
            }
            arguments.push("--allow-downgrades".into());
            arguments.push(format!("{QEMU_TOOLS}={version}"));
        }
    }
    apt(&arguments).with_context(|| format!("cannot install {}", missing.join(" ")))?;
    for package in missing {
        if installed(package).is_none() {
            bail!("{package} is still not installed");
        }
    }
    Ok(())
}
