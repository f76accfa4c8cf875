//! What a virtual machine is made of: read from a TOML file and from command-line options, which override the file.
//! Checks everything that can be checked without touching the host.

pub mod size;
pub mod spec;

use std::path::{Path, PathBuf};

use serde::Deserialize;
pub use spec::{DiskSpec, NetSpec, SecretUrl};

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// The PCI bus: an interrupt for each queue, and devices come and go while the guest runs.
    Pci,
    /// virtio-mmio windows.
    Mmio,
}

/// A virtual machine as its TOML file describes it. Everything is optional here, since options may give the rest.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmFile {
    /// bzImage or ELF file.
    pub kernel: Option<PathBuf>,
    /// Snapshot to go on with instead of booting a kernel.
    #[serde(skip)]
    pub restore: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line; `console=ttyS0` is added where it names no console.
    pub cmdline: Option<String>,
    /// Size with K, M, G or T.
    pub memory: Option<String>,
    /// Number of vCPUs.
    pub cpus: Option<u8>,
    /// Back the memory with huge pages.
    pub hugepages: Option<bool>,
    /// `pci` or `mmio`.
    pub transport: Option<Transport>,
    /// Host CPUs for vCPU threads, e.g. `0,2-3`.
    pub vcpu_cpus: Option<String>,
    /// Block devices.
    #[serde(default)]
    pub disk: Vec<DiskSpec>,
    /// Network devices.
    #[serde(default)]
    pub net: Vec<NetSpec>,
}

/// A virtual machine, complete and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
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
    /// What devices are on; `None`: PCI, but virtio-mmio for bare-metal guests.
    pub transport: Option<Transport>,
    /// Host CPUs for vCPU threads; `None`: chosen by the monitor.
    pub vcpu_cpus: Option<Vec<usize>>,
    /// Block devices.
    pub disks: Vec<DiskSpec>,
    /// Network devices.
    pub nets: Vec<NetSpec>,
}

impl VmFile {
    /// Reads a TOML file. Relative paths in it are relative to the directory that it lies in.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::File {
            action: "read the configuration",
            path: path.to_owned(),
            source,
        })?;
        let mut file =
            Self::parse(&text).map_err(|reason| Error::Config { path: path.to_owned(), reason })?;
        let base = path.parent().unwrap_or(Path::new(""));
        let paths = [&mut file.kernel, &mut file.initrd];
        for p in paths
            .into_iter()
            .chain(file.disk.iter_mut().map(|d| &mut d.socket))
            .chain(file.net.iter_mut().map(|n| &mut n.socket))
            .flatten()
        {
            *p = base.join(&*p);
        }
        Ok(file)
    }

    /// Reads the text of a TOML file; an error is one line.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        toml::from_str(text).map_err(|e| {
            let line = e.span().map(|s| text[..s.start.min(text.len())].matches('\n').count() + 1);
            let message = e.message().replace('\n', " ");
            line.map_or(message.clone(), |l| format!("line {l}: {message}"))
        })
    }

    /// Completes and checks the description.
    pub fn finish(self) -> Result<VmConfig> {
        let usage = |text: String| Error::Usage(text);
        let kernel = self.kernel.or_else(|| self.restore.clone()).ok_or_else(|| {
            usage("no kernel given: use --kernel FILE or kernel = \"FILE\" in the VM file".into())
        })?;
        let hugepages = self.hugepages.unwrap_or(false);
        let memory_bytes = match &self.memory {
            Some(text) => size::parse(text).map_err(|e| usage(format!("memory: {e}")))?,
            None => DEFAULT_MEMORY_BYTES,
        };
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
        let vcpu_cpus = match &self.vcpu_cpus {
            Some(text) => Some(size::parse_cpus(text).map_err(|e| usage(format!("vcpu-cpus: {e}")))?),
            None => None,
        };
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
        Ok(VmConfig {
            kernel,
            restore: self.restore,
            initrd: self.initrd,
            cmdline,
            memory_bytes,
            vcpus,
            hugepages,
            transport: self.transport,
            vcpu_cpus,
            disks: self.disk,
            nets: self.net,
        })
    }
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
    fn unknown_field_is_named_with_its_line() {
        let error = VmFile::parse("kernel='k'\nmemroy='1G'\n").unwrap_err();
        assert!(error.starts_with("line 2:") && error.contains("memroy") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn wrong_values_are_refused() {
        for text in [
            "",
            "kernel='k'\ncpus=0",
            "kernel='k'\ncpus=65",
            "kernel='k'\nmemory='1K'",
            "kernel='k'\nmemory='5000001'",
            "kernel='k'\nvcpu-cpus='x'",
            "kernel='k'\n[[disk]]\nqueues=1",
            "kernel='k'\ncmdline=\"a\\nb\"",
        ] {
            let result = VmFile::parse(text).unwrap().finish();
            assert!(matches!(&result, Err(e) if e.is_usage()), "{text}: {result:?}");
        }
    }
}
