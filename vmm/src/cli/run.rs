//! `vcp run`: the options, and the virtual machine that file and options make.

use std::path::PathBuf;

use clap::Args;

use crate::config::size::{CpuList, Size};
use crate::config::{DiskSpec, Endpoint, NetSpec, Transport, VmConfig, VmFile};
use crate::error::{Error, Result};

/// `vcp run`.
#[derive(Clone, Debug, Default, Args)]
#[command(after_help = "\
Example: a Debian guest with an iSCSI disk behind a VCP of its own
  vcp run --kernel /boot/vmlinuz-6.1.0-amd64 --initrd initrd.img --cmdline 'root=/dev/vda' \\
          --cpus 2 --memory 1G --disk url=iscsi://127.0.0.1/iqn.2026-01.example:disk/0 \\
          --net user,hostfwd=tcp:127.0.0.1:2222-22 --api-socket /run/vm1.sock

The same from a file: vcp run --print-config ... > vm.toml; vcp run vm.toml
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
    pub memory: Option<Size>,
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
    #[arg(
        long = "net",
        value_name = "SPEC",
        help = "Network device: user[,hostfwd=tcp:ADDR:PORT-PORT]..., tap=NAME, switch=NAME or socket=PATH, [,mac=M][,cpu=N][,packed=on][,reconnect=no]"
    )]
    pub nets: Vec<String>,
    /// Back guest memory with 2 MiB pages
    #[arg(long)]
    pub hugepages: bool,
    /// NUMA node that guest memory comes from [default: the node of the VCPs, where there are several]
    #[arg(long, value_name = "NODE")]
    pub memory_node: Option<usize>,
    /// What virtio devices are on [default: pci; mmio for a bare-metal guest]
    #[arg(long, value_name = "BUS")]
    pub transport: Option<Transport>,
    /// Host CPUs for vCPU threads, e.g. 0,2-3 [default: all but those of the VCPs, if there is one for each]
    #[arg(long, value_name = "LIST")]
    pub vcpu_cpus: Option<CpuList>,
    /// Socket of the API, for `vcp ctl` and `vcp top`; only its owner may use it
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,
    /// Serve metrics to Prometheus there; they are on the API's socket, too
    #[arg(long, value_name = "ADDR:PORT|unix:PATH")]
    pub metrics: Option<Endpoint>,
    /// What the guest is called in logs, metrics and `vcp top` [default: the kernel's file name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Print the TOML file that gives the same virtual machine, and end
    #[arg(long)]
    pub print_config: bool,
    /// The vcp-iscsi program [default: $VCP_ISCSI, beside this program, or on the PATH]
    #[arg(long, value_name = "FILE")]
    pub vcp_iscsi: Option<PathBuf>,
    /// The vcp-net program [default: $VCP_NET, beside this program, or on the PATH]
    #[arg(long, value_name = "FILE")]
    pub vcp_net: Option<PathBuf>,
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
        over(&mut vm.name, self.name.as_ref());
        over(&mut vm.kernel, self.kernel.as_ref());
        over(&mut vm.restore, self.restore.as_ref());
        over(&mut vm.initrd, self.initrd.as_ref());
        over(&mut vm.cmdline, self.cmdline.as_ref());
        over(&mut vm.memory, self.memory.as_ref());
        over(&mut vm.cpus, self.cpus.as_ref());
        over(&mut vm.vcpu_cpus, self.vcpu_cpus.as_ref());
        over(&mut vm.transport, self.transport.as_ref());
        over(&mut vm.memory_node, self.memory_node.as_ref());
        over(&mut vm.api_socket, self.api_socket.as_ref());
        over(&mut vm.metrics, self.metrics.as_ref());
        over(&mut vm.vcp_iscsi, self.vcp_iscsi.as_ref());
        over(&mut vm.vcp_net, self.vcp_net.as_ref());
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn args(line: &[&str]) -> RunArgs {
        let cli = Cli::parse_from(["vcp", "run"].iter().chain(line));
        let Command::Run(args) = cli.command else { panic!("not run") };
        *args
    }

    #[test]
    fn options_override_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "kernel='a'\ncpus=2\nmemory='1G'\n[[disk]]\nsocket='s'\n").unwrap();
        let path = file.path().to_str().unwrap();
        let config = args(&[path, "--cpus=3", "--disk", "socket=/t", "--kernel", "/k"]).config().unwrap();
        assert_eq!((config.vcpus, config.kernel, config.disks.len()), (3, PathBuf::from("/k"), 2));
        assert_eq!(config.memory_bytes, 1 << 30);
        // A relative path in the file is relative to the file.
        assert_eq!(config.disks[0].socket, Some(file.path().parent().unwrap().join("s")));
    }

    #[test]
    fn what_flags_say_is_what_their_file_says() {
        let by_flags = args(&[
            "--kernel=/k",
            "--initrd=/i",
            "--cmdline=root=/dev/vda",
            "--memory=2G",
            "--cpus=2",
            "--vcpu-cpus=0-1",
            "--disk=url=iscsi://h/iqn.a:b/0,read-only",
            "--net=user,hostfwd=tcp::2222-22",
            "--net=tap=t0,mac=52:54:00:00:00:01",
            "--api-socket=/run/a",
            "--metrics=unix:/run/m",
            "--name=vm1",
            "--hugepages",
            "--memory-node=0",
            "--vcp-net=/n",
            "--vcp-iscsi=/v",
        ])
        .config()
        .unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), by_flags.to_toml().unwrap()).unwrap();
        assert_eq!(args(&[file.path().to_str().unwrap()]).config().unwrap(), by_flags);
    }

    #[test]
    fn wrong_spec_is_wrong_usage() {
        for wrong in ["--disk=sokcet=x", "--net=usr"] {
            let error = args(&["--kernel", "k", wrong]).config().unwrap_err();
            assert!(error.is_usage() && error.to_string().contains("did you mean"), "{error}");
        }
    }
}
