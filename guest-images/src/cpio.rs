//! Writes cpio archives in the "newc" format, which the Linux kernel takes as an initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Time stamps and owners are zero and inode numbers count up, so that the same tree gives the same bytes.

use std::fs::File;
use std::io::{self, Read, Write};

use crate::tree::{Node, Tree};
use crate::{Error, Result};

const TRAILER: &str = "TRAILER!!!";
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// Writes `tree` to `out` as an archive, trailer included.
pub fn write(tree: &Tree, out: &mut impl Write) -> Result<()> {
    let mut archive = Archive { out, written: 0, ino: 0 };
    for (path, node) in tree.iter() {
        match node {
            Node::Dir { mode } => archive.entry(path, S_IFDIR | mode, 0, &mut io::empty())?,
            Node::Bytes { mode, data } => {
                archive.entry(path, S_IFREG | mode, data.len() as u64, &mut data.as_slice())?;
            }
            Node::Host { mode, path: host } => {
                let mut file = File::open(host).map_err(Error::io("open", host))?;
                let len = file.metadata().map_err(Error::io("read", host))?.len();
                archive.entry(path, S_IFREG | mode, len, &mut file)?;
            }
            Node::Symlink { target } => {
                archive.entry(path, S_IFLNK | 0o777, target.len() as u64, &mut target.as_bytes())?;
            }
        }
    }
    archive.ino = 0;
    archive.entry(TRAILER, 0, 0, &mut io::empty())
}

struct Archive<'a, W> {
    out: &'a mut W,
    written: u64,
    ino: u32,
}

impl<W: Write> Archive<'_, W> {
    fn entry(&mut self, path: &str, mode: u32, len_bytes: u64, mut data: &mut dyn io::Read) -> Result<()> {
        let too_large = || Error::TooLarge { path: path.to_owned(), len_bytes };
        let len = u32::try_from(len_bytes).map_err(|_| too_large())?;
        self.ino += 1;
        let ino = if path == TRAILER { 0 } else { self.ino };
        let links: u32 = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        let name_len = path.len() as u32 + 1;
        // magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let header = format!(
            "070701{ino:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{len:08x}{:08x}{:08x}{:08x}{:08x}{name_len:08x}{:08x}{path}\0",
            0, 0, 0, 0, 0, 0, 0, 0
        );
        self.bytes(header.as_bytes()).map_err(Error::io("write", path))?;
        self.pad().map_err(Error::io("write", path))?;
        let copied = io::copy(&mut (&mut data).take(len_bytes), self.out).map_err(Error::io("copy", path))?;
        if copied != len_bytes {
            let short = io::Error::new(io::ErrorKind::UnexpectedEof, "the file shrank while it was read");
            return Err(Error::io("copy", path)(short));
        }
        self.written += copied;
        self.pad().map_err(Error::io("write", path))
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let gap = (4 - self.written % 4) % 4;
        self.bytes(&[0; 3][..gap as usize])
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Tree {
        let mut tree = Tree::new();
        tree.bytes("init", 0o755, "#!/bin/sh\n").unwrap();
        tree.bytes("etc/odd", 0o640, "12345").unwrap();
        tree.symlink("bin/sh", "busybox").unwrap();
        tree.host("etc/os-release", std::path::Path::new("/etc/os-release")).unwrap();
        tree
    }

    fn cpio(args: &[&str], dir: &std::path::Path, archive: &[u8]) -> String {
        let mut child = Command::new("cpio")
            .args(args)
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("cpio is installed");
        child.stdin.take().unwrap().write_all(archive).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn gnu_cpio_lists_and_unpacks_it() {
        let mut archive = Vec::new();
        write(&sample(), &mut archive).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let list = cpio(&["-t", "--quiet"], dir.path(), &archive);
        let want = ["bin", "bin/sh", "etc", "etc/odd", "etc/os-release", "init"];
        assert_eq!(list.lines().collect::<Vec<_>>(), want);

        cpio(&["-i", "--quiet", "--no-absolute-filenames"], dir.path(), &archive);
        assert_eq!(std::fs::read(dir.path().join("etc/odd")).unwrap(), b"12345");
        assert_eq!(std::fs::read_link(dir.path().join("bin/sh")).unwrap(), std::path::Path::new("busybox"));
        assert_eq!(
            std::fs::read(dir.path().join("etc/os-release")).unwrap(),
            std::fs::read("/etc/os-release").unwrap()
        );
    }

    #[test]
    fn the_same_tree_gives_the_same_bytes() {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        write(&sample(), &mut a).unwrap();
        write(&sample(), &mut b).unwrap();
        assert_eq!(a, b);
        assert_eq!(a.len() % 4, 0);
    }
}
