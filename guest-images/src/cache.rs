//! Where built images are kept: by content hash, written once and put in place by rename, so that parallel builders
//! neither disturb each other nor ever show a half-written file.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Environment variable that names another place for built images.
pub const DIR_VARIABLE: &str = "VCP_GUEST_IMAGES_DIR";

/// Returns the directory of built images and makes it: `$VCP_GUEST_IMAGES_DIR`, else `guest-images` in the target
/// directory of this workspace.
pub fn dir() -> Result<PathBuf> {
    let dir = match (env::var_os(DIR_VARIABLE), env::var_os("CARGO_TARGET_DIR")) {
        (Some(dir), _) => PathBuf::from(dir),
        (None, Some(target)) => PathBuf::from(target).join("guest-images"),
        (None, None) => workspace().join("target/guest-images"),
    };
    fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
    fs::canonicalize(&dir).map_err(Error::io("find", dir))
}

/// Returns the root of the workspace that this crate was built in.
pub(crate) fn workspace() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// A writer that hashes what passes through it.
pub(crate) struct Hashing<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Hashing<W> {
    pub(crate) fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new() }
    }

    /// Returns the writer and the first 16 hexadecimal digits of the hash.
    pub(crate) fn finish(self) -> (W, String) {
        let digest = self.hash.finalize();
        (self.inner, digest.iter().take(8).map(|b| format!("{b:02x}")).collect())
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.hash.update(&buf[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Copies `from` to `to` and leaves holes where blocks are zero.
pub fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    const BLOCK: usize = 64 << 10;
    let mut source = File::open(from).map_err(Error::io("open", from))?;
    let len = source.metadata().map_err(Error::io("read", from))?.len();
    let target = File::create(to).map_err(Error::io("create", to))?;
    target.set_len(len).map_err(Error::io("size", to))?;
    let mut block = vec![0; BLOCK];
    let mut at = 0;
    while at < len {
        let n = source.read(&mut block).map_err(Error::io("read", from))?;
        if n == 0 {
            break;
        }
        if block[..n].iter().any(|b| *b != 0) {
            std::os::unix::fs::FileExt::write_all_at(&target, &block[..n], at)
                .map_err(Error::io("write", to))?;
        }
        at += n as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn sparse_copy_keeps_content_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(8 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"end", (8 << 20) - 3).unwrap();
        copy_sparse(&from, &to).unwrap();
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
    }
}
