//! The ext4 root file system image of the Debian guest: a busybox userland whose `/sbin/init` runs a job, prints its
//! exit status as [`crate::linux::EXIT_MARKER`] says, makes the file system read-only (so that it is clean) and powers
//! off. Without a job it is a shell on the console.
//!
//! Made with `mke2fs -d`: no root rights, no loop device, no mount.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::linux::{busybox, common_script};
use crate::qemu::find_program;
use crate::tree::Tree;
use crate::{Error, Result, cache, cpio};

/// Size of an image where none is asked for.
pub const DEFAULT_SIZE_BYTES: u64 = 128 << 20;

const INIT: &str = include_str!("scripts/rootfs.sh");

/// What a root file system image has.
#[derive(Clone, Debug)]
pub struct RootFs {
    tree: Tree,
    size_bytes: u64,
    block_size_bytes: u32,
}

impl Default for RootFs {
    fn default() -> Self {
        Self::new()
    }
}

impl RootFs {
    /// A busybox userland on 128 MiB.
    pub fn new() -> Self {
        Self { tree: Tree::new(), size_bytes: DEFAULT_SIZE_BYTES, block_size_bytes: 4096 }
    }

    /// Sets the size of the image; it is a sparse file.
    #[must_use]
    pub fn size_bytes(mut self, size_bytes: u64) -> Self {
        self.size_bytes = size_bytes;
        self
    }

    /// Also has what is in `tree`.
    #[must_use]
    pub fn tree(mut self, tree: &Tree) -> Self {
        self.tree.merge(tree);
        self
    }

    /// Also has a program of the host with its libraries, at the same path.
    pub fn program(mut self, path: &str) -> Result<Self> {
        self.tree.program(path, Path::new(path))?;
        Ok(self)
    }

    /// Also has the host's `fio`.
    pub fn fio(self) -> Result<Self> {
        let fio = find_program("fio", "fio")?;
        let mut this = self;
        this.tree.program("usr/bin/fio", &fio)?;
        Ok(this)
    }

    /// Runs `script` (POSIX shell) unless the kernel command line names another job.
    pub fn job(mut self, script: &str) -> Result<Self> {
        self.tree.bytes("etc/vcp-job", 0o644, script)?;
        Ok(self)
    }

    /// Returns everything that the image has.
    pub fn contents(&self) -> Result<Tree> {
        let mut tree = Tree::new();
        for dir in
            ["dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var/tmp", "usr/bin", "usr/sbin"]
        {
            tree.dir(dir)?;
        }
        let busybox = busybox()?;
        tree.host("bin/busybox", busybox)?;
        for applet in applets(busybox)? {
            if applet != "busybox" {
                tree.symlink(&format!("bin/{applet}"), "busybox")?;
            }
        }
        tree.bytes("sbin/init", 0o755, format!("{}\n{INIT}", common_script()))?;
        tree.bytes("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n")?;
        tree.bytes("etc/group", 0o644, "root:x:0:\n")?;
        tree.bytes("etc/hostname", 0o644, "vcp\n")?;
        tree.merge(&self.tree);
        Ok(tree)
    }

    /// Builds the image and returns its path in the cache. It is shared with other users: boot a copy
    /// ([`RootFs::build_to`]) if the guest is to write.
    pub fn build(&self) -> Result<PathBuf> {
        let tree = self.contents()?;
        // The hash of an archive of the content, with the parameters, names the image.
        let mut hashing = cache::Hashing::new(std::io::sink());
        cpio::write(&tree, &mut hashing)?;
        let (_, hash) = hashing.finish();
        let dir = cache::dir()?;
        let path = dir.join(format!("rootfs-{hash}-{}-{}.ext4", self.size_bytes, self.block_size_bytes));
        if path.exists() {
            return Ok(path);
        }
        let stage = tempfile::tempdir_in(&dir).map_err(Error::io("create a directory in", &dir))?;
        let root = stage.path().join("root");
        std::fs::create_dir(&root).map_err(Error::io("create", &root))?;
        tree.write_to(&root)?;
        let image = stage.path().join("image");
        File::create(&image).and_then(|f| f.set_len(self.size_bytes)).map_err(Error::io("create", &image))?;
        self.mke2fs(&root, &image)?;
        std::fs::rename(&image, &path).map_err(Error::io("write", &path))?;
        Ok(path)
    }

    /// Builds the image and copies it to `path`, sparse.
    pub fn build_to(&self, path: &Path) -> Result<()> {
        cache::copy_sparse(&self.build()?, path)
    }

    fn mke2fs(&self, root: &Path, image: &Path) -> Result<()> {
        let mke2fs = find_program("mke2fs", "e2fsprogs")?;
        let output = Command::new(mke2fs)
            .args(["-q", "-F", "-t", "ext4", "-L", "vcp-root", "-m", "0"])
            // Initialised here and not in the background by the guest, whose I/O a test may count.
            .args(["-E", "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,nodiscard"])
            .arg("-b")
            .arg(self.block_size_bytes.to_string())
            .arg("-d")
            .args([root, image])
            .output()
            .map_err(Error::io("run", "mke2fs"))?;
        if output.status.success() {
            return Ok(());
        }
        Err(Error::Program {
            program: "mke2fs".into(),
            status: output.status.to_string(),
            output: crate::error::tail(&String::from_utf8_lossy(&output.stderr), 3),
        })
    }
}

/// Asks busybox for the names of its applets.
fn applets(busybox: &Path) -> Result<Vec<String>> {
    let output = Command::new(busybox).arg("--list").output().map_err(Error::io("run", busybox))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

/// Checks with `e2fsck -fn` that the file system in `image` is clean and whole; the error has what it found.
pub fn check(image: &Path) -> Result<()> {
    let e2fsck = find_program("e2fsck", "e2fsprogs")?;
    let output = Command::new(e2fsck).arg("-fn").arg(image).output().map_err(Error::io("run", "e2fsck"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    // With -n, e2fsck skips a journal that needs recovery and only says so.
    if output.status.success() && !text.contains("recovery") {
        return Ok(());
    }
    Err(Error::Program {
        program: format!("e2fsck -fn {}", image.display()),
        status: output.status.to_string(),
        output: crate::error::tail(&format!("{text}\n{}", String::from_utf8_lossy(&output.stderr)), 8),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn image_is_clean_sparse_and_has_init() {
        let image = RootFs::new().size_bytes(64 << 20).job("echo hello").unwrap().build().unwrap();
        check(&image).unwrap();
        let meta = std::fs::metadata(&image).unwrap();
        assert_eq!(meta.len(), 64 << 20);
        assert!(meta.blocks() * 512 < 32 << 20, "{} blocks", meta.blocks());
        let debugfs = find_program("debugfs", "e2fsprogs").unwrap();
        let output = Command::new(debugfs).args(["-R", "cat /etc/vcp-job"]).arg(&image).output().unwrap();
        assert_eq!(output.stdout, b"echo hello");
    }

    #[test]
    fn damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("root.ext4");
        RootFs::new().size_bytes(64 << 20).build_to(&copy).unwrap();
        // The block bitmap lies behind the superblock and the group descriptors.
        let file = File::options().write(true).open(&copy).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0; 64 << 10], 1 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 4096], 8 << 10).unwrap();
        assert!(matches!(check(&copy), Err(Error::Program { .. })));
    }

    #[test]
    fn image_that_is_too_small_is_refused() {
        let error = RootFs::new().size_bytes(1 << 20).build().unwrap_err();
        assert!(matches!(error, Error::Program { .. }), "{error}");
    }
}
