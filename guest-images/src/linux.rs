//! The Debian guest's kernel and initramfs.
//!
//! The initramfs has a static busybox, the kernel's own virtio modules in insert order and an `/init` that reads the
//! kernel command line:
//!
//! | word | does |
//! | --- | --- |
//! | `root=/dev/vda [rootfstype=ext4] [rootflags=..] [ro] [init=/sbin/init]` | mounts the device and starts its init |
//! | `vcp.job=PATH` | without `root=`: runs that shell script of the initramfs; with it: of the root file system |
//! | `vcp.job64=BASE64` | the same with the script itself on the command line ([`job_arg`]) |
//!
//! Without `root=` and a job, `/job` of the initramfs is run if it is there, else a shell on the console. After a job
//! the line [`EXIT_MARKER`]`N` carries its exit status, and the guest powers off.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::modules::Kernel;
use crate::tree::{Tree, libraries};
use crate::{Error, Result, cache, cpio};

/// What stands before the job's exit status on a line of the guest's console.
pub const EXIT_MARKER: &str = "VCP-JOB-EXIT=";
/// The exit status of a guest whose init failed before or instead of a job.
pub const INIT_FAILED: i32 = 125;
/// The modules of every Linux guest; ext4 is built into Debian's cloud kernel.
pub const GUEST_MODULES: [&str; 5] = ["virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net", "virtio_rng"];

const BUSYBOX: &str = "/bin/busybox";
const COMMON: &str = include_str!("scripts/common.sh");
const INIT: &str = include_str!("scripts/initramfs.sh");

/// A kernel and the initramfs that goes with it.
#[derive(Clone, Debug)]
pub struct LinuxGuest {
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initramfs, an uncompressed cpio archive.
    pub initramfs: PathBuf,
    /// Kernel release.
    pub version: String,
}

/// Returns the newest installed cloud kernel with the ordinary initramfs: virtio modules, no job of its own.
pub fn guest() -> Result<LinuxGuest> {
    let kernel = Kernel::find()?;
    let initramfs = Initramfs::new().build(&kernel)?;
    Ok(LinuxGuest { kernel: kernel.image, initramfs, version: kernel.version })
}

/// Returns the kernel command line word that makes a guest run `script` (POSIX shell). The whole command line of a
/// Linux guest ends at 2047 bytes; a script of up to about 1400 bytes fits.
pub fn job_arg(script: &str) -> String {
    format!("vcp.job64={}", BASE64_STANDARD.encode(script))
}

/// Takes the job's exit status out of a guest's console output.
pub fn job_status(console: &str) -> Option<i32> {
    console.lines().rev().find_map(|line| line.trim().strip_prefix(EXIT_MARKER)?.parse().ok())
}

/// What goes into an initramfs besides busybox and `/init`.
#[derive(Clone, Debug)]
pub struct Initramfs {
    modules: Vec<String>,
    tree: Tree,
}

impl Default for Initramfs {
    fn default() -> Self {
        Self::new()
    }
}

impl Initramfs {
    /// An initramfs with the virtio modules ([`GUEST_MODULES`]).
    pub fn new() -> Self {
        Self { modules: GUEST_MODULES.map(str::to_owned).to_vec(), tree: Tree::new() }
    }

    /// Also inserts `module` with the modules it needs.
    #[must_use]
    pub fn module(mut self, module: &str) -> Self {
        self.modules.push(module.to_owned());
        self
    }

    /// Also has what is in `tree`.
    #[must_use]
    pub fn tree(mut self, tree: &Tree) -> Self {
        self.tree.merge(tree);
        self
    }

    /// Runs `script` (POSIX shell) where the command line names no root device and no other job.
    pub fn job(mut self, script: &str) -> Result<Self> {
        self.tree.bytes("job", 0o644, script)?;
        Ok(self)
    }

    /// Returns everything that the initramfs for `kernel` has.
    pub fn contents(&self, kernel: &Kernel) -> Result<Tree> {
        let mut tree = Tree::new();
        for dir in ["dev", "proc", "run", "sys", "tmp", "modules"] {
            tree.dir(dir)?;
        }
        tree.host("bin/busybox", busybox()?)?;
        tree.bytes("init", 0o755, format!("{COMMON}\n{INIT}"))?;
        for (n, file) in kernel.resolve(&self.modules)?.iter().enumerate() {
            let name = file.file_name().and_then(|n| n.to_str()).unwrap_or("module.ko");
            // The number keeps the shell's alphabetical order the insert order.
            tree.host(&format!("modules/{n:03}-{name}"), file)?;
        }
        tree.merge(&self.tree);
        Ok(tree)
    }

