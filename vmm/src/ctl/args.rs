//! The command line of `vcp ctl`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand};

use crate::config::size::{CpuList, Size};
use crate::config::{DiskSpec, NetSpec};
use crate::machine::command::PinTarget;

/// `vcp ctl`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Example: what the guest does, a second disk, and the disk's VCP on another hardware thread
  vcp ctl -S /run/vm1.sock status
  vcp ctl -S /run/vm1.sock add-disk url=iscsi://127.0.0.1/iqn.2026-01.example:disk/1
  vcp ctl -S /run/vm1.sock pin disk0 3

Exit code: 0 when it was done, 1 when it failed, 2 for wrong usage.")]
pub struct CtlArgs {
    /// The API socket of the guest's monitor (vcp run --api-socket)
    #[arg(long, short = 'S', value_name = "PATH", global = true)]
    pub api_socket: Option<PathBuf>,
    /// How long to wait for the answer, in seconds
    #[arg(long = "timeout", value_name = "SECONDS", global = true, default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout_s: u64,
    /// What to do.
    #[command(subcommand)]
    pub action: Action,
}

/// What `vcp ctl` can do.
#[derive(Clone, Debug, Subcommand)]
pub enum Action {
    /// Print what is known about guest, vCPUs, devices and VCPs
    Status {
        /// One JSON object instead of tables
        #[arg(long)]
        json: bool,
    },
    /// Stop all vCPUs
    Pause,
    /// Let the vCPUs go on
    Resume,
    /// Press the ACPI power button, so that the guest shuts down
    Shutdown,
    /// End the guest at once, as a power cut does
    Kill,
    /// Add a disk, and print its name
    AddDisk {
        /// As vcp run --disk takes it
        #[arg(value_name = "SPEC")]
        spec: String,
    },
    /// Take a disk away
    RemoveDisk {
        /// E.g. disk1
        #[arg(value_name = "NAME")]
        name: DeviceName,
    },
    /// Add a network device, and print its name
    AddNet {
        /// As vcp run --net takes it
        #[arg(value_name = "SPEC")]
        spec: String,
    },
    /// Take a network device away
    RemoveNet {
        /// E.g. net1
        #[arg(value_name = "NAME")]
        name: DeviceName,
    },
    /// Set how much memory the guest may use
    Resize {
        /// With K, M, G or T; at most what the guest was started with
        #[arg(value_name = "SIZE")]
        memory: Size,
    },
    /// Move a vCPU's or a VCP's thread to other host CPUs
    Pin {
        /// vcpu0, or a device such as disk0
        #[arg(value_name = "vcpuN|DEVICE")]
        target: Target,
        /// Numbers and ranges, e.g. 0,2-3
        #[arg(value_name = "CPUS")]
        cpus: CpuList,
    },
    /// Replace a device's VCP by a new process
    RestartVcp {
        /// E.g. disk0
        #[arg(value_name = "DEVICE")]
        device: DeviceName,
        /// Hand everything over between two batches; else the old process is killed, and what was in flight is repeated
        #[arg(long)]
        upgrade: bool,
    },
    /// Change a device's rate limits
    Limit {
        /// E.g. disk0
        #[arg(value_name = "DEVICE")]
        device: DeviceName,
        /// Requests per second; 0: no limit
        #[arg(long, value_name = "N", required_unless_present = "bps")]
        iops: Option<u64>,
        /// Bytes per second, with K, M, G or T; 0: no limit
        #[arg(long, value_name = "SIZE")]
        bps: Option<Size>,
    },
    /// Change what is logged
    LogLevel {
        /// error, warn, info, debug, trace, or a filter as in RUST_LOG
        #[arg(value_name = "LEVEL")]
        level: String,
        /// By the VCP of this device, and not by the monitor
        #[arg(long, value_name = "DEVICE")]
        device: Option<DeviceName>,
    },
    /// Write the paused guest to a file, for vcp run --restore
    Snapshot {
        /// The file
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

/// The name of a device: it becomes part of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceName(String);

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if text.is_empty() || text.len() > 32 || !text.chars().all(good) {
            return Err("this is not the name of a device, e.g. disk0".into());
        }
        Ok(Self(text.into()))
    }
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whose thread is pinned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target(pub PinTarget);

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(number) = text.strip_prefix("vcpu") {
            let number = number.parse().map_err(|_| format!("{text:?} is no vCPU: write e.g. vcpu0"))?;
            return Ok(Self(PinTarget::Vcpu(number)));
        }
        text.parse::<DeviceName>().map(|DeviceName(name)| Self(PinTarget::Device(name)))
    }
}

/// A disk, with its path made absolute: the monitor may be in another directory. Not parsed by clap, which would repeat a
/// specification with a secret in its message.
pub(super) fn disk(spec: &str) -> Result<DiskSpec, String> {
    let mut disk = DiskSpec::parse(spec)?;
    disk.socket = absolute(disk.socket)?;
    Ok(disk)
}

/// The same for a network device.
pub(super) fn net(spec: &str) -> Result<NetSpec, String> {
    let mut net = NetSpec::parse(spec)?;
    net.socket = absolute(net.socket)?;
    Ok(net)
}

fn absolute(path: Option<PathBuf>) -> Result<Option<PathBuf>, String> {
    path.map(std::path::absolute).transpose().map_err(|e| format!("socket=: {e}"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn args(line: &str) -> Result<CtlArgs, String> {
        let cli = Cli::try_parse_from(["vcp", "ctl"].into_iter().chain(line.split(' ')))
            .map_err(|e| e.to_string())?;
        let Command::Ctl(args) = cli.command else { panic!("not ctl") };
        Ok(args)
    }

    #[test]
    fn options_stand_before_or_after_the_words() {
        for line in [
            "--api-socket /s status --json",
            "status --api-socket=/s --json",
            "-S /s --timeout 3 status --json",
        ] {
            let args = args(line).unwrap();
            assert_eq!(args.api_socket, Some(PathBuf::from("/s")));
            assert!(matches!(args.action, Action::Status { json: true }));
        }
    }

    #[test]
    fn targets_are_vcpus_and_devices() {
        let target = |text: &str| text.parse::<Target>().map(|target| target.0);
        assert_eq!(target("vcpu12"), Ok(PinTarget::Vcpu(12)));
        assert_eq!(target("disk0"), Ok(PinTarget::Device("disk0".into())));
        for bad in ["vcpu", "vcpux", "", "a/b", "disk0?x"] {
            assert!(target(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn wrong_words_are_refused_here() {
        for bad in [
            "-S /s limit disk0",
            "-S /s resize 5apples",
            "-S /s pin disk0 x",
            "-S /s remove-disk ../x",
            "-S /s",
        ] {
            assert!(args(bad).is_err(), "{bad}");
        }
    }
}
