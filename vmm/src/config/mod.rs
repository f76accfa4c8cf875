//! What a virtual machine is made of: read from a TOML file and from command-line options, which override the file.
//! Checks everything that can be checked without touching the host.

mod bounds;
mod disk;
mod file;
mod net;
mod print;
pub mod size;
mod words;

use std::path::PathBuf;

pub use bounds::BoundSpec;
pub use disk::{DiskSpec, MAX_QUEUES, NetworkAccess, PathsFrom, SecretUrl};
pub use file::VmFile;
pub use net::{HostForward, NetKind, NetSpec, Protocol};

pub use vcp_core::http::Endpoint;

use crate::error::{Error, Result};

/// Largest number of vCPUs.
pub const MAX_VCPUS: u8 = 64;
/// Memory if none is asked for, bytes.
pub const DEFAULT_MEMORY_BYTES: u64 = 512 << 20;
/// Smallest memory that makes sense, bytes.
pub const MIN_MEMORY_BYTES: u64 = 4 << 20;
/// Largest memory, bytes: below the first address that KVM or a guest with 40 address bits could not use.
pub const MAX_MEMORY_BYTES: u64 = 1 << 39;
/// Virtual machines have at most this many disks and nets: slots of the PCI bus without the host bridge and the monitor's
/// own devices. On virtio-mmio there are fewer.
pub const MAX_DEVICES: usize = 28;

/// What virtio devices are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// The PCI bus: an interrupt for each queue, and devices come and go while the guest runs.
    Pci,
    /// virtio-mmio windows.
    Mmio,
}

/// A virtual machine, complete and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// What the guest is called in logs, metrics and `vcp top`; the kernel's file name if nothing else was said.
    pub name: String,
    /// bzImage or ELF file; not used with a snapshot.
    pub kernel: PathBuf,
    /// Snapshot to go on with instead.
    pub restore: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line as the user gave it.
    pub cmdline: String,
    /// Guest memory, bytes; a multiple of 2 MiB with huge pages, else of 4 KiB.
    pub memory_bytes: u64,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Back the memory with huge pages.
    pub hugepages: bool,
    /// NUMA node that the memory comes from; `None`: that of the VCPs.
    pub memory_node: Option<usize>,
    /// What devices are on; `None`: PCI, but virtio-mmio for bare-metal guests.
    pub transport: Option<Transport>,
    /// Host CPUs for vCPU threads; `None`: chosen by the monitor.
    pub vcpu_cpus: Option<Vec<usize>>,
    /// Socket of the API.
    pub api_socket: Option<PathBuf>,
    /// Where metrics are served.
    pub metrics: Option<Endpoint>,
    /// What is logged, where neither option nor environment says it.
    pub log: Option<String>,
    /// Log JSON objects.
    pub log_json: bool,
    /// The `vcp-iscsi` program.
    pub vcp_iscsi: Option<PathBuf>,
    /// The `vcp-net` program.
    pub vcp_net: Option<PathBuf>,
    /// Block devices.
    pub disks: Vec<DiskSpec>,
    /// Network devices.
    pub nets: Vec<NetSpec>,
}

impl VmFile {
    /// Completes and checks the description.
    pub fn finish(self) -> Result<VmConfig> {
        let usage = |text: String| Error::Usage(text);
        let kernel = self.kernel.or_else(|| self.restore.clone()).ok_or_else(|| {
            usage("no kernel given: use --kernel FILE or kernel = \"FILE\" in the VM file".into())
        })?;
        let hugepages = self.hugepages.unwrap_or(false);
        let memory_bytes = self.memory.map_or(DEFAULT_MEMORY_BYTES, |size| size.0);
        if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&memory_bytes) {
            return Err(usage(format!("memory of {memory_bytes} bytes is out of range: 4M to 512G")));
        }
        let page = if hugepages { 2 << 20 } else { 4096 };
        if !memory_bytes.is_multiple_of(page) {
            return Err(usage(format!(
                "memory of {memory_bytes} bytes is not a multiple of the page size of {page} bytes"
            )));
        }
        let vcpus = self.cpus.unwrap_or(1);
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(usage(format!("cpus={vcpus} is out of range: 1 to {MAX_VCPUS}")));
        }
        for disk in &self.disk {
            disk.validate().map_err(|e| usage(format!("disk: {e}")))?;
        }
        for net in &self.net {
            net.validate().map_err(|e| usage(format!("net: {e}")))?;
        }
        let devices = self.disk.len() + self.net.len();
        if devices > MAX_DEVICES {
            return Err(usage(format!(
                "{devices} devices are too many: at most {MAX_DEVICES} disks and nets"
            )));
        }
        let cmdline = self.cmdline.unwrap_or_default();
        if cmdline.contains(['\0', '\n']) {
            return Err(usage("cmdline: a kernel command line has no line breaks or NUL bytes".into()));
        }
        let name = match self.name {
            Some(name) => name,
            None => kernel.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        };
        check_name(&name).map_err(usage)?;
        Ok(VmConfig {
            name,
            kernel,
            restore: self.restore,
            initrd: self.initrd,
            cmdline,
            memory_bytes,
            vcpus,
            hugepages,
            memory_node: self.memory_node,
            transport: self.transport,
            vcpu_cpus: self.vcpu_cpus.map(|list| list.0),
            api_socket: self.api_socket,
            metrics: self.metrics,
            log: self.log,
            log_json: self.log_json.unwrap_or(false),
            vcp_iscsi: self.vcp_iscsi,
            vcp_net: self.vcp_net,
            disks: self.disk,
            nets: self.net,
        })
    }
}

/// A name is short and can be printed.
fn check_name(name: &str) -> std::result::Result<(), String> {
    /// Longest name, bytes.
    const MAX: usize = 64;
    if name.is_empty() || name.len() > MAX || name.chars().any(char::is_control) {
        return Err(format!("name {name:?} is not a name: 1 to {MAX} bytes without control characters"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_file() {
        let file = VmFile::parse(
            "kernel='k'\ncpus=2\nmemory='1G'\n[[disk]]\nurl='iscsi://h/iqn.a:b/0'\nread-only=true\n[[net]]\nsocket='n'\n",
        )
        .unwrap();
        let vm = file.finish().unwrap();
        assert_eq!((vm.vcpus, vm.memory_bytes, vm.disks.len(), vm.nets.len()), (2, 1 << 30, 1, 1));
    }

    #[test]
    fn wrong_values_are_refused() {
        for text in [
            "",
            "kernel='k'\ncpus=0",
            "kernel='k'\ncpus=65",
            "kernel='k'\nmemory='1K'",
            "kernel='k'\nmemory='5000001'",
            "kernel='k'\nname=''",
            "kernel='k'\ncmdline=\"a\\nb\"",
        ] {
            let result = VmFile::parse(text).unwrap().finish();
            assert!(matches!(&result, Err(e) if e.is_usage()), "{text}: {result:?}");
        }
    }
}