    /// Builds the initramfs for `kernel` and returns its path in the cache.
    pub fn build(&self, kernel: &Kernel) -> Result<PathBuf> {
        let dir = cache::dir()?;
        let file = tempfile::NamedTempFile::new_in(&dir).map_err(Error::io("create a file in", &dir))?;
        let (file, hash) = self.write(kernel, file, &dir)?;
        let path = dir.join(format!("initramfs-{hash}.cpio"));
        if !path.exists() {
            file.persist(&path).map_err(|e| Error::io("write", &path)(e.error))?;
        }
        Ok(path)
    }

    /// Builds the initramfs for `kernel` into a file without a name, for content that is not worth keeping: it is gone
    /// when the last process has closed it.
    pub fn build_unnamed(&self, kernel: &Kernel) -> Result<File> {
        let dir = cache::dir()?;
        let file = tempfile::tempfile_in(&dir).map_err(Error::io("create a file in", &dir))?;
        Ok(self.write(kernel, file, &dir)?.0)
    }

    /// Writes the archive to `out`, a file in `dir`, and returns it with the hash of the archive.
    fn write<W: Write>(&self, kernel: &Kernel, out: W, dir: &Path) -> Result<(W, String)> {
        let tree = self.contents(kernel)?;
        let mut out = cache::Hashing::new(BufWriter::with_capacity(1 << 20, out));
        cpio::write(&tree, &mut out)?;
        let (out, hash) = out.finish();
        let out = out.into_inner().map_err(|e| Error::io("write", dir)(e.into_error()))?;
        Ok((out, hash))
    }
}

/// Returns the path of a static busybox.
pub(crate) fn busybox() -> Result<&'static Path> {
    let path = Path::new(BUSYBOX);
    let is_static = fs::metadata(path).is_ok() && libraries(path)?.is_empty();
    if is_static {
        return Ok(path);
    }
    Err(Error::Missing { what: format!("a static {BUSYBOX}"), package: "busybox-static" })
}

/// The shell functions that both inits begin with.
pub(crate) fn common_script() -> &'static str {
    COMMON
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initramfs_has_busybox_init_and_virtio_in_order() {
        let kernel = Kernel::find().unwrap();
        let tree = Initramfs::new().job("true").unwrap().contents(&kernel).unwrap();
        assert!(tree.get("bin/busybox").is_some() && tree.get("init").is_some() && tree.get("job").is_some());
        let modules: Vec<&str> =
            tree.iter().filter_map(|(p, _)| p.strip_prefix("modules/")).map(|m| &m[4..]).collect();
        let at = |name: &str| {
            let file = format!("{name}.ko");
            modules.iter().position(|m| *m == file).unwrap_or_else(|| panic!("{name} not in {modules:?}"))
        };
        assert!(at("virtio_ring") < at("virtio") && at("virtio") < at("virtio_mmio"));
        assert!(at("virtio_pci_modern_dev") < at("virtio_pci") && at("virtio") < at("virtio_blk"));
        assert!(at("failover") < at("net_failover") && at("net_failover") < at("virtio_net"));
        assert!(at("virtio") < at("virtio-rng"));
    }

    #[test]
    fn built_initramfs_is_the_same_file_each_time() {
        let kernel = Kernel::find().unwrap();
        let first = Initramfs::new().build(&kernel).unwrap();
        let again = Initramfs::new().build(&kernel).unwrap();
        let other = Initramfs::new().job("exit 3").unwrap().build(&kernel).unwrap();
        assert_eq!(first, again);
        assert_ne!(first, other);
    }

    #[test]
    fn status_is_the_last_marker() {
        assert_eq!(job_status("x\nVCP-JOB-EXIT=1\ny\nVCP-JOB-EXIT=42\r\n[ 1.0] reboot"), Some(42));
        assert_eq!(job_status("echo VCP-JOB-EXIT=1"), None);
    }
}
