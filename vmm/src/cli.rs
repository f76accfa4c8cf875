//! The command line of `vcp`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::bench;
use crate::config::{DiskSpec, NetSpec, Transport, VmConfig, VmFile};
use crate::error::{Error, Result};

/// Virtual machines whose I/O runs on virtual channel processors.
#[derive(Debug, Parser)]
#[command(name = "vcp", version, about)]
pub struct Cli {
    /// What to log on standard error: error, warn, info, debug, trace, or a filter as in RUST_LOG
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log: Option<String>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a guest and be its serial console until it ends
    Run(RunArgs),
    /// Tell what this host can do, and what to do about what it cannot
    Check(CheckArgs),
    /// Load a vhost-user backend and measure it
    Bench(bench::BenchArgs),
}

/// `vcp run`.
#[derive(Clone, Debug, Default, Args)]
#[command(after_help = "\
Example: a Debian guest with an iSCSI disk behind a VCP of its own
  vcp run --kernel /boot/vmlinuz-6.1.0-amd64 --initrd initrd.img --cmdline 'root=/dev/vda' \\
          --cpus 2 --memory 1G --disk url=iscsi://127.0.0.1/iqn.2026-01.example:disk/0

A backend that dies is started (url=) or sought (socket=) again, and the guest waits; reconnect=no ends the guest instead.
The console is the terminal; Ctrl-A x ends the guest, Ctrl-A Ctrl-A sends a Ctrl-A.
Exit code: 0 when the guest switched itself off or reset itself, 1 when something failed, 2 for wrong usage.")]
pub struct RunArgs {
    /// Description of the virtual machine (TOML); options override it
    #[arg(value_name = "VM.toml")]
    pub file: Option<PathBuf>,
    /// bzImage or ELF file to boot
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Go on with a snapshot (of `vcp ctl snapshot`) instead of booting; give the same disks and nets as then, in the same
    /// order. Memory, vCPUs and command line are the snapshot's
    #[arg(long, value_name = "FILE")]
    pub restore: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line; console=ttyS0 is added if it names no console
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Guest memory, with K, M, G or T [default: 512M]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Number of vCPUs, 1 to 64 [default: 1]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u8>,
    /// Block devices.
    #[arg(
        long = "disk",
        value_name = "SPEC",
        help = "Block device: url=iscsi://...[,read-only][,cpu=N] or socket=PATH, [,queues=N][,packed=on][,reconnect=no]"
    )]
    pub disks: Vec<String>,
    /// Network devices.
    #[arg(long = "net", value_name = "SPEC", help = "Network device: socket=PATH[,mac=M][,reconnect=no]")]
    pub nets: Vec<String>,
    /// Back guest memory with 2 MiB pages
    #[arg(long)]
    pub hugepages: bool,
    /// What virtio devices are on [default: pci; mmio for a bare-metal guest]
    #[arg(long, value_name = "BUS")]
    pub transport: Option<Transport>,
    /// Host CPUs for vCPU threads, e.g. 0,2-3 [default: all but those of the VCPs, if there is one for each]
    #[arg(long, value_name = "LIST")]
    pub vcpu_cpus: Option<String>,
    /// The vcp-iscsi program [default: $VCP_ISCSI, beside this program, or on the PATH]
    #[arg(long, value_name = "FILE")]
    pub vcp_iscsi: Option<PathBuf>,
}

impl RunArgs {
    /// The virtual machine: the file's description with the options over it. Disks and nets add to the file's.
    pub fn config(&self) -> Result<VmConfig> {
        let mut vm = match &self.file {
            Some(path) => VmFile::load(path)?,
            None => VmFile::default(),
        };
        fn over<T: Clone>(target: &mut Option<T>, option: Option<&T>) {
            if let Some(value) = option {
                *target = Some(value.clone());
            }
        }
        over(&mut vm.kernel, self.kernel.as_ref());
        over(&mut vm.restore, self.restore.as_ref());
        over(&mut vm.initrd, self.initrd.as_ref());
        over(&mut vm.cmdline, self.cmdline.as_ref());
        over(&mut vm.memory, self.memory.as_ref());
        over(&mut vm.cpus, self.cpus.as_ref());
        over(&mut vm.vcpu_cpus, self.vcpu_cpus.as_ref());
        over(&mut vm.transport, self.transport.as_ref());
        over(&mut vm.hugepages, self.hugepages.then_some(&true));
        // Parsed here and not by clap, which would repeat a specification with a secret in its message.
        for disk in &self.disks {
            vm.disk.push(DiskSpec::parse(disk).map_err(|e| Error::Usage(format!("--disk: {e}")))?);
        }
        for net in &self.nets {
            vm.net.push(NetSpec::parse(net).map_err(|e| Error::Usage(format!("--net: {e}")))?);
        }
        vm.finish()
    }
}

/// `vcp check`.
#[derive(Clone, Debug, Default, Args)]
#[command(after_help = "Example: vcp check --json | jq .linux_guest")]
pub struct CheckArgs {
    /// Print one JSON object instead of lines
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_override_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "kernel='a'\ncpus=2\n[[disk]]\nsocket='s'\n").unwrap();
        let path = file.path().to_str().unwrap();
        let cli = Cli::parse_from(["vcp", "run", path, "--cpus=3", "--disk", "socket=/t", "--kernel", "/k"]);
        let Command::Run(args) = cli.command else { panic!("not run") };
        let config = args.config().unwrap();
        assert_eq!((config.vcpus, config.kernel, config.disks.len()), (3, PathBuf::from("/k"), 2));
        // A relative path in the file is relative to the file.
        assert_eq!(config.disks[0].socket, Some(file.path().parent().unwrap().join("s")));
    }

    #[test]
    fn wrong_spec_is_wrong_usage() {
        let cli = Cli::parse_from(["vcp", "run", "--kernel", "k", "--disk", "sokcet=x"]);
        let Command::Run(args) = cli.command else { panic!("not run") };
        assert!(args.config().unwrap_err().is_usage());
    }
}
